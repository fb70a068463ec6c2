//! From a Kubernetes Pod to the facts that enrolment needs. Pure.

use std::collections::BTreeSet;

use k8s_openapi::{
    api::core::v1::{Container, ContainerPort, LifecycleHandler, Pod, Probe},
    apimachinery::pkg::util::intstr::IntOrString,
};

use crate::facts::{Phase, PodFacts};

/// `None`: an object without uid or name, which an API server does not hand out.
pub(super) fn pod_facts(pod: &Pod) -> Option<PodFacts> {
    let spec = pod.spec.as_ref()?;
    let status = pod.status.as_ref();
    let metadata = &pod.metadata;
    let several = status.and_then(|status| status.pod_ips.as_ref());
    let mut ips: Vec<_> = several
        .into_iter()
        .flatten()
        .filter_map(|ip| ip.ip.parse().ok())
        .collect();
    if ips.is_empty() {
        let single = status.and_then(|status| status.pod_ip.as_ref());
        ips.extend(single.and_then(|ip| ip.parse::<std::net::IpAddr>().ok()));
    }
    Some(PodFacts {
        uid: metadata.uid.clone()?,
        name: metadata.name.clone()?,
        namespace: metadata.namespace.clone()?,
        service_account: spec
            .service_account_name
            .clone()
            .filter(|name| !name.is_empty())
            .unwrap_or_else(|| "default".to_owned()),
        ips,
        node: spec.node_name.clone().unwrap_or_default(),
        netns: None,
        host_network: spec.host_network.unwrap_or(false),
        labels: metadata.labels.clone().unwrap_or_default(),
        namespace_labels: std::collections::BTreeMap::new(),
        annotations: relevant(metadata.annotations.as_ref()),
        phase: phase(status.and_then(|status| status.phase.as_deref())),
        terminating: metadata.deletion_timestamp.is_some(),
        probe_ports: probe_ports(pod),
    })
}

/// Other people's annotations are long, and change often.
fn relevant(
    annotations: Option<&std::collections::BTreeMap<String, String>>,
) -> std::collections::BTreeMap<String, String> {
    let ours = |key: &str| key.contains("istio.io/");
    let all = annotations.into_iter().flatten();
    all.filter(|(key, _)| ours(key))
        .map(|(key, value)| (key.clone(), value.clone()))
        .collect()
}

fn phase(text: Option<&str>) -> Phase {
    match text {
        None | Some("Pending") => Phase::Pending,
        Some("Running") => Phase::Running,
        Some("Succeeded") => Phase::Succeeded,
        Some("Failed") => Phase::Failed,
        Some(_) => Phase::Unknown,
    }
}

/// Every TCP port of the pod that kubelet itself calls: probes, and hooks that are HTTP requests. Sorted, each once.
fn probe_ports(pod: &Pod) -> Vec<u16> {
    let Some(spec) = &pod.spec else {
        return Vec::new();
    };
    let initial = spec.init_containers.iter().flatten();
    let ports: BTreeSet<u16> = spec
        .containers
        .iter()
        .chain(initial)
        .flat_map(called_ports)
        .collect();
    ports.into_iter().collect()
}

fn called_ports(container: &Container) -> Vec<u16> {
    let named = container.ports.as_deref().unwrap_or_default();
    let probes = [
        &container.liveness_probe,
        &container.readiness_probe,
        &container.startup_probe,
    ];
    let lifecycle = container.lifecycle.as_ref();
    let hooks = lifecycle
        .into_iter()
        .flat_map(|lifecycle| [&lifecycle.post_start, &lifecycle.pre_stop]);
    let by_probe = probes
        .into_iter()
        .flatten()
        .filter_map(|probe| probed_port(probe, named));
    let by_hook = hooks.flatten().filter_map(|hook| hook_port(hook, named));
    by_probe.chain(by_hook).collect()
}

/// A probe that names a host of its own does not call the pod's address.
fn probed_port(probe: &Probe, named: &[ContainerPort]) -> Option<u16> {
    if let Some(grpc) = &probe.grpc {
        return u16::try_from(grpc.port).ok();
    }
    if let Some(http) = &probe.http_get {
        return own(http.host.as_deref()).then(|| resolve(&http.port, named))?;
    }
    let tcp = probe.tcp_socket.as_ref()?;
    own(tcp.host.as_deref()).then(|| resolve(&tcp.port, named))?
}

fn hook_port(hook: &LifecycleHandler, named: &[ContainerPort]) -> Option<u16> {
    let http = hook.http_get.as_ref()?;
    own(http.host.as_deref()).then(|| resolve(&http.port, named))?
}

fn own(host: Option<&str>) -> bool {
    host.is_none_or(str::is_empty)
}

/// As kubelet does: a name is looked up among the same container's ports; a text may also be a number.
fn resolve(port: &IntOrString, named: &[ContainerPort]) -> Option<u16> {
    match port {
        IntOrString::Int(number) => u16::try_from(*number).ok(),
        IntOrString::String(name) => named
            .iter()
            .find(|port| port.name.as_deref() == Some(name))
            .and_then(|port| u16::try_from(port.container_port).ok())
            .or_else(|| name.parse().ok()),
    }
    .filter(|port| *port != 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn pod(spec: &Value, status: &Value) -> PodFacts {
        let text = json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": { "name": "a", "namespace": "b", "uid": "1", "annotations": {
                "ambient.istio.io/redirection": "enabled", "kubectl.kubernetes.io/last-applied": "long" } },
            "spec": spec, "status": status,
        });
        let pod: Pod = serde_json::from_value(text).expect("a pod");
        pod_facts(&pod).expect("facts")
    }

    #[track_caller]
    fn check_ports(containers: &Value, expected: &[u16]) {
        let facts = pod(&json!({ "containers": containers }), &json!({}));
        assert_eq!(facts.probe_ports, expected, "{containers}");
    }

    #[test]
    fn probe_ports_are_those_that_kubelet_calls() {
        let ports = json!([{ "name": "web", "containerPort": 8080 }, { "name": "adm", "containerPort": 9090 }]);
        let probe =
            |probe: Value| json!([{ "name": "c", "ports": ports, "readinessProbe": probe }]);
        check_ports(&probe(json!({ "httpGet": { "port": "web" } })), &[8080]);
        check_ports(&probe(json!({ "httpGet": { "port": 81 } })), &[81]);
        check_ports(&probe(json!({ "httpGet": { "port": "82" } })), &[82]);
        check_ports(&probe(json!({ "httpGet": { "port": "absent" } })), &[]);
        check_ports(&probe(json!({ "httpGet": { "port": 0 } })), &[]);
        check_ports(&probe(json!({ "httpGet": { "port": 70_000 } })), &[]);
        check_ports(
            &probe(json!({ "httpGet": { "port": 81, "host": "10.0.0.9" } })),
            &[],
        );
        check_ports(&probe(json!({ "tcpSocket": { "port": "adm" } })), &[9090]);
        check_ports(&probe(json!({ "grpc": { "port": 7070 } })), &[7070]);
        check_ports(&probe(json!({ "exec": { "command": ["true"] } })), &[]);
        check_ports(
            &json!([
                { "name": "a", "ports": ports, "livenessProbe": { "tcpSocket": { "port": 3 } },
                  "startupProbe": { "httpGet": { "port": "web" } } },
                { "name": "b", "readinessProbe": { "httpGet": { "port": "web" } },
                  "lifecycle": { "preStop": { "httpGet": { "port": 2 } }, "postStart": { "exec": { "command": ["x"] } } } },
            ]),
            &[2, 3, 8080],
        );
    }

    #[test]
    fn sidecar_init_containers_are_probed_too() {
        let spec = json!({ "containers": [], "initContainers": [
            { "name": "s", "restartPolicy": "Always", "startupProbe": { "tcpSocket": { "port": 5 } } } ] });
        assert_eq!(pod(&spec, &json!({})).probe_ports, [5]);
    }

    #[test]
    fn both_families_of_addresses_are_read() {
        let spec = json!({ "containers": [], "serviceAccountName": "web", "hostNetwork": true });
        let status = json!({ "phase": "Running", "podIP": "10.0.0.1", "podIPs": [{ "ip": "10.0.0.1" }, { "ip": "fd00::1" }] });
        let facts = pod(&spec, &status);
        assert_eq!(facts.ips.len(), 2);
        assert_eq!(
            (facts.phase, facts.host_network, facts.terminating),
            (Phase::Running, true, false)
        );
        assert_eq!(facts.service_account, "web");
        assert_eq!(
            facts.annotations.len(),
            1,
            "others' annotations are not kept"
        );
        let single = pod(
            &json!({ "containers": [] }),
            &json!({ "podIP": "10.0.0.1" }),
        );
        assert_eq!(single.ips.len(), 1);
        assert_eq!(single.service_account, "default");
    }
}
