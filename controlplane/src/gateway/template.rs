//! The objects of a Gateway before overlays: what upstream's waypoint template makes, without what only Envoy needs. Pure.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use super::{Deployed, class::Role, names, plan::Infrastructure, status};
use crate::crd;

/// Health, as upstream has it.
const STATUS_PORT: u16 = 15021;
/// Metrics.
const METRICS_PORT: u16 = 15020;
/// Metrics of the proxy alone, by upstream's name.
const PROXY_METRICS_PORT: u16 = 15090;
/// Upstream's user and group of proxies.
const PROXY_USER: u32 = 1337;

/// One of the objects that a Gateway may come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Part {
    /// Its identity.
    ServiceAccount,
    /// Its pods.
    Deployment,
    /// Its address.
    Service,
    /// How many pods.
    HorizontalPodAutoscaler,
    /// How many pods may be away.
    PodDisruptionBudget,
}

/// The objects of one Gateway, in the order in which they are applied.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Objects(pub BTreeMap<Part, Value>);

/// Names of the objects.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Names {
    /// Of the Gateway.
    pub gateway: String,
    /// Its namespace.
    pub namespace: String,
    /// Of everything but the ServiceAccount.
    pub objects: String,
    /// Of the ServiceAccount.
    pub account: String,
}

/// All that the objects are made of.
#[derive(Debug)]
pub struct Template<'a> {
    /// What is deployed.
    pub settings: &'a Deployed,
    /// For what.
    pub gateway: &'a crd::Gateway,
    /// What it is.
    pub role: Role,
    /// Under which names.
    pub names: Names,
    /// Its `spec.infrastructure`.
    pub infrastructure: &'a Infrastructure,
    /// This cluster's network; empty where there is only one.
    pub network: &'a str,
    /// `spec.type` of the Service.
    pub service_type: String,
}

impl Part {
    /// All, in the order in which they are applied: a pod needs its account, an autoscaler its Deployment.
    pub const ALL: [Self; 5] = [
        Self::ServiceAccount,
        Self::Deployment,
        Self::Service,
        Self::HorizontalPodAutoscaler,
        Self::PodDisruptionBudget,
    ];

    /// Its key in a ConfigMap of overlays.
    pub fn key(self) -> &'static str {
        match self {
            Self::ServiceAccount => "serviceAccount",
            Self::Deployment => "deployment",
            Self::Service => "service",
            Self::HorizontalPodAutoscaler => "horizontalPodAutoscaler",
            Self::PodDisruptionBudget => "podDisruptionBudget",
        }
    }

    /// `apiVersion` and `kind`.
    pub fn kind(self) -> (&'static str, &'static str) {
        match self {
            Self::ServiceAccount => ("v1", "ServiceAccount"),
            Self::Deployment => ("apps/v1", "Deployment"),
            Self::Service => ("v1", "Service"),
            Self::HorizontalPodAutoscaler => ("autoscaling/v2", "HorizontalPodAutoscaler"),
            Self::PodDisruptionBudget => ("policy/v1", "PodDisruptionBudget"),
        }
    }

    /// Made only where an overlay is given for it.
    pub fn only_when_asked(self) -> bool {
        matches!(
            self,
            Self::HorizontalPodAutoscaler | Self::PodDisruptionBudget
        )
    }

    /// JSON pointers of the fields that overlays may not change: by them the objects are found and belong together.
    pub fn identity(self) -> impl Iterator<Item = &'static str> {
        let common = [
            "/apiVersion",
            "/kind",
            "/metadata/name",
            "/metadata/namespace",
            "/metadata/ownerReferences",
            "/metadata/labels/gateway.istio.io~1managed",
            "/metadata/labels/gateway.networking.k8s.io~1gateway-name",
        ];
        let own: &[&str] = match self {
            Self::Deployment => &[
                "/spec/selector",
                "/spec/template/metadata/labels/gateway.networking.k8s.io~1gateway-name",
                "/spec/template/spec/serviceAccountName",
            ],
            Self::Service | Self::PodDisruptionBudget => &["/spec/selector"],
            Self::HorizontalPodAutoscaler => &["/spec/scaleTargetRef"],
            Self::ServiceAccount => &[],
        };
        common.into_iter().chain(own.iter().copied())
    }
}

impl Names {
    /// The names of a Gateway's objects: its own, or what annotations say.
    pub fn new(gateway: &crd::Gateway) -> Self {
        let own = gateway.metadata.name.clone().unwrap_or_default();
        let annotated = |key: &str| super::plan::annotation(gateway, key).map(str::to_owned);
        let objects = annotated(names::NAME_OVERRIDE).unwrap_or_else(|| own.clone());
        Self {
            account: annotated(names::SERVICE_ACCOUNT).unwrap_or_else(|| objects.clone()),
            objects,
            namespace: gateway.metadata.namespace.clone().unwrap_or_default(),
            gateway: own,
        }
    }
}

impl Template<'_> {
    /// One of the objects.
    pub fn object(&self, part: Part) -> Value {
        let (api_version, kind) = part.kind();
        let mut object = match part {
            Part::ServiceAccount => json!({}),
            Part::Deployment => self.deployment(),
            Part::Service => self.service(),
            Part::HorizontalPodAutoscaler => self.autoscaler(),
            Part::PodDisruptionBudget => json!({"spec": {"selector": self.selector()}}),
        };
        object["apiVersion"] = json!(api_version);
        object["kind"] = json!(kind);
        object["metadata"] = self.metadata(part);
        object
    }

    fn metadata(&self, part: Part) -> Value {
        let mut annotations = self.annotations();
        if part == Part::Service && self.role == Role::Waypoint {
            annotations.insert(
                "networking.istio.io/traffic-distribution".to_owned(),
                "PreferClose".to_owned(),
            );
        }
        let name = match part {
            Part::ServiceAccount => &self.names.account,
            _ => &self.names.objects,
        };
        let meta = &self.gateway.metadata;
        json!({
            "name": name,
            "namespace": self.names.namespace,
            "labels": self.labels(),
            "annotations": annotations,
            "ownerReferences": [{
                "apiVersion": "gateway.networking.k8s.io/v1",
                "kind": "Gateway",
                "name": self.names.gateway,
                "uid": meta.uid.clone().unwrap_or_default(),
            }],
        })
    }

    /// The user's labels, without the Gateway API's own, and ours.
    fn labels(&self) -> BTreeMap<String, String> {
        let of_gateway = self.gateway.metadata.labels.as_ref();
        let mut labels = self.given(&self.infrastructure.labels, of_gateway);
        labels.retain(|key, _| !key.starts_with("gateway.networking.k8s.io/"));
        if !self.network.is_empty() {
            labels
                .entry(names::NETWORK.to_owned())
                .or_insert_with(|| self.network.to_owned());
        }
        let class = &self.gateway.spec.gateway_class_name;
        let ours = [
            (names::GATEWAY_NAME, self.names.gateway.as_str()),
            (names::CLASS_NAME, class),
            (names::MANAGED, self.role.managed_by()),
        ];
        labels.extend(ours.map(|(key, value)| (key.to_owned(), value.to_owned())));
        labels
    }

    /// The user's annotations, without those that are said to this controller or to kubectl.
    fn annotations(&self) -> BTreeMap<String, String> {
        let of_gateway = self.gateway.metadata.annotations.as_ref();
        let mut annotations = self.given(&self.infrastructure.annotations, of_gateway);
        let said_to_us = [
            names::NAME_OVERRIDE,
            names::SERVICE_ACCOUNT,
            names::CONTROLLER_VERSION,
            names::SERVICE_TYPE,
            names::ADDRESS_TYPE,
            "kubectl.kubernetes.io/last-applied-configuration",
        ];
        annotations.retain(|key, _| !said_to_us.contains(&key.as_str()));
        annotations
    }

    /// What `spec.infrastructure` says wins as a whole: who writes it means the deployed objects.
    fn given(
        &self,
        infrastructure: &BTreeMap<String, String>,
        of_gateway: Option<&BTreeMap<String, String>>,
    ) -> BTreeMap<String, String> {
        match (&self.gateway.spec.infrastructure, of_gateway) {
            (Value::Null, Some(own)) if self.settings.copy_metadata => own.clone(),
            _ => infrastructure.clone(),
        }
    }

    fn selector(&self) -> Value {
        json!({"matchLabels": {names::GATEWAY_NAME: self.names.gateway}})
    }

    fn autoscaler(&self) -> Value {
        json!({"spec": {
            "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": self.names.objects},
            "maxReplicas": 1,
        }})
    }

    fn service(&self) -> Value {
        let mut ports = vec![json!({
            "name": "status-port", "port": STATUS_PORT, "protocol": "TCP", "appProtocol": "tcp",
        })];
        for listener in status::usable_listeners(self.gateway, self.role) {
            let protocol = listener.protocol.to_ascii_lowercase();
            ports.push(json!({
                "name": listener.name, "port": listener.port, "protocol": "TCP", "appProtocol": protocol,
            }));
        }
        let mut spec = json!({
            "type": self.service_type,
            "ipFamilyPolicy": "PreferDualStack",
            "ports": ports,
            "selector": {names::GATEWAY_NAME: self.names.gateway},
        });
        let wished = self.gateway.spec.addresses.pointer("/0/value");
        if let (Some(address), "LoadBalancer") = (wished, self.service_type.as_str()) {
            spec["loadBalancerIP"] = address.clone();
        }
        json!({"spec": spec})
    }

    fn deployment(&self) -> Value {
        let mut labels = self.labels();
        let ours = [
            ("istio.io/dataplane-mode", "none"),
            ("sidecar.istio.io/inject", "false"),
            ("service.istio.io/canonical-name", &self.names.objects),
            ("service.istio.io/canonical-revision", "latest"),
        ];
        labels.extend(ours.map(|(key, value)| (key.to_owned(), value.to_owned())));
        let mut annotations = self.annotations();
        let ours = [
            (names::REVISION, self.settings.mesh.revision.clone()),
            ("prometheus.io/path", "/stats/prometheus".to_owned()),
            ("prometheus.io/port", METRICS_PORT.to_string()),
            ("prometheus.io/scrape", "true".to_owned()),
        ];
        annotations.extend(ours.map(|(key, value)| (key.to_owned(), value)));
        // No `replicas`: an autoscaler or the user may own the number.
        json!({"spec": {
            "selector": self.selector(),
            "template": {
                "metadata": {"labels": labels, "annotations": annotations},
                "spec": self.pod(),
            },
        }})
    }

    fn pod(&self) -> Value {
        let pods = &self.settings.pods;
        let mut spec = Map::new();
        let mut set = |key: &str, value: Option<Value>| {
            let empty = |value: &Value| match value {
                Value::Null => true,
                Value::Array(items) => items.is_empty(),
                Value::Object(fields) => fields.is_empty(),
                _ => false,
            };
            spec.extend(value.filter(|v| !empty(v)).map(|v| (key.to_owned(), v)));
        };
        let secrets = self.settings.pull_secrets.iter();
        set("serviceAccountName", Some(json!(self.names.account)));
        // A waypoint asks the control plane, never the API server.
        set("automountServiceAccountToken", Some(json!(false)));
        set(
            "imagePullSecrets",
            Some(secrets.map(|name| json!({"name": name})).collect()),
        );
        set("affinity", pods.affinity.clone());
        set("nodeSelector", pods.node_selector.clone());
        set("tolerations", pods.tolerations.clone());
        set(
            "topologySpreadConstraints",
            pods.topology_spread_constraints.clone(),
        );
        set("containers", Some(json!([self.container()])));
        set("volumes", Some(volumes()));
        Value::Object(spec)
    }

    fn container(&self) -> Value {
        let domain = format!("$(POD_NAMESPACE).svc.{}", self.settings.mesh.cluster_domain);
        let cluster = format!("{}.$(POD_NAMESPACE)", self.names.account);
        let probe = |failures: u8, every: u8| {
            json!({
                "httpGet": {"path": "/healthz/ready", "port": STATUS_PORT, "scheme": "HTTP"},
                "initialDelaySeconds": 1, "periodSeconds": every, "timeoutSeconds": 1,
                "successThreshold": 1, "failureThreshold": failures,
            })
        };
        let port = |number: u16, name: &str| json!({"containerPort": number, "name": name, "protocol": "TCP"});
        let mut container = json!({
            "name": "istio-proxy",
            "image": self.settings.image,
            "args": ["proxy", "waypoint", "--domain", domain, "--serviceCluster", cluster,
                "--proxyLogLevel", "warning", "--log_output_level", "default:info"],
            "ports": [port(METRICS_PORT, "metrics"), port(STATUS_PORT, "status-port"),
                port(PROXY_METRICS_PORT, "http-envoy-prom")],
            "startupProbe": probe(30, 1),
            "readinessProbe": probe(4, 15),
            "securityContext": {
                "privileged": false, "allowPrivilegeEscalation": false, "readOnlyRootFilesystem": true,
                "runAsNonRoot": true, "runAsUser": PROXY_USER, "runAsGroup": PROXY_USER,
                "capabilities": {"drop": ["ALL"]},
            },
            "env": self.env(),
            "volumeMounts": mounts(),
        });
        if !self.settings.pull_policy.is_empty() {
            container["imagePullPolicy"] = json!(self.settings.pull_policy);
        }
        if let Some(resources) = &self.settings.pods.resources {
            container["resources"] = resources.clone();
        }
        container
    }

    fn env(&self) -> Value {
        let mesh = &self.settings.mesh;
        let address = &self.settings.xds_address;
        let Names {
            namespace, objects, ..
        } = &self.names;
        let owner =
            format!("kubernetes://apis/apps/v1/namespaces/{namespace}/deployments/{objects}");
        let mut env = vec![
            value("PILOT_CERT_PROVIDER", "istiod"),
            value("CA_ADDR", address),
            value("CA_ADDRESS", address),
            value("XDS_ADDRESS", address),
            field("POD_NAME", "metadata.name"),
            field("POD_NAMESPACE", "metadata.namespace"),
            field("INSTANCE_IP", "status.podIP"),
            field("SERVICE_ACCOUNT", "spec.serviceAccountName"),
            field("HOST_IP", "status.hostIP"),
            json!({"name": "ISTIO_CPU_LIMIT", "valueFrom": {"resourceFieldRef": {"resource": "limits.cpu"}}}),
            value("PROXY_CONFIG", "{}"),
            field("ISTIO_META_SERVICE_ACCOUNT", "spec.serviceAccountName"),
            field("ISTIO_META_NODE_NAME", "spec.nodeName"),
            value("ISTIO_META_CLUSTER_ID", &mesh.cluster_id),
            value("ISTIO_META_INTERCEPTION_MODE", "REDIRECT"),
            value("ISTIO_META_WORKLOAD_NAME", objects),
            value("ISTIO_META_OWNER", &owner),
            value("ISTIO_META_MESH_ID", &mesh.trust_domain),
            value("TRUST_DOMAIN", &mesh.trust_domain),
        ];
        if !self.network.is_empty() {
            env.push(value("ISTIO_META_NETWORK", self.network));
        }
        if self.role == Role::EastWest {
            env.push(value("ISTIO_META_REQUESTED_NETWORK_VIEW", self.network));
            env.push(value("LEYLINE_ROLE", "east-west"));
        }
        Value::Array(env)
    }
}

fn value(name: &str, value: &str) -> Value {
    json!({"name": name, "value": value})
}

fn field(name: &str, path: &str) -> Value {
    json!({"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}})
}

fn mounts() -> Value {
    json!([
        {"name": "workload-socket", "mountPath": "/var/run/secrets/workload-spiffe-uds"},
        {"name": "istiod-ca-cert", "mountPath": "/var/run/secrets/istio", "readOnly": true},
        {"name": "istio-token", "mountPath": "/var/run/secrets/tokens", "readOnly": true},
        {"name": "istio-data", "mountPath": "/var/lib/istio/data"},
        {"name": "istio-podinfo", "mountPath": "/etc/istio/pod", "readOnly": true},
    ])
}

fn volumes() -> Value {
    json!([
        {"name": "workload-socket", "emptyDir": {}},
        {"name": "istiod-ca-cert", "configMap": {"name": "istio-ca-root-cert"}},
        {"name": "istio-token", "projected": {"sources": [
            {"serviceAccountToken": {"audience": "istio-ca", "expirationSeconds": 43200, "path": "istio-token"}},
        ]}},
        {"name": "istio-data", "emptyDir": {}},
        {"name": "istio-podinfo", "downwardAPI": {"items": [
            {"path": "labels", "fieldRef": {"fieldPath": "metadata.labels"}},
            {"path": "annotations", "fieldRef": {"fieldPath": "metadata.annotations"}},
        ]}},
    ])
}
