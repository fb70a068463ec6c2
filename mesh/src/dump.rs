//! The JSON of workloads, services and policies: `config_dump`'s, which is also the local file's.
//!
//! Read as well as written, so that `explain` works on a dump of upstream's node tunnel. Unknown keys are ignored
//! here; a reader of files that wants them named wraps its deserializer.

use std::{collections::BTreeMap, fmt, sync::Arc};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use crate::{
    identity::Identity,
    names::{NamespacedHostname, NetworkAddress, PolicyKey, Str, WorkloadUid},
    policy::{Action, AuthorizationPolicy, PolicyScope, Rule, StringMatch},
    service::{
        CidrVip, IpFamilies, LoadBalancing, PortNames, Service, Visibility, WeightedWaypoint,
    },
    view::{Endpoint, MeshView, Resource, Update},
    workload::{GatewayAddress, Health, PortMap, PortsOfServices, Workload},
};

mod findings;
#[cfg(test)]
mod tests;

pub use findings::Finding;

/// The part of `config_dump` that this crate knows: what the mesh looks like from one node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ConfigDump {
    /// Sorted by uid.
    pub workloads: Vec<Workload>,
    /// Sorted by host name, with their endpoints.
    pub services: Vec<ServiceShape>,
    /// Sorted by key.
    pub policies: Vec<AuthorizationPolicy>,
    /// Endpoints of services that are not known yet.
    pub staged_services: BTreeMap<NamespacedHostname, BTreeMap<WorkloadUid, EndpointShape>>,
}

/// A local file (`LOCAL_XDS_PATH`): node-tunnel 1.9.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct LocalFile {
    /// With their services' ports.
    pub workloads: Vec<Workload>,
    /// Their endpoints follow from the workloads.
    pub services: Vec<Service>,
    /// Authorization policies.
    pub policies: Vec<AuthorizationPolicy>,
}

impl LocalFile {
    /// The file's content as one update.
    pub fn into_update(self) -> Update {
        let services = self.services.into_iter().map(Resource::Service);
        let workloads = self.workloads.into_iter().map(Resource::Workload);
        let policies = self.policies.into_iter().map(Resource::Policy);
        Update {
            upserts: services.chain(workloads).chain(policies).collect(),
            removals: Vec::new(),
        }
    }
}

impl From<&MeshView> for ConfigDump {
    fn from(view: &MeshView) -> Self {
        let mut workloads: Vec<_> = view.workloads().map(|it| Workload::clone(it)).collect();
        workloads.sort_by(|a, b| a.uid.cmp(&b.uid));
        let mut services: Vec<_> = view.services().map(|it| service_dump(view, it)).collect();
        services.sort_by(|a, b| (&a.hostname, &a.namespace).cmp(&(&b.hostname, &b.namespace)));
        let mut policies: Vec<_> = view
            .policies()
            .map(|it| AuthorizationPolicy::clone(it))
            .collect();
        policies.sort_by(|a, b| a.key.cmp(&b.key));
        let staged = view.staged().map(|key| (key.clone(), endpoints(view, key)));
        Self {
            staged_services: staged.collect(),
            workloads,
            services,
            policies,
        }
    }
}

impl ConfigDump {
    /// The view that the dump describes.
    pub fn into_view(self) -> MeshView {
        let mut ports: BTreeMap<_, Vec<_>> = BTreeMap::new();
        let known = self.services.iter().map(|it| (it.key(), &it.endpoints));
        for (key, endpoints) in
            known.chain(self.staged_services.iter().map(|(k, e)| (k.clone(), e)))
        {
            for (uid, endpoint) in endpoints {
                let ports = ports.entry(uid.clone()).or_default();
                ports.push((key.clone(), endpoint.port.0.clone()));
            }
        }
        let mut workloads = self.workloads;
        for workload in &mut workloads {
            let told = ports.remove(&workload.uid).unwrap_or_default();
            workload.services.extend(told);
        }
        let file = LocalFile {
            workloads,
            services: self.services.into_iter().map(Service::from).collect(),
            policies: self.policies,
        };
        let mut view = MeshView::default();
        view.apply(file.into_update());
        view
    }
}

fn service_dump(view: &MeshView, service: &Service) -> ServiceShape {
    ServiceShape {
        endpoints: endpoints(view, &service.key()),
        ..service.clone().into()
    }
}

fn endpoints(view: &MeshView, key: &NamespacedHostname) -> BTreeMap<WorkloadUid, EndpointShape> {
    let endpoints = view.endpoints(key);
    let shapes = endpoints
        .iter()
        .map(|it| (it.workload.uid.clone(), it.into()));
    shapes.collect()
}

/// One endpoint in a dump.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EndpointShape {
    workload_uid: WorkloadUid,
    #[serde(default)]
    port: Ports,
    #[serde(default)]
    status: Health,
}

impl From<&Endpoint> for EndpointShape {
    fn from(endpoint: &Endpoint) -> Self {
        Self {
            workload_uid: endpoint.workload.uid.clone(),
            port: Ports(endpoint.ports().clone()),
            status: endpoint.workload.status,
        }
    }
}

/// A service in a dump: the record and its endpoints.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ServiceShape {
    name: Str,
    namespace: Str,
    hostname: Str,
    #[serde(default)]
    vips: Vec<NetworkAddress>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    cidr_vips: Vec<CidrVip>,
    #[serde(default)]
    ports: Ports,
    /// Ours, and only where there are any.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    port_names: BTreeMap<PortKey, Str>,
    #[serde(default)]
    endpoints: BTreeMap<WorkloadUid, EndpointShape>,
    #[serde(default, deserialize_with = "identities")]
    subject_alt_names: Vec<Identity>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    waypoint: Option<GatewayAddress>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    weighted_waypoints: Vec<WeightedWaypoint>,
    #[serde(
        default,
        skip_serializing_if = "is_default",
        deserialize_with = "or_default"
    )]
    load_balancer: LoadBalancing,
    #[serde(
        default,
        skip_serializing_if = "is_default",
        deserialize_with = "or_default"
    )]
    ip_families: IpFamilies,
    #[serde(default)]
    canonical: bool,
    #[serde(default)]
    visibility: Visibility,
}

impl ServiceShape {
    fn key(&self) -> NamespacedHostname {
        NamespacedHostname {
            namespace: self.namespace.clone(),
            hostname: self.hostname.clone(),
        }
    }
}

impl From<Service> for ServiceShape {
    fn from(service: Service) -> Self {
        Self {
            name: service.name,
            namespace: service.namespace,
            hostname: service.hostname,
            vips: service.vips,
            cidr_vips: service.cidr_vips,
            ports: Ports(service.ports),
            port_names: named(service.port_names.as_deref()),
            endpoints: BTreeMap::new(),
            subject_alt_names: service.subject_alt_names,
            waypoint: service.waypoint,
            weighted_waypoints: service.weighted_waypoints,
            load_balancer: service.load_balancing,
            ip_families: service.ip_families,
            canonical: service.canonical,
            visibility: service.visibility,
        }
    }
}

impl From<ServiceShape> for Service {
    fn from(shape: ServiceShape) -> Self {
        Self {
            name: shape.name,
            namespace: shape.namespace,
            hostname: shape.hostname,
            vips: shape.vips,
            cidr_vips: shape.cidr_vips,
            ports: shape.ports.0,
            port_names: PortNames::new(
                shape
                    .port_names
                    .into_iter()
                    .map(|(key, name)| (key.0, name)),
            )
            .map(Arc::new),
            subject_alt_names: shape.subject_alt_names,
            waypoint: shape.waypoint,
            weighted_waypoints: shape.weighted_waypoints,
            load_balancing: shape.load_balancer,
            ip_families: shape.ip_families,
            canonical: shape.canonical,
            visibility: shape.visibility,
        }
    }
}

fn named(names: Option<&PortNames>) -> BTreeMap<PortKey, Str> {
    let names = names.into_iter().flat_map(PortNames::iter);
    names
        .map(|(port, it)| (PortKey(port), it.clone()))
        .collect()
}

/// A policy in a dump: the key in two fields.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct PolicyShape {
    name: Str,
    namespace: Str,
    scope: PolicyScope,
    action: Action,
    #[serde(default)]
    rules: Vec<Rule>,
    #[serde(default)]
    dry_run: bool,
    /// Ours, and only where there are any.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    faults: Vec<String>,
}

impl From<AuthorizationPolicy> for PolicyShape {
    fn from(policy: AuthorizationPolicy) -> Self {
        Self {
            name: policy.key.name,
            namespace: policy.key.namespace,
            scope: policy.scope,
            action: policy.action,
            rules: policy.rules,
            dry_run: policy.dry_run,
            faults: policy.faults,
        }
    }
}

impl From<PolicyShape> for AuthorizationPolicy {
    fn from(shape: PolicyShape) -> Self {
        Self {
            key: PolicyKey {
                namespace: shape.namespace,
                name: shape.name,
            },
            scope: shape.scope,
            action: shape.action,
            rules: shape.rules,
            dry_run: shape.dry_run,
            faults: shape.faults,
        }
    }
}

/// A string match in a dump: presence is `{"Presence":[]}`.
#[derive(Serialize, Deserialize)]
pub(crate) enum StringMatchShape {
    Exact(Str),
    Prefix(Str),
    Suffix(Str),
    Presence([(); 0]),
}

impl From<StringMatch> for StringMatchShape {
    fn from(value: StringMatch) -> Self {
        match value {
            StringMatch::Exact(text) => Self::Exact(text),
            StringMatch::Prefix(text) => Self::Prefix(text),
            StringMatch::Suffix(text) => Self::Suffix(text),
            StringMatch::Presence => Self::Presence([]),
        }
    }
}

impl From<StringMatchShape> for StringMatch {
    fn from(shape: StringMatchShape) -> Self {
        match shape {
            StringMatchShape::Exact(text) => Self::Exact(text),
            StringMatchShape::Prefix(text) => Self::Prefix(text),
            StringMatchShape::Suffix(text) => Self::Suffix(text),
            StringMatchShape::Presence([]) => Self::Presence,
        }
    }
}

/// A port map whose keys may be read as text or number: JSON has only text, YAML both.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Ports(PortMap);

impl Serialize for Ports {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(&self.0)
    }
}

impl<'de> Deserialize<'de> for Ports {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let map = BTreeMap::<PortKey, u16>::deserialize(deserializer)?;
        Ok(Self(
            map.into_iter().map(|(key, port)| (key.0, port)).collect(),
        ))
    }
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(transparent)]
struct PortKey(u16);

impl<'de> Deserialize<'de> for PortKey {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(PortVisitor).map(Self)
    }
}

struct PortVisitor;

impl de::Visitor<'_> for PortVisitor {
    type Value = u16;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a port")
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<u16, E> {
        text.parse()
            .map_err(|_| E::invalid_value(de::Unexpected::Str(text), &self))
    }

    fn visit_u64<E: de::Error>(self, number: u64) -> Result<u16, E> {
        u16::try_from(number).map_err(|_| E::invalid_value(de::Unexpected::Unsigned(number), &self))
    }

    fn visit_i64<E: de::Error>(self, number: i64) -> Result<u16, E> {
        u16::try_from(number).map_err(|_| E::invalid_value(de::Unexpected::Signed(number), &self))
    }
}

/// `Workload.services`: written as keys, read as keys or as keys with ports.
pub(crate) mod workload_services {
    use super::{Deserializer, PortMap, Ports, PortsOfServices, Serializer, de, fmt};

    pub(crate) fn serialize<S: Serializer>(
        services: &PortsOfServices,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(services.keys())
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<PortsOfServices, D::Error> {
        deserializer.deserialize_any(Visitor)
    }

    struct Visitor;

    impl<'de> de::Visitor<'de> for Visitor {
        type Value = PortsOfServices;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a list of namespace/hostname, or a map from it to ports")
        }

        fn visit_seq<A: de::SeqAccess<'de>>(self, mut keys: A) -> Result<Self::Value, A::Error> {
            let mut services = Self::Value::new();
            while let Some(key) = keys.next_element()? {
                services.insert(key, PortMap::new());
            }
            Ok(services)
        }

        fn visit_map<A: de::MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
            let mut services = Self::Value::new();
            while let Some((key, ports)) = map.next_entry::<_, Ports>()? {
                services.insert(key, ports.0);
            }
            Ok(services)
        }
    }
}

pub(crate) fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

/// Null, as other writers spell absence, is the default.
fn or_default<'de, D: Deserializer<'de>, T: Default + Deserialize<'de>>(
    deserializer: D,
) -> Result<T, D::Error> {
    Option::deserialize(deserializer).map(Option::unwrap_or_default)
}

/// Names that are no SPIFFE ID of the mesh's form can match no peer: left out, as on the wire.
fn identities<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<Identity>, D::Error> {
    let texts = Vec::<String>::deserialize(deserializer)?;
    Ok(texts.iter().filter_map(|it| it.parse().ok()).collect())
}
