//! The TLS handshakes under way on a pod's HBONE port: so many at a time, of which a peer that stalls holds none for
//! long.
//!
//! Whoever has not proven itself costs a socket, a task and TLS buffers. While there is no room, new connections wait in
//! the kernel's backlog, so a crowd of honest peers is served in turn. A handshake that has had time enough then gives
//! way: without that, a few silent connections a second would keep everybody else out.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use parking_lot::Mutex;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Instant, sleep_until},
};
use tokio_util::sync::CancellationToken;

/// Handshakes of one pod at a time.
const LIMIT: usize = 1024;
/// What a handshake has in any case, however many wait. An honest one takes two round trips.
const PATIENCE: Duration = Duration::from_secs(1);

/// The handshakes of one pod.
#[derive(Debug)]
pub(crate) struct Handshakes {
    slots: Arc<Semaphore>,
    patience: Duration,
    /// The oldest first.
    under_way: Mutex<BTreeMap<u64, Begun>>,
    next: AtomicU64,
}

#[derive(Debug)]
struct Begun {
    at: Instant,
    gives_way: CancellationToken,
}

/// Room for one handshake.
#[derive(Debug)]
pub(crate) struct Slot {
    _permit: OwnedSemaphorePermit,
}

/// A handshake under way, until this is dropped.
#[derive(Debug)]
pub(crate) struct UnderWay {
    handshakes: Arc<Handshakes>,
    id: u64,
    gives_way: CancellationToken,
    _slot: Slot,
}

/// It had to give way to another one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the TLS handshake was not finished within {PATIENCE:?}, and others are waiting")]
pub(crate) struct GaveWay;

impl Default for Handshakes {
    fn default() -> Self {
        Self::new(LIMIT, PATIENCE)
    }
}

impl Handshakes {
    fn new(limit: usize, patience: Duration) -> Self {
        Self {
            slots: Arc::new(Semaphore::new(limit)),
            patience,
            under_way: Mutex::default(),
            next: AtomicU64::new(0),
        }
    }

    /// Waits for room, and makes some where the oldest has had its time. Cancel-safe.
    pub(crate) async fn admit(self: Arc<Self>) -> Slot {
        let slot = self.slots.clone().acquire_owned();
        let mut slot = std::pin::pin!(slot);
        let permit = tokio::select! {
            biased;
            permit = &mut slot => permit,
            () = self.make_room() => slot.await,
        };
        Slot {
            _permit: permit.expect("the semaphore is never closed"),
        }
    }

    async fn make_room(&self) {
        let oldest = self.under_way.lock().first_key_value().map(|(_, it)| it.at);
        // Where none has begun, slots are held by connections about to be accepted.
        let since = oldest.unwrap_or_else(Instant::now);
        sleep_until(since + self.patience).await;
        if let Some((_, oldest)) = self.under_way.lock().pop_first() {
            oldest.gives_way.cancel();
        }
    }

    /// Begins one.
    pub(crate) fn begin(self: &Arc<Self>, slot: Slot) -> UnderWay {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let gives_way = CancellationToken::new();
        let begun = Begun {
            at: Instant::now(),
            gives_way: gives_way.clone(),
        };
        self.under_way.lock().insert(id, begun);
        UnderWay {
            handshakes: self.clone(),
            id,
            gives_way,
            _slot: slot,
        }
    }
}

impl UnderWay {
    /// Resolves when it must give way. Cancel-safe.
    pub(crate) async fn gives_way(&self) -> GaveWay {
        self.gives_way.cancelled().await;
        GaveWay
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.handshakes.under_way.lock().remove(&self.id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn full(limit: usize) -> (Arc<Handshakes>, Vec<UnderWay>) {
        let handshakes = Arc::new(Handshakes::new(limit, PATIENCE));
        let mut begun = Vec::new();
        for _ in 0..limit {
            begun.push(handshakes.begin(handshakes.clone().admit().await));
        }
        (handshakes, begun)
    }

    #[tokio::test(start_paused = true)]
    async fn the_oldest_that_stalls_gives_way_and_no_other() {
        let (handshakes, mut begun) = full(3).await;
        let start = Instant::now();
        let stalled = begun.remove(0);
        let stalls = async move {
            stalled.gives_way().await;
            drop(stalled);
        };
        let (_room, ()) = tokio::join!(handshakes.clone().admit(), stalls);
        assert_eq!(start.elapsed(), PATIENCE);
        assert!(begun.iter().all(|other| !other.gives_way.is_cancelled()));
    }

    #[tokio::test(start_paused = true)]
    async fn a_crowd_that_makes_progress_waits_its_turn() {
        let (handshakes, mut begun) = full(2).await;
        let done = begun.remove(0);
        let progress = async move {
            tokio::time::sleep(PATIENCE / 2).await;
            drop(done);
        };
        let (_room, ()) = tokio::join!(handshakes.clone().admit(), progress);
        assert!(!begun[0].gives_way.is_cancelled());
        assert_eq!(handshakes.under_way.lock().len(), 1);
    }
}
