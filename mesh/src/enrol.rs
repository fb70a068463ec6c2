//! Whether a pod is wanted in the mesh, and how: from labels and annotations alone (cni spec 2).

use std::collections::BTreeMap;

use serde::Serialize;

/// Label of pods and namespaces.
pub const DATAPLANE_MODE: &str = "istio.io/dataplane-mode";
/// Annotation that the node agent writes: `enabled` or `pending`.
pub const REDIRECTION: &str = "ambient.istio.io/redirection";
const SIDECAR_STATUS: &str = "sidecar.istio.io/status";
const BYPASS_INBOUND: &str = "ambient.istio.io/bypass-inbound-capture";
const DNS_CAPTURE: &str = "ambient.istio.io/dns-capture";
const VIRTUAL_INTERFACES: &str = "istio.io/reroute-virtual-interfaces";

/// Labels or annotations.
pub type Map = BTreeMap<String, String>;

/// What is known of a pod when it is asked whether the mesh wants it.
#[derive(Clone, Copy, Debug)]
pub struct Candidate<'a> {
    /// The pod's namespace.
    pub namespace: &'a str,
    /// That namespace's labels.
    pub namespace_labels: &'a Map,
    /// The pod's labels.
    pub labels: &'a Map,
    /// The pod's annotations.
    pub annotations: &'a Map,
    /// Whether it shares its node's network.
    pub host_network: bool,
}

/// Which pods are never wanted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exclusions {
    /// Namespaces, even where labelled.
    pub namespaces: Vec<String>,
    /// Where the node tunnels themselves run.
    pub system_namespace: String,
}

impl Default for Exclusions {
    fn default() -> Self {
        Self {
            namespaces: vec!["kube-system".to_owned()],
            system_namespace: "istio-system".to_owned(),
        }
    }
}

/// Why a pod is not wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, thiserror::Error)]
pub enum NotWanted {
    /// Neither the pod nor its namespace is labelled.
    #[error("neither the pod nor its namespace is labelled istio.io/dataplane-mode=ambient")]
    NotLabelled,
    /// The pod is labelled `none` in a namespace that is in.
    #[error("the pod is labelled istio.io/dataplane-mode=none")]
    OptedOut,
    /// Its address is its node's: it has no namespace of its own to redirect.
    #[error("the pod uses its node's network")]
    HostNetwork,
    /// It has a sidecar.
    #[error("the pod has a sidecar")]
    Sidecar,
    /// Its namespace is excluded.
    #[error("the pod's namespace is excluded")]
    ExcludedNamespace,
    /// It is a node tunnel.
    #[error("the pod is a node tunnel")]
    NodeTunnel,
}

/// Whether the mesh wants the pod.
pub fn wanted(pod: &Candidate<'_>, exclusions: &Exclusions) -> Result<(), NotWanted> {
    let mode = |labels: &'_ Map| labels.get(DATAPLANE_MODE).cloned();
    let own = mode(pod.labels);
    let labelled = own.as_deref() == Some("ambient");
    let namespace = mode(pod.namespace_labels).as_deref() == Some("ambient");
    let tunnel = pod.labels.get("app").is_some_and(|app| app == "ztunnel");
    let refusals = [
        (
            tunnel && pod.namespace == exclusions.system_namespace,
            NotWanted::NodeTunnel,
        ),
        (!labelled && !namespace, NotWanted::NotLabelled),
        (own.as_deref() == Some("none"), NotWanted::OptedOut),
        (pod.host_network, NotWanted::HostNetwork),
        (
            pod.annotations.contains_key(SIDECAR_STATUS),
            NotWanted::Sidecar,
        ),
        (
            exclusions.namespaces.iter().any(|it| it == pod.namespace),
            NotWanted::ExcludedNamespace,
        ),
    ];
    let refusal = refusals.into_iter().find(|(applies, _)| *applies);
    refusal.map_or(Ok(()), |(_, why)| Err(why))
}

/// What a pod's annotations ask of its redirection.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Overrides {
    /// Inbound plaintext is not redirected.
    pub ingress_mode: bool,
    /// Whether DNS is redirected; `None`: as everywhere.
    pub dns_capture: Option<bool>,
    /// Interfaces whose traffic counts as outbound: those of virtual machines.
    pub virtual_interfaces: Vec<String>,
    /// Annotations that could not be read, and are ignored: `annotation: value`.
    pub warnings: Vec<String>,
}

impl From<&Map> for Overrides {
    fn from(annotations: &Map) -> Self {
        let mut warnings = Vec::new();
        let mut flag = |key: &str| {
            let value = annotations.get(key)?;
            let parsed = parse_bool(value);
            if parsed.is_none() {
                warnings.push(format!("{key}: {value}"));
            }
            parsed
        };
        let (bypass, dns_capture) = (flag(BYPASS_INBOUND), flag(DNS_CAPTURE));
        let names = annotations.get(VIRTUAL_INTERFACES);
        let names = names.into_iter().flat_map(|it| it.split(','));
        let names = names.map(str::trim).filter(|it| !it.is_empty());
        Self {
            ingress_mode: bypass.unwrap_or_default(),
            dns_capture,
            virtual_interfaces: names.map(str::to_owned).collect(),
            warnings,
        }
    }
}

/// As Go's strconv.ParseBool, which the field's annotations are read with.
fn parse_bool(text: &str) -> Option<bool> {
    match text {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Some(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Some(false),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(pairs: &[(&str, &str)]) -> Map {
        let pairs = pairs.iter().map(|(k, v)| ((*k).into(), (*v).into()));
        pairs.collect()
    }

    #[track_caller]
    fn check(namespace: &str, pod: &str, expected: Result<(), NotWanted>) {
        let mode = |value: &str| match value {
            "" => Map::new(),
            value => map(&[(DATAPLANE_MODE, value)]),
        };
        let candidate = Candidate {
            namespace: "a",
            namespace_labels: &mode(namespace),
            labels: &mode(pod),
            annotations: &Map::new(),
            host_network: false,
        };
        assert_eq!(wanted(&candidate, &Exclusions::default()), expected);
    }

    #[test]
    fn a_label_on_pod_or_namespace_joins_and_none_on_the_pod_leaves() {
        check("", "", Err(NotWanted::NotLabelled));
        check("ambient", "", Ok(()));
        check("", "ambient", Ok(()));
        check("none", "ambient", Ok(()));
        check("ambient", "none", Err(NotWanted::OptedOut));
        check("", "none", Err(NotWanted::NotLabelled));
        check("other", "", Err(NotWanted::NotLabelled));
        check("ambient", "other", Ok(()));
    }

    #[test]
    fn some_pods_are_never_wanted() {
        let (labels, none) = (map(&[(DATAPLANE_MODE, "ambient")]), Map::new());
        let sidecar = map(&[(SIDECAR_STATUS, "{}")]);
        let tunnel = map(&[(DATAPLANE_MODE, "ambient"), ("app", "ztunnel")]);
        let base = Candidate {
            namespace: "a",
            namespace_labels: &labels,
            labels: &labels,
            annotations: &none,
            host_network: false,
        };
        let cases = [
            (base, Ok(())),
            (
                Candidate {
                    host_network: true,
                    ..base
                },
                Err(NotWanted::HostNetwork),
            ),
            (
                Candidate {
                    annotations: &sidecar,
                    ..base
                },
                Err(NotWanted::Sidecar),
            ),
            (
                Candidate {
                    namespace: "kube-system",
                    ..base
                },
                Err(NotWanted::ExcludedNamespace),
            ),
            (
                Candidate {
                    namespace: "istio-system",
                    labels: &tunnel,
                    ..base
                },
                Err(NotWanted::NodeTunnel),
            ),
            (
                Candidate {
                    labels: &tunnel,
                    ..base
                },
                Ok(()),
            ),
        ];
        for (pod, expected) in cases {
            assert_eq!(wanted(&pod, &Exclusions::default()), expected, "{pod:?}");
        }
    }

    #[test]
    fn annotations_change_the_redirection_and_bad_ones_are_told() {
        let annotations = map(&[
            (BYPASS_INBOUND, "true"),
            (DNS_CAPTURE, "maybe"),
            (VIRTUAL_INTERFACES, "kube0, vmnet,"),
        ]);
        let overrides = Overrides::from(&annotations);
        assert!(overrides.ingress_mode);
        assert_eq!(overrides.dns_capture, None);
        assert_eq!(overrides.virtual_interfaces, ["kube0", "vmnet"]);
        assert_eq!(overrides.warnings, [format!("{DNS_CAPTURE}: maybe")]);
    }
}
