//! Who may connect: by account, namespace, port and address; STRICT; DENY before ALLOW.

use anyhow::{Context, Result, ensure};
use rig::cluster::bed::{Bed, shared};

use crate::scene::{Scene, Start, pod, strangers};

/// A policy, and who reaches which port of the server under it.
struct Row {
    about: &'static str,
    spec: String,
    /// Pod, port, and whether it connects.
    expected: &'static [(&'static str, u16, bool)],
}

#[test]
fn policies_decide_by_account_namespace_port_and_address() -> Result<()> {
    let (_turn, bed) = shared()?;
    let scene = Scene::start(bed, "policies", Start::InMesh)?;
    let second = pod(
        "server-second",
        bed.node(1),
        "[load, serve, '[::]:8081']",
        "",
    );
    scene.apply(&second)?;
    scene.ready(&["server-second"])?;
    scene.joined(&["server-second"])?;
    let client = bed.pod_ip(&scene.pod("client"))?;
    let bits = if client.contains(':') { 128 } else { 32 };
    let rows = [
        Row {
            about: "an account alone is allowed",
            spec: "{action: ALLOW, rules: [{from: [{source: {principals: [cluster.local/ns/policies/sa/client]}}]}]}".into(),
            expected: &[("client", 8080, true), ("intruder", 8080, false)],
        },
        Row {
            about: "another namespace alone is allowed",
            spec: "{action: ALLOW, rules: [{from: [{source: {namespaces: [elsewhere]}}]}]}".into(),
            expected: &[("client", 8080, false), ("intruder", 8080, false)],
        },
        Row {
            about: "the own namespace is denied to all but one account",
            spec: "{action: DENY, rules: [{from: [{source: {namespaces: [policies], notPrincipals: ['*/sa/client']}}]}]}".into(),
            expected: &[("client", 8080, true), ("intruder", 8080, false)],
        },
        Row {
            about: "a port is denied",
            spec: "{action: DENY, rules: [{to: [{operation: {ports: ['8080']}}]}]}".into(),
            expected: &[("client", 8080, false), ("client", 8081, true)],
        },
        Row {
            about: "an address is allowed",
            spec: format!("{{action: ALLOW, rules: [{{from: [{{source: {{ipBlocks: ['{client}/{bits}']}}}}]}}]}}"),
            expected: &[("client", 8080, true), ("intruder", 8080, false)],
        },
    ];
    for row in rows {
        scene.apply(&policy("rule", &row.spec))?;
        check(bed, &scene, &row);
    }
    Ok(())
}

#[track_caller]
fn check(bed: &Bed, scene: &Scene<'_>, row: &Row) {
    for (name, port, connects) in row.expected {
        let server = if *port == 8080 {
            "server"
        } else {
            "server-second"
        };
        bed.eventually(
            &format!("{}: {name} to {port}: {connects}", row.about),
            || {
                let address = scene.at(server, *port)?;
                match connects {
                    true => bed.ping(&scene.pod(name), &address),
                    false => bed.refused(&scene.pod(name), &address),
                }
            },
        );
    }
}

fn policy(name: &str, spec: &str) -> String {
    format!(
        "---\napiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: {name}}}\nspec: {spec}\n"
    )
}

#[test]
fn a_deny_comes_before_an_allow() -> Result<()> {
    let (_turn, bed) = shared()?;
    let scene = Scene::start(bed, "deny-first", Start::InMesh)?;
    // Both reach the service first: a refusal that comes later is the policy's, and not a service's that no proxy knows yet.
    for name in ["client", "intruder"] {
        bed.eventually(&format!("{name} is served"), || {
            bed.ping(&scene.pod(name), &scene.service())
        });
    }
    let allow = policy("allow-all", "{action: ALLOW, rules: [{}]}");
    let principals = "{principals: ['*/sa/intruder']}";
    let deny = policy(
        "no-intruder",
        &format!("{{action: DENY, rules: [{{from: [{{source: {principals}}}]}}]}}"),
    );
    scene.apply(&(allow + &deny))?;
    bed.eventually("the intruder is refused", || {
        bed.refused(&scene.pod("intruder"), &scene.service())
    });
    bed.ping(&scene.pod("client"), &scene.service())?;
    let line = scene.access_line(bed.node(1), &[&scene.identity("intruder"), "error="]);
    ensure!(line.contains("deny-first/no-intruder"), "{line}");
    Ok(())
}

/// A container that is probed every second; one probe that fails ends the pod's readiness, or the container. They ask for an
/// answer, for a node tunnel that means to refuse has let the handshake of TCP pass before. How long one may take is not the
/// claim: on a busy machine it is more than the second that Kubernetes gives by default.
const PROBED: &str = "
  - name: probed
    image: leyline.dev/tests:dev
    command: [web, serve, '[::]:8081', probed]
    readinessProbe: {httpGet: {path: /, port: 8081}, periodSeconds: 1, failureThreshold: 1, timeoutSeconds: 20}
    livenessProbe: {httpGet: {path: /, port: 8081}, periodSeconds: 1, failureThreshold: 1, timeoutSeconds: 20}";

const STRICT: &str = "
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: strict}
spec: {mtls: {mode: STRICT}}
";

#[test]
fn under_strict_strangers_are_refused_and_probes_stay_green() -> Result<()> {
    let (_turn, bed) = shared()?;
    let scene = Scene::start(bed, "strict", Start::InMesh)?;
    let probed = pod(
        "server-probed",
        bed.node(1),
        "[load, serve, '[::]:8080']",
        PROBED,
    );
    // The one on the host is on the server's own node, where also the kubelet is: not all of it may pass for a probe.
    scene.apply(&(probed + &strangers(bed.node(0), bed.node(1), 9322)))?;
    scene.ready(&["server-probed", "client-apart", "client-host"])?;
    scene.joined(&["server-probed"])?;
    let address = scene.at("server-probed", 8080)?;
    bed.eventually("a stranger is let in before", || {
        bed.ping(&scene.pod("client-apart"), &address)
    });

    scene.apply(STRICT)?;
    for stranger in ["client-apart", "client-host"] {
        bed.eventually(&format!("{stranger} is refused"), || {
            bed.refused(&scene.pod(stranger), &address)
        });
    }
    bed.ping(&scene.pod("client"), &address)?;
    let before = scene.object("pod", "server-probed")?;
    // Ten more probes of each kind, told by the traffic that goes on for as long.
    let line = [
        "load",
        "connect",
        &address,
        "--seconds",
        "10",
        "--rate",
        "5",
    ];
    bed.kube().succeed(&scene.pod("client"), &line)?;
    let after = scene.object("pod", "server-probed")?;
    ensure!(
        before["status"]["conditions"] == after["status"]["conditions"],
        "{before}\n{after}"
    );
    let containers = after["status"]["containerStatuses"].as_array();
    let containers = containers.context("the state of each container")?;
    let well = containers
        .iter()
        .all(|container| container["restartCount"] == 0);
    ensure!(well && containers.len() == 2, "its probes failed: {after}");
    Ok(())
}
