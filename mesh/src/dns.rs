//! What a pod's question for an address is answered from what the mesh knows (node-tunnel 8).
//!
//! Only names of the mesh are answered; for anything else the answer is to forward. A name of the mesh without an
//! address of the family asked for has an empty answer, never NXDOMAIN, which would deny the other family too.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use serde::Serialize;

use crate::{
    draw::Draw,
    names::{NamespacedHostname, Str},
    service::{HealthPolicy, Service},
    view::{Endpoint, Endpoints, MeshView},
    workload::{Health, Workload},
};

mod ports;
#[cfg(test)]
mod tests;

pub use ports::{MAX_TARGETS, PortRecords, Target, answer_port, name_with_port};

/// How long a local answer may be kept, in seconds.
pub const TTL_SECONDS: u32 = 30;

/// Services that one question may ask a control plane for.
pub const MAX_WANTED: usize = 8;

/// What names mean here.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Settings {
    /// The cluster's domain, without dots at its ends: `cluster.local`.
    pub domain: Str,
    /// Domains that the client's resolver appends, most specific first; empty: Kubernetes' own three.
    pub search: Vec<Str>,
    /// Wins a tie for a name where neither the client's namespace nor a canonical service does.
    pub preferred_namespace: Option<Str>,
    /// Whether AAAA records are given.
    pub ipv6: bool,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            domain: "cluster.local".into(),
            search: Vec::new(),
            preferred_namespace: None,
            ipv6: true,
        }
    }
}

/// The type of record that is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
pub enum RecordType {
    /// IPv4.
    A,
    /// IPv6.
    Aaaa,
    /// Any other, which is forwarded even for names of the mesh.
    Other,
}

impl RecordType {
    fn is_of(self, address: &IpAddr) -> bool {
        match self {
            Self::A => address.is_ipv4(),
            Self::Aaaa => address.is_ipv6(),
            Self::Other => false,
        }
    }
}

/// The answer to a question.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub enum Answer {
    /// Ours to give, authoritatively.
    Local(Records),
    /// Not a name of the mesh: ask the next resolver.
    Forward,
}

/// A local answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Records {
    /// The service that the name means.
    pub service: NamespacedHostname,
    /// The owner of the address records, fully qualified with a trailing dot, in lower case.
    pub owner: String,
    /// Where the question was for a search domain's expansion: the name that a CNAME from the question leads to,
    /// which then is the owner too.
    pub cname: Option<String>,
    /// In an order of chance; may be empty.
    pub addresses: Vec<IpAddr>,
    /// Seconds.
    pub ttl: u32,
}

/// Answers one question of `client`. `name` is compared without case, with a trailing dot or without.
pub fn answer(
    view: &MeshView,
    settings: &Settings,
    client: &Workload,
    name: &str,
    kind: RecordType,
    draw: Draw,
) -> Answer {
    let name = plain(name);
    if kind == RecordType::Other || name.is_empty() {
        return Answer::Forward;
    }
    let asked = Asked {
        view,
        settings,
        client,
    };
    let candidates = asked.candidates(&name);
    let found = candidates.iter().find_map(|it| asked.lookup(it));
    match found {
        Some(found) => asked.records(&name, &found, kind, draw),
        None => Answer::Forward,
    }
}

/// Answers for a name that another name stands for: as it is written, without search domains or short forms.
pub fn answer_exactly(
    view: &MeshView,
    settings: &Settings,
    client: &Workload,
    name: &str,
    kind: RecordType,
    draw: Draw,
) -> Answer {
    let candidate = Candidate {
        name: plain(name),
        stripped: None,
    };
    let asked = Asked {
        view,
        settings,
        client,
    };
    match asked.lookup(&candidate) {
        Some(found) => asked.records(&candidate.name, &found, kind, draw),
        None => Answer::Forward,
    }
}

/// Whether a name, as `client` would ask for it, is one of the mesh's, whatever the type that is asked for. Name servers
/// that do not know it must not deny that it exists.
pub fn knows(view: &MeshView, settings: &Settings, client: &Workload, name: &str) -> bool {
    let asked = Asked {
        view,
        settings,
        client,
    };
    let candidates = asked.candidates(&plain(name));
    candidates.iter().any(|it| asked.lookup(it).is_some())
}

/// The services that a name may mean and that the view lacks, most likely first: what to ask a control plane for that tells
/// only what it is asked for. Nothing that comes after a service that is known could be the answer. At most
/// [`MAX_WANTED`].
///
/// A service is asked for by its namespace and hostname. The name tells both where it is one of the cluster's, or one of an
/// endpoint below it; any other is looked for in the client's own namespace.
pub fn wanted(
    view: &MeshView,
    settings: &Settings,
    client: &Workload,
    name: &str,
) -> Vec<NamespacedHostname> {
    let asked = Asked {
        view,
        settings,
        client,
    };
    let candidates = asked.candidates(&plain(name));
    let unknown = candidates
        .iter()
        .take_while(|it| asked.lookup(it).is_none());
    let mut wanted = Vec::new();
    for key in unknown.filter_map(|it| asked.key(&it.name)) {
        let known = view.service(&key).is_some();
        if wanted.len() < MAX_WANTED && !known && !wanted.contains(&key) {
            wanted.push(key);
        }
    }
    wanted
}

/// Lower case, without a final dot.
fn plain(name: &str) -> String {
    name.strip_suffix('.').unwrap_or(name).to_ascii_lowercase()
}

/// An address as a part of a name.
fn label(address: IpAddr) -> String {
    address.to_string().replace(['.', ':'], "-")
}

fn address_of(label: &str) -> Option<IpAddr> {
    let v4 = || label.replace('-', ".").parse::<Ipv4Addr>().ok();
    let v6 = || label.replace('-', ":").parse::<Ipv6Addr>().ok();
    v4().map(IpAddr::V4).or_else(|| v6().map(IpAddr::V6))
}

struct Asked<'a> {
    view: &'a MeshView,
    settings: &'a Settings,
    client: &'a Workload,
}

/// A name to try.
struct Candidate {
    name: String,
    /// What was left of the question when a search domain was taken off it.
    stripped: Option<String>,
}

/// A domain that the client's resolver appends.
struct SearchDomain {
    name: String,
    /// Whether names below it are Kubernetes' own.
    is_of_cluster: bool,
}

struct Found<'a> {
    service: &'a Service,
    cname: Option<&'a str>,
    /// The name is one of an endpoint's.
    endpoint: Option<EndpointName<'a>>,
}

/// What stands before a service's name where an endpoint of it is meant: its own name, or one of its addresses.
#[derive(Clone, Copy)]
struct EndpointName<'a> {
    label: &'a str,
    address: Option<IpAddr>,
}

impl<'a> EndpointName<'a> {
    fn of(label: &'a str) -> Self {
        let address = address_of(label);
        Self { label, address }
    }

    /// Whether it stands for this address of the workload.
    fn means(&self, workload: &Workload, service: &Service, address: IpAddr) -> bool {
        let own = workload.host_below(service);
        own.is_some_and(|it| it.eq_ignore_ascii_case(self.label)) || self.address == Some(address)
    }
}

impl<'a> Asked<'a> {
    /// The answer for `name`, which `found` stands for.
    fn records(&self, name: &str, found: &Found<'_>, kind: RecordType, draw: Draw) -> Answer {
        let mut addresses = self.addresses(found, kind);
        draw.shuffle(&mut addresses);
        Answer::Local(Records {
            service: found.service.key(),
            owner: format!("{}.", found.cname.unwrap_or(name)),
            cname: found.cname.map(|it| format!("{it}.")),
            addresses,
            ttl: TTL_SECONDS,
        })
    }

    /// The name and its expansions, then the same for what is left without a search domain.
    fn candidates(&self, name: &str) -> Vec<Candidate> {
        let mut candidates = vec![Candidate {
            name: name.to_owned(),
            stripped: None,
        }];
        let mut add = |names: Vec<String>, stripped: Option<&str>| {
            candidates.extend(names.into_iter().map(|name| Candidate {
                name,
                stripped: stripped.map(str::to_owned),
            }));
        };
        add(self.expansions(name), None);
        for domain in self.search() {
            let rest = name
                .strip_suffix(&domain.name)
                .and_then(|it| it.strip_suffix('.'));
            let Some(rest) = rest.filter(|it| !it.is_empty()) else {
                continue;
            };
            add(vec![rest.to_owned()], Some(rest));
            // Short names below a domain of somebody else's are that one's.
            if domain.is_of_cluster {
                add(self.expansions(rest), Some(rest));
            }
        }
        candidates
    }

    /// What the client's resolver appends: what its pod says, else what is set, else what Kubernetes does.
    fn search(&self) -> Vec<SearchDomain> {
        let Some(dns) = &self.client.dns else {
            return self.usual_search();
        };
        let usual = match dns.cluster_first {
            true => self.usual_search(),
            false => Vec::new(),
        };
        let more = dns.searches.iter().map(|it| self.search_domain(it));
        usual.into_iter().chain(more).collect()
    }

    fn usual_search(&self) -> Vec<SearchDomain> {
        if !self.settings.search.is_empty() {
            let domains = self.settings.search.iter();
            return domains.map(|it| self.search_domain(it)).collect();
        }
        let domain = &self.settings.domain;
        let own = format!("{}.svc.{domain}", self.client.namespace);
        [own, format!("svc.{domain}"), domain.to_string()]
            .map(|it| self.search_domain(&it))
            .into()
    }

    fn search_domain(&self, name: &str) -> SearchDomain {
        let rest = name.strip_suffix(&*self.settings.domain);
        SearchDomain {
            name: name.to_owned(),
            is_of_cluster: rest.is_some_and(|it| it.is_empty() || it.ends_with('.')),
        }
    }

    /// The short forms that Kubernetes knows of a service's name; none for a pod that does not resolve as Kubernetes does.
    fn expansions(&self, name: &str) -> Vec<String> {
        if self.client.dns.as_ref().is_some_and(|it| !it.cluster_first) {
            return Vec::new();
        }
        let (domain, namespace) = (&self.settings.domain, &self.client.namespace);
        let in_svc = name.ends_with(".svc");
        match name.split('.').count() {
            1 => vec![format!("{name}.{namespace}.svc.{domain}")],
            2 => vec![
                format!("{name}.svc.{domain}"),
                format!("{name}.{namespace}.svc.{domain}"),
            ],
            3 if in_svc => vec![format!("{name}.{domain}"), format!("{name}.svc.{domain}")],
            3 => vec![format!("{name}.svc.{domain}")],
            4 if in_svc => vec![format!("{name}.{domain}")],
            _ => Vec::new(),
        }
    }

    /// The exact name, then that of an endpoint, then wildcards from the most to the least specific. A wildcard's answer is the question's own.
    fn lookup<'b>(&self, candidate: &'b Candidate) -> Option<Found<'b>>
    where
        'a: 'b,
    {
        let cname = candidate.stripped.as_deref();
        if let Some(service) = self.choose(&candidate.name) {
            return Some(Found {
                service,
                cname,
                endpoint: None,
            });
        }
        if let Some((service, endpoint)) = self.endpoint_named(&candidate.name) {
            return Some(Found {
                service,
                cname,
                endpoint: Some(endpoint),
            });
        }
        let mut rest = candidate.name.as_str();
        while let Some((_, parent)) = rest.split_once('.') {
            if let Some(service) = self.choose(&format!("*.{parent}")) {
                return Some(Found {
                    service,
                    cname: None,
                    endpoint: None,
                });
            }
            rest = parent;
        }
        None
    }

    /// Where a service of this hostname would be, or the headless one whose endpoint is called so; `None` where none is.
    fn key(&self, name: &str) -> Option<NamespacedHostname> {
        let (first, rest) = name.split_once('.')?;
        if !rest.ends_with(&*self.settings.domain) {
            return Some(NamespacedHostname {
                namespace: self.client.namespace.clone(),
                hostname: name.into(),
            });
        }
        let above = || self.key_in_cluster(rest).filter(|_| !first.is_empty());
        self.key_in_cluster(name).or_else(above)
    }

    /// `service.namespace.svc` and the cluster's domain.
    fn key_in_cluster(&self, hostname: &str) -> Option<NamespacedHostname> {
        let (first, rest) = hostname.split_once('.')?;
        let namespace = rest.strip_suffix(&*self.settings.domain)?;
        let namespace = namespace.strip_suffix(".svc.")?;
        let is_one = !first.is_empty() && !namespace.is_empty() && !namespace.contains('.');
        is_one.then(|| NamespacedHostname {
            namespace: namespace.into(),
            hostname: hostname.into(),
        })
    }

    /// Among the services of a name: the client's namespace, canonical, preferred namespace, first seen.
    fn choose(&self, hostname: &str) -> Option<&'a Service> {
        let client = &self.client.namespace;
        let services = self.view.services_by_hostname(hostname);
        let eligible = services.filter(|it| it.visible_to(client) && self.has_records(it));
        let preferred = self.settings.preferred_namespace.as_ref();
        let chosen = eligible.min_by_key(|it| {
            let foreign = it.namespace != *client;
            (foreign, !it.canonical, preferred != Some(&it.namespace))
        });
        chosen.map(|it| &**it)
    }

    fn has_records(&self, service: &Service) -> bool {
        !service.vips.is_empty() || self.is_headless(service)
    }

    /// A name of the cluster's own without addresses stands for its endpoints.
    fn is_headless(&self, service: &Service) -> bool {
        let rest = service.hostname.strip_suffix(&*self.settings.domain);
        service.vips.is_empty() && rest.is_some_and(|it| it.ends_with(".svc."))
    }

    /// Whether an address of the service is told to who asks for this type.
    fn gives(&self, service: &Service, kind: RecordType, address: &IpAddr) -> bool {
        let off = kind == RecordType::Aaaa && !self.settings.ipv6;
        !off && kind.is_of(address) && service.ip_families.allows(*address)
    }

    fn addresses(&self, found: &Found<'_>, kind: RecordType) -> Vec<IpAddr> {
        let service = found.service;
        let fits = |it: &IpAddr| self.gives(service, kind, it);
        if service.vips.is_empty() {
            return self.endpoint_addresses(found, fits);
        }
        let here = service
            .vips
            .iter()
            .filter(|it| it.network == self.client.network);
        here.map(|it| it.address).filter(fits).collect()
    }

    /// The first fitting address of each endpoint that may be chosen, or of the one whose name was asked for.
    fn endpoint_addresses(&self, found: &Found<'_>, fits: impl Fn(&IpAddr) -> bool) -> Vec<IpAddr> {
        let chosen = self.chosen(found.service);
        let first = chosen.filter_map(|endpoint| {
            let workload = &endpoint.workload;
            let mut own = workload.addresses.iter().copied();
            own.find(|it| {
                let named = |name: EndpointName<'_>| name.means(workload, found.service, *it);
                fits(it) && found.endpoint.is_none_or(named)
            })
        });
        first.collect()
    }

    /// The endpoints of the client's network that may be chosen.
    fn chosen(&self, service: &Service) -> impl Iterator<Item = &'a Endpoint> + use<'a, '_> {
        let all = service.load_balancing.health_policy == HealthPolicy::AllowAll;
        let endpoints = self.view.endpoints_of(&service.key());
        let endpoints = endpoints.into_iter().flat_map(Endpoints::iter);
        endpoints.filter(move |it| {
            let usable = all || it.workload.status == Health::Healthy;
            usable && it.workload.network == self.client.network
        })
    }

    /// An endpoint of a headless service has a name below the service's: its own, or one for each of its addresses.
    fn endpoint_named<'b>(&self, name: &'b str) -> Option<(&'a Service, EndpointName<'b>)> {
        let (label, parent) = name.split_once('.')?;
        let service = self.choose(parent).filter(|it| self.is_headless(it))?;
        let name = EndpointName::of(label);
        let meant = self.chosen(service).any(|it| {
            let mut own = it.workload.addresses.iter();
            own.any(|address| name.means(&it.workload, service, *address))
        });
        meant.then_some((service, name))
    }
}
