//! The authority in force, which changes while the program runs when keys or roots are rotated.

use std::sync::Arc;

use arc_swap::ArcSwap;
use tokio::sync::watch;

use super::authority::Authority;

/// The one place that says which [`Authority`] signs, and which roots are trusted, now.
#[derive(Debug)]
pub struct Current {
    authority: ArcSwap<Authority>,
    changes: watch::Sender<()>,
}

impl Current {
    /// With a first authority.
    pub fn new(authority: Authority) -> Arc<Self> {
        Arc::new(Self {
            authority: ArcSwap::from_pointee(authority),
            changes: watch::Sender::new(()),
        })
    }

    /// The authority of this moment. Hold it for one operation, not for longer.
    pub fn load(&self) -> Arc<Authority> {
        self.authority.load_full()
    }

    /// Puts another authority into force, and tells those who wait for that.
    pub fn replace(&self, authority: Authority) {
        self.authority.store(Arc::new(authority));
        self.changes.send_replace(());
    }

    /// Changes with every [`Current::replace`] from now on.
    pub fn changes(&self) -> watch::Receiver<()> {
        self.changes.subscribe()
    }
}
