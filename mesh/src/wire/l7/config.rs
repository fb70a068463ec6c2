//! Settings of a waypoint. An authorizer that cannot be understood is left out, and one that is not known refuses; a
//! provider of logs or traces is left out too.

use std::collections::BTreeMap;

use http::HeaderName;
use proto::waypoint as wire;

use super::{
    InvalidResource, Problem, Result, full_pairs, header_name, missing, optional,
    optional_duration, parsed_list, required_duration, service_port, small, text, texts,
    wire_duration, wire_full_pairs, wire_optional, wire_text, wire_texts,
};
use crate::{
    l7::config::{
        AuthorizerBody, AuthorizerProtocol, ExternalAuthorizer, HistogramBuckets, LogFormat,
        LogProvider, Normalization, ProxyHeaders, TraceProtocol, TraceProvider, WaypointConfig,
    },
    names::Str,
};

impl TryFrom<&wire::Config> for WaypointConfig {
    type Error = InvalidResource;

    fn try_from(wire: &wire::Config) -> Result<Self> {
        Ok(Self {
            trust_domain_aliases: parsed_list("trust_domain_aliases", &wire.trust_domain_aliases)?,
            normalization: normalization(wire.normalization)?,
            authorizers: understood(&wire.authorizers),
            log_providers: understood(&wire.log_providers),
            trace_providers: understood(&wire.trace_providers),
            access_logs: texts(&wire.access_logs),
            tracing: texts(&wire.tracing),
            sampling_per_million: wire.sampling_per_million,
            forward_client_identity: wire.forward_client_identity,
            default_retry: optional("default_retry", wire.default_retry.as_ref())?,
            headers: wire.headers.as_ref().map(headers).unwrap_or_default(),
            histogram_buckets: wire.histogram_buckets.iter().filter_map(buckets).collect(),
        })
    }
}

fn understood<'a, W, T: TryFrom<&'a W>>(wire: &'a BTreeMap<String, W>) -> BTreeMap<Str, T> {
    let entries = wire.iter();
    entries
        .filter_map(|(name, it)| Some((name.as_str().into(), T::try_from(it).ok()?)))
        .collect()
}

fn wire_map<'a, T, W: From<&'a T>>(items: &'a BTreeMap<Str, T>) -> BTreeMap<String, W> {
    let entries = items.iter();
    entries
        .map(|(name, it)| (name.to_string(), it.into()))
        .collect()
}

impl From<&WaypointConfig> for wire::Config {
    fn from(it: &WaypointConfig) -> Self {
        Self {
            trust_domain_aliases: wire_texts(&it.trust_domain_aliases),
            normalization: wire_normalization(it.normalization).into(),
            authorizers: wire_map(&it.authorizers),
            log_providers: wire_map(&it.log_providers),
            trace_providers: wire_map(&it.trace_providers),
            access_logs: wire_texts(&it.access_logs),
            tracing: wire_texts(&it.tracing),
            sampling_per_million: it.sampling_per_million,
            forward_client_identity: it.forward_client_identity,
            default_retry: wire_optional(it.default_retry.as_ref()),
            headers: Some((&it.headers).into()),
            histogram_buckets: it.histogram_buckets.iter().map(Into::into).collect(),
        }
    }
}

/// Bounds that are none are left out: the usual ones count.
fn buckets(wire: &wire::Buckets) -> Option<HistogramBuckets> {
    HistogramBuckets::new(&wire.prefix, wire.bounds.clone())
}

impl From<&HistogramBuckets> for wire::Buckets {
    fn from(it: &HistogramBuckets) -> Self {
        Self {
            prefix: it.prefix.to_string(),
            bounds: it.bounds.clone(),
        }
    }
}

/// What paths policies see hangs on it: one that is not known rejects the settings, and the last ones stay.
fn normalization(number: i32) -> Result<Normalization> {
    use wire::Normalization as Wire;
    let known = Wire::try_from(number)
        .map_err(|_| InvalidResource::new("normalization", Problem::Unknown(number)))?;
    Ok(match known {
        Wire::Base => Normalization::Base,
        Wire::None => Normalization::None,
        Wire::MergeSlashes => Normalization::MergeSlashes,
        Wire::DecodeAndMergeSlashes => Normalization::DecodeAndMergeSlashes,
    })
}

fn wire_normalization(it: Normalization) -> wire::Normalization {
    use wire::Normalization as Wire;
    match it {
        Normalization::Base => Wire::Base,
        Normalization::None => Wire::None,
        Normalization::MergeSlashes => Wire::MergeSlashes,
        Normalization::DecodeAndMergeSlashes => Wire::DecodeAndMergeSlashes,
    }
}

fn headers(wire: &wire::ProxyHeaders) -> ProxyHeaders {
    ProxyHeaders {
        request_id_disabled: wire.request_id_disabled,
        server: text(wire.server.as_ref()),
        attempt_count: wire.attempt_count,
        debug_headers: wire.debug_headers,
        forwarded_host: wire.forwarded_host,
        forwarded_port: wire.forwarded_port,
    }
}

impl From<&ProxyHeaders> for wire::ProxyHeaders {
    fn from(it: &ProxyHeaders) -> Self {
        Self {
            request_id_disabled: it.request_id_disabled,
            server: wire_text(it.server.as_ref()),
            attempt_count: it.attempt_count,
            debug_headers: it.debug_headers,
            forwarded_host: it.forwarded_host,
            forwarded_port: it.forwarded_port,
        }
    }
}

impl TryFrom<&wire::ExternalAuthorizer> for ExternalAuthorizer {
    type Error = InvalidResource;

    fn try_from(wire: &wire::ExternalAuthorizer) -> Result<Self> {
        let (service, port) = service_port(&wire.service, wire.port)?;
        Ok(Self {
            service,
            port,
            protocol: authorizer_protocol(wire.protocol.as_ref())?,
            timeout: required_duration("timeout", wire.timeout)?,
            fail_open: wire.fail_open,
            status_on_error: small("status_on_error", wire.status_on_error)?,
            body: wire.body.as_ref().map(|it| AuthorizerBody {
                max_bytes: it.max_bytes,
                allow_partial: it.allow_partial,
                as_bytes: it.as_bytes,
            }),
        })
    }
}

fn authorizer_protocol(
    wire: Option<&wire::external_authorizer::Protocol>,
) -> Result<AuthorizerProtocol> {
    use wire::external_authorizer::Protocol;
    match wire {
        Some(Protocol::Grpc(it)) => Ok(AuthorizerProtocol::Grpc {
            allowed_headers: texts(&it.allowed_headers),
        }),
        Some(Protocol::Http(it)) => Ok(AuthorizerProtocol::Http {
            path_prefix: it.path_prefix.as_str().into(),
            allowed_headers: texts(&it.allowed_headers),
            add_headers: named("add_headers", &it.add_headers)?,
            to_upstream: texts(&it.to_upstream),
            to_client_on_deny: texts(&it.to_client_on_deny),
            to_client_on_allow: texts(&it.to_client_on_allow),
        }),
        None => Err(missing("protocol")),
    }
}

fn named(field: &str, wire: &[wire::Pair]) -> Result<Vec<(HeaderName, Str)>> {
    let one = |it: &wire::Pair| {
        let value = it.value.as_deref().unwrap_or_default();
        Ok((header_name(field, &it.key)?, value.into()))
    };
    wire.iter().map(one).collect()
}

impl From<&ExternalAuthorizer> for wire::ExternalAuthorizer {
    fn from(it: &ExternalAuthorizer) -> Self {
        Self {
            service: it.service.to_string(),
            port: it.port.into(),
            timeout: Some(wire_duration(it.timeout)),
            fail_open: it.fail_open,
            status_on_error: it.status_on_error.into(),
            body: it.body.map(|it| wire::AuthorizerBody {
                max_bytes: it.max_bytes,
                allow_partial: it.allow_partial,
                as_bytes: it.as_bytes,
            }),
            protocol: Some(wire_authorizer_protocol(&it.protocol)),
        }
    }
}

fn wire_authorizer_protocol(it: &AuthorizerProtocol) -> wire::external_authorizer::Protocol {
    use wire::external_authorizer::Protocol;
    match it {
        AuthorizerProtocol::Grpc { allowed_headers } => Protocol::Grpc(wire::GrpcAuthorizer {
            allowed_headers: wire_texts(allowed_headers),
        }),
        AuthorizerProtocol::Http {
            path_prefix,
            allowed_headers,
            add_headers,
            to_upstream,
            to_client_on_deny,
            to_client_on_allow,
        } => Protocol::Http(wire::HttpAuthorizer {
            path_prefix: path_prefix.to_string(),
            allowed_headers: wire_texts(allowed_headers),
            add_headers: wire_full_pairs(add_headers),
            to_upstream: wire_texts(to_upstream),
            to_client_on_deny: wire_texts(to_client_on_deny),
            to_client_on_allow: wire_texts(to_client_on_allow),
        }),
    }
}

impl TryFrom<&wire::LogProvider> for LogProvider {
    type Error = InvalidResource;

    fn try_from(wire: &wire::LogProvider) -> Result<Self> {
        use wire::log_provider::Kind;
        let format = log_format(wire.format.as_ref());
        match &wire.kind {
            Some(Kind::File(path)) => Ok(Self::File {
                path: path.as_str().into(),
                format,
            }),
            Some(Kind::OpenTelemetry(it)) => {
                let (service, port) = service_port(&it.service, it.port)?;
                Ok(Self::OpenTelemetry {
                    service,
                    port,
                    log_name: it.log_name.as_str().into(),
                    format,
                })
            }
            None => Err(missing("kind")),
        }
    }
}

fn log_format(wire: Option<&wire::LogFormat>) -> LogFormat {
    use wire::log_format::Kind;
    match wire.and_then(|it| it.kind.as_ref()) {
        Some(Kind::DefaultText(())) | None => LogFormat::DefaultText,
        Some(Kind::DefaultJson(())) => LogFormat::DefaultJson,
        Some(Kind::Text(it)) => LogFormat::Text(it.as_str().into()),
        Some(Kind::Json(it)) => LogFormat::Json(full_pairs(&it.fields)),
    }
}

impl From<&LogFormat> for wire::LogFormat {
    fn from(it: &LogFormat) -> Self {
        use wire::log_format::Kind;
        let kind = match it {
            LogFormat::DefaultText => Kind::DefaultText(()),
            LogFormat::DefaultJson => Kind::DefaultJson(()),
            LogFormat::Text(it) => Kind::Text(it.to_string()),
            LogFormat::Json(fields) => Kind::Json(wire::JsonFormat {
                fields: wire_full_pairs(fields),
            }),
        };
        Self { kind: Some(kind) }
    }
}

impl From<&LogProvider> for wire::LogProvider {
    fn from(it: &LogProvider) -> Self {
        use wire::log_provider::Kind;
        let (kind, format) = match it {
            LogProvider::File { path, format } => (Kind::File(path.to_string()), format),
            LogProvider::OpenTelemetry {
                service,
                port,
                log_name,
                format,
            } => {
                let log = wire::OpenTelemetryLog {
                    service: service.to_string(),
                    port: (*port).into(),
                    log_name: log_name.to_string(),
                };
                (Kind::OpenTelemetry(log), format)
            }
        };
        Self {
            format: Some(format.into()),
            kind: Some(kind),
        }
    }
}

impl TryFrom<&wire::TraceProvider> for TraceProvider {
    type Error = InvalidResource;

    fn try_from(wire: &wire::TraceProvider) -> Result<Self> {
        use wire::trace_provider::Protocol;
        let (service, port) = service_port(&wire.service, wire.port)?;
        let protocol = match &wire.protocol {
            Some(Protocol::OtlpGrpc(())) => TraceProtocol::OtlpGrpc,
            Some(Protocol::OtlpHttp(path)) => TraceProtocol::OtlpHttp(path.as_str().into()),
            Some(Protocol::Zipkin(it)) => TraceProtocol::Zipkin {
                path: it.path.as_str().into(),
                with_w3c: it.with_w3c,
            },
            None => return Err(missing("protocol")),
        };
        Ok(Self {
            service,
            port,
            protocol,
            max_tag_length: wire.max_tag_length,
            timeout: optional_duration("timeout", wire.timeout)?,
            headers: named("headers", &wire.headers)?,
        })
    }
}

impl From<&TraceProvider> for wire::TraceProvider {
    fn from(it: &TraceProvider) -> Self {
        use wire::trace_provider::Protocol;
        let protocol = match &it.protocol {
            TraceProtocol::OtlpGrpc => Protocol::OtlpGrpc(()),
            TraceProtocol::OtlpHttp(path) => Protocol::OtlpHttp(path.to_string()),
            TraceProtocol::Zipkin { path, with_w3c } => Protocol::Zipkin(wire::Zipkin {
                path: path.to_string(),
                with_w3c: *with_w3c,
            }),
        };
        Self {
            service: it.service.to_string(),
            port: it.port.into(),
            max_tag_length: it.max_tag_length,
            timeout: it.timeout.map(wire_duration),
            headers: wire_full_pairs(&it.headers),
            protocol: Some(protocol),
        }
    }
}
