//! The claims, in order. Each looks at the running mesh from outside, as a user would.

use std::{collections::BTreeMap, time::Duration};

use anyhow::{Context, Result};

use super::{requests, stage::Stage};
use crate::{
    local::{
        parts::{Action, CONTROL_PLANE, tunnel},
        rig::{Rig, Running, until},
    },
    tool::Seen,
};

/// What must not be readable on the wire.
const MARKER: &str = "card-number-4929-1234";
/// Everything that is waited for must come within this.
pub(super) const LIMIT: Duration = Duration::from_secs(10);
const ORDERS: &str = "orders.shop:7000";
const STOCK: &str = "stock.shop:7000";

/// All of them.
pub(super) fn all(stage: &Stage, rig: &Rig) -> Result<()> {
    readable_before(stage, rig)?;
    let early = Held::open(rig, "shop/client", "orders.shop:7001")?;
    joins(stage, rig, &early)?;
    named_in_logs(stage, rig)?;
    let late = Held::open(rig, "shop/client", "stock.shop:7001")?;
    policy_decides(stage, rig)?;
    strict_refuses(stage, rig)?;
    survives_control_plane(stage, rig, &late)?;
    counters_agree(stage, rig)?;
    leaves(stage, rig, &early, &late)?;
    requests::all(stage, rig)
}

fn readable_before(stage: &Stage, rig: &Rig) -> Result<()> {
    stage.claim(
        'a',
        "Before joining, anyone on the link between the nodes reads what the client sends",
    );
    let seen = watched(rig, || talk(rig, "shop/client", ORDERS, MARKER))?;
    let packets = format!(
        "{MARKER:?} was read in {} packets on node1's link",
        seen.marked
    );
    stage.check(seen.marked > 0, &packets);
    stage.check(
        seen.opened.contains_key(&7000),
        &format!("connections on that link went to {}", ports(&seen.opened)),
    );
    Ok(())
}

fn joins(stage: &Stage, rig: &Rig, early: &Held) -> Result<()> {
    stage.claim(
        'b',
        "One label joins the running pods at once, and breaks nothing",
    );
    let before = pod_ids(rig)?;
    rig.label("shop", &["istio.io/dataplane-mode=ambient"])?;
    stage.quote("leyline local label shop istio.io/dataplane-mode=ambient");
    let took = stage.during("pods joining", || rig.wait_for_mesh("shop", "yes", LIMIT))?;
    let what = format!(
        "all four pods of the namespace are in the mesh after {} ms",
        took.as_millis()
    );
    // Far below a second; a machine that is busy with others' work takes longer, and has not failed by that.
    stage.evidence(&what);
    // The other node's tunnel may learn some milliseconds later that it should speak HBONE from now on.
    let seen = stage.during("watching the link", || encrypted(rig))?;
    stage.check(
        seen.marked == 0,
        &format!("the same text, sent again: read in {} packets", seen.marked),
    );
    let only = seen.opened.keys().all(|port| *port == 15008);
    stage.check(
        only,
        &format!("connections opened on the link: {}", ports(&seen.opened)),
    );
    stage.check(pod_ids(rig)? == before, "no pod was restarted");
    early.still_alive(stage, "the connection opened before")
}

/// Repeats until nothing is readable, for a moment at most: then what was seen at last.
fn encrypted(rig: &Rig) -> Result<Seen> {
    let mut last = Seen::default();
    for _ in 0..10 {
        last = watched(rig, || talk(rig, "shop/client", ORDERS, MARKER))?;
        if last.marked == 0 && last.packets > 0 {
            break;
        }
    }
    Ok(last)
}

fn named_in_logs(stage: &Stage, rig: &Rig) -> Result<()> {
    stage.claim('c', "Both ends' access logs name both identities");
    talk(rig, "shop/client", ORDERS, "hello")?;
    let (client, server) = (
        "spiffe://cluster.local/ns/shop/sa/client",
        "spiffe://cluster.local/ns/shop/sa/orders",
    );
    for (node, direction) in [("node1", "outbound"), ("node2", "inbound")] {
        let wanted = [
            "connection complete".to_owned(),
            format!("direction=\"{direction}\""),
            format!("src.identity=\"{client}\""),
            format!("dst.identity=\"{server}\""),
        ];
        let line = await_line(rig, node, &wanted);
        stage.check(line.is_some(), &format!("{}, {direction}", tunnel(node)));
        if let Some(line) = line {
            stage.quote(&fields(
                &line,
                &[
                    "src.identity",
                    "dst.identity",
                    "dst.service",
                    "bytes_sent",
                    "bytes_recv",
                ],
            ));
        }
    }
    Ok(())
}

fn policy_decides(stage: &Stage, rig: &Rig) -> Result<()> {
    stage.claim('d', "An AuthorizationPolicy lets one identity in, and the log says which policy kept the other out");
    let admitted = talk(rig, "shop/intruder", ORDERS, "hello").is_ok();
    stage.check(admitted, "before the policy, the intruder reaches orders");
    rig.write(
        "orders-from-client.yaml",
        include_str!("orders-from-client.yaml"),
    )?;
    stage.quote("orders-from-client.yaml: ALLOW cluster.local/ns/shop/sa/client");
    let refused = stage.during("the policy landing", || {
        await_refusal(rig, "shop/intruder", ORDERS)
    });
    show_refusal(stage, "the intruder is refused", refused);
    stage.check(
        talk(rig, "shop/client", ORDERS, "hello").is_ok(),
        "the client is served",
    );
    let line = await_line(
        rig,
        "node2",
        &["sa/intruder".to_owned(), "orders-from-client".to_owned()],
    );
    stage.check(line.is_some(), "ztunnel-node2 names the policy");
    if let Some(line) = line {
        stage.quote(&fields(&line, &["src.identity", "policy", "error"]));
    }
    Ok(())
}

fn strict_refuses(stage: &Stage, rig: &Rig) -> Result<()> {
    stage.claim(
        'e',
        "PeerAuthentication STRICT refuses a pod outside the mesh",
    );
    let admitted = talk(rig, "elsewhere/outsider", STOCK, "hello").is_ok();
    stage.check(
        admitted,
        "before it, the outsider reaches stock in plain text",
    );
    rig.write("strict.yaml", include_str!("strict.yaml"))?;
    let refused = stage.during("STRICT landing", || {
        await_refusal(rig, "elsewhere/outsider", STOCK)
    });
    show_refusal(stage, "the outsider is refused", refused);
    stage.check(
        talk(rig, "shop/client", STOCK, "hello").is_ok(),
        "the client is served",
    );
    Ok(())
}

fn survives_control_plane(stage: &Stage, rig: &Rig, late: &Held) -> Result<()> {
    stage.claim(
        'f',
        "The control plane dies: traffic and policy go on, and it catches up when it is back",
    );
    rig.part(CONTROL_PLANE, Action::Hold)?;
    rig.wait_for("the control plane to be down", LIMIT, |status| {
        status
            .parts
            .get(CONTROL_PLANE)
            .is_some_and(|part| !part.running)
    })?;
    stage.evidence("the control plane is killed and held down");
    stage.check(
        talk(rig, "shop/client", ORDERS, "hello").is_ok(),
        "new connections of the client are served",
    );
    stage.check(
        talk(rig, "shop/intruder", ORDERS, "hello").is_err(),
        "the intruder is still refused",
    );
    late.still_alive(stage, "an open connection")?;
    rig.write(
        "no-intruder-at-stock.yaml",
        include_str!("no-intruder-at-stock.yaml"),
    )?;
    let unnoticed = talk(rig, "shop/intruder", STOCK, "hello").is_ok();
    stage.check(unnoticed, "a policy written meanwhile is not known yet");
    rig.part(CONTROL_PLANE, Action::Restart)?;
    let caught_up = stage.during("the control plane coming back", || {
        await_refusal(rig, "shop/intruder", STOCK)
    });
    show_refusal(stage, "back again, the new policy is in force", caught_up);
    Ok(())
}

fn counters_agree(stage: &Stage, rig: &Rig) -> Result<()> {
    const BYTES: u64 = 1_000_000;
    stage.claim('g', "The counters istio_tcp_* agree with the bytes sent");
    let nodes = [("node1", "source"), ("node2", "destination")];
    let read = || {
        nodes
            .iter()
            .map(|(node, reporter)| counters(rig, node, reporter))
            .collect::<Result<Vec<_>>>()
    };
    let before = read()?;
    let output = rig.exec(
        "shop/client",
        &[
            "leyline",
            "tool",
            "send",
            ORDERS,
            "--text",
            "x",
            "--bytes",
            &BYTES.to_string(),
        ],
    )?;
    stage.check(
        output.succeeded(),
        &format!("the client sent {BYTES} bytes to orders and had them echoed"),
    );
    let exact = |after: &[(u64, u64)]| {
        after
            .iter()
            .zip(&before)
            .all(|(after, before)| after.0 - before.0 == BYTES && after.1 - before.1 == BYTES)
    };
    let mut last = before.clone();
    let counted = stage.during("counters settling", || {
        until("the counters", LIMIT, || {
            last = read()?;
            Ok((!exact(&last)).then(|| format!("{last:?}")))
        })
    });
    for ((node, reporter), (after, before)) in nodes.iter().zip(last.iter().zip(&before)) {
        let (received, sent) = (
            after.0.wrapping_sub(before.0),
            after.1.wrapping_sub(before.1),
        );
        let text = format!(
            "{}, reporter {reporter}: received +{received}, sent +{sent}",
            tunnel(node)
        );
        stage.check(counted.is_ok() || (received, sent) == (BYTES, BYTES), &text);
    }
    Ok(())
}

fn leaves(stage: &Stage, rig: &Rig, early: &Held, late: &Held) -> Result<()> {
    stage.claim('h', "The namespace leaves again, and what is open lives on");
    rig.label("shop", &["istio.io/dataplane-mode-"])?;
    stage.quote("leyline local label shop istio.io/dataplane-mode-");
    let took = stage.during("pods leaving", || rig.wait_for_mesh("shop", "no", LIMIT))?;
    stage.evidence(&format!(
        "no pod is in the mesh after {} ms",
        took.as_millis()
    ));
    late.still_alive(stage, "a connection opened inside the mesh")?;
    early.still_alive(stage, "the connection opened before the namespace joined")?;
    let plain = stage.during("connections going plain again", || {
        until("plain text on the link", LIMIT, || {
            let seen = watched(rig, || talk(rig, "shop/client", ORDERS, MARKER))?;
            Ok((seen.marked == 0).then(|| ports(&seen.opened)))
        })
    });
    stage.check(plain.is_ok(), "new connections are plain again");
    late.still_alive(stage, "and still, the connection opened inside the mesh")
}

/// A connection that is held open and talks all the time.
struct Held {
    running: Running,
}

impl Held {
    fn open(rig: &Rig, pod: &str, address: &str) -> Result<Self> {
        let running = rig.spawn(pod, &["leyline", "tool", "hold", address])?;
        let held = Self { running };
        until("a held connection", LIMIT, || {
            Ok((held.words() == 0).then(String::new))
        })?;
        Ok(held)
    }

    fn words(&self) -> usize {
        self.running.lines().len()
    }

    /// Words still come back: more than before.
    fn still_alive(&self, stage: &Stage, what: &str) -> Result<()> {
        let before = self.words();
        let heard = until("an answer", LIMIT, || {
            Ok((self.words() < before + 3).then(String::new))
        });
        let alive = heard.is_ok() && self.running.is_running();
        stage.check(
            alive,
            &format!(
                "{what} is alive: {} words and as many answers so far",
                self.words()
            ),
        );
        Ok(())
    }
}

/// Sends a text and expects it back.
fn talk(rig: &Rig, pod: &str, address: &str, text: &str) -> Result<()> {
    let output = rig.exec(
        pod,
        &[
            "leyline",
            "tool",
            "send",
            address,
            "--text",
            text,
            "--timeout-ms",
            &LIMIT.as_millis().to_string(),
        ],
    )?;
    anyhow::ensure!(output.succeeded(), "{}", output.stderr.trim());
    Ok(())
}

/// Until a connection is refused: how long it took, and what the client was told.
fn await_refusal(rig: &Rig, pod: &str, address: &str) -> Result<(Duration, String)> {
    let mut why = String::new();
    let took = until("a refusal", LIMIT, || {
        match talk(rig, pod, address, "hello") {
            Ok(()) => Ok(Some("it was served".to_owned())),
            Err(error) => {
                why = error.to_string();
                Ok(None)
            }
        }
    })?;
    Ok((took, why))
}

fn show_refusal(stage: &Stage, what: &str, refused: Result<(Duration, String)>) {
    match refused {
        Ok((took, why)) => {
            let why = why.trim_start_matches("error: ");
            stage.evidence(&format!("{what}, {} ms after ({why})", took.as_millis()));
        }
        Err(error) => stage.failure(&format!("{what}: {error:#}")),
    }
}

/// What passes between pods on the link of node1 while something is done.
fn watched(rig: &Rig, work: impl FnOnce() -> Result<()>) -> Result<Seen> {
    let running = rig.spawn("node1", &["leyline", "tool", "capture", "--marker", MARKER])?;
    until("the eye on the link", LIMIT, || {
        Ok(running.lines().is_empty().then(String::new))
    })?;
    work().context("talk while the link is watched")?;
    let output = running.finish(LIMIT)?;
    let last = output.stdout.lines().last().unwrap_or_default().to_owned();
    serde_json::from_str(&last)
        .with_context(|| format!("read what was captured: {last} {}", output.stderr))
}

fn ports(opened: &BTreeMap<u16, u64>) -> String {
    let texts: Vec<_> = opened
        .iter()
        .map(|(port, count)| format!("port {port} ({count})"))
        .collect();
    if texts.is_empty() {
        "none".to_owned()
    } else {
        texts.join(", ")
    }
}

fn pod_ids(rig: &Rig) -> Result<Vec<(String, u32)>> {
    let status = rig.status()?;
    Ok(status
        .pods
        .into_iter()
        .map(|pod| (pod.uid, pod.restarts))
        .collect())
}

/// The newest line of a node's tunnel that holds all of `wanted`; waits for it.
fn await_line(rig: &Rig, node: &str, wanted: &[String]) -> Option<String> {
    await_part_line(rig, &tunnel(node), wanted)
}

/// The newest line of a part's log that holds all of `wanted`; waits for it.
pub(super) fn await_part_line(rig: &Rig, part: &str, wanted: &[String]) -> Option<String> {
    let mut found = None;
    let _ = until("a line in the log", LIMIT, || {
        let log = rig.part_log(part);
        found = log
            .lines()
            .rev()
            .find(|line| wanted.iter().all(|text| line.contains(text.as_str())))
            .map(str::to_owned);
        Ok(found.is_none().then(String::new))
    });
    found
}

/// Some fields of a log line, as they stand there.
fn fields(line: &str, names: &[&str]) -> String {
    let found = names.iter().filter_map(|name| {
        let start = line.find(&format!("{name}="))?;
        let rest = &line[start..];
        let value = &rest[name.len() + 1..];
        let length = match value.strip_prefix('"') {
            Some(quoted) => quoted.find('"')? + 2,
            None => value.find(' ').unwrap_or(value.len()),
        };
        Some(&rest[..name.len() + 1 + length])
    });
    found.collect::<Vec<_>>().join(" ")
}

/// Bytes received and sent from client to orders, as one node's tunnel counts them.
fn counters(rig: &Rig, node: &str, reporter: &str) -> Result<(u64, u64)> {
    let (_, metrics) = rig.get(&tunnel(node), "metrics", "/metrics")?;
    let wanted = [
        format!("reporter=\"{reporter}\""),
        "source_workload=\"client\"".to_owned(),
        "destination_workload=\"orders\"".to_owned(),
    ];
    let sum = |name: &str| {
        let lines = metrics.lines().filter(|line| {
            line.starts_with(name) && wanted.iter().all(|label| line.contains(label))
        });
        lines
            .filter_map(|line| line.rsplit(' ').next()?.parse::<u64>().ok())
            .sum()
    };
    Ok((
        sum("istio_tcp_received_bytes_total{"),
        sum("istio_tcp_sent_bytes_total{"),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_quoted_as_they_stand() {
        let line = "access\tconnection complete\tsrc.addr=10.0.0.1:2 src.identity=\"spiffe://a/ns/b/sa/c\" bytes_sent=12";
        assert_eq!(
            fields(line, &["src.identity", "bytes_sent", "gone"]),
            "src.identity=\"spiffe://a/ns/b/sa/c\" bytes_sent=12"
        );
    }
}
