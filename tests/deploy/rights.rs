//! Every right that the chart gives, with what it is for. A right that is not in the table fails, and so does a line of the
//! table that no role gives.

use std::collections::BTreeSet;

use super::{called, objects};

/// Role, group/resource[:names], verbs, what for.
const RIGHTS: &[(&str, &str, &str, &str)] = &[
    (
        "istiod-clusterrole-istio-system",
        "/namespaces",
        "get list watch",
        "labels, discovery selectors, root certificates",
    ),
    (
        "istiod-clusterrole-istio-system",
        "/pods",
        "get list watch",
        "workloads",
    ),
    (
        "istiod-clusterrole-istio-system",
        "/services",
        "get list watch",
        "services",
    ),
    (
        "istiod-clusterrole-istio-system",
        "/nodes",
        "get list watch",
        "localities",
    ),
    (
        "istiod-clusterrole-istio-system",
        "discovery.k8s.io/endpointslices",
        "get list watch",
        "endpoints",
    ),
    (
        "istiod-clusterrole-istio-system",
        "security.istio.io/*",
        "get list watch",
        "policies",
    ),
    (
        "istiod-clusterrole-istio-system",
        "networking.istio.io/*",
        "get list watch",
        "entries",
    ),
    (
        "istiod-clusterrole-istio-system",
        "gateway.networking.k8s.io/*",
        "get list watch",
        "waypoints",
    ),
    (
        "istiod-clusterrole-istio-system",
        "apiextensions.k8s.io/customresourcedefinitions",
        "get list watch",
        "which kinds there are",
    ),
    (
        "istiod-clusterrole-istio-system",
        "authentication.k8s.io/tokenreviews",
        "create",
        "who asks for a certificate",
    ),
    (
        "istiod-clusterrole-istio-system",
        "authorization.k8s.io/subjectaccessreviews",
        "create",
        "who may read the debug endpoints",
    ),
    (
        "istiod-clusterrole-istio-system",
        "/services/status",
        "get patch",
        "conditions",
    ),
    (
        "istiod-clusterrole-istio-system",
        "networking.istio.io/serviceentries/status",
        "get patch",
        "conditions, allocated addresses",
    ),
    (
        "istiod-clusterrole-istio-system",
        "networking.istio.io/workloadentries/status",
        "get patch",
        "conditions",
    ),
    (
        "istiod-clusterrole-istio-system",
        "security.istio.io/authorizationpolicies/status",
        "get patch",
        "conditions",
    ),
    (
        "istiod-clusterrole-istio-system",
        "security.istio.io/peerauthentications/status",
        "get patch",
        "conditions",
    ),
    (
        "istiod-clusterrole-istio-system",
        "/configmaps",
        "list watch create",
        "the root certificate in each namespace; create cannot be limited by name",
    ),
    (
        "istiod-clusterrole-istio-system",
        "/configmaps:istio-ca-root-cert",
        "get patch",
        "the root certificate in each namespace",
    ),
    (
        "istiod-clusterrole-istio-system",
        "admissionregistration.k8s.io/validatingwebhookconfigurations",
        "get list watch",
        "our own, watched for edits",
    ),
    (
        "istiod-clusterrole-istio-system",
        "admissionregistration.k8s.io/mutatingwebhookconfigurations",
        "get list watch",
        "tags of revisions",
    ),
    (
        "istiod-clusterrole-istio-system",
        "admissionregistration.k8s.io/validatingwebhookconfigurations:istio-validator-istio-system,istiod-default-validator",
        "patch",
        "caBundle, failurePolicy",
    ),
    (
        "istiod-gateway-controller-istio-system",
        "gateway.networking.k8s.io/gateways",
        "patch",
        "the version of the controller",
    ),
    (
        "istiod-gateway-controller-istio-system",
        "gateway.networking.k8s.io/gatewayclasses",
        "create",
        "our classes",
    ),
    (
        "istiod-gateway-controller-istio-system",
        "gateway.networking.k8s.io/gateways/status",
        "patch update",
        "conditions, addresses",
    ),
    (
        "istiod-gateway-controller-istio-system",
        "gateway.networking.k8s.io/gatewayclasses/status",
        "patch update",
        "Accepted",
    ),
    (
        "istiod-gateway-controller-istio-system",
        "/services",
        "get list watch create patch",
        "a waypoint's",
    ),
    (
        "istiod-gateway-controller-istio-system",
        "/serviceaccounts",
        "get list watch create patch",
        "a waypoint's",
    ),
    (
        "istiod-gateway-controller-istio-system",
        "apps/deployments",
        "get list watch create patch",
        "a waypoint's",
    ),
    (
        "istiod-gateway-controller-istio-system",
        "autoscaling/horizontalpodautoscalers",
        "get create patch delete",
        "a waypoint's, when parameters ask for one",
    ),
    (
        "istiod-gateway-controller-istio-system",
        "policy/poddisruptionbudgets",
        "get create patch delete",
        "a waypoint's, when parameters ask for one",
    ),
    (
        "istiod-gateway-controller-istio-system",
        "/configmaps",
        "get",
        "parameters",
    ),
    (
        "istiod",
        "/secrets",
        "create",
        "the authority's first keys; cannot be limited by name",
    ),
    (
        "istiod",
        "/secrets:istio-ca-secret",
        "get list watch update",
        "the authority's keys",
    ),
    (
        "istiod",
        "coordination.k8s.io/leases",
        "create",
        "the leader's; cannot be limited by name",
    ),
    (
        "istiod",
        "coordination.k8s.io/leases:leyline-leader",
        "get update",
        "the leader's",
    ),
    (
        "istiod",
        "networking.istio.io/serviceentries",
        "create",
        "a dry run that the webhook must refuse",
    ),
    ("istio-cni", "/pods", "get list watch", "whom to enrol"),
    (
        "istio-cni",
        "/namespaces",
        "get list watch",
        "whom to enrol",
    ),
    ("istio-cni", "/nodes", "get", "the node's addresses"),
    (
        "istio-cni-ambient",
        "/pods/status",
        "patch",
        "the annotation of redirection",
    ),
    (
        "istio-cni",
        "apps/daemonsets:istio-cni-node",
        "get",
        "upgrade or uninstall",
    ),
    (
        "leyline-leave",
        "apps/daemonsets:istio-cni-node",
        "get delete",
        "uninstall",
    ),
    (
        "leyline-leave",
        "/pods",
        "list",
        "uninstall: whether the agents have ended",
    ),
];

#[test]
fn every_right_has_its_reason() {
    let mut given = BTreeSet::new();
    for role in objects(&[]) {
        let texts = |value: &serde_json::Value| -> Vec<String> {
            let items = value.as_array().into_iter().flatten();
            items
                .map(|item| item.as_str().unwrap().to_owned())
                .collect()
        };
        let (kind, name) = called(&role)
            .split_once('/')
            .map(|(k, n)| (k.to_owned(), n.to_owned()))
            .unwrap();
        if !["Role", "ClusterRole"].contains(&kind.as_str()) {
            continue;
        }
        for rule in role["rules"].as_array().unwrap() {
            let names = texts(&rule["resourceNames"]).join(",");
            let names = if names.is_empty() {
                names
            } else {
                format!(":{names}")
            };
            for group in texts(&rule["apiGroups"]) {
                for resource in texts(&rule["resources"]) {
                    let verbs = texts(&rule["verbs"]).join(" ");
                    given.insert((name.clone(), format!("{group}/{resource}{names}"), verbs));
                }
            }
        }
    }
    let reasoned: BTreeSet<_> = RIGHTS
        .iter()
        .map(|(role, what, verbs, _)| ((*role).to_owned(), (*what).to_owned(), (*verbs).to_owned()))
        .collect();
    let unreasoned: Vec<_> = given.difference(&reasoned).collect();
    let not_given: Vec<_> = reasoned.difference(&given).collect();
    assert!(
        unreasoned.is_empty(),
        "given without a reason: {unreasoned:#?}"
    );
    assert!(not_given.is_empty(), "not given: {not_given:#?}");
}

#[test]
fn nothing_may_be_everything() {
    for (role, what, verbs, _) in RIGHTS {
        assert!(!verbs.contains('*'), "{role}: {what}");
        // A wildcard of resources only reads.
        assert!(
            !what.contains('*') || *verbs == "get list watch",
            "{role}: {what}"
        );
        // No part reads the keys of others.
        assert!(
            !what.starts_with("/secrets") || *verbs == "create" || what.contains(':'),
            "{role}: {what}"
        );
    }
}
