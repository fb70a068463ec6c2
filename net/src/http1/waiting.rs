//! Connections on which nothing is being answered: so many at most, and the latest stay.

use std::{
    collections::BTreeMap,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use hyper::body::{Body, Frame, SizeHint};
use parking_lot::Mutex;
use tokio::sync::Notify;

/// Those of one listener.
#[derive(Clone)]
pub(super) struct Waiting {
    most: usize,
    line: Arc<Mutex<Line>>,
}

#[derive(Default)]
struct Line {
    /// How many have come to wait so far, which numbers them.
    came: u64,
    /// By when they came; each with what ends it.
    by_turn: BTreeMap<u64, Arc<Notify>>,
}

impl Waiting {
    pub(super) fn at_most(most: usize) -> Self {
        Self {
            most,
            line: Arc::default(),
        }
    }

    /// Of a new connection, which waits for its first request.
    pub(super) fn place(&self) -> Place {
        let seat = Seat {
            waiting: self.clone(),
            turn: Mutex::default(),
            lost: Arc::default(),
        };
        seat.wait();
        Place(Arc::new(seat))
    }
}

/// One connection's; it leaves with its last clone.
#[derive(Clone)]
pub(super) struct Place(Arc<Seat>);

struct Seat {
    waiting: Waiting,
    /// `None`: something is being answered.
    turn: Mutex<Option<u64>>,
    lost: Arc<Notify>,
}

impl Seat {
    fn wait(&self) {
        let mut line = self.waiting.line.lock();
        let turn = line.came;
        line.came += 1;
        line.by_turn.insert(turn, self.lost.clone());
        *self.turn.lock() = Some(turn);
        if line.by_turn.len() > self.waiting.most
            && let Some((_, longest)) = line.by_turn.pop_first()
        {
            longest.notify_one();
        }
    }

    fn leave(&self) {
        let mut line = self.waiting.line.lock();
        if let Some(turn) = self.turn.lock().take() {
            line.by_turn.remove(&turn);
        }
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.leave();
    }
}

impl Place {
    /// Until the connection has to make room.
    pub(super) async fn lost(&self) {
        self.0.lost.notified().await;
    }

    /// A request has come: the connection stays until it is answered.
    pub(super) fn take(&self) -> Busy {
        self.0.leave();
        Busy(self.clone())
    }
}

/// A request is being answered; dropped, the connection waits again.
pub(super) struct Busy(Place);

impl Busy {
    /// As long as the body is being sent, too.
    pub(super) fn until_sent(self, body: axum::body::Body) -> Sent {
        Sent { body, _busy: self }
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.0.wait();
    }
}

/// A body whose connection is busy until it is sent.
pub(super) struct Sent {
    body: axum::body::Body,
    _busy: Busy,
}

impl Body for Sent {
    type Data = <axum::body::Body as Body>::Data;
    type Error = <axum::body::Body as Body>::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Self::Data>, Self::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    fn lost(places: &[Place]) -> Vec<bool> {
        let lost = |place: &Place| place.lost().now_or_never().is_some();
        places.iter().map(lost).collect()
    }

    #[test]
    fn who_has_waited_longest_makes_room() {
        let waiting = Waiting::at_most(2);
        let places: Vec<_> = (0..4).map(|_| waiting.place()).collect();
        assert_eq!(lost(&places), [true, true, false, false]);
        drop(places);
        assert!(waiting.line.lock().by_turn.is_empty());
    }

    #[test]
    fn who_is_being_answered_stays_and_waits_anew_afterwards() {
        let waiting = Waiting::at_most(2);
        let mut places = vec![waiting.place(), waiting.place()];
        let busy = places[0].take().until_sent(axum::body::Body::empty());
        places.push(waiting.place());
        assert_eq!(lost(&places), [false, false, false]);
        drop(busy);
        assert_eq!(lost(&places), [false, true, false]);
    }
}
