//! Whether a connection that is no HTTP may be: asked when it is opened, and again whenever what is known changes.

use std::sync::Arc;

use mesh::{
    l7::authorize::{self, Decision},
    outcome::{Object, Reason, Refusal},
};
use net::drain;

use crate::{config::Role, connection::Connection, snapshot::Snapshot, waypoint::Waypoint};

/// Asks policies by the parts that they have for connections. One that asks an external authorizer refuses: there is no
/// request to ask about.
pub(crate) fn connection(
    snapshot: &Snapshot,
    connection: &Connection,
    sni: Option<&str>,
) -> Result<(), Refusal> {
    still_served(snapshot, connection)?;
    let facts = connection.facts(snapshot, sni);
    let own = &connection.waypoint.identity.trust_domain;
    let verdict = authorize::connection(&snapshot.l7, &facts, own);
    for rule in &verdict.audits {
        let (policy, client) = (rule.policy.to_string(), connection.client);
        tracing::info!(target: "rbac", policy, rule = rule.rule, %client, "audit");
    }
    match verdict.decision {
        Decision::Allow { .. } => {}
        Decision::Deny { by: Some(by) } => {
            let policy = Object::Policy(by.policy);
            return Err(Refusal::by(Reason::PolicyDenied, policy));
        }
        Decision::Deny { by: None } => return Err(Refusal::new(Reason::PolicyNotAllowed)),
    }
    let asked = authorize::custom_connection(&snapshot.l7, &facts, own);
    match asked.into_iter().next() {
        None => Ok(()),
        Some(question) => {
            let policy = Object::Policy(question.by.policy);
            Err(Refusal::by(Reason::PolicyDenied, policy))
        }
    }
}

/// A gateway between networks lets nobody stay at a service that is no longer of the whole mesh.
fn still_served(snapshot: &Snapshot, connection: &Connection) -> Result<(), Refusal> {
    let is_gateway = connection.waypoint.config.node.role == Role::EastWest;
    let Some(key) = connection.service.as_ref().filter(|_| is_gateway) else {
        return Ok(());
    };
    match snapshot.l7.service(key) {
        Some(served) if served.bound => Ok(()),
        _ => Err(Refusal::by(Reason::NotServed, Object::Service(key.clone()))),
    }
}

/// Ends open connections that come to be forbidden. Goes on while we drain; ends when that is forced.
pub(crate) async fn watch(waypoint: Arc<Waypoint>, drain: drain::Watch) {
    drain.release().until_forced(recheck(waypoint)).await;
}

async fn recheck(waypoint: Arc<Waypoint>) {
    let mut versions = waypoint.snapshots.versions();
    while versions.changed().await.is_ok() {
        let snapshot = waypoint.snapshots.load();
        for (id, live) in waypoint.connections.open() {
            let allowed = connection(&snapshot, live.connection(), live.sni());
            if let Err(refusal) = allowed {
                waypoint.connections.cut(id, refusal);
            }
        }
    }
}
