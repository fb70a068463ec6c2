//! On-demand resources: who waits for which name.

use std::{
    collections::{BTreeMap, BTreeSet, btree_map::Entry},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use parking_lot::Mutex;
#[cfg(any(test, feature = "testing"))]
use tokio::sync::mpsc::UnboundedSender;
use tokio::{
    sync::{Notify, watch},
    time::{Instant, timeout_at},
};

/// Names that may be waited for at a time.
const MAX_WAITED: usize = 10_000;

/// What a demand brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// A resource of that name or alias has been applied (or was refused by the handler): look again.
    Arrived,
    /// The server says that there is none.
    Absent,
}

/// A demand without an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DemandError {
    /// The deadline passed.
    #[error("the control plane did not answer in time")]
    Timeout,
    /// Too many names are waited for: the caller should refuse.
    #[error("{MAX_WAITED} resources are waited for already")]
    TooMany,
}

/// Asks for resources of an on-demand type. Cheap to clone; usable also while disconnected, until the deadline.
#[derive(Clone, Debug)]
pub struct Demand(pub(super) Arc<Waiters>);

#[derive(Debug, Default)]
pub(super) struct Waiters {
    waited: Mutex<BTreeMap<String, Question>>,
    /// Names that the client has not asked the server for yet.
    fresh: Mutex<BTreeSet<String>>,
    asked: Notify,
    questions: AtomicU64,
}

/// Which question, and where its answer comes.
type Waiting = (u64, watch::Receiver<Option<Found>>);

/// One question to the server and all who wait for its answer.
#[derive(Debug)]
struct Question {
    /// Tells it from an earlier one for the same name.
    asked: u64,
    answer: watch::Sender<Option<Found>>,
}

impl Demand {
    /// Asks for the resource `key` (a uid, `namespace/hostname` or `network/ip`) and waits for the answer. Callers that
    /// ask for the same key at a time share one question. Cancel-safe.
    ///
    /// # Errors
    /// [`DemandError`].
    pub async fn resource(&self, key: &str, deadline: Instant) -> Result<Found, DemandError> {
        let (asked, mut answer) = self.0.wait_for(key)?;
        let _forget = Forget {
            waiters: &self.0,
            key,
            asked,
        };
        let found = timeout_at(deadline, answer.wait_for(Option::is_some)).await;
        match found {
            Ok(Ok(found)) => Ok(found.unwrap_or(Found::Absent)),
            Ok(Err(_)) | Err(_) => Err(DemandError::Timeout),
        }
    }
}

#[cfg(test)]
impl Demand {
    /// Asks a control plane that never answers.
    pub(crate) fn of_nobody() -> Self {
        Self(Arc::default())
    }
}

#[cfg(any(test, feature = "testing"))]
impl Demand {
    /// Asks a control plane that has nothing. It is there while the second part runs, and tells `asked` each question.
    pub fn of_nothing(asked: UnboundedSender<String>) -> (Self, impl Future<Output = ()> + Send) {
        let waiters: Arc<Waiters> = Arc::default();
        let answering = {
            let waiters = Arc::clone(&waiters);
            async move {
                loop {
                    for name in waiters.fresh().await {
                        waiters.answer(&name, Found::Absent);
                        if asked.send(name).is_err() {
                            return;
                        }
                    }
                }
            }
        };
        (Self(waiters), answering)
    }
}

/// Removes a question that nobody waits for any more.
struct Forget<'a> {
    waiters: &'a Waiters,
    key: &'a str,
    asked: u64,
}

impl Drop for Forget<'_> {
    fn drop(&mut self) {
        let mut waited = self.waiters.waited.lock();
        // The last one still holds its receiver here: the fields of the future are dropped after this guard.
        let unused = |question: &Question| {
            question.asked == self.asked && question.answer.receiver_count() <= 1
        };
        if waited.get(self.key).is_some_and(unused) {
            waited.remove(self.key);
        }
    }
}

impl Waiters {
    fn wait_for(&self, key: &str) -> Result<Waiting, DemandError> {
        let mut waited = self.waited.lock();
        let full = waited.len() >= MAX_WAITED;
        match waited.entry(key.to_owned()) {
            Entry::Occupied(entry) => {
                let question = entry.get();
                Ok((question.asked, question.answer.subscribe()))
            }
            Entry::Vacant(_) if full => Err(DemandError::TooMany),
            Entry::Vacant(entry) => {
                let (answer, waiting) = watch::channel(None);
                let asked = self.questions.fetch_add(1, Ordering::Relaxed);
                entry.insert(Question { asked, answer });
                drop(waited);
                self.fresh.lock().insert(key.to_owned());
                self.asked.notify_one();
                Ok((asked, waiting))
            }
        }
    }

    /// The names to ask the server for: waits until there are some. Cancel-safe.
    pub(super) async fn fresh(&self) -> Vec<String> {
        loop {
            let fresh = self.take_fresh();
            if !fresh.is_empty() {
                return fresh;
            }
            self.asked.notified().await;
        }
    }

    pub(super) fn take_fresh(&self) -> Vec<String> {
        std::mem::take(&mut *self.fresh.lock())
            .into_iter()
            .collect()
    }

    /// Every name that somebody waits for.
    pub(super) fn all(&self) -> Vec<String> {
        self.waited.lock().keys().cloned().collect()
    }

    /// Tells those who wait for `key`.
    pub(super) fn answer(&self, key: &str, found: Found) {
        if let Some(question) = self.waited.lock().remove(key) {
            question.answer.send_replace(Some(found));
        }
    }
}
