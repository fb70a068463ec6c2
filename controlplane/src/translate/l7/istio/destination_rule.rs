//! DestinationRules to how a service's endpoints are reached.
//!
//! Of several rules for one host, the oldest one's policy counts, and the subsets of all. A port's own settings replace
//! load balancing, pool, outliers and TLS for that port; a subset's policy replaces block by block. Below all of it lies
//! what MeshConfig says of every service.

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
    object::{DestinationRule, Name, Sourced, labels_of},
    output::{Condition, Truth},
    translate::{self, Settings, l7::credential::Parts},
    validate::Findings,
};

mod balancer;
mod connection;
mod defaults;
mod tls;

use balancer::{balancer, locality, warmup};
use connection::{outlier, pool, retry_budget};
pub use defaults::Defaults;
use defaults::fails_over;
use tls::tls;

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

/// Gives what a credential holds by its name; the error is why it may not be used.
pub type Credentials<'a> = dyn Fn(&str) -> Result<Parts, String> + 'a;

/// For who only looks whether a rule is written well.
///
/// # Errors
/// Always.
pub fn unread(_: &str) -> Result<Parts, String> {
    Err("credentials are not read here".to_owned())
}

/// What a rule is read with.
#[derive(Clone, Copy)]
pub struct Around<'a> {
    /// What holds for every service.
    pub base: &'a Defaults,
    /// Credentials that the rule may name.
    pub credentials: &'a Credentials<'a>,
}

/// The policy of a service by the rules for its host, most important first, over what holds for every service; `prefers`:
/// the service itself says which endpoints come first; `credential`: by a rule and a name. `None`: nobody says anything.
pub fn policy(
    service: &NamespacedHostname,
    rules: &[&Sourced<DestinationRule>],
    base: &Defaults,
    prefers: bool,
    credential: impl Fn(&Name, &str) -> Result<Parts, String>,
) -> Option<BackendPolicy> {
    let reference = |rule: &&Sourced<DestinationRule>| {
        let name = &rule.object.meta.name;
        ObjectRef {
            kind: "DestinationRule".into(),
            namespace: name.namespace.clone(),
            name: name.name.clone(),
        }
    };
    let mut reads = rules.iter().map(|rule| {
        let credentials = |name: &str| credential(&rule.object.meta.name, name);
        let credentials = &credentials;
        in_force(rule, Around { base, credentials })
    });
    let of_base = || Read {
        policy: base.policy(),
        ..Read::default()
    };
    let first = reads.next();
    let first = first.or_else(|| (!base.is_empty()).then(of_base))?;
    let mut subsets = first.subsets;
    for later in reads {
        for (name, subset) in later.subsets {
            subsets.entry(name).or_insert(subset);
        }
    }
    let mut policy = BackendPolicy {
        service: service.clone(),
        sources: rules.iter().map(reference).collect(),
        policy: first.policy,
        ports: first.ports,
        subsets,
    };
    base.localize(&mut policy, prefers);
    Some(policy)
}

/// What is in force of a rule. One whose TLS could not be read must not lead to plaintext.
fn in_force(rule: &Sourced<DestinationRule>, around: Around<'_>) -> Read {
    let mut read = read(&rule.object.spec, around, &mut Findings::default());
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
pub fn read(spec: &crd::DestinationRuleSpec, around: Around<'_>, found: &mut Findings) -> Read {
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
    let base = around.base.policy();
    let (policy, ports) = around.traffic_policy(written, &base, "spec.trafficPolicy", found);
    let mut subsets = BTreeMap::new();
    for (index, subset) in spec.subsets.iter().enumerate() {
        let path = format!("spec.subsets[{index}]");
        if subset.name.is_empty() {
            found.error(format!("{path}.name"), "is missing");
            continue;
        }
        let own = subset.traffic_policy.as_ref().map(|own| {
            around.traffic_policy(own, &policy, &format!("{path}.trafficPolicy"), found)
        });
        let (own, own_ports) =
            own.map_or_else(|| (None, ports.clone()), |(own, ports)| (Some(own), ports));
        let read = Subset {
            labels: labels_of(&subset.labels),
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

/// The credentials that a rule names.
pub fn credentials(spec: &crd::DestinationRuleSpec) -> BTreeSet<&str> {
    let subsets = spec
        .subsets
        .iter()
        .filter_map(|it| it.traffic_policy.as_ref());
    let policies = spec.traffic_policy.as_deref().into_iter().chain(subsets);
    let tls = policies.flat_map(|policy| {
        let ports = policy.port_level_settings.iter();
        let of_ports = ports.filter_map(|port| port.tls.as_ref());
        policy.tls.as_ref().into_iter().chain(of_ports)
    });
    let names = tls.map(|tls| tls.credential_name.as_str());
    names.filter(|name| !name.is_empty()).collect()
}

/// What is said of a rule, given the waypoints that got a policy made of it; `credential`: by a waypoint and a name.
pub fn condition(
    settings: &Settings,
    rule: &Sourced<DestinationRule>,
    used: &[(Name, Arc<Resource>)],
    credential: impl Fn(&Name, &str) -> Result<Parts, String>,
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
    let waypoints: BTreeSet<&Name> = used.iter().map(|(waypoint, _)| waypoint).collect();
    let names: Vec<String> = waypoints.iter().map(ToString::to_string).collect();
    let mut said = vec![format!("bound to {}", names.join(", "))];
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
    let base = &Defaults::default();
    let refused = waypoints.into_iter().find_map(|waypoint| {
        let credentials = |name: &str| credential(waypoint, name);
        let credentials = &credentials;
        in_force(rule, Around { base, credentials }).refusal()
    });
    let (status, reason) = match refused {
        None => (Truth::True, "Accepted"),
        Some(text) => {
            said.push(format!(
                "its TLS or its tunnel cannot be kept, so that its traffic is refused: {text}"
            ));
            (Truth::False, "Invalid")
        }
    };
    translate::condition("WaypointAccepted", status, reason, said.join("; "))
}

impl Read {
    /// Why its TLS or its tunnel cannot be kept, where it cannot.
    fn refusal(&self) -> Option<Str> {
        let policies = [&self.policy].into_iter().chain(self.ports.values());
        let of_subsets = self.subsets.values();
        let of_subsets = of_subsets.flat_map(|it| it.policy.iter().chain(it.ports.values()));
        let mut all = policies.chain(of_subsets);
        all.find_map(|policy| match &policy.tls {
            Some(BackendTls::Invalid(text)) => Some(text.clone()),
            _ => None,
        })
    }
}

type WithPorts = (TrafficPolicy, BTreeMap<u16, TrafficPolicy>);

impl Around<'_> {
    /// A policy laid over another, and its exceptions by port.
    fn traffic_policy(
        &self,
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
        blocks.lay_over(&mut policy, path, self, found);
        if let Some(proxy) = &it.proxy_protocol {
            policy.proxy_protocol = Some(match proxy.version {
                ProxyProtocolVersion::V1 => 1,
                ProxyProtocolVersion::V2 => 2,
            });
        }
        if let Some(budget) = &it.retry_budget {
            policy.retry_budget = Some(retry_budget(budget, &format!("{path}.retryBudget"), found));
        }
        let tunnel = it.tunnel.as_ref().map(forward_to);
        if let Some(Err((field, problem))) = &tunnel {
            found.error(format!("{path}.tunnel.{field}"), *problem);
        }
        tunnelled(&mut policy, tunnel.as_ref());
        let mut ports = BTreeMap::new();
        for (index, own) in it.port_level_settings.iter().enumerate() {
            let path = format!("{path}.portLevelSettings[{index}]");
            let number = own.port.as_ref().map_or(0, |port| port.number);
            let Some(number) = port(number, &format!("{path}.port.number"), found) else {
                continue;
            };
            // Nothing of these four blocks is inherited, but what holds for every service.
            let mut policy = TrafficPolicy {
                proxy_protocol: policy.proxy_protocol,
                retry_budget: policy.retry_budget,
                ..self.base.policy()
            };
            let blocks = Blocks {
                balancer: own.load_balancer.as_ref(),
                pool: own.connection_pool.as_ref(),
                outlier: own.outlier_detection.as_ref(),
                tls: own.tls.as_ref(),
            };
            blocks.lay_over(&mut policy, &path, self, found);
            tunnelled(&mut policy, tunnel.as_ref());
            ports.insert(number, policy);
        }
        (policy, ports)
    }
}

/// What a forward proxy is asked for; an error is a field and what is wrong with it.
type Tunnel = Result<Str, (&'static str, &'static str)>;

/// Where the tunnel cannot be kept, nothing is sent: the proxy must not get bytes as if it were their end.
fn tunnelled(policy: &mut TrafficPolicy, tunnel: Option<&Tunnel>) {
    match tunnel {
        None => {}
        Some(Ok(authority)) => policy.forward_to = Some(authority.clone()),
        Some(Err((field, problem))) => {
            let text = format!("tunnel.{field}: {problem}");
            policy.tls = Some(BackendTls::Invalid(text.into()));
        }
    }
}

fn forward_to(it: &crd::TunnelSettings) -> Tunnel {
    if !matches!(&*it.protocol, "" | "CONNECT") {
        return Err(("protocol", "waypoints ask forward proxies by CONNECT alone"));
    }
    let port = u16::try_from(it.target_port)
        .ok()
        .filter(|port| *port > 0)
        .ok_or(("targetPort", "is no port"))?;
    let host = match it.target_host.parse::<std::net::Ipv6Addr>() {
        Ok(ip) => format!("[{ip}]"),
        Err(_) => it.target_host.clone(),
    };
    let authority: Option<http::uri::Authority> = format!("{host}:{port}").parse().ok();
    let authority = authority.filter(|it| it.host() == host && !host.is_empty());
    let authority = authority.ok_or(("targetHost", "is no host name and no address"))?;
    Ok(authority.as_str().into())
}

/// The blocks that a port may have of its own.
struct Blocks<'s> {
    balancer: Option<&'s crd::LoadBalancerSettings>,
    pool: Option<&'s crd::ConnectionPoolSettings>,
    outlier: Option<&'s crd::OutlierDetection>,
    tls: Option<&'s crd::ClientTlsSettings>,
}

impl Blocks<'_> {
    fn lay_over(
        &self,
        policy: &mut TrafficPolicy,
        path: &str,
        around: &Around<'_>,
        found: &mut Findings,
    ) {
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
            around.base.complete(&mut policy.pool);
        }
        if let Some(it) = self.outlier {
            policy.outlier = Some(outlier(it, &format!("{path}.outlierDetection"), found));
        }
        let fails_over = policy.locality.as_ref().is_some_and(fails_over);
        if self.balancer.is_some() && fails_over && policy.outlier.is_none() {
            found.warning(
                format!("{path}.loadBalancer.localityLbSetting"),
                "has no effect without outlierDetection, which tells the endpoints that fail",
            );
        }
        if let Some(it) = self.tls {
            policy.tls = tls(it, &format!("{path}.tls"), around.credentials, found);
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
