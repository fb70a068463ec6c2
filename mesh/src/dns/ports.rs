//! Where a named port of a service is: questions `_port._protocol.name` (RFC 2782), answered as Kubernetes' own name server
//! does (its DNS specification 2.3.2 and 2.4.2).

use std::net::IpAddr;

use serde::Serialize;

use super::{Asked, Found, RecordType, Settings, TTL_SECONDS, label, plain};
use crate::{
    draw::Draw,
    names::{NamespacedHostname, Str},
    select::{Purpose, target_port},
    service::Service,
    view::{Endpoint, MeshView},
    workload::Workload,
};

/// Targets of one answer: that of a service with more names a part of them, by chance, and fits a message with their
/// addresses.
pub const MAX_TARGETS: usize = 256;

/// A local answer to a question for a port.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct PortRecords {
    /// The service that the name means.
    pub service: NamespacedHostname,
    /// As [`super::Records::cname`].
    pub cname: Option<String>,
    /// In an order of chance; may be empty.
    pub targets: Vec<Target>,
    /// Seconds.
    pub ttl: u32,
}

/// One place where a port is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Target {
    /// Fully qualified, with a trailing dot.
    pub name: String,
    /// Its number there.
    pub port: u16,
    /// Its addresses, of both families.
    pub addresses: Vec<IpAddr>,
}

/// The name whose port a question is for: `_port._protocol.name`.
pub fn name_with_port(question: &str) -> Option<&str> {
    PortName::of(question).map(|it| it.of)
}

/// Answers a question for a port. `None`: forward it. So are ports of services whose ports have no names here, and those of
/// other protocols than TCP, which the mesh knows nothing of.
pub fn answer_port(
    view: &MeshView,
    settings: &Settings,
    client: &Workload,
    question: &str,
    draw: Draw,
) -> Option<PortRecords> {
    let question = plain(question);
    let asked = Asked {
        view,
        settings,
        client,
    };
    let port = PortName::of(&question).filter(|it| it.protocol == "tcp")?;
    let candidates = asked.candidates(port.of);
    let found = candidates.iter().find_map(|it| asked.lookup(it))?;
    let number = found.service.port_named(port.name)?;
    // Each name of an endpoint has the ports of its service, but Kubernetes gives none of them.
    let whole = found.endpoint.is_none();
    let mut targets = whole.then(|| asked.targets(&found, port.of, number))?;
    draw.shuffle(&mut targets);
    targets.truncate(MAX_TARGETS);
    let alias = |it: &str| format!("_{}._{}.{it}.", port.name, port.protocol);
    Some(PortRecords {
        service: found.service.key(),
        cname: found.cname.map(alias),
        targets,
        ttl: TTL_SECONDS,
    })
}

/// A question for a port, taken apart.
struct PortName<'a> {
    name: &'a str,
    protocol: &'a str,
    of: &'a str,
}

impl<'a> PortName<'a> {
    fn of(question: &'a str) -> Option<Self> {
        let (name, rest) = question.strip_prefix('_')?.split_once('.')?;
        let (protocol, of) = rest.strip_prefix('_')?.split_once('.')?;
        let whole = ![name, protocol, of].contains(&"");
        whole.then_some(Self { name, protocol, of })
    }
}

impl Asked<'_> {
    /// The service itself, or, where it has no address, each of its endpoints under a name of its own.
    fn targets(&self, found: &Found<'_>, asked: &str, port: u16) -> Vec<Target> {
        let service = found.service;
        if self.is_headless(service) {
            let endpoints = self.chosen(service);
            let targets = endpoints.flat_map(|it| self.targets_at(service, it, port));
            return targets.collect();
        }
        // A wildcard is no name; what was asked for below it is.
        let name = match service.hostname.starts_with('*') {
            true => asked,
            false => &service.hostname,
        };
        let both = [RecordType::A, RecordType::Aaaa];
        let addresses = both.map(|it| self.addresses(found, it)).concat();
        vec![Target {
            name: format!("{name}."),
            port,
            addresses,
        }]
    }

    /// One for a name of its own, else one for each address.
    fn targets_at(&self, service: &Service, endpoint: &Endpoint, port: u16) -> Vec<Target> {
        let Some(port) = target_port(endpoint, service, port, Purpose::Traffic) else {
            return Vec::new();
        };
        let target = |label: &str, addresses: Vec<IpAddr>| Target {
            name: format!("{label}.{}.", service.hostname),
            port,
            addresses,
        };
        let workload = &endpoint.workload;
        let addresses = self.first_of_each_family(service, workload);
        match workload.host_below(service).map(Str::as_ref) {
            Some(own) => vec![target(own, addresses)],
            None => {
                let each = addresses.into_iter();
                each.map(|it| target(&label(it), vec![it])).collect()
            }
        }
    }

    fn first_of_each_family(&self, service: &Service, workload: &Workload) -> Vec<IpAddr> {
        let both = [RecordType::A, RecordType::Aaaa].into_iter();
        let first = |kind| {
            let mut own = workload.addresses.iter().copied();
            own.find(|it| self.gives(service, kind, it))
        };
        both.filter_map(first).collect()
    }
}

#[cfg(test)]
mod tests;
