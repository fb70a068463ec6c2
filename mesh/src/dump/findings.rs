//! What a local file says and cannot mean: names that nothing in it has. Each is told and refuses what depends on it;
//! none keeps the rest of the file from being used, since a control plane may yet send what is missing.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use super::LocalFile;
use crate::{
    names::{NamespacedHostname, NetworkAddress, PolicyKey, Str},
    workload::{GatewayAddress, GatewayDestination},
};

#[cfg(test)]
mod tests;

/// Something that whoever wrote the file did not mean.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Finding {
    /// Of several resources with one key the last counts.
    Twice {
        /// `workload`, `service` or `policy`.
        kind: &'static str,
        /// Its key.
        key: String,
    },
    /// The workload has no name under which anything reaches it.
    Nowhere(Str),
    /// The workload is an endpoint of a service that is not there: it waits for it.
    NoService {
        /// The workload.
        workload: Str,
        /// The service.
        service: NamespacedHostname,
    },
    /// The workload maps a port that its service does not have.
    NoPort {
        /// The workload.
        workload: Str,
        /// The service.
        service: NamespacedHostname,
        /// The service's port.
        port: u16,
    },
    /// The workload names a policy that is not there: all connections to it are refused.
    NoPolicy {
        /// The workload.
        workload: Str,
        /// The policy.
        policy: PolicyKey,
    },
    /// Traffic to it must pass a waypoint that is not there, and is refused.
    NoWaypoint {
        /// The workload or service.
        of: String,
        /// The waypoint.
        waypoint: String,
    },
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Twice { kind, key } => {
                write!(f, "{kind} {key} is there more than once: the last counts")
            }
            Self::Nowhere(uid) => {
                write!(f, "workload {uid} has no address, host name or gateway")
            }
            Self::NoService { workload, service } => {
                write!(
                    f,
                    "workload {workload} serves {service}, which is not there"
                )
            }
            Self::NoPort {
                workload,
                service,
                port,
            } => write!(
                f,
                "workload {workload} maps port {port} of {service}, which has no such port"
            ),
            Self::NoPolicy { workload, policy } => write!(
                f,
                "workload {workload} names policy {policy}, which is not there: connections to it are refused"
            ),
            Self::NoWaypoint { of, waypoint } => {
                write!(
                    f,
                    "{of} has the waypoint {waypoint}, which is not there: connections to it are refused"
                )
            }
        }
    }
}

impl LocalFile {
    /// What it cannot mean, sorted.
    pub fn findings(&self) -> Vec<Finding> {
        let mut findings = self.repeated();
        findings.extend(self.of_workloads());
        findings.extend(self.without_waypoint());
        findings.sort();
        findings.dedup();
        findings
    }

    fn repeated(&self) -> Vec<Finding> {
        let workloads = self.workloads.iter().map(|it| it.uid.to_string());
        let services = self.services.iter().map(|it| it.key().to_string());
        let policies = self.policies.iter().map(|it| it.key.to_string());
        let mut findings = repeated("workload", workloads);
        findings.extend(repeated("service", services));
        findings.extend(repeated("policy", policies));
        findings
    }

    fn of_workloads(&self) -> Vec<Finding> {
        let policies: BTreeSet<_> = self.policies.iter().map(|it| &it.key).collect();
        let services: BTreeMap<_, _> = self.services.iter().map(|it| (it.key(), it)).collect();
        let mut findings = Vec::new();
        for workload in &self.workloads {
            let uid = &workload.uid.0;
            let reachable = !workload.addresses.is_empty()
                || workload.hostname.is_some()
                || workload.network_gateway.is_some();
            findings.extend((!reachable).then(|| Finding::Nowhere(uid.clone())));
            let named = workload.authorization_policies.iter();
            let missing = named.filter(|it| !policies.contains(it));
            findings.extend(missing.map(|policy| Finding::NoPolicy {
                workload: uid.clone(),
                policy: policy.clone(),
            }));
            for (key, ports) in &workload.services {
                let Some(service) = services.get(key) else {
                    findings.push(Finding::NoService {
                        workload: uid.clone(),
                        service: key.clone(),
                    });
                    continue;
                };
                let unknown = ports.keys().filter(|it| !service.ports.contains_key(it));
                findings.extend(unknown.map(|port| Finding::NoPort {
                    workload: uid.clone(),
                    service: key.clone(),
                    port: *port,
                }));
            }
        }
        findings
    }

    fn without_waypoint(&self) -> Vec<Finding> {
        let of_workloads = self.workloads.iter().filter_map(|it| {
            let waypoint = it.waypoint.as_ref()?;
            Some((format!("workload {}", it.uid), waypoint))
        });
        let of_services = self.services.iter().filter_map(|it| {
            let waypoint = it.waypoint.as_ref()?;
            Some((format!("service {}", it.key()), waypoint))
        });
        let known = Known::of(self);
        let all = of_workloads.chain(of_services);
        all.filter(|(_, waypoint)| !known.has(waypoint))
            .map(|(of, waypoint)| Finding::NoWaypoint {
                of,
                waypoint: waypoint.destination.to_string(),
            })
            .collect()
    }
}

/// Where a gateway can be.
struct Known {
    services: BTreeSet<NamespacedHostname>,
    addresses: BTreeSet<NetworkAddress>,
}

impl Known {
    fn of(file: &LocalFile) -> Self {
        let vips = file.services.iter().flat_map(|it| it.vips.iter().cloned());
        let own = file.workloads.iter().flat_map(|it| it.own_addresses());
        Self {
            services: file.services.iter().map(|it| it.key()).collect(),
            addresses: vips.chain(own).collect(),
        }
    }

    fn has(&self, gateway: &GatewayAddress) -> bool {
        match &gateway.destination {
            GatewayDestination::Hostname(key) => self.services.contains(key),
            GatewayDestination::Address(address) => self.addresses.contains(address),
        }
    }
}

fn repeated(kind: &'static str, keys: impl Iterator<Item = String>) -> Vec<Finding> {
    let mut seen = BTreeSet::new();
    let again = keys.filter(|key| !seen.insert(key.clone()));
    again.map(|key| Finding::Twice { kind, key }).collect()
}
