//! Goldens: `testdata/gateway/<case>.in.yaml` holds a Gateway, its namespace and its ConfigMaps, `<case>.out.json` what it
//! comes to (the objects themselves for `deployed-*`). `LEYLINE_REGENERATE=1 cargo test -p leyline-controlplane gateways_come_to` writes the outputs anew.

use std::{collections::BTreeMap, env, fs, path::Path};

use k8s_openapi::api::core::v1::ConfigMap;
use net::report::Chain;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::{
    Args, Checked, Deployed, Mesh, class,
    plan::{self, Mode, Revisions, Surroundings},
    status::{self, Applied, Deployment, Status},
};
use crate::{
    crd::Gateway,
    output::{Condition, Truth},
    source::{
        read::read,
        tree::{Node, parse},
    },
};

#[derive(clap::Parser)]
struct Flags {
    #[command(flatten)]
    args: Args,
}

fn settings(flags: &[&str]) -> Deployed {
    let flags = std::iter::once("x").chain(flags.iter().copied());
    let Flags { args } = clap::Parser::parse_from(flags);
    let mesh = Mesh {
        revision: "default".into(),
        system_namespace: "istio-system".into(),
        cluster_domain: "cluster.local".into(),
        cluster_id: "Kubernetes".into(),
        trust_domain: "cluster.local".into(),
        network: String::new(),
    };
    Checked::new(&args).unwrap().of(mesh)
}

fn revisions() -> Revisions {
    Revisions {
        own: "default".into(),
        default: true,
        tags: [("prod".to_owned(), "default".to_owned())].into(),
    }
}

fn typed<T: DeserializeOwned>(node: &Node) -> T {
    let (value, faults) = read(node);
    assert!(faults.is_empty(), "{faults:?}");
    value.unwrap()
}

/// What a case holds.
struct Case {
    settings: Deployed,
    gateway: Gateway,
    around: Surroundings,
    ready: bool,
}

impl Case {
    fn read(text: &str) -> Self {
        let first = text.lines().next().unwrap_or_default();
        let flags = first.strip_prefix("# flags:").unwrap_or_default();
        let mut case = Self {
            settings: settings(&flags.split_whitespace().collect::<Vec<_>>()),
            gateway: Gateway::default(),
            around: Surroundings::default(),
            ready: true,
        };
        for node in parse(text).unwrap() {
            case.take(&node);
        }
        case
    }

    fn take(&mut self, node: &Node) {
        match node.field("kind").and_then(|kind| kind.text()) {
            Some("Gateway") => self.gateway = typed(node),
            Some("Namespace") => {
                let namespace: k8s_openapi::api::core::v1::Namespace = typed(node);
                self.around.namespace_labels = namespace.metadata.labels.unwrap_or_default();
                let network = self
                    .around
                    .namespace_labels
                    .get("topology.istio.io/network");
                self.around.network = network.cloned().unwrap_or_default();
            }
            Some("ConfigMap") => {
                let map: ConfigMap = typed(node);
                match map.metadata.namespace.as_deref() {
                    Some("istio-system") => self.around.defaults = Some(map),
                    _ => self.around.parameters = Some(map),
                }
            }
            other => panic!("a case holds no {other:?}"),
        }
    }

    /// With `whole`, also what the objects are, not only which.
    fn outcome(&self, whole: bool) -> Value {
        let controller = match self.gateway.spec.gateway_class_name.as_str() {
            "leyline-east-west" => class::EAST_WEST_CONTROLLER,
            "istio-remote" => class::UNMANAGED_CONTROLLER,
            "istio-waypoint" => "istio.io/mesh-controller",
            _ => class::WAYPOINT_CONTROLLER,
        };
        let Some(role) = class::role(&self.settings, controller) else {
            return json!("the class is somebody else's");
        };
        let mode = plan::mode(
            &revisions(),
            &self.gateway,
            role,
            &self.around.namespace_labels,
        );
        if mode == Mode::Foreign {
            return json!("the Gateway is somebody else's");
        }
        let mut made = BTreeMap::new();
        let deployment = match mode {
            Mode::Manual => Deployment::Manual,
            _ => match plan::objects(&self.settings, &self.gateway, role, &self.around) {
                Err(error) => Deployment::BadParameters(Chain(&error).to_string()),
                Ok(objects) => {
                    let shown = |object: Value| if whole { object } else { json!("made") };
                    let parts = objects.0.into_iter();
                    made = parts
                        .map(|(part, object)| (part.key(), shown(object)))
                        .collect();
                    Deployment::Applied(Applied {
                        service: plan_names(&self.gateway),
                        addresses: vec!["10.96.0.7".into(), "fd00:96::7".into()],
                        ready: self.ready && !made.is_empty(),
                    })
                }
            },
        };
        let told = status::told_addresses(&self.gateway);
        let status = Status::new(&self.settings, &self.gateway, role, &deployment, &told);
        json!({"objects": made, "status": {
            "conditions": lines(&status.conditions),
            "listeners": status.listeners.iter().map(|(name, list)| (name.clone(), json!(lines(list))))
                .collect::<serde_json::Map<_, _>>(),
            "addresses": status.addresses.iter().map(|(kind, value)| format!("{kind} {value}")).collect::<Vec<_>>(),
        }})
    }
}

fn plan_names(gateway: &Gateway) -> String {
    super::template::Names::new(gateway).objects
}

fn lines(conditions: &[Condition]) -> Vec<String> {
    let line = |c: &Condition| format!("{}={:?} {}: {}", c.type_, c.status, c.reason, c.message);
    conditions.iter().map(line).collect()
}

#[test]
fn gateways_come_to_what_the_goldens_say() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata/gateway");
    let regenerate = env::var_os("LEYLINE_REGENERATE").is_some();
    let mut wrong = Vec::new();
    let mut count = 0;
    for entry in fs::read_dir(&folder).unwrap() {
        let input = entry.unwrap().path();
        let name = input.file_name().unwrap().to_str().unwrap();
        let Some(case) = name.strip_suffix(".in.yaml") else {
            continue;
        };
        count += 1;
        let outcome = Case::read(&fs::read_to_string(&input).unwrap());
        let outcome = outcome.outcome(case.starts_with("deployed"));
        let found = serde_json::to_string_pretty(&outcome).unwrap() + "\n";
        let output = folder.join(format!("{case}.out.json"));
        if regenerate {
            fs::write(&output, &found).unwrap();
        } else if fs::read_to_string(&output).unwrap_or_default() != found {
            wrong.push(format!("{case}, now:\n{found}"));
        }
    }
    assert!(count >= 10, "the goldens are missing: {count} cases");
    assert!(wrong.is_empty(), "not as in testdata: {}", wrong.join("\n"));
}

#[test]
fn classes_follow_the_settings_and_name_our_controller() {
    let names = |flags: &[&str]| {
        let made = class::made(&settings(flags)).into_iter();
        made.map(|class| format!("{} {}", class.name, class.controller))
            .collect::<Vec<_>>()
    };
    assert_eq!(
        names(&[]),
        ["leyline-waypoint leyline.dev/waypoint-controller"]
    );
    assert_eq!(
        names(&["--istio-classes=true", "--multi-network=true"]),
        [
            "leyline-waypoint leyline.dev/waypoint-controller",
            "istio-waypoint leyline.dev/waypoint-controller",
            "leyline-east-west leyline.dev/east-west-controller",
            "istio-remote istio.io/unmanaged-gateway",
            "istio-east-west leyline.dev/east-west-controller",
        ]
    );
}

#[test]
fn what_the_chart_does_not_set_is_nothing_and_what_is_unknown_is_refused() {
    let read = |waypoint: &str| {
        let waypoint = waypoint.to_owned();
        Checked::new(&Args {
            waypoint,
            ..Args::default()
        })
    };
    assert_eq!(read("null").unwrap().pods, read("").unwrap().pods);
    let problem = read("{\"resource\": {}}").unwrap_err();
    assert!(problem.contains("unknown field `resource`"), "{problem}");
}

#[test]
fn classes_fit_their_schema() {
    for class in class::made(&settings(&["--istio-classes=true", "--multi-network=true"])) {
        assert!(class.description.len() <= 64, "{}", class.description);
    }
}

#[test]
fn classes_of_istio_are_served_only_where_the_user_says_so() {
    let role = |flags: &[&str]| class::role(&settings(flags), "istio.io/mesh-controller");
    assert_eq!(role(&[]), None);
    assert_eq!(role(&["--istio-classes=true"]), Some(class::Role::Waypoint));
}

#[test]
fn revisions_go_by_the_gateway_then_its_namespace_then_the_default() {
    let labels = |revision: &str| -> BTreeMap<String, String> {
        match revision {
            "" => BTreeMap::new(),
            _ => [("istio.io/rev".to_owned(), revision.to_owned())].into(),
        }
    };
    let canary = Revisions {
        own: "canary".into(),
        default: false,
        tags: [("next".to_owned(), "canary".to_owned())].into(),
    };
    let table = [
        ("", "", true, false),
        ("canary", "", false, true),
        ("", "canary", false, true),
        ("next", "", false, true),
        ("prod", "canary", true, false),
        ("other", "", false, false),
    ];
    for (gateway, namespace, default, of_canary) in table {
        let asked = (labels(gateway), labels(namespace));
        assert_eq!(
            revisions().owns(&asked.0, &asked.1),
            default,
            "{gateway:?} {namespace:?}"
        );
        assert_eq!(
            canary.owns(&asked.0, &asked.1),
            of_canary,
            "{gateway:?} {namespace:?}"
        );
    }
}

fn waypoint() -> Gateway {
    let text = "
        {metadata: {name: w, namespace: a, generation: 3}, spec: {gatewayClassName: leyline-waypoint,
         listeners: [{name: mesh, port: 15008, protocol: HBONE}]}}";
    typed(&parse(text).unwrap()[0])
}

fn status_of(ready: bool, told: &[(&'static str, String)]) -> Status {
    let applied = Applied {
        service: "w".into(),
        addresses: vec!["10.96.0.7".into()],
        ready,
    };
    Status::new(
        &settings(&[]),
        &waypoint(),
        class::Role::Waypoint,
        &Deployment::Applied(applied),
        told,
    )
}

#[test]
fn addresses_are_told_with_the_first_ready_pod_and_stay_without_one() {
    let programmed = |status: &Status| (status.conditions[1].status, status.conditions[1].reason);
    let waiting = status_of(false, &[]);
    assert_eq!(waiting.addresses, []);
    assert_eq!(programmed(&waiting), (Truth::False, "AddressNotAssigned"));
    let serving = status_of(true, &[]);
    assert_eq!(
        serving.addresses,
        [
            ("Hostname", "w.a.svc.cluster.local".to_owned()),
            ("IPAddress", "10.96.0.7".to_owned())
        ]
    );
    assert_eq!(programmed(&serving), (Truth::True, "Programmed"));
    let again_without = status_of(false, &serving.addresses);
    assert_eq!(again_without.addresses, serving.addresses);
    assert_eq!(programmed(&again_without), (Truth::False, "Pending"));
}

#[test]
fn an_annotation_that_is_left_out_is_told_in_the_status() {
    let mut gateway = waypoint();
    let annotations = gateway.metadata.annotations.get_or_insert_default();
    let key = "sidecar.istio.io/statsHistogramBuckets";
    annotations.insert(key.into(), r#"{"istiocustom": [2, 1]}"#.into());
    let deployment = Deployment::Applied(Applied::default());
    let role = class::Role::Waypoint;
    let status = Status::new(&settings(&[]), &gateway, role, &deployment, &[]);
    let accepted = &status.conditions[0];
    assert_eq!(accepted.status, Truth::True);
    let told = format!("; {key}: istiocustom: [2,1] are not");
    assert!(accepted.message.contains(&told), "{accepted:?}");
}

#[test]
fn a_status_that_says_it_already_is_not_written_again() {
    let status = status_of(true, &[]);
    let first = status::written(&status, &json!({}), 3, "2026-01-01T00:00:00Z").unwrap();
    assert_eq!(
        status::written(&status, &first, 3, "2026-01-02T00:00:00Z"),
        None
    );
    // Others' conditions are theirs.
    let mut shared = first.clone();
    shared["conditions"]
        .as_array_mut()
        .unwrap()
        .push(json!({"type": "example.com/Other", "status": "True"}));
    assert_eq!(
        status::written(&status, &shared, 3, "2026-01-02T00:00:00Z"),
        None
    );
    // A wiped status is written again, a newer generation is observed, and what did not change keeps its time.
    assert!(status::written(&status, &json!({}), 3, "2026-01-02T00:00:00Z").is_some());
    let newer = status::written(&status, &first, 4, "2026-01-02T00:00:00Z").unwrap();
    assert_eq!(newer["conditions"][0]["observedGeneration"], 4);
    assert_eq!(
        newer["conditions"][0]["lastTransitionTime"],
        "2026-01-01T00:00:00Z"
    );
    let unready = status_of(false, &status.addresses);
    let unready = status::written(&unready, &first, 3, "2026-01-03T00:00:00Z").unwrap();
    assert_eq!(
        unready["conditions"][1]["lastTransitionTime"],
        "2026-01-03T00:00:00Z"
    );
    assert_eq!(unready["addresses"], first["addresses"]);
}
