//! All pods of the node: one owner each, told the latest.

use std::{
    collections::{BTreeSet, HashMap},
    sync::Arc,
};

use net::zds::WorkloadInfo;
use tokio::{
    sync::{oneshot, watch},
    task::JoinSet,
};

use super::{Enrolment, EnrolmentSink, PodRef};
use crate::{
    enrol::{Goal, Order, Owner, Plan, Shared, Standing},
    facts::{PodEvent, PodFacts, Policy, REDIRECTION_ANNOTATION, Wanted},
    zds_server::Refusal,
};

pub(super) struct Pods<K> {
    policy: Policy,
    shared: Arc<Shared<K>>,
    followed: HashMap<String, Followed>,
    owners: JoinSet<String>,
    /// The mesh leaves this node: nobody is wanted in any more.
    leaving: bool,
}

struct Followed {
    pod: PodRef,
    orders: watch::Sender<Order>,
    standing: watch::Receiver<Standing>,
    /// Tunnels were told that it terminates.
    draining: bool,
}

impl<K: EnrolmentSink> Pods<K> {
    pub(super) fn new(policy: Policy, shared: Arc<Shared<K>>) -> Self {
        Pods {
            policy,
            shared,
            followed: HashMap::new(),
            owners: JoinSet::new(),
            leaving: false,
        }
    }

    pub(super) fn uids(&self) -> impl Iterator<Item = &str> {
        self.followed.keys().map(String::as_str)
    }

    /// Takes the first snapshot and waits until every owner has read its pod back.
    pub(super) async fn adopt(&mut self, first: PodEvent) {
        let adopted: Vec<_> = match first {
            PodEvent::Snapshot(pods) => pods
                .into_iter()
                .filter_map(|pod| self.upsert(pod))
                .collect(),
            other => {
                tracing::error!("the source of pods did not begin with a snapshot");
                self.take(other);
                Vec::new()
            }
        };
        for owner in adopted {
            let _ = owner.await;
        }
    }

    pub(super) fn take(&mut self, event: PodEvent) {
        match event {
            PodEvent::Snapshot(pods) => {
                self.shared.telemetry.event("snapshot");
                let present: BTreeSet<String> = pods.iter().map(|pod| pod.uid.clone()).collect();
                let gone: Vec<String> = self
                    .followed
                    .keys()
                    .filter(|uid| !present.contains(*uid))
                    .cloned()
                    .collect();
                gone.iter().for_each(|uid| self.remove(uid));
                for pod in pods {
                    self.upsert(pod);
                }
            }
            PodEvent::Upsert(pod) => {
                self.shared.telemetry.event("upsert");
                self.upsert(*pod);
            }
            PodEvent::Remove { uid } => {
                self.shared.telemetry.event("remove");
                self.remove(&uid);
            }
        }
    }

    /// Takes a pod whose sandbox is being made; answers how far it is, from now on.
    pub(super) fn admit(&mut self, pod: PodFacts) -> Option<watch::Receiver<Standing>> {
        self.shared.telemetry.event("admit");
        let uid = pod.uid.clone();
        self.upsert(pod);
        self.followed
            .get(&uid)
            .map(|followed| followed.standing.clone())
    }

    /// Takes every pod out of the mesh; what is wanted from now on does not count.
    pub(super) fn release(&mut self) {
        self.leaving = true;
        for followed in self.followed.values() {
            followed.orders.send_if_modified(|order| {
                let joined = matches!(order.goal, Goal::In(_));
                if joined {
                    order.goal = Goal::Out;
                }
                joined
            });
        }
    }

    /// How many pods are not out of the mesh yet.
    pub(super) fn remaining(&self) -> usize {
        let out = |followed: &&Followed| *followed.standing.borrow() != Standing::Out;
        self.followed.values().filter(out).count()
    }

    /// A tunnel refused a pod: its owner asks again, and tells.
    pub(super) fn refused(&mut self, refusal: &Refusal) {
        if let Some(followed) = self.followed.get(&refusal.uid) {
            followed.orders.send_modify(|order| order.refusals += 1);
        }
    }

    /// The next owner that has nothing left to do; `None` at once where nobody is followed. Cancel-safe.
    pub(super) async fn ended(&mut self) -> Option<String> {
        loop {
            match self.owners.join_next().await? {
                Ok(uid) => return Some(uid),
                // Its pod keeps the rules it has; the next event about it starts a new owner.
                Err(error) => tracing::error!(%error, "the owner of a pod died"),
            }
        }
    }

    /// Forgets a pod whose owner has ended, unless it came back in that very moment.
    pub(super) fn forget(&mut self, uid: &str) {
        let Some(followed) = self.followed.get(uid) else {
            return;
        };
        if !followed.orders.is_closed() {
            return;
        }
        let (pod, order) = (followed.pod.clone(), followed.orders.borrow().clone());
        self.followed.remove(uid);
        if order.goal != Goal::Gone {
            self.follow(pod, order, None);
        }
        self.shared.telemetry.pods(self.followed.len());
    }

    fn remove(&mut self, uid: &str) {
        if let Some(followed) = self.followed.get(uid) {
            followed.orders.send_modify(|order| order.goal = Goal::Gone);
        }
    }

    /// Answers when the owner, if one is new, has read its pod back.
    fn upsert(&mut self, pod: PodFacts) -> Option<oneshot::Receiver<()>> {
        // Its namespace is the node's own: there is nothing that could be redirected for it alone.
        if pod.host_network {
            return None;
        }
        let goal = self.goal(&pod);
        self.tell_terminating(&pod, &goal);
        let followed = self
            .followed
            .get(&pod.uid)
            .filter(|followed| !followed.orders.is_closed());
        let Some(followed) = followed else {
            return self.begin(&pod, goal);
        };
        followed.orders.send_if_modified(|order| {
            let before = order.clone();
            order.goal = goal;
            order.info = info(&pod);
            order.netns.clone_from(&pod.netns);
            *order != before
        });
        None
    }

    fn goal(&self, pod: &PodFacts) -> Goal {
        match self.policy.wanted_now(pod) {
            Wanted::In if self.leaving => Goal::Out,
            Wanted::In => Goal::In(Plan {
                rules: self.policy.rules(pod),
                probes: self.policy.probe_entries(pod),
            }),
            Wanted::Out => Goal::Out,
            Wanted::Gone => Goal::Gone,
        }
    }

    fn tell_terminating(&mut self, pod: &PodFacts, goal: &Goal) {
        let Some(followed) = self.followed.get_mut(&pod.uid) else {
            return;
        };
        if pod.terminating && !followed.draining && matches!(goal, Goal::In(_)) {
            followed.draining = true;
            self.shared.tunnels.drain(&pod.uid);
        }
    }

    fn begin(&mut self, facts: &PodFacts, goal: Goal) -> Option<oneshot::Receiver<()>> {
        let told = match facts
            .annotations
            .get(REDIRECTION_ANNOTATION)
            .map(String::as_str)
        {
            None => Enrolment::None,
            Some("enabled") => Enrolment::Enabled,
            Some(_) => Enrolment::Pending {
                reason: String::new(),
            },
        };
        if goal == Goal::Gone && told == Enrolment::None {
            return None;
        }
        let pod = PodRef {
            uid: facts.uid.clone(),
            namespace: facts.namespace.clone(),
            name: facts.name.clone(),
        };
        let order = Order {
            goal,
            info: info(facts),
            netns: facts.netns.clone(),
            refusals: 0,
        };
        let adopted = self.follow(pod, order, Some(told));
        self.shared.telemetry.pods(self.followed.len());
        Some(adopted)
    }

    fn follow(
        &mut self,
        pod: PodRef,
        order: Order,
        told: Option<Enrolment>,
    ) -> oneshot::Receiver<()> {
        let (orders, receiver) = watch::channel(order);
        let (stands, standing) = watch::channel(Standing::Moving(None));
        let (adopted, read_back) = oneshot::channel();
        let (shared, uid) = (self.shared.clone(), pod.uid.clone());
        let followed = Followed {
            pod: pod.clone(),
            orders,
            standing,
            draining: false,
        };
        self.followed.insert(uid.clone(), followed);
        self.owners.spawn(async move {
            let owner = Owner::adopt(pod, shared, receiver, stands, told).await;
            let _ = adopted.send(());
            owner.run().await;
            uid
        });
        read_back
    }
}

fn info(pod: &PodFacts) -> WorkloadInfo {
    WorkloadInfo {
        name: pod.name.clone(),
        namespace: pod.namespace.clone(),
        service_account: pod.service_account.clone(),
    }
}
