//! What is said of Gateways and GatewayClasses: conditions, listeners and addresses, as `status` has them. Pure; the
//! time is an argument.
//!
//! An address that was told stays told: peers route by it, and a waypoint without ready pods is no reason to route past it.

use std::borrow::Cow;

use serde_json::{Value, json};

use super::{Deployed, class::Role, names, plan::annotation};
use crate::{
    crd::{Gateway, Listener},
    output::{Condition, Truth},
    translate::{condition, l7::config, waypoint::HBONE_PORT},
};

/// What there is to say of a Gateway.
#[derive(Clone, Debug, PartialEq)]
pub struct Status {
    /// Of the Gateway.
    pub conditions: Vec<Condition>,
    /// Of each listener, by name.
    pub listeners: Vec<(String, Vec<Condition>)>,
    /// Where it is: type and value.
    pub addresses: Vec<(&'static str, String)>,
}

/// What became of the attempt to deploy a Gateway.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Deployment {
    /// It cannot be planned: what is wrong with its parameters.
    BadParameters(String),
    /// The API server refused an object, or it belongs to somebody else.
    Refused(String),
    /// It was applied.
    Applied(Applied),
    /// Its user deployed it.
    Manual,
}

/// What was found when it was applied.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Applied {
    /// Name of its Service.
    pub service: String,
    /// `spec.clusterIPs` of its Service, or for a load balancer what that was given, as addresses and host names.
    pub addresses: Vec<String>,
    /// At least one pod is ready.
    pub ready: bool,
}

/// What is wrong with a listener.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Fault {
    Protocol,
    Port,
    Tls,
    Second(String),
}

/// The listeners that a Gateway of this role can serve: what is wrong is left out and told.
pub fn usable_listeners(gateway: &Gateway, role: Role) -> Vec<&Listener> {
    let judged = judged(gateway, role);
    let usable = judged.into_iter().filter(|(_, fault)| fault.is_none());
    usable.map(|(listener, _)| listener).collect()
}

fn judged(gateway: &Gateway, role: Role) -> Vec<(&Listener, Option<Fault>)> {
    let mut first: Option<&str> = None;
    let mut judged = Vec::new();
    for listener in &gateway.spec.listeners {
        let mut fault = fault(listener, role);
        match (&fault, first) {
            (None, Some(first)) if role != Role::Remote => {
                fault = Some(Fault::Second(first.to_owned()));
            }
            (None, None) => first = Some(&listener.name),
            _ => {}
        }
        judged.push((listener, fault));
    }
    judged
}

fn fault(listener: &Listener, role: Role) -> Option<Fault> {
    let mode = listener.tls.get("mode").and_then(Value::as_str);
    // The certificate is the mesh's own, of a waypoint and of what ends the outer tunnel between networks.
    let fits = match role {
        Role::Remote => return None,
        Role::Waypoint => listener.protocol == "HBONE",
        Role::EastWest => match listener.protocol.as_str() {
            "HBONE" if mode.is_some_and(|mode| mode != "Terminate") => return Some(Fault::Tls),
            "HBONE" => true,
            _ => false,
        },
    };
    match (fits, listener.port == HBONE_PORT) {
        (false, _) => Some(Fault::Protocol),
        (true, false) => Some(Fault::Port),
        (true, true) => None,
    }
}

impl Status {
    /// What there is to say of a Gateway after it was dealt with. `told`: the addresses that its status has already.
    pub fn new(
        settings: &Deployed,
        gateway: &Gateway,
        role: Role,
        deployment: &Deployment,
        told: &[(&'static str, String)],
    ) -> Self {
        let judged = judged(gateway, role);
        let usable = role == Role::Remote || judged.iter().any(|(_, fault)| fault.is_none());
        let addresses = match addresses(settings, gateway, role, deployment) {
            found if found.is_empty() => told.to_vec(),
            found => found,
        };
        let mut accepted = accepted(role, &judged, usable, deployment);
        if let Some(remark) = left_out(gateway) {
            accepted.message.to_mut().push_str(&remark);
        }
        let programmed = programmed(usable, deployment, &addresses);
        let works = programmed.status == Truth::True;
        let listeners = judged
            .iter()
            .map(|(listener, fault)| (listener.name.clone(), of_listener(fault.as_ref(), works)))
            .collect();
        let resolved = match deployment {
            Deployment::BadParameters(problem) => condition(
                "ResolvedRefs",
                Truth::False,
                "InvalidParameters",
                problem.clone(),
            ),
            _ => condition(
                "ResolvedRefs",
                Truth::True,
                "ResolvedRefs",
                "every reference is resolved",
            ),
        };
        Self {
            conditions: vec![accepted, programmed, resolved],
            listeners,
            addresses,
        }
    }
}

/// What an annotation asks for in vain.
fn left_out(gateway: &Gateway) -> Option<String> {
    let own = annotation(gateway, config::BUCKETS);
    let problems = config::Buckets::read(own, &gateway.spec.infrastructure).problems;
    let remark = || format!("; {}: {}", config::BUCKETS, problems.join("; "));
    (!problems.is_empty()).then(remark)
}

fn accepted(
    role: Role,
    judged: &[(&Listener, Option<Fault>)],
    usable: bool,
    deployment: &Deployment,
) -> Condition {
    let of =
        |status, reason, message: Cow<'static, str>| condition("Accepted", status, reason, message);
    if let Deployment::BadParameters(problem) = deployment {
        return of(Truth::False, "InvalidParameters", problem.clone().into());
    }
    let faulty: Vec<&str> = judged
        .iter()
        .filter(|(_, fault)| fault.is_some())
        .map(|(listener, _)| listener.name.as_str())
        .collect();
    let expected = match role {
        Role::EastWest => "one listener on port 15008: HBONE with TLS ended here",
        Role::Waypoint | Role::Remote => "one listener on port 15008 with protocol HBONE",
    };
    match (usable, faulty.is_empty()) {
        (true, true) => of(
            Truth::True,
            "Accepted",
            "handled by this control plane".into(),
        ),
        (true, false) => {
            let message = format!("not served: {}; expected is {expected}", faulty.join(", "));
            of(Truth::True, "ListenersNotValid", message.into())
        }
        (false, _) => {
            let message = format!("no listener can be served; expected is {expected}");
            of(Truth::False, "ListenersNotValid", message.into())
        }
    }
}

fn programmed(
    usable: bool,
    deployment: &Deployment,
    addresses: &[(&'static str, String)],
) -> Condition {
    let of = |status, reason, message: Cow<'static, str>| {
        condition("Programmed", status, reason, message)
    };
    let no = |reason, message| of(Truth::False, reason, message);
    match deployment {
        Deployment::BadParameters(_) => {
            no("Invalid", "not deployed: its parameters are invalid".into())
        }
        _ if !usable => no("Invalid", "not deployed: no listener can be served".into()),
        Deployment::Refused(problem) => {
            no("Invalid", format!("cannot be deployed: {problem}").into())
        }
        Deployment::Manual if addresses.is_empty() => no(
            "AddressNotAssigned",
            "spec.addresses names no address".into(),
        ),
        Deployment::Manual => {
            let message = "deployed by its user, at the addresses of its spec";
            of(Truth::True, "Programmed", message.into())
        }
        Deployment::Applied(applied) if !applied.ready && addresses.is_empty() => {
            let message = format!("no pod of Deployment {} is ready yet", applied.service);
            no("AddressNotAssigned", message.into())
        }
        Deployment::Applied(applied) if !applied.ready => {
            let message = format!(
                "no pod of Deployment {} is ready; its addresses stay",
                applied.service
            );
            no("Pending", message.into())
        }
        Deployment::Applied(applied) if addresses.is_empty() => {
            let message = format!("Service {} has no address yet", applied.service);
            no("AddressNotAssigned", message.into())
        }
        Deployment::Applied(applied) => {
            let message = format!("served by Service {}", applied.service);
            of(Truth::True, "Programmed", message.into())
        }
    }
}

/// Addresses to tell now; empty while there is nothing new to tell.
fn addresses(
    settings: &Deployed,
    gateway: &Gateway,
    role: Role,
    deployment: &Deployment,
) -> Vec<(&'static str, String)> {
    let found: Vec<(&'static str, String)> = match deployment {
        Deployment::Manual => spec_addresses(gateway),
        Deployment::Applied(applied) if applied.ready => {
            let namespace = gateway.metadata.namespace.as_deref().unwrap_or_default();
            let domain = &settings.mesh.cluster_domain;
            let hostname = format!("{}.{namespace}.svc.{domain}", applied.service);
            // Other networks do not know this cluster's names.
            let inside = (role == Role::Waypoint).then_some(("Hostname", hostname));
            let found = applied.addresses.iter().map(|text| typed(text));
            inside.into_iter().chain(found).collect()
        }
        _ => Vec::new(),
    };
    match annotation(gateway, names::ADDRESS_TYPE) {
        Some(wanted) => found
            .into_iter()
            .filter(|(kind, _)| *kind == wanted)
            .collect(),
        None => found,
    }
}

fn typed(text: &str) -> (&'static str, String) {
    let kind = match text.parse::<std::net::IpAddr>() {
        Ok(_) => "IPAddress",
        Err(_) => "Hostname",
    };
    (kind, text.to_owned())
}

fn spec_addresses(gateway: &Gateway) -> Vec<(&'static str, String)> {
    let written = gateway.spec.addresses.as_array().into_iter().flatten();
    written
        .filter_map(|address| {
            let value = address.get("value")?.as_str()?.to_owned();
            match address.get("type").and_then(Value::as_str) {
                None | Some("IPAddress") => Some(("IPAddress", value)),
                Some("Hostname") => Some(("Hostname", value)),
                Some(_) => None,
            }
        })
        .collect()
}

/// The addresses that a Gateway's status has.
pub fn told_addresses(gateway: &Gateway) -> Vec<(&'static str, String)> {
    let told = gateway.status.addresses.iter();
    told.map(|address| match address.type_.as_deref() {
        Some("Hostname") => ("Hostname", address.value.clone()),
        _ => ("IPAddress", address.value.clone()),
    })
    .collect()
}

fn of_listener(fault: Option<&Fault>, works: bool) -> Vec<Condition> {
    let (accepted, conflicted) = match fault {
        None => (
            condition("Accepted", Truth::True, "Accepted", "served"),
            condition(
                "Conflicted",
                Truth::False,
                "NoConflicts",
                "the only one of its kind",
            ),
        ),
        Some(Fault::Second(first)) => (
            condition(
                "Accepted",
                Truth::False,
                "PortUnavailable",
                format!("{first} is served on the port"),
            ),
            condition(
                "Conflicted",
                Truth::True,
                "HostnameConflict",
                format!("with {first}, which comes first"),
            ),
        ),
        Some(other) => (
            other.refusal(),
            condition(
                "Conflicted",
                Truth::False,
                "NoConflicts",
                "conflicts with no other",
            ),
        ),
    };
    let programmed = match (fault, works) {
        (Some(_), _) => condition("Programmed", Truth::False, "Invalid", "it is not accepted"),
        (None, true) => condition("Programmed", Truth::True, "Programmed", "served"),
        (None, false) => condition(
            "Programmed",
            Truth::False,
            "Pending",
            "the Gateway is not programmed",
        ),
    };
    let resolved = condition(
        "ResolvedRefs",
        Truth::True,
        "ResolvedRefs",
        "every reference is resolved",
    );
    vec![accepted, conflicted, programmed, resolved]
}

impl Fault {
    fn refusal(&self) -> Condition {
        let (reason, message) = match self {
            Self::Protocol => ("UnsupportedProtocol", "the protocol must be HBONE"),
            Self::Port => ("PortUnavailable", "the port must be 15008"),
            Self::Tls => (
                "UnsupportedValue",
                "TLS must be ended here (HBONE) or passed on (TLS)",
            ),
            Self::Second(_) => ("PortUnavailable", "another listener has the port"),
        };
        condition("Accepted", Truth::False, reason, message)
    }
}

/// What there is to say of a class that this control plane serves.
pub fn of_class() -> Condition {
    condition(
        "Accepted",
        Truth::True,
        "Accepted",
        "handled by this control plane",
    )
}

/// Conditions as `status` has them. A condition whose status is as it was keeps its time.
pub fn stamped(conditions: &[Condition], before: &Value, generation: i64, now: &str) -> Value {
    let known = before.as_array().map(Vec::as_slice).unwrap_or_default();
    let one = |condition: &Condition| {
        let status = match condition.status {
            Truth::True => "True",
            Truth::False => "False",
        };
        let same = known.iter().find(|old| {
            old["type"] == condition.type_
                && old["status"] == status
                && old["lastTransitionTime"].is_string()
        });
        json!({
            "type": condition.type_,
            "status": status,
            "reason": condition.reason,
            "message": condition.message,
            "observedGeneration": generation,
            "lastTransitionTime": same.map_or_else(|| json!(now), |old| old["lastTransitionTime"].clone()),
        })
    };
    conditions.iter().map(one).collect()
}

/// The `status` of a Gateway to write over `before`; `None`: it says so already.
pub fn written(status: &Status, before: &Value, generation: i64, now: &str) -> Option<Value> {
    let listener_before = |name: &str| {
        let all = before["listeners"].as_array().into_iter().flatten();
        all.into_iter()
            .find(|old| old["name"] == *name)
            .map_or(Value::Null, |old| old["conditions"].clone())
    };
    let listeners: Vec<Value> = status
        .listeners
        .iter()
        .map(|(name, conditions)| {
            json!({
                "name": name,
                // Routes attach to services and not to these listeners.
                "supportedKinds": [],
                "attachedRoutes": 0,
                "conditions": stamped(conditions, &listener_before(name), generation, now),
            })
        })
        .collect();
    let addresses = status
        .addresses
        .iter()
        .map(|(kind, value)| json!({"type": kind, "value": value}));
    let after = json!({
        "conditions": stamped(&status.conditions, &before["conditions"], generation, now),
        "listeners": listeners,
        "addresses": addresses.collect::<Vec<_>>(),
    });
    let same = says(before, &after, "conditions", "type")
        && says(before, &after, "listeners", "name")
        && list(before, "addresses") == list(&after, "addresses")
        && list(before, "listeners").len() == list(&after, "listeners").len();
    (!same).then_some(after)
}

/// Whether every item of `after` is in `before` as it is; others may have added theirs.
pub fn says(before: &Value, after: &Value, field: &str, key: &str) -> bool {
    let known = list(before, field);
    list(after, field).iter().all(|item| {
        known
            .iter()
            .any(|old| old[key] == item[key] && covers(old, item))
    })
}

fn list<'v>(of: &'v Value, field: &str) -> &'v [Value] {
    of[field].as_array().map(Vec::as_slice).unwrap_or_default()
}

/// Whether `old` has every field of `new` with its value; empty lists count as absent.
fn covers(old: &Value, new: &Value) -> bool {
    match (old, new) {
        (Value::Object(old), Value::Object(new)) => {
            new.iter().all(|(key, value)| match old.get(key) {
                Some(found) => covers(found, value),
                None => value.as_array().is_some_and(Vec::is_empty),
            })
        }
        (Value::Array(old), Value::Array(new)) => {
            old.len() == new.len() && old.iter().zip(new).all(|(old, new)| covers(old, new))
        }
        (old, new) => old == new,
    }
}
