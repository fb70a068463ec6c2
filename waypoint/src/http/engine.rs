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
    pub(super) upstreams: Upstreams,
    /// Of rules with a rate limit.
    pub(super) buckets: Buckets,
    /// Bounds copies of requests.
    pub(super) mirrors: Arc<Semaphore>,
    /// Seals session tokens. Random per process unless all replicas are given the same.
    pub(super) session_key: [u8; 32],
}

impl Engine {
    /// `session_key`: what session tokens are sealed with; a token of another key is as none.
    pub(crate) fn new(session_key: [u8; 32]) -> Self {
        Self {
            upstreams: Upstreams::default(),
            buckets: Buckets::default(),
            mirrors: mirror::room(),
            session_key,
        }
    }

    /// Closes connections that were idle for too long, forgets backends that nothing uses. Every few seconds.
    pub(crate) fn sweep(&self) {
        self.upstreams.sweep();
    }
}
