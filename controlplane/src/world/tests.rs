use std::{fs, path::Path, time::Duration};

use super::*;
use crate::output::{Changes, Truth};

const DEADLINE: Duration = Duration::from_secs(10);

fn write(folder: &Path, name: &str, text: &str) {
    let temporary = folder.join(format!(".{name}.tmp"));
    fs::write(&temporary, text).unwrap();
    fs::rename(temporary, folder.join(name)).unwrap();
}

fn pod(name: &str, ip: &str, extra: &str) -> String {
    format!(
        "apiVersion: v1
kind: Pod
metadata: {{name: {name}, namespace: a, uid: uid-{name}, labels: {{app: web}}{extra}}}
spec: {{nodeName: n1, serviceAccountName: web, containers: []}}
status: {{phase: Running, podIPs: [{{ip: {ip}}}], conditions: [{{type: Ready, status: \"True\"}}]}}
---
"
    )
}

fn deny(rest: &str) -> String {
    format!(
        "apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {{name: deny, namespace: a}}
spec:
  selector: {{matchLabels: {{app: web}}}}
  action: DENY
  rules:
{rest}"
    )
}

const FROM_B: &str = "  - from: [{source: {namespaces: [b]}}]\n";

struct Watched {
    folder: tempfile::TempDir,
    world: World,
    changes: Subscription,
}

fn watched(files: &[(&str, &str)]) -> Watched {
    let folder = tempfile::tempdir().unwrap();
    for (name, text) in files {
        write(folder.path(), name, text);
    }
    let world = World::start(&[folder.path().to_owned()], Settings::default()).unwrap();
    Watched {
        changes: world.subscribe(),
        folder,
        world,
    }
}

impl Watched {
    async fn next(&mut self) -> Changes {
        tokio::time::timeout(DEADLINE, self.changes.next())
            .await
            .expect("a change in time")
    }

    fn write(&self, name: &str, text: &str) {
        write(self.folder.path(), name, text);
    }

    fn remove(&self, name: &str) {
        fs::remove_file(self.folder.path().join(name)).unwrap();
    }

    /// Waits until what there is to say of an object passes.
    #[track_caller]
    fn status(
        &self,
        kind: &str,
        name: &str,
        passes: impl Fn(&ObjectStatus) -> bool,
    ) -> ObjectStatus {
        let end = std::time::Instant::now() + DEADLINE;
        loop {
            let statuses = self.world.statuses();
            let found = statuses
                .iter()
                .find(|s| &*s.kind == kind && &*s.name == name);
            match found {
                Some(status) if passes(status) => return status.clone(),
                _ if std::time::Instant::now() > end => panic!("{kind} {name}: {found:#?}"),
                _ => std::thread::yield_now(),
            }
        }
    }
}

fn names(changes: &Changes) -> (Vec<&str>, Vec<&str>) {
    (
        changes
            .upserts
            .iter()
            .map(|resource| &*resource.name)
            .collect(),
        changes.removals.iter().map(|key| &*key.name).collect(),
    )
}

fn says(status: &ObjectStatus, type_: &str, truth: Truth, reason: &str) -> bool {
    status
        .conditions
        .iter()
        .any(|c| c.type_ == type_ && c.status == truth && c.reason == reason)
}

#[tokio::test]
async fn policies_come_before_the_workloads_that_name_them_and_go_after_them() {
    let mut watched = watched(&[
        ("pods.yaml", &pod("p", "10.0.0.1", "")),
        ("deny.yaml", &deny(FROM_B)),
    ]);
    let first = watched.next().await;
    assert_eq!(names(&first).0, ["a/deny", "Kubernetes//Pod/a/p"]);

    watched.remove("pods.yaml");
    watched.remove("deny.yaml");
    let mut gone = watched.next().await.removals;
    if gone.len() < 2 {
        gone.extend(watched.next().await.removals);
    }
    let gone: Vec<&str> = gone.iter().map(|key| &*key.name).collect();
    assert_eq!(gone, ["Kubernetes//Pod/a/p", "a/deny"]);
}

#[tokio::test]
async fn a_change_that_alters_no_resource_pushes_nothing() {
    let mut watched = watched(&[("p.yaml", &pod("p", "10.0.0.1", ""))]);
    watched.next().await;
    watched.write(
        "p.yaml",
        &pod("p", "10.0.0.1", ", annotations: {istio.io/note: x}"),
    );
    watched.write("q.yaml", &pod("q", "10.0.0.2", ""));
    let changes = watched.next().await;
    assert_eq!(names(&changes), (vec!["Kubernetes//Pod/a/q"], vec![]));
}

#[tokio::test]
async fn a_broken_policy_leaves_the_last_good_state_in_force_and_says_so() {
    let mut watched = watched(&[
        ("pods.yaml", &pod("p", "10.0.0.1", "")),
        ("deny.yaml", &deny(FROM_B)),
    ]);
    watched.next().await;
    watched.write(
        "deny.yaml",
        &deny("  - form: [{source: {namespaces: [b]}}]\n"),
    );
    let status = watched.status("AuthorizationPolicy", "deny", |s| {
        says(s, "Accepted", Truth::False, "Invalid")
    });
    let message = &status
        .conditions
        .iter()
        .find(|c| c.type_ == "Accepted")
        .unwrap()
        .message;
    assert!(
        message.contains("deny.yaml:8:5: AuthorizationPolicy a/deny: spec.rules[0].form: unknown field (did you mean \"from\"?)"),
        "{message}"
    );
    watched.write("deny.yaml", "a: [");
    let status = watched.status("AuthorizationPolicy", "deny", |s| {
        says(s, "Accepted", Truth::False, "FileInvalid")
    });
    assert!(says(&status, "ZtunnelAccepted", Truth::True, "Accepted"));
    watched.status("File", &status.file, |s| {
        says(s, "Parsed", Truth::False, "Invalid")
    });
    assert_eq!(watched.changes.try_next(), None);

    watched.write("deny.yaml", &deny(FROM_B));
    watched.status("AuthorizationPolicy", "deny", |s| {
        says(s, "Accepted", Truth::True, "Accepted")
    });
    assert_eq!(watched.changes.try_next(), None);
}

#[tokio::test]
async fn a_policy_that_was_never_good_refuses_what_it_selects() {
    let mut watched = watched(&[(
        "deny.yaml",
        &deny("  - form: [{source: {namespaces: [b]}}]\n"),
    )]);
    let changes = watched.next().await;
    assert_eq!(names(&changes).0, ["a/deny"]);
    let policy =
        <proto::security::Authorization as prost::Message>::decode(&*changes.upserts[0].body)
            .unwrap();
    assert_eq!(policy.rules, [proto::security::Rule::default()]);
    watched.status("AuthorizationPolicy", "deny", |s| {
        says(s, "ZtunnelAccepted", Truth::False, "Invalid")
    });
}

#[tokio::test]
async fn subfolders_renames_and_direct_writes_are_seen_and_leftovers_are_not() {
    let mut watched = watched(&[]);
    let sub = watched.folder.path().join("x/y");
    fs::create_dir_all(&sub).unwrap();
    fs::write(sub.join("p.yaml"), pod("p", "10.0.0.1", "")).unwrap();
    assert_eq!(names(&watched.next().await).0, ["Kubernetes//Pod/a/p"]);

    for leftover in [".p.yaml.swp", "p.yaml~", "#p.yaml#", ".hidden.yaml", "4913"] {
        fs::write(
            watched.folder.path().join(leftover),
            pod("z", "10.0.0.9", ""),
        )
        .unwrap();
    }
    fs::rename(
        watched.folder.path().join("x"),
        watched.folder.path().join("moved"),
    )
    .unwrap();
    watched.status("Pod", "p", |status| status.file.contains("/moved/"));
    assert_eq!(
        watched.changes.try_next(),
        None,
        "a moved object is the same object"
    );

    fs::remove_dir_all(watched.folder.path().join("moved")).unwrap();
    assert_eq!(names(&watched.next().await).1, ["Kubernetes//Pod/a/p"]);
}

#[tokio::test]
async fn of_two_files_with_one_object_the_first_keeps_it_and_status_names_both() {
    let mut watched = watched(&[("1.yaml", &pod("p", "10.0.0.1", ""))]);
    watched.next().await;
    watched.write("0.yaml", &pod("p", "10.0.0.2", ""));
    let status = watched.status("Pod", "p", |s| says(s, "Unique", Truth::False, "Duplicate"));
    let message = &status
        .conditions
        .iter()
        .find(|c| c.type_ == "Unique")
        .unwrap()
        .message;
    assert!(
        message.contains("1.yaml:1 is in force") && message.contains("0.yaml:1"),
        "{message}"
    );
    assert_eq!(watched.changes.try_next(), None);
    watched.remove("1.yaml");
    let changes = watched.next().await;
    assert_eq!(*changes.upserts[0].aliases, ["/10.0.0.2".into()]);
}

#[tokio::test]
async fn what_a_server_owns_is_merged_over_what_the_user_wrote() {
    let (user, state) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let users = "{apiVersion: v1, kind: Pod, metadata: {name: p, namespace: a, annotations: {x: y}}, spec: {serviceAccountName: mine, containers: []}}";
    let servers = "{apiVersion: v1, kind: Pod, metadata: {name: p, namespace: a, uid: u-1, annotations: {ambient.istio.io/redirection: enabled}}, spec: {serviceAccountName: theirs, nodeName: n1, containers: []}, status: {phase: Running, podIP: 10.0.0.1}}";
    write(user.path(), "p.yaml", users);
    write(state.path(), "p.yaml", servers);
    let folders = [user.path().to_owned(), state.path().to_owned()];
    let world = World::start(&folders, Settings::default()).unwrap();
    let changes = world.subscribe().next().await;
    let address =
        <proto::workload::Address as prost::Message>::decode(&*changes.upserts[0].body).unwrap();
    let Some(proto::workload::address::Type::Workload(workload)) = address.r#type else {
        panic!("a workload");
    };
    assert_eq!(workload.service_account, "mine");
    assert_eq!(workload.node, "n1");
    assert_eq!(
        workload.tunnel_protocol(),
        proto::workload::TunnelProtocol::Hbone
    );
    assert_eq!(&*world.pod_by_uid("u-1").unwrap().name, "p");
    assert!(world.runs_on_node("n1", "a", "mine"));
    assert!(!world.runs_on_node("n1", "a", "theirs"));
    assert!(world.statuses().iter().all(|status| !says(
        status,
        "Unique",
        Truth::False,
        "Duplicate"
    )));
}

#[tokio::test]
async fn a_change_reaches_readers_within_a_tenth_of_a_second() {
    let many: String = (0..500)
        .map(|n| pod(&format!("p{n}"), "10.0.0.1", ""))
        .collect();
    let mut watched = watched(&[("many.yaml", &many)]);
    watched.next().await;
    let mut times = Vec::new();
    for round in 0..100_u32 {
        let started = std::time::Instant::now();
        watched.write("one.yaml", &pod("one", &format!("10.1.0.{round}"), ""));
        watched.next().await;
        times.push(started.elapsed());
    }
    // A slow round may be the machine's, which has others' work to do; what we wait ourselves shows in most.
    times.sort();
    assert!(times[50] < Duration::from_millis(100), "{times:?}");
}
