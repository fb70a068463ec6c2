//! Every right that the chart gives, with what it is for. A right that is not in the table fails, and so does a line of the
//! table that no role gives.

use std::collections::BTreeSet;

use serde_json::Value;

use super::{called, objects};

/// Role | group/resource[:names] | verbs | what for
const RIGHTS: &str = "
istiod-clusterrole-istio-system | /namespaces | get list watch | labels, discovery selectors, root certificates
istiod-clusterrole-istio-system | /pods | get list watch | workloads
istiod-clusterrole-istio-system | /services | get list watch | services
istiod-clusterrole-istio-system | /nodes | get list watch | localities
istiod-clusterrole-istio-system | discovery.k8s.io/endpointslices | get list watch | endpoints
istiod-clusterrole-istio-system | security.istio.io/authorizationpolicies | get list watch | policies
istiod-clusterrole-istio-system | security.istio.io/peerauthentications | get list watch | policies
istiod-clusterrole-istio-system | security.istio.io/requestauthentications | get list watch | tokens at waypoints
istiod-clusterrole-istio-system | networking.istio.io/virtualservices | get list watch | routes
istiod-clusterrole-istio-system | networking.istio.io/destinationrules | get list watch | how endpoints are reached
istiod-clusterrole-istio-system | networking.istio.io/envoyfilters | get list watch | to say that they are not in force
istiod-clusterrole-istio-system | telemetry.istio.io/telemetries | get list watch | what waypoints tell
istiod-clusterrole-istio-system | extensions.istio.io/wasmplugins | get list watch | to say that they are not in force
istiod-clusterrole-istio-system | networking.istio.io/serviceentries | get list watch | services
istiod-clusterrole-istio-system | networking.istio.io/workloadentries | get list watch | workloads
istiod-clusterrole-istio-system | gateway.networking.k8s.io/gateways | get list watch | waypoints
istiod-clusterrole-istio-system | gateway.networking.k8s.io/gatewayclasses | get list watch | waypoints
istiod-clusterrole-istio-system | gateway.networking.k8s.io/httproutes | get list watch | routes of waypoints
istiod-clusterrole-istio-system | gateway.networking.k8s.io/grpcroutes | get list watch | routes of waypoints
istiod-clusterrole-istio-system | gateway.networking.k8s.io/tlsroutes | get list watch | routes of waypoints
istiod-clusterrole-istio-system | gateway.networking.k8s.io/tcproutes | get list watch | routes of waypoints
istiod-clusterrole-istio-system | gateway.networking.k8s.io/backendtlspolicies | get list watch | TLS from waypoints
istiod-clusterrole-istio-system | gateway.networking.x-k8s.io/xbackendtrafficpolicies | get list watch | retries of waypoints
istiod-clusterrole-istio-system | /configmaps | get list watch | roots that BackendTLSPolicies name
istiod-clusterrole-istio-system | apiextensions.k8s.io/customresourcedefinitions | get list watch | which kinds there are
istiod-clusterrole-istio-system | authentication.k8s.io/tokenreviews | create | who asks for a certificate
istiod-clusterrole-istio-system | /services/status | get patch | conditions
istiod-clusterrole-istio-system | networking.istio.io/serviceentries/status | get patch | conditions, addresses
istiod-clusterrole-istio-system | networking.istio.io/workloadentries/status | get patch | conditions
istiod-clusterrole-istio-system | security.istio.io/authorizationpolicies/status | get patch | conditions
istiod-clusterrole-istio-system | security.istio.io/peerauthentications/status | get patch | conditions
istiod-clusterrole-istio-system | gateway.networking.k8s.io/httproutes/status | get patch | parents
istiod-clusterrole-istio-system | gateway.networking.k8s.io/grpcroutes/status | get patch | parents
istiod-clusterrole-istio-system | gateway.networking.k8s.io/tlsroutes/status | get patch | parents
istiod-clusterrole-istio-system | gateway.networking.k8s.io/tcproutes/status | get patch | parents
istiod-clusterrole-istio-system | gateway.networking.k8s.io/backendtlspolicies/status | get patch | ancestors
istiod-clusterrole-istio-system | gateway.networking.x-k8s.io/xbackendtrafficpolicies/status | get patch | ancestors
istiod-clusterrole-istio-system | security.istio.io/requestauthentications/status | get patch | conditions
istiod-clusterrole-istio-system | networking.istio.io/virtualservices/status | get patch | conditions
istiod-clusterrole-istio-system | networking.istio.io/destinationrules/status | get patch | conditions
istiod-clusterrole-istio-system | networking.istio.io/envoyfilters/status | get patch | conditions
istiod-clusterrole-istio-system | telemetry.istio.io/telemetries/status | get patch | conditions
istiod-clusterrole-istio-system | extensions.istio.io/wasmplugins/status | get patch | conditions
istiod-clusterrole-istio-system | /configmaps | create | the root certificate in each namespace; has no name yet
istiod-clusterrole-istio-system | /configmaps:istio-ca-root-cert,istio-ca-crl | get list watch patch | the root certificate, and what is revoked, in each namespace
istiod-clusterrole-istio-system | admissionregistration.k8s.io/validatingwebhookconfigurations | get list watch | ours
istiod-clusterrole-istio-system | admissionregistration.k8s.io/mutatingwebhookconfigurations | get list watch | revisions' tags
istiod-clusterrole-istio-system | admissionregistration.k8s.io/validatingwebhookconfigurations:istio-validator-istio-system,istiod-default-validator | patch | caBundle, failurePolicy
istiod-gateway-controller-istio-system | gateway.networking.k8s.io/gateways | patch | the version of the controller
istiod-gateway-controller-istio-system | gateway.networking.k8s.io/gatewayclasses | create | our classes
istiod-gateway-controller-istio-system | gateway.networking.k8s.io/gateways/status | patch | conditions, addresses
istiod-gateway-controller-istio-system | gateway.networking.k8s.io/gatewayclasses/status | patch | Accepted
istiod-gateway-controller-istio-system | /services | get list watch create patch | a waypoint's
istiod-gateway-controller-istio-system | /serviceaccounts | get list watch create patch | a waypoint's
istiod-gateway-controller-istio-system | apps/deployments | get list watch create patch | a waypoint's; its own, which the lease ends with
istiod-gateway-controller-istio-system | autoscaling/horizontalpodautoscalers | get list watch create patch delete | a waypoint's, where asked for
istiod-gateway-controller-istio-system | policy/poddisruptionbudgets | get list watch create patch delete | a waypoint's, where asked for
istiod-gateway-controller-istio-system | /configmaps | get | a Gateway's parameters
istiod | /secrets | create | the authority's first keys; has no name yet
istiod | /secrets:istio-ca-secret | get list watch update | the authority's keys
istiod | /configmaps | list watch | what is laid over a class's waypoints
istiod | coordination.k8s.io/leases | create | the leader's; has no name yet
istiod | coordination.k8s.io/leases:leyline-leader | get update | the leader's
istiod | /configmaps:leyline-token-keys | get patch | keys of tokens that were fetched
istiod | networking.istio.io/serviceentries | create | a dry run that the webhook must refuse
istio-cni | /pods | get list watch | whom to enrol
istio-cni | /namespaces | get list watch | whom to enrol
istio-cni-ambient | /pods/status | patch | the annotation of redirection
istio-cni | apps/daemonsets:istio-cni-node | get | upgrade or uninstall
leyline-leave | apps/daemonsets:istio-cni-node | get delete | uninstall
leyline-leave | /pods | list | uninstall: whether the agents have ended
";

/// Role, what, verbs.
type Right = (String, String, String);

fn reasoned() -> BTreeSet<Right> {
    let lines = RIGHTS.lines().filter(|line| !line.is_empty());
    let rights = lines.map(|line| {
        let fields: Vec<_> = line.split(" | ").collect();
        let [role, what, verbs, reason] = fields[..] else {
            panic!("{line}: four fields");
        };
        assert!(!reason.is_empty(), "{line}");
        (role.to_owned(), what.to_owned(), verbs.to_owned())
    });
    rights.collect()
}

fn texts(value: &Value) -> Vec<&str> {
    let items = value.as_array().into_iter().flatten();
    items.filter_map(Value::as_str).collect()
}

fn given() -> BTreeSet<Right> {
    let mut given = BTreeSet::new();
    for role in objects(&[]) {
        let name = called(&role);
        let (kind, name) = name.split_once('/').expect("kind and name");
        if !["Role", "ClusterRole"].contains(&kind) {
            continue;
        }
        for rule in role["rules"].as_array().expect("a role has rules") {
            let names = texts(&rule["resourceNames"]).join(",");
            let names = if names.is_empty() {
                names
            } else {
                format!(":{names}")
            };
            for group in texts(&rule["apiGroups"]) {
                for resource in texts(&rule["resources"]) {
                    let what = format!("{group}/{resource}{names}");
                    given.insert((name.to_owned(), what, texts(&rule["verbs"]).join(" ")));
                }
            }
        }
    }
    given
}

#[test]
fn every_right_has_its_reason() {
    let (given, reasoned) = (given(), reasoned());
    let unreasoned: Vec<_> = given.difference(&reasoned).collect();
    assert!(
        unreasoned.is_empty(),
        "given without a reason: {unreasoned:#?}"
    );
    let not_given: Vec<_> = reasoned.difference(&given).collect();
    assert!(not_given.is_empty(), "not given: {not_given:#?}");
}

#[test]
fn nothing_may_be_everything() {
    for (role, what, verbs) in given() {
        assert!(
            !verbs.contains('*') && !what.contains('*'),
            "{role}: {what}"
        );
        let key = what.starts_with("/secrets") && verbs != "create";
        assert!(
            !key || what.contains(':'),
            "{role} reads others' keys: {what}"
        );
    }
}
