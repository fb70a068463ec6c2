//! What the control plane does to a cluster: keeps its certificate authority there, hands out its root, says on objects
//! what became of them, allocates addresses, and answers admission.
//!
//! All replicas serve; what is written is written by the one that holds the lease ([`leader`]). A write that fails is
//! tried again with growing pauses; nothing here ends the process once it serves.

pub(crate) mod backoff;
pub mod ca_store;
pub mod leader;
mod queue;
pub(crate) mod roots;
mod rotation;
mod status;
mod webhook;
mod webhook_config;
pub mod writers;

use std::{collections::BTreeMap, sync::Arc};

/// Whether a namespace, by its name and labels, is one that the mesh looks at (`meshConfig.discoverySelectors`).
pub type Discovery = Arc<dyn Fn(&str, &BTreeMap<String, String>) -> bool + Send + Sync>;

/// Whether there is no such object, or no such kind: for a kind the answer is a page and no status of Kubernetes' own, for
/// which the client's `is_not_found` does not look at the code.
pub(crate) fn is_absent(status: &kube::core::Status) -> bool {
    status.code == 404
}
