//! Services: which virtual addresses they have and which pods stand behind them. Pure; the rules of the nodes, the
//! endpoint slices for the control plane and the DNS answers are all made from this one view.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use k8s_openapi::api::core::v1::{Service, ServicePort, ServiceSpec};
use serde_json::{Value, json};

use super::{
    address::{self, Dual, ServicePool},
    objects::{Key, Labels, Objects},
    plan,
};

/// A pod as a service sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Member {
    /// Its name.
    pub key: Key,
    /// Its unique id.
    pub uid: String,
    /// Its labels.
    pub labels: Labels,
    /// Its addresses.
    pub address: Dual,
    /// Its node.
    pub node: String,
    /// Its host name, when the pod sets one itself.
    pub hostname: Option<String>,
    /// The service that `spec.subdomain` names.
    pub subdomain: Option<String>,
    /// Whether it may be sent traffic.
    pub ready: bool,
    /// Whether it is on its way out.
    pub terminating: bool,
    /// Named ports of its containers.
    pub ports: BTreeMap<String, i32>,
}

/// A service with what stands behind it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ServiceView {
    /// Its name.
    pub key: Key,
    /// Its virtual addresses, in the order of its families; none for a headless service.
    pub addresses: Vec<IpAddr>,
    /// Whether it is headless (`clusterIP: None`).
    pub headless: bool,
    /// The other name it stands for (`type: ExternalName`).
    pub external_name: Option<String>,
    /// Its ports.
    pub ports: Vec<PortView>,
    /// Ready endpoints' addresses with their host names: what a headless service answers with.
    pub hosts: Vec<(IpAddr, Option<String>)>,
}

/// One port of a service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct PortView {
    /// Its name; empty where it has none.
    pub name: String,
    /// `tcp` or `udp`.
    pub protocol: String,
    /// The service's port.
    pub port: u16,
    /// Ready endpoints.
    pub backends: BTreeSet<(IpAddr, u16)>,
}

/// The cluster DNS server's own service, which exists in every mesh.
pub(super) fn dns_service() -> ServiceView {
    let port = |protocol: &str| PortView {
        name: format!("dns-{protocol}"),
        protocol: protocol.to_owned(),
        port: 53,
        backends: address::CONTROL
            .both()
            .into_iter()
            .map(|ip| (ip, 53))
            .collect(),
    };
    ServiceView {
        key: Key::new("kube-system", "kube-dns"),
        addresses: address::CLUSTER_DNS.both().to_vec(),
        headless: false,
        external_name: None,
        ports: vec![port("tcp"), port("udp")],
        hosts: Vec::new(),
    }
}

/// Every service as it is now. Addresses are taken from `pool` for those that have none of their own.
pub(super) fn view(
    objects: &Objects,
    members: &[Member],
    pool: &mut ServicePool,
) -> BTreeMap<Key, ServiceView> {
    let dns = dns_service();
    let mut views = BTreeMap::from([(dns.key.clone(), dns)]);
    let names: BTreeSet<String> = objects.services.keys().map(Key::to_string).collect();
    pool.retain(|key| names.contains(key));
    for (key, service) in &objects.services {
        let mut view = empty_view(key, service, pool);
        match selector(service) {
            Some(selector) => {
                fill_from_pods(&mut view, service, &selected(key, &selector, members))
            }
            None => fill_from_slices(&mut view, service, objects),
        }
        views.insert(key.clone(), view);
    }
    views
}

fn empty_view(key: &Key, service: &Service, pool: &mut ServicePool) -> ServiceView {
    let spec = service.spec.clone().unwrap_or_default();
    let headless = spec.cluster_ip.as_deref() == Some("None");
    let external_name = spec
        .external_name
        .clone()
        .filter(|_| spec.type_.as_deref() == Some("ExternalName"));
    let addresses = if headless || external_name.is_some() {
        Vec::new()
    } else {
        addresses(key, &spec, pool)
    };
    let ports = spec.ports.iter().flatten().filter_map(|port| {
        Some(PortView {
            name: port.name.clone().unwrap_or_default(),
            protocol: port
                .protocol
                .as_deref()
                .unwrap_or("TCP")
                .to_ascii_lowercase(),
            port: u16::try_from(port.port).ok()?,
            backends: BTreeSet::new(),
        })
    });
    ServiceView {
        key: key.clone(),
        addresses,
        headless,
        external_name,
        ports: ports.collect(),
        hosts: Vec::new(),
    }
}

/// Families of IP, as services and endpoint slices name them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Family {
    V4,
    V6,
}

impl Family {
    fn of(ip: &IpAddr) -> Self {
        if ip.is_ipv4() { Self::V4 } else { Self::V6 }
    }

    fn as_str(self) -> &'static str {
        match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        }
    }

    fn pick(self, address: Dual) -> IpAddr {
        match self {
            Self::V4 => address.v4.into(),
            Self::V6 => address.v6.into(),
        }
    }
}

fn chosen_addresses(spec: &ServiceSpec) -> Vec<IpAddr> {
    let texts = spec.cluster_ips.iter().flatten().chain(&spec.cluster_ip);
    texts.filter_map(|ip| ip.parse().ok()).collect()
}

/// The families of a service, its first one first, as a dual-stack cluster assigns them: one, IPv4 unless it says IPv6,
/// where the service asks for no more. A program that listens on IPv4 alone would not be found by a name that resolves
/// to both.
fn families(spec: &ServiceSpec) -> Vec<Family> {
    let mut named: Vec<Family> = match &spec.ip_families {
        Some(families) => families
            .iter()
            .map(|family| {
                if family == "IPv6" {
                    Family::V6
                } else {
                    Family::V4
                }
            })
            .collect(),
        None => chosen_addresses(spec).iter().map(Family::of).collect(),
    };
    named.dedup();
    let dual = match spec.ip_family_policy.as_deref() {
        Some(policy) => policy != "SingleStack",
        None => named.len() > 1,
    };
    let first = named.first().copied().unwrap_or(Family::V4);
    let other = if first == Family::V4 {
        Family::V6
    } else {
        Family::V4
    };
    if dual {
        vec![first, other]
    } else {
        vec![first]
    }
}

/// One address for each family: the one that the service names, else one of the pool.
fn addresses(key: &Key, spec: &ServiceSpec, pool: &mut ServicePool) -> Vec<IpAddr> {
    let chosen = chosen_addresses(spec);
    let mut address = |family| {
        let named = chosen.iter().find(|ip| Family::of(ip) == family);
        let sibling = chosen.iter().find_map(|ip| match ip {
            IpAddr::V4(v4) if family == Family::V6 => Some(address::service_v6(*v4).into()),
            _ => None,
        });
        let pooled = || pool.take(&key.to_string()).map(|dual| family.pick(dual));
        named.copied().or(sibling).or_else(pooled)
    };
    families(spec)
        .into_iter()
        .filter_map(&mut address)
        .collect()
}

fn selector(service: &Service) -> Option<Labels> {
    service
        .spec
        .as_ref()?
        .selector
        .clone()
        .filter(|selector| !selector.is_empty())
}

fn selected<'a>(key: &Key, selector: &Labels, members: &'a [Member]) -> Vec<&'a Member> {
    let matches = |member: &&Member| {
        member.key.namespace == key.namespace
            && selector
                .iter()
                .all(|(name, value)| member.labels.get(name) == Some(value))
    };
    members.iter().filter(matches).collect()
}

fn fill_from_pods(view: &mut ServiceView, service: &Service, members: &[&Member]) {
    let spec = service.spec.as_ref();
    let unready_too = spec
        .and_then(|spec| spec.publish_not_ready_addresses)
        .unwrap_or(false);
    let serving: Vec<&&Member> = members
        .iter()
        .filter(|member| (member.ready || unready_too) && !member.terminating)
        .collect();
    let ports = spec
        .and_then(|spec| spec.ports.as_ref())
        .into_iter()
        .flatten();
    for (port, view) in ports.zip(&mut view.ports) {
        let targets = serving
            .iter()
            .filter_map(|member| Some((member.address, target_port(port, member)?)));
        view.backends = targets
            .flat_map(|(address, port)| address.both().map(|ip| (ip, port)))
            .collect();
    }
    let hosts = serving.iter().flat_map(|member| {
        let named = member
            .hostname
            .clone()
            .filter(|_| member.subdomain.as_deref() == Some(view.key.name.as_str()));
        member.address.both().map(|ip| (ip, named.clone()))
    });
    let own = spec.map(families).unwrap_or_default();
    view.hosts = hosts
        .filter(|(ip, _)| own.contains(&Family::of(ip)))
        .collect();
}

fn target_port(port: &ServicePort, member: &Member) -> Option<u16> {
    match &port.target_port {
        Some(target) => plan::port(target, &member.ports).filter(|port| *port != 0),
        None => u16::try_from(port.port).ok(),
    }
}

fn fill_from_slices(view: &mut ServiceView, service: &Service, objects: &Objects) {
    let own = objects.slices.values().filter(|slice| {
        let labels = slice.metadata.labels.as_ref();
        let of = labels.and_then(|labels| labels.get("kubernetes.io/service-name"));
        slice.metadata.namespace.as_deref().unwrap_or("default") == view.key.namespace
            && of == Some(&view.key.name)
    });
    let ports = service
        .spec
        .as_ref()
        .and_then(|spec| spec.ports.clone())
        .unwrap_or_default();
    for slice in own {
        let endpoints = slice.endpoints.iter().flatten().filter(|endpoint| {
            endpoint
                .conditions
                .as_ref()
                .and_then(|conditions| conditions.ready)
                .unwrap_or(true)
        });
        for endpoint in endpoints {
            let ips = endpoint
                .addresses
                .iter()
                .filter_map(|text| text.parse::<IpAddr>().ok());
            for ip in ips {
                view.hosts.push((ip, endpoint.hostname.clone()));
                for (port, view) in ports.iter().zip(&mut view.ports) {
                    let named = slice.ports.iter().flatten();
                    let same = |known: &&_| slice_port_matches(known, port);
                    let number = named
                        .clone()
                        .find(same)
                        .and_then(|found| found.port)
                        .unwrap_or(port.port);
                    view.backends
                        .extend(u16::try_from(number).ok().map(|number| (ip, number)));
                }
            }
        }
    }
}

fn slice_port_matches(
    known: &k8s_openapi::api::discovery::v1::EndpointPort,
    port: &ServicePort,
) -> bool {
    known.name.as_deref().unwrap_or_default() == port.name.as_deref().unwrap_or_default()
}

/// The `EndpointSlice` objects of a service with a selector, one per family: what Kubernetes' own controller would write.
pub(super) fn slices(
    key: &Key,
    service: &Service,
    members: &[Member],
    zones: &BTreeMap<String, String>,
) -> Vec<(String, Value)> {
    let Some(selector) = selector(service) else {
        return Vec::new();
    };
    let members = selected(key, &selector, members);
    let families = service.spec.as_ref().map(families).unwrap_or_default();
    families
        .into_iter()
        .map(|family| {
            let name = format!("{}-{}", key.name, family.as_str().to_ascii_lowercase());
            let endpoints = members.iter().map(|member| endpoint(member, family.pick(member.address), zones));
            let endpoints: Vec<Value> = endpoints.collect();
            let slice = json!({
                "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
                "metadata": {"name": name, "namespace": key.namespace,
                    "labels": {"kubernetes.io/service-name": key.name,
                        "endpointslice.kubernetes.io/managed-by": "leyline-local"}},
                "addressType": family.as_str(), "ports": slice_ports(service, &members), "endpoints": endpoints,
            });
            (name, slice)
        })
        .collect()
}

fn endpoint(member: &Member, ip: IpAddr, zones: &BTreeMap<String, String>) -> Value {
    let mut endpoint = json!({
        "addresses": [ip.to_string()],
        "conditions": {"ready": member.ready && !member.terminating, "serving": member.ready,
            "terminating": member.terminating},
        "nodeName": member.node,
        "targetRef": {"kind": "Pod", "namespace": member.key.namespace, "name": member.key.name, "uid": member.uid},
    });
    if let Some(zone) = zones.get(&member.node) {
        endpoint["zone"] = zone.as_str().into();
    }
    endpoint
}

fn slice_ports(service: &Service, members: &[&Member]) -> Vec<Value> {
    let ports = service
        .spec
        .as_ref()
        .and_then(|spec| spec.ports.as_ref())
        .into_iter()
        .flatten();
    let with_target = ports.filter_map(|port| {
        let number = match members.first() {
            Some(member) => target_port(port, member)?,
            None => u16::try_from(port.port).ok()?,
        };
        let mut json = json!({"name": port.name.clone().unwrap_or_default(), "port": number,
            "protocol": port.protocol.as_deref().unwrap_or("TCP")});
        if let Some(protocol) = &port.app_protocol {
            json["appProtocol"] = protocol.as_str().into();
        }
        Some(json)
    });
    with_target.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn member(name: &str, host: u8, ready: bool) -> Member {
        Member {
            key: Key::new("a", name),
            uid: name.to_owned(),
            labels: Labels::from([("app".to_owned(), "web".to_owned())]),
            address: address::node(host),
            node: "node1".to_owned(),
            hostname: None,
            subdomain: None,
            ready,
            terminating: false,
            ports: BTreeMap::from([("web".to_owned(), 8080)]),
        }
    }

    fn objects(spec: Value) -> Objects {
        let service = json!({"metadata": {"name": "web", "namespace": "a"}, "spec": spec});
        let mut objects = Objects::default();
        objects.services.insert(
            Key::new("a", "web"),
            serde_json::from_value(service).unwrap(),
        );
        objects
    }

    #[test]
    fn ready_pods_stand_behind_a_service_by_the_name_of_their_port() {
        let objects = objects(
            json!({"selector": {"app": "web"}, "ipFamilyPolicy": "PreferDualStack",
                "ports": [{"port": 80, "targetPort": "web"}]}),
        );
        let members = [member("one", 1, true), member("two", 2, false)];
        let views = view(&objects, &members, &mut ServicePool::default());
        let web = &views[&Key::new("a", "web")];
        let expected: BTreeSet<_> = address::node(1)
            .both()
            .into_iter()
            .map(|ip| (ip, 8080))
            .collect();
        assert_eq!(web.ports[0].backends, expected);
        assert_eq!(web.addresses.len(), 2);
        assert!(web.addresses[0].is_ipv4());
    }

    #[test]
    fn families_are_as_the_service_asks() {
        let count = |extra: Value| {
            let mut spec = json!({"selector": {"app": "web"}, "ports": [{"port": 80}]});
            spec.as_object_mut()
                .unwrap()
                .extend(extra.as_object().unwrap().clone());
            let views = view(&objects(spec), &[], &mut ServicePool::default());
            let addresses = views[&Key::new("a", "web")].addresses.clone();
            addresses
                .iter()
                .map(|ip| if ip.is_ipv4() { '4' } else { '6' })
                .collect::<String>()
        };
        assert_eq!(count(json!({})), "4");
        assert_eq!(count(json!({"ipFamilyPolicy": "PreferDualStack"})), "46");
        assert_eq!(count(json!({"ipFamilies": ["IPv4", "IPv6"]})), "46");
        assert_eq!(count(json!({"clusterIP": "None"})), "");
        assert_eq!(count(json!({"ipFamilyPolicy": "SingleStack"})), "4");
        assert_eq!(count(json!({"ipFamilies": ["IPv6"]})), "6");
        assert_eq!(
            count(json!({"ipFamilyPolicy": "PreferDualStack", "ipFamilies": ["IPv6", "IPv4"]})),
            "64"
        );
        assert_eq!(count(json!({"clusterIP": "10.96.7.7"})), "4");
    }

    #[test]
    fn slices_name_every_pod_and_tell_which_are_ready() {
        let objects = objects(
            json!({"selector": {"app": "web"}, "ipFamilyPolicy": "RequireDualStack", "ports": [{"port": 80, "targetPort": 8080}]}),
        );
        let key = Key::new("a", "web");
        let members = [member("one", 1, true), member("two", 2, false)];
        let slices = slices(&key, &objects.services[&key], &members, &BTreeMap::new());
        assert_eq!(slices.len(), 2);
        let endpoints = slices[0].1["endpoints"].as_array().unwrap();
        let ready: Vec<_> = endpoints
            .iter()
            .map(|endpoint| endpoint["conditions"]["ready"].clone())
            .collect();
        assert_eq!(ready, [json!(true), json!(false)]);
        assert_eq!(slices[0].1["ports"][0]["port"], 8080);
    }
}
