//! The admin endpoint: what the waypoint knows and does now.

use std::sync::Arc;

use axum::{Json, routing::get};
use mesh::{dump::ConfigDump, flow::FlowRecord, l7, view::MeshView};
use net::{admin::Admin, log, version::Version};
use serde::Serialize;
use serde_json::{Value, json};
use tokio::sync::Notify;

use crate::{snapshot::Snapshot, waypoint::Waypoint};

/// All of it.
pub(crate) fn endpoint(
    waypoint: &Arc<Waypoint>,
    logs: Option<log::Handle>,
    quit: Arc<Notify>,
) -> Admin {
    let view_of = |make: fn(&Snapshot) -> Value| {
        let snapshots = waypoint.snapshots.clone();
        move || make(&snapshots.load())
    };
    let config = value(&*waypoint.config);
    let version = value(Version::new(waypoint.config.node.istio_version.clone()));
    let of_certificates = waypoint.clone();
    let of_connections = waypoint.clone();
    let of_pool = waypoint.clone();
    Admin::new("waypoint", logs, Arc::new(move || quit.notify_one()))
        .section("workloads", view_of(|it| workloads(&it.mesh)))
        .section(
            "services",
            view_of(|it| value(ConfigDump::from(&*it.mesh).services)),
        )
        .section("policies", view_of(|it| policies(&it.mesh)))
        .section("l7", view_of(|it| value(l7::dump::dump(&it.l7))))
        .section("version", move || version.clone())
        .section("config", move || config.clone())
        .section("certificates", move || certificates(&of_certificates))
        .section("tunnels", move || tunnels(&of_pool))
        .route(
            "/connections",
            "the TCP connections that are open now, as JSON",
            get(move || async move { Json(connections(&of_connections)) }),
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

/// Never a key.
fn certificates(waypoint: &Waypoint) -> Value {
    let states = waypoint.certificates.states().into_iter();
    let states = states.map(
        |(identity, state)| json!({"identity": identity.to_string(), "state": state.to_string()}),
    );
    states.collect()
}

fn tunnels(waypoint: &Waypoint) -> Value {
    let stats = waypoint.backend.stats();
    json!({"connections": stats.connections, "streams": stats.streams, "dials": stats.dials})
}

fn connections(waypoint: &Waypoint) -> Vec<FlowRecord> {
    let mut open = waypoint.connections.open();
    open.sort_by_key(|(id, _)| *id);
    open.iter().map(|(_, live)| live.snapshot()).collect()
}
