//! The task that owns one pod.

use std::{
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use net::{
    netns::{Netns, NetnsError, NetnsId},
    zds::WorkloadInfo,
};
use tokio::{
    sync::{Semaphore, watch},
    time::timeout,
};

use super::machine::{Announced, Goal, Progress, Rules, Step, next_step};
use crate::{
    agent::{Enrolment, EnrolmentSink, PodRef, SinkError, Timing},
    apply::{self, ApplyError, Nft, RuleState},
    host::{HostSetError, ProbeSets},
    rules::Stage,
    telemetry::Telemetry,
    zds_server::{AnnounceError, Announcement, Tunnels, chain},
};

/// Longer than the codec's deadlines for a few queued messages; then the pod is told pending and tries again.
const ANNOUNCE_DEADLINE: Duration = Duration::from_secs(30);

/// What all owners use.
pub(crate) struct Shared<K> {
    pub(crate) nft: Nft,
    /// The node's namespace: never a pod's.
    pub(crate) host: Netns,
    pub(crate) tunnels: Tunnels,
    pub(crate) probes: ProbeSets,
    pub(crate) sink: K,
    pub(crate) timing: Timing,
    /// Bounds how many pods run `nft` at once.
    pub(crate) writers: Semaphore,
    pub(crate) telemetry: Telemetry,
}

/// What an owner is told: always the latest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Order {
    pub(crate) goal: Goal,
    pub(crate) info: WorkloadInfo,
    pub(crate) netns: Option<PathBuf>,
    /// A tunnel refused the pod: announce it again. Counts up.
    pub(crate) refusals: u64,
}

/// How far a pod is, for those who wait for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Standing {
    /// On its way in or out; what failed last, if anything did.
    Moving(Option<String>),
    /// Redirected, with its listeners open and its probes let through, in this namespace.
    In(NetnsId),
    /// Nothing of ours is in it.
    Out,
}

/// A step that did not succeed.
#[derive(Debug, thiserror::Error)]
enum StepError {
    #[error("the pod's network namespace is not known")]
    NoNetns,
    #[error("the pod's network namespace is the node's own")]
    HostNetns,
    #[error(transparent)]
    Netns(#[from] NetnsError),
    #[error(transparent)]
    Announce(#[from] AnnounceError),
    #[error(transparent)]
    Apply(#[from] ApplyError),
    #[error(transparent)]
    Probes(#[from] HostSetError),
    #[error(transparent)]
    Tell(#[from] SinkError),
    #[error("{0} took too long")]
    Late(&'static str),
}

pub(crate) struct Owner<K> {
    pod: PodRef,
    shared: Arc<Shared<K>>,
    orders: watch::Receiver<Order>,
    standing: watch::Sender<Standing>,
    order: Order,
    netns: Option<Netns>,
    progress: Progress,
    /// When the pod was first wanted in; for the time that joining takes.
    wanted_at: Option<Instant>,
}

impl<K: EnrolmentSink> Owner<K> {
    /// An owner that takes the pod as it finds it: rules that an earlier agent wrote count as done, and the tunnels'
    /// next snapshot has the pod. `told` is what the outside was told before, as far as is known.
    pub(crate) async fn adopt(
        pod: PodRef,
        shared: Arc<Shared<K>>,
        mut orders: watch::Receiver<Order>,
        standing: watch::Sender<Standing>,
        told: Option<Enrolment>,
    ) -> Self {
        let order = orders.borrow_and_update().clone();
        let wanted_at = matches!(order.goal, Goal::In(_)).then(Instant::now);
        let progress = Progress {
            told,
            ..Progress::default()
        };
        let mut owner = Owner {
            pod,
            shared,
            orders,
            standing,
            order,
            netns: None,
            progress,
            wanted_at,
        };
        if let Err(error) = owner.read_back().await {
            tracing::warn!(pod = %owner.pod, error = chain(&error), "read a pod's rules back");
        }
        owner
    }

    /// Works until the pod has ended.
    pub(crate) async fn run(mut self) {
        let mut pause = self.shared.timing.retry_first;
        loop {
            self.take_order();
            let step = next_step(
                &self.order.goal,
                &self.progress,
                &self.shared.timing,
                Instant::now(),
            );
            self.stand(&step);
            match step {
                Step::Done => return,
                Step::Rest => self.new_order().await,
                Step::Wait(time) => {
                    let _ = timeout(time, self.new_order()).await;
                    self.progress.connections = None;
                }
                step => match self.perform(&step).await {
                    Ok(()) => pause = self.shared.timing.retry_first,
                    Err(error) => {
                        self.failed(&step, &error).await;
                        self.back_off(&error, pause).await;
                        pause = (pause * 2).min(self.shared.timing.retry_longest);
                    }
                },
            }
        }
    }

    /// Whoever waits for the pod need not wait until the outside has been told.
    fn stand(&self, next: &Step) {
        let done = matches!(
            next,
            Step::Tell(Enrolment::Enabled) | Step::Rest | Step::Done
        );
        let now = match (&self.order.goal, &self.netns) {
            (Goal::In(_), Some(netns)) if done => Standing::In(netns.id()),
            (Goal::Out | Goal::Gone, _) if matches!(next, Step::Rest | Step::Done) => Standing::Out,
            _ => match &*self.standing.borrow() {
                Standing::Moving(reason) => Standing::Moving(reason.clone()),
                _ => Standing::Moving(None),
            },
        };
        self.stand_as(now);
    }

    fn stand_as(&self, now: Standing) {
        self.standing.send_if_modified(|standing| {
            let changed = *standing != now;
            *standing = now;
            changed
        });
    }

    /// Waits until there is an order that has not been taken.
    async fn new_order(&mut self) {
        match self.orders.changed().await {
            Ok(()) => self.orders.mark_changed(),
            // The agent is stopping, and leaves everything as it is.
            Err(_) => std::future::pending().await,
        }
    }

    fn take_order(&mut self) {
        if !self.orders.has_changed().unwrap_or(false) {
            return;
        }
        let order = self.orders.borrow_and_update().clone();
        if order.refusals != self.order.refusals {
            self.progress.announced = Announced::Asked;
        }
        let joins = matches!(order.goal, Goal::In(_));
        if joins != matches!(self.order.goal, Goal::In(_)) {
            self.wanted_at = joins.then(Instant::now);
        }
        self.order = order;
        if joins {
            self.notice_new_namespace();
        }
    }

    /// A sandbox that was made anew starts from nothing, at the same path or at another.
    fn notice_new_namespace(&mut self) {
        let opened = self.order.netns.as_ref().map(Netns::open);
        if let (Some(held), Some(Ok(opened))) = (&self.netns, opened)
            && *held != opened
        {
            tracing::info!(pod = %self.pod, "the pod has a new network namespace");
            self.netns = Some(opened);
            self.progress.announced = Announced::Asked;
            self.progress.rules = Rules::None;
            self.progress.leaving_since = None;
        }
    }

    fn netns(&mut self) -> Result<Netns, StepError> {
        if let Some(netns) = &self.netns {
            return Ok(netns.clone());
        }
        let path = self.order.netns.as_ref().ok_or(StepError::NoNetns)?;
        let netns = Netns::open(path)?;
        if netns == self.shared.host {
            return Err(StepError::HostNetns);
        }
        self.netns = Some(netns.clone());
        Ok(netns)
    }

    fn announcement(&self, netns: Option<Netns>) -> Announcement {
        Announcement {
            uid: self.pod.uid.clone(),
            info: self.order.info.clone(),
            netns,
        }
    }

    /// Whoever is enrolled stays so across a restart of the agent, untouched. Also where reading back fails: a tunnel
    /// that serves the pod must not drop it because it misses in the snapshot.
    async fn read_back(&mut self) -> Result<(), StepError> {
        if self.order.goal == Goal::Gone {
            return Ok(());
        }
        let enrolled = self.progress.told != Some(Enrolment::None);
        let netns = match self.netns() {
            Ok(netns) => netns,
            Err(error) => {
                if enrolled {
                    self.remember(None, Announced::Asked);
                    return Err(error);
                }
                // Nobody wants anything of it yet.
                return Ok(());
            }
        };
        if enrolled {
            self.remember(Some(netns.clone()), Announced::Asked);
        }
        let state = {
            let _writer = self.shared.writers.acquire().await;
            self.shared.nft.state(&netns).await?
        };
        self.progress.rules = self.found(&state);
        if self.progress.rules != Rules::None {
            // What was told enabled, a tunnel has acknowledged; anything else is asked again.
            let enabled = self.progress.told == Some(Enrolment::Enabled);
            self.remember(
                Some(netns.clone()),
                if enabled {
                    Announced::Yes
                } else {
                    Announced::Asked
                },
            );
        }
        self.progress.leaving_since = (self.progress.rules == Rules::Leaving).then(Instant::now);
        if self.order.goal == Goal::Out && self.progress.rules == Rules::None {
            // An agent that died between the routing and the rules left the former.
            self.shared.nft.remove_routing(&netns).await?;
        }
        Ok(())
    }

    fn remember(&mut self, netns: Option<Netns>, announced: Announced) {
        self.shared.tunnels.remember(self.announcement(netns));
        self.progress.announced = announced;
    }

    fn found(&self, state: &RuleState) -> Rules {
        match (&self.order.goal, state.stage()) {
            (Goal::In(plan), _) if state.is(&plan.rules, Stage::Redirect) => {
                Rules::Redirect(Some(plan.rules.clone()))
            }
            (_, Some(Stage::Leaving)) => Rules::Leaving,
            _ if state.touched() => Rules::Redirect(None),
            _ => Rules::None,
        }
    }

    async fn perform(&mut self, step: &Step) -> Result<(), StepError> {
        match step {
            Step::Announce => self.announce().await?,
            Step::Redirect(rules) => {
                self.write(Stage::Redirect, rules.clone()).await?;
                self.progress.rules = Rules::Redirect(Some(rules.clone()));
                self.progress.leaving_since = None;
            }
            Step::StopRedirecting => {
                let rules = match &self.progress.rules {
                    Rules::Redirect(Some(rules)) => rules.clone(),
                    _ => crate::rules::PodRules::default(),
                };
                self.write(Stage::Leaving, rules).await?;
                self.progress.rules = Rules::Leaving;
                self.progress.leaving_since = Some(Instant::now());
                self.progress.connections = None;
            }
            Step::Probes(entries) => {
                self.in_time(
                    "the node's probe set",
                    self.shared.probes.set(&self.pod.uid, entries.clone()),
                )
                .await??;
                self.progress.probes = Some(entries.clone());
            }
            Step::Tell(enrolment) => self.tell(enrolment).await?,
            Step::CountConnections => {
                let netns = self.netns()?;
                self.progress.connections = Some(
                    self.in_time("counting sockets", apply::tunnelled_connections(&netns))
                        .await??,
                );
            }
            Step::Withdraw => {
                self.shared.tunnels.withdraw(&self.pod.uid).await;
                self.progress.announced = Announced::No;
            }
            Step::RemoveRules => self.remove_rules().await?,
            Step::Wait(_) | Step::Rest | Step::Done => {}
        }
        Ok(())
    }

    async fn announce(&mut self) -> Result<(), StepError> {
        let netns = self.netns()?;
        let announcement = self.announcement(Some(netns));
        self.progress.announced = Announced::Asked;
        let asked = timeout(
            ANNOUNCE_DEADLINE,
            self.shared.tunnels.announce(announcement),
        )
        .await;
        asked.map_err(|_| StepError::Late("the node tunnel's answer"))??;
        self.progress.announced = Announced::Yes;
        Ok(())
    }

    async fn write(
        &mut self,
        stage: Stage,
        rules: crate::rules::PodRules,
    ) -> Result<(), StepError> {
        let netns = self.netns()?;
        let _writer = self.shared.writers.acquire().await;
        self.in_time(
            "writing rules",
            self.shared.nft.apply(&netns, &rules, stage),
        )
        .await??;
        Ok(())
    }

    async fn remove_rules(&mut self) -> Result<(), StepError> {
        let netns = self.netns()?;
        let _writer = self.shared.writers.acquire().await;
        self.in_time("removing rules", self.shared.nft.remove(&netns))
            .await??;
        self.progress.rules = Rules::None;
        self.progress.leaving_since = None;
        tracing::info!(pod = %self.pod, "out of the mesh");
        Ok(())
    }

    async fn tell(&mut self, enrolment: &Enrolment) -> Result<(), StepError> {
        let told = self
            .in_time(
                "telling the enrolment",
                self.shared.sink.set(&self.pod, enrolment),
            )
            .await?;
        match told {
            // Nobody is left to be told.
            Err(error) if self.order.goal == Goal::Gone => {
                tracing::debug!(pod = %self.pod, error = chain(&error), "tell that a pod has ended");
            }
            told => told?,
        }
        self.progress.told = Some(enrolment.clone());
        if *enrolment == Enrolment::Enabled {
            let took = self.wanted_at.take().map(|wanted| wanted.elapsed());
            let took_ms = took.map(|took| took.as_millis());
            tracing::info!(pod = %self.pod, took_ms, "in the mesh");
            self.shared.telemetry.joined(took);
        }
        Ok(())
    }

    async fn in_time<T>(
        &self,
        what: &'static str,
        step: impl Future<Output = T>,
    ) -> Result<T, StepError> {
        timeout(self.shared.timing.step, step)
            .await
            .map_err(|_| StepError::Late(what))
    }

    async fn failed(&mut self, step: &Step, error: &StepError) {
        let reason = chain(error);
        self.stand_as(Standing::Moving(Some(reason.clone())));
        self.shared.telemetry.step_failed(step.name());
        let wanted = matches!(self.order.goal, Goal::In(_)) && !matches!(step, Step::Tell(_));
        let pending = Enrolment::Pending {
            reason: reason.clone(),
        };
        if self.progress.told.as_ref() == Some(&pending) {
            tracing::debug!(pod = %self.pod, step = step.name(), reason, "still failing");
            return;
        }
        tracing::warn!(pod = %self.pod, step = step.name(), reason, "enrolment step failed, will be retried");
        if wanted && let Err(error) = self.tell(&pending).await {
            tracing::warn!(pod = %self.pod, error = chain(&error), "tell that a pod is pending");
        }
    }

    /// A tunnel that comes ends the pause of whoever waits for one; a change of the goal ends any.
    async fn back_off(&mut self, error: &StepError, pause: Duration) {
        let mut connected = self.shared.tunnels.connected();
        let waits_for_tunnel = matches!(error, StepError::Announce(AnnounceError::NoTunnel));
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = self.new_order() => {}
            _ = connected.wait_for(|tunnels| *tunnels > 0), if waits_for_tunnel => {}
        }
    }
}

impl Step {
    fn name(&self) -> &'static str {
        match self {
            Step::Announce => "announce",
            Step::Redirect(_) => "redirect",
            Step::Probes(_) => "probes",
            Step::Tell(_) => "tell",
            Step::StopRedirecting => "stop_redirecting",
            Step::CountConnections => "count_connections",
            Step::Wait(_) => "wait",
            Step::Withdraw => "withdraw",
            Step::RemoveRules => "remove_rules",
            Step::Rest => "rest",
            Step::Done => "done",
        }
    }
}
