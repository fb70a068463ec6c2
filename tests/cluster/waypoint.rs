//! A namespace opts in to a waypoint: requests are routed, denied with a reason, survive its restart, and never pass it by.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use rig::{
    Running,
    cluster::bed::{Bed, shared},
    until,
};
use serde_json::Value;

use crate::scene::{Scene, Start, pod};

/// Two versions of a server behind a Service each, and a client.
struct Shop<'a> {
    scene: Scene<'a>,
    bed: &'a Bed,
}

const GATEWAY: &str = "---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: waypoint, labels: {istio.io/waypoint-for: service}}
spec:
  gatewayClassName: leyline-waypoint
  listeners: [{name: mesh, port: 15008, protocol: HBONE}]
";

const USE_WAYPOINT: &str = "istio.io/use-waypoint=waypoint";

impl<'a> Shop<'a> {
    /// The namespace `name`, in the mesh, without a waypoint.
    fn open(bed: &'a Bed, name: &str) -> Result<Self> {
        let scene = Scene::empty(bed, name, Start::InMesh)?;
        let mut yaml = pod("client", bed.node(0), "[leyline, tool, echo, '9000']", "");
        yaml += &pod("intruder", bed.node(0), "[leyline, tool, echo, '9000']", "");
        for version in ["v1", "v2"] {
            yaml += &pod(
                &format!("server-{version}"),
                bed.node(1),
                &format!("[web, serve, '[::]:8080', {version}]"),
                "readinessProbe: {tcpSocket: {port: 8080}, periodSeconds: 1}",
            );
            yaml += &format!(
                "---
apiVersion: v1
kind: Service
metadata: {{name: {version}}}
spec:
  selector: {{app: server-{version}}}
  ports: [{{port: 80, targetPort: 8080, appProtocol: http}}]
"
            );
        }
        scene.apply(&yaml)?;
        let pods = ["client", "intruder", "server-v1", "server-v2"];
        scene.ready(&pods)?;
        scene.joined(&pods)?;
        Ok(Self { scene, bed })
    }

    /// The same, with a waypoint for the whole namespace that serves.
    fn with_waypoint(bed: &'a Bed, name: &str) -> Result<Self> {
        let shop = Self::open(bed, name)?;
        shop.add_waypoint()?;
        Ok(shop)
    }

    fn add_waypoint(&self) -> Result<()> {
        self.scene.apply(GATEWAY)?;
        self.scene.programmed("waypoint")?;
        self.label_namespace(USE_WAYPOINT)?;
        self.bed.eventually("requests pass the waypoint", || {
            let found = self.get("client", "/", &[])?;
            let number = &found["last"]["body"]["headers"]["x-request-id"];
            ensure!(number.is_array(), "{found}");
            Ok(())
        });
        Ok(())
    }

    fn label_namespace(&self, label: &str) -> Result<()> {
        let line = [
            "label",
            "--overwrite",
            "namespace",
            &self.scene.namespace,
            label,
        ];
        self.bed.kube().run(&line).map(drop)
    }

    fn waypoint_log(&self) -> Result<String> {
        let namespace = self.scene.namespace.as_str();
        let line = [
            "-n",
            namespace,
            "logs",
            "deployment/waypoint",
            "--tail=2000",
        ];
        self.bed.kube().run(&line)
    }

    /// What comes of requests from a pod to the service `v1`; an error where one has no answer.
    fn get(&self, from: &str, path: &str, flags: &[&str]) -> Result<Value> {
        let url = format!("http://v1.{}{path}", self.scene.namespace);
        let mut line = vec!["web", "get", &url];
        line.extend(flags);
        let text = self.bed.kube().succeed(&self.scene.pod(from), &line)?;
        let found: Value = serde_json::from_str(text.trim()).with_context(|| text.clone())?;
        ensure!(found["failed"] == 0, "{found}");
        Ok(found)
    }

    /// How many of `count` answers were of version `v2`.
    fn of_second(&self, count: u64, flags: &[&str]) -> Result<u64> {
        let number = count.to_string();
        let found = self.get("client", "/", &[&["--count", &number], flags].concat())?;
        ensure!(found["statuses"]["200"] == count, "{found}");
        Ok(found["names"]["v2"].as_u64().unwrap_or(0))
    }
}

#[test]
fn a_route_sends_by_header_and_by_weight() -> Result<()> {
    let (_turn, bed) = shared()?;
    let shop = Shop::with_waypoint(bed, "canary")?;
    ensure!(shop.of_second(20, &[])? == 0, "no route sends to v2 yet");
    shop.scene.apply(
        "---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: canary}
spec:
  parentRefs: [{group: '', kind: Service, name: v1, port: 80}]
  rules:
  - matches: [{headers: [{name: x-version, value: v2}]}]
    backendRefs: [{name: v2, port: 80}]
  - backendRefs: [{name: v1, port: 80, weight: 90}, {name: v2, port: 80, weight: 10}]
",
    )?;
    bed.eventually("the header decides", || {
        let of_second = shop.of_second(20, &["--header", "x-version: v2"])?;
        ensure!(of_second == 20, "{of_second} of 20 by header");
        Ok(())
    });
    // 30 are expected, with a standard deviation of 5.2.
    let of_second = shop.of_second(300, &[])?;
    ensure!(
        (4..=56).contains(&of_second),
        "{of_second} of 300 by weight"
    );
    Ok(())
}

#[test]
fn a_denied_request_is_answered_403_and_the_log_names_the_policy() -> Result<()> {
    let (_turn, bed) = shared()?;
    let shop = Shop::with_waypoint(bed, "denied-by-path")?;
    shop.scene.apply(
        "---
apiVersion: telemetry.istio.io/v1
kind: Telemetry
metadata: {name: logs}
spec: {accessLogging: [{providers: [{name: envoy}]}]}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: no-admin}
spec:
  targetRefs: [{group: '', kind: Service, name: v1}]
  action: DENY
  rules:
  - from: [{source: {principals: ['*/sa/intruder']}}]
    to: [{operation: {paths: ['/admin*'], methods: [GET]}}]
",
    )?;
    bed.eventually("the request is denied", || {
        let found = shop.get("intruder", "/admin/keys", &[])?;
        ensure!(found["statuses"]["403"] == 1, "{found}");
        Ok(())
    });
    // Another way to write the same path, another path, another method, another client.
    for (from, path, method, status) in [
        ("intruder", "/x/../admin/keys", "GET", "403"),
        ("intruder", "/%61dmin/keys", "GET", "403"),
        ("intruder", "/", "GET", "200"),
        ("intruder", "/admin/keys", "POST", "200"),
        ("client", "/admin/keys", "GET", "200"),
    ] {
        let found = shop.get(from, path, &["--method", method])?;
        ensure!(
            found["statuses"][status] == 1,
            "{from} {method} {path}: {found}"
        );
    }
    bed.eventually("the log names the policy", || {
        // Logging may have been switched on a moment after the policy came into force.
        shop.get("intruder", "/admin/keys", &[])?;
        let log = shop.waypoint_log()?;
        let line = log.lines().find(|line| line.contains(" 403 "));
        rig::holds(line.context("no line with 403")?, "no-admin")
    });
    Ok(())
}

#[test]
fn a_restart_of_the_waypoint_fails_no_request() -> Result<()> {
    let (_turn, bed) = shared()?;
    let shop = Shop::with_waypoint(bed, "restarted")?;
    let url = format!("http://v1.{}/", shop.scene.namespace);
    let line = [
        "web",
        "get",
        &url,
        "--until-input-ends",
        "--rate",
        "50",
        "--parallel",
        "4",
    ];
    let namespace = shop.scene.namespace.as_str();
    // What the old one says goes with it.
    let follow = ["-n", namespace, "logs", "-f", "deployment/waypoint"];
    let told = Running::start(&mut bed.kube().command(&follow))?;
    let load = bed.kube().spawn(&shop.scene.pod("client"), &line)?;
    bed.kube()
        .run(&["-n", namespace, "rollout", "restart", "deployment/waypoint"])?;
    bed.kube()
        .rolled_out(namespace, "deployment/waypoint", 120)
        .with_context(|| bed.evidence())?;
    // The old one has gone, and with it every connection that it held: it may take its whole grace, 30 s.
    until(Duration::from_secs(90), || {
        let selector = "gateway.networking.k8s.io/gateway-name=waypoint";
        let pods = bed
            .kube()
            .json(&["pods", "-n", namespace, "-l", selector])?;
        let count = pods["items"].as_array().map_or(0, Vec::len);
        ensure!(count == 1, "{count} pods");
        Ok(())
    })
    .with_context(|| bed.evidence())?;
    let found: Value = serde_json::from_str(load.finish()?.trim())?;
    let requests = found["requests"].as_u64().unwrap_or(0);
    if found["failed"] == 0 && found["statuses"]["200"] == requests && requests > 100 {
        return Ok(());
    }
    // In one line: a report may show no more than the first.
    let (old, new) = (told.finish(), shop.waypoint_log());
    let tunnel = bed.ztunnel_log(bed.node(0));
    let said = |log: Result<String>| amiss(&log.unwrap_or_else(|error| format!("{error:#}")));
    bail!(
        "{} of {requests} failed, statuses {}, errors {}; old waypoint: {}; new: {}; tunnel: {}",
        found["failed"],
        found["statuses"],
        found["errors"],
        said(old),
        said(new),
        said(tunnel)
    );
}

/// The last lines of a log that tell of trouble or of an end, as one line.
fn amiss(log: &str) -> String {
    let tells = |line: &&str| {
        let words = ["WARN", "ERROR", "error", "warn", "drain", "refused", "503"];
        words.iter().any(|word| line.contains(word))
    };
    let lines: Vec<_> = log.lines().filter(tells).collect();
    let first = lines.len().saturating_sub(8);
    lines[first..].join(" | ")
}

#[test]
fn without_its_waypoint_no_request_passes() -> Result<()> {
    let (_turn, bed) = shared()?;
    let shop = Shop::open(bed, "closed")?;
    bed.eventually("the server answers", || shop.get("client", "/", &[]));
    shop.label_namespace("istio.io/use-waypoint=nowhere")?;
    let closed = || {
        let found = shop.get("client", "/", &[]);
        ensure!(found.is_err(), "{found:?}");
        Ok(())
    };
    bed.eventually("a waypoint that is not there closes the way", closed);
    shop.add_waypoint()?;
    bed.kube()
        .run(&["-n", "closed", "delete", "gateway", "waypoint"])?;
    bed.eventually("a waypoint that is deleted closes the way", closed);
    for _ in 0..5 {
        closed()?;
    }
    Ok(())
}
