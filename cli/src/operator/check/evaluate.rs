//! What facts about a cluster mean: the checks, in order, each with a stable code. Pure.

use std::{collections::BTreeSet, fmt};

use serde::Serialize;
use time::{Duration, OffsetDateTime};

use crate::operator::status::{Proxy, State};

/// The oldest Kubernetes that is supported.
const KUBERNETES: (u32, u32) = (1, 28);
/// The oldest kernel with what the redirection rules need (`socket cgroupv2` in nftables).
const KERNEL: (u32, u32) = (5, 13);
/// Objects that are named; the others are counted.
const NAMED: usize = 5;

/// What was found.
#[derive(Clone, Debug)]
pub(super) struct Facts {
    pub url: String,
    /// Kubernetes' version.
    pub kubernetes: String,
    /// Names of CRDs; None where they may not be read.
    pub crds: Option<BTreeSet<String>>,
    /// What the caller may not do and operating needs.
    pub forbidden: Vec<String>,
    pub nodes: Vec<NodeFacts>,
    pub control_planes: Vec<PodFacts>,
    pub webhook: Option<Webhook>,
    pub agents: Vec<PodFacts>,
    pub tunnels: Vec<PodFacts>,
    /// What the control planes serve; why that is not known.
    pub proxies: Result<Vec<Proxy>, String>,
    /// Pods that should be in the mesh and are not, `namespace/name`.
    pub outside: Vec<String>,
    pub enrolled: usize,
    pub certificates: Vec<CertificateFacts>,
    /// Tunnels whose dump could not be read.
    pub unread: Vec<String>,
    pub now: OffsetDateTime,
}

/// A node.
#[derive(Clone, Debug)]
pub(super) struct NodeFacts {
    pub name: String,
    pub ready: bool,
    /// `6.1.0-18-amd64`.
    pub kernel: String,
    pub system: String,
}

/// A pod of the mesh's own.
#[derive(Clone, Debug)]
pub(super) struct PodFacts {
    pub name: String,
    pub node: String,
    pub ready: bool,
    pub problem: Option<String>,
}

/// The validating webhook.
#[derive(Clone, Debug)]
pub(super) struct Webhook {
    pub name: String,
    /// Whether it has the control plane's certificate authority.
    pub trusted: bool,
    /// `Fail` or `Ignore`.
    pub policy: String,
}

/// A certificate of a tunnel.
#[derive(Clone, Debug)]
pub(super) struct CertificateFacts {
    pub tunnel: String,
    pub identity: String,
    pub state: String,
    pub leaf_ends: Option<OffsetDateTime>,
    pub root_ends: Option<OffsetDateTime>,
}

/// One check.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Check {
    pub code: &'static str,
    pub name: &'static str,
    pub result: Outcome,
    pub message: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
}

/// How a check ended; ordered from good to bad.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Outcome {
    Pass,
    Warn,
    Fail,
}

impl Check {
    fn pass(code: &'static str, name: &'static str, message: impl Into<String>) -> Self {
        Self {
            code,
            name,
            result: Outcome::Pass,
            message: message.into(),
            hint: None,
        }
    }

    fn warn(self, message: impl Into<String>, hint: impl Into<String>) -> Self {
        self.not(Outcome::Warn, message, hint)
    }

    fn fail(self, message: impl Into<String>, hint: impl Into<String>) -> Self {
        self.not(Outcome::Fail, message, hint)
    }

    fn not(self, result: Outcome, message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self {
            result,
            message: message.into(),
            hint: Some(hint.into()),
            ..self
        }
    }
}

/// The API server cannot be asked: the one check there is.
pub(super) fn unreachable(error: &str) -> Check {
    let (message, hint) = error.split_once("\n  remedy: ").unwrap_or((error, ""));
    Check::pass("LEY-101", "API server", "").fail(message, hint)
}

/// What a cluster needs before the mesh is installed.
pub(super) fn prerequisites(facts: &Facts) -> Vec<Check> {
    vec![
        Check::pass("LEY-101", "API server", format!("{} answers", facts.url)),
        kubernetes(facts),
        rights(facts),
        nodes(facts),
    ]
}

/// What holds of a mesh that is installed and well.
pub(super) fn mesh(facts: &Facts) -> Vec<Check> {
    let control = control_plane(facts);
    if facts.control_planes.is_empty() && facts.tunnels.is_empty() {
        return vec![control];
    }
    vec![
        crds(facts),
        control,
        webhook(facts),
        on_nodes(
            facts,
            &facts.agents,
            "LEY-203",
            "cni agents",
            "istio-cni-node",
        ),
        on_nodes(facts, &facts.tunnels, "LEY-204", "node tunnels", "ztunnel"),
        synced(facts),
        versions(facts),
        enrolled(facts),
        certificates(facts),
    ]
}

fn kubernetes(facts: &Facts) -> Check {
    let version = &facts.kubernetes;
    let check = Check::pass("LEY-102", "Kubernetes", version.clone());
    match numbers(version) {
        Some(it) if it < KUBERNETES => check.fail(
            format!("{version} is too old"),
            format!(
                "upgrade the cluster to {}.{} or newer",
                KUBERNETES.0, KUBERNETES.1
            ),
        ),
        _ => check,
    }
}

/// The first two numbers of a version.
fn numbers(version: &str) -> Option<(u32, u32)> {
    let mut parts = version.trim_start_matches('v').split(['.', '-', '+']);
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

fn rights(facts: &Facts) -> Check {
    let check = Check::pass("LEY-103", "your rights", "enough to operate the mesh");
    match facts.forbidden.is_empty() {
        true => check,
        false => check.warn(
            format!("you may not {}", facts.forbidden.join(", ")),
            "what needs it is not checked; use another account, or --as",
        ),
    }
}

fn nodes(facts: &Facts) -> Check {
    let count = counted(facts.nodes.len(), "node");
    let check = Check::pass(
        "LEY-104",
        "nodes",
        format!("{count} ready, Linux, kernels new enough"),
    );
    let down = named(facts.nodes.iter().filter(|it| !it.ready).map(|it| &it.name));
    let old = |it: &&NodeFacts| numbers(&it.kernel).is_some_and(|it| it < KERNEL);
    let old = named(
        facts
            .nodes
            .iter()
            .filter(|it| it.system == "linux")
            .filter(old)
            .map(|it| format!("{} ({})", it.name, it.kernel)),
    );
    let other = named(
        facts
            .nodes
            .iter()
            .filter(|it| it.system != "linux")
            .map(|it| &it.name),
    );
    if let Some(down) = down {
        return check.warn(
            format!("not ready: {down}"),
            "kubectl describe node NODE tells why",
        );
    }
    if let Some(old) = old {
        let hint = format!(
            "probes of STRICT pods need kernel {}.{} or newer",
            KERNEL.0, KERNEL.1
        );
        return check.warn(format!("old kernels: {old}"), hint);
    }
    match other {
        Some(other) => check.warn(
            format!("not Linux: {other}"),
            "pods there stay outside the mesh",
        ),
        None => check,
    }
}

fn crds(facts: &Facts) -> Check {
    let check = Check::pass("LEY-105", "CRDs", "Istio's and the Gateway API's are there");
    let Some(known) = &facts.crds else {
        return check.warn(
            "not known: CRDs may not be read",
            "use another account, or --as",
        );
    };
    let missing = |names: &[&str]| named(names.iter().filter(|it| !known.contains(**it)));
    let needed = [
        "authorizationpolicies.security.istio.io",
        "peerauthentications.security.istio.io",
        "serviceentries.networking.istio.io",
        "workloadentries.networking.istio.io",
    ];
    if let Some(missing) = missing(&needed) {
        return check.fail(format!("missing: {missing}"), "leyline install brings them");
    }
    let gateway = [
        "gateways.gateway.networking.k8s.io",
        "gatewayclasses.gateway.networking.k8s.io",
    ];
    match missing(&gateway) {
        Some(missing) => check.warn(
            format!("missing: {missing}"),
            "waypoints need them; leyline install brings them",
        ),
        None => check,
    }
}

fn control_plane(facts: &Facts) -> Check {
    let check = Check::pass("LEY-201", "control plane", "");
    let (ready, waiting): (Vec<_>, Vec<_>) = facts.control_planes.iter().partition(|it| it.ready);
    let ready_count = format!("{} ready", counted(ready.len(), "pod"));
    match (ready.is_empty(), waiting.first()) {
        (true, None) => check.fail("none is installed", "leyline install"),
        (true, Some(it)) => check.fail(troubled(it), "see the pod's log and events"),
        (false, Some(it)) => check.warn(
            format!("{ready_count}; {}", troubled(it)),
            "see the pod's log and events",
        ),
        (false, None) => Check {
            message: ready_count,
            ..check
        },
    }
}

fn troubled(it: &PodFacts) -> String {
    let problem = it.problem.as_deref().unwrap_or("not ready");
    format!("{}: {problem}", it.name)
}

fn webhook(facts: &Facts) -> Check {
    let check = Check::pass("LEY-202", "admission webhook", "");
    let Some(webhook) = &facts.webhook else {
        return check.warn(
            "there is none: invalid policies are told in their status only",
            "leyline install brings it",
        );
    };
    if !webhook.trusted {
        return check.warn(
            format!("{} has no certificate authority yet", webhook.name),
            "the control plane fills it in when it leads; see its log",
        );
    }
    Check {
        message: format!(
            "{} checks objects, on failure: {}",
            webhook.name, webhook.policy
        ),
        ..check
    }
}

fn on_nodes(
    facts: &Facts,
    pods: &[PodFacts],
    code: &'static str,
    name: &'static str,
    set: &str,
) -> Check {
    let check = Check::pass(
        code,
        name,
        format!("ready on {}", counted(facts.nodes.len(), "node")),
    );
    let linux = facts.nodes.iter().filter(|it| it.system == "linux");
    let without = linux.filter(|node| !pods.iter().any(|pod| pod.ready && pod.node == node.name));
    let told = without.map(|node| {
        let here = pods.iter().find(|pod| pod.node == node.name);
        match here {
            Some(pod) => format!("{}: {}", node.name, troubled(pod)),
            None => format!("{}: no pod", node.name),
        }
    });
    match named(told) {
        Some(told) => check.fail(
            told,
            format!("pods there cannot join; see daemonset/{set} and its pods' events"),
        ),
        None => check,
    }
}

fn synced(facts: &Facts) -> Check {
    let check = Check::pass(
        "LEY-205",
        "tunnels in sync",
        "every tunnel has what the control plane knows",
    );
    let proxies = match &facts.proxies {
        Ok(proxies) => proxies,
        Err(error) => {
            return check.warn(
                format!("not known: {error}"),
                "the control plane's debug port must be reachable by port-forward",
            );
        }
    };
    let of = |pod: &PodFacts| {
        let own = proxies
            .iter()
            .filter(|it| it.name.split('.').next() == Some(pod.name.as_str()));
        own.map(Proxy::state).max()
    };
    let ready = || facts.tunnels.iter().filter(|it| it.ready);
    let refusing = ready()
        .filter(|it| of(it) == Some(State::Error))
        .map(|it| &it.name);
    if let Some(names) = named(refusing) {
        return check.fail(
            format!("refuse what they were sent: {names}"),
            "leyline status tells what and why",
        );
    }
    if let Some(names) = named(ready().filter(|it| of(it).is_none()).map(|it| &it.name)) {
        return check.fail(
            format!("not connected to the control plane: {names}"),
            "they go on with what they had; see their logs for the control plane's address and certificate",
        );
    }
    match named(
        ready()
            .filter(|it| of(it) != Some(State::Synced))
            .map(|it| &it.name),
    ) {
        Some(names) => check.warn(
            format!("behind: {names}"),
            "a moment after a change this is usual; run it again",
        ),
        None => check,
    }
}

fn versions(facts: &Facts) -> Check {
    let proxies = facts.proxies.as_deref().unwrap_or_default();
    let versions: BTreeSet<_> = proxies.iter().map(|it| it.version.as_str()).collect();
    let all = versions.iter().copied().collect::<Vec<_>>().join(", ");
    let check = Check::pass("LEY-206", "versions", all.clone());
    match versions.len() {
        0 => Check {
            message: "no proxies".to_owned(),
            ..check
        },
        1 => check,
        _ => check.warn(
            format!("proxies of several versions: {all}"),
            "finish the roll-out: leyline version",
        ),
    }
}

fn enrolled(facts: &Facts) -> Check {
    let count = counted(facts.enrolled, "pod");
    let check = Check::pass(
        "LEY-301",
        "pods in the mesh",
        format!("{count} joined, none waits"),
    );
    match named(facts.outside.iter()) {
        Some(names) => check.fail(
            format!("labelled, and not in the mesh: {names}"),
            "see the log of istio-cni-node on the pod's node; host-network pods never join",
        ),
        None => check,
    }
}

fn certificates(facts: &Facts) -> Check {
    let count = counted(facts.certificates.len(), "certificate");
    let check = Check::pass("LEY-302", "certificates", format!("{count}, all valid"));
    let broken = facts
        .certificates
        .iter()
        .filter(|it| it.state.starts_with("Unavailable"));
    if let Some(names) =
        named(broken.map(|it| format!("{} on {} ({})", it.identity, it.tunnel, it.state)))
    {
        return check.fail(
            format!("not issued: {names}"),
            "see the control plane's log for this identity",
        );
    }
    let ended = |it: &&CertificateFacts| it.leaf_ends.is_some_and(|end| end <= facts.now);
    if let Some(names) = named(
        facts
            .certificates
            .iter()
            .filter(ended)
            .map(|it| format!("{} on {}", it.identity, it.tunnel)),
    ) {
        return check.fail(
            format!("expired: {names}"),
            "the tunnel cannot renew them: is the control plane reachable?",
        );
    }
    let month = facts.now + Duration::days(30);
    let root = facts
        .certificates
        .iter()
        .filter_map(|it| it.root_ends)
        .min();
    if let Some(end) = root.filter(|it| *it <= month) {
        return check.warn(
            format!("the root ends on {}", end.date()),
            "rotate the root (cacerts) before that",
        );
    }
    match named(facts.unread.iter()) {
        Some(names) => check.warn(
            format!("not known of {names}"),
            "their admin ports could not be asked",
        ),
        None => check,
    }
}

fn counted(count: usize, word: &str) -> String {
    match count {
        1 => format!("1 {word}"),
        count => format!("{count} {word}s"),
    }
}

/// The first few, and how many more; none where there are none.
fn named(all: impl Iterator<Item = impl fmt::Display>) -> Option<String> {
    let all: Vec<_> = all.map(|it| it.to_string()).collect();
    let shown = all
        .iter()
        .take(NAMED)
        .cloned()
        .collect::<Vec<_>>()
        .join(", ");
    match all.len() {
        0 => None,
        count if count > NAMED => Some(format!("{shown} and {} more", count - NAMED)),
        _ => Some(shown),
    }
}
