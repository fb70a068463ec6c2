//! MeshConfig at L7: providers, and what holds for all waypoints.
//!
//! What cannot be read is left out and told: an external authorizer that is not there refuses what asks for it.

use std::{collections::BTreeMap, time::Duration};

use mesh::{
    identity::TrustDomain,
    l7::{
        config::{
            AuthorizerBody, AuthorizerProtocol, ExternalAuthorizer, LogFormat, LogProvider,
            Normalization, ProxyHeaders, TraceProtocol, TraceProvider,
        },
        log_format::{Format, Nowhere},
        route::RetryPolicy,
    },
    names::{NamespacedHostname, Str},
};
use serde_json::{Map, Value};

use super::{
    destination_rule::Defaults,
    http,
    read::{parse_duration, per_million},
};
use crate::{crd::istio::HttpRetry, translate::Settings, validate::Findings};

/// Name of the log that `accessLogFile` describes, as upstream has it.
const FILE_LOG: &str = "envoy";
/// Of one question to an authorizer. Upstream's is ten minutes.
const AUTHORIZER_TIMEOUT: Duration = Duration::from_secs(2);
/// Istio's default share of requests that are traced: 1%.
const SAMPLING_PER_MILLION: u32 = 10_000;

/// What is read of it.
#[derive(Clone, Debug, PartialEq)]
pub struct MeshSettings {
    /// `trustDomainAliases`.
    pub trust_domain_aliases: Vec<TrustDomain>,
    /// `pathNormalization`.
    pub normalization: Normalization,
    /// External authorizers of `extensionProviders`.
    pub authorizers: BTreeMap<Str, ExternalAuthorizer>,
    /// Logs of `extensionProviders`, and that of `accessLogFile`.
    pub log_providers: BTreeMap<Str, LogProvider>,
    /// Tracers of `extensionProviders`.
    pub trace_providers: BTreeMap<Str, TraceProvider>,
    /// `accessLogFile`, `defaultProviders.accessLogging`.
    pub access_logs: Vec<Str>,
    /// `defaultProviders.tracing`.
    pub tracing: Vec<Str>,
    /// `defaultConfig.tracing.sampling`.
    pub sampling_per_million: u32,
    /// `defaultHttpRetryPolicy`.
    pub default_retry: Option<RetryPolicy>,
    /// `defaultConfig.proxyHeaders`.
    pub headers: ProxyHeaders,
    /// Of the connections to every service.
    pub connections: Defaults,
}

impl Default for MeshSettings {
    fn default() -> Self {
        Self::read(&Settings::default(), &Value::Null, &mut Vec::new())
    }
}

impl MeshSettings {
    /// Reads a whole MeshConfig; fields that are not these are left alone. `problems`: what was left out, and why.
    pub fn read(settings: &Settings, config: &Value, problems: &mut Vec<String>) -> Self {
        let mut reader = Reader { settings, problems };
        let providers = reader.providers(&config["extensionProviders"]);
        let mut log_providers = providers.logs;
        let format = reader.log_format(config);
        let format = reader.kept_format(format, "accessLogFormat");
        let file = text(&config["accessLogFile"]);
        log_providers
            .entry(FILE_LOG.into())
            .or_insert_with(|| LogProvider::File {
                path: file.unwrap_or("/dev/stdout").into(),
                format,
            });
        let defaults = &config["defaultProviders"];
        let mut access_logs = texts(&defaults["accessLogging"]);
        if file.is_some() && access_logs.is_empty() {
            access_logs.push(FILE_LOG.into());
        }
        let tracing = texts(&defaults["tracing"]);
        reader.without_effect(&config["defaultConfig"]);
        reader.known("defaultProviders.accessLogging", &mut access_logs, |name| {
            log_providers.contains_key(name)
        });
        let mut tracing = tracing;
        reader.known("defaultProviders.tracing", &mut tracing, |name| {
            providers.traces.contains_key(name)
        });
        Self {
            trust_domain_aliases: reader.aliases(&config["trustDomainAliases"]),
            normalization: reader.normalization(&config["pathNormalization"]["normalization"]),
            authorizers: providers.authorizers,
            log_providers,
            trace_providers: providers.traces,
            access_logs,
            tracing,
            sampling_per_million: reader.sampling(&config["defaultConfig"]["tracing"]["sampling"]),
            default_retry: reader.retry(&config["defaultHttpRetryPolicy"]),
            headers: proxy_headers(&config["defaultConfig"]["proxyHeaders"]),
            connections: reader.connections(config),
        }
    }
}

/// The fields of MeshConfig that are read here.
pub const FIELDS: [&str; 14] = [
    "trustDomainAliases",
    "pathNormalization",
    "extensionProviders",
    "accessLogFile",
    "accessLogEncoding",
    "accessLogFormat",
    "defaultProviders",
    "defaultConfig",
    "defaultHttpRetryPolicy",
    "enableTracing",
    Defaults::FIELDS[0],
    Defaults::FIELDS[1],
    Defaults::FIELDS[2],
    Defaults::FIELDS[3],
];

#[derive(Default)]
struct Providers {
    authorizers: BTreeMap<Str, ExternalAuthorizer>,
    logs: BTreeMap<Str, LogProvider>,
    traces: BTreeMap<Str, TraceProvider>,
}

struct Reader<'a> {
    settings: &'a Settings,
    problems: &'a mut Vec<String>,
}

impl Reader<'_> {
    fn problem(&mut self, path: &str, problem: impl std::fmt::Display) {
        self.problems.push(format!("{path}: {problem}"));
    }

    fn providers(&mut self, list: &Value) -> Providers {
        let mut providers = Providers::default();
        for (index, it) in list.as_array().into_iter().flatten().enumerate() {
            let path = format!("extensionProviders[{index}]");
            match text(&it["name"]) {
                Some(name) => self.provider(name.into(), it, &path, &mut providers),
                None => self.problem(&path, "has no name"),
            }
        }
        providers
    }

    fn provider(&mut self, name: Str, it: &Value, path: &str, providers: &mut Providers) {
        let given = |field: &str| it[field].is_object();
        if given("envoyExtAuthzHttp") {
            let authorizer = self.http_authorizer(&it["envoyExtAuthzHttp"], path);
            providers
                .authorizers
                .extend(authorizer.map(|it| (name, it)));
        } else if given("envoyExtAuthzGrpc") {
            let it = &it["envoyExtAuthzGrpc"];
            let protocol = AuthorizerProtocol::Grpc {
                allowed_headers: Vec::new(),
            };
            let authorizer = self.authorizer(it, protocol, path);
            providers
                .authorizers
                .extend(authorizer.map(|it| (name, it)));
        } else if given("opentelemetry") || given("zipkin") {
            let tracer = match given("zipkin") {
                true => self.zipkin(&it["zipkin"], path),
                false => self.opentelemetry(&it["opentelemetry"], path),
            };
            providers.traces.extend(tracer.map(|it| (name, it)));
        } else if given("envoyFileAccessLog") {
            let it = &it["envoyFileAccessLog"];
            let provider = LogProvider::File {
                path: text(&it["path"]).unwrap_or("/dev/stdout").into(),
                format: self.kept_format(format_of(&it["logFormat"]), path),
            };
            providers.logs.insert(name, provider);
        } else if given("envoyOtelAls") {
            let log = self.otel_log(&it["envoyOtelAls"], path);
            providers.logs.extend(log.map(|it| (name, it)));
        } else if !given("prometheus") {
            let kinds = it.as_object().into_iter().flat_map(Map::keys);
            let kinds: Vec<&str> = kinds
                .map(String::as_str)
                .filter(|key| *key != "name")
                .collect();
            self.problem(
                path,
                format!(
                    "{name:?}: waypoints have no provider of kind {}",
                    kinds.join(", ")
                ),
            );
        }
    }

    /// `namespace/host`, the name of a Kubernetes service, or another host, which is then the root namespace's.
    fn service(&mut self, it: &Value, path: &str) -> Option<(NamespacedHostname, u16)> {
        let port = it["port"]
            .as_u64()
            .and_then(|port| u16::try_from(port).ok())
            .filter(|port| *port != 0);
        let (Some(service), Some(port)) = (text(&it["service"]), port) else {
            self.problem(path, "needs service, and port from 1 to 65535");
            return None;
        };
        let suffix = format!(".svc.{}", self.settings.cluster_domain);
        let (namespace, hostname) = match service.split_once('/') {
            Some(parts) => parts,
            None => {
                let inner = service
                    .strip_suffix(&suffix)
                    .and_then(|inner| inner.split_once('.'));
                (
                    inner.map_or(&*self.settings.root_namespace, |(_, namespace)| namespace),
                    service,
                )
            }
        };
        let service = NamespacedHostname {
            namespace: namespace.into(),
            hostname: hostname.to_ascii_lowercase().into(),
        };
        Some((service, port))
    }

    fn duration(&mut self, it: &Value, path: &str) -> Option<Duration> {
        let text = text(it)?;
        let read = parse_duration(text);
        if read.is_none() {
            self.problem(path, format!("{text:?} is no duration such as 5s"));
        }
        read
    }

    fn http_authorizer(&mut self, it: &Value, path: &str) -> Option<ExternalAuthorizer> {
        let mut allowed = names(&it["includeRequestHeadersInCheck"]);
        allowed.extend(names(&it["includeHeadersInCheck"]));
        let protocol = AuthorizerProtocol::Http {
            path_prefix: text(&it["pathPrefix"]).unwrap_or_default().into(),
            allowed_headers: allowed,
            add_headers: headers(&it["includeAdditionalHeadersInCheck"]),
            to_upstream: names(&it["headersToUpstreamOnAllow"]),
            to_client_on_deny: names(&it["headersToDownstreamOnDeny"]),
            to_client_on_allow: names(&it["headersToDownstreamOnAllow"]),
        };
        self.authorizer(it, protocol, path)
    }

    fn authorizer(
        &mut self,
        it: &Value,
        protocol: AuthorizerProtocol,
        path: &str,
    ) -> Option<ExternalAuthorizer> {
        let (service, port) = self.service(it, path)?;
        let body = &it["includeRequestBodyInCheck"];
        let status = &it["statusOnError"];
        let status = status
            .as_str()
            .and_then(|text| text.parse().ok())
            .or_else(|| status.as_u64());
        let status = status.and_then(|status| u16::try_from(status).ok());
        let flag = |value: &Value| value.as_bool().unwrap_or_default();
        Some(ExternalAuthorizer {
            service,
            port,
            protocol,
            timeout: self
                .duration(&it["timeout"], &format!("{path}.timeout"))
                .unwrap_or(AUTHORIZER_TIMEOUT),
            fail_open: flag(&it["failOpen"]),
            status_on_error: status
                .filter(|status| (200..600).contains(status))
                .unwrap_or(403),
            body: body.is_object().then(|| AuthorizerBody {
                max_bytes: number(&body["maxRequestBytes"]),
                allow_partial: flag(&body["allowPartialMessage"]),
                as_bytes: flag(&body["packAsBytes"]),
            }),
        })
    }

    fn opentelemetry(&mut self, it: &Value, path: &str) -> Option<TraceProvider> {
        let (service, port) = self.service(it, path)?;
        let http = &it["http"];
        let (protocol, options) = match http.is_object() {
            true => (
                TraceProtocol::OtlpHttp(text(&http["path"]).unwrap_or("/v1/traces").into()),
                http,
            ),
            false => (TraceProtocol::OtlpGrpc, &it["grpc"]),
        };
        let mut added = headers(&options["headers"]);
        added.extend(headers(&options["initialMetadata"]));
        Some(TraceProvider {
            service,
            port,
            protocol,
            max_tag_length: number(&it["maxTagLength"]),
            timeout: self.duration(&options["timeout"], &format!("{path}.timeout")),
            headers: added,
        })
    }

    fn zipkin(&mut self, it: &Value, path: &str) -> Option<TraceProvider> {
        let (service, port) = self.service(it, path)?;
        Some(TraceProvider {
            service,
            port,
            protocol: TraceProtocol::Zipkin {
                path: text(&it["path"]).unwrap_or("/api/v2/spans").into(),
                with_w3c: text(&it["traceContextOption"]) == Some("USE_B3_WITH_W3C_PROPAGATION"),
            },
            max_tag_length: number(&it["maxTagLength"]),
            timeout: self.duration(&it["timeout"], &format!("{path}.timeout")),
            headers: headers(&it["headers"]),
        })
    }

    fn otel_log(&mut self, it: &Value, path: &str) -> Option<LogProvider> {
        let (service, port) = self.service(it, path)?;
        Some(LogProvider::OpenTelemetry {
            service,
            port,
            log_name: text(&it["logName"])
                .unwrap_or("otel_envoy_accesslog")
                .into(),
            format: self.kept_format(format_of(&it["logFormat"]), path),
        })
    }

    /// `accessLogEncoding` and `accessLogFormat`.
    fn log_format(&mut self, config: &Value) -> LogFormat {
        let format = text(&config["accessLogFormat"]);
        match (text(&config["accessLogEncoding"]), format) {
            (Some("JSON"), None) => LogFormat::DefaultJson,
            (Some("JSON"), Some(format)) => match serde_json::from_str::<Value>(format) {
                Ok(Value::Object(fields)) => LogFormat::Json(pairs(&fields)),
                _ => {
                    self.problem(
                        "accessLogFormat",
                        "is no JSON object; the default one is used",
                    );
                    LogFormat::DefaultJson
                }
            },
            (_, Some(format)) => LogFormat::Text(format.into()),
            (_, None) => LogFormat::DefaultText,
        }
    }

    /// The format that lines will have.
    fn kept_format(&mut self, format: LogFormat, path: &str) -> LogFormat {
        let parsed = match Format::new(&format, &Nowhere) {
            Ok(parsed) => parsed,
            Err(error) => {
                self.problem(path, format_args!("{error}; the default format is used"));
                return match format {
                    LogFormat::Json(_) | LogFormat::DefaultJson => LogFormat::DefaultJson,
                    LogFormat::Text(_) | LogFormat::DefaultText => LogFormat::DefaultText,
                };
            }
        };
        for operator in parsed.silent() {
            self.problem(path, format_args!("%{operator}% is always - at waypoints"));
        }
        format
    }

    fn known(&mut self, path: &str, names: &mut Vec<Str>, is_known: impl Fn(&str) -> bool) {
        let unknown: Vec<Str> = names
            .iter()
            .filter(|name| !is_known(name))
            .cloned()
            .collect();
        for name in &unknown {
            self.problem(path, format!("there is no provider {name:?}"));
        }
        names.retain(|name| !unknown.contains(name));
    }

    fn aliases(&mut self, it: &Value) -> Vec<TrustDomain> {
        let mut aliases = Vec::new();
        for text in texts(it) {
            match text.parse() {
                Ok(domain) => aliases.push(domain),
                Err(error) => self.problem("trustDomainAliases", error),
            }
        }
        aliases
    }

    fn normalization(&mut self, it: &Value) -> Normalization {
        match text(it) {
            None | Some("DEFAULT" | "BASE") => Normalization::Base,
            Some("NONE") => Normalization::None,
            Some("MERGE_SLASHES") => Normalization::MergeSlashes,
            Some("DECODE_AND_MERGE_SLASHES") => Normalization::DecodeAndMergeSlashes,
            Some(other) => {
                self.problem(
                    "pathNormalization.normalization",
                    format!("{other:?} is unknown; the strictest is used"),
                );
                Normalization::DecodeAndMergeSlashes
            }
        }
    }

    fn sampling(&mut self, it: &Value) -> u32 {
        let mut found = Findings::default();
        let path = "defaultConfig.tracing.sampling";
        let read = it
            .as_f64()
            .and_then(|percent| per_million(percent, path, &mut found));
        self.findings(found);
        read.unwrap_or(SAMPLING_PER_MILLION)
    }

    fn retry(&mut self, it: &Value) -> Option<RetryPolicy> {
        if it.is_null() {
            return None;
        }
        let written: Result<HttpRetry, _> = serde_json::from_value(it.clone());
        match written {
            Ok(written) => {
                let mut found = Findings::default();
                let policy = http::default_retry(&written, &mut found);
                self.findings(found);
                Some(policy)
            }
            Err(error) => {
                self.problem("defaultHttpRetryPolicy", error);
                None
            }
        }
    }

    /// What ProxyConfig may say that waypoints do not do.
    fn without_effect(&mut self, config: &Value) {
        let headers = &config["proxyHeaders"];
        for (field, is_given) in [
            (
                "connectionSettings",
                config["connectionSettings"].is_object(),
            ),
            (
                "proxyHeaders.preserveHttp1HeaderCase",
                headers["preserveHttp1HeaderCase"].as_bool() == Some(true),
            ),
            (
                "proxyHeaders.setCurrentClientCertDetails",
                headers["setCurrentClientCertDetails"].is_object(),
            ),
        ] {
            if is_given {
                let path = format!("defaultConfig.{field}");
                self.problem(&path, "has no effect on waypoints");
            }
        }
    }

    fn connections(&mut self, config: &Value) -> Defaults {
        let mut found = Findings::default();
        let read = Defaults::read(config, &mut found);
        self.findings(found);
        read
    }

    fn findings(&mut self, found: Findings) {
        for problem in found.into_problems() {
            self.problem(&problem.path, problem.message);
        }
    }
}

fn proxy_headers(it: &Value) -> ProxyHeaders {
    let disabled = |field: &str| it[field]["disabled"].as_bool();
    let enabled = |field: &str| it[field]["enabled"].as_bool() == Some(true);
    ProxyHeaders {
        request_id_disabled: disabled("requestId") == Some(true),
        server: text(&it["server"]["value"])
            .filter(|_| disabled("server") != Some(true))
            .map(Str::from),
        attempt_count: it["attemptCount"].is_object() && disabled("attemptCount") != Some(true),
        debug_headers: it["envoyDebugHeaders"].is_object()
            && disabled("envoyDebugHeaders") != Some(true),
        forwarded_host: enabled("xForwardedHost"),
        forwarded_port: enabled("xForwardedPort"),
    }
}

fn format_of(it: &Value) -> LogFormat {
    match (text(&it["text"]), it["labels"].as_object()) {
        (Some(format), _) => LogFormat::Text(format.into()),
        (None, Some(labels)) if labels.is_empty() => LogFormat::DefaultJson,
        (None, Some(labels)) => LogFormat::Json(pairs(labels)),
        (None, None) => LogFormat::DefaultText,
    }
}

fn pairs(fields: &Map<String, Value>) -> Vec<(Str, Str)> {
    let value = |value: &Value| {
        value
            .as_str()
            .map_or_else(|| value.to_string(), str::to_owned)
    };
    fields
        .iter()
        .map(|(key, it)| (key.as_str().into(), value(it).into()))
        .collect()
}

/// A text that is not empty.
fn text(it: &Value) -> Option<&str> {
    it.as_str().filter(|text| !text.is_empty())
}

fn texts(it: &Value) -> Vec<Str> {
    it.as_array()
        .into_iter()
        .flatten()
        .filter_map(text)
        .map(Str::from)
        .collect()
}

/// Names of headers, in lower case.
fn names(it: &Value) -> Vec<Str> {
    texts(it)
        .iter()
        .map(|name| name.to_ascii_lowercase().into())
        .collect()
}

fn number(it: &Value) -> u32 {
    it.as_u64()
        .and_then(|number| u32::try_from(number).ok())
        .unwrap_or_default()
}

/// A mapping, or a list of names and values. A value from the waypoint's environment is not known here and left out.
fn headers(it: &Value) -> Vec<(::http::HeaderName, Str)> {
    let mut pairs: Vec<(&str, &str)> = Vec::new();
    for (name, value) in it.as_object().into_iter().flatten() {
        pairs.extend(value.as_str().map(|value| (name.as_str(), value)));
    }
    for item in it.as_array().into_iter().flatten() {
        pairs.extend(text(&item["name"]).zip(item["value"].as_str()));
    }
    let header = |(name, value): (&str, &str)| Some((name.parse().ok()?, value.into()));
    pairs.into_iter().filter_map(header).collect()
}

#[cfg(test)]
mod tests;
