//! What a rule does with a request.

use http::HeaderValue;
use proto::waypoint as wire;

use super::{
    InvalidResource, Problem, Result, exactly, header_name, list, missing, optional,
    optional_duration, pattern, read, required, required_duration,
    route::{edit, wire_edit},
    service_port, small, status, statuses, text, texts, wire_duration, wire_list, wire_optional,
    wire_statuses, wire_text, wire_texts,
};
use crate::l7::route::{
    Abort, Backend, Cors, DirectResponse, Fault, HeaderEdit, Mirror, OriginMatch, PathRewrite,
    RateLimit, Redirect, RedirectPort, RetryOn, RetryPolicy, Rewrite, SessionCarrier,
    SessionPersistence, WeightedBackend,
};

/// A backend that cannot be understood leads nowhere: its share is answered 500.
pub(super) fn backend(wire: Option<&wire::Backend>) -> Backend {
    use wire::backend::Kind;
    match wire.and_then(|it| it.kind.as_ref()) {
        Some(Kind::Invalid(it)) => Backend::Invalid(it.as_str().into()),
        Some(Kind::Service(it)) => match service_port(&it.service, it.port) {
            Ok((service, port)) => Backend::Service {
                service,
                port,
                subset: text(it.subset.as_ref()),
            },
            Err(fault) => Backend::Invalid(fault.to_string().into()),
        },
        None => Backend::Invalid(missing("backend").to_string().into()),
    }
}

impl From<&Backend> for wire::Backend {
    fn from(backend: &Backend) -> Self {
        use wire::backend::Kind;
        let kind = match backend {
            Backend::Service {
                service,
                port,
                subset,
            } => Kind::Service(wire::ServiceBackend {
                service: service.to_string(),
                port: (*port).into(),
                subset: wire_text(subset.as_ref()),
            }),
            Backend::Invalid(it) => Kind::Invalid(it.to_string()),
        };
        Self { kind: Some(kind) }
    }
}

/// What a backend does with a request and cannot be understood makes the backend invalid.
impl TryFrom<&wire::WeightedBackend> for WeightedBackend {
    type Error = InvalidResource;

    fn try_from(wire: &wire::WeightedBackend) -> Result<Self> {
        let invalid = |fault: InvalidResource| {
            Self::new(wire.weight, Backend::Invalid(fault.to_string().into()))
        };
        Ok(understood_backend(wire).unwrap_or_else(invalid))
    }
}

fn understood_backend(wire: &wire::WeightedBackend) -> Result<WeightedBackend> {
    Ok(WeightedBackend {
        weight: wire.weight,
        backend: backend(wire.backend.as_ref()),
        request_headers: edit("request_headers", wire.request_headers.as_ref())?,
        response_headers: edit("response_headers", wire.response_headers.as_ref())?,
        rewrite: optional("rewrite", wire.rewrite.as_ref())?,
        redirect: optional("redirect", wire.redirect.as_ref())?,
        mirrors: list("mirrors", &wire.mirrors)?,
    })
}

impl From<&WeightedBackend> for wire::WeightedBackend {
    fn from(it: &WeightedBackend) -> Self {
        Self {
            weight: it.weight,
            backend: Some((&it.backend).into()),
            request_headers: wire_edit(&it.request_headers),
            response_headers: wire_edit(&it.response_headers),
            rewrite: wire_optional(it.rewrite.as_ref()),
            redirect: wire_optional(it.redirect.as_ref()),
            mirrors: wire_list(&it.mirrors),
        }
    }
}

impl TryFrom<&wire::Mirror> for Mirror {
    type Error = InvalidResource;

    fn try_from(wire: &wire::Mirror) -> Result<Self> {
        Ok(Self {
            backend: backend(wire.backend.as_ref()),
            per_million: wire.per_million,
            shadow_host: wire.shadow_host,
        })
    }
}

impl From<&Mirror> for wire::Mirror {
    fn from(it: &Mirror) -> Self {
        Self {
            backend: Some((&it.backend).into()),
            per_million: it.per_million,
            shadow_host: it.shadow_host,
        }
    }
}

fn header(wire: &wire::Header) -> Result<(http::HeaderName, HeaderValue)> {
    let value = HeaderValue::from_bytes(&wire.value)
        .map_err(|_| InvalidResource::new(&wire.name, Problem::HeaderValue))?;
    Ok((header_name("name", &wire.name)?, value))
}

fn wire_header((name, value): &(http::HeaderName, HeaderValue)) -> wire::Header {
    wire::Header {
        name: name.to_string(),
        value: value.as_bytes().to_vec(),
    }
}

impl TryFrom<&wire::HeaderEdit> for HeaderEdit {
    type Error = InvalidResource;

    fn try_from(wire: &wire::HeaderEdit) -> Result<Self> {
        let names = wire.remove.iter();
        Ok(Self {
            set: exactly(wire.set.iter().map(header))?,
            add: exactly(wire.add.iter().map(header))?,
            remove: exactly(names.map(|it| header_name("remove", it)))?,
        })
    }
}

impl From<&HeaderEdit> for wire::HeaderEdit {
    fn from(it: &HeaderEdit) -> Self {
        Self {
            set: it.set.iter().map(wire_header).collect(),
            add: it.add.iter().map(wire_header).collect(),
            remove: wire_texts(&it.remove),
        }
    }
}

impl TryFrom<&wire::Rewrite> for Rewrite {
    type Error = InvalidResource;

    fn try_from(wire: &wire::Rewrite) -> Result<Self> {
        Ok(Self {
            authority: text(wire.authority.as_ref()),
            path: optional("path", wire.path.as_ref())?,
        })
    }
}

impl From<&Rewrite> for wire::Rewrite {
    fn from(it: &Rewrite) -> Self {
        Self {
            authority: wire_text(it.authority.as_ref()),
            path: wire_optional(it.path.as_ref()),
        }
    }
}

impl TryFrom<&wire::PathRewrite> for PathRewrite {
    type Error = InvalidResource;

    fn try_from(wire: &wire::PathRewrite) -> Result<Self> {
        use wire::path_rewrite::Kind;
        match &wire.kind {
            Some(Kind::Full(it)) => Ok(Self::Full(it.as_str().into())),
            Some(Kind::Prefix(it)) => Ok(Self::Prefix(it.as_str().into())),
            Some(Kind::Regex(it)) => Ok(Self::Regex {
                pattern: pattern("regex.pattern", &it.pattern)?,
                replacement: it.replacement.as_str().into(),
            }),
            None => Err(missing("kind")),
        }
    }
}

impl From<&PathRewrite> for wire::PathRewrite {
    fn from(it: &PathRewrite) -> Self {
        use wire::path_rewrite::Kind;
        let kind = match it {
            PathRewrite::Full(it) => Kind::Full(it.to_string()),
            PathRewrite::Prefix(it) => Kind::Prefix(it.to_string()),
            PathRewrite::Regex {
                pattern,
                replacement,
            } => Kind::Regex(wire::RegexRewrite {
                pattern: pattern.source().to_owned(),
                replacement: replacement.to_string(),
            }),
        };
        Self { kind: Some(kind) }
    }
}

impl TryFrom<&wire::Redirect> for Redirect {
    type Error = InvalidResource;

    fn try_from(wire: &wire::Redirect) -> Result<Self> {
        use wire::redirect::Port;
        let port = match &wire.port {
            Some(Port::Derived(())) => RedirectPort::Derived,
            Some(Port::Number(it)) => RedirectPort::Port(small("number", *it)?),
            Some(Port::FromRequest(())) => RedirectPort::FromRequest,
            Some(Port::ProtocolDefault(())) => RedirectPort::ProtocolDefault,
            None => return Err(missing("port")),
        };
        Ok(Self {
            scheme: text(wire.scheme.as_ref()),
            hostname: text(wire.hostname.as_ref()),
            path: optional("path", wire.path.as_ref())?,
            port,
            status: status("status", wire.status)?,
        })
    }
}

impl From<&Redirect> for wire::Redirect {
    fn from(it: &Redirect) -> Self {
        use wire::redirect::Port;
        let port = match it.port {
            RedirectPort::Derived => Port::Derived(()),
            RedirectPort::Port(it) => Port::Number(it.into()),
            RedirectPort::FromRequest => Port::FromRequest(()),
            RedirectPort::ProtocolDefault => Port::ProtocolDefault(()),
        };
        Self {
            scheme: wire_text(it.scheme.as_ref()),
            hostname: wire_text(it.hostname.as_ref()),
            path: wire_optional(it.path.as_ref()),
            status: it.status.as_u16().into(),
            port: Some(port),
        }
    }
}

impl TryFrom<&wire::DirectResponse> for DirectResponse {
    type Error = InvalidResource;

    fn try_from(wire: &wire::DirectResponse) -> Result<Self> {
        Ok(Self {
            status: status("status", wire.status)?,
            body: wire.body.clone(),
        })
    }
}

impl From<&DirectResponse> for wire::DirectResponse {
    fn from(it: &DirectResponse) -> Self {
        Self {
            status: it.status.as_u16().into(),
            body: it.body.clone(),
        }
    }
}

impl TryFrom<&wire::Cors> for Cors {
    type Error = InvalidResource;

    fn try_from(wire: &wire::Cors) -> Result<Self> {
        Ok(Self {
            allow_origins: list("allow_origins", &wire.allow_origins)?,
            allow_credentials: wire.allow_credentials,
            allow_methods: texts(&wire.allow_methods),
            allow_headers: texts(&wire.allow_headers),
            expose_headers: texts(&wire.expose_headers),
            max_age: wire.max_age,
            forward_unmatched_preflights: wire.forward_unmatched_preflights,
        })
    }
}

impl From<&Cors> for wire::Cors {
    fn from(it: &Cors) -> Self {
        Self {
            allow_origins: wire_list(&it.allow_origins),
            allow_credentials: it.allow_credentials,
            allow_methods: wire_texts(&it.allow_methods),
            allow_headers: wire_texts(&it.allow_headers),
            expose_headers: wire_texts(&it.expose_headers),
            max_age: it.max_age,
            forward_unmatched_preflights: it.forward_unmatched_preflights,
        }
    }
}

impl TryFrom<&wire::OriginMatch> for OriginMatch {
    type Error = InvalidResource;

    fn try_from(wire: &wire::OriginMatch) -> Result<Self> {
        use wire::origin_match::Kind;
        match &wire.kind {
            Some(Kind::Any(())) => Ok(Self::Any),
            Some(Kind::Wildcard(it)) => Ok(Self::Wildcard(it.as_str().into())),
            Some(Kind::Text(it)) => read("text", it).map(Self::Text),
            None => Err(missing("kind")),
        }
    }
}

impl From<&OriginMatch> for wire::OriginMatch {
    fn from(it: &OriginMatch) -> Self {
        use wire::origin_match::Kind;
        let kind = match it {
            OriginMatch::Any => Kind::Any(()),
            OriginMatch::Wildcard(it) => Kind::Wildcard(it.to_string()),
            OriginMatch::Text(it) => Kind::Text(it.into()),
        };
        Self { kind: Some(kind) }
    }
}

impl TryFrom<&wire::Fault> for Fault {
    type Error = InvalidResource;

    fn try_from(wire: &wire::Fault) -> Result<Self> {
        let delay = wire.delay.as_ref();
        let delay = delay.map(|it| Ok((it.per_million, required_duration("delay.time", it.time)?)));
        let abort = wire.abort.as_ref();
        let abort = abort.map(|it| Ok((it.per_million, abort_kind(it.kind.as_ref())?)));
        Ok(Self {
            delay: delay.transpose()?,
            abort: abort.transpose()?,
        })
    }
}

fn abort_kind(wire: Option<&wire::abort::Kind>) -> Result<Abort> {
    match wire {
        Some(wire::abort::Kind::Http(it)) => status("abort.http", *it).map(Abort::Http),
        Some(wire::abort::Kind::Grpc(it)) => small("abort.grpc", *it).map(Abort::Grpc),
        None => Err(missing("abort.kind")),
    }
}

impl From<&Fault> for wire::Fault {
    fn from(it: &Fault) -> Self {
        let delay = it.delay.map(|(per_million, time)| wire::Delay {
            per_million,
            time: Some(wire_duration(time)),
        });
        let abort = it.abort.map(|(per_million, kind)| wire::Abort {
            per_million,
            kind: Some(match kind {
                Abort::Http(it) => wire::abort::Kind::Http(it.as_u16().into()),
                Abort::Grpc(it) => wire::abort::Kind::Grpc(it.into()),
            }),
        });
        Self { delay, abort }
    }
}

impl TryFrom<&wire::RateLimit> for RateLimit {
    type Error = InvalidResource;

    fn try_from(wire: &wire::RateLimit) -> Result<Self> {
        Ok(Self {
            max_tokens: wire.max_tokens,
            tokens_per_fill: wire.tokens_per_fill,
            fill_interval: required_duration("fill_interval", wire.fill_interval)?,
        })
    }
}

impl From<&RateLimit> for wire::RateLimit {
    fn from(it: &RateLimit) -> Self {
        Self {
            max_tokens: it.max_tokens,
            tokens_per_fill: it.tokens_per_fill,
            fill_interval: Some(wire_duration(it.fill_interval)),
        }
    }
}

impl TryFrom<&wire::RetryPolicy> for RetryPolicy {
    type Error = InvalidResource;

    fn try_from(wire: &wire::RetryPolicy) -> Result<Self> {
        Ok(Self {
            attempts: wire.attempts,
            on: required("on", wire.on.as_ref())?,
            backoff: required_duration("backoff", wire.backoff)?,
            per_try_timeout: optional_duration("per_try_timeout", wire.per_try_timeout)?,
            ignore_previous: wire.ignore_previous,
            remote_localities: wire.remote_localities,
        })
    }
}

impl From<&RetryPolicy> for wire::RetryPolicy {
    fn from(it: &RetryPolicy) -> Self {
        Self {
            attempts: it.attempts,
            on: Some((&it.on).into()),
            backoff: Some(wire_duration(it.backoff)),
            per_try_timeout: it.per_try_timeout.map(wire_duration),
            ignore_previous: it.ignore_previous,
            remote_localities: it.remote_localities,
        }
    }
}

impl TryFrom<&wire::RetryOn> for RetryOn {
    type Error = InvalidResource;

    fn try_from(wire: &wire::RetryOn) -> Result<Self> {
        let grpc = wire.grpc_statuses.iter();
        Ok(Self {
            connect_failure: wire.connect_failure,
            refused_stream: wire.refused_stream,
            reset: wire.reset,
            reset_before_request: wire.reset_before_request,
            per_try_timeout: wire.per_try_timeout,
            any_5xx: wire.any_5xx,
            gateway_error: wire.gateway_error,
            retriable_4xx: wire.retriable_4xx,
            status_codes: statuses("status_codes", &wire.status_codes)?,
            grpc_statuses: grpc
                .map(|it| small("grpc_statuses", *it))
                .collect::<Result<_>>()?,
            non_idempotent: wire.non_idempotent,
        })
    }
}

impl From<&RetryOn> for wire::RetryOn {
    fn from(it: &RetryOn) -> Self {
        Self {
            connect_failure: it.connect_failure,
            refused_stream: it.refused_stream,
            reset: it.reset,
            reset_before_request: it.reset_before_request,
            per_try_timeout: it.per_try_timeout,
            any_5xx: it.any_5xx,
            gateway_error: it.gateway_error,
            retriable_4xx: it.retriable_4xx,
            status_codes: wire_statuses(&it.status_codes),
            grpc_statuses: it.grpc_statuses.iter().map(|it| (*it).into()).collect(),
            non_idempotent: it.non_idempotent,
        }
    }
}

impl TryFrom<&wire::SessionPersistence> for SessionPersistence {
    type Error = InvalidResource;

    fn try_from(wire: &wire::SessionPersistence) -> Result<Self> {
        use wire::session_persistence::Carrier;
        let carrier = match &wire.carrier {
            Some(Carrier::Cookie(it)) => SessionCarrier::Cookie {
                name: it.name.as_str().into(),
                path: text(it.path.as_ref()),
                permanent: it.permanent,
            },
            Some(Carrier::Header(it)) => SessionCarrier::Header(header_name("header", it)?),
            None => return Err(missing("carrier")),
        };
        Ok(Self {
            carrier,
            absolute_timeout: optional_duration("absolute_timeout", wire.absolute_timeout)?,
        })
    }
}

impl From<&SessionPersistence> for wire::SessionPersistence {
    fn from(it: &SessionPersistence) -> Self {
        use wire::session_persistence::Carrier;
        let carrier = match &it.carrier {
            SessionCarrier::Cookie {
                name,
                path,
                permanent,
            } => Carrier::Cookie(wire::SessionCookie {
                name: name.to_string(),
                path: wire_text(path.as_ref()),
                permanent: *permanent,
            }),
            SessionCarrier::Header(it) => Carrier::Header(it.to_string()),
        };
        Self {
            absolute_timeout: it.absolute_timeout.map(wire_duration),
            carrier: Some(carrier),
        }
    }
}
