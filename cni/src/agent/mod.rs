//! The node agent: facts about pods in, enrolment out.

mod config;

use std::{fmt, future::Future};

pub use config::{Config, ConfigError, Timing};

use crate::facts::PodEvent;

/// Where facts about this node's pods come from. The first event is a [`PodEvent::Snapshot`].
pub trait PodSource: Send + 'static {
    /// The next event; `None` when there will be none any more. Must be cancel-safe.
    fn next(&mut self) -> impl Future<Output = Option<PodEvent>> + Send;
}

/// How far a pod's enrolment is, as told outside.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Enrolment {
    /// Rules in place, tunnel ready, probes pass: peers may speak HBONE to it.
    Enabled,
    /// Not yet, or not any more: the reason says what is missing.
    Pending {
        /// For people.
        reason: String,
    },
    /// Not in the mesh.
    None,
}

/// A pod as the outside names it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct PodRef {
    /// Kubernetes uid.
    pub uid: String,
    /// Namespace.
    pub namespace: String,
    /// Name.
    pub name: String,
}

impl fmt::Display for PodRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// Where enrolment is told: the pod's annotation, or a file.
pub trait EnrolmentSink: Send + Sync + 'static {
    /// Tells it. Setting the same twice must be harmless; an error is retried.
    fn set(
        &self,
        pod: &PodRef,
        enrolment: &Enrolment,
    ) -> impl Future<Output = Result<(), SinkError>> + Send;
}

/// Telling a pod's enrolment failed.
#[derive(Debug, thiserror::Error)]
#[error("tell the enrolment of {pod}")]
pub struct SinkError {
    /// The pod.
    pub pod: PodRef,
    /// Why.
    pub source: Box<dyn std::error::Error + Send + Sync>,
}
