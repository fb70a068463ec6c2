//! Death at each step of joining and leaving: the agent is killed, as the kernel kills, before and after each run of `nft`
//! and at each message to the tunnel, and the tunnel at each message. The next one makes it good: no pod is stuck, none
//! that is told enabled speaks in clear, and nothing is left of one that has left.
//!
//! Every step ends in the one or the other, so numbering them finds all steps, also ones that are added later.

use std::{
    fs,
    path::Path,
    process::{Child, Command, Stdio},
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

use crate::{
    agent::{UID, enrolment, pod, socket, write},
    flows::{Held, echoes, routes},
    rig::{PATIENCE, Rig, dial, eventually, on_a_rig, path, picture},
    tunnel::{Death, Manners, Told, Tunnel, Whose},
};

/// More steps than there are: a guard against a test that never ends.
const TOO_MANY: usize = 40;

/// An `nft` that counts its runs and, at the one that is aimed at, kills the agent before or after its work.
const NFT: &str = r#"#!/bin/sh
here=${0%/*}
PATH=/usr/sbin:/sbin:/usr/bin:/bin
echo run >> "$here/runs"
now=$(wc -l < "$here/runs")
shoot() {
    if [ "$(cat "$here/aim" 2>/dev/null)" = "$now $1" ]; then
        rm "$here/aim"
        kill -9 $PPID
        exit 1
    fi
}
shoot before
nft "$@"
code=$?
shoot after
exit $code
"#;

/// Puts a program in place by another process: a file that this one had open for writing may still be so in a child that
/// another test forks just then, and could not be run (`ETXTBSY`).
fn install(text: &str, program: &Path) {
    let source = program.with_extension("text");
    fs::write(&source, text).expect("write");
    let mut install = Command::new("install");
    let done = install.args(["-m", "755"]).args([&source, program]);
    assert!(done.status().expect("run install").success(), "install");
}

/// The agent as a process of its own.
struct Agent(Child);

impl Agent {
    fn start(rig: &Rig, folder: &Path, manners: &Manners) -> Agent {
        let log = fs::File::create(folder.join("agent.log")).expect("a log");
        let agent = Command::new(env!("CARGO_BIN_EXE_cni-agent"))
            .env_clear()
            .env("PATH", folder)
            .env("LEYLINE_LOCAL_FOLDER", folder)
            .env("LEYLINE_HOST_NETNS", path(&rig.node))
            .env("LEYLINE_PROBE_SOURCE", "mark:0x2000")
            .env("LEYLINE_LEAVE_GRACE", "0")
            .env("ZTUNNEL_UDS_ADDRESS", socket(folder))
            .stdout(log.try_clone().expect("the log"))
            .stderr(log)
            .stdin(Stdio::null())
            .spawn()
            .expect("start the agent");
        manners.agent.store(agent.id(), Ordering::SeqCst);
        Agent(agent)
    }

    fn is_dead(&mut self) -> bool {
        self.0.try_wait().expect("wait").is_some()
    }

    fn files(&self) -> usize {
        let folder = format!("/proc/{}/fd", self.0.id());
        fs::read_dir(folder).expect("its files").count()
    }
}

impl Agent {
    fn kill(&mut self) {
        // It may be dead already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.kill();
    }
}

/// What is to happen to the pod.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Mind {
    /// It stays at what is wanted.
    Same,
    /// While nobody is there to see it, the pod is wanted out again.
    Changes,
}

/// A pod that joins and leaves again and again, while others die.
struct Bed<'a> {
    rig: &'a Rig,
    folder: &'a Path,
    manners: Manners,
    agent: Agent,
    tunnel: Tunnel,
    before: String,
    /// Whether the pod is wanted in the mesh: on its way out it may speak in clear.
    wanted: bool,
}

impl<'a> Bed<'a> {
    async fn new(rig: &'a Rig, folder: &'a Path) -> Self {
        install(NFT, &folder.join("nft"));
        let manners = Manners::default();
        let before = picture(&rig.pod);
        let agent = Agent::start(rig, folder, &manners);
        let tunnel = Tunnel::follow(&socket(folder), manners.clone()).await;
        Bed {
            rig,
            folder,
            manners,
            agent,
            tunnel,
            before,
            wanted: false,
        }
    }

    fn want(&mut self, wanted: bool) {
        self.wanted = wanted;
        write(self.folder, &pod(self.rig, wanted.then_some("ambient")));
    }

    fn next_agent(&mut self) {
        self.agent.kill();
        self.agent = Agent::start(self.rig, self.folder, &self.manners);
    }

    async fn next_tunnel(&mut self) {
        self.tunnel.kill().await;
        self.tunnel = Tunnel::follow(&socket(self.folder), self.manners.clone()).await;
    }

    /// The pod joins and leaves once; whether somebody died meanwhile: while it joined, while it left.
    async fn round(&mut self, case: &str, mind: Mind) -> [bool; 2] {
        self.want(true);
        let died_joining = self.until(case, "joined", Self::is_in, mind).await;
        if !died_joining || mind == Mind::Same {
            self.is_carried(case).await;
            self.want(false);
        }
        let died_leaving = self.until(case, "left", Self::is_out, Mind::Same).await;
        Held::open(self.rig, 4).await;
        [died_joining, died_leaving]
    }

    /// Waits, and has another one take the place of whoever dies. Where the pod's mind changes then, that is the end.
    async fn until(
        &mut self,
        case: &str,
        what: &str,
        done: impl Fn(&Self) -> bool,
        mind: Mind,
    ) -> bool {
        let began = Instant::now();
        let mut died = false;
        loop {
            // Looked at first: who has died before it was done is seen below, however soon it was.
            let is_done = done(self);
            let log = || fs::read_to_string(self.folder.join("agent.log")).unwrap_or_default();
            let late = began.elapsed() > 3 * PATIENCE;
            assert!(!late, "{case}: still not {what}: {}", log());
            if self.agent.is_dead() {
                died = true;
                self.is_unharmed(case).await;
                if mind == Mind::Changes {
                    self.want(false);
                }
                self.next_agent();
            } else if self.tunnel.is_dead() {
                died = true;
                self.speaks_not_in_clear(case).await;
                self.next_tunnel().await;
            } else if is_done {
                return died;
            }
            if died && mind == Mind::Changes {
                return true;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    fn is_enabled(&self) -> bool {
        enrolment(self.folder).is_some_and(|file| file.redirection == "enabled")
    }

    fn is_in(&self) -> bool {
        let has_it = || self.tunnel.told.lock().contains(&Told::Add(UID.into()));
        self.is_enabled() && !self.tunnel.is_dead() && has_it()
    }

    fn is_out(&self) -> bool {
        enrolment(self.folder).is_none() && picture(&self.rig.pod) == self.before
    }

    /// Without an agent, what is open goes on and what is new passes: through the tunnel, where that is told.
    async fn is_unharmed(&self, case: &str) {
        match self.wanted && self.is_enabled() {
            true => self.is_carried(case).await,
            false => drop(Held::open(self.rig, 4).await),
        }
    }

    async fn is_carried(&self, case: &str) {
        let carried = || {
            let (outbound, inbound) = self.tunnel.carried();
            outbound + inbound
        };
        let before = carried();
        Held::open(self.rig, 4).await;
        assert_eq!(carried() - before, 4, "{case}: in clear");
    }

    /// Without a tunnel, nothing passes of a pod that is told enabled.
    async fn speaks_not_in_clear(&self, case: &str) {
        if !(self.wanted && self.is_enabled()) {
            return;
        }
        for (netns, to) in routes(self.rig) {
            assert!(dial(&netns, to).await.is_err(), "{case}: {to} in clear");
        }
    }
}

async fn agent_at_each_run(rig: &Rig, folder: &Path) {
    let _echoes = echoes(rig);
    let mut bed = Bed::new(rig, folder).await;
    // A changed mind matters to joins alone: whoever leaves has changed it.
    let changed = |[joining, _]: [bool; 2]| joining;
    let same = |[joining, leaving]: [bool; 2]| joining || leaving;
    // The node's rules, and of the pod: its probes and its rules; then those of the leave, no probes, no rules.
    assert!(at_each_run(&mut bed, Mind::Changes, changed).await >= 4);
    assert!(at_each_run(&mut bed, Mind::Same, same).await >= 7);
}

/// Answers at how many runs of `nft` the agent could be killed.
async fn at_each_run(bed: &mut Bed<'_>, mind: Mind, counts: fn([bool; 2]) -> bool) -> usize {
    let mut number = 0;
    let mut killed = true;
    while killed {
        number += 1;
        assert!(number < TOO_MANY, "no end of runs");
        killed = false;
        for when in ["before", "after"] {
            let aim = format!("{number} {when}");
            fs::write(bed.folder.join("runs"), "").expect("count anew");
            fs::write(bed.folder.join("aim"), &aim).expect("aim");
            bed.next_agent();
            killed |= counts(bed.round(&format!("killed at run {aim}"), mind).await);
        }
    }
    number - 1
}

async fn at_each_message(bed: &mut Bed<'_>, whose: Whose) -> usize {
    let mut number = 0;
    loop {
        let mut died = false;
        for answered in [false, true] {
            *bed.manners.death.lock() = Some(Death {
                after: number,
                answered,
                whose,
            });
            match whose {
                Whose::Agent => bed.next_agent(),
                Whose::Tunnel => bed.next_tunnel().await,
            }
            let case = format!("{whose:?} dies at message {number}, answered: {answered}");
            died |= bed.round(&case, Mind::Same).await.contains(&true);
        }
        if !died {
            return number;
        }
        number += 1;
        assert!(number < TOO_MANY, "no end of messages");
    }
}

async fn agent_at_each_message(rig: &Rig, folder: &Path) {
    let _echoes = echoes(rig);
    let mut bed = Bed::new(rig, folder).await;
    let messages = at_each_message(&mut bed, Whose::Agent).await;
    assert!(messages >= 3, "snapshot, add, delete: {messages}");
}

async fn tunnel_at_each_message(rig: &Rig, folder: &Path) {
    let _echoes = echoes(rig);
    let mut bed = Bed::new(rig, folder).await;
    bed.round("nobody dies", Mind::Same).await;
    let files = bed.agent.files();
    let messages = at_each_message(&mut bed, Whose::Tunnel).await;
    assert!(messages >= 3, "snapshot, add, delete: {messages}");
    assert!(!bed.agent.is_dead(), "the agent lives through it all");
    eventually("the agent's files are closed", async || {
        bed.agent.files() <= files
    })
    .await;
}

on_a_rig! {
    an_agent_killed_at_any_run_of_nft_is_made_good => agent_at_each_run,
    an_agent_killed_at_any_message_is_made_good => agent_at_each_message,
    a_tunnel_that_dies_at_any_message_is_made_good => tunnel_at_each_message,
}
