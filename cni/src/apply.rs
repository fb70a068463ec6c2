//! Writes the rules into a namespace, reads them back and removes them, with the `nft` program and netlink.
//!
//! Every change is one nftables transaction, so there is no moment with half of the rules. The program is started
//! from a thread of the blocking pool that is in the pod's namespace while it forks, never from a runtime's worker.

use std::{
    env, io,
    path::{Path, PathBuf},
    process::{Output, Stdio},
    time::Duration,
};

use net::{
    netns::{Netns, NetnsError},
    sysctl::Sysctl,
};
use serde_json::{Value, json};
use tokio::{
    io::AsyncWriteExt,
    process::{Child, Command},
    time::timeout,
};

use crate::{
    kubelet,
    netlink::{self, Verb},
    rules::{
        ACCEPTED_MARK, Family, INBOUND_HBONE_PORT, INBOUND_PLAINTEXT_PORT, OUTBOUND_PORT, PodRules,
        Stage, iptables,
        nft::{self, Installed, TABLES},
    },
};

/// A run of `nft` takes milliseconds; one that takes this long is stuck.
const RUN_DEADLINE: Duration = Duration::from_secs(5);
/// How much of a program's complaint is kept.
const COMPLAINT_CHARS: usize = 600;

/// A program that is not installed.
#[derive(Debug, Clone, thiserror::Error)]
#[error(
    "`{program}` is not installed (Debian package `{package}`); looked in PATH, /usr/sbin and /sbin"
)]
pub struct MissingTool {
    /// The program.
    pub program: &'static str,
    /// The package that has it.
    pub package: &'static str,
}

/// Rules that could not be written, read or removed.
#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    /// The namespace cannot be entered.
    #[error(transparent)]
    Netns(#[from] NetnsError),
    /// A program cannot be started or its pipes broke.
    #[error("run {program}")]
    Run {
        /// The program.
        program: String,
        /// Why.
        source: io::Error,
    },
    /// A program did not end in time; it was killed.
    #[error("{program} did not end within {RUN_DEADLINE:?}")]
    Stuck {
        /// The program.
        program: String,
    },
    /// A program says no.
    #[error("{program} failed: {complaint}")]
    Refused {
        /// The program.
        program: String,
        /// What it printed.
        complaint: String,
    },
    /// What `nft` printed is not what it documents.
    #[error("read the output of nft")]
    Output(#[source] serde_json::Error),
    /// Routing could not be changed.
    #[error("change policy routing")]
    Routing(#[source] io::Error),
    /// Sockets could not be counted.
    #[error("count sockets")]
    Sockets(#[source] io::Error),
    /// Another agent's rules of the legacy iptables backend, which nftables can neither see nor replace.
    #[error("another mesh's rules are there in iptables-legacy; restart the pod to hand it over")]
    LegacyRules,
}

/// What is in a pod's namespace.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RuleState {
    /// What our comment says, if it is there.
    pub installed: Option<Installed>,
    /// How many rules are in our tables.
    pub rules: usize,
    /// Tables of our names without our comment: upstream's agent, nftables backend.
    pub foreign_nft: bool,
    /// Upstream's agent, iptables backend: what removes it, in order.
    foreign_iptables: Vec<Value>,
    /// IPv6 is off in this namespace.
    pub ipv6_off: bool,
}

impl RuleState {
    /// The stage that is in force; `None` without rules of ours, or with some of them missing.
    pub fn stage(&self) -> Option<Stage> {
        let installed = self.installed.as_ref()?;
        (installed.rules == self.rules).then_some(installed.stage)
    }

    /// Exactly these rules, whole, and nobody else's.
    pub fn is(&self, rules: &PodRules, stage: Stage) -> bool {
        let expected = Installed::of(&self.effective(rules), stage);
        !self.foreign()
            && self.rules == expected.rules
            && self.installed.as_ref() == Some(&expected)
    }

    /// Rules of another agent are there.
    pub fn foreign(&self) -> bool {
        self.foreign_nft || !self.foreign_iptables.is_empty()
    }

    /// Redirection rules of some kind are there: ours, whole or not, or another agent's.
    pub fn touched(&self) -> bool {
        self.rules > 0 || self.foreign()
    }

    fn effective(&self, rules: &PodRules) -> PodRules {
        PodRules {
            ipv6: rules.ipv6 && !self.ipv6_off,
            ..rules.clone()
        }
    }
}

/// The `nft` program.
#[derive(Clone, Debug)]
pub struct Nft {
    program: PathBuf,
    legacy_save: Option<PathBuf>,
    /// The cgroup namespace that the node's own rules are written in; `None`: ours.
    cgroups: Option<PathBuf>,
}

impl Nft {
    /// Looks for it in `PATH`, and where Debian keeps it although users' `PATH` does not lead there.
    ///
    /// # Errors
    /// It is not installed.
    pub fn find() -> Result<Nft, MissingTool> {
        let missing = MissingTool {
            program: "nft",
            package: "nftables",
        };
        let program = find_program("nft").ok_or(missing)?;
        Ok(Nft {
            program,
            legacy_save: find_program("iptables-legacy-save"),
            cgroups: None,
        })
    }

    /// The same program, run in this cgroup namespace: for rules that name cgroups.
    #[must_use]
    pub fn in_cgroup_namespace(&self, path: Option<PathBuf>) -> Nft {
        Nft {
            cgroups: path,
            ..self.clone()
        }
    }

    /// Makes the namespace hold exactly the rules of `stage`. Idempotent, one transaction; another agent's rules are
    /// replaced in the same one. Routing comes first: a marked reply must never miss its table.
    ///
    /// # Errors
    /// [`ApplyError`]; the namespace then has the rules it had before.
    pub async fn apply(
        &self,
        netns: &Netns,
        rules: &PodRules,
        stage: Stage,
    ) -> Result<(), ApplyError> {
        let state = self.state(netns).await?;
        let rules = state.effective(rules);
        route(netns, Verb::Add, rules.families()).await?;
        if state.is(&rules, stage) {
            return accepted_marks(netns, true).await;
        }
        let untouched = !state.touched();
        let transaction = nft::install(&rules, stage, state.foreign_iptables);
        let written = self.commit(netns, &transaction).await;
        if written.is_err() && untouched {
            self.remove_routing(netns).await?;
        }
        written?;
        accepted_marks(netns, true).await
    }

    /// Removes everything of ours. Idempotent. Connections that are still redirected break. The tables go last: as long
    /// as they are there, whoever comes after a crash knows that there is something to remove.
    ///
    /// # Errors
    /// [`ApplyError`]; running it again continues.
    pub async fn remove(&self, netns: &Netns) -> Result<(), ApplyError> {
        self.remove_routing(netns).await?;
        accepted_marks(netns, false).await?;
        self.commit(netns, &nft::remove()).await
    }

    /// Removes the routing alone, which comes before the rules and so can be there without them. Idempotent.
    ///
    /// # Errors
    /// [`ApplyError`].
    pub async fn remove_routing(&self, netns: &Netns) -> Result<(), ApplyError> {
        let families: &[Family] = if ipv6_off(netns).await? {
            &[Family::V4]
        } else {
            &[Family::V4, Family::V6]
        };
        route(netns, Verb::Delete, families).await
    }

    /// Reads back what is there.
    ///
    /// # Errors
    /// [`ApplyError`].
    pub async fn state(&self, netns: &Netns) -> Result<RuleState, ApplyError> {
        // A pod that was never enrolled has nothing to list, and a burst of them would start as many programs. Where the
        // kernel does not say, the program is asked.
        let empty = matches!(inside(netns, netlink::has_nft_tables).await?, Ok(false));
        let mut state = if empty {
            RuleState::default()
        } else {
            read_listing(&self.list_ruleset(Some(netns)).await?)
        };
        state.ipv6_off = ipv6_off(netns).await?;
        self.refuse_legacy(netns).await?;
        Ok(state)
    }

    /// Runs a text in nft's own language as one transaction, in `netns` or where the agent is.
    ///
    /// # Errors
    /// [`ApplyError`].
    pub async fn run_text(&self, netns: Option<&Netns>, text: &str) -> Result<(), ApplyError> {
        self.run(netns, &["-f", "-"], Some(text.as_bytes()))
            .await
            .map(drop)
    }

    /// Lists everything, as JSON, in `netns` or where the agent is.
    ///
    /// # Errors
    /// [`ApplyError`].
    pub async fn list_ruleset(&self, netns: Option<&Netns>) -> Result<Value, ApplyError> {
        let output = self.run(netns, &["-j", "list", "ruleset"], None).await?;
        serde_json::from_slice(&output.stdout).map_err(ApplyError::Output)
    }

    async fn commit(&self, netns: &Netns, transaction: &Value) -> Result<(), ApplyError> {
        let text = transaction.to_string();
        self.run(Some(netns), &["-j", "-f", "-"], Some(text.as_bytes()))
            .await
            .map(drop)
    }

    async fn run(
        &self,
        netns: Option<&Netns>,
        arguments: &[&str],
        input: Option<&[u8]>,
    ) -> Result<Output, ApplyError> {
        run(
            &self.program,
            netns,
            self.cgroups.as_deref(),
            arguments,
            input,
        )
        .await
    }

    /// iptables-legacy keeps its rules apart from nftables; only its own program can tell whose they are.
    async fn refuse_legacy(&self, netns: &Netns) -> Result<(), ApplyError> {
        let names = inside(netns, || {
            std::fs::read_to_string("/proc/thread-self/net/ip_tables_names")
        })
        .await?;
        let in_use = names.is_ok_and(|names| names.lines().any(|name| name == "nat"));
        let Some(program) = self.legacy_save.as_deref().filter(|_| in_use) else {
            return Ok(());
        };
        let output = run(program, Some(netns), None, &["-t", "nat"], None).await?;
        let text = String::from_utf8_lossy(&output.stdout);
        if text.contains(iptables::PREROUTING_CHAIN) {
            Err(ApplyError::LegacyRules)
        } else {
            Ok(())
        }
    }
}

/// How many connections are still in the tunnel's hands in this pod.
///
/// # Errors
/// [`ApplyError::Netns`], [`ApplyError::Sockets`].
pub async fn tunnelled_connections(netns: &Netns) -> Result<usize, ApplyError> {
    const PORTS: [u16; 3] = [OUTBOUND_PORT, INBOUND_PLAINTEXT_PORT, INBOUND_HBONE_PORT];
    inside(netns, || netlink::connections_on(&PORTS))
        .await?
        .map_err(ApplyError::Sockets)
}

async fn route(netns: &Netns, verb: Verb, families: &[Family]) -> Result<(), ApplyError> {
    let families = families.to_vec();
    inside(netns, move || netlink::routing(verb, &families))
        .await?
        .map_err(ApplyError::Routing)
}

async fn ipv6_off(netns: &Netns) -> Result<bool, ApplyError> {
    let setting = inside(netns, || {
        std::fs::read_to_string("/proc/sys/net/ipv6/conf/lo/disable_ipv6")
    })
    .await?;
    // A kernel without IPv6 has no such file.
    Ok(setting.map_or(true, |text| text.trim() != "0"))
}

/// Runs `action` in the namespace on a thread of the blocking pool.
/// Lets what a pod accepts have the mark that it arrived with, or not. Without it packets are marked one by one.
async fn accepted_marks(netns: &Netns, inherited: bool) -> Result<(), ApplyError> {
    let pod = netns.clone();
    let value = if inherited { "1" } else { "0" };
    let set = move || Sysctl::open()?.set(&pod, ACCEPTED_MARK, value);
    if let Err(error) = inside(netns, set).await? {
        tracing::debug!(%error, setting = ACCEPTED_MARK, "a pod's setting cannot be written");
    }
    Ok(())
}

async fn inside<T: Send + 'static>(
    netns: &Netns,
    action: impl FnOnce() -> T + Send + 'static,
) -> Result<T, NetnsError> {
    let netns = netns.clone();
    match tokio::task::spawn_blocking(move || netns.run(action)).await {
        Ok(result) => result,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            // The runtime is shutting down, and this task with it.
            Err(_) => std::future::pending().await,
        },
    }
}

async fn run(
    program: &Path,
    netns: Option<&Netns>,
    cgroups: Option<&Path>,
    arguments: &[&str],
    input: Option<&[u8]>,
) -> Result<Output, ApplyError> {
    let name = program
        .file_name()
        .unwrap_or(program.as_os_str())
        .to_string_lossy()
        .into_owned();
    let failed = |source| ApplyError::Run {
        program: name.clone(),
        source,
    };
    let mut command = Command::new(program);
    command
        .args(arguments)
        .env("LC_ALL", "C")
        .kill_on_drop(true);
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let cgroups = cgroups.map(Path::to_owned);
    let start = move || match cgroups {
        Some(path) => kubelet::in_namespace(&path, || command.spawn()).flatten(),
        None => command.spawn(),
    };
    let child = match netns {
        Some(netns) => inside(netns, start).await?,
        None => start(),
    };
    let finished = timeout(RUN_DEADLINE, feed(child.map_err(failed)?, input)).await;
    let stuck = |_| ApplyError::Stuck {
        program: name.clone(),
    };
    let output = finished.map_err(stuck)?.map_err(failed)?;
    if output.status.success() {
        return Ok(output);
    }
    let text = String::from_utf8_lossy(&output.stderr);
    let complaint = text.split_whitespace().collect::<Vec<_>>().join(" ");
    let complaint = complaint.chars().take(COMPLAINT_CHARS).collect();
    Err(ApplyError::Refused {
        program: name,
        complaint,
    })
}

async fn feed(mut child: Child, input: Option<&[u8]>) -> io::Result<Output> {
    let stdin = child.stdin.take();
    if let (Some(mut stdin), Some(input)) = (stdin, input) {
        // A program that fails early closes its end; what it then prints says more than the broken pipe.
        let _ = stdin.write_all(input).await;
    }
    child.wait_with_output().await
}

fn find_program(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let usual = ["/usr/sbin", "/sbin", "/usr/local/sbin"].map(PathBuf::from);
    env::split_paths(&path)
        .chain(usual)
        .map(|folder| folder.join(name))
        .find(|file| file.is_file())
}

fn read_listing(listing: &Value) -> RuleState {
    let mut state = RuleState::default();
    let mut seen_table = false;
    let mut jumps = Vec::new();
    let mut chains = Vec::new();
    let ours: Vec<&str> = TABLES.iter().map(|table| table.nft_name()).collect();
    for object in listing["nftables"].as_array().into_iter().flatten() {
        let Some((kind, object)) = object.as_object().and_then(|object| object.iter().next())
        else {
            continue;
        };
        let family = object["family"].as_str().unwrap_or_default();
        let table = object["table"].as_str().unwrap_or_default();
        match kind.as_str() {
            "table" if family == "inet" => {
                seen_table |= object["name"].as_str().is_some_and(|name| ours.contains(&name));
            }
            "rule" if family == "inet" && ours.contains(&table) => {
                state.rules += 1;
                let comment = object["comment"].as_str().and_then(Installed::parse);
                state.installed = comment.or(state.installed.take());
            }
            "rule" if foreign_jump(object) => jumps.push(json!({ "delete": { "rule": {
                "family": family, "table": table, "chain": object["chain"], "handle": object["handle"],
            } } })),
            "chain" if foreign_chain(family, &object["name"]) => {
                let chain = json!({ "family": family, "table": table, "name": object["name"] });
                chains.push(json!({ "flush": { "chain": chain } }));
                chains.push(json!({ "delete": { "chain": chain } }));
            }
            _ => {}
        }
    }
    state.foreign_nft = seen_table && state.installed.is_none();
    // A sidecar's rules have a chain ISTIO_OUTPUT too, and must be left alone; ISTIO_PRERT is ambient's only.
    let ambient = chains
        .iter()
        .any(|chain| names_chain(chain, iptables::PREROUTING_CHAIN));
    if ambient {
        state.foreign_iptables = jumps;
        state.foreign_iptables.append(&mut chains);
    }
    state
}

fn names_chain(command: &Value, name: &str) -> bool {
    command
        .pointer("/flush/chain/name")
        .is_some_and(|found| found == name)
}

/// iptables-nft keeps its rules in tables of families `ip` and `ip6`.
fn foreign_chain(family: &str, name: &Value) -> bool {
    let names = [iptables::PREROUTING_CHAIN, iptables::OUTPUT_CHAIN];
    matches!(family, "ip" | "ip6") && name.as_str().is_some_and(|name| names.contains(&name))
}

fn foreign_jump(rule: &Value) -> bool {
    let family = rule["family"].as_str().unwrap_or_default();
    let statements = rule["expr"].as_array().into_iter().flatten();
    statements
        .into_iter()
        .any(|statement| foreign_chain(family, &statement["jump"]["target"]))
}
