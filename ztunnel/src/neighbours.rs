//! Two pods that this tunnel both serves: their bytes go from socket to socket, with no TLS and over no interface.
//!
//! Who the client is the agent attests, where a tunnel would prove it; every other question is put as it is for a
//! tunnel: where the connection ends, what policies say of it, now and whenever they change.
//!
//! What the network between the pods would not let through must not pass here either: a CNI enforces NetworkPolicy on the
//! interfaces. So a tunnel is dialled over them, as a witness, and its word is good for [`GOOD_FOR`]. Without one, the
//! connection takes a tunnel.

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{Arc, Weak},
    time::Duration,
};

use mesh::{names::WorkloadUid, outcome::LocalWorkload, workload::Workload};
use net::{
    hbone::{Client, Driver, Target},
    report::Chain,
    tls::{CertificateId, PeerIdentity},
};
use parking_lot::Mutex;
use tokio::time::{Instant, sleep};
use tokio_util::task::AbortOnDropHandle;

use crate::pod::Pod;

/// How long a witness vouches for the way, and from when on another one is sent after it.
const GOOD_FOR: Duration = Duration::from_secs(10);
const RENEW_AFTER: Duration = Duration::from_secs(5);

/// The pods of this node, by who they are.
#[derive(Default)]
pub(crate) struct Neighbours {
    pods: Mutex<HashMap<LocalWorkload, Weak<Pod>>>,
}

impl Neighbours {
    /// A pod that is served from now on; the last of its name is the one that is found.
    pub(crate) fn enter(&self, pod: &Arc<Pod>) {
        let mut pods = self.pods.lock();
        pods.retain(|_, known| known.strong_count() > 0);
        pods.insert(pod.binding.clone(), Arc::downgrade(pod));
    }

    fn find(&self, workload: &Workload) -> Option<Arc<Pod>> {
        let binding = LocalWorkload {
            name: workload.name.clone(),
            namespace: workload.namespace.clone(),
            service_account: workload.service_account.clone(),
        };
        self.pods.lock().get(&binding)?.upgrade()
    }
}

/// A neighbour that may be reached from socket to socket now.
#[derive(Clone)]
pub(crate) struct Neighbour {
    pub(crate) pod: Arc<Pod>,
    /// Who answered the witness.
    pub(crate) peer: Arc<PeerIdentity>,
    /// The certificates of both ends.
    pub(crate) rests_on: Arc<[CertificateId]>,
}

/// What a pod's witnesses say of the ways to its neighbours. Holds one entry for each neighbour that was connected to
/// within [`GOOD_FOR`].
#[derive(Default)]
pub(crate) struct Witnesses {
    known: Mutex<HashMap<Key, Way>>,
}

#[derive(Clone, PartialEq, Eq, Hash)]
struct Key {
    destination: SocketAddr,
    workload: WorkloadUid,
    generation: u64,
}

struct Way {
    since: Instant,
    /// A witness is on its way.
    asked: bool,
    stands: Option<Witness>,
}

struct Witness {
    client: Client,
    /// With it the connection ends.
    _driver: AbortOnDropHandle<()>,
    pod: Weak<Pod>,
    rests_on: Arc<[CertificateId]>,
}

impl Way {
    fn asked_for() -> Self {
        Self {
            since: Instant::now(),
            asked: true,
            stands: None,
        }
    }

    fn neighbour(&mut self) -> Option<Neighbour> {
        let good = self.since.elapsed() < GOOD_FOR;
        let witness = self.stands.as_mut()?;
        if !(good && witness.client.is_usable()) {
            return None;
        }
        Some(Neighbour {
            pod: witness.pod.upgrade()?,
            peer: witness.client.peer().clone(),
            rests_on: witness.rests_on.clone(),
        })
    }
}

/// The neighbour that `target` names, where a witness says that the way to it is open. Where none says so, one is sent,
/// for the next connection.
pub(crate) fn find(from: &Arc<Pod>, workload: &Workload, target: &Target) -> Option<Neighbour> {
    let pod = from.node.neighbours.find(workload)?;
    let key = Key {
        destination: target.destination,
        workload: workload.uid.clone(),
        generation: target.certificate.generation(),
    };
    let mut known = from.witnesses.known.lock();
    let way = known.entry(key.clone()).or_insert_with(|| {
        send(from, &pod, &key, target);
        Way::asked_for()
    });
    if !way.asked && way.since.elapsed() >= RENEW_AFTER {
        way.asked = true;
        send(from, &pod, &key, target);
    }
    way.neighbour().filter(|it| Arc::ptr_eq(&it.pod, &pod))
}

fn send(from: &Arc<Pod>, to: &Arc<Pod>, key: &Key, target: &Target) {
    let (from, to) = (Arc::downgrade(from), Arc::downgrade(to));
    tokio::spawn(ask(from, to, key.clone(), target.clone()));
}

/// One witness: sent, heard, and forgotten once its word is no longer good.
async fn ask(from: Weak<Pod>, to: Weak<Pod>, key: Key, target: Target) {
    let own: Vec<CertificateId> = target.certificate.certificate_ids().collect();
    let stands = witness(&from, &to, target)
        .await
        .map(|(client, driver)| Witness {
            rests_on: client.peer().chain.iter().cloned().chain(own).collect(),
            client,
            _driver: AbortOnDropHandle::new(tokio::spawn(driver)),
            pod: to,
        });
    let since = Instant::now();
    if let Some(from) = from.upgrade() {
        let way = Way {
            since,
            asked: false,
            stands,
        };
        from.witnesses.known.lock().insert(key.clone(), way);
    }
    sleep(GOOD_FOR).await;
    if let Some(from) = from.upgrade() {
        let mut known = from.witnesses.known.lock();
        if known
            .get(&key)
            .is_some_and(|way| !way.asked && way.since == since)
        {
            known.remove(&key);
        }
    }
}

/// A tunnel over the interfaces to a pod of ours that has the address.
async fn witness(from: &Weak<Pod>, to: &Weak<Pod>, target: Target) -> Option<(Client, Driver)> {
    let (from, to) = (from.upgrade()?, to.upgrade()?);
    let destination = target.destination;
    if !to.sockets.is_local(destination.ip()) {
        tracing::debug!(%destination, pod = %to.uid, "a neighbour does not have its address");
        return None;
    }
    drop(to);
    match from.pool.dial_apart(target).await {
        Ok(stands) => Some(stands),
        Err(error) => {
            let error = Chain(&error).to_string();
            tracing::debug!(%destination, error, "no way to a neighbour");
            None
        }
    }
}
