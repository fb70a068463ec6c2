//! Two control planes of different revisions in one cluster: each serves and writes what is its own, neither undoes what the
//! other has written, and the second one goes without a trace.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rig::{
    cluster::bed::{Bed, SYSTEM, alone},
    until,
};
use serde_json::Value;

use crate::scene::{Scene, Start, pod, service};

/// The second revision, and the tag that points to it.
const REVISION: &str = "canary";
const TAG: &str = "next";

const WAYPOINT: &str = "---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: waypoint}
spec:
  gatewayClassName: leyline-waypoint
  listeners: [{name: mesh, port: 15008, protocol: HBONE}]
";

/// What both control planes have something to say of: no revision is named, and each status is one of ours.
const SHARED: &str = "---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: clients}
spec: {selector: {matchLabels: {app: server}}, action: ALLOW, rules: [{from: [{source: {principals: ['*/sa/client']}}]}]}
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: outside}
spec: {hosts: [outside.example], ports: [{number: 80, name: http, protocol: HTTP}], resolution: DNS}
---
{apiVersion: v1, kind: Service, metadata: {name: pages}, spec: {ports: [{port: 80, appProtocol: http}]}}
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: route}
spec:
  parentRefs: [{group: '', kind: Service, name: pages, port: 80}]
  rules: [{backendRefs: [{name: pages, port: 80}]}]
";

/// The second control plane, until the value goes.
struct Second<'a>(&'a Bed);

impl<'a> Second<'a> {
    fn install(bed: &'a Bed) -> Result<Self> {
        let second = Self(bed);
        bed.install_revision(REVISION)?;
        bed.leyline(&["tag", "set", TAG, "--revision", REVISION])?;
        Ok(second)
    }

    /// Ends its pod: another one looks at everything anew, and writes what it finds to be wrong.
    fn restart(&self) -> Result<()> {
        let before = holder(self.0, "leyline-leader-canary")?;
        let label = format!("istio.io/rev={REVISION},app=istiod");
        let kube = self.0.kube();
        kube.run(&["-n", SYSTEM, "delete", "pod", "-l", &label, "--wait=false"])?;
        self.0.eventually("the new pod writes", || {
            let now = holder(self.0, "leyline-leader-canary")?;
            ensure!(now != before, "{before} does");
            Ok(())
        });
        Ok(())
    }

    fn uninstall(&self) -> Result<()> {
        let tag = self.0.leyline(&["tag", "remove", TAG]);
        self.0.uninstall_revision(REVISION)?;
        tag.map(drop)
    }
}

impl Drop for Second<'_> {
    fn drop(&mut self) {
        // It is gone already, unless the test failed.
        let _gone = self.uninstall();
    }
}

#[test]
fn two_control_planes_serve_each_its_own_and_neither_undoes_what_the_other_wrote() -> Result<()> {
    let (_turn, bed) = alone()?;
    let first = Scene::start(bed, "first-revision", Start::InMesh)?;
    let own = Scene::empty(bed, "next-revision", Start::InMesh)?;
    label(bed, "next-revision", "istio.io/rev=next")?;
    let leader = holder(bed, "leyline-leader")?;
    first.apply(&(SHARED.to_owned() + WAYPOINT))?;
    own.apply(WAYPOINT)?;
    label(bed, "first-revision", "istio.io/use-waypoint=waypoint")?;
    first.programmed("waypoint")?;
    ensure!(
        own.object("gateway", "waypoint")?["status"]["addresses"].is_null()
            && deployment(&own).is_err(),
        "the first control plane deploys what another revision was asked for"
    );

    let second = Second::install(bed)?;
    // Each has its lease, and a webhook that is asked.
    ensure!(holder(bed, "leyline-leader-canary")?.starts_with("istiod-canary-"));
    for name in [
        "istio-validator-istio-system",
        "istio-validator-canary-istio-system",
        "istiod-default-validator",
    ] {
        // It tries less and less often while its pod is not ready: how long that takes is the machine's.
        until(Duration::from_secs(120), || is_asked(bed, name))
            .with_context(|| format!("{name}\n{}", bed.evidence()))?;
    }
    for (revision, service) in [("default", "istiod"), (REVISION, "istiod-canary")] {
        refused_by(&first, revision, service)?;
    }

    // What is of the second revision is deployed by it, and talks to it; the first's stays as it was.
    own.programmed("waypoint")?;
    served_by(bed, &own, "istiod-canary")?;
    served_by(bed, &first, "istiod")?;
    carries(&own)?;
    neither_undoes(&first, &second)?;
    ensure!(holder(bed, "leyline-leader")? == leader, "another leads");

    // Without it, the first one takes over what is labelled back, and nothing of the second's is left.
    label(bed, "next-revision", "istio.io/rev-")?;
    served_by(bed, &own, "istiod")?;
    second.uninstall()?;
    ensure!(is_asked(bed, "istio-validator-canary-istio-system").is_err());
    refused_by(&first, "default", "istiod")?;
    ensure!(holder(bed, "leyline-leader")? == leader, "another leads");
    let generation = deployment(&first)?["metadata"]["generation"].clone();
    ensure!(generation == 1, "the first's waypoint was written again");
    bed.ping(&first.pod("client"), &first.service())?;
    bed.ping(&own.pod("client"), &own.service())
}

/// Pods of the second revision's namespace reach each other by its waypoint.
fn carries(own: &Scene<'_>) -> Result<()> {
    let bed = own.bed;
    label(bed, "next-revision", "istio.io/use-waypoint=waypoint")?;
    let ready = "readinessProbe: {tcpSocket: {port: 8080}, periodSeconds: 1}";
    let client = pod("client", bed.node(0), "[leyline, tool, echo, '9000']", "");
    let server = pod("server", bed.node(1), "[load, serve, '[::]:8080']", ready);
    own.apply(&[client, server, service("server", 80, 8080)].concat())?;
    own.ready(&["client", "server"])?;
    own.joined(&["client", "server"])?;
    // The server's own node sees the waypoint as the client.
    bed.eventually("the waypoint carries", || {
        bed.ping(&own.pod("client"), &own.service())?;
        let log = bed.ztunnel_log(bed.node(1))?;
        rig::holds(&log, own.identity("waypoint"))
    });
    Ok(())
}

/// Statuses that both have an opinion of come to rest: at first, after a change that both see, and over new starts of the
/// second, which looks at all of them anew.
fn neither_undoes(first: &Scene<'_>, second: &Second<'_>) -> Result<()> {
    let bed = first.bed;
    let mut fences = 0;
    let before = at_rest(first, &mut fences)?;
    second.restart()?;
    fence(first, REVISION, &mut fences)?;
    ensure!(versions(first)? == before, "a new start writes again");

    let from = serde_json::json!([{"source": {"namespaces": ["first-revision"]}}]);
    let change = serde_json::json!({"spec": {"rules": [{"from": from}]}}).to_string();
    patch(first, "authorizationpolicy", "clients", &change)?;
    bed.eventually("the change is told of", || versions(first));
    let after = at_rest(first, &mut fences)?;
    second.restart()?;
    fence(first, REVISION, &mut fences)?;
    ensure!(versions(first)? == after, "it is written over and over");
    Ok(())
}

/// The versions once neither control plane has written in a time in which both could; an error where they never stop.
fn at_rest(scene: &Scene<'_>, fences: &mut u32) -> Result<Vec<String>> {
    let mut before = scene
        .bed
        .eventually("statuses are written", || versions(scene));
    for _ in 0..5 {
        for revision in [REVISION, "default"] {
            fence(scene, revision, fences)?;
        }
        let after = versions(scene)?;
        if after == before {
            return Ok(after);
        }
        before = after;
    }
    anyhow::bail!("it is written over and over")
}

/// The versions of all that both write to, once each status tells of the object as it is.
fn versions(scene: &Scene<'_>) -> Result<Vec<String>> {
    let table = [
        ("service", "server", "/status/conditions"),
        ("serviceentry", "outside", "/status/addresses"),
        ("authorizationpolicy", "clients", "/status/conditions"),
        ("httproute", "route", "/status/parents/0/conditions"),
        ("gateway", "waypoint", "/status/conditions"),
    ];
    let version = |(kind, name, told): &(&str, &str, &str)| {
        let found = scene.object(kind, name)?;
        let list = found.pointer(told).and_then(Value::as_array);
        let list = list.filter(|list| !list.is_empty());
        let list = list.with_context(|| format!("{kind} {name}: no {told}"))?;
        let generation = &found["metadata"]["generation"];
        let old = list.iter().find(|condition| {
            let observed = &condition["observedGeneration"];
            observed.is_number() && generation.is_number() && observed != generation
        });
        ensure!(old.is_none(), "{kind} {name}: {old:?}");
        let version = &found["metadata"]["resourceVersion"];
        Ok(version.as_str().unwrap_or_default().to_owned())
    };
    table.iter().map(version).collect()
}

/// Waits until one control plane has written the status of an object that came just now: what it wrote before has ended.
fn fence(scene: &Scene<'_>, revision: &str, fences: &mut u32) -> Result<()> {
    *fences += 1;
    let name = format!("fence-{fences}");
    let fence = format!(
        "---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {{name: {name}, labels: {{istio.io/rev: {revision}}}}}
spec: {{selector: {{matchLabels: {{app: none}}}}, rules: [{{from: [{{source: {{principals: ['*/sa/client']}}}}]}}]}}
"
    );
    // Admission needs the revision's webhook, which may have no pod for a moment.
    let take = || scene.apply(&fence);
    scene.bed.eventually("the fence is taken", take);
    scene.bed.eventually(&format!("{revision} writes"), || {
        let found = scene.object("authorizationpolicy", &name)?;
        ensure!(found["status"]["conditions"].is_array(), "{found}");
        Ok(())
    });
    Ok(())
}

/// What cannot work and is labelled with a revision is refused by that revision's webhook.
fn refused_by(scene: &Scene<'_>, revision: &str, service: &str) -> Result<()> {
    let wrong = format!(
        "---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {{name: wrong, labels: {{istio.io/rev: {revision}}}}}
spec: {{action: DENY}}
"
    );
    let told = scene.apply(&wrong).err().context("it is taken")?;
    let name = match revision {
        "default" => "istio-validator-istio-system".to_owned(),
        revision => format!("istio-validator-{revision}-istio-system"),
    };
    let found = scene
        .bed
        .kube()
        .json(&["validatingwebhookconfiguration", &name])?;
    let asked = &found["webhooks"][0]["clientConfig"]["service"]["name"];
    ensure!(asked == service, "{name} asks {asked}: {told:#}");
    rig::holds(&format!("{told:#}"), "rev.validation.istio.io")
}

/// An error unless the API server asks this webhook, and takes nothing without it.
fn is_asked(bed: &Bed, name: &str) -> Result<()> {
    let line = [
        "validatingwebhookconfiguration",
        name,
        "--show-managed-fields",
    ];
    let found = bed.kube().json(&line)?;
    let owners = found["metadata"]["managedFields"].as_array();
    let ours = |it: &Value| it["manager"] == "leyline-webhook-controller";
    // Else a chart that was rendered just before it was written is refused for a conflict.
    ensure!(!owners.into_iter().flatten().any(ours), "{owners:#?}");
    let webhook = &found["webhooks"][0];
    let trusts = webhook["clientConfig"]["caBundle"].is_string();
    ensure!(trusts && webhook["failurePolicy"] == "Fail", "{webhook:#}");
    Ok(())
}

/// Waits until the waypoint of a namespace is connected to the control plane behind a Service, by its own account of it.
fn served_by(bed: &Bed, scene: &Scene<'_>, service: &str) -> Result<()> {
    let name = format!("waypoint-{}", scene.namespace);
    bed.eventually(&format!("{name} is served by {service}"), || {
        let found = deployment(scene)?;
        let container = &found["spec"]["template"]["spec"]["containers"][0];
        let text = serde_json::to_string(container)?;
        rig::holds(&text, format!("https://{service}.{SYSTEM}.svc:15012"))
    });
    let namespace = scene.namespace.as_str();
    bed.kube()
        .rolled_out(namespace, "deployment/waypoint", 120)
        .with_context(|| bed.evidence())
}

fn deployment(scene: &Scene<'_>) -> Result<Value> {
    scene.object("deployment", "waypoint")
}

/// Who holds a lease.
fn holder(bed: &Bed, lease: &str) -> Result<String> {
    let found = bed.kube().json(&["lease", "-n", SYSTEM, lease])?;
    let holder = found["spec"]["holderIdentity"].as_str();
    let holder = holder.filter(|holder| !holder.is_empty());
    holder.map(str::to_owned).context("nobody holds it")
}

fn label(bed: &Bed, namespace: &str, label: &str) -> Result<()> {
    let line = ["label", "--overwrite", "namespace", namespace, label];
    bed.kube().run(&line).map(drop)
}

fn patch(scene: &Scene<'_>, kind: &str, name: &str, patch: &str) -> Result<()> {
    let line = [
        "-n",
        &scene.namespace,
        "patch",
        kind,
        name,
        "--type=merge",
        "-p",
        patch,
    ];
    scene.bed.kube().run(&line).map(drop)
}
