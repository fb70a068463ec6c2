//! What is to stand in an object's status, and whether it stands there. Pure but for the time of a transition.

use k8s_openapi::jiff::Timestamp;
use serde_json::{Value, json};

use crate::{
    object::{Kind, Name, ObjectRef},
    output::{Condition, StatusChange, Truth},
};

/// The kinds whose statuses are written here.
pub(super) const KINDS: [Kind; 17] = [
    Kind::AuthorizationPolicy,
    Kind::BackendTlsPolicy,
    Kind::BackendTrafficPolicy,
    Kind::GrpcRoute,
    Kind::HttpRoute,
    Kind::DestinationRule,
    Kind::EnvoyFilter,
    Kind::PeerAuthentication,
    Kind::RequestAuthentication,
    Kind::Service,
    Kind::ServiceEntry,
    Kind::TcpRoute,
    Kind::TlsRoute,
    Kind::Telemetry,
    Kind::VirtualService,
    Kind::WasmPlugin,
    Kind::WorkloadEntry,
];

/// One part of a status, with a writer of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Part {
    /// What waypoints make of a policy.
    WaypointPolicy,
    /// What node tunnels make of a policy.
    ZtunnelPolicy,
    /// All conditions of a Service or a ServiceEntry.
    Service,
    /// All conditions of a WorkloadEntry.
    WorkloadEntry,
    /// The addresses that a ServiceEntry's hosts were given.
    Addresses,
    /// What becomes of a route at each of its parents.
    Parents,
    /// What becomes of a policy at each of its targets.
    Ancestors,
}

/// One condition as it stands in a status.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Standing {
    pub(super) type_: String,
    pub(super) status: String,
    pub(super) reason: String,
    pub(super) message: String,
    pub(super) generation: i64,
    /// `lastTransitionTime`, as written.
    pub(super) since: String,
}

/// Where a kind is found at the API server.
pub(super) struct Place {
    /// `v1`, `security.istio.io/v1`.
    pub(super) api_version: String,
    pub(super) plural: &'static str,
}

/// By the version that the object was read with; lists of Kubernetes' own kinds do not repeat it.
pub(super) fn place(kind: Kind, api_version: &str) -> Option<Place> {
    let (usual, plural) = match kind {
        Kind::AuthorizationPolicy => ("security.istio.io/v1", "authorizationpolicies"),
        Kind::PeerAuthentication => ("security.istio.io/v1", "peerauthentications"),
        Kind::RequestAuthentication => ("security.istio.io/v1", "requestauthentications"),
        Kind::DestinationRule => ("networking.istio.io/v1", "destinationrules"),
        Kind::EnvoyFilter => ("networking.istio.io/v1alpha3", "envoyfilters"),
        Kind::VirtualService => ("networking.istio.io/v1", "virtualservices"),
        Kind::Telemetry => ("telemetry.istio.io/v1", "telemetries"),
        Kind::WasmPlugin => ("extensions.istio.io/v1alpha1", "wasmplugins"),
        Kind::Service => ("v1", "services"),
        Kind::ServiceEntry => ("networking.istio.io/v1", "serviceentries"),
        Kind::WorkloadEntry => ("networking.istio.io/v1", "workloadentries"),
        Kind::HttpRoute => ("gateway.networking.k8s.io/v1", "httproutes"),
        Kind::GrpcRoute => ("gateway.networking.k8s.io/v1", "grpcroutes"),
        Kind::TlsRoute => ("gateway.networking.k8s.io/v1", "tlsroutes"),
        Kind::TcpRoute => ("gateway.networking.k8s.io/v1", "tcproutes"),
        Kind::BackendTlsPolicy => ("gateway.networking.k8s.io/v1", "backendtlspolicies"),
        Kind::BackendTrafficPolicy => (
            "gateway.networking.x-k8s.io/v1alpha1",
            "xbackendtrafficpolicies",
        ),
        _ => return None,
    };
    let api_version = match api_version {
        "" => usual.to_owned(),
        read => read.to_owned(),
    };
    Some(Place {
        api_version,
        plural,
    })
}

impl Place {
    /// The path of everything of its group.
    pub(super) fn root(&self) -> String {
        match self.api_version.contains('/') {
            true => format!("/apis/{}", self.api_version),
            false => format!("/api/{}", self.api_version),
        }
    }

    /// The path of one object's status.
    pub(super) fn status(&self, name: &Name) -> String {
        let (root, plural) = (self.root(), self.plural);
        let Name { namespace, name } = name;
        format!("{root}/namespaces/{namespace}/{plural}/{name}/status")
    }
}

impl Part {
    /// The parts of a kind's status.
    pub(super) fn of(kind: Kind) -> &'static [Self] {
        match kind {
            Kind::AuthorizationPolicy
            | Kind::DestinationRule
            | Kind::EnvoyFilter
            | Kind::PeerAuthentication
            | Kind::RequestAuthentication
            | Kind::Telemetry
            | Kind::VirtualService
            | Kind::WasmPlugin => &[Self::WaypointPolicy, Self::ZtunnelPolicy],
            Kind::Service => &[Self::Service],
            Kind::ServiceEntry => &[Self::Service, Self::Addresses],
            Kind::WorkloadEntry => &[Self::WorkloadEntry],
            Kind::HttpRoute | Kind::GrpcRoute | Kind::TlsRoute | Kind::TcpRoute => &[Self::Parents],
            Kind::BackendTlsPolicy | Kind::BackendTrafficPolicy => &[Self::Ancestors],
            _ => &[],
        }
    }

    /// The field manager (control-plane.md 9).
    pub(super) fn manager(self) -> &'static str {
        match self {
            Self::WaypointPolicy => "istio-ambient-waypoint-policy",
            Self::ZtunnelPolicy => "istio-ambient-ztunnel-policy",
            Self::Service => "istio-ambient-service",
            Self::WorkloadEntry => "istio-ambient-workloadentry",
            Self::Addresses => "leyline-ip-autoallocate",
            Self::Parents => "leyline-route-status",
            Self::Ancestors => "leyline-policy-status",
        }
    }

    /// Whether a condition of this type is this part's to write and to take away.
    pub(super) fn writes(self, type_: &str) -> bool {
        let known = matches!(
            type_,
            "istio.io/WaypointBound"
                | "istio.io/WaypointMissing"
                | "istio.io/VisibilityApplied"
                | "ZtunnelAccepted"
                | "WaypointAccepted"
        ) || normal(type_).is_some();
        let of_waypoints = type_ == "WaypointAccepted";
        match self {
            Self::WaypointPolicy => of_waypoints,
            Self::ZtunnelPolicy | Self::Service | Self::WorkloadEntry => known && !of_waypoints,
            Self::Addresses | Self::Parents | Self::Ancestors => false,
        }
    }
}

/// What a condition of ours says when there is nothing to tell: then it is not written, for it would be a write for every
/// object of the mesh that nobody reads.
fn normal(type_: &str) -> Option<Truth> {
    match type_ {
        "Accepted" | "leyline.dev/Served" | "HostsClaimed" | "AddressesAllocated" => {
            Some(Truth::True)
        }
        "Warned" => Some(Truth::False),
        _ => None,
    }
}

/// Whether another revision's control plane writes this object's status.
pub(super) fn is_anothers(change: &StatusChange) -> bool {
    let mut conditions = change.conditions.iter();
    conditions.any(|condition| condition.type_ == "Ignored")
}

/// The conditions that this part is to have.
pub(super) fn wanted(part: Part, conditions: &[Condition]) -> Vec<&Condition> {
    let tells = |condition: &&Condition| {
        part.writes(condition.type_) && normal(condition.type_) != Some(condition.status)
    };
    conditions.iter().filter(tells).collect()
}

/// Whether what stands is what is wanted.
pub(super) fn is_right(wanted: &[&Condition], generation: i64, standing: &[Standing]) -> bool {
    wanted.len() == standing.len()
        && wanted.iter().all(|condition| {
            let same = |stands: &&Standing| stands.type_ == condition.type_;
            standing.iter().find(same).is_some_and(|stands| {
                stands.status == text(condition.status)
                    && stands.reason == condition.reason
                    && stands.message == condition.message
                    && stands.generation == generation
            })
        })
}

/// The object to apply: nothing but these conditions. A transition's time stays while the status does.
pub(super) fn body(
    object: &ObjectRef,
    api_version: &str,
    generation: i64,
    wanted: &[&Condition],
    standing: &[Standing],
) -> Value {
    let now = Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
    let written = |condition: &&Condition| {
        let status = text(condition.status);
        let same = |stands: &&Standing| stands.type_ == condition.type_ && stands.status == status;
        let before = standing
            .iter()
            .find(same)
            .map(|stands| stands.since.clone());
        let before = before.filter(|since| !since.is_empty());
        json!({
            "type": condition.type_,
            "status": status,
            "reason": condition.reason,
            "message": condition.message,
            "observedGeneration": generation,
            "lastTransitionTime": before.unwrap_or_else(|| now.clone()),
        })
    };
    let conditions: Vec<Value> = wanted.iter().map(written).collect();
    let name = &object.name;
    let mut body = json!({
        "apiVersion": api_version,
        "kind": object.kind.as_str(),
        "metadata": {"name": &*name.name, "namespace": &*name.namespace},
    });
    if !conditions.is_empty() {
        body["status"] = json!({"conditions": conditions});
    }
    body
}

/// The conditions in an object's status that a part writes.
pub(super) fn standing(part: Part, status: &Value) -> Vec<Standing> {
    let conditions = status["conditions"].as_array();
    let text = |condition: &Value, field: &str| condition[field].as_str().unwrap_or("").to_owned();
    let ours = conditions.into_iter().flatten().filter(|condition| {
        let type_ = condition["type"].as_str();
        type_.is_some_and(|type_| part.writes(type_))
    });
    ours.map(|condition| {
        let generation = &condition["observedGeneration"];
        let as_text = generation.as_str().and_then(|text| text.parse().ok());
        Standing {
            type_: text(condition, "type"),
            status: text(condition, "status"),
            reason: text(condition, "reason"),
            message: text(condition, "message"),
            // Istio's CRDs allow a text here.
            generation: generation.as_i64().or(as_text).unwrap_or_default(),
            since: text(condition, "lastTransitionTime"),
        }
    })
    .collect()
}

/// The types of conditions that somebody else owns, of a refusal of server-side apply; `None`: it does not say.
pub(super) fn conflicts(status: &kube::core::Status) -> Option<Vec<String>> {
    let causes = &status.details.as_ref()?.causes;
    let mut types = Vec::new();
    for cause in causes {
        let (_, rest) = cause.field.split_once("conditions[type=\"")?;
        let (type_, _) = rest.split_once('"')?;
        if !types.iter().any(|known| known == type_) {
            types.push(type_.to_owned());
        }
    }
    (!types.is_empty()).then_some(types)
}

fn text(truth: Truth) -> &'static str {
    match truth {
        Truth::True => "True",
        Truth::False => "False",
    }
}
