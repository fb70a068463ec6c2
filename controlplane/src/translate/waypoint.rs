//! Waypoints: which Gateways are one, and which one an object's traffic goes through.
//!
//! Fails closed (unless told to do as Istio does): an object that asks for a waypoint and cannot have it keeps a reference
//! that leads nowhere, so that node tunnels refuse its traffic, and its condition says "traffic refused".

use std::sync::Arc;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use mesh::names::Str;
use proto::workload::{
    ApplicationTunnel, GatewayAddress, NamespacedHostname, WeightedWaypoint, application_tunnel,
    gateway_address::Destination,
};

use super::{FailurePolicy, Settings, condition, network_address};
use crate::{
    crd::{AllowedRoutes, FromNamespaces, Listener},
    gateway::{class::is_east_west, names::MANAGED},
    object::{Gateway, GatewayClass, Labels, Meta, Name},
    output::{Condition, Truth},
};

/// The port on which waypoints take HBONE.
pub const HBONE_PORT: u32 = 15008;

const USE: &str = "istio.io/use-waypoint";
const USE_NAMESPACE: &str = "istio.io/use-waypoint-namespace";
const CANARY: &str = "istio.io/use-waypoint-canary";
const CANARY_NAMESPACE: &str = "istio.io/use-waypoint-canary-namespace";
const CANARY_WEIGHT: &str = "istio.io/use-waypoint-canary-weight";
const INGRESS: &str = "istio.io/ingress-use-waypoint";
const FOR: &str = "istio.io/waypoint-for";
const BINDING: &str = "ambient.istio.io/waypoint-inbound-binding";

/// A Gateway that takes traffic for others.
#[derive(Clone, Debug, PartialEq)]
pub struct Waypoint {
    /// The Gateway.
    pub name: Name,
    /// Where it is; `None` until one of its pods is ready, which needs what it will serve.
    pub address: Option<GatewayAddress>,
    /// How its pods want connections handed over.
    pub binding: Option<ApplicationTunnel>,
    serves: Serves,
    allows: Allows,
    /// Its class, where that makes it a gateway between networks.
    between_networks: Option<Str>,
}

/// `istio.io/waypoint-for`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Serves {
    Services,
    Workloads,
    All,
    Nothing,
}

/// From where it may be used.
#[derive(Clone, Debug, PartialEq)]
enum Allows {
    All,
    Same,
    Selected(LabelSelector),
    Nobody,
}

/// What an object is to a waypoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Traffic {
    /// Traffic addressed to a service.
    Service,
    /// Traffic addressed to a workload.
    Workload,
}

/// An object that may use a waypoint.
#[derive(Clone, Copy, Debug)]
pub struct User<'a> {
    /// The object.
    pub object: &'a Meta,
    /// Its namespace, where there is such an object.
    pub namespace: Option<&'a Meta>,
    /// What it is.
    pub traffic: Traffic,
    /// Seen only from its own namespace (a ServiceEntry of visibility NAMESPACE).
    pub private: bool,
}

/// What came of an object's wish for a waypoint.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Bound {
    /// Goes on the wire.
    pub waypoint: Option<GatewayAddress>,
    /// Goes on the wire; empty without a canary.
    pub weighted: Vec<WeightedWaypoint>,
    /// Goes on the wire.
    pub ingress: bool,
    /// The waypoints behind the addresses, for status and for policies.
    pub names: Vec<Name>,
    /// The waypoints that have to know of it: those of `names`, and one that has no address yet.
    pub served_by: Vec<Name>,
    /// `WaypointBound`; `None` when none was asked for.
    pub condition: Option<Condition>,
}

/// Which waypoint is asked for, and at which level.
struct Wish<'a> {
    name: Name,
    declared_by: &'a Meta,
    by_object: bool,
}

/// A waypoint that traffic can be sent to.
struct Usable {
    name: Name,
    address: GatewayAddress,
}

/// Why it cannot be had.
struct Refused {
    reason: &'static str,
    message: String,
    /// May be used as soon as it has an address.
    pending: bool,
    /// Asked for by the namespace, of a waypoint that is not meant for this kind of traffic: not a wish of this object.
    moot: bool,
}

impl Waypoint {
    /// The waypoint that a Gateway is; `None` if it has neither an address nor a listener for the mesh.
    pub fn new(network: &str, gateway: &Gateway, class: Option<&GatewayClass>) -> Option<Self> {
        let of_class = |key: &str| class.and_then(|class| class.meta.label(key));
        let serves = gateway.meta.label(FOR).or_else(|| of_class(FOR));
        let binding = gateway
            .meta
            .annotation(BINDING)
            .or_else(|| class.and_then(|class| class.meta.annotation(BINDING)))
            .and_then(|text| binding(text));
        let (address, listener) = (
            address(network, gateway),
            listener(gateway, binding.as_ref()),
        );
        let class_name = gateway.spec.gateway_class_name.as_str();
        let controller = class.map(|class| class.spec.controller_name.as_str());
        let between_networks = is_east_west(class_name, controller).then(|| class_name.into());
        (address.is_some() || listener.is_some()).then(|| Self {
            name: gateway.meta.name.clone(),
            address,
            binding,
            serves: Serves::parse(serves.map(|text| &**text)),
            allows: Allows::new(listener),
            between_networks,
        })
    }

    fn allows(&self, user: &User<'_>) -> bool {
        let namespace = &user.object.name.namespace;
        match &self.allows {
            Allows::All => true,
            Allows::Same => *namespace == self.name.namespace,
            Allows::Nobody => false,
            Allows::Selected(selector) => user
                .namespace
                .is_some_and(|namespace| matches_selector(selector, &namespace.labels)),
        }
    }
}

impl Serves {
    fn parse(text: Option<&str>) -> Self {
        match text {
            Some("workload") => Self::Workloads,
            Some("all") => Self::All,
            Some("none") => Self::Nothing,
            _ => Self::Services,
        }
    }

    fn traffic(self, traffic: Traffic) -> bool {
        match traffic {
            Traffic::Service => matches!(self, Self::Services | Self::All),
            Traffic::Workload => matches!(self, Self::Workloads | Self::All),
        }
    }

    fn as_str(self) -> &'static str {
        match self {
            Self::Services => "services",
            Self::Workloads => "workloads",
            Self::All => "all",
            Self::Nothing => "nothing",
        }
    }
}

impl Allows {
    /// Gateway API `AllowedRoutes.namespaces`; the default is `Same`.
    fn new(listener: Option<&Listener>) -> Self {
        let Some(listener) = listener else {
            return Self::Same;
        };
        let empty = AllowedRoutes::default();
        let routes = listener.allowed_routes.as_ref().unwrap_or(&empty);
        let namespaces = routes.namespaces.clone().unwrap_or_default();
        match namespaces.from {
            FromNamespaces::All => Self::All,
            FromNamespaces::Same => Self::Same,
            FromNamespaces::None => Self::Nobody,
            FromNamespaces::Selector => namespaces.selector.map_or(Self::Nobody, Self::Selected),
        }
    }
}

/// A host name is preferred to an address: it survives a change of address.
fn address(network: &str, gateway: &Gateway) -> Option<GatewayAddress> {
    let hostname = gateway
        .addresses
        .iter()
        .find(|address| address.type_.as_deref() == Some("Hostname"))
        .map(|address| {
            Destination::Hostname(NamespacedHostname {
                namespace: gateway.meta.name.namespace.to_string(),
                hostname: address.value.clone(),
            })
        });
    let destination = hostname.or_else(|| {
        let ip = gateway
            .addresses
            .iter()
            .find_map(|address| address.value.parse().ok())?;
        Some(Destination::Address(network_address(network, ip)))
    })?;
    Some(to(destination))
}

fn to(destination: Destination) -> GatewayAddress {
    GatewayAddress {
        destination: Some(destination),
        hbone_mtls_port: HBONE_PORT,
    }
}

/// `PROXY`, `PROXY/15088`, `NONE`.
fn binding(text: &str) -> Option<ApplicationTunnel> {
    let (protocol, port) = text.split_once('/').unwrap_or((text, "0"));
    let protocol = match protocol {
        "PROXY" => application_tunnel::Protocol::Proxy,
        "NONE" => application_tunnel::Protocol::None,
        _ => return None,
    };
    Some(ApplicationTunnel {
        protocol: protocol.into(),
        port: port.parse::<u16>().ok()?.into(),
    })
}

fn listener<'g>(gateway: &'g Gateway, binding: Option<&ApplicationTunnel>) -> Option<&'g Listener> {
    let mut listeners = gateway.spec.listeners.iter();
    match binding {
        Some(binding) if binding.port != 0 => {
            listeners.find(|l| l.port == binding.port || l.protocol == "istio.io/PROXY")
        }
        _ => listeners.find(|l| l.protocol == "HBONE" && l.port == HBONE_PORT),
    }
}

/// Whether labels are those that Kubernetes' `LabelSelector` asks for.
pub fn matches_selector(selector: &LabelSelector, labels: &Labels) -> bool {
    let value = |key: &String| labels.get(key.as_str()).map(|value| &**value);
    let equal = selector
        .match_labels
        .iter()
        .flatten()
        .all(|(key, wanted)| value(key) == Some(wanted));
    equal
        && selector
            .match_expressions
            .iter()
            .flatten()
            .all(|expression| {
                let found = value(&expression.key);
                let among = found
                    .is_some_and(|found| expression.values.iter().flatten().any(|v| v == found));
                match expression.operator.as_str() {
                    "In" => among,
                    "NotIn" => !among,
                    "Exists" => found.is_some(),
                    "DoesNotExist" => found.is_none(),
                    _ => false,
                }
            })
}

/// Which waypoint the traffic of `user` goes through. `find` looks a waypoint up by the name of its Gateway.
pub fn resolve(
    settings: &Settings,
    user: &User<'_>,
    find: impl Fn(&Name) -> Option<Arc<Waypoint>>,
) -> Bound {
    let Some(wish) = wish(user) else {
        return Bound::default();
    };
    let ingress = ingress(user);
    match usable(user, &wish.name, &find) {
        Ok(waypoint) => accepted(user, &wish, &waypoint, ingress, &find),
        Err(refused) if refused.moot && !wish.by_object => Bound {
            condition: (user.traffic == Traffic::Service).then(|| {
                bound(
                    Truth::False,
                    refused.reason,
                    format!("{}; not used", refused.message),
                )
            }),
            ..Bound::default()
        },
        Err(refused) => closed(settings, &wish, &refused, ingress),
    }
}

fn wish<'a>(user: &User<'a>) -> Option<Wish<'a>> {
    let managed = user.object.label(MANAGED).map(|by| &**by);
    if matches!(
        managed,
        Some("istio.io-mesh-controller" | "istio.io-eastwest-controller")
    ) {
        return None;
    }
    let levels = [(Some(user.object), true), (user.namespace, false)];
    for (meta, by_object) in levels {
        let Some(meta) = meta else { continue };
        let Some(name) = meta.label(USE) else {
            continue;
        };
        if &**name == "none" {
            return None;
        }
        return Some(Wish {
            name: Name {
                namespace: meta
                    .label(USE_NAMESPACE)
                    .unwrap_or(&user.object.name.namespace)
                    .clone(),
                name: name.clone(),
            },
            declared_by: meta,
            by_object,
        });
    }
    None
}

/// The object's label wins, even when it says no.
fn ingress(user: &User<'_>) -> bool {
    let label = |meta: &Meta| meta.label(INGRESS).map(|text| truth(text));
    label(user.object)
        .or_else(|| user.namespace.and_then(label))
        .unwrap_or_default()
}

fn truth(text: &str) -> bool {
    text.eq_ignore_ascii_case("true")
}

fn usable(
    user: &User<'_>,
    name: &Name,
    find: impl Fn(&Name) -> Option<Arc<Waypoint>>,
) -> Result<Usable, Refused> {
    let refused = |reason, moot, message: String| {
        Err(Refused {
            reason,
            message,
            pending: false,
            moot,
        })
    };
    let not_ready = |pending| Refused {
        reason: "WaypointIsNotReady",
        message: format!("there is no waypoint {name}, or it has no address yet"),
        pending,
        moot: false,
    };
    let Some(waypoint) = find(name) else {
        return Err(not_ready(false));
    };
    if let Some(class) = &waypoint.between_networks {
        let message = format!(
            "Gateway {name} is of class {class}: a gateway between networks, and no waypoint"
        );
        return refused("AttachmentDenied", false, message);
    }
    if user.private && name.namespace != user.object.name.namespace {
        let message =
            format!("waypoint {name} is in another namespace, from which this is not visible");
        return refused("CrossNamespaceWaypointForbidden", false, message);
    }
    if !waypoint.allows(user) {
        let namespace = &user.object.name.namespace;
        let message = format!(
            "waypoint {name} does not allow namespace {namespace} (its listener's allowedRoutes)"
        );
        return refused("AttachmentDenied", false, message);
    }
    if !waypoint.serves.traffic(user.traffic) {
        let message = format!("waypoint {name} is for {}", waypoint.serves.as_str());
        return refused("UnsupportedTrafficType", true, message);
    }
    match waypoint.address.clone() {
        Some(address) => Ok(Usable {
            name: waypoint.name.clone(),
            address,
        }),
        None => Err(not_ready(true)),
    }
}

fn accepted(
    user: &User<'_>,
    wish: &Wish<'_>,
    waypoint: &Usable,
    ingress: bool,
    find: impl Fn(&Name) -> Option<Arc<Waypoint>>,
) -> Bound {
    let mut message = format!("traffic goes through waypoint {}", wish.name);
    let mut names = vec![waypoint.name.clone()];
    let mut weighted = Vec::new();
    if user.traffic == Traffic::Service {
        message += match ingress {
            true => ", traffic from ingress gateways too",
            false => {
                "; traffic from ingress gateways does not (label istio.io/ingress-use-waypoint)"
            }
        };
        match canary(user, wish, find) {
            Some(Ok((second, weight))) => {
                message += &format!("; canary {} gets {weight} of 100 connections", second.name);
                names.push(second.name.clone());
                weighted = shares(&waypoint.address, &second.address, weight);
            }
            Some(Err(problem)) => message += &format!("; no canary: {problem}"),
            None => {}
        }
    }
    Bound {
        waypoint: Some(waypoint.address.clone()),
        weighted,
        ingress,
        served_by: names.clone(),
        names,
        condition: Some(bound(Truth::True, "WaypointAccepted", message)),
    }
}

type Canary = Result<(Usable, u32), String>;

/// The second waypoint, asked for at the level that asks for the first.
fn canary(
    user: &User<'_>,
    wish: &Wish<'_>,
    find: impl Fn(&Name) -> Option<Arc<Waypoint>>,
) -> Option<Canary> {
    let declared_by = wish.declared_by;
    let name = Name {
        namespace: declared_by
            .label(CANARY_NAMESPACE)
            .unwrap_or(&user.object.name.namespace)
            .clone(),
        name: declared_by.label(CANARY)?.clone(),
    };
    if name == wish.name {
        return Some(Err(format!(
            "CanarySameAsPrimary: {name} is the waypoint itself"
        )));
    }
    let text = declared_by
        .annotation(CANARY_WEIGHT)
        .map_or("0", |text| &**text);
    let weight = match text.parse::<u32>() {
        Ok(weight) if weight <= 100 => weight,
        _ => {
            return Some(Err(format!(
                "CanaryInvalidWeight: {text:?} is no number from 0 to 100"
            )));
        }
    };
    Some(match usable(user, &name, find) {
        Ok(waypoint) => Ok((waypoint, weight)),
        Err(refused) => Err(format!("{}: {}", refused.reason, refused.message)),
    })
}

fn shares(first: &GatewayAddress, second: &GatewayAddress, weight: u32) -> Vec<WeightedWaypoint> {
    let share = |destination: &GatewayAddress, weight| WeightedWaypoint {
        destination: Some(destination.clone()),
        weight,
    };
    vec![share(first, 100 - weight), share(second, weight)]
}

fn closed(settings: &Settings, wish: &Wish<'_>, refused: &Refused, ingress: bool) -> Bound {
    let condition = |outcome: &str| {
        bound(
            Truth::False,
            refused.reason,
            format!("{}; {outcome}", refused.message),
        )
    };
    let served_by = refused.pending.then(|| wish.name.clone());
    let served_by = served_by.into_iter().collect();
    match settings.failure {
        FailurePolicy::AsIstio => Bound {
            served_by,
            condition: Some(condition("traffic goes on without it")),
            ..Bound::default()
        },
        FailurePolicy::Closed => Bound {
            waypoint: Some(reference(settings, &wish.name, refused)),
            served_by,
            ingress,
            condition: Some(condition("traffic refused")),
            ..Bound::default()
        },
    }
}

/// A waypoint that is not ready is named as it will be; for one that must not be used, a name that no service can have
/// (RFC 6761 6.4).
fn reference(settings: &Settings, name: &Name, refused: &Refused) -> GatewayAddress {
    let hostname = match refused.reason {
        "WaypointIsNotReady" => settings.service_hostname(&name.namespace, &name.name),
        _ => format!("{}.{}.refused.invalid", name.name, name.namespace),
    };
    to(Destination::Hostname(NamespacedHostname {
        namespace: name.namespace.to_string(),
        hostname,
    }))
}

fn bound(status: Truth, reason: &'static str, message: String) -> Condition {
    condition("istio.io/WaypointBound", status, reason, message)
}

/// The Gateway that a pod was deployed for by a controller of waypoints.
pub fn managed_instance_of(pod: &Meta) -> Option<Name> {
    let by = pod.label(MANAGED)?;
    let known = ["istio.io-mesh-controller", "istio.io-eastwest-controller"].contains(&&**by);
    instance_of(pod).filter(|_| known)
}

/// The Gateway that a pod is an instance of.
pub fn instance_of(pod: &Meta) -> Option<Name> {
    let name: &Str = pod.label("gateway.networking.k8s.io/gateway-name")?;
    Some(Name {
        namespace: pod.name.namespace.clone(),
        name: name.clone(),
    })
}
