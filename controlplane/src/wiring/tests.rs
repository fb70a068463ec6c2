use std::net::SocketAddr;

use mesh::{
    authorize::{AuthorizationFacts, authorize},
    identity::Identity,
    names::WorkloadUid,
    view::{MeshView, Resource as Checked, Update},
};
use prost::Message;
use proto::{security::Authorization, workload as wire};

use super::*;
use crate::object::read_object;

const NAMESPACES: usize = 100;
const PODS: usize = 10_000;

struct Mesh {
    wiring: Wiring,
}

impl Mesh {
    /// Ten thousand pods in a hundred namespaces, one in ten of them a `web`.
    fn large() -> Self {
        let mesh = Self {
            wiring: Wiring::new(Settings::default(), OfPods::Speak),
        };
        for number in 0..PODS {
            mesh.set(&pod(number, ""));
        }
        for namespace in 0..NAMESPACES {
            mesh.set(&format!(
                "{{apiVersion: v1, kind: Service, metadata: {{name: web, namespace: n{namespace}}}, \
                 spec: {{clusterIP: 10.96.0.{namespace}, selector: {{app: web}}, ports: [{{port: 80}}]}}}}"
            ));
        }
        mesh
    }

    fn set(&self, text: &str) {
        let document = crate::source::tree::parse(text).unwrap().remove(0);
        let field = |key: &str| document.field(key).unwrap().text().unwrap();
        let kind = Kind::of(field("apiVersion"), field("kind")).unwrap();
        let (object, faults) = read_object(kind, &document);
        assert_eq!(faults, [], "{text}");
        let object = object.unwrap();
        let reference = reference(kind, &object.meta().name);
        let sourced = Sourced {
            object,
            faults: Vec::new(),
        };
        self.wiring.set(&reference, Some(sourced));
    }

    /// Applies a change; answers with the pods computed for it, and the resources that came of it.
    fn change(&mut self, text: &str) -> (u64, Vec<String>) {
        let before = self.wiring.runs["pods"].count();
        self.set(text);
        self.wiring.settle();
        let changed = self.wiring.resources.take();
        let computed = self.wiring.runs["pods"].count() - before;
        (
            computed,
            changed
                .into_iter()
                .map(|(key, _)| key.name.to_string())
                .collect(),
        )
    }
}

fn pod(number: usize, extra: &str) -> String {
    let app = if (number / NAMESPACES).is_multiple_of(10) {
        "web"
    } else {
        "other"
    };
    let (namespace, node) = (number % NAMESPACES, number % 50);
    format!(
        "{{apiVersion: v1, kind: Pod, metadata: {{name: p{number}, namespace: n{namespace}, labels: {{app: {app}}}{extra}}}, \
         spec: {{nodeName: node{node}, containers: []}}, \
         status: {{phase: Running, podIP: 10.0.{}.{}}}}}",
        number / 250,
        number % 250
    )
}

#[test]
fn a_change_among_ten_thousand_pods_costs_what_it_affects() {
    let mut mesh = Mesh::large();
    mesh.wiring.settle();
    assert_eq!(
        mesh.wiring.runs["pods"].count(),
        PODS as u64,
        "each pod once"
    );
    assert_eq!(mesh.wiring.resources.take().len(), PODS + NAMESPACES);

    let (computed, changed) = mesh.change(&pod(7, ", annotations: {istio.io/note: x}"));
    assert_eq!(
        (computed, changed.len()),
        (1, 0),
        "an annotation that alters nothing"
    );
    let (computed, changed) = mesh.change(&pod(7, ", annotations: {example.com/note: x}"));
    assert_eq!(
        (computed, changed.len()),
        (1, 0),
        "the earlier annotation is gone again"
    );
    let (computed, changed) = mesh.change(&pod(7, ", annotations: {example.com/note: y}"));
    assert_eq!(
        (computed, changed.len()),
        (0, 0),
        "an annotation that is nobody's business"
    );
    let (computed, changed) = mesh.change(&pod(
        7,
        ", annotations: {ambient.istio.io/redirection: enabled}",
    ));
    assert_eq!(
        (computed, changed),
        (1, vec!["Kubernetes//Pod/n7/p7".to_owned()])
    );

    let service = "{apiVersion: v1, kind: Service, metadata: {name: more, namespace: n7}, \
                   spec: {clusterIP: 10.97.0.1, selector: {app: web}, ports: [{port: 80}]}}";
    let (computed, changed) = mesh.change(service);
    assert_eq!(
        (computed, changed.len()),
        (10, 11),
        "the ten pods it selects, and itself"
    );

    let policy = "{apiVersion: security.istio.io/v1, kind: AuthorizationPolicy, metadata: {name: deny, namespace: n7}, \
                  spec: {selector: {matchLabels: {app: web}}, action: DENY, rules: [{}]}}";
    let (computed, changed) = mesh.change(policy);
    assert_eq!((computed, changed.len()), (10, 11));
    let (computed, changed) = mesh.change(&policy.replace(
        "rules: [{}]",
        "rules: [{to: [{operation: {ports: ['80']}}]}]",
    ));
    assert_eq!(
        changed,
        ["n7/deny"],
        "the rules of a policy are not the pods' business"
    );
    assert_eq!(computed, 10, "they look, and find nothing new");

    let (computed, changed) = mesh.change("{apiVersion: v1, kind: Node, metadata: {name: node3, labels: {topology.kubernetes.io/zone: z}}}");
    assert_eq!(
        (computed, changed.len()),
        (200, 200),
        "the pods on that node"
    );

    let (computed, _) = mesh.change("{apiVersion: v1, kind: Namespace, metadata: {name: n9, labels: {istio.io/use-waypoint: w}}}");
    assert_eq!(computed, 100, "the pods of that namespace");
}

/// What node tunnels decide on what was computed.
struct Tunnel {
    view: MeshView,
}

impl Tunnel {
    fn of(wiring: &mut Wiring) -> Self {
        wiring.settle();
        let mut view = MeshView::default();
        let resource = |resource: &Resource| match resource.type_url {
            proto::ADDRESS_TYPE_URL => {
                Checked::try_from(wire::Address::decode(&*resource.body).unwrap()).unwrap()
            }
            _ => Checked::Policy(
                Authorization::decode(&*resource.body)
                    .unwrap()
                    .try_into()
                    .unwrap(),
            ),
        };
        let changed = wiring.resources.take();
        let upserts = changed
            .iter()
            .filter_map(|(_, found)| found.as_deref())
            .map(resource)
            .collect();
        view.apply(Update {
            upserts,
            removals: Vec::new(),
        });
        Self { view }
    }

    /// Whether the pod takes a connection on `port` from `peer` (none: plaintext).
    fn takes(&self, pod: &str, peer: Option<&str>, port: u16) -> bool {
        let workload = self.view.workload(&WorkloadUid(pod.into())).expect(pod);
        let peer = peer.map(|peer| peer.parse::<Identity>().unwrap());
        let address = |port| SocketAddr::from(([10, 0, 0, 1], port));
        let facts = AuthorizationFacts::new(peer, address(40_000), address(port));
        authorize(&self.view, workload, &facts).decision.is_allow()
    }
}

const MODES: [Option<&str>; 5] = [
    None,
    Some("UNSET"),
    Some("DISABLE"),
    Some("PERMISSIVE"),
    Some("STRICT"),
];

fn peer_authentication(
    namespace: &str,
    selector: &str,
    mode: Option<&str>,
    port: Option<&str>,
) -> String {
    let mode = mode
        .map(|mode| format!("mtls: {{mode: {mode}}}, "))
        .unwrap_or_default();
    let port = port
        .map(|mode| format!("portLevelMtls: {{9090: {{mode: {mode}}}}}"))
        .unwrap_or_default();
    format!(
        "{{apiVersion: security.istio.io/v1, kind: PeerAuthentication, \
         metadata: {{name: p{}, namespace: {namespace}}}, spec: {{{selector}{mode}{port}}}}}",
        selector.len()
    )
}

/// Kubernetes' words for it: the nearest mode that is set counts.
fn refuses_plaintext(modes: &[Option<&str>]) -> bool {
    let nearest = modes.iter().flatten().find(|mode| **mode != "UNSET");
    nearest == Some(&"STRICT")
}

#[test]
fn every_combination_of_peer_authentications_is_enforced_as_the_nearest_mode_says() {
    let some = |mode: Option<&'static str>| mode.map(|mode| (mode, true));
    let mut combinations = 0;
    for (mesh, namespace) in MODES
        .iter()
        .flat_map(|mesh| MODES.map(|namespace| (*mesh, namespace)))
    {
        for (workload, port) in MODES
            .iter()
            .flat_map(|workload| MODES.map(|port| (*workload, port)))
        {
            let mut wiring = Mesh {
                wiring: Wiring::new(Settings::default(), OfPods::Speak),
            };
            wiring.set(&pod(0, ""));
            // A level without a mode has no object; but for the workload's, which may have a port alone.
            for (name, level) in [("istio-system", some(mesh)), ("n0", some(namespace))] {
                if let Some((mode, _)) = level {
                    wiring.set(&peer_authentication(name, "", Some(mode), None));
                }
            }
            if workload.is_some() || port.is_some() {
                let selector = "selector: {matchLabels: {app: web}}, ";
                wiring.set(&peer_authentication("n0", selector, workload, port));
            }
            let tunnel = Tunnel::of(&mut wiring.wiring);
            let case = format!(
                "mesh {mesh:?} namespace {namespace:?} workload {workload:?} port {port:?}"
            );
            let pod = "Kubernetes//Pod/n0/p0";
            let others = refuses_plaintext(&[workload, namespace, mesh]);
            let exception = refuses_plaintext(&[port, workload, namespace, mesh]);
            assert_eq!(tunnel.takes(pod, None, 80), !others, "{case}: other ports");
            assert_eq!(
                tunnel.takes(pod, None, 9090),
                !exception,
                "{case}: the port"
            );
            let peer = Some("spiffe://cluster.local/ns/b/sa/c");
            assert!(
                tunnel.takes(pod, peer, 80) && tunnel.takes(pod, peer, 9090),
                "{case}: a proven peer"
            );
            combinations += 1;
        }
    }
    assert_eq!(combinations, 625);
}

/// A part of a rule, and what it says of a connection; `None`: that is HTTP's business.
type Part = (&'static str, fn(namespace: &str, port: u16) -> Option<bool>);

const OPERATIONS: [Part; 4] = [
    ("ports: ['80']", |_, port| Some(port == 80)),
    ("notPorts: ['80']", |_, port| Some(port != 80)),
    ("methods: [GET]", |_, _| None),
    ("methods: [GET], ports: ['80']", |_, port| {
        if port == 80 { None } else { Some(false) }
    }),
];

const SOURCES: [Part; 5] = [
    ("namespaces: [b]", |namespace, _| Some(namespace == "b")),
    ("requestPrincipals: ['*']", |_, _| None),
    (
        "namespaces: [b], remoteIpBlocks: [10.0.0.0/8]",
        |namespace, _| {
            if namespace == "b" { None } else { Some(false) }
        },
    ),
    (
        "principals: ['*/sa/c'], trustDomains: [cluster.local]",
        |_, _| Some(true),
    ),
    (
        "notNamespaces: [b], trustDomains: ['*.example']",
        |namespace, _| {
            if namespace == "b" { Some(false) } else { None }
        },
    ),
];

/// `any` of the parts, where the absence of parts is true; `unknown` stands for what HTTP would say.
fn any(parts: &[Part], unknown: bool, namespace: &str, port: u16) -> bool {
    let says = |part: &Part| (part.1)(namespace, port).unwrap_or(unknown);
    parts.is_empty() || parts.iter().any(says)
}

fn lists<const N: usize>(parts: [Part; N]) -> Vec<Vec<Part>> {
    let ones = parts.iter().map(|part| vec![*part]);
    let pairs = parts
        .iter()
        .flat_map(|one| parts.iter().map(move |other| vec![*one, *other]));
    std::iter::once(Vec::new())
        .chain(ones)
        .chain(pairs)
        .collect()
}

fn rule_text(from: &[Part], to: &[Part]) -> String {
    let list = |field: &str, inner: &str, parts: &[Part]| {
        let items: Vec<String> = parts
            .iter()
            .map(|part| format!("{{{inner}: {{{}}}}}", part.0))
            .collect();
        match items.is_empty() {
            true => String::new(),
            false => format!("{field}: [{}], ", items.join(", ")),
        }
    };
    format!(
        "{{{}{}}}",
        list("from", "source", from),
        list("to", "operation", to)
    )
}

fn judged_by_http(rule: &str) -> bool {
    ["methods", "request", "remote", "*.example"]
        .iter()
        .any(|part| rule.contains(part))
}

#[test]
fn what_http_would_decide_is_refused_and_nothing_else() {
    let mut rules = 0;
    for (from, to) in lists(SOURCES).into_iter().flat_map(|from| {
        lists(OPERATIONS)
            .into_iter()
            .map(move |to| (from.clone(), to))
    }) {
        rules += 1;
        for action in ["ALLOW", "DENY"] {
            let mut mesh = Mesh {
                wiring: Wiring::new(Settings::default(), OfPods::Speak),
            };
            mesh.set(&pod(0, ""));
            let rule = rule_text(&from, &to);
            mesh.set(&format!(
                "{{apiVersion: security.istio.io/v1, kind: AuthorizationPolicy, metadata: {{name: x, namespace: n0}}, \
                 spec: {{selector: {{matchLabels: {{app: web}}}}, action: {action}, rules: [{rule}]}}}}"
            ));
            let tunnel = Tunnel::of(&mut mesh.wiring);
            for (namespace, port) in [("b", 80), ("b", 81), ("d", 80), ("d", 81)] {
                let peer = format!("spiffe://cluster.local/ns/{namespace}/sa/c");
                let taken = tunnel.takes("Kubernetes//Pod/n0/p0", Some(&peer), port);
                let case = format!("{action} {rule} from {namespace} to {port}");
                let matches = |unknown| {
                    any(&from, unknown, namespace, port) && any(&to, unknown, namespace, port)
                };
                match action {
                    // Refused if some request would be.
                    "DENY" => assert_eq!(taken, !matches(true), "{case}"),
                    // Taken only if every request would be; a rule with HTTP parts goes as a whole.
                    _ if judged_by_http(&rule) => assert!(!taken || matches(false), "{case}"),
                    _ => assert_eq!(taken, matches(false), "{case}"),
                }
            }
        }
    }
    assert_eq!(rules, 31 * 21);
}

#[test]
fn a_route_that_changes_is_one_message_to_each_waypoint_that_serves_it() {
    let mut mesh = Mesh {
        wiring: Wiring::new(Settings::default(), OfPods::Speak),
    };
    let route = |name: &str, path: &str| {
        format!(
            "{{apiVersion: gateway.networking.k8s.io/v1, kind: HTTPRoute, metadata: {{name: {name}, namespace: shop}}, \
             spec: {{parentRefs: [{{group: '', kind: Service, name: web}}], rules: [{{matches: [{{path: {{value: {path}}}}}], \
             backendRefs: [{{name: web, port: 80}}, {{name: api, port: 80}}]}}]}}}}"
        )
    };
    mesh.set("{apiVersion: v1, kind: Namespace, metadata: {name: shop, labels: {istio.io/use-waypoint: one}}}");
    for waypoint in ["one", "two"] {
        mesh.set(&format!(
            "{{apiVersion: gateway.networking.k8s.io/v1, kind: Gateway, metadata: {{name: {waypoint}, namespace: shop}}, \
             spec: {{gatewayClassName: leyline-waypoint, listeners: [{{name: mesh, port: 15008, protocol: HBONE}}]}}}}"
        ));
    }
    for (number, service) in ["web", "api", "other"].into_iter().enumerate() {
        mesh.set(&format!(
            "{{apiVersion: v1, kind: Service, metadata: {{name: {service}, namespace: shop}}, \
             spec: {{clusterIP: 10.96.0.{}, ports: [{{name: http, port: 80}}]}}}}",
            number + 1
        ));
    }
    mesh.set(&route("first", "/a"));
    mesh.set(&route("second", "/b"));
    mesh.wiring.settle();
    mesh.wiring.resources.take();

    let before = mesh.wiring.runs["routes"].count();
    let (_, changed) = mesh.change(&route("first", "/c"));
    assert_eq!(changed, ["route/HTTPRoute/shop/first"]);
    assert_eq!(mesh.wiring.runs["routes"].count() - before, 1);

    let api = "{apiVersion: v1, kind: Service, metadata: {name: other, namespace: shop}, \
               spec: {clusterIP: 10.96.0.3, ports: [{name: http, port: 81}]}}";
    let before = mesh.wiring.runs["routes"].count();
    mesh.change(api);
    let computed = mesh.wiring.runs["routes"].count() - before;
    assert_eq!(computed, 0, "a service that no route leads to");
}

/// Tunnels are of one control plane, waypoints of any.
#[test]
fn a_waypoint_of_another_revision_takes_traffic_and_is_told_nothing() {
    let mut mesh = Mesh {
        wiring: Wiring::new(Settings::default(), OfPods::Speak),
    };
    let gateway = |labels: &str| {
        format!(
            "{{apiVersion: gateway.networking.k8s.io/v1, kind: Gateway, metadata: {{name: one, namespace: shop, labels: {{{labels}}}}}, \
             spec: {{gatewayClassName: leyline-waypoint, listeners: [{{name: mesh, port: 15008, protocol: HBONE}}]}}, \
             status: {{addresses: [{{type: IPAddress, value: 10.96.0.9}}]}}}}"
        )
    };
    mesh.set("{apiVersion: v1, kind: Namespace, metadata: {name: shop, labels: {istio.io/use-waypoint: one}}}");
    mesh.set(&gateway("istio.io/rev: canary"));
    mesh.set(
        "{apiVersion: v1, kind: Pod, metadata: {name: one-1, namespace: shop, labels: {gateway.networking.k8s.io/gateway-name: one, \
         gateway.istio.io/managed: istio.io-mesh-controller}}, spec: {nodeName: n, serviceAccountName: one, containers: []}, \
         status: {phase: Running, podIP: 10.0.0.9}}",
    );
    let of_gateway = |mesh: &Mesh| {
        let told = mesh.wiring.resources.take();
        let scoped = told.iter().filter(|(key, _)| key.scope.is_some());
        scoped
            .map(|(key, _)| key.name.to_string())
            .collect::<Vec<_>>()
    };
    mesh.set(
        "{apiVersion: v1, kind: Service, metadata: {name: web, namespace: shop}, \
         spec: {clusterIP: 10.96.0.1, ports: [{name: http, port: 80}]}}",
    );
    mesh.wiring.settle();
    let told = mesh.wiring.resources.take();
    let service = told.iter().find(|(key, _)| key.name.contains("shop/web."));
    let body = service.unwrap().1.as_ref().unwrap().body.clone();
    let wire::address::Type::Service(service) =
        wire::Address::decode(body).unwrap().r#type.unwrap()
    else {
        panic!("a service");
    };
    let waypoint = service.waypoint.unwrap().destination.unwrap();
    let wire::gateway_address::Destination::Address(address) = waypoint else {
        panic!("by its address");
    };
    assert_eq!(&address.address[..], [10, 96, 0, 9]);
    let config = told.iter().any(|(key, _)| key.name.starts_with("config"));
    assert!(!config, "its settings are its own control plane's");
    assert!(mesh.wiring.readers.take().is_empty(), "it reads elsewhere");

    // Ours from now on.
    mesh.set(&gateway(""));
    mesh.wiring.settle();
    assert!(
        of_gateway(&mesh)
            .iter()
            .any(|name| name.starts_with("config"))
    );
    assert_eq!(mesh.wiring.readers.take().len(), 1);
}

#[test]
fn a_clusters_way_in_is_told_others_whichever_revision_there_deploys_it() {
    let mut mesh = Mesh {
        wiring: Wiring::new(
            Settings {
                is_remote: true,
                ..Settings::default()
            },
            OfPods::KeepSilent,
        ),
    };
    for (name, revision) in [("ours", "default"), ("canary", "canary")] {
        mesh.set(&format!(
            "{{apiVersion: gateway.networking.k8s.io/v1, kind: Gateway, metadata: {{name: {name}, namespace: mesh, \
             labels: {{topology.istio.io/network: net-east, istio.io/rev: {revision}}}}}, \
             spec: {{gatewayClassName: leyline-east-west, listeners: [{{name: mesh, port: 15008, protocol: HBONE}}]}}, \
             status: {{addresses: [{{type: IPAddress, value: 192.0.2.1}}]}}}}"
        ));
    }
    mesh.wiring.settle();
    let told = mesh.wiring.exports.take();
    let told: Vec<ExportKey> = told.into_iter().map(|(key, _)| key).collect();
    let gateway = |name: &str| ExportKey::Gateway(name.into());
    assert_eq!(told, [gateway("mesh/canary"), gateway("mesh/ours")]);
}
