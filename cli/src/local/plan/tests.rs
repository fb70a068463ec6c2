use serde_json::json;

use super::*;
use crate::local::address;

fn deployment(replicas: i32, command: &str) -> Objects {
    let object = json!({
        "metadata": {"name": "web", "namespace": "a"},
        "spec": {"replicas": replicas, "selector": {}, "template": {
            "metadata": {"labels": {"app": "web"}},
            "spec": {"containers": [{"name": "c", "command": [command]}]},
        }},
    });
    let mut objects = Objects::default();
    objects.deployments.insert(
        Key::new("a", "web"),
        serde_json::from_value(object).unwrap(),
    );
    objects
}

fn pod(spec: serde_json::Value) -> PodPlan {
    let pod = json!({"metadata": {"name": "p", "namespace": "a", "labels": {"app": "web"}}, "spec": spec});
    PodPlan {
        key: Key::new("a", "p"),
        pod: serde_json::from_value(pod).unwrap(),
        deployment: None,
    }
}

fn place() -> Place {
    Place {
        node: "node1".to_owned(),
        node_address: address::node(1),
        address: address::node(9),
        uid: "u".to_owned(),
    }
}

#[test]
fn a_deployments_pods_keep_their_names_until_the_template_changes() {
    let first = pods(&deployment(2, "x"));
    let names: Vec<_> = first.keys().collect();
    assert_eq!(names.len(), 2);
    assert!(names[0].name.starts_with("web-"));
    assert_eq!(pods(&deployment(2, "x")).keys().collect::<Vec<_>>(), names);
    assert!(
        pods(&deployment(3, "x"))
            .keys()
            .filter(|key| names.contains(key))
            .count()
            == 2
    );
    assert!(
        pods(&deployment(2, "y"))
            .keys()
            .all(|key| !names.contains(&key))
    );
}

#[test]
fn a_deployments_pod_is_owned_by_a_replica_set_of_its_name() {
    let plans = pods(&deployment(1, "x"));
    let plan = plans.values().next().unwrap();
    let owner = &plan.pod.metadata.owner_references.as_ref().unwrap()[0];
    let hash = &plan.labels()["pod-template-hash"];
    assert_eq!(owner.name, format!("web-{hash}"));
    assert_eq!(
        (owner.kind.as_str(), owner.controller),
        ("ReplicaSet", Some(true))
    );
    assert!(plan.key.name.starts_with(&format!("web-{hash}-")));
}

#[test]
fn pods_go_where_they_ask_else_where_the_fewest_are() {
    let load = BTreeMap::from([
        ("node1".to_owned(), 2),
        ("node2".to_owned(), 1),
        ("node10".to_owned(), 1),
    ]);
    let spec = |value| serde_json::from_value::<PodSpec>(value).unwrap();
    let placed = |value| schedule(&spec(value), &load);
    assert_eq!(placed(json!({"containers": []})), Ok("node2".to_owned()));
    assert_eq!(
        placed(json!({"containers": [], "nodeName": "node1"})),
        Ok("node1".to_owned())
    );
    let selector = json!({"containers": [], "nodeSelector": {"kubernetes.io/hostname": "node10"}});
    assert_eq!(placed(selector), Ok("node10".to_owned()));
    assert!(placed(json!({"containers": [], "nodeName": "moon"})).is_err());
}

#[test]
fn commands_take_variables_and_the_downward_api() {
    let plan = pod(json!({"containers": [{
        "name": "c", "command": ["sh", "-c"], "args": ["echo $(WHO) $(NOBODY) $$(WHO) $HOME"],
        "env": [
            {"name": "NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
            {"name": "APP", "valueFrom": {"fieldRef": {"fieldPath": "metadata.labels['app']"}}},
            {"name": "WHO", "value": "$(NAME).$(APP)"},
        ],
    }]}));
    let container = container(&plan, &plan.spec().containers[0], false, &place()).unwrap();
    assert_eq!(
        container.command,
        ["sh", "-c", "echo p.web $(NOBODY) $(WHO) $HOME"]
    );
    assert_eq!((container.uid, container.gid), (1000, 1000));
}

#[test]
fn what_cannot_be_started_says_why() {
    let refused = |spec| {
        let plan = pod(spec);
        container(&plan, &plan.spec().containers[0], false, &place()).unwrap_err()
    };
    let no_command = refused(json!({"containers": [{"name": "c", "image": "nginx"}]}));
    assert_eq!(no_command, ContainerError::NoCommand("c".to_owned()));
    let root = json!({"securityContext": {"runAsUser": 0}, "containers": [{"name": "c", "command": ["x"]}]});
    assert_eq!(refused(root), ContainerError::Root("c".to_owned()));
    let secret = json!({"containers": [{"name": "c", "command": ["x"], "env": [
        {"name": "S", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}}]}]});
    assert!(matches!(refused(secret), ContainerError::Variable(..)));
}

#[test]
fn ids_have_the_form_of_a_uuid() {
    assert_eq!(uid_of("a"), uid_of("a"));
    let uid = uid_of("b");
    assert_eq!(uid.len(), 36);
    assert_eq!(&uid[14..15], "4");
    assert!("89ab".contains(&uid[19..20]));
}
