//! Keys that wait for a write: each at most once, paced, and with growing pauses after failures.

use std::{
    collections::{BTreeSet, HashMap},
    fmt::Display,
    future::Future,
    hash::Hash,
    time::Duration,
};

use futures_util::{StreamExt as _, stream::FuturesUnordered};
use parking_lot::Mutex;
use tokio::{sync::Notify, time::Instant};

use super::backoff::Backoff;

/// Pauses after a failure.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(300);
/// At most one complaint about failures in this time.
const COMPLAIN: Duration = Duration::from_secs(30);

/// How a [`Queue`] is worked on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pace {
    /// Writes at a time.
    pub(crate) parallel: usize,
    /// Writes per second, in the long run.
    pub(crate) per_second: u32,
    /// Writes that may be made at once after a time of rest.
    pub(crate) burst: u32,
}

/// What became of a write.
#[derive(Debug)]
pub(crate) enum Outcome<E> {
    /// It is as it should be, or nobody needs it any more.
    Done,
    /// Again, later.
    Failed(E),
}

/// The waiting keys: as many as there are objects, whatever happens to them.
#[derive(Debug)]
pub(crate) struct Queue<K> {
    state: Mutex<State<K>>,
    added: Notify,
}

#[derive(Debug)]
struct State<K> {
    due: BTreeSet<(Instant, K)>,
    keys: HashMap<K, Entry>,
}

#[derive(Debug)]
struct Entry {
    /// `None`: a write is under way.
    due: Option<Instant>,
    /// Added again while a write was under way.
    again: bool,
    backoff: Backoff,
}

impl<K: Clone + Eq + Ord + Hash> Queue<K> {
    pub(crate) fn new() -> Self {
        Self {
            state: Mutex::new(State {
                due: BTreeSet::new(),
                keys: HashMap::new(),
            }),
            added: Notify::new(),
        }
    }

    /// Asks for a write of this key. One that waits out a failure goes on waiting.
    pub(crate) fn add(&self, key: K) {
        let mut state = self.state.lock();
        match state.keys.get_mut(&key) {
            Some(entry) => entry.again = entry.due.is_none(),
            None => state.insert(
                key,
                Instant::now(),
                Backoff::new(FIRST_PAUSE, LONGEST_PAUSE),
            ),
        }
        drop(state);
        self.added.notify_one();
    }

    /// How many wait or are under way.
    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        self.state.lock().keys.len()
    }

    /// Writes what is due, forever. Dropped, it forgets the writes under way, and a later call makes them again.
    pub(crate) async fn work<E, F, W>(&self, pace: Pace, write: F)
    where
        E: Display,
        F: Fn(K) -> W,
        W: Future<Output = Outcome<E>>,
    {
        self.state.lock().restart(Instant::now());
        let (mut tokens, mut complaints) = (Tokens::new(pace), Complaints::default());
        let mut under_way = FuturesUnordered::new();
        loop {
            let full = under_way.len() >= pace.parallel;
            let next = self.state.lock().next().filter(|_| !full);
            let next = next.map(|due| due.max(tokens.next()));
            tokio::select! {
                Some((key, outcome)) = under_way.next(), if !under_way.is_empty() => {
                    if let Outcome::Failed(error) = &outcome {
                        complaints.about(error);
                    }
                    self.state.lock().finish(key, matches!(outcome, Outcome::Done));
                }
                () = sleep_until(next) => {
                    if let Some(key) = self.state.lock().take(Instant::now()) {
                        tokens.spend();
                        let outcome = write(key.clone());
                        under_way.push(async move { (key, outcome.await) });
                    }
                }
                () = self.added.notified() => {}
            }
        }
    }
}

async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}

impl<K: Clone + Eq + Ord + Hash> State<K> {
    fn insert(&mut self, key: K, due: Instant, backoff: Backoff) {
        self.due.insert((due, key.clone()));
        let entry = Entry {
            due: Some(due),
            again: false,
            backoff,
        };
        self.keys.insert(key, entry);
    }

    fn next(&self) -> Option<Instant> {
        self.due.first().map(|(due, _)| *due)
    }

    fn take(&mut self, now: Instant) -> Option<K> {
        let first = self.due.first().filter(|(due, _)| *due <= now)?.clone();
        self.due.remove(&first);
        if let Some(entry) = self.keys.get_mut(&first.1) {
            entry.due = None;
            entry.again = false;
        }
        Some(first.1)
    }

    fn finish(&mut self, key: K, done: bool) {
        let Some(mut entry) = self.keys.remove(&key) else {
            return;
        };
        match (done, entry.again) {
            (true, false) => {}
            (true, true) => {
                entry.backoff.reset();
                self.insert(key, Instant::now(), entry.backoff);
            }
            (false, _) => {
                let pause = entry.backoff.next();
                self.insert(key, Instant::now() + pause, entry.backoff);
            }
        }
    }

    /// Writes that were under way when the work was dropped are due again.
    fn restart(&mut self, now: Instant) {
        let lost = self.keys.iter().filter(|(_, entry)| entry.due.is_none());
        let lost: Vec<K> = lost.map(|(key, _)| key.clone()).collect();
        for key in lost {
            if let Some(entry) = self.keys.remove(&key) {
                self.insert(key, now, entry.backoff);
            }
        }
    }
}

/// A bucket of tokens, kept as the time at which it was empty.
struct Tokens {
    each: Duration,
    room: Duration,
    empty: Instant,
}

impl Tokens {
    fn new(pace: Pace) -> Self {
        let each = Duration::from_secs(1) / pace.per_second.max(1);
        Self {
            each,
            room: each * pace.burst.max(1),
            empty: Instant::now(),
        }
    }

    /// When the next one may be spent.
    fn next(&self) -> Instant {
        let full = self.empty + self.each;
        full.checked_sub(self.room).unwrap_or(full)
    }

    fn spend(&mut self) {
        let now = Instant::now();
        self.empty = self.empty.max(now) + self.each;
    }
}

/// Tells of failures, but not of each.
#[derive(Default)]
struct Complaints {
    last: Option<Instant>,
    more: u64,
}

impl Complaints {
    fn about(&mut self, error: &impl Display) {
        let now = Instant::now();
        if self.last.is_some_and(|last| now - last < COMPLAIN) {
            self.more += 1;
            return;
        }
        tracing::warn!(%error, more = self.more, "not written; tried again later");
        (self.last, self.more) = (Some(now), 0);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    const PACE: Pace = Pace {
        parallel: 2,
        per_second: 10,
        burst: 5,
    };

    /// Works on the queue for a time, and returns what was written when, in tenths of a second.
    async fn written(
        queue: &Queue<u32>,
        time: Duration,
        fails: impl Fn(u32) -> bool,
    ) -> Vec<(u64, u32)> {
        let (start, log) = (Instant::now(), Arc::new(Mutex::new(Vec::new())));
        let write = |key| {
            let tenths = u64::try_from((Instant::now() - start).as_millis() / 100).unwrap();
            log.lock().push((tenths, key));
            let failed = fails(key);
            async move {
                match failed {
                    true => Outcome::Failed("no"),
                    false => Outcome::Done,
                }
            }
        };
        let _ended = tokio::time::timeout(time, queue.work(PACE, write)).await;
        std::mem::take(&mut *log.lock())
    }

    #[tokio::test(start_paused = true)]
    async fn a_burst_is_spread_and_each_key_is_written_once() {
        let queue = Queue::new();
        for key in (0..20).chain(0..20) {
            queue.add(key);
        }
        let log = written(&queue, Duration::from_secs(10), |_| false).await;
        assert_eq!(log.len(), 20);
        assert_eq!(log.iter().filter(|(when, _)| *when == 0).count(), 5);
        let last = log.last().unwrap().0;
        assert!((14..=16).contains(&last), "{log:?}");
        assert_eq!(queue.len(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_failure_waits_longer_each_time_and_holds_nobody_up() {
        let queue = Queue::new();
        queue.add(1);
        queue.add(2);
        let log = written(&queue, Duration::from_secs(60), |key| key == 1).await;
        let of = |wanted: u32| log.iter().filter(|(_, key)| *key == wanted).count();
        assert_eq!(of(2), 1);
        assert!((6..=8).contains(&of(1)), "{log:?}");
        // More news of a failing key do not make it come sooner.
        queue.add(1);
        let log = written(&queue, Duration::from_secs(10), |key| key == 1).await;
        assert!(log.len() <= 1, "{log:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_key_that_changes_during_its_write_is_written_again() {
        let queue = Arc::new(Queue::new());
        queue.add(1);
        let writes = Arc::new(Mutex::new(0));
        let write = |key| {
            let (queue, writes) = (queue.clone(), writes.clone());
            async move {
                *writes.lock() += 1;
                if *writes.lock() == 1 {
                    queue.add(key);
                }
                Outcome::<&str>::Done
            }
        };
        let _ended = tokio::time::timeout(Duration::from_secs(5), queue.work(PACE, write)).await;
        assert_eq!(*writes.lock(), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn writes_that_were_dropped_are_made_again() {
        let queue = Queue::new();
        queue.add(1);
        let hang = |_| std::future::pending::<Outcome<&str>>();
        let _ended = tokio::time::timeout(Duration::from_secs(1), queue.work(PACE, hang)).await;
        let log = written(&queue, Duration::from_secs(1), |_| false).await;
        assert_eq!(log, [(0, 1)]);
    }
}
