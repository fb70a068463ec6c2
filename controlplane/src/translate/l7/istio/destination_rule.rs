//! DestinationRules to how a service's endpoints are reached.
//!
//! Of several rules for one host, the oldest one's policy counts, and the subsets of all. A port's own settings replace
//! load balancing, pool, outliers and TLS for that port; a subset's policy replaces block by block.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use mesh::{
    l7::{
        backend::{BackendPolicy, BackendTls, Subset, TrafficPolicy},
        name::ObjectRef,
        view::Resource,
    },
    names::{NamespacedHostname, Str},
};

use super::{read::port, virtual_service::qualified};
use crate::{
    crd::istio::{self as crd, ProxyProtocolVersion},
    object::{DestinationRule, Name, Sourced},
    output::{Condition, Truth},
    translate::{self, Settings},
    validate::Findings,
};

mod balancer;
mod connection;

use balancer::{balancer, locality, warmup};
use connection::{outlier, pool, retry_budget, tls};

/// What one rule says, before several are merged.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Read {
    /// `trafficPolicy`.
    pub policy: TrafficPolicy,
    /// `trafficPolicy.portLevelSettings`, laid over it.
    pub ports: BTreeMap<u16, TrafficPolicy>,
    /// `subsets`.
    pub subsets: BTreeMap<Str, Subset>,
}

/// The policy of a service by the rules for its host, most important first. `None`: there are none.
pub fn policy(
    service: &NamespacedHostname,
    rules: &[&Sourced<DestinationRule>],
) -> Option<BackendPolicy> {
    let reference = |rule: &&Sourced<DestinationRule>| {
        let name = &rule.object.meta.name;
        ObjectRef {
            kind: "DestinationRule".into(),
            namespace: name.namespace.clone(),
            name: name.name.clone(),
        }
    };
    let mut reads = rules.iter().map(|rule| in_force(rule));
    let first = reads.next()?;
    let mut subsets = first.subsets;
    for later in reads {
        for (name, subset) in later.subsets {
            subsets.entry(name).or_insert(subset);
        }
    }
    Some(BackendPolicy {
        service: service.clone(),
        sources: rules.iter().map(reference).collect(),
        policy: first.policy,
        ports: first.ports,
        subsets,
    })
}

/// What is in force of a rule. One whose TLS could not be read must not lead to plaintext.
fn in_force(rule: &Sourced<DestinationRule>) -> Read {
    let mut read = read(&rule.object.spec, &mut Findings::default());
    let about_tls = |fault: &&String| fault.to_ascii_lowercase().contains("tls");
    if let Some(fault) = rule.faults.iter().find(about_tls) {
        let invalid = BackendTls::Invalid(fault.as_str().into());
        let subsets = read.subsets.values_mut();
        let policies =
            subsets.flat_map(|subset| subset.policy.iter_mut().chain(subset.ports.values_mut()));
        for policy in policies
            .chain(read.ports.values_mut())
            .chain([&mut read.policy])
        {
            policy.tls = Some(invalid.clone());
        }
    }
    read
}

/// Reads a rule. Also what admission checks.
pub fn read(spec: &crd::DestinationRuleSpec, found: &mut Findings) -> Read {
    if spec.host.is_empty() {
        found.error("spec.host", "is missing");
    }
    if spec.workload_selector.is_some() {
        found.warning(
            "spec.workloadSelector",
            "selects sidecars; a waypoint serves all clients and leaves this rule's selector out",
        );
    }
    let none = crd::TrafficPolicy::default();
    let written = spec.traffic_policy.as_deref().unwrap_or(&none);
    let base = TrafficPolicy::default();
    let (policy, ports) = traffic_policy(written, &base, "spec.trafficPolicy", found);
    let mut subsets = BTreeMap::new();
    for (index, subset) in spec.subsets.iter().enumerate() {
        let path = format!("spec.subsets[{index}]");
        if subset.name.is_empty() {
            found.error(format!("{path}.name"), "is missing");
            continue;
        }
        let own = subset
            .traffic_policy
            .as_ref()
            .map(|own| traffic_policy(own, &policy, &format!("{path}.trafficPolicy"), found));
        let labels = subset.labels.iter();
        let (own, own_ports) =
            own.map_or_else(|| (None, ports.clone()), |(own, ports)| (Some(own), ports));
        let read = Subset {
            labels: labels
                .map(|(key, value)| (key.as_str().into(), value.as_str().into()))
                .collect(),
            policy: own,
            ports: own_ports,
        };
        if subsets
            .insert(Str::from(subset.name.as_str()), read)
            .is_some()
        {
            found.error(
                format!("{path}.name"),
                format!("{:?} occurs twice", subset.name),
            );
        }
    }
    Read {
        policy,
        ports,
        subsets,
    }
}

/// What is said of a rule, given the waypoints that got a policy made of it.
pub fn condition(
    settings: &Settings,
    rule: &Sourced<DestinationRule>,
    used: &[(Name, Arc<Resource>)],
) -> Condition {
    let name = &rule.object.meta.name;
    let host = qualified(settings, &name.namespace, &rule.object.spec.host);
    if used.is_empty() {
        let message = format!(
            "no waypoint reaches {host} by it: a service's own namespace's rules count, then those of {}; there the ones for the most specific host",
            settings.root_namespace
        );
        return translate::condition(
            "WaypointAccepted",
            Truth::False,
            "AncestorNotBound",
            message,
        );
    }
    let waypoints: BTreeSet<String> = used
        .iter()
        .map(|(waypoint, _)| waypoint.to_string())
        .collect();
    let mut said = vec![format!(
        "bound to {}",
        waypoints.into_iter().collect::<Vec<_>>().join(", ")
    )];
    let first = |it: &BackendPolicy| {
        it.sources
            .first()
            .is_some_and(|first| first.name == name.name && first.namespace == name.namespace)
    };
    let mut policies = used.iter().filter_map(|(_, resource)| match &**resource {
        Resource::Backend(policy) => Some(policy),
        _ => None,
    });
    if rule.object.spec.traffic_policy.is_some() && policies.any(|policy| !first(policy)) {
        said.push("only its subsets count: another rule for the host is older".to_owned());
    }
    let read = in_force(rule);
    let policies = [&read.policy].into_iter().chain(read.ports.values());
    let of_subsets = read.subsets.values();
    let of_subsets = of_subsets.flat_map(|it| it.policy.iter().chain(it.ports.values()));
    let refused = policies
        .chain(of_subsets)
        .find_map(|policy| match &policy.tls {
            Some(BackendTls::Invalid(text)) => Some(text.clone()),
            _ => None,
        });
    let (status, reason) = match refused {
        None => (Truth::True, "Accepted"),
        Some(text) => {
            said.push(format!(
                "its TLS cannot be kept, so that its traffic is refused: {text}"
            ));
            (Truth::False, "Invalid")
        }
    };
    translate::condition("WaypointAccepted", status, reason, said.join("; "))
}

type WithPorts = (TrafficPolicy, BTreeMap<u16, TrafficPolicy>);

/// A policy laid over another, and its exceptions by port.
fn traffic_policy(
    it: &crd::TrafficPolicy,
    base: &TrafficPolicy,
    path: &str,
    found: &mut Findings,
) -> WithPorts {
    let mut policy = base.clone();
    let blocks = Blocks {
        balancer: it.load_balancer.as_ref(),
        pool: it.connection_pool.as_ref(),
        outlier: it.outlier_detection.as_ref(),
        tls: it.tls.as_ref(),
    };
    blocks.lay_over(&mut policy, path, found);
    if let Some(proxy) = &it.proxy_protocol {
        policy.proxy_protocol = Some(match proxy.version {
            ProxyProtocolVersion::V1 => 1,
            ProxyProtocolVersion::V2 => 2,
        });
    }
    if let Some(budget) = &it.retry_budget {
        policy.retry_budget = Some(retry_budget(budget, &format!("{path}.retryBudget"), found));
    }
    if it.tunnel.is_some() {
        found.error(
            format!("{path}.tunnel"),
            "tunnels through a forward proxy are not supported by waypoints",
        );
    }
    let mut ports = BTreeMap::new();
    for (index, own) in it.port_level_settings.iter().enumerate() {
        let path = format!("{path}.portLevelSettings[{index}]");
        let number = own.port.as_ref().map_or(0, |port| port.number);
        let Some(number) = port(number, &format!("{path}.port.number"), found) else {
            continue;
        };
        // Nothing of these four blocks is inherited.
        let mut policy = TrafficPolicy {
            proxy_protocol: policy.proxy_protocol,
            retry_budget: policy.retry_budget,
            ..TrafficPolicy::default()
        };
        let blocks = Blocks {
            balancer: own.load_balancer.as_ref(),
            pool: own.connection_pool.as_ref(),
            outlier: own.outlier_detection.as_ref(),
            tls: own.tls.as_ref(),
        };
        blocks.lay_over(&mut policy, &path, found);
        ports.insert(number, policy);
    }
    (policy, ports)
}

/// The blocks that a port may have of its own.
struct Blocks<'s> {
    balancer: Option<&'s crd::LoadBalancerSettings>,
    pool: Option<&'s crd::ConnectionPoolSettings>,
    outlier: Option<&'s crd::OutlierDetection>,
    tls: Option<&'s crd::ClientTlsSettings>,
}

impl Blocks<'_> {
    fn lay_over(&self, policy: &mut TrafficPolicy, path: &str, found: &mut Findings) {
        if let Some(it) = self.balancer {
            let path = format!("{path}.loadBalancer");
            policy.balancer = balancer(it, &path, found);
            policy.locality = it
                .locality_lb_setting
                .as_ref()
                .and_then(|it| locality(it, &path, found));
            policy.warmup = warmup(it, &path, found);
            if !it.zone_aware_lb_setting.is_null() {
                found.warning(
                    format!("{path}.zoneAwareLbSetting"),
                    "has no effect at a waypoint; use localityLbSetting",
                );
            }
        }
        if let Some(it) = self.pool {
            policy.pool = pool(it, &format!("{path}.connectionPool"), found);
        }
        if let Some(it) = self.outlier {
            policy.outlier = Some(outlier(it, &format!("{path}.outlierDetection"), found));
        }
        if let Some(it) = self.tls {
            policy.tls = tls(it, &format!("{path}.tls"), found);
        }
    }
}

#[allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "of numbers from 0 to 1,000,000"
)]
fn whole(number: f64) -> u32 {
    number.round() as u32
}
