//! The world as others read it: pods' facts for the agents, Kubernetes objects for the control plane, `resolv.conf` for the
//! pods. Reads the world, changes nothing.

use std::time::SystemTime;

use cni::facts::PodFacts;
use serde_json::{Value, json};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use super::{
    address,
    objects::Labels,
    parts,
    plan::{self, Place, PodPlan},
    pod::{ContainerState, Phase},
    services::{self, Member},
    waypoints,
    world::{LivePod, Node, World},
};

/// The annotation that tells the control plane that a pod speaks HBONE.
const REDIRECTION: &str = cni::facts::REDIRECTION_ANNOTATION;

/// A pod as its node's agent is told.
pub(super) fn facts(pod: &LivePod, namespace_labels: &Labels, probe_ports: Vec<u16>) -> PodFacts {
    PodFacts {
        uid: pod.place.uid.clone(),
        name: pod.plan.key.name.clone(),
        namespace: pod.plan.key.namespace.clone(),
        service_account: pod.plan.service_account(),
        ips: pod.place.address.both().to_vec(),
        node: pod.place.node.clone(),
        netns: Some(pod.netns.path().to_owned()),
        host_network: false,
        labels: pod.plan.labels(),
        namespace_labels: namespace_labels.clone(),
        annotations: pod.plan.annotations(),
        phase: match pod.state().phase {
            Phase::Pending => cni::facts::Phase::Pending,
            Phase::Running => cni::facts::Phase::Running,
            Phase::Succeeded => cni::facts::Phase::Succeeded,
            Phase::Failed => cni::facts::Phase::Failed,
        },
        terminating: pod.terminating,
        probe_ports,
    }
}

/// What an API server would hold beside the user's objects.
pub(super) fn state(world: &World, members: &[Member]) -> Vec<Value> {
    let mut objects = Vec::new();
    for namespace in world.edits.namespaces.keys() {
        let labels = world.objects.namespace_labels(namespace);
        objects.push(json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace, "labels": labels}}));
    }
    for node in world.nodes.values() {
        objects.push(node_object(world, node));
        objects.push(tunnel_object(node));
    }
    objects.extend(world.pods.values().map(|pod| pod_object(world, pod)));
    let zones = world.nodes.keys().filter_map(|node| {
        let zone = world
            .node_labels(node)
            .get("topology.kubernetes.io/zone")
            .cloned()?;
        Some((node.clone(), zone))
    });
    let zones = zones.collect();
    objects.extend(
        world
            .objects
            .waypoints
            .iter()
            .map(waypoints::gateway_status),
    );
    for (key, service) in &world.objects.services {
        if let Some(view) = world.services.get(key)
            && let Some(first) = view.addresses.first()
        {
            let mut object = match world.objects.made_services.contains(key) {
                true => json!(service),
                false => {
                    json!({"metadata": {"namespace": key.namespace, "name": key.name}, "spec": {}})
                }
            };
            object["apiVersion"] = "v1".into();
            object["kind"] = "Service".into();
            object["spec"]["clusterIP"] = json!(first);
            object["spec"]["clusterIPs"] = json!(view.addresses);
            objects.push(object);
        }
        objects.extend(
            services::slices(key, service, members, &zones)
                .into_iter()
                .map(|(_, slice)| slice),
        );
    }
    objects
}

fn node_object(world: &World, node: &Node) -> Value {
    let addresses = address::node(node.number).texts();
    let addresses = addresses.map(|address| json!({"type": "InternalIP", "address": address}));
    json!({"apiVersion": "v1", "kind": "Node",
        "metadata": {"name": node.name, "uid": plan::uid_of(&format!("node/{}", node.name)), "labels": world.node_labels(&node.name)},
        "status": {"addresses": addresses, "conditions": [{"type": "Ready", "status": "True"}]}})
}

/// A node's tunnel is a pod on the node's own network: that is how the control plane knows for whom it may ask.
fn tunnel_object(node: &Node) -> Value {
    let ips = address::node(node.number).texts();
    json!({"apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": parts::tunnel(&node.name), "namespace": "istio-system", "uid": tunnel_uid(&node.name),
            "labels": {"app": "ztunnel", "istio.io/dataplane-mode": "none"}},
        "spec": {"nodeName": node.name, "serviceAccountName": "ztunnel", "hostNetwork": true, "containers": []},
        "status": {"phase": "Running", "podIP": ips[0], "podIPs": ips.clone().map(|ip| json!({"ip": ip})), "hostIP": ips[0],
            "conditions": [{"type": "Ready", "status": "True"}]}})
}

/// The unique id of a node's tunnel as a pod.
pub(super) fn tunnel_uid(node: &str) -> String {
    plan::uid_of(&format!("ztunnel/{node}"))
}

fn pod_object(world: &World, pod: &LivePod) -> Value {
    let key = &pod.plan.key;
    let mut metadata = json!({"name": key.name, "namespace": key.namespace, "uid": pod.place.uid,
        "creationTimestamp": timestamp(pod.created)});
    let mut spec = json!({"nodeName": pod.place.node});
    let mut annotations = Labels::new();
    let from_deployment = !world.objects.pods.contains_key(key);
    if from_deployment {
        annotations.extend(pod.plan.annotations());
        metadata["ownerReferences"] =
            serde_json::to_value(&pod.plan.pod.metadata.owner_references).unwrap_or_default();
        spec = serde_json::to_value(&pod.plan.pod.spec).unwrap_or_default();
        spec["nodeName"] = pod.place.node.as_str().into();
    }
    if from_deployment || world.edits.pods.contains_key(&key.to_string()) {
        metadata["labels"] = json!(pod.plan.labels());
    }
    if let Some((redirection, _)) = &pod.enrolment {
        annotations.insert(REDIRECTION.to_owned(), redirection.clone());
    }
    if !annotations.is_empty() {
        metadata["annotations"] = json!(annotations);
    }
    if pod.terminating {
        metadata["deletionTimestamp"] = metadata["creationTimestamp"].clone();
    }
    json!({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec, "status": pod_status(pod)})
}

fn pod_status(pod: &LivePod) -> Value {
    let state = pod.state();
    let ips = pod.place.address.texts();
    let truth = |truth: bool| if truth { "True" } else { "False" };
    let ready = state.ready && !pod.terminating;
    let containers = state
        .containers
        .iter()
        .map(|(name, container)| container_status(name, container));
    json!({
        "phase": state.phase.as_str(), "podIP": ips[0], "podIPs": ips.map(|ip| json!({"ip": ip})),
        "hostIP": pod.place.node_address.v4, "startTime": timestamp(pod.created),
        "conditions": [{"type": "Ready", "status": truth(ready)}, {"type": "ContainersReady", "status": truth(state.ready)},
            {"type": "PodScheduled", "status": "True"}],
        "containerStatuses": containers.collect::<Vec<_>>(),
    })
}

fn container_status(name: &str, container: &ContainerState) -> Value {
    let state = match (container.running, container.last_exit) {
        (true, _) => json!({"running": {}}),
        (false, Some(code)) => json!({"terminated": {"exitCode": code}}),
        (false, None) => json!({"waiting": {"reason": "ContainerCreating"}}),
    };
    json!({"name": name, "ready": container.ready, "restartCount": container.restarts, "image": "", "imageID": "", "state": state})
}

fn timestamp(at: SystemTime) -> String {
    let whole = OffsetDateTime::from(at).replace_nanosecond(0);
    whole
        .ok()
        .and_then(|at| at.format(&Rfc3339).ok())
        .unwrap_or_default()
}

/// A pod's `resolv.conf`: the cluster's DNS and its search list, with the pod's own `dnsConfig` after them.
pub(super) fn resolv_conf(plan: &PodPlan) -> String {
    let spec = plan.spec();
    let config = spec.dns_config.unwrap_or_default();
    let own = spec.dns_policy.as_deref() == Some("None");
    let (mut servers, mut searches) = (Vec::new(), Vec::new());
    if !own {
        servers.push(address::CLUSTER_DNS.v4.to_string());
        let namespace = &plan.key.namespace;
        searches.extend([
            format!("{namespace}.svc.cluster.local"),
            "svc.cluster.local".into(),
            "cluster.local".into(),
        ]);
    }
    servers.extend(config.nameservers.unwrap_or_default());
    searches.extend(config.searches.unwrap_or_default());
    let mut options = if own {
        Vec::new()
    } else {
        vec!["ndots:5".to_owned()]
    };
    options.extend(config.options.iter().flatten().filter_map(|option| {
        match (&option.name, &option.value) {
            (Some(name), Some(value)) => Some(format!("{name}:{value}")),
            (name, _) => name.clone(),
        }
    }));
    let mut text: String = servers
        .iter()
        .map(|server| format!("nameserver {server}\n"))
        .collect();
    for (keyword, words) in [("search", searches), ("options", options)] {
        if !words.is_empty() {
            text.push_str(&format!("{keyword} {}\n", words.join(" ")));
        }
    }
    text
}

/// The `resolv.conf` of the mesh's own parts. Virtual addresses lead nowhere in the namespace of the control plane, where
/// the server itself is.
pub(super) fn parts_resolv_conf(of_control_plane: bool) -> String {
    let server = match of_control_plane {
        true => address::CONTROL,
        false => address::CLUSTER_DNS,
    };
    format!(
        "nameserver {}\nsearch svc.cluster.local cluster.local\noptions ndots:5\n",
        server.v4
    )
}

/// A pod's `hosts`: itself, loopback and its `hostAliases`.
pub(super) fn hosts(plan: &PodPlan, place: &Place) -> String {
    let hostname = plan::hostname(plan);
    let spec = plan.spec();
    let mut text = "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n".to_owned();
    let qualified = spec.subdomain.map(|subdomain| {
        format!(
            "{hostname}.{subdomain}.{}.svc.cluster.local\t",
            plan.key.namespace
        )
    });
    let names = format!("{}{hostname}", qualified.unwrap_or_default());
    for ip in place.address.both() {
        text.push_str(&format!("{ip}\t{names}\n"));
    }
    for alias in spec.host_aliases.iter().flatten() {
        text.push_str(&format!(
            "{}\t{}\n",
            alias.ip,
            alias
                .hostnames
                .iter()
                .flatten()
                .cloned()
                .collect::<Vec<_>>()
                .join("\t")
        ));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::local::objects::Key;

    fn plan(spec: Value) -> PodPlan {
        let pod = json!({"metadata": {"name": "p", "namespace": "a"}, "spec": spec});
        PodPlan {
            key: Key::new("a", "p"),
            pod: serde_json::from_value(pod).unwrap(),
            deployment: None,
        }
    }

    #[test]
    fn pods_find_services_by_their_short_names() {
        let text = resolv_conf(&plan(json!({"containers": []})));
        assert_eq!(
            text,
            "nameserver 10.96.0.10\nsearch a.svc.cluster.local svc.cluster.local cluster.local\noptions ndots:5\n"
        );
        let own = json!({"containers": [], "dnsPolicy": "None", "dnsConfig": {"nameservers": ["1.2.3.4"],
            "options": [{"name": "timeout", "value": "1"}]}});
        assert_eq!(
            resolv_conf(&plan(own)),
            "nameserver 1.2.3.4\noptions timeout:1\n"
        );
    }

    #[test]
    fn a_pod_knows_itself_and_its_aliases() {
        let place = Place {
            node: "node1".into(),
            node_address: address::node(1),
            address: address::node(9),
            uid: "u".into(),
        };
        let spec = json!({"containers": [], "subdomain": "db", "hostAliases": [{"ip": "1.2.3.4", "hostnames": ["x", "y"]}]});
        let text = hosts(&plan(spec), &place);
        assert!(
            text.contains("10.100.0.19\tp.db.a.svc.cluster.local\tp\n"),
            "{text}"
        );
        assert!(text.ends_with("1.2.3.4\tx\ty\n"), "{text}");
    }
}
