//! What all requests of the process share.

use std::sync::Arc;

use tokio::sync::Semaphore;

use super::{
    filter::{mirror, rate_limit::Buckets},
    upstream::Upstreams,
};

/// State of the HTTP engine; one per process.
#[derive(Debug)]
pub(crate) struct Engine {
    pub(crate) upstreams: Upstreams,
    /// Of rules with a rate limit.
    pub(super) buckets: Buckets,
    /// Bounds copies of requests.
    pub(super) mirrors: Arc<Semaphore>,
}

impl Engine {
    /// Knows nobody yet.
    pub(crate) fn new() -> Self {
        Self {
            upstreams: Upstreams::default(),
            buckets: Buckets::default(),
            mirrors: mirror::room(),
        }
    }

    /// Closes connections that were idle for too long, forgets backends that nothing uses. Every few seconds.
    pub(crate) fn sweep(&self) {
        self.upstreams.sweep(false);
    }

    /// Closes every idle connection: memory is short.
    pub(crate) fn close_idle(&self) {
        self.upstreams.sweep(true);
    }
}
