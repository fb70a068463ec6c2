//! VirtualServices of the mesh to routes: the parts of one object, each a route of its protocol.

use std::collections::BTreeMap;

use ipnet::IpNet;
use mesh::{
    l7::{
        name::ObjectRef,
        route::{Attachment, Backend, CallerMatch, Order, Route, Rules, TcpRule, TlsRule},
    },
    names::{NamespacedHostname, Str},
};

use super::{http, read::port};
use crate::{
    crd::istio as crd,
    object::{Meta, VirtualService, labels_of},
    translate::{Settings, l7::rate_limit, policy::parse_block},
    validate::Findings,
};

/// What there is behind the host of a destination.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Known {
    /// The service.
    pub service: NamespacedHostname,
    /// Its ports.
    pub ports: Vec<u16>,
}

/// Finds the service of a fully qualified host.
pub type Resolve<'a> = &'a dyn Fn(&str) -> Option<Known>;

/// What routes are made of, beside the object.
#[derive(Clone, Copy)]
pub struct Around<'a> {
    /// Of the mesh.
    pub settings: &'a Settings,
    /// The namespace of the object that a host is written in.
    pub namespace: &'a str,
    /// Ports that requests may come in on.
    pub ports: &'a [u16],
    /// Finds services.
    pub resolve: Resolve<'a>,
}

/// `*`, or a host as it is told to others: a name without dots is one of Kubernetes in the namespace where it is written.
pub fn qualified(settings: &Settings, namespace: &str, host: &str) -> Str {
    match host.contains('.') || host.contains('*') {
        true => host.to_ascii_lowercase().into(),
        false => settings.service_hostname(namespace, host).into(),
    }
}

/// A host and what it may be written as, the most specific first: `a.b.c`, `*.b.c`, `*.c`, `*`.
pub fn patterns(host: &str) -> Vec<Str> {
    let mut patterns = vec![Str::from(host)];
    let mut rest = host.strip_prefix("*.").unwrap_or(host);
    while let Some((_, above)) = rest.split_once('.') {
        patterns.push(format!("*.{above}").into());
        rest = above;
    }
    patterns.push("*".into());
    patterns.dedup();
    patterns
}

/// Whether an object of namespace `own` is exported to `to`; an empty list exports to everywhere.
pub fn is_visible(export_to: &[String], own: &str, to: &str) -> bool {
    let holds = |entry: &String| match entry.as_str() {
        "*" => true,
        "." => own == to,
        "~" => false,
        namespace => namespace == to,
    };
    export_to.is_empty() || export_to.iter().any(holds)
}

/// Whether a list of gateways names the mesh; an empty one does.
pub fn is_for_mesh(gateways: &[String]) -> bool {
    gateways.is_empty() || gateways.iter().any(|gateway| gateway == "mesh")
}

impl Around<'_> {
    /// The backend of a destination; `ports`: those of the request, each with its own where the destination names none.
    pub fn backend(&self, it: Option<&crd::Destination>, request_port: Option<u16>) -> Backend {
        let Some(it) = it else {
            return Backend::Invalid("a route without a destination".into());
        };
        let host = qualified(self.settings, self.namespace, &it.host);
        let Some(known) = (self.resolve)(&host) else {
            return Backend::Invalid(format!("there is no service {host}").into());
        };
        let wanted = it
            .port
            .as_ref()
            .and_then(|port| u16::try_from(port.number).ok());
        let port = match (wanted, &known.ports[..], request_port) {
            (Some(port), ..) => Some(port).filter(|port| known.ports.contains(port)),
            (None, [only], _) => Some(*only),
            (None, ports, request) => request.filter(|port| ports.contains(port)),
        };
        let Some(port) = port else {
            let asked = wanted
                .or(request_port)
                .map_or_else(|| "that".to_owned(), |port| port.to_string());
            return Backend::Invalid(format!("{host} has no port {asked}").into());
        };
        Backend::Service {
            service: known.service,
            port,
            subset: (!it.subset.is_empty()).then(|| it.subset.as_str().into()),
        }
    }

    /// Whether the port of a destination follows the request's.
    pub fn follows_request(&self, it: Option<&crd::Destination>) -> bool {
        it.is_some_and(|it| {
            let host = qualified(self.settings, self.namespace, &it.host);
            it.port.is_none() && (self.resolve)(&host).is_some_and(|known| known.ports.len() > 1)
        })
    }
}

/// The routes of one object, attached to these services.
pub fn routes(
    object: &VirtualService,
    http: &[(Str, crd::HttpRoute)],
    attachments: &[Attachment],
    around: Around<'_>,
) -> Vec<Route> {
    let spec = &object.spec;
    let mut found = Findings::default();
    let http: Vec<_> = http
        .iter()
        .enumerate()
        .flat_map(|(index, (namespace, route))| {
            let around = Around {
                namespace,
                ..around
            };
            http::rules(route, around, &format!("spec.http[{index}]"), &mut found)
        })
        .collect();
    let tls = tls(spec, around, &mut found);
    let tcp = tcp(spec, around, &mut found);
    let mut made = Vec::new();
    if !http.is_empty() {
        let mut rules = Rules::Http {
            order: Order::Written,
            rules: http,
        };
        rate_limit::apply(&mut rules, &rate_limit::of(&object.meta));
        made.push(("", rules));
    }
    if !tls.is_empty() {
        made.push((":tls", Rules::Tls(tls)));
    }
    if !tcp.is_empty() {
        made.push((":tcp", Rules::Tcp(tcp)));
    }
    let route = |(part, rules): (&str, Rules)| route(&object.meta, part, attachments, rules);
    made.into_iter().map(route).collect()
}

/// No object's name has a colon, so the parts' keys are their own.
fn route(meta: &Meta, part: &str, attachments: &[Attachment], rules: Rules) -> Route {
    Route {
        key: ObjectRef {
            kind: "VirtualService".into(),
            namespace: meta.name.namespace.clone(),
            name: format!("{}{part}", meta.name.name).into(),
        },
        created: meta.created.unwrap_or(i64::MAX),
        attachments: attachments.to_vec(),
        rules,
    }
}

/// What admission says.
pub fn check(spec: &crd::VirtualServiceSpec, found: &mut Findings) {
    let settings = Settings::default();
    let resolve = |_: &str| None;
    let around = Around {
        settings: &settings,
        namespace: "",
        ports: &[],
        resolve: &resolve,
    };
    let delegated = spec.hosts.is_empty();
    for (index, host) in spec.hosts.iter().enumerate() {
        if host.is_empty() {
            found.error(format!("spec.hosts[{index}]"), "is empty");
        }
    }
    if spec.hosts.iter().any(|host| host == "*") && is_for_mesh(&spec.gateways) {
        found.error("spec.hosts", "the mesh cannot have a route for any host");
    }
    if spec.http.is_empty() && spec.tls.is_empty() && spec.tcp.is_empty() {
        found.error("spec", "needs http, tls or tcp");
    }
    if delegated && !(spec.tls.is_empty() && spec.tcp.is_empty()) {
        found.error("spec", "a delegate (without hosts) has http only");
    }
    for (index, route) in spec.http.iter().enumerate() {
        let path = format!("spec.http[{index}]");
        http::check(route, delegated, &path, found);
        http::rules(route, around, &path, found);
    }
    tls(spec, around, found);
    tcp(spec, around, found);
}

fn tls(spec: &crd::VirtualServiceSpec, around: Around<'_>, found: &mut Findings) -> Vec<TlsRule> {
    let mut rules = Vec::new();
    for (index, route) in spec.tls.iter().enumerate() {
        let path = format!("spec.tls[{index}]");
        if route.matches.is_empty() {
            found.error(format!("{path}.match"), "is missing");
        }
        destinations(&route.route, &path, found);
        for (index, it) in route.matches.iter().enumerate() {
            let path = format!("{path}.match[{index}]");
            if it.sni_hosts.is_empty() {
                found.error(format!("{path}.sniHosts"), "is missing");
            }
            let destinations = subnets(&it.destination_subnets, &path, found);
            let number = it
                .port
                .and_then(|number| port(number, &format!("{path}.port"), found));
            if !is_for_mesh(&it.gateways) {
                continue;
            }
            for (port, backends) in around.weighted(&route.route, number) {
                rules.push(TlsRule {
                    name: None,
                    sni: it
                        .sni_hosts
                        .iter()
                        .map(|name| name.to_ascii_lowercase().into())
                        .collect(),
                    port,
                    source: source(&it.source_namespace, &it.source_labels),
                    destinations: destinations.clone(),
                    backends,
                });
            }
        }
    }
    rules
}

fn tcp(spec: &crd::VirtualServiceSpec, around: Around<'_>, found: &mut Findings) -> Vec<TcpRule> {
    let mut rules = Vec::new();
    let any = [crd::L4MatchAttributes::default()];
    for (index, route) in spec.tcp.iter().enumerate() {
        let path = format!("spec.tcp[{index}]");
        destinations(&route.route, &path, found);
        let matches = if route.matches.is_empty() {
            &any[..]
        } else {
            &route.matches
        };
        for (index, it) in matches.iter().enumerate() {
            let path = format!("{path}.match[{index}]");
            dropped(
                &path,
                found,
                &[("sourceSubnet", !it.source_subnet.is_empty())],
            );
            let subnets = subnets(&it.destination_subnets, &path, found);
            let number = it
                .port
                .and_then(|number| port(number, &format!("{path}.port"), found));
            if !is_for_mesh(&it.gateways) {
                continue;
            }
            for (port, backends) in around.weighted(&route.route, number) {
                rules.push(TcpRule {
                    name: None,
                    port,
                    source: source(&it.source_namespace, &it.source_labels),
                    destinations: subnets.clone(),
                    backends,
                });
            }
        }
    }
    rules
}

/// Who calls.
pub fn source(namespace: &str, labels: &BTreeMap<String, String>) -> Option<Box<CallerMatch>> {
    let namespace = (!namespace.is_empty()).then(|| namespace.into());
    CallerMatch::new(namespace, labels_of(labels))
}

/// Backends by their weights.
type Shares = Vec<(u32, Backend)>;

impl Around<'_> {
    /// Weighted backends, once for each port of requests where they differ by it.
    fn weighted(
        &self,
        route: &[crd::RouteDestination],
        port: Option<u16>,
    ) -> Vec<(Option<u16>, Shares)> {
        let follows = route
            .iter()
            .any(|it| self.follows_request(it.destination.as_ref()));
        let ports: Vec<Option<u16>> = match (port, follows) {
            (None, true) => self.ports.iter().copied().map(Some).collect(),
            _ => vec![port],
        };
        let weights = weights(route.iter().map(|it| it.weight));
        let backends = |port| {
            let backends = route
                .iter()
                .map(|it| self.backend(it.destination.as_ref(), port));
            weights.iter().copied().zip(backends).collect()
        };
        ports
            .into_iter()
            .map(|port| (port, backends(port)))
            .collect()
    }
}

/// Relative shares. A single destination without one gets all.
pub fn weights(given: impl Iterator<Item = Option<i32>>) -> Vec<u32> {
    let mut weights: Vec<u32> = given
        .map(|weight| {
            weight
                .and_then(|weight| u32::try_from(weight).ok())
                .unwrap_or_default()
        })
        .collect();
    if let [only @ 0] = &mut weights[..] {
        *only = 100;
    }
    weights
}

fn destinations(route: &[crd::RouteDestination], path: &str, found: &mut Findings) {
    if route.is_empty() {
        found.error(format!("{path}.route"), "is missing");
    }
    for (index, it) in route.iter().enumerate() {
        destination(
            it.destination.as_ref(),
            it.weight,
            &format!("{path}.route[{index}]"),
            found,
        );
    }
}

/// Checks a destination and its weight.
pub fn destination(
    it: Option<&crd::Destination>,
    weight: Option<i32>,
    path: &str,
    found: &mut Findings,
) {
    let path_of = format!("{path}.destination");
    match it {
        None => found.error(path_of, "is missing"),
        Some(it) if it.host.is_empty() => found.error(format!("{path_of}.host"), "is missing"),
        Some(it) => {
            if let Some(number) = &it.port {
                port(number.number, &format!("{path_of}.port.number"), found);
            }
        }
    }
    if weight.is_some_and(|weight| weight < 0) {
        found.error(format!("{path}.weight"), "is negative");
    }
}

fn subnets(texts: &[String], path: &str, found: &mut Findings) -> Vec<IpNet> {
    let mut subnets = Vec::new();
    for (index, text) in texts.iter().enumerate() {
        match parse_block(text) {
            Some(block) => subnets.push(block),
            None => found.error(
                format!("{path}.destinationSubnets[{index}]"),
                format!("{text:?} is no address or range"),
            ),
        }
    }
    subnets
}

/// Says which conditions a waypoint cannot judge.
pub fn dropped(path: &str, found: &mut Findings, fields: &[(&str, bool)]) {
    for (field, _) in fields.iter().filter(|(_, given)| *given) {
        found.warning(
            format!("{path}.{field}"),
            "is left out by waypoints: the rule matches without it",
        );
    }
}

/// The HTTP rules of an object with those of its delegates in their places, and what is wrong with these. Each with the
/// namespace in which its hosts are written.
pub fn with_delegates(
    object: &VirtualService,
    delegate: impl Fn(&crd::Delegate) -> Result<(Str, Vec<crd::HttpRoute>), String>,
) -> (Vec<(Str, crd::HttpRoute)>, Vec<String>) {
    let mut routes = Vec::new();
    let mut problems = Vec::new();
    let namespace = &object.meta.name.namespace;
    for (index, root) in object.spec.http.iter().enumerate() {
        let Some(reference) = &root.delegate else {
            routes.push((namespace.clone(), root.clone()));
            continue;
        };
        match delegate(reference) {
            Ok((namespace, children)) => {
                let merged = children.iter().filter_map(|child| http::under(root, child));
                routes.extend(merged.map(|route| (namespace.clone(), route)));
            }
            Err(problem) => problems.push(format!("spec.http[{index}].delegate: {problem}")),
        }
    }
    (routes, problems)
}

/// Services by host, to resolve destinations among: the own namespace's first, then a Kubernetes service, then the
/// canonical one.
pub fn choose<'c, T>(
    namespace: &str,
    claims: impl IntoIterator<Item = &'c T>,
    facts: impl Fn(&T) -> (Str, bool, bool),
) -> Option<&'c T> {
    let rank = |claim: &&T| {
        let (home, kubernetes, private) = facts(claim);
        let own = *home == *namespace;
        (!own, private && !own, !kubernetes, home)
    };
    let mut visible: BTreeMap<_, _> = BTreeMap::new();
    for claim in claims {
        visible.entry(rank(&claim)).or_insert(claim);
    }
    visible
        .into_iter()
        .next()
        .filter(|((_, hidden, ..), _)| !hidden)
        .map(|(_, claim)| claim)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_of_a_host_go_from_specific_to_general() {
        let of = |host: &str| {
            patterns(host)
                .iter()
                .map(|it| it.to_string())
                .collect::<Vec<_>>()
        };
        assert_eq!(of("a.b.c"), ["a.b.c", "*.b.c", "*.c", "*"]);
        assert_eq!(of("*.b.c"), ["*.b.c", "*.c", "*"]);
        assert_eq!(of("a"), ["a", "*"]);
    }

    #[test]
    fn a_single_destination_gets_everything() {
        assert_eq!(weights([None].into_iter()), [100]);
        assert_eq!(weights([Some(0)].into_iter()), [100]);
        assert_eq!(weights([Some(1), None].into_iter()), [1, 0]);
    }
}
