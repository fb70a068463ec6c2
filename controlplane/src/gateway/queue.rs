//! Which Gateways wait to be looked at, and since when they may be.
//!
//! Holds each name once, however often it is added; a name that is being looked at is not given out a second time. One
//! that failed comes again by itself after a delay that doubles with each failure in a row.

use std::{
    collections::{HashMap, HashSet},
    time::Duration,
};

use parking_lot::Mutex;
use tokio::{sync::Notify, time::Instant};

use crate::object::Name;

/// Events that come closer together than this are one look.
const DEBOUNCE: Duration = Duration::from_millis(100);
const FIRST_DELAY: Duration = Duration::from_secs(1);
const LONGEST_DELAY: Duration = Duration::from_secs(300);

/// What came of a look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// Nothing to do until something changes.
    Settled,
    /// Look again after this time, whatever changes.
    Again(Duration),
    /// Try again, each time later.
    Failed,
}

/// The queue.
#[derive(Debug, Default)]
pub(super) struct Queue {
    state: Mutex<State>,
    changed: Notify,
}

#[derive(Debug, Default)]
struct State {
    due: HashMap<Name, Instant>,
    running: HashSet<Name>,
    failures: HashMap<Name, u32>,
}

impl Queue {
    /// Something changed that concerns this one.
    pub(super) fn add(&self, name: Name) {
        self.schedule(name, DEBOUNCE);
    }

    fn schedule(&self, name: Name, delay: Duration) {
        let at = Instant::now() + delay;
        let mut state = self.state.lock();
        let due = state.due.entry(name).or_insert(at);
        *due = (*due).min(at);
        drop(state);
        self.changed.notify_one();
    }

    /// The next one to look at. For one caller at a time; [`Queue::done`] must follow.
    pub(super) async fn next(&self) -> Name {
        loop {
            let earliest = match self.take() {
                Ok(name) => return name,
                Err(earliest) => earliest,
            };
            // A permit is stored for a notification between the look above and this wait.
            let changed = self.changed.notified();
            match earliest {
                Some(at) => drop(tokio::time::timeout_at(at, changed).await),
                None => changed.await,
            }
        }
    }

    /// One that is due, or when the next one will be.
    fn take(&self) -> Result<Name, Option<Instant>> {
        let mut state = self.state.lock();
        let waiting = state
            .due
            .iter()
            .filter(|(name, _)| !state.running.contains(*name));
        let Some((name, at)) = waiting.min_by_key(|(_, at)| **at) else {
            return Err(None);
        };
        let (name, at) = (name.clone(), *at);
        if at > Instant::now() {
            return Err(Some(at));
        }
        state.due.remove(&name);
        state.running.insert(name.clone());
        Ok(name)
    }

    /// The look at this one has ended.
    pub(super) fn done(&self, name: Name, outcome: Outcome) {
        let mut state = self.state.lock();
        state.running.remove(&name);
        let delay = match outcome {
            Outcome::Failed => {
                let failures = state.failures.entry(name.clone()).or_default();
                *failures += 1;
                Some(delay(*failures))
            }
            Outcome::Settled => {
                state.failures.remove(&name);
                None
            }
            Outcome::Again(delay) => {
                state.failures.remove(&name);
                Some(delay)
            }
        };
        drop(state);
        match delay {
            Some(delay) => self.schedule(name, delay),
            // It may have been added meanwhile.
            None => self.changed.notify_one(),
        }
    }
}

fn delay(failures: u32) -> Duration {
    let doubled = FIRST_DELAY.saturating_mul(1 << failures.saturating_sub(1).min(16));
    doubled.min(LONGEST_DELAY)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(name: &str) -> Name {
        Name::new("a", name)
    }

    async fn is_idle(queue: &Queue, time: Duration) -> bool {
        tokio::time::timeout(time, queue.next()).await.is_err()
    }

    #[tokio::test(start_paused = true)]
    async fn many_events_are_one_look() {
        let queue = Queue::default();
        for _ in 0..100 {
            queue.add(name("x"));
        }
        assert_eq!(queue.next().await, name("x"));
        queue.done(name("x"), Outcome::Settled);
        assert!(is_idle(&queue, Duration::from_secs(3600)).await);
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_changes_while_it_is_looked_at_is_looked_at_again_afterwards() {
        let queue = Queue::default();
        queue.add(name("x"));
        assert_eq!(queue.next().await, name("x"));
        queue.add(name("x"));
        assert!(is_idle(&queue, Duration::from_secs(10)).await);
        queue.done(name("x"), Outcome::Settled);
        assert_eq!(queue.next().await, name("x"));
    }

    #[tokio::test(start_paused = true)]
    async fn failures_of_one_delay_it_alone_and_longer_each_time() {
        let queue = Queue::default();
        queue.add(name("x"));
        let mut waited = Vec::new();
        for _ in 0..12 {
            let before = Instant::now();
            assert_eq!(queue.next().await, name("x"));
            waited.push(before.elapsed().as_secs());
            queue.done(name("x"), Outcome::Failed);
        }
        assert_eq!(waited, [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300]);
        queue.add(name("y"));
        assert_eq!(queue.next().await, name("y"));
    }

    #[tokio::test(start_paused = true)]
    async fn success_forgets_failures() {
        let queue = Queue::default();
        queue.add(name("x"));
        for _ in 0..5 {
            queue.next().await;
            queue.done(name("x"), Outcome::Failed);
        }
        queue.next().await;
        queue.done(name("x"), Outcome::Again(Duration::from_secs(15)));
        let before = Instant::now();
        queue.next().await;
        assert_eq!(before.elapsed().as_secs(), 15);
        queue.done(name("x"), Outcome::Failed);
        let before = Instant::now();
        queue.next().await;
        assert_eq!(before.elapsed().as_secs(), 1);
    }
}
