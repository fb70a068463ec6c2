//! The admin endpoint: what the node tunnel knows and does now, in the shapes that `istioctl ztunnel-config` reads.

use std::{collections::BTreeMap, sync::Arc, time::SystemTime};

use arc_swap::ArcSwap;
use axum::{Json, routing::get};
use mesh::{
    authority::Authority, authorize::RuleRef, dump::ConfigDump, flow::FlowRecord, outbound::Hop,
    outcome::LocalWorkload, view::MeshView,
};
use net::{
    admin::Admin,
    ca::{CertificateState, Certificates},
    log,
    tls::PemCertificate,
    version::Version,
};
use serde::Serialize;
use serde_json::{Value, json};
use tokio::sync::Notify;

use crate::{
    flow::{Live, Registry},
    local_state,
    pod::{Node, Pod},
    pods::Published,
};

/// All of it.
pub(crate) fn endpoint(
    node: &Arc<Node>,
    published: Arc<ArcSwap<Published>>,
    logs: Option<log::Handle>,
    quit: Arc<Notify>,
    static_config: local_state::Current,
) -> Admin {
    let view_of = |make: fn(&MeshView) -> Value| {
        let state = node.state.clone();
        move || make(&state.view())
    };
    let config = value(&*node.config);
    let version = value(Version::new(node.config.node.istio_version.clone()));
    let certificates = node.certificates.clone();
    let of_connections = published.clone();
    let of_flows = node.metrics.telling.flows.clone();
    let of_refusals = of_flows.clone();
    Admin::new("ztunnel", logs, Arc::new(move || quit.notify_one()))
        .section("workloads", view_of(workloads))
        .section(
            "services",
            view_of(|view| value(ConfigDump::from(view).services)),
        )
        .section("policies", view_of(policies))
        .section(
            "stagedServices",
            view_of(|view| value(ConfigDump::from(view).staged_services)),
        )
        .section("staticConfig", move || Value::clone(&static_config.load()))
        .section("version", move || version.clone())
        .section("config", move || config.clone())
        .section("certificates", move || certificate_dump(&certificates))
        .section("workloadState", move || pods_dump(&published.load()))
        .route(
            "/connections",
            "the connections that are open now, as JSON",
            get(move || async move { Json(connections(&of_connections.load())) }),
        )
        .route(
            "/flows",
            "connections as they open, close, fail and are refused: a stream of JSON lines \
             (?only=failures, ?kept to begin with the refusals of before)",
            get(move |query| of_flows.stream(query)),
        )
        .route(
            "/refusals",
            "what was refused and what failed lately, counted, as JSON",
            get(move || of_refusals.refusals()),
        )
}

fn value(of: impl Serialize) -> Value {
    serde_json::to_value(of).unwrap_or_else(|error| json!({"error": error.to_string()}))
}

fn workloads(view: &MeshView) -> Value {
    let mut all: Vec<_> = view.workloads().collect();
    all.sort_by(|a, b| a.uid.cmp(&b.uid));
    value(all)
}

fn policies(view: &MeshView) -> Value {
    let mut all: Vec<_> = view.policies().collect();
    all.sort_by(|a, b| a.key.cmp(&b.key));
    value(all)
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct CertificateDump {
    identity: String,
    state: String,
    cert_chain: Vec<Pem>,
    root_certs: Vec<Pem>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Pem {
    pem: String,
    serial_number: String,
    valid_from: String,
    expiration_time: String,
}

impl From<PemCertificate> for Pem {
    fn from(certificate: PemCertificate) -> Self {
        Self {
            pem: certificate.pem,
            serial_number: certificate.serial_number,
            valid_from: rfc3339(certificate.not_before),
            expiration_time: rfc3339(certificate.not_after),
        }
    }
}

/// To the second, in UTC: `2026-01-02T03:04:05Z`.
fn rfc3339(time: SystemTime) -> String {
    const FORM: &[time::format_description::BorrowedFormatItem<'_>] =
        time::macros::format_description!("[year]-[month]-[day]T[hour]:[minute]:[second]Z");
    let formatted = time::OffsetDateTime::from(time).format(FORM);
    formatted.unwrap_or_default()
}

fn certificate_dump(certificates: &Certificates) -> Value {
    let states = certificates.states().into_iter();
    let dumps = states.map(|(identity, state)| {
        let (chain, roots) = match &state {
            CertificateState::Available(certificate) => (certificate.chain(), certificate.roots()),
            CertificateState::Initializing | CertificateState::Unavailable(_) => {
                (Vec::new(), Vec::new())
            }
        };
        CertificateDump {
            identity: identity.to_string(),
            state: state.to_string(),
            cert_chain: chain.into_iter().map(Pem::from).collect(),
            root_certs: roots.into_iter().map(Pem::from).collect(),
        }
    });
    value(dumps.collect::<Vec<_>>())
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct PodDump {
    state: &'static str,
    info: PodInfo,
    #[serde(skip_serializing_if = "Option::is_none")]
    connections: Option<PodConnections>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct PodInfo {
    name: String,
    namespace: String,
    service_account: String,
}

#[derive(Serialize)]
struct PodConnections {
    inbound: Vec<ConnectionDump>,
    outbound: Vec<ConnectionDump>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct ConnectionDump {
    src: String,
    original_dst: Option<String>,
    actual_dst: String,
    protocol: &'static str,
}

impl From<&LocalWorkload> for PodInfo {
    fn from(workload: &LocalWorkload) -> Self {
        Self {
            name: workload.name.to_string(),
            namespace: workload.namespace.to_string(),
            service_account: workload.service_account.to_string(),
        }
    }
}

fn pods_dump(published: &Published) -> Value {
    let up = published.up.iter().map(|pod| {
        let connections = PodConnections {
            inbound: each(&pod.inbound, inbound_dump),
            outbound: each(&pod.outbound, outbound_dump),
        };
        let dump = PodDump {
            state: "Up",
            info: (&pod.binding).into(),
            connections: Some(connections),
        };
        (pod.uid.to_string(), dump)
    });
    let pending = published.pending.iter().map(|(uid, workload)| {
        let dump = PodDump {
            state: "Pending",
            info: workload.into(),
            connections: None,
        };
        (uid.to_string(), dump)
    });
    value(up.chain(pending).collect::<BTreeMap<_, _>>())
}

fn each<T>(registry: &Registry, dump: fn(&Live) -> T) -> Vec<T> {
    let mut open = registry.open();
    open.sort_by_key(|(id, _)| *id);
    open.iter().map(|(_, live)| dump(live)).collect()
}

fn protocol(hop: Hop) -> &'static str {
    match hop {
        Hop::Tcp => "TCP",
        Hop::Hbone => "HBONE",
        Hop::DoubleHbone => "DOUBLEHBONE",
    }
}

fn inbound_dump(live: &Live) -> ConnectionDump {
    let asked_host = match &live.record.authority {
        Some(Authority::Hostname(name, _)) => Some(name.to_string()),
        Some(Authority::Address(_)) | None => None,
    };
    ConnectionDump {
        src: live.record.source_addr.to_string(),
        original_dst: asked_host,
        actual_dst: live.actual.to_string(),
        protocol: protocol(live.record.hop),
    }
}

fn outbound_dump(live: &Live) -> ConnectionDump {
    ConnectionDump {
        src: live.record.source_addr.to_string(),
        original_dst: Some(live.actual.to_string()),
        actual_dst: live.record.destination_addr.to_string(),
        protocol: protocol(live.record.hop),
    }
}

/// One open connection, with the pod that it is of.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct OpenConnection {
    pod: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    trace_id: Option<String>,
    /// Inbound: the rule that allows it.
    #[serde(skip_serializing_if = "Option::is_none")]
    allowed_by: Option<RuleRef>,
    #[serde(flatten)]
    record: FlowRecord,
}

fn connections(published: &Published) -> Vec<OpenConnection> {
    let of_pod = |pod: &Arc<Pod>| {
        let open = [&pod.inbound, &pod.outbound].map(|registry| registry.open());
        let uid = pod.uid.to_string();
        open.into_iter()
            .flatten()
            .map(move |(_, live)| OpenConnection {
                pod: uid.clone(),
                trace_id: live.trace.map(|it| it.to_string()),
                allowed_by: live.allowed_by(),
                record: live.snapshot(),
            })
    };
    published.up.iter().flat_map(of_pod).collect()
}
