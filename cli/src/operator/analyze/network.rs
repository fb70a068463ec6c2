//! What of the cluster's own objects keeps a pod out of the mesh, or from its peers in it. Pure.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

use super::{
    findings::{self, Finding},
    selectors::Told,
};

/// Where traffic in the mesh arrives.
const HBONE: u64 = 15008;
const MODE: &str = "istio.io/dataplane-mode";
const REDIRECTION: &str = "ambient.istio.io/redirection";

/// The two ways that a NetworkPolicy looks, as its fields and `policyTypes` have them.
const WAYS: [(&str, &str); 2] = [("ingress", "Ingress"), ("egress", "Egress")];

/// The findings of pods and NetworkPolicies.
pub(super) fn findings(objects: &[Value]) -> Vec<Told> {
    let of_kind = |kind: &'static str| objects.iter().filter(move |it| it["kind"] == kind);
    let ambient: BTreeSet<&str> = of_kind("Namespace")
        .filter(|it| it["metadata"]["labels"][MODE] == "ambient")
        .filter_map(|it| it["metadata"]["name"].as_str())
        .collect();
    let pods: Vec<&Value> = of_kind("Pod").filter(|pod| is_alive(pod)).collect();
    let outside = pods.iter().filter_map(|pod| outside(pod, &ambient));
    let policies: Vec<&Value> = of_kind("NetworkPolicy").collect();
    let in_mesh: Vec<&Value> = pods.iter().copied().filter(|it| is_enabled(it)).collect();
    outside.chain(blocked(&in_mesh, &policies)).collect()
}

fn is_alive(pod: &Value) -> bool {
    pod["status"]["phase"] == "Running" && pod["metadata"]["deletionTimestamp"].is_null()
}

fn is_enabled(pod: &Value) -> bool {
    pod["metadata"]["annotations"][REDIRECTION] == "enabled"
}

/// A running pod that is asked into the mesh, and is not in it.
fn outside(pod: &Value, ambient: &BTreeSet<&str>) -> Option<Told> {
    let metadata = &pod["metadata"];
    let wanted = match metadata["labels"][MODE].as_str() {
        Some(own) => own == "ambient",
        None => ambient.contains(metadata["namespace"].as_str()?),
    };
    if !wanted || is_enabled(pod) {
        return None;
    }
    let (code, message) = if pod["spec"]["hostNetwork"] == true {
        (
            "LEY-A07",
            "is on the network of its node, and so not in the mesh: what it sends is plaintext, which servers under STRICT refuse",
        )
    } else if !metadata["annotations"]["sidecar.istio.io/status"].is_null() {
        (
            "LEY-A07",
            "has a sidecar, and so is not taken into the mesh by its node",
        )
    } else {
        (
            "LEY-A08",
            "is labelled for the mesh and not in it: see leyline check, and the log of istio-cni-node on its node",
        )
    };
    told(pod, code, message.to_owned())
}

/// NetworkPolicies that, taken together, leave pods of the mesh no way to or from port 15008, while they leave them others.
fn blocked(pods: &[&Value], policies: &[&Value]) -> Vec<Told> {
    let mut found: BTreeMap<(usize, &str), Vec<&str>> = BTreeMap::new();
    for pod in pods {
        for (field, kind) in WAYS {
            let here: Vec<(usize, &Value)> = policies
                .iter()
                .enumerate()
                .filter(|(_, policy)| looks(policy, kind, field) && selects(policy, pod))
                .map(|(at, policy)| (at, &policy["spec"][field]))
                .collect();
            let passes = here.iter().any(|(_, rules)| list(rules).any(lets_pass));
            let guilty = here
                .iter()
                .filter(|(_, rules)| list(rules).next().is_some());
            for (at, _) in guilty.filter(|_| !passes) {
                let name = pod["metadata"]["name"].as_str().unwrap_or_default();
                found.entry((*at, field)).or_default().push(name);
            }
        }
    }
    let one = |((at, field), pods): ((usize, &str), Vec<&str>)| {
        let more = match pods.len() {
            1 => String::new(),
            count => format!(" and {} more", count - 1),
        };
        let message = format!(
            "its {field} rules name ports, and 15008 is not among them: pods of the mesh ({}{more}) speak by that port alone; let it pass, too",
            pods[0]
        );
        told(policies[at], "LEY-A06", message)
    };
    found.into_iter().filter_map(one).collect()
}

fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

/// Whether a NetworkPolicy restricts this way.
fn looks(policy: &Value, kind: &str, field: &str) -> bool {
    match policy["spec"]["policyTypes"].as_array() {
        Some(kinds) => kinds.iter().any(|it| it == kind),
        // As the API server fills it in.
        None => kind == "Ingress" || policy["spec"][field].is_array(),
    }
}

/// Whether it selects a pod; of expressions, nothing is said.
fn selects(policy: &Value, pod: &Value) -> bool {
    let selector = &policy["spec"]["podSelector"];
    let pairs = selector["matchLabels"].as_object();
    let mut pairs = pairs.into_iter().flatten();
    policy["metadata"]["namespace"] == pod["metadata"]["namespace"]
        && list(&selector["matchExpressions"]).next().is_none()
        && pairs.all(|(key, value)| pod["metadata"]["labels"][key] == *value)
}

/// Whether a rule is for port 15008, too.
fn lets_pass(rule: &Value) -> bool {
    let mut ports = list(&rule["ports"]).peekable();
    if ports.peek().is_none() {
        return true;
    }
    ports.any(|it| {
        let is_tcp = it["protocol"]
            .as_str()
            .is_none_or(|protocol| protocol == "TCP");
        let is_it = match (it["port"].as_u64(), it["endPort"].as_u64()) {
            (Some(first), Some(last)) => (first..=last).contains(&HBONE),
            (Some(port), None) => port == HBONE,
            (None, _) => it["port"].is_null(),
        };
        is_tcp && is_it
    })
}

fn told(object: &Value, code: &str, message: String) -> Option<Told> {
    let analyzer = findings::of(code)?;
    let text = |field: &str| object["metadata"][field].as_str().unwrap_or_default();
    let kind = object["kind"].as_str().unwrap_or_default();
    Some(Told {
        namespace: text("namespace").to_owned(),
        finding: Finding {
            level: analyzer.level,
            code: analyzer.code,
            message,
            origin: format!("{kind} {}.{}", text("name"), text("namespace")),
            reference: None,
        },
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn pod(name: &str, change: impl FnOnce(&mut Value)) -> Value {
        let mut pod = json!({"kind": "Pod", "status": {"phase": "Running"}, "spec": {},
            "metadata": {"name": name, "namespace": "shop", "labels": {"app": name},
                "annotations": {REDIRECTION: "enabled"}}});
        change(&mut pod);
        pod
    }

    fn policy(name: &str, spec: Value) -> Value {
        json!({"kind": "NetworkPolicy", "metadata": {"name": name, "namespace": "shop"}, "spec": spec})
    }

    fn codes(objects: &[Value]) -> Vec<(String, String)> {
        let found = findings(objects).into_iter().map(|it| it.finding);
        found.map(|it| (it.code.to_owned(), it.origin)).collect()
    }

    #[test]
    fn pods_that_are_asked_into_the_mesh_and_stay_outside_are_told() {
        let shop =
            json!({"kind": "Namespace", "metadata": {"name": "shop", "labels": {MODE: "ambient"}}});
        let out = |pod: &mut Value| pod["metadata"]["annotations"] = json!({});
        let objects = [
            shop,
            pod("in", |_| {}),
            pod("late", out),
            pod("host", |it| {
                out(it);
                it["spec"]["hostNetwork"] = true.into();
            }),
            pod("apart", |it| {
                out(it);
                it["metadata"]["labels"][MODE] = "none".into();
            }),
            pod("done", |it| {
                out(it);
                it["status"]["phase"] = "Succeeded".into();
            }),
        ];
        let told = [("LEY-A08", "Pod late.shop"), ("LEY-A07", "Pod host.shop")];
        assert_eq!(
            codes(&objects),
            told.map(|(a, b)| (a.to_owned(), b.to_owned()))
        );
        // What the namespace says is left.
        assert!(codes(&objects[1..]).is_empty());
    }

    #[test]
    fn a_network_policy_that_leaves_out_the_meshs_port_is_told() {
        let web = || pod("web", |_| {});
        let by_port = |ports: Value| {
            policy(
                "p",
                json!({"podSelector": {"matchLabels": {"app": "web"}}, "policyTypes": ["Ingress"],
                "ingress": [{"ports": ports}]}),
            )
        };
        for (ports, is_told) in [
            (json!([{"port": 8080}]), true),
            (json!([{"port": "http"}]), true),
            (json!([{"port": 15008, "protocol": "UDP"}]), true),
            (json!([{"port": 8080}, {"port": 15008}]), false),
            (
                json!([{"port": 15000, "endPort": 15010, "protocol": "TCP"}]),
                false,
            ),
            (json!([]), false),
        ] {
            let found = codes(&[web(), by_port(ports.clone())]);
            assert_eq!(!found.is_empty(), is_told, "{ports}: {found:?}");
        }
        let http = by_port(json!([{"port": 8080}]));
        // What another one lets pass, passes; who is denied everything is meant to be.
        let hbone = policy(
            "q",
            json!({"podSelector": {}, "ingress": [{"ports": [{"port": 15008}]}]}),
        );
        assert!(codes(&[web(), http.clone(), hbone]).is_empty());
        let nothing = policy(
            "q",
            json!({"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}),
        );
        assert!(codes(&[web(), nothing]).is_empty());
        // Pods outside of the mesh are reached at their own ports.
        let outside = pod("web", |it| it["metadata"]["annotations"] = json!({}));
        assert!(codes(&[outside, http]).is_empty());
        let egress = policy(
            "out",
            json!({"podSelector": {}, "policyTypes": ["Egress"],
            "egress": [{"ports": [{"port": 53, "protocol": "UDP"}]}]}),
        );
        let found = findings(&[web(), egress]);
        assert_eq!(
            found[0].finding.to_string(),
            "Warning [LEY-A06] (NetworkPolicy out.shop) its egress rules name ports, and 15008 is not among them: pods of the mesh (web) speak by that port alone; let it pass, too"
        );
    }
}
