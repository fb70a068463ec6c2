//! What the agent knows of a pod, and whether the pod takes part in the mesh. Pure.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
};

use serde::{Deserialize, Serialize};

use crate::{
    rules::{InterfaceName, PodRules, ProbeAddresses, host::ProbeEntries},
    selectors::Enablement,
};

/// Label that brings a pod or a namespace in (`ambient`) or keeps a pod out (`none`).
pub const DATAPLANE_MODE_LABEL: &str = "istio.io/dataplane-mode";
/// Annotation of an injected sidecar; such pods are never enrolled.
pub const SIDECAR_STATUS_ANNOTATION: &str = "sidecar.istio.io/status";
/// Annotation: no redirection of what arrives.
pub const BYPASS_INBOUND_ANNOTATION: &str = "ambient.istio.io/bypass-inbound-capture";
/// Annotation: overrides whether DNS is captured.
pub const DNS_CAPTURE_ANNOTATION: &str = "ambient.istio.io/dns-capture";
/// Annotation: interfaces of virtual machines inside the pod, separated by commas.
pub const VIRTUAL_INTERFACES_ANNOTATION: &str = "istio.io/reroute-virtual-interfaces";
/// The annotation that the agent writes: `enabled` or `pending`.
pub const REDIRECTION_ANNOTATION: &str = "ambient.istio.io/redirection";

/// One pod of this node, as its source tells it. JSON names are Kubernetes' own where it has one.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PodFacts {
    /// Kubernetes uid: the key.
    pub uid: String,
    /// Name.
    pub name: String,
    /// Namespace.
    pub namespace: String,
    /// Service account; `default` where nothing is said.
    #[serde(default = "default_service_account")]
    pub service_account: String,
    /// Addresses; empty until it has some.
    #[serde(default, rename = "podIPs")]
    pub ips: Vec<IpAddr>,
    /// The node it runs on; empty where the source only knows this node's.
    #[serde(default)]
    pub node: String,
    /// Where its network namespace can be opened; `None` where that is unknown.
    #[serde(default)]
    pub netns: Option<PathBuf>,
    /// It uses the node's own network.
    #[serde(default)]
    pub host_network: bool,
    /// Its labels.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// Its namespace's labels.
    #[serde(default)]
    pub namespace_labels: BTreeMap<String, String>,
    /// Its annotations.
    #[serde(default)]
    pub annotations: BTreeMap<String, String>,
    /// How far it is.
    #[serde(default)]
    pub phase: Phase,
    /// It has a deletion timestamp: its containers are being stopped.
    #[serde(default)]
    pub terminating: bool,
    /// TCP ports (numbers, not names) that the node's probes call.
    #[serde(default)]
    pub probe_ports: Vec<u16>,
}

fn default_service_account() -> String {
    "default".to_owned()
}

/// Kubernetes `status.phase`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Phase {
    /// Not yet started.
    #[default]
    Pending,
    /// Started.
    Running,
    /// All containers ended well.
    Succeeded,
    /// All containers ended, not all well.
    Failed,
    /// Its node cannot say.
    #[serde(other)]
    Unknown,
}

/// What the source of pods says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PodEvent {
    /// These are all. Comes first, and again after a source lost track.
    Snapshot(Vec<PodFacts>),
    /// A new or changed pod.
    Upsert(Box<PodFacts>),
    /// It no longer exists.
    Remove {
        /// The pod.
        uid: String,
    },
}

/// The agent's settings that decide about pods.
#[derive(Clone, Debug)]
pub struct Policy {
    /// Which pods take part (`AMBIENT_ENABLEMENT_SELECTOR`).
    pub enablement: Enablement,
    /// Namespaces that never take part, labelled or not.
    pub excluded_namespaces: Vec<String>,
    /// Capture DNS unless the pod says otherwise.
    pub dns_capture: bool,
    /// Write IPv6 rules.
    pub ipv6: bool,
    /// Where probes appear to come from.
    pub probes: ProbeAddresses,
}

impl Default for Policy {
    fn default() -> Self {
        Policy {
            enablement: Enablement::default(),
            excluded_namespaces: vec!["kube-system".to_owned()],
            dns_capture: true,
            ipv6: true,
            probes: ProbeAddresses::default(),
        }
    }
}

/// What a pod's enrolment should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// In the mesh.
    In,
    /// Running, and not in the mesh.
    Out,
    /// Ended: nothing of it can be talked to any more.
    Gone,
}

impl Policy {
    /// Whether the pod takes part. Source: `spec/cni.md` 2.
    ///
    /// A terminating pod stays as it is labelled: its connections are captured until its containers are gone.
    pub fn wanted(&self, pod: &PodFacts) -> Wanted {
        if matches!(pod.phase, Phase::Succeeded | Phase::Failed) {
            return Wanted::Gone;
        }
        let never = pod.host_network
            || pod.annotations.contains_key(SIDECAR_STATUS_ANNOTATION)
            || self.excluded_namespaces.contains(&pod.namespace);
        let labelled = self.enablement.matches(&pod.labels, &pod.namespace_labels);
        if labelled && !never {
            Wanted::In
        } else {
            Wanted::Out
        }
    }

    /// What a pod's enrolment should be now: one that has neither a namespace nor an address has no sandbox, and the
    /// plugin brings it in when it gets one. One that was enrolled before stays.
    pub fn wanted_now(&self, pod: &PodFacts) -> Wanted {
        let begun = pod.netns.is_some() || !pod.ips.is_empty();
        match self.wanted(pod) {
            Wanted::In if !begun && !pod.annotations.contains_key(REDIRECTION_ANNOTATION) => {
                Wanted::Out
            }
            wanted => wanted,
        }
    }

    /// The rules for the pod: the agent's settings with the pod's own over them. An annotation that cannot be read
    /// counts as absent, with a warning: it must not take the pod out of the mesh.
    pub fn rules(&self, pod: &PodFacts) -> PodRules {
        let own = |annotation| boolean(pod, annotation);
        PodRules {
            dns_capture: own(DNS_CAPTURE_ANNOTATION).unwrap_or(self.dns_capture),
            ingress_mode: own(BYPASS_INBOUND_ANNOTATION).unwrap_or(false),
            virtual_interfaces: virtual_interfaces(pod),
            ipv6: self.ipv6,
            probes: self.probes,
        }
    }

    /// What the node's set holds for the pod.
    pub fn probe_entries(&self, pod: &PodFacts) -> ProbeEntries {
        let usable = pod.ips.iter().filter(|ip| self.ipv6 || ip.is_ipv4());
        let ports = |ip: &IpAddr| {
            pod.probe_ports
                .iter()
                .map(|port| SocketAddr::new(*ip, *port))
                .collect::<Vec<_>>()
        };
        usable
            .flat_map(ports)
            .map(|probed| (probed, pod.uid.clone()))
            .collect()
    }
}

fn boolean(pod: &PodFacts, annotation: &str) -> Option<bool> {
    let text = pod.annotations.get(annotation)?;
    match text.as_str() {
        "true" | "True" | "TRUE" | "t" | "T" | "1" => Some(true),
        "false" | "False" | "FALSE" | "f" | "F" | "0" => Some(false),
        _ => {
            tracing::warn!(
                pod = pod.name,
                namespace = pod.namespace,
                annotation,
                text,
                "annotation is no boolean: ignored"
            );
            None
        }
    }
}

fn virtual_interfaces(pod: &PodFacts) -> Vec<InterfaceName> {
    let text = pod
        .annotations
        .get(VIRTUAL_INTERFACES_ANNOTATION)
        .map(String::as_str)
        .unwrap_or_default();
    let names = text
        .split(',')
        .map(str::trim)
        .filter(|name| !name.is_empty());
    let mut interfaces = Vec::new();
    for name in names {
        match name.parse::<InterfaceName>() {
            Ok(name) => interfaces.push(name),
            Err(error) => {
                tracing::warn!(pod = pod.name, namespace = pod.namespace, %error, "annotation's entry ignored")
            }
        }
    }
    interfaces
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(pod_mode: Option<&str>, namespace_mode: Option<&str>) -> PodFacts {
        let label = |mode: Option<&str>| {
            mode.map(|mode| (DATAPLANE_MODE_LABEL.to_owned(), mode.to_owned()))
                .into_iter()
                .collect()
        };
        PodFacts {
            uid: "u".into(),
            namespace: "default".into(),
            labels: label(pod_mode),
            namespace_labels: label(namespace_mode),
            ..PodFacts::default()
        }
    }

    #[test]
    fn labels_decide_who_takes_part() {
        let table = [
            (None, None, Wanted::Out),
            (None, Some("ambient"), Wanted::In),
            (Some("ambient"), None, Wanted::In),
            (Some("none"), Some("ambient"), Wanted::Out),
            (Some("other"), Some("ambient"), Wanted::In),
            (Some("other"), None, Wanted::Out),
            (None, Some("none"), Wanted::Out),
        ];
        for (pod_mode, namespace_mode, expected) in table {
            let pod = pod(pod_mode, namespace_mode);
            assert_eq!(
                Policy::default().wanted(&pod),
                expected,
                "{pod_mode:?} {namespace_mode:?}"
            );
        }
    }

    #[test]
    fn some_pods_never_take_part() {
        let labelled = pod(Some("ambient"), None);
        let host = PodFacts {
            host_network: true,
            ..labelled.clone()
        };
        let system = PodFacts {
            namespace: "kube-system".into(),
            ..labelled.clone()
        };
        let mut injected = labelled.clone();
        injected
            .annotations
            .insert(SIDECAR_STATUS_ANNOTATION.into(), "{}".into());
        for pod in [host, system, injected] {
            assert_eq!(Policy::default().wanted(&pod), Wanted::Out, "{pod:?}");
        }
        let ended = PodFacts {
            phase: Phase::Succeeded,
            ..labelled
        };
        assert_eq!(Policy::default().wanted(&ended), Wanted::Gone);
    }

    #[test]
    fn annotations_override_settings_and_bad_ones_change_nothing() {
        let mut annotated = pod(None, None);
        annotated
            .annotations
            .insert(DNS_CAPTURE_ANNOTATION.into(), "false".into());
        annotated
            .annotations
            .insert(BYPASS_INBOUND_ANNOTATION.into(), "yes please".into());
        annotated.annotations.insert(
            VIRTUAL_INTERFACES_ANNOTATION.into(),
            "tap0, ,bad name,tap1".into(),
        );
        let rules = Policy::default().rules(&annotated);
        assert!(!rules.dns_capture && !rules.ingress_mode);
        let names: Vec<&str> = rules
            .virtual_interfaces
            .iter()
            .map(InterfaceName::as_str)
            .collect();
        assert_eq!(names, ["tap0", "tap1"]);
    }

    #[test]
    fn a_minimal_file_is_a_pod() {
        let pod: PodFacts = serde_json::from_str(
            r#"{"uid":"1","name":"a","namespace":"b","phase":"Strange","new":1}"#,
        )
        .expect("readable");
        assert_eq!(
            (pod.service_account.as_str(), pod.phase),
            ("default", Phase::Unknown)
        );
    }
}
