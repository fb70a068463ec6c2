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
            wiring: Wiring::new(Settings::default()),
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
    let app = if number / NAMESPACES % 10 == 0 {
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
