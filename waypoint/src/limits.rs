//! What strangers and single peers may cost.

use std::{
    collections::{HashMap, hash_map::Entry},
    sync::Arc,
    time::Duration,
};

use mesh::identity::Identity;
use parking_lot::Mutex;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::timeout,
};

/// A handshake that waits longer for its turn than this is one too many.
const TURN: Duration = Duration::from_secs(2);

/// Handshakes under way: each costs milliseconds of a processor, and nobody who begins one has proven anything.
#[derive(Clone, Debug)]
pub(crate) struct Handshakes(Arc<Semaphore>);

impl Handshakes {
    pub(crate) fn new(limit: usize) -> Self {
        Self(Arc::new(Semaphore::new(limit.min(Semaphore::MAX_PERMITS))))
    }

    /// A turn, in order of arrival; `None` where it does not come.
    pub(crate) async fn turn(&self) -> Option<OwnedSemaphorePermit> {
        let turn = self.0.clone().acquire_owned();
        timeout(TURN, turn).await.ok()?.ok()
    }
}

/// Connections of each identity. Holds no more entries than there are connections.
#[derive(Debug)]
pub(crate) struct Peers {
    limit: usize,
    counts: Mutex<HashMap<Identity, usize>>,
}

/// One connection of a peer, counted until this is dropped.
#[derive(Debug)]
pub(crate) struct Counted {
    peers: Arc<Peers>,
    identity: Identity,
}

impl Peers {
    pub(crate) fn new(limit: usize) -> Arc<Self> {
        Arc::new(Self {
            limit,
            counts: Mutex::default(),
        })
    }

    /// Counts one more; `None` where the identity has as many as one may have.
    pub(crate) fn enter(self: &Arc<Self>, identity: &Identity) -> Option<Counted> {
        let mut counts = self.counts.lock();
        let count = counts.entry(identity.clone()).or_default();
        if *count >= self.limit {
            return None;
        }
        *count += 1;
        Some(Counted {
            peers: Arc::clone(self),
            identity: identity.clone(),
        })
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        let mut counts = self.peers.counts.lock();
        if let Entry::Occupied(mut entry) = counts.entry(self.identity.clone()) {
            *entry.get_mut() -= 1;
            if *entry.get() == 0 {
                entry.remove();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_identity_has_its_limit_and_others_theirs() {
        let peers = Peers::new(2);
        let identity = |account: &str| -> Identity {
            format!("spiffe://td/ns/a/sa/{account}").parse().unwrap()
        };
        let first = peers.enter(&identity("x"));
        let second = peers.enter(&identity("x"));
        assert!(first.is_some() && second.is_some());
        assert!(peers.enter(&identity("x")).is_none());
        assert!(peers.enter(&identity("y")).is_some());
        drop(first);
        assert!(peers.enter(&identity("x")).is_some());
        drop(second);
        assert!(peers.counts.lock().is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn a_handshake_waits_for_its_turn_and_not_for_ever() {
        let handshakes = Handshakes::new(1);
        let first = handshakes.turn().await;
        assert!(first.is_some());
        assert!(handshakes.turn().await.is_none());
        drop(first);
        assert!(handshakes.turn().await.is_some());
    }
}
