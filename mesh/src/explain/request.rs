//! What a waypoint decides of one request: the waypoint's own functions, asked in its order.

use std::{borrow::Cow, collections::BTreeMap, fmt::Write as _, net::SocketAddr};

use http::{HeaderMap, Method};

use super::{Decider, Mark, Stage, Step, Verdict, name_of};
use crate::{
    authorize::{Finding, RuleRef},
    identity::{Identity, TrustDomain},
    l7::{
        authorize::{self, Decision},
        cors, edit,
        path::normalize,
        request::{ConnectionFacts, RequestFacts, is_grpc},
        route::{Action, Backend, HttpRule, Route, WeightedBackend},
        served::AppProtocol,
        table::{ConnectionSelection, Selected, Selection},
        view::View,
    },
    names::{NamespacedHostname, Str},
    workload::Workload,
};

#[cfg(test)]
mod tests;

/// One request, as its client sends it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// Its method.
    pub method: Method,
    /// Its host; none: the one that is connected to.
    pub host: Option<Str>,
    /// Its path, with its query.
    pub path: Str,
    /// Its headers.
    pub headers: HeaderMap,
}

/// What is asked of a waypoint.
pub(super) struct Asked<'a> {
    pub(super) view: &'a View,
    pub(super) waypoint: &'a Workload,
    pub(super) request: &'a Request,
    /// None: a workload by its own address.
    pub(super) service: Option<&'a NamespacedHostname>,
    /// The address that is connected to.
    pub(super) destination: SocketAddr,
    pub(super) source: SocketAddr,
    pub(super) identity: &'a Identity,
    /// Of the workload that asks, where the waypoint knows them.
    pub(super) labels: Option<&'a BTreeMap<Str, Str>>,
}

/// What the waypoint does.
pub(super) struct Ruling {
    pub(super) steps: Vec<Step>,
    /// The object that decides, where one does.
    pub(super) decided_by: Option<Decider>,
    pub(super) end: End,
}

/// Where a request goes from the waypoint.
pub(super) enum End {
    /// It ends here.
    Here(Verdict),
    /// To the endpoints of the service, or the workload, that was addressed.
    Own,
    /// To these backends.
    Backends(Vec<Sent>),
}

/// A service that a route sends to.
#[derive(Clone)]
pub(super) struct Sent {
    pub(super) service: NamespacedHostname,
    pub(super) port: u16,
    pub(super) subset: Option<Str>,
}

struct Told {
    steps: Vec<Step>,
}

impl Told {
    fn tell(&mut self, step: Stage, outcome: Mark, detail: impl Into<String>, more: Vec<String>) {
        self.steps.push(Step {
            step,
            outcome,
            detail: detail.into(),
            more,
        });
    }

    fn end(self, end: End, decided_by: Option<Decider>) -> Ruling {
        Ruling {
            steps: self.steps,
            decided_by,
            end,
        }
    }

    fn refuse(mut self, step: Stage, detail: impl Into<String>, by: Option<Decider>) -> Ruling {
        self.tell(step, Mark::Refuse, detail, Vec::new());
        self.end(End::Here(Verdict::Deny), by)
    }
}

/// Asks a waypoint.
pub(super) fn ask(asked: &Asked<'_>) -> Ruling {
    let mut told = Told { steps: Vec::new() };
    let name = name_of(asked.waypoint);
    let protocol = match protocol(asked) {
        Ok(protocol) => protocol,
        Err(why) => {
            return told.refuse(
                Stage::Waypoint,
                format!("refused by waypoint {name}: {why}"),
                None,
            );
        }
    };
    let connection = ConnectionFacts {
        service: asked.service,
        port: asked.destination.port(),
        destination: asked.destination.ip(),
        source: asked.source,
        identity: Some(asked.identity),
        source_labels: asked.labels,
        sni: asked
            .request
            .host
            .as_deref()
            .filter(|_| protocol == AppProtocol::Tls),
    };
    let opaque = matches!(protocol, AppProtocol::Tcp | AppProtocol::Tls);
    if opaque || asked.view.treats_as_tcp(&connection) {
        let detail = format!("waypoint {name} takes the connection as it is: it is not HTTP there");
        told.tell(Stage::Waypoint, Mark::Warn, detail, Vec::new());
        return of_connection(asked, &connection, protocol, told);
    }
    told.tell(
        Stage::Waypoint,
        Mark::Pass,
        format!(
            "waypoint {name} decides on {} {}",
            asked.request.method, asked.request.path
        ),
        Vec::new(),
    );
    of_request(asked, connection, protocol, told)
}

/// Of the port; why it is refused, where it is not served.
fn protocol(asked: &Asked<'_>) -> Result<AppProtocol, String> {
    let Some(key) = asked.service else {
        return Ok(AppProtocol::Unknown);
    };
    let served = asked.view.service(key).filter(|it| it.bound);
    let served = served.ok_or_else(|| format!("it does not serve service {key}"))?;
    let port = asked.destination.port();
    let protocol = served.ports.get(&port).copied();
    protocol.ok_or_else(|| format!("it serves service {key}, but not its port {port}"))
}

fn of_request(
    asked: &Asked<'_>,
    connection: ConnectionFacts<'_>,
    protocol: AppProtocol,
    told: Told,
) -> Ruling {
    let request = asked.request;
    let (path, query) = match request.path.split_once('?') {
        Some((path, query)) => (path, Some(query)),
        None => (&*request.path, None),
    };
    let how = asked.view.config().map(|it| it.normalization);
    let path = match normalize(path, how.unwrap_or_default()) {
        Ok(path) => path,
        Err(error) => return told.refuse(Stage::Waypoint, format!("answered 400: {error}"), None),
    };
    let authority = request
        .host
        .as_deref()
        .or(asked.service.map(|it| &*it.hostname));
    let authority = authority.map_or_else(|| asked.destination.to_string().into(), Cow::Borrowed);
    let http2 = matches!(protocol, AppProtocol::Http2 | AppProtocol::Grpc);
    let facts = RequestFacts {
        connection,
        method: &request.method,
        scheme: "http",
        authority: &authority,
        path: &path,
        query,
        headers: &request.headers,
        remote: asked.source.ip(),
        claims: None,
        http2: http2 || is_grpc(&request.headers),
    };
    judged(asked, &facts, told)
}

fn judged(asked: &Asked<'_>, facts: &RequestFacts<'_>, mut told: Told) -> Ruling {
    let own = asked.waypoint.identity().trust_domain;
    let selection = asked.view.select(facts);
    told.steps.push(routed(&selection, facts));
    let questions = authorize::custom(asked.view, facts, &own);
    if let Some(ruling) = custom(&mut told, questions) {
        return told.end(End::Here(Verdict::Deny), Some(ruling));
    }
    if asked
        .view
        .authentications_for(asked.service)
        .next()
        .is_some()
    {
        let detail = "tokens are verified here; this request is judged as one without";
        told.tell(Stage::Policy, Mark::Warn, detail, Vec::new());
    }
    let verdict = authorize::request(asked.view, facts, &own);
    match policy(&mut told, verdict) {
        Ok(by) => acted(&selection, facts, told, by),
        Err(by) => told.end(End::Here(Verdict::Deny), by),
    }
}

/// The first authorizer that is not known refuses; the others cannot be asked from here.
fn custom(told: &mut Told, questions: Vec<authorize::Question>) -> Option<Decider> {
    for question in questions {
        let by = decider(&question.by);
        let provider = &question.provider;
        if !question.known {
            let detail = format!(
                "denied: {by} asks external authorizer {provider:?}, which no settings name"
            );
            told.tell(Stage::Policy, Mark::Refuse, detail, Vec::new());
            return Some(by);
        }
        let detail = format!(
            "{by} asks external authorizer {provider:?}: what it answers is not known here"
        );
        told.tell(Stage::Policy, Mark::Warn, detail, Vec::new());
    }
    None
}

/// The object that allows; an error is a refusal with the object that refuses.
fn policy(
    told: &mut Told,
    verdict: authorize::Verdict,
) -> Result<Option<Decider>, Option<Decider>> {
    let mut more: Vec<_> = verdict.findings.iter().map(finding).collect();
    more.extend(
        verdict
            .audits
            .iter()
            .map(|it| format!("audited by {}", decider(it))),
    );
    let (mark, detail, by) = match &verdict.decision {
        Decision::Allow { by: None } => {
            let detail =
                "allowed: no ALLOW policy applies to these requests, and no DENY policy matches";
            (Mark::Pass, detail.to_owned(), None)
        }
        Decision::Allow { by: Some(by) } => {
            let by = decider(by);
            (Mark::Pass, format!("allowed by {by}"), Some(by))
        }
        Decision::Deny { by: None } => {
            let detail = "denied: ALLOW policies apply to these requests, and none matches";
            (Mark::Refuse, detail.to_owned(), None)
        }
        Decision::Deny { by: Some(by) } => {
            let by = decider(by);
            (Mark::Refuse, format!("denied by {by}"), Some(by))
        }
    };
    told.tell(Stage::Policy, mark, detail, more);
    if verdict.is_allow() { Ok(by) } else { Err(by) }
}

fn decider(by: &RuleRef) -> Decider {
    Decider::policy(&by.policy, Some(by.rule))
}

fn finding(finding: &Finding) -> String {
    match finding {
        Finding::WouldDeny(by) => format!("on trial: {} would deny it", decider(by)),
        Finding::WouldAllow(by) => format!("on trial: {} would allow it", decider(by)),
        Finding::WouldNotAllow => "on trial: ALLOW policies would not allow it".to_owned(),
    }
}

/// The route's object. Kinds have names that do not change.
fn of_route(route: &Route, rule: usize) -> Decider {
    const KINDS: [&str; 5] = [
        "HTTPRoute",
        "GRPCRoute",
        "TLSRoute",
        "TCPRoute",
        "VirtualService",
    ];
    let kind = KINDS.into_iter().find(|it| **it == *route.key.kind);
    Decider {
        kind: kind.unwrap_or("Route"),
        namespace: route.key.namespace.clone(),
        name: route.key.name.clone(),
        rule: Some(rule),
    }
}

fn routed(selection: &Selection, facts: &RequestFacts<'_>) -> Step {
    let (outcome, detail, more) = match selection {
        Selection::NoRoutes => {
            let detail = "no route is attached: the service's own endpoints";
            (Mark::Pass, detail.to_owned(), Vec::new())
        }
        Selection::NoMatch => {
            let detail = "routes are attached, and no rule matches: answered 404";
            (Mark::Warn, detail.to_owned(), Vec::new())
        }
        Selection::Rule(selected) => {
            let by = of_route(&selected.route, selected.rule);
            let name = selected.name().map(|it| format!(" ({it})"));
            let detail = format!("{by}{}", name.unwrap_or_default());
            (Mark::Pass, detail, changes(selected, facts))
        }
    };
    Step {
        step: Stage::Route,
        outcome,
        detail,
        more,
    }
}

/// What a rule does beside its action.
fn changes(selected: &Selected, facts: &RequestFacts<'_>) -> Vec<String> {
    let rule = selected.rule();
    let mut lines = Vec::new();
    if let Some(path) = rule.rewrite.as_ref().and_then(|it| it.path.as_ref()) {
        let path = edit::rewrite_path(path, selected.matched, facts.path);
        lines.push(format!("the path becomes {path}"));
    }
    if let Some(host) = rule.rewrite.as_ref().and_then(|it| it.authority.as_ref()) {
        lines.push(format!("the host becomes {host}"));
    }
    lines.extend(rule.mirrors.iter().map(|it| {
        let percent = f64::from(it.per_million) / 10_000.0;
        format!("{percent}% are copied to {}", backend(&it.backend))
    }));
    if let Some((often, time)) = rule.fault.as_ref().and_then(|it| it.delay) {
        lines.push(format!(
            "{}% wait {time:?} on purpose",
            f64::from(often) / 10_000.0
        ));
    }
    if let Some((often, answer)) = rule.fault.as_ref().and_then(|it| it.abort) {
        lines.push(format!(
            "{}% are answered {answer:?} on purpose",
            f64::from(often) / 10_000.0
        ));
    }
    lines.extend(limits(rule));
    lines
}

fn limits(rule: &HttpRule) -> Vec<String> {
    let limit = rule.rate_limit.as_ref().map(|it| {
        let (tokens, time) = (it.tokens_per_fill, it.fill_interval);
        format!("at most {tokens} in {time:?}, {} at once", it.max_tokens)
    });
    let timeout = rule
        .timeouts
        .request
        .map(|it| format!("all of it may take {it:?}"));
    let retry = rule.retry.as_ref();
    let retry = retry.map(|it| format!("up to {} retries", it.attempts));
    let asks = rule.external_authorizer.as_ref();
    let asks = asks.map(|it| format!("external authorizer {it:?} is asked"));
    [limit, timeout, retry, asks]
        .into_iter()
        .flatten()
        .collect()
}

/// What becomes of a request that may pass.
fn acted(
    selection: &Selection,
    facts: &RequestFacts<'_>,
    mut told: Told,
    by: Option<Decider>,
) -> Ruling {
    let selected = match selection {
        Selection::NoRoutes => return told.end(End::Own, by),
        Selection::NoMatch => {
            return told.refuse(
                Stage::Route,
                "answered 404: no rule of the routes matches",
                by,
            );
        }
        Selection::Rule(selected) => selected,
    };
    let route = of_route(&selected.route, selected.rule);
    if let Some(cors) = &selected.rule().cors
        && let cors::CorsDecision::Preflight(_) = cors::decide(cors, facts)
    {
        told.tell(
            Stage::Route,
            Mark::Pass,
            "a CORS preflight: answered here",
            Vec::new(),
        );
        return told.end(End::Here(Verdict::Allow), Some(route));
    }
    match &selected.rule().action {
        Action::Forward(backends) => forwarded(backends, told, by, route),
        Action::Redirect(redirect) => {
            let location = edit::redirect(redirect, selected.matched, facts);
            let location = location.and_then(|(_, it)| it.to_str().ok().map(str::to_owned));
            let detail = format!(
                "answered {}: {}",
                redirect.status,
                location.unwrap_or_default()
            );
            told.tell(Stage::Route, Mark::Pass, detail, Vec::new());
            told.end(End::Here(Verdict::Allow), Some(route))
        }
        Action::Respond(response) => {
            let detail = format!("answered {} with a fixed body", response.status);
            told.tell(Stage::Route, Mark::Pass, detail, Vec::new());
            told.end(End::Here(Verdict::Allow), Some(route))
        }
        Action::Invalid(why) => {
            told.refuse(Stage::Route, format!("answered 500: {why}"), Some(route))
        }
    }
}

fn backend(backend: &Backend) -> String {
    match backend {
        Backend::Service {
            service,
            port,
            subset,
        } => {
            let mut text = format!("{service}:{port}");
            if let Some(subset) = subset {
                let _ = write!(text, ", subset {subset}");
            }
            text
        }
        Backend::Invalid(why) => format!("nothing, which is answered 500: {why}"),
    }
}

fn forwarded(
    backends: &[WeightedBackend],
    told: Told,
    by: Option<Decider>,
    route: Decider,
) -> Ruling {
    let weighted: Vec<_> = backends.iter().map(|it| (it.weight, &it.backend)).collect();
    split(&weighted, "answered 500", told, by, route)
}

/// The shares of backends, and the services among them.
fn split(
    backends: &[(u32, &Backend)],
    without: &str,
    mut told: Told,
    by: Option<Decider>,
    route: Decider,
) -> Ruling {
    let total: u64 = backends.iter().map(|(weight, _)| u64::from(*weight)).sum();
    let used = backends.iter().filter(|(weight, _)| *weight > 0);
    let shares: Vec<_> = used
        .clone()
        .map(|(weight, it)| {
            format!(
                "{}% to {}",
                u64::from(*weight) * 100 / total.max(1),
                backend(it)
            )
        })
        .collect();
    let services: Vec<_> = used
        .filter_map(|(_, it)| match it {
            Backend::Service {
                service,
                port,
                subset,
            } => Some(Sent {
                service: service.clone(),
                port: *port,
                subset: subset.clone(),
            }),
            Backend::Invalid(_) => None,
        })
        .collect();
    if services.is_empty() {
        let why = shares
            .first()
            .map_or("no backend has a weight", String::as_str);
        return told.refuse(Stage::Route, format!("{without}: {why}"), Some(route));
    }
    told.tell(Stage::Route, Mark::Pass, shares.join(", "), Vec::new());
    told.end(End::Backends(services), by.or(Some(route)))
}

fn of_connection(
    asked: &Asked<'_>,
    facts: &ConnectionFacts<'_>,
    protocol: AppProtocol,
    mut told: Told,
) -> Ruling {
    let own: TrustDomain = asked.waypoint.identity().trust_domain;
    let questions = authorize::custom_connection(asked.view, facts, &own);
    if let Some(question) = questions.first() {
        let by = decider(&question.by);
        let detail = format!("denied: {by} asks an external authorizer, which needs HTTP");
        return told.refuse(Stage::Policy, detail, Some(by));
    }
    let by = match policy(&mut told, authorize::connection(asked.view, facts, &own)) {
        Ok(by) => by,
        Err(by) => return told.end(End::Here(Verdict::Deny), by),
    };
    let selection = match protocol {
        AppProtocol::Tls => asked.view.select_tls(facts),
        _ => asked.view.select_tcp(facts),
    };
    match selection {
        ConnectionSelection::NoRoutes => told.end(End::Own, by),
        ConnectionSelection::NoMatch => {
            told.refuse(Stage::Route, "closed: no rule of the routes matches", by)
        }
        ConnectionSelection::Rule(selected) => {
            let route = of_route(&selected.route, selected.rule);
            told.tell(Stage::Route, Mark::Pass, route.to_string(), Vec::new());
            let weighted: Vec<_> = selected.backends().iter().map(|(w, it)| (*w, it)).collect();
            split(&weighted, "closed", told, by, route)
        }
    }
}
