//! Waypoints and gateways between networks of the embedded mesh: each Gateway of one of their classes gets what the control
//! plane makes in a cluster, a deployment of this very program in its role, a service and a place for its token. Pure, but
//! for the token's folder.

use std::{
    collections::BTreeMap,
    io,
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, Result};
use controlplane::{
    crd::Gateway,
    gateway::{
        class::{self, Role},
        names::{GATEWAY_NAME, MANAGED, NETWORK},
    },
};
use k8s_openapi::api::{apps::v1::Deployment, core::v1::Service};
use serde_json::{Value, json};

use super::{
    address,
    objects::{Key, Objects},
    parts::XDS_PORT,
    plan::{Place, PodPlan},
    runtime::{Runtime, write_atomically},
    shim,
    tokens::{Bearer, Minter},
};

/// Where a waypoint finds its token and the roots that vouch for the control plane.
const FOLDER: &str = "/run/leyline/waypoint";
/// Upstream's user of proxies.
const USER: u32 = 1337;

/// Adds what the Gateways of waypoints come to. What the user wrote under the same name stays.
pub(super) fn deploy(objects: &mut Objects) {
    for (key, gateway) in &objects.gateways {
        let Some(role) = role(gateway) else {
            continue;
        };
        let made = objects.waypoints.insert(key.clone());
        debug_assert!(made, "a Gateway is seen once");
        let deployment = objects.deployments.entry(key.clone());
        deployment.or_insert_with(|| deployment_of(key, gateway, role));
        if !objects.services.contains_key(key) {
            objects.services.insert(key.clone(), service_of(key, role));
            objects.made_services.insert(key.clone());
        }
    }
}

fn role(gateway: &Gateway) -> Option<Role> {
    let class = &gateway.spec.gateway_class_name;
    match class {
        class if class::is_waypoint(class, None) => Some(Role::Waypoint),
        class if class::is_east_west(class, None) => Some(Role::EastWest),
        _ => None,
    }
}

/// What a controller would write of a waypoint's Gateway: where it is found.
pub(super) fn gateway_status(key: &Key) -> Value {
    json!({"apiVersion": "gateway.networking.k8s.io/v1", "kind": "Gateway",
        "metadata": {"namespace": key.namespace, "name": key.name},
        "status": {"addresses": [{"type": "Hostname", "value": hostname(key)}]}})
}

fn hostname(key: &Key) -> String {
    format!("{}.{}.svc.cluster.local", key.name, key.namespace)
}

fn labels(key: &Key, gateway: &Gateway, role: Role) -> BTreeMap<String, String> {
    let mut labels = gateway.metadata.labels.clone().unwrap_or_default();
    let ours = [
        (GATEWAY_NAME, key.name.as_str()),
        (MANAGED, role.managed_by()),
        ("istio.io/dataplane-mode", "none"),
        ("service.istio.io/canonical-name", &key.name),
        ("service.istio.io/canonical-revision", "latest"),
    ];
    labels.extend(ours.map(|(name, value)| (name.to_owned(), value.to_owned())));
    labels
}

fn deployment_of(key: &Key, gateway: &Gateway, role: Role) -> Deployment {
    let selector = json!({"matchLabels": {GATEWAY_NAME: key.name}});
    let deployment = json!({
        "metadata": {"namespace": key.namespace, "name": key.name},
        "spec": {"selector": selector, "template": {
            "metadata": {"labels": labels(key, gateway, role)},
            "spec": {
                "serviceAccountName": key.name,
                "terminationGracePeriodSeconds": 10,
                "containers": [container(key, gateway, role)],
            },
        }},
    });
    serde_json::from_value(deployment).unwrap_or_default()
}

fn container(key: &Key, gateway: &Gateway, role: Role) -> Value {
    let server = format!("https://{}:{XDS_PORT}", address::CONTROL.v4);
    let root = format!("{FOLDER}/root-cert.pem");
    let labels = gateway.metadata.labels.as_ref();
    let network = labels.and_then(|it| it.get(NETWORK));
    let role = match role {
        Role::EastWest => "east-west",
        Role::Waypoint | Role::Remote => "waypoint",
    };
    let value = |name: &str, value: &str| json!({"name": name, "value": value});
    let field = |name: &str, path: &str| json!({"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}});
    json!({
        "name": "istio-proxy",
        "command": [shim::SHARED_PROGRAM, "waypoint", "proxy"],
        "securityContext": {"runAsUser": USER, "runAsGroup": USER},
        "ports": [{"name": "hbone", "containerPort": 15008}, {"name": "status-port", "containerPort": 15021}],
        "readinessProbe": {"httpGet": {"path": "/healthz/ready", "port": 15021}, "periodSeconds": 1},
        "env": [
            field("POD_NAME", "metadata.name"),
            field("POD_NAMESPACE", "metadata.namespace"),
            field("INSTANCE_IP", "status.podIP"),
            field("SERVICE_ACCOUNT", "spec.serviceAccountName"),
            field("NODE_NAME", "spec.nodeName"),
            value("GATEWAY_NAME", &key.name),
            value("CLUSTER_ID", "Kubernetes"),
            value("NETWORK", network.map_or("", |it| it)),
            value("LEYLINE_ROLE", role),
            value("XDS_ADDRESS", &server),
            value("CA_ADDRESS", &server),
            value("XDS_ROOT_CA", &root),
            value("CA_ROOT_CA", &root),
            value("AUTH_TOKEN", &format!("{FOLDER}/token")),
            value("MINIMUM_DRAIN_DURATION", "500ms"),
            value("TERMINATION_GRACE_PERIOD_SECONDS", "10"),
        ],
    })
}

fn service_of(key: &Key, role: Role) -> Service {
    let port = |name: &str, port: u16, protocol: &str| json!({"name": name, "port": port, "protocol": "TCP", "appProtocol": protocol});
    let service = json!({
        "metadata": {"namespace": key.namespace, "name": key.name, "labels": {
            GATEWAY_NAME: key.name, MANAGED: role.managed_by(),
        }},
        "spec": {
            "ipFamilyPolicy": "PreferDualStack",
            "selector": {GATEWAY_NAME: key.name},
            "ports": [port("status-port", 15021, "tcp"), port("mesh", 15008, "hbone")],
        },
    });
    serde_json::from_value(service).unwrap_or_default()
}

/// Whether a pod is an instance of a waypoint that was made here.
pub(super) fn is_instance(objects: &Objects, plan: &PodPlan) -> bool {
    let of = plan.deployment.as_ref();
    of.is_some_and(|key| objects.waypoints.contains(key))
}

/// The folder that an instance finds its token and roots in, `(from, to)`.
pub(super) fn folder(runtime: &Runtime, uid: &str) -> (PathBuf, PathBuf) {
    (runtime.etc().join(format!("{uid}.waypoint")), FOLDER.into())
}

/// Writes an instance's token, and the roots, if the control plane has made them by now. Whether it has.
pub(super) fn introduce(
    runtime: &Runtime,
    minter: &Minter,
    plan: &PodPlan,
    place: &Place,
) -> Result<bool> {
    let (folder, _) = folder(runtime, &place.uid);
    let Ok(root) = std::fs::read(runtime.authority().join("root-cert.pem")) else {
        return Ok(false);
    };
    let bearer = Bearer {
        namespace: plan.key.namespace.clone(),
        service_account: plan.service_account(),
        pod: plan.key.name.clone(),
        pod_uid: place.uid.clone(),
        node: place.node.clone(),
    };
    let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
    let token = minter.mint(&bearer, now)?;
    make_folder(&folder).context("make a waypoint's folder")?;
    for (name, content) in [("token", token.as_bytes()), ("root-cert.pem", &root)] {
        write_readable(&folder.join(name), content).context("write a waypoint's token")?;
    }
    Ok(true)
}

/// The folder above it is the mesh's owner's alone; the waypoint sees this one, as another user.
fn make_folder(path: &Path) -> io::Result<()> {
    std::fs::create_dir_all(path)?;
    std::fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o755))
}

fn write_readable(path: &Path, content: &[u8]) -> io::Result<()> {
    let next = path.with_extension("next");
    write_atomically(&next, content)?;
    std::fs::set_permissions(&next, std::os::unix::fs::PermissionsExt::from_mode(0o644))?;
    std::fs::rename(next, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gateway(class: &str) -> Gateway {
        let gateway = json!({"metadata": {"name": "wp", "namespace": "shop"},
            "spec": {"gatewayClassName": class, "listeners": []}});
        serde_json::from_value(gateway).unwrap()
    }

    #[test]
    fn a_gateway_of_a_waypoints_class_becomes_pods_and_a_service() {
        let key = Key::new("shop", "wp");
        let mut objects = Objects::default();
        objects
            .gateways
            .insert(key.clone(), gateway("istio-waypoint"));
        deploy(&mut objects);
        assert!(objects.made_services.contains(&key));
        let plans = super::super::plan::pods(&objects);
        let plan = plans.values().next().expect("one pod");
        assert!(is_instance(&objects, plan));
        assert_eq!(plan.service_account(), "wp");
        assert_eq!(plan.labels()[GATEWAY_NAME], "wp");
        let container = &plan.spec().containers[0];
        let command = container.command.as_ref().expect("it has one");
        assert_eq!(command[1..], ["waypoint", "proxy"]);
        let ports = objects.services[&key].spec.as_ref().unwrap().ports.clone();
        let ports: Vec<_> = ports.unwrap().iter().map(|port| port.port).collect();
        assert_eq!(ports, [15021, 15008]);
    }

    #[test]
    fn a_gateway_between_networks_is_told_its_role_and_its_network() {
        let key = Key::new("shop", "wp");
        let mut gateway = gateway("istio-east-west");
        gateway.metadata.labels = Some([(NETWORK.to_owned(), "east".to_owned())].into());
        let mut objects = Objects::default();
        objects.gateways.insert(key.clone(), gateway);
        deploy(&mut objects);
        let plans = super::super::plan::pods(&objects);
        let plan = plans.values().next().expect("one pod");
        assert_eq!(plan.labels()[MANAGED], "istio.io-eastwest-controller");
        let env = plan.spec().containers[0].env.clone().expect("it has some");
        let of = |name: &str| env.iter().find(|it| it.name == name).unwrap().value.clone();
        assert_eq!(of("LEYLINE_ROLE").as_deref(), Some("east-west"));
        assert_eq!(of("NETWORK").as_deref(), Some("east"));
    }

    #[test]
    fn other_gateways_and_what_the_user_wrote_stay() {
        let key = Key::new("shop", "wp");
        let mut objects = Objects::default();
        objects.gateways.insert(key.clone(), gateway("nginx"));
        deploy(&mut objects);
        assert!(objects.deployments.is_empty() && objects.waypoints.is_empty());
        objects
            .gateways
            .insert(key.clone(), gateway("leyline-waypoint"));
        objects.services.insert(key.clone(), Service::default());
        deploy(&mut objects);
        assert_eq!(objects.services[&key], Service::default());
        assert!(objects.made_services.is_empty());
    }
}
