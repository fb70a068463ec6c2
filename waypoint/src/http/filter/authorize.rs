//! AuthorizationPolicies: whether the request may pass.

use http::{StatusCode, request::Parts};
use mesh::{
    authorize::{Finding, RuleRef},
    l7::authorize::{self, Verdict},
};

use super::super::{exchange::Exchange, reply::Reply, route};

/// Decides by the AUDIT, DENY and ALLOW policies of the request's service.
///
/// # Errors
/// The answer to a request that may not pass.
pub(crate) fn apply(exchange: &Exchange, parts: &Parts) -> Result<(), Box<Reply>> {
    let waypoint = &exchange.connection.waypoint;
    let facts = route::facts(exchange, parts);
    let own = &waypoint.identity.trust_domain;
    let verdict = authorize::request(&exchange.snapshot.l7, &facts, own);
    tell(exchange, &verdict);
    match verdict.details() {
        None => Ok(()),
        Some(details) => {
            let reply = Reply::new(StatusCode::FORBIDDEN, details);
            Err(Box::new(reply.body("RBAC: access denied")))
        }
    }
}

/// What changes nothing: AUDIT, and policies on trial.
fn tell(exchange: &Exchange, verdict: &Verdict) {
    let matches = &exchange.connection.waypoint.telemetry.policies;
    for rule in &verdict.audits {
        matches.count("audit", &name(rule));
    }
    for finding in &verdict.findings {
        match finding {
            Finding::WouldDeny(rule) => matches.count("would_deny", &name(rule)),
            Finding::WouldAllow(rule) => matches.count("would_allow", &name(rule)),
            Finding::WouldNotAllow => matches.count("would_not_allow", "unknown"),
        }
    }
}

fn name(rule: &RuleRef) -> String {
    format!("{}/{}", rule.policy.namespace, rule.policy.name)
}
