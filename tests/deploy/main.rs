//! The chart: what it renders, which values it refuses, and what it lets the parts do. Needs helm: `$HELM`, the one that
//! the cluster's rig has built, or the one on PATH; without it every test here fails and says so.
//!
//! `LEYLINE_REGENERATE=1 cargo test -p leyline-tests --test deploy` writes the goldens anew; the difference is what to review.

use std::{
    collections::BTreeSet,
    env, fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use controlplane::source::{read::read, tree::parse};
use serde_json::Value;

mod rights;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn chart() -> PathBuf {
    root().join("deploy/charts/leyline")
}

#[track_caller]
fn helm() -> PathBuf {
    if let Some(given) = env::var_os("HELM") {
        return given.into();
    }
    let target =
        env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from);
    let path = env::var_os("PATH").unwrap_or_default();
    let programs = env::var_os("LEYLINE_CLUSTER_BIN").map(PathBuf::from);
    let mut places = vec![programs.unwrap_or_else(|| target.join("cluster/bin"))];
    places.extend(env::split_paths(&path));
    places
        .into_iter()
        .map(|folder| folder.join("helm"))
        .find(|helm| helm.is_file())
        .expect("helm is missing: the cluster's rig builds it (tests/prepare), or set HELM")
}

/// `helm template`, of a fixed version of Kubernetes, with a namespace and name as the goldens have.
fn template(arguments: &[&str]) -> Output {
    Command::new(helm())
        .args(["template", "leyline"])
        .arg(chart())
        .args(["--namespace", "istio-system", "--kube-version", "1.36.0"])
        .args(arguments)
        .output()
        .expect("run helm")
}

#[track_caller]
fn rendered(arguments: &[&str]) -> String {
    let output = template(arguments);
    assert!(
        output.status.success(),
        "{arguments:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).expect("helm writes UTF-8")
}

/// The objects of a rendered chart.
#[track_caller]
fn objects(arguments: &[&str]) -> Vec<Value> {
    let text = rendered(arguments);
    let documents = parse(&text).expect("helm writes YAML");
    documents
        .iter()
        .map(|node| read(node).0.expect("an object"))
        .collect()
}

/// `Kind/name`.
fn called(object: &Value) -> String {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    format!(
        "{}/{}",
        text(&object["kind"]),
        text(&object["metadata"]["name"])
    )
}

fn names(objects: &[Value]) -> BTreeSet<String> {
    objects.iter().map(called).collect()
}

#[track_caller]
fn find<'o>(objects: &'o [Value], name: &str) -> &'o Value {
    let found = objects.iter().find(|object| called(object) == name);
    found.unwrap_or_else(|| panic!("no {name} in {:?}", names(objects)))
}

/// What each object with pods has its pods made of.
fn pods(objects: &[Value]) -> impl Iterator<Item = (String, &Value)> {
    objects.iter().filter_map(|object| {
        let pod = &object["spec"]["template"]["spec"];
        pod.is_object().then(|| (called(object), pod))
    })
}

#[test]
fn renders_as_reviewed() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy/golden");
    let mut cases = Vec::new();
    for entry in fs::read_dir(&folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        if let Some(case) = name.strip_suffix(".values.yaml") {
            cases.push(case.to_owned());
        }
    }
    assert!(cases.len() >= 5, "{cases:?}");
    for case in cases {
        let values = folder.join(format!("{case}.values.yaml"));
        let text = rendered(&["--values", values.to_str().unwrap()]);
        let golden = folder.join(format!("{case}.yaml"));
        if env::var_os("LEYLINE_REGENERATE").is_some() {
            fs::write(&golden, &text).unwrap();
        }
        assert!(!text.contains("<nil>"), "{case} has a value that is none");
        let kept = fs::read_to_string(&golden).unwrap_or_default();
        let differs = kept
            .lines()
            .zip(text.lines())
            .find(|(kept, now)| kept != now);
        assert!(
            kept == text,
            "{case} renders otherwise: LEYLINE_REGENERATE=1, and review; first: {differs:?}"
        );
    }
}

#[test]
fn refuses_values_that_mean_nothing() {
    // Values as --set takes them; the place that the refusal names.
    let table = [
        ("istiod.replicas=2", "/istiod"),
        ("pilot.autoscaleMn=2", "/pilot"),
        ("globl.hub=x", "globl"),
        ("cni.ambient.ipv6=perhaps", "/cni/ambient/ipv6"),
        (
            "ztunnel.terminationGracePeriodSeconds=0",
            "/ztunnel/terminationGracePeriodSeconds",
        ),
        ("ztunnel.peerCaCrl.enabled=true", "peerCaCrl"),
        (
            "ztunnel.updateStrategy.rollingUpdate.maxSurge=-1",
            "maxSurge",
        ),
        ("global.platform=toaster", "/global/platform"),
        (
            "global.imagePullPolicy=Sometimes",
            "/global/imagePullPolicy",
        ),
        ("global.hub=", "/global/hub"),
        ("revision=Upper", "/revision"),
        ("profile=sidecar", "/profile"),
        ("cni.cniBinDir=opt/cni/bin", "/cni/cniBinDir"),
        (
            "cni.excludeNamespaces=kube-system",
            "/cni/excludeNamespaces",
        ),
        (
            "ztunnel.xdsAddress=http://plain:15010",
            "/ztunnel/xdsAddress",
        ),
        ("global.waypoint.resource.x=1", "/global/waypoint"),
        (
            "istiod.keepaliveMaxServerConnectionAge=half an hour",
            "keepaliveMaxServerConnectionAge",
        ),
        (
            "cni.ambient.enablementSelectors[0].podSelecter.x=1",
            "enablementSelectors/0",
        ),
    ];
    for (value, place) in table {
        let output = template(&["--set", value]);
        let problem = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success(), "{value} is taken");
        assert!(problem.contains(place), "{value}: {problem}");
    }
}

#[test]
fn accepts_values_that_upstreams_scripts_set() {
    let table = [
        "profile=ambient",
        "pilot.autoscaleMin=2,pilot.autoscaleMax=4",
        "global.tag=1.30",
        "cni.resourceQuotas.enabled=true",
        "meshConfig.accessLogFile=/dev/stdout",
        "meshConfig.discoverySelectors[0].matchLabels.mesh=yes",
        "istiod.env.PILOT_ENABLE_IP_AUTOALLOCATE=false",
        "ztunnel.env.SECRET_TTL=5m",
        "global.network=net-1,global.multiCluster.clusterName=one",
        "istiod.pdb.minAvailable=50%",
    ];
    for value in table {
        rendered(&["--set", value]);
    }
}

#[test]
fn pilot_stands_for_istiod() {
    let by = |name: &str| {
        let values = format!("{name}.autoscaleEnabled=false,{name}.replicaCount=3");
        rendered(&["--set", &values])
    };
    assert_eq!(by("pilot"), by("istiod"));
    assert!(by("pilot").contains("replicas: 3"));
}

#[test]
fn two_revisions_share_no_object() {
    let default = objects(&[]);
    let parts = "cni.enabled=false,ztunnel.enabled=false,base.enabled=false";
    let canary = objects(&["--set", &format!("revision=canary,{parts}")]);
    let shared: Vec<_> = names(&default)
        .intersection(&names(&canary))
        .cloned()
        .collect();
    assert!(shared.is_empty(), "{shared:?}");
    let serves = |objects: &[Value]| {
        names(objects).contains("ValidatingWebhookConfiguration/istiod-default-validator")
    };
    assert!(serves(&default) && !serves(&canary));
    let promoted = objects(&[
        "--set",
        &format!("revision=canary,defaultRevision=canary,{parts}"),
    ]);
    assert!(serves(&promoted));
}

#[test]
fn a_service_selects_its_pods_and_no_other_revisions() {
    for revision in ["", "canary"] {
        let objects = objects(&["--set", &format!("revision={revision}")]);
        let suffix = if revision.is_empty() {
            String::new()
        } else {
            format!("-{revision}")
        };
        let selector = &find(&objects, &format!("Service/istiod{suffix}"))["spec"]["selector"];
        let deployment = find(&objects, &format!("Deployment/istiod{suffix}"));
        let labels = &deployment["spec"]["template"]["metadata"]["labels"];
        for (key, value) in selector.as_object().unwrap() {
            assert_eq!(&labels[key], value, "{revision:?}");
        }
        assert_eq!(
            &deployment["spec"]["selector"]["matchLabels"], selector,
            "{revision:?}"
        );
    }
    let canary = objects(&["--set", "revision=canary"]);
    let labels =
        &find(&canary, "Deployment/istiod-canary")["spec"]["template"]["metadata"]["labels"];
    // The default revision's Service selects `istio: pilot`.
    assert_eq!(labels["istio"], "istiod");
}

#[test]
fn a_budget_exists_only_where_a_replica_can_be_spared() {
    let table = [
        ("istiod.autoscaleMin=1", false),
        ("istiod.autoscaleMin=2", true),
        ("istiod.autoscaleEnabled=false,istiod.replicaCount=1", false),
        ("istiod.autoscaleEnabled=false,istiod.replicaCount=2", true),
        (
            "istiod.autoscaleMin=2,global.defaultPodDisruptionBudget.enabled=false",
            false,
        ),
    ];
    for (values, expected) in table {
        let budget = names(&objects(&["--set", values])).contains("PodDisruptionBudget/istiod");
        assert_eq!(budget, expected, "{values}");
    }
}

#[test]
fn a_platform_moves_the_nodes_folders_unless_the_user_does() {
    let paths = |values: &str| -> Vec<String> {
        let objects = objects(&["--set", values]);
        let volumes =
            &find(&objects, "DaemonSet/istio-cni-node")["spec"]["template"]["spec"]["volumes"];
        ["cni-bin-dir", "cni-net-dir", "cni-netns-dir"]
            .iter()
            .map(|name| {
                let volumes = volumes.as_array().unwrap();
                let volume = volumes
                    .iter()
                    .find(|volume| volume["name"] == *name)
                    .unwrap();
                volume["hostPath"]["path"].as_str().unwrap().to_owned()
            })
            .collect()
    };
    let netns = "/var/run/netns";
    assert_eq!(
        paths("global.platform="),
        ["/opt/cni/bin", "/etc/cni/net.d", netns]
    );
    let k3s = "/var/lib/rancher/k3s";
    assert_eq!(
        paths("global.platform=k3s"),
        [
            format!("{k3s}/data/cni"),
            format!("{k3s}/agent/etc/cni/net.d"),
            netns.to_owned()
        ]
    );
    assert_eq!(
        paths("global.platform=k3s,cni.cniBinDir=/mine"),
        [
            "/mine".to_owned(),
            format!("{k3s}/agent/etc/cni/net.d"),
            netns.to_owned()
        ]
    );
    assert_eq!(
        paths("global.platform=minikube")[2],
        "/var/run/docker/netns"
    );
    assert_eq!(paths("global.platform=gke")[0], "/home/kubernetes/bin");
}

#[test]
fn no_part_may_do_more_than_it_needs() {
    // Who, as which user, with which capabilities.
    let table: [(&str, u64, &[&str]); 4] = [
        ("Deployment/istiod", 1337, &[]),
        (
            "DaemonSet/istio-cni-node",
            0,
            &[
                "NET_ADMIN",
                "NET_RAW",
                "SYS_PTRACE",
                "SYS_ADMIN",
                "DAC_OVERRIDE",
            ],
        ),
        (
            "DaemonSet/ztunnel",
            0,
            &["NET_ADMIN", "SYS_ADMIN", "NET_RAW"],
        ),
        ("Job/leyline-leave", 1337, &[]),
    ];
    let objects = objects(&[]);
    let seen: Vec<_> = pods(&objects).map(|(name, _)| name).collect();
    assert_eq!(seen.len(), table.len(), "{seen:?}");
    for (name, user, capabilities) in table {
        let pod = &find(&objects, name)["spec"]["template"]["spec"];
        for host in ["hostNetwork", "hostPID", "hostIPC"] {
            assert!(pod[host].is_null(), "{name}: {host}");
        }
        assert_eq!(
            pod["securityContext"]["seccompProfile"]["type"], "RuntimeDefault",
            "{name}"
        );
        for container in pod["containers"].as_array().unwrap() {
            let context = &container["securityContext"];
            assert_eq!(context["readOnlyRootFilesystem"], true, "{name}");
            assert_eq!(context["capabilities"]["drop"][0], "ALL", "{name}");
            let added = context["capabilities"]["add"].as_array();
            let added: Vec<_> = added
                .into_iter()
                .flatten()
                .map(|c| c.as_str().unwrap())
                .collect();
            assert_eq!(added, capabilities, "{name}");
            assert_ne!(context["privileged"], true, "{name}");
            let runs_as = [&context["runAsUser"], &pod["securityContext"]["runAsUser"]];
            assert_eq!(
                runs_as.iter().find_map(|user| user.as_u64()),
                Some(user),
                "{name}"
            );
            if user != 0 {
                assert_eq!(context["allowPrivilegeEscalation"], false, "{name}");
                assert_eq!(pod["securityContext"]["runAsNonRoot"], true, "{name}");
            }
        }
    }
}

#[test]
fn an_upgrade_interrupts_no_node() {
    let objects = objects(&[]);
    let ztunnel = &find(&objects, "DaemonSet/ztunnel")["spec"];
    assert_eq!(ztunnel["updateStrategy"]["rollingUpdate"]["maxSurge"], 1);
    assert_eq!(
        ztunnel["updateStrategy"]["rollingUpdate"]["maxUnavailable"],
        0
    );
    for part in ["DaemonSet/ztunnel", "DaemonSet/istio-cni-node"] {
        let pod = &find(&objects, part)["spec"]["template"]["spec"];
        assert_eq!(pod["priorityClassName"], "system-node-critical", "{part}");
        let effects: BTreeSet<_> = pod["tolerations"]
            .as_array()
            .unwrap()
            .iter()
            .filter(|toleration| toleration["key"].is_null())
            .filter_map(|toleration| toleration["effect"].as_str())
            .collect();
        assert_eq!(effects, ["NoExecute", "NoSchedule"].into(), "{part}");
    }
}

#[test]
fn a_users_variable_stands_in_place_of_the_charts() {
    let table = [
        (
            "istiod.env.CLUSTER_ID=mine",
            "Deployment/istiod",
            "CLUSTER_ID",
            "mine",
        ),
        (
            "ztunnel.env.RUST_LOG=debug",
            "DaemonSet/ztunnel",
            "RUST_LOG",
            "debug",
        ),
        (
            "ztunnel.env.POOL=10000000",
            "DaemonSet/ztunnel",
            "POOL",
            "10000000",
        ),
        (
            "cni.env.NODE_NAME=n",
            "DaemonSet/istio-cni-node",
            "NODE_NAME",
            "n",
        ),
    ];
    for (value, part, name, expected) in table {
        let objects = objects(&["--set", value]);
        let container = &find(&objects, part)["spec"]["template"]["spec"]["containers"][0];
        let variables = container["env"].as_array().unwrap();
        let named: Vec<_> = variables.iter().filter(|v| v["name"] == name).collect();
        // Two of a name are an error to server-side apply.
        assert_eq!(named.len(), 1, "{value}");
        assert_eq!(named[0]["value"], expected, "{value}");
    }
}

#[test]
fn rendering_writes_nothing_that_the_control_plane_owns() {
    for object in objects(&[]) {
        if object["kind"] == "ValidatingWebhookConfiguration" {
            for webhook in object["webhooks"].as_array().unwrap() {
                assert!(webhook["clientConfig"]["caBundle"].is_null());
            }
        }
        if object["kind"] == "Deployment" {
            // They are the autoscaler's.
            assert!(object["spec"]["replicas"].is_null());
        }
    }
}

#[test]
fn definitions_are_installed_when_absent_and_never_deleted() {
    let text = rendered(&[]);
    assert!(
        !text.contains("CustomResourceDefinition"),
        "helm deletes and replaces what templates hold"
    );
    let with = rendered(&["--include-crds"]);
    assert_eq!(with.matches("kind: CustomResourceDefinition").count(), 17);
}
