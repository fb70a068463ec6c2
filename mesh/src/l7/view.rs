//! What a waypoint knows beside the mesh view: an immutable snapshot of its L7 resources.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use super::{
    authorization::RequestPolicy,
    backend::BackendPolicy,
    config::WaypointConfig,
    name::ObjectRef,
    request_authentication::RequestAuthentication,
    route::Route,
    served::{ServedService, ServedWorkload, WorkloadLabels},
    telemetry::Telemetry,
};
use crate::names::{NamespacedHostname, PolicyKey, Str, WorkloadUid};

/// One resource of the waypoint's own type.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Resource {
    /// Settings; one.
    Config(WaypointConfig),
    /// A service.
    Service(ServedService),
    /// A workload.
    Workload(ServedWorkload),
    /// Labels.
    Labels(WorkloadLabels),
    /// A route.
    Route(Route),
    /// How a service's endpoints are reached.
    Backend(Box<BackendPolicy>),
    /// Who may.
    Policy(RequestPolicy),
    /// Tokens.
    Authentication(RequestAuthentication),
    /// What is told.
    Telemetry(Telemetry),
}

impl Resource {
    /// The name on the wire: `kind/` and the key of that kind; unique among all kinds.
    pub fn name(&self) -> String {
        match self {
            Self::Config(_) => "config/".to_owned(),
            Self::Service(it) => format!("service/{}", it.service),
            Self::Workload(it) => format!("workload/{}", it.uid),
            Self::Labels(it) => format!("labels/{}", it.uid),
            Self::Route(it) => format!("route/{}", it.key),
            Self::Backend(it) => format!("backend/{}", it.service),
            Self::Policy(it) => format!("policy/{}", it.key),
            Self::Authentication(it) => format!("authentication/{}", it.key),
            Self::Telemetry(it) => format!("telemetry/{}", it.key),
        }
    }
}

/// An immutable snapshot. A clone shares everything.
#[derive(Clone, Debug, Default)]
pub struct View {
    /// None: nothing is served yet.
    pub config: Option<Arc<WaypointConfig>>,
    /// Services that are served or led to.
    pub services: Arc<HashMap<NamespacedHostname, Arc<ServedService>>>,
    /// Workloads that are served.
    pub workloads: Arc<HashMap<WorkloadUid, ServedWorkload>>,
    /// Labels.
    pub labels: Arc<HashMap<WorkloadUid, Arc<BTreeMap<Str, Str>>>>,
    /// Routes.
    pub routes: Arc<HashMap<ObjectRef, Arc<Route>>>,
    /// Backends.
    pub backends: Arc<HashMap<NamespacedHostname, Arc<BackendPolicy>>>,
    /// Policies, in the order of their keys.
    pub policies: Arc<BTreeMap<PolicyKey, Arc<RequestPolicy>>>,
    /// Authentication, in the order of their keys.
    pub authentications: Arc<BTreeMap<PolicyKey, Arc<RequestAuthentication>>>,
    /// Telemetry.
    pub telemetry: Arc<BTreeMap<PolicyKey, Arc<Telemetry>>>,
}
