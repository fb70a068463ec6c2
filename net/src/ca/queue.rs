//! Turns at the CA: a few at a time, the most urgent first.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use parking_lot::Mutex;
use tokio::sync::Notify;

use super::Priority;

/// Hands out a fixed number of turns, by priority and then by age.
#[derive(Debug)]
pub(super) struct Queue {
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    free: usize,
    waiting: Vec<Arc<Place>>,
}

/// A place in the queue, whose priority can be raised while it waits.
#[derive(Debug)]
pub(super) struct Place {
    priority: Mutex<Priority>,
    granted: AtomicBool,
    notify: Notify,
}

impl Place {
    pub(super) fn new(priority: Priority) -> Arc<Self> {
        Arc::new(Self {
            priority: Mutex::new(priority),
            granted: AtomicBool::new(false),
            notify: Notify::new(),
        })
    }

    pub(super) fn raise(&self, priority: Priority) {
        let mut current = self.priority.lock();
        *current = priority.max(*current);
    }

    pub(super) fn lower(&self, priority: Priority) {
        *self.priority.lock() = priority;
    }
}

/// A turn, given back when dropped.
#[derive(Debug)]
pub(super) struct Turn {
    queue: Arc<Queue>,
    place: Arc<Place>,
}

impl Queue {
    pub(super) fn new(turns: usize) -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::new(State {
                free: turns,
                waiting: Vec::new(),
            }),
        })
    }

    /// Waits for a turn. Cancelling leaves the queue.
    pub(super) async fn enter(self: &Arc<Self>, place: &Arc<Place>) -> Turn {
        place.granted.store(false, Ordering::Release);
        {
            let mut state = self.state.lock();
            if state.free > 0 {
                state.free -= 1;
                place.granted.store(true, Ordering::Release);
            } else {
                state.waiting.push(Arc::clone(place));
            }
        }
        // Made before the wait, so that a turn granted to a caller that is cancelled goes on to the next.
        let turn = Turn {
            queue: Arc::clone(self),
            place: Arc::clone(place),
        };
        while !place.granted.load(Ordering::Acquire) {
            place.notify.notified().await;
        }
        turn
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let mut state = self.queue.state.lock();
        if !self.place.granted.swap(false, Ordering::AcqRel) {
            state.waiting.retain(|p| !Arc::ptr_eq(p, &self.place));
            return;
        }
        // `max_by_key` takes the last of equals: count from the end, so that it is the oldest.
        let next = (0..state.waiting.len())
            .rev()
            .max_by_key(|&at| *state.waiting[at].priority.lock());
        match next {
            Some(at) => {
                let place = state.waiting.remove(at);
                place.granted.store(true, Ordering::Release);
                place.notify.notify_one();
            }
            None => state.free += 1,
        }
    }
}
