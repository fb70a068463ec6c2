//! Routes. A rule that cannot be understood keeps the conditions that can, so that no request that it was meant for
//! falls to another rule, and answers 500.

use std::collections::BTreeMap;

use ipnet::IpNet;
use proto::waypoint as wire;

use super::{
    InvalidResource, Result, header_name, labels as read_labels, list, missing, optional,
    optional_duration, optional_port, parsed, pattern, ranges, read, required, text, texts,
    wire_duration, wire_labels, wire_list, wire_optional, wire_text, wire_texts,
};
use crate::l7::route::{
    Action, Attachment, Backend, CallerMatch, Callers, HeaderEdit, HeaderMatch, HttpMatch,
    HttpRule, Order, PathMatch, QueryMatch, Route, Rules, TcpRule, TextMatch, Timeouts, TlsRule,
};
use crate::names::Str;

impl TryFrom<&wire::Route> for Route {
    type Error = InvalidResource;

    fn try_from(wire: &wire::Route) -> Result<Self> {
        Ok(Self {
            key: parsed("key", &wire.key)?,
            created: wire.created,
            attachments: list("attachments", &wire.attachments)?,
            rules: rules(wire.rules.as_ref()),
        })
    }
}

impl From<&Route> for wire::Route {
    fn from(route: &Route) -> Self {
        Self {
            key: route.key.to_string(),
            created: route.created,
            attachments: wire_list(&route.attachments),
            rules: Some((&route.rules).into()),
        }
    }
}

/// Rules of a kind that is not known: an HTTP rule that answers 500.
fn rules(wire: Option<&wire::route::Rules>) -> Rules {
    use wire::route::Rules as Wire;
    match wire {
        Some(Wire::Http(it)) => Rules::Http {
            order: order(it.order),
            rules: it.rules.iter().map(http_rule).collect(),
        },
        Some(Wire::Tls(it)) => Rules::Tls(it.rules.iter().map(tls_rule).collect()),
        Some(Wire::Tcp(it)) => Rules::Tcp(it.rules.iter().map(tcp_rule).collect()),
        None => Rules::Http {
            order: Order::Precedence,
            rules: vec![HttpRule::new(
                Vec::new(),
                Action::Invalid(missing("rules").to_string().into()),
            )],
        },
    }
}

impl From<&Rules> for wire::route::Rules {
    fn from(rules: &Rules) -> Self {
        match rules {
            Rules::Http { order, rules } => Self::Http(wire::HttpRules {
                order: wire_order(*order).into(),
                rules: wire_list(rules),
            }),
            Rules::Tls(rules) => Self::Tls(wire::TlsRules {
                rules: wire_list(rules),
            }),
            Rules::Tcp(rules) => Self::Tcp(wire::TcpRules {
                rules: wire_list(rules),
            }),
        }
    }
}

fn order(number: i32) -> Order {
    match wire::Order::try_from(number).unwrap_or_default() {
        wire::Order::Precedence => Order::Precedence,
        wire::Order::Written => Order::Written,
    }
}

fn wire_order(order: Order) -> wire::Order {
    match order {
        Order::Precedence => wire::Order::Precedence,
        Order::Written => wire::Order::Written,
    }
}

impl TryFrom<&wire::Attachment> for Attachment {
    type Error = InvalidResource;

    fn try_from(wire: &wire::Attachment) -> Result<Self> {
        use wire::attachment::Callers as Wire;
        let callers = match &wire.callers {
            Some(Wire::All(())) => Callers::All,
            Some(Wire::Namespace(it)) => Callers::Namespace(it.as_str().into()),
            None => return Err(missing("callers")),
        };
        Ok(Self {
            service: parsed("service", &wire.service)?,
            port: optional_port(wire.port)?,
            callers,
        })
    }
}

impl From<&Attachment> for wire::Attachment {
    fn from(it: &Attachment) -> Self {
        use wire::attachment::Callers as Wire;
        let callers = match &it.callers {
            Callers::All => Wire::All(()),
            Callers::Namespace(it) => Wire::Namespace(it.to_string()),
        };
        Self {
            service: it.service.to_string(),
            port: it.port.map(Into::into),
            callers: Some(callers),
        }
    }
}

fn http_rule(wire: &wire::HttpRule) -> HttpRule {
    let mut faults = Vec::new();
    let matches = wire.matches.iter().enumerate();
    let matches = matches
        .map(|(at, it)| http_match(it, &format!("matches[{at}]"), &mut faults))
        .collect();
    let understood = understood_rule(wire).map_err(|fault| faults.push(fault.to_string()));
    let name = text(wire.name.as_ref());
    match understood {
        Ok(rule) if faults.is_empty() => HttpRule {
            name,
            matches,
            ..rule
        },
        _ => HttpRule {
            name,
            ..HttpRule::new(matches, Action::Invalid(faults.join("; ").into()))
        },
    }
}

/// Everything but name and matches.
fn understood_rule(wire: &wire::HttpRule) -> Result<HttpRule> {
    let request = optional_duration("request_timeout", wire.request_timeout)?;
    let per_try = optional_duration("per_try_timeout", wire.per_try_timeout)?;
    Ok(HttpRule {
        name: None,
        matches: Vec::new(),
        request_headers: edit("request_headers", wire.request_headers.as_ref())?,
        response_headers: edit("response_headers", wire.response_headers.as_ref())?,
        rewrite: optional("rewrite", wire.rewrite.as_ref())?,
        mirrors: list("mirrors", &wire.mirrors)?,
        cors: optional("cors", wire.cors.as_ref())?,
        fault: optional("fault", wire.fault.as_ref())?,
        rate_limit: optional("rate_limit", wire.rate_limit.as_ref())?,
        external_authorizer: text(wire.external_authorizer.as_ref()),
        timeouts: Timeouts { request, per_try },
        retry: optional("retry", wire.retry.as_ref())?,
        session: optional("session", wire.session.as_ref())?,
        action: action(wire.action.as_ref())?,
    })
}

/// None: changes nothing.
pub(super) fn edit(field: &str, wire: Option<&wire::HeaderEdit>) -> Result<HeaderEdit> {
    Ok(optional(field, wire)?.unwrap_or_default())
}

pub(super) fn wire_edit(edit: &HeaderEdit) -> Option<wire::HeaderEdit> {
    (*edit != HeaderEdit::default()).then(|| edit.into())
}

fn action(wire: Option<&wire::http_rule::Action>) -> Result<Action> {
    use wire::http_rule::Action as Wire;
    match wire {
        Some(Wire::Forward(it)) => list("forward.backends", &it.backends).map(Action::Forward),
        Some(Wire::Redirect(it)) => read("redirect", it).map(Action::Redirect),
        Some(Wire::Respond(it)) => read("respond", it).map(Action::Respond),
        Some(Wire::Invalid(it)) => Ok(Action::Invalid(it.as_str().into())),
        None => Err(missing("action")),
    }
}

impl From<&HttpRule> for wire::HttpRule {
    fn from(rule: &HttpRule) -> Self {
        use wire::http_rule::Action as Wire;
        let action = match &rule.action {
            Action::Forward(backends) => Wire::Forward(wire::Forward {
                backends: wire_list(backends),
            }),
            Action::Redirect(it) => Wire::Redirect(it.into()),
            Action::Respond(it) => Wire::Respond(it.into()),
            Action::Invalid(it) => Wire::Invalid(it.to_string()),
        };
        Self {
            name: wire_text(rule.name.as_ref()),
            matches: wire_list(&rule.matches),
            request_headers: wire_edit(&rule.request_headers),
            response_headers: wire_edit(&rule.response_headers),
            rewrite: wire_optional(rule.rewrite.as_ref()),
            mirrors: wire_list(&rule.mirrors),
            cors: wire_optional(rule.cors.as_ref()),
            fault: wire_optional(rule.fault.as_ref()),
            rate_limit: wire_optional(rule.rate_limit.as_ref()),
            external_authorizer: wire_text(rule.external_authorizer.as_ref()),
            request_timeout: rule.timeouts.request.map(wire_duration),
            per_try_timeout: rule.timeouts.per_try.map(wire_duration),
            retry: wire_optional(rule.retry.as_ref()),
            session: wire_optional(rule.session.as_ref()),
            action: Some(action),
        }
    }
}

/// Keeps what is understood and tells the rest, each with its place.
struct Keep<'a> {
    place: &'a str,
    faults: &'a mut Vec<String>,
}

impl Keep<'_> {
    fn one<T>(&mut self, result: Result<T>) -> Option<T> {
        result
            .map_err(|fault| self.faults.push(fault.within(self.place).to_string()))
            .ok()
    }

    fn text(&mut self, field: &str, wire: Option<&wire::TextMatch>) -> Option<TextMatch> {
        self.one(optional(field, wire)).flatten()
    }

    /// Without room to spare.
    fn all<T>(&mut self, results: impl ExactSizeIterator<Item = Result<T>>) -> Vec<T> {
        let mut kept = Vec::with_capacity(results.len());
        kept.extend(results.filter_map(|it| self.one(it)));
        kept
    }

    fn headers(&mut self, field: &str, wire: &[wire::NamedMatch]) -> Vec<HeaderMatch> {
        self.all(wire.iter().map(|it| read(field, it)))
    }
}

fn http_match(wire: &wire::HttpMatch, place: &str, faults: &mut Vec<String>) -> HttpMatch {
    let mut keep = Keep { place, faults };
    let query = wire.query.iter().map(|it| read("query", it));
    let claims = wire.claims.iter();
    let claims = claims.map(|it| {
        Ok((
            texts(&it.path),
            required("claims.value", it.value.as_ref())?,
        ))
    });
    HttpMatch {
        path: keep.one(optional("path", wire.path.as_ref())).flatten(),
        ignore_path_case: wire.ignore_path_case,
        method: keep.text("method", wire.method.as_ref()),
        scheme: keep.text("scheme", wire.scheme.as_ref()),
        authority: keep.text("authority", wire.authority.as_ref()),
        headers: keep.headers("headers", &wire.headers),
        without_headers: keep.headers("without_headers", &wire.without_headers),
        query: keep.all(query),
        port: keep.one(optional_port(wire.port)).flatten(),
        source: source(wire.source_namespace.as_ref(), &wire.source_labels),
        claims: keep.all(claims),
        grpc: wire.grpc,
    }
}

impl From<&HttpMatch> for wire::HttpMatch {
    fn from(it: &HttpMatch) -> Self {
        let claims = it.claims.iter().map(|(path, value)| wire::ClaimMatch {
            path: wire_texts(path),
            value: Some(value.into()),
        });
        Self {
            path: wire_optional(it.path.as_ref()),
            ignore_path_case: it.ignore_path_case,
            method: wire_optional(it.method.as_ref()),
            scheme: wire_optional(it.scheme.as_ref()),
            authority: wire_optional(it.authority.as_ref()),
            headers: wire_list(&it.headers),
            without_headers: wire_list(&it.without_headers),
            query: wire_list(&it.query),
            port: it.port.map(Into::into),
            source_namespace: wire_text(namespace_of(it.source.as_deref())),
            source_labels: labels_of(it.source.as_deref()),
            claims: claims.collect(),
            grpc: it.grpc,
        }
    }
}

impl TryFrom<&wire::NamedMatch> for HeaderMatch {
    type Error = InvalidResource;

    fn try_from(wire: &wire::NamedMatch) -> Result<Self> {
        Ok(Self {
            name: header_name("name", &wire.name)?,
            value: required("value", wire.value.as_ref())?,
        })
    }
}

impl From<&HeaderMatch> for wire::NamedMatch {
    fn from(it: &HeaderMatch) -> Self {
        Self {
            name: it.name.to_string(),
            value: Some((&it.value).into()),
        }
    }
}

impl TryFrom<&wire::NamedMatch> for QueryMatch {
    type Error = InvalidResource;

    fn try_from(wire: &wire::NamedMatch) -> Result<Self> {
        Ok(Self {
            name: wire.name.as_str().into(),
            value: required("value", wire.value.as_ref())?,
        })
    }
}

impl From<&QueryMatch> for wire::NamedMatch {
    fn from(it: &QueryMatch) -> Self {
        Self {
            name: it.name.to_string(),
            value: Some((&it.value).into()),
        }
    }
}

impl TryFrom<&wire::PathMatch> for PathMatch {
    type Error = InvalidResource;

    fn try_from(wire: &wire::PathMatch) -> Result<Self> {
        use wire::path_match::Kind;
        match &wire.kind {
            Some(Kind::Exact(it)) => Ok(Self::Exact(it.as_str().into())),
            Some(Kind::Segments(it)) => Ok(Self::Segments(it.as_str().into())),
            Some(Kind::Prefix(it)) => Ok(Self::Prefix(it.as_str().into())),
            Some(Kind::Regex(it)) => pattern("regex", it).map(Self::Regex),
            Some(Kind::Grpc(it)) => Ok(Self::Grpc {
                service: optional("grpc.service", it.service.as_ref())?,
                method: optional("grpc.method", it.method.as_ref())?,
            }),
            None => Err(missing("kind")),
        }
    }
}

impl From<&PathMatch> for wire::PathMatch {
    fn from(it: &PathMatch) -> Self {
        use wire::path_match::Kind;
        let kind = match it {
            PathMatch::Exact(it) => Kind::Exact(it.to_string()),
            PathMatch::Segments(it) => Kind::Segments(it.to_string()),
            PathMatch::Prefix(it) => Kind::Prefix(it.to_string()),
            PathMatch::Regex(it) => Kind::Regex(it.source().to_owned()),
            PathMatch::Grpc { service, method } => Kind::Grpc(wire::GrpcMethod {
                service: wire_optional(service.as_ref()),
                method: wire_optional(method.as_ref()),
            }),
        };
        Self { kind: Some(kind) }
    }
}

/// The port of a rule on connections. One that is not understood leaves no backend but an invalid one.
fn connection_backends(
    wire: &[wire::ConnectionBackend],
    understood: Result<()>,
) -> Vec<(u32, Backend)> {
    match understood {
        Ok(()) => wire.iter().map(connection_backend).collect(),
        Err(fault) => vec![(1, Backend::Invalid(fault.to_string().into()))],
    }
}

fn connection_backend(wire: &wire::ConnectionBackend) -> (u32, Backend) {
    (wire.weight, super::filter::backend(wire.backend.as_ref()))
}

fn wire_connection_backends(backends: &[(u32, Backend)]) -> Vec<wire::ConnectionBackend> {
    let backends = backends
        .iter()
        .map(|(weight, backend)| wire::ConnectionBackend {
            weight: *weight,
            backend: Some(backend.into()),
        });
    backends.collect()
}

fn source(
    namespace: Option<&String>,
    labels: &BTreeMap<String, String>,
) -> Option<Box<CallerMatch>> {
    CallerMatch::new(text(namespace), read_labels(labels))
}

fn namespace_of(source: Option<&CallerMatch>) -> Option<&Str> {
    source?.namespace.as_ref()
}

fn labels_of(source: Option<&CallerMatch>) -> BTreeMap<String, String> {
    source.map_or_else(BTreeMap::new, |it| wire_labels(&it.labels))
}

fn tls_rule(wire: &wire::TlsRule) -> TlsRule {
    let port = optional_port(wire.port);
    let destinations = ranges("destinations", &wire.destinations);
    TlsRule {
        name: text(wire.name.as_ref()),
        sni: texts(&wire.sni),
        backends: connection_backends(&wire.backends, understood(&port, &destinations)),
        port: port.ok().flatten(),
        source: source(wire.source_namespace.as_ref(), &wire.source_labels),
        destinations: destinations.unwrap_or_default(),
    }
}

/// What a rule on connections asks for, where it can be read.
fn understood(port: &Result<Option<u16>>, destinations: &Result<Vec<IpNet>>) -> Result<()> {
    port.clone()?;
    destinations.clone()?;
    Ok(())
}

impl From<&TlsRule> for wire::TlsRule {
    fn from(rule: &TlsRule) -> Self {
        Self {
            name: wire_text(rule.name.as_ref()),
            sni: wire_texts(&rule.sni),
            port: rule.port.map(Into::into),
            backends: wire_connection_backends(&rule.backends),
            source_namespace: wire_text(namespace_of(rule.source.as_deref())),
            source_labels: labels_of(rule.source.as_deref()),
            destinations: wire_texts(&rule.destinations),
        }
    }
}

fn tcp_rule(wire: &wire::TcpRule) -> TcpRule {
    let port = optional_port(wire.port);
    let destinations = ranges("destinations", &wire.destinations);
    TcpRule {
        name: text(wire.name.as_ref()),
        backends: connection_backends(&wire.backends, understood(&port, &destinations)),
        port: port.ok().flatten(),
        source: source(wire.source_namespace.as_ref(), &wire.source_labels),
        destinations: destinations.unwrap_or_default(),
    }
}

impl From<&TcpRule> for wire::TcpRule {
    fn from(rule: &TcpRule) -> Self {
        Self {
            name: wire_text(rule.name.as_ref()),
            port: rule.port.map(Into::into),
            source_namespace: wire_text(namespace_of(rule.source.as_deref())),
            source_labels: labels_of(rule.source.as_deref()),
            destinations: wire_texts(&rule.destinations),
            backends: wire_connection_backends(&rule.backends),
        }
    }
}
