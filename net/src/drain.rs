//! Drain: stop accepting, let work finish, then end.
//!
//! One [`Trigger`] and any number of [`Watch`]es. A watch held by a task says "I am not done": the drain completes
//! when the last one is dropped, or is forced at its deadline. Nothing here closes anything by itself.

use std::{future::Future, pin::pin, sync::Arc, time::Duration};

use tokio::{sync::watch, time::Instant};

/// How work ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Stop accepting at once; what is open may finish until the deadline.
    Graceful {
        /// When what is left is cut.
        deadline: Instant,
    },
    /// Cut everything now: the pod is gone.
    Immediate,
}

impl Mode {
    /// A graceful drain that ends `grace` from now.
    pub fn graceful(grace: Duration) -> Self {
        Self::Graceful {
            deadline: Instant::now() + grace,
        }
    }
}

/// How a drain ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Completion {
    /// All work had finished.
    Finished,
    /// The deadline passed first: the rest was told to end at once.
    Forced,
}

/// Starts the drain of all watches of its channel. Dropping it without a drain never ends anything: a supervisor that
/// dies must not cut traffic.
#[derive(Clone, Debug)]
pub struct Trigger(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    mode: watch::Sender<Option<Mode>>,
    /// Its receivers are the watches that hold the drain open.
    held: watch::Sender<()>,
}

/// Tells a task when and how to end. Holding it holds the drain open, unless it is [released](Watch::release).
#[derive(Clone, Debug)]
pub struct Watch {
    mode: watch::Receiver<Option<Mode>>,
    _hold: Option<watch::Receiver<()>>,
}

/// A trigger and its first watch.
pub fn channel() -> (Trigger, Watch) {
    let (mode, _) = watch::channel(None);
    let (held, _) = watch::channel(());
    let trigger = Trigger(Arc::new(Shared { mode, held }));
    let watch = trigger.watch();
    (trigger, watch)
}

impl Trigger {
    /// Another watch; after the drain has begun it reports that at once.
    pub fn watch(&self) -> Watch {
        Watch {
            mode: self.0.mode.subscribe(),
            _hold: Some(self.0.held.subscribe()),
        }
    }

    /// Begins the drain and does not wait. A second call may only shorten it: to an earlier deadline, or to immediate.
    pub fn start(&self, mode: Mode) {
        self.0.mode.send_if_modified(|current| {
            let stricter = match (*current, mode) {
                (None, _) | (Some(Mode::Graceful { .. }), Mode::Immediate) => true,
                (
                    Some(Mode::Graceful { deadline }),
                    Mode::Graceful {
                        deadline: earlier, ..
                    },
                ) => earlier < deadline,
                (Some(Mode::Immediate), _) => false,
            };
            if stricter {
                *current = Some(mode);
            }
            stricter
        });
    }

    /// Waits until no watch is left that holds the drain open. Cancel-safe.
    pub async fn finished(&self) {
        self.0.held.closed().await;
    }

    /// Begins the drain and waits for its end: all watches dropped, or the deadline, when what is left is told to
    /// end at once and waited for.
    pub async fn drain(&self, mode: Mode) -> Completion {
        self.start(mode);
        let mut watch = self.watch().release();
        let deadline = loop {
            match watch.mode() {
                Some(Mode::Graceful { deadline }) => break deadline,
                Some(Mode::Immediate) => {
                    self.finished().await;
                    return Completion::Forced;
                }
                None => {
                    watch.started().await;
                }
            }
        };
        if tokio::time::timeout_at(deadline, self.finished())
            .await
            .is_ok()
        {
            return Completion::Finished;
        }
        self.start(Mode::Immediate);
        self.finished().await;
        Completion::Forced
    }
}

impl Watch {
    /// The same news without holding the drain open: for endpoints that are there to be asked about it.
    pub fn release(self) -> Self {
        Self {
            _hold: None,
            ..self
        }
    }

    /// What has been ordered, if anything.
    pub fn mode(&self) -> Option<Mode> {
        *self.mode.borrow()
    }

    /// Resolves once a drain has begun. Never resolves when the trigger is dropped without one. Cancel-safe.
    pub async fn started(&mut self) -> Mode {
        let found = match self.mode.wait_for(Option::is_some).await {
            Ok(mode) => *mode,
            Err(_) => None,
        };
        match found {
            Some(mode) => mode,
            None => std::future::pending().await,
        }
    }

    /// Resolves when open work must end now: an immediate drain, or the deadline of a graceful one. Cancel-safe.
    pub async fn forced(&mut self) {
        loop {
            match self.started().await {
                Mode::Immediate => return,
                Mode::Graceful { deadline } => {
                    tokio::select! {
                        () = tokio::time::sleep_until(deadline) => return,
                        changed = self.mode.changed() => if changed.is_err() {
                            tokio::time::sleep_until(deadline).await;
                            return;
                        },
                    }
                }
            }
        }
    }

    /// Runs `work` to its end, or drops it when it is forced: then the answer is `None`.
    pub async fn until_forced<T>(mut self, work: impl Future<Output = T>) -> Option<T> {
        let work = pin!(work);
        tokio::select! {
            biased;
            done = work => Some(done),
            () = self.forced() => None,
        }
    }
}

#[cfg(test)]
mod tests;
