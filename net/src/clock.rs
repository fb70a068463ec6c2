//! Time as an argument: wall time for certificates, monotonic time for deadlines. Nothing else in `net` asks the system for it.

use std::{
    fmt,
    sync::Arc,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use parking_lot::Mutex;
use rustls::time_provider::TimeProvider;
use rustls_pki_types::UnixTime;

/// Where time comes from.
pub trait Clock: fmt::Debug + Send + Sync + 'static {
    /// The time of day, by which certificates are valid. It may jump.
    fn wall(&self) -> SystemTime;

    /// Time that never goes back. It follows tokio's clock, so a paused runtime pauses it too.
    fn monotonic(&self) -> Instant {
        tokio::time::Instant::now().into_std()
    }
}

/// The machine's clock.
#[derive(Clone, Copy, Debug, Default)]
pub struct SystemClock;

impl Clock for SystemClock {
    fn wall(&self) -> SystemTime {
        SystemTime::now()
    }
}

/// A clock whose time of day follows tokio's (possibly paused) clock, and can be moved by hand.
#[derive(Debug)]
pub struct TestClock {
    origin: tokio::time::Instant,
    wall_at_origin: Mutex<SystemTime>,
}

impl TestClock {
    /// A clock that shows `wall` now. Needs a tokio runtime only where that runtime's clock is paused.
    pub fn new(wall: SystemTime) -> Arc<Self> {
        Arc::new(Self {
            origin: tokio::time::Instant::now(),
            wall_at_origin: Mutex::new(wall),
        })
    }

    /// Moves the time of day forward, and nothing else, as when a machine was suspended.
    pub fn jump(&self, by: Duration) {
        *self.wall_at_origin.lock() += by;
    }
}

impl Clock for TestClock {
    fn wall(&self) -> SystemTime {
        *self.wall_at_origin.lock() + self.origin.elapsed()
    }
}

/// Gives a [`Clock`] to rustls, so that certificates expire by it.
#[derive(Clone, Debug)]
pub(crate) struct TlsTime(pub(crate) Arc<dyn Clock>);

impl TimeProvider for TlsTime {
    fn current_time(&self) -> Option<UnixTime> {
        let since = self.0.wall().duration_since(UNIX_EPOCH).ok()?;
        Some(UnixTime::since_unix_epoch(since))
    }
}
