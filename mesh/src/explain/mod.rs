//! Why a connection is allowed, denied or routed so: the questions of the data plane, asked in its order with its own
//! functions, and every answer told with the object that gave it.
//!
//! Pure: the views are what the node tunnels know (their `config_dump`). Chance is walked through, so that every endpoint
//! and waypoint that a connection may get is one [`Path`]. What L7 decides at a waypoint is told of one [`Request`], where
//! the waypoint's own view is known; else it is said that it is not.

mod policy;
mod request;
mod route;
#[cfg(test)]
mod tests;

use std::{
    collections::BTreeMap,
    fmt,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use serde::Serialize;

use crate::{
    dns,
    draw::Draw,
    identity::Identity,
    l7,
    names::{PolicyKey, Str},
    outcome::{Object, Refusal},
    view::MeshView,
    workload::{NetworkMode, TunnelProtocol, Workload},
};

/// The form of [`Explanation`]'s JSON.
pub const VERSION: &str = "explain.leyline.dev/v1";

pub use request::Request;

/// What a node's tunnel knows and holds.
#[derive(Clone, Copy, Debug)]
pub struct Node<'a> {
    /// Its view.
    pub view: &'a MeshView,
    /// The state of its certificates (`Available`, `Unavailable: why` ...) by SPIFFE ID, where known.
    pub certificates: Option<&'a BTreeMap<String, String>>,
    /// The state of its pods (`Up`, `Pending`) by `namespace/name`, where known.
    pub pods: Option<&'a BTreeMap<String, String>>,
}

/// The tunnels that are known.
pub trait Nodes {
    /// The tunnel of the node with this name.
    fn node(&self, name: &str) -> Option<Node<'_>>;

    /// What the waypoint with this pod knows of requests.
    fn waypoint(&self, pod: &Workload) -> Option<&l7::view::View> {
        let _ = pod;
        None
    }
}

/// What is asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question {
    /// Who connects.
    pub source: Arc<Workload>,
    /// To what.
    pub destination: Destination,
    /// To which port.
    pub port: u16,
    /// How names are understood.
    pub names: dns::Settings,
    /// The request that waypoints on the way are asked about.
    pub request: Option<Request>,
}

/// What the source connects to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Destination {
    /// A name, as an application would say it.
    Name(Str),
    /// An address.
    Address(IpAddr),
}

impl fmt::Display for Question {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.destination {
            Destination::Name(name) => write!(f, "{name}:{}", self.port),
            Destination::Address(ip) => SocketAddr::new(*ip, self.port).fmt(f),
        }
    }
}

/// The answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Explanation {
    /// [`VERSION`].
    pub api_version: &'static str,
    /// Whether the connection may be.
    pub verdict: Verdict,
    /// The object that decides, where one does: of the first path with this verdict.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub decided_by: Option<Decider>,
    /// The sentence for people.
    pub summary: String,
    /// `namespace/name` of the source.
    pub source: String,
    /// What was asked for.
    pub destination: String,
    /// What is common to all paths.
    pub steps: Vec<Step>,
    /// Each way that the connection may go; none where it goes nowhere.
    pub paths: Vec<Path>,
}

/// Whether a connection may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Verdict {
    /// It may, on every path.
    Allow,
    /// It may not, on any path.
    Deny,
    /// It depends on the endpoint that it gets.
    Mixed,
    /// Not to be told from what is known.
    Unknown,
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Allow => "ALLOW",
            Self::Deny => "DENY",
            Self::Mixed => "MIXED",
            Self::Unknown => "UNKNOWN",
        })
    }
}

/// One way that the connection may go.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Path {
    /// `namespace/name` of the endpoint, or its address where it is of no workload.
    pub endpoint: String,
    /// The endpoint's node, where known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node: Option<Str>,
    /// `namespace/name` of the waypoint on the way.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub waypoint: Option<String>,
    /// Those that it passes after that one, in their order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub further_waypoints: Vec<String>,
    /// Whether the connection may be, this way.
    pub verdict: Verdict,
    /// The object that decides.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub decided_by: Option<Decider>,
    /// In the order of the data plane.
    pub steps: Vec<Step>,
}

/// One question of the data plane, answered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Step {
    /// Which.
    pub step: Stage,
    /// What it means for the connection.
    pub outcome: Mark,
    /// The sentence for people.
    pub detail: String,
    /// More of it, a line each.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub more: Vec<String>,
}

/// The data plane's questions, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Stage {
    /// Who connects.
    Source,
    /// What the name means.
    Dns,
    /// Whether the connection goes through the source's tunnel.
    Capture,
    /// What the source proves.
    Identity,
    /// Where it goes next, and how.
    NextHop,
    /// What an L7 proxy between does.
    Waypoint,
    /// Which rule of a route a request gets there.
    Route,
    /// Where it arrives.
    Inbound,
    /// Whether policy there lets it in.
    Policy,
}

impl Stage {
    /// The word for people.
    pub fn text(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::Dns => "dns",
            Self::Capture => "capture",
            Self::Identity => "identity",
            Self::NextHop => "next hop",
            Self::Waypoint => "waypoint",
            Self::Route => "route",
            Self::Inbound => "inbound",
            Self::Policy => "policy",
        }
    }
}

/// What a step means for the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Mark {
    /// It goes on.
    Pass,
    /// It goes on, with something that people should know.
    Warn,
    /// It ends here.
    Refuse,
}

/// The object that decides.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Decider {
    /// Its Kubernetes kind.
    pub kind: &'static str,
    /// Its namespace; empty for what has none.
    pub namespace: Str,
    /// Its name.
    pub name: Str,
    /// The rule of a policy that matched, from 0, as the tunnel has it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rule: Option<usize>,
}

impl fmt::Display for Decider {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ", self.kind)?;
        if !self.namespace.is_empty() {
            write!(f, "{}/", self.namespace)?;
        }
        f.write_str(&self.name)?;
        match self.rule {
            Some(rule) => write!(f, ", rule {rule}"),
            None => Ok(()),
        }
    }
}

impl Decider {
    /// The user's object behind a policy of the wire: those that stand for PeerAuthentication have names of their own
    /// (control-plane 6.2).
    pub fn policy(key: &PolicyKey, rule: Option<usize>) -> Self {
        let converted = key.name.strip_prefix("converted_peer_authentication_");
        let (kind, namespace, name, rule) = match (converted, &*key.name) {
            (Some(name), _) => (
                "PeerAuthentication",
                key.namespace.clone(),
                name.into(),
                None,
            ),
            // One for the mesh's, a namespace's and a workload's object alike: which of them it was, the wire does not say.
            (None, "istio_converted_static_strict") => (
                "PeerAuthentication",
                Str::default(),
                "in STRICT mode".into(),
                None,
            ),
            (None, _) => (
                "AuthorizationPolicy",
                key.namespace.clone(),
                key.name.clone(),
                rule,
            ),
        };
        Self {
            kind,
            namespace,
            name,
            rule,
        }
    }

    fn of(object: &Object) -> Self {
        match object {
            Object::Policy(key) => Self::policy(key, None),
            Object::Policies(keys) => match keys.as_slice() {
                [key] => Self::policy(key, None),
                keys => Self {
                    kind: "AuthorizationPolicies",
                    namespace: Str::default(),
                    name: crate::outcome::listed(keys).into(),
                    rule: None,
                },
            },
            Object::Service(key) => Self {
                kind: "Service",
                namespace: key.namespace.clone(),
                name: key.hostname.clone(),
                rule: None,
            },
            Object::Workload(uid) => Self {
                kind: "Workload",
                namespace: Str::default(),
                name: uid.0.clone(),
                rule: None,
            },
            Object::Address(address) => Self {
                kind: "Address",
                namespace: Str::default(),
                name: address.address.to_string().into(),
                rule: None,
            },
        }
    }
}

/// Explains one connection. Pure: same views and question, same answer.
///
/// `source_node` is the tunnel of the source's node. Of destinations whose node is not known, the source's view is asked
/// instead, and the explanation says so. Cost: some hundred decisions.
pub fn explain(source_node: Node<'_>, nodes: &impl Nodes, question: &Question) -> Explanation {
    let mut asked = Asked {
        here: source_node,
        nodes,
        question,
        steps: Vec::new(),
    };
    let outcome = asked.answer();
    let (verdict, decided_by, summary, paths) = match outcome {
        Ok(paths) => {
            let (verdict, decided_by) = overall(&paths);
            let summary = summary(verdict, &paths);
            (verdict, decided_by, summary, paths)
        }
        Err(end) => (end.verdict, end.decided_by, end.summary, Vec::new()),
    };
    Explanation {
        api_version: VERSION,
        verdict,
        decided_by,
        summary,
        source: name_of(&question.source),
        destination: question.to_string(),
        steps: asked.steps,
        paths,
    }
}

/// `namespace/name`.
fn name_of(workload: &Workload) -> String {
    format!("{}/{}", workload.namespace, workload.name)
}

fn overall(paths: &[Path]) -> (Verdict, Option<Decider>) {
    let all = |verdict| paths.iter().all(|it| it.verdict == verdict);
    let first = |verdict| {
        let of = paths.iter().find(|it| it.verdict == verdict);
        of.and_then(|it| it.decided_by.clone())
    };
    if all(Verdict::Allow) {
        (Verdict::Allow, first(Verdict::Allow))
    } else if all(Verdict::Deny) {
        (Verdict::Deny, first(Verdict::Deny))
    } else if paths.iter().any(|it| it.verdict == Verdict::Unknown) {
        (Verdict::Unknown, None)
    } else {
        (Verdict::Mixed, first(Verdict::Deny))
    }
}

fn summary(verdict: Verdict, paths: &[Path]) -> String {
    let worst = match verdict {
        Verdict::Mixed => Verdict::Deny,
        other => other,
    };
    let path = paths.iter().find(|it| it.verdict == worst);
    let last = path.and_then(|it| it.steps.last());
    let told = last.map_or_else(String::new, |it| it.detail.clone());
    match verdict {
        Verdict::Mixed => {
            let denied = paths.iter().filter(|it| it.verdict == Verdict::Deny);
            format!(
                "{} of {} endpoints refuse: {told}",
                denied.count(),
                paths.len()
            )
        }
        _ => told,
    }
}

/// The end of an explanation before there is a path.
struct End {
    verdict: Verdict,
    decided_by: Option<Decider>,
    summary: String,
}

struct Asked<'a, N> {
    here: Node<'a>,
    nodes: &'a N,
    question: &'a Question,
    steps: Vec<Step>,
}

impl<N: Nodes> Asked<'_, N> {
    fn tell(&mut self, step: Stage, outcome: Mark, detail: impl Into<String>) {
        self.steps.push(Step {
            step,
            outcome,
            detail: detail.into(),
            more: Vec::new(),
        });
    }

    fn end(&mut self, step: Stage, verdict: Verdict, detail: String) -> End {
        let outcome = match verdict {
            Verdict::Deny => Mark::Refuse,
            Verdict::Allow => Mark::Pass,
            Verdict::Mixed | Verdict::Unknown => Mark::Warn,
        };
        self.tell(step, outcome, detail.clone());
        End {
            verdict,
            decided_by: None,
            summary: detail,
        }
    }

    fn answer(&mut self) -> Result<Vec<Path>, End> {
        let captured = self.source();
        let address = self.address()?;
        let destination = SocketAddr::new(address, self.question.port);
        let source = &self.question.source;
        if source.addresses.contains(&address) || address.is_loopback() {
            let detail =
                format!("{destination} is the pod itself: never captured, no policy applies");
            return Err(self.end(Stage::Capture, Verdict::Allow, detail));
        }
        if captured {
            self.captured(destination)
        } else {
            self.plain(destination)
        }
    }

    /// Who connects, and whether its connections go through its node's tunnel.
    fn source(&mut self) -> bool {
        let source = &self.question.source;
        let mut detail = format!("pod {}", name_of(source));
        if !source.node.is_empty() {
            detail.push_str(&format!(" on node {}", source.node));
        }
        if let Some(address) = source.addresses.first() {
            detail.push_str(&format!(", {address}"));
        }
        self.tell(Stage::Source, Mark::Pass, detail);
        source.tunnel_protocol == TunnelProtocol::Hbone && !source.native_tunnel
    }

    /// The address that the source connects to.
    fn address(&mut self) -> Result<IpAddr, End> {
        let name = match &self.question.destination {
            Destination::Address(address) => return Ok(address.to_canonical()),
            Destination::Name(name) => name.clone(),
        };
        let found = self.resolve(&name);
        let Some((service, addresses)) = found else {
            let detail = format!(
                "{name} is no name of the mesh: the pod's own resolver is asked. Name its address to know more; an address \
                 that no object of the mesh has is passed through as it is"
            );
            return Err(self.end(Stage::Dns, Verdict::Unknown, detail));
        };
        let Some(address) = self.preferred(&addresses) else {
            let detail = format!("{name} means service {service}, which has no address");
            return Err(self.end(Stage::Dns, Verdict::Deny, detail));
        };
        let mut texts: Vec<_> = addresses.iter().map(ToString::to_string).collect();
        texts.truncate(4);
        let more = match addresses.len().saturating_sub(texts.len()) {
            0 => String::new(),
            more => format!(" and {more} more"),
        };
        let told = format!("{name} means service {service}: {}{more}", texts.join(", "));
        self.tell(Stage::Dns, Mark::Pass, told);
        Ok(address)
    }

    /// The service that a name means to the source, and its addresses, sorted.
    fn resolve(&self, name: &str) -> Option<(String, Vec<IpAddr>)> {
        let mut service = None;
        let mut addresses = Vec::new();
        for kind in [dns::RecordType::A, dns::RecordType::Aaaa] {
            let source = &self.question.source;
            let names = &self.question.names;
            match dns::answer(self.here.view, names, source, name, kind, Draw(0)) {
                dns::Answer::Forward => {}
                dns::Answer::Local(records) => {
                    service = Some(records.service.to_string());
                    addresses.extend(records.addresses);
                }
            }
        }
        addresses.sort();
        Some((service?, addresses))
    }

    /// One of the family that the source has first.
    fn preferred(&self, addresses: &[IpAddr]) -> Option<IpAddr> {
        let first = self.question.source.addresses.first();
        let v4 = first.is_none_or(IpAddr::is_ipv4);
        let same = addresses.iter().find(|it| it.is_ipv4() == v4);
        same.or_else(|| addresses.first()).copied()
    }

    /// The source's end of a connection to `destination`; its port means nothing.
    fn client(&self, destination: IpAddr) -> SocketAddr {
        let own = &self.question.source.addresses;
        let same = own.iter().find(|it| it.is_ipv4() == destination.is_ipv4());
        let ip = same.or_else(|| own.first()).copied();
        SocketAddr::new(ip.unwrap_or(IpAddr::from([0, 0, 0, 0])), 0)
    }

    /// Why the source is outside the mesh, as far as its record tells.
    fn uncaptured(&self) -> String {
        let source = &self.question.source;
        if source.network_mode == NetworkMode::HostNetwork {
            return "the pod is in its node's network: never captured, its traffic is plaintext without an identity".to_owned();
        }
        format!(
            "the pod is not in the mesh: its traffic is plaintext without an identity (label namespace {} or the pod \
             istio.io/dataplane-mode=ambient)",
            source.namespace
        )
    }

    /// What the source proves, and whether its tunnel can.
    fn identity(&mut self) -> Result<Identity, End> {
        let identity = self.question.source.identity();
        let state = self
            .here
            .certificates
            .and_then(|it| it.get(&identity.to_string()));
        match state {
            Some(state) if state.starts_with("Unavailable") => {
                let detail = format!("{identity}: the tunnel has no certificate for it ({state})");
                Err(self.end(Stage::Identity, Verdict::Deny, detail))
            }
            Some(_) => {
                self.tell(
                    Stage::Identity,
                    Mark::Pass,
                    format!("{identity}, certificate held"),
                );
                Ok(identity)
            }
            None => {
                self.tell(Stage::Identity, Mark::Pass, identity.to_string());
                Ok(identity)
            }
        }
    }
}

/// A refusal, as a sentence and as its object.
fn refused(refusal: &Refusal) -> (String, Option<Decider>) {
    (
        refusal.to_string(),
        refusal.object.as_ref().map(Decider::of),
    )
}
