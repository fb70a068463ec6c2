//! Filters of rules and of backends.

use std::{collections::BTreeSet, time::Duration};

use http::{HeaderName, HeaderValue, StatusCode};
use mesh::{
    l7::{
        config::{AuthorizerBody, AuthorizerProtocol, ExternalAuthorizer},
        route::{
            Cors, HeaderEdit, HttpMatch, Mirror, OriginMatch, PathMatch, PathRewrite, Redirect,
            RedirectPort, Rewrite,
        },
    },
    names::Str,
};

use super::Notes;
use crate::crd::gateway_api::{
    CorsFilter, ExternalAuth, HeaderModifier, HttpRouteFilter, PathModifier, RequestMirror,
    RequestRedirect, UrlRewrite,
};

/// What the filters of a rule or of a backend come to.
#[derive(Default)]
pub(super) struct Filters {
    pub(super) request_headers: HeaderEdit,
    pub(super) response_headers: HeaderEdit,
    pub(super) rewrite: Option<Rewrite>,
    pub(super) redirect: Option<Redirect>,
    pub(super) mirrors: Vec<Mirror>,
    pub(super) cors: Option<Cors>,
    pub(super) external_authorizer: Option<Str>,
}

const MILLION: i64 = 1_000_000;
/// Of a browser's memory of a preflight, in seconds (HTTPCORSFilter.maxAge).
const DEFAULT_MAX_AGE: u32 = 5;
/// Of one question to an external authorizer.
const AUTHORIZER_TIMEOUT: Duration = Duration::from_secs(10);

pub(super) fn of_rule(
    rule: usize,
    filters: &[HttpRouteFilter],
    matches: &[HttpMatch],
    notes: &mut Notes<'_>,
) -> Filters {
    let read = all(rule, "", filters, notes);
    let prefixes = |path: Option<&PathRewrite>| matches!(path, Some(PathRewrite::Prefix(_)));
    let rewrites = prefixes(read.rewrite.as_ref().and_then(|it| it.path.as_ref()));
    let redirects = prefixes(read.redirect.as_ref().and_then(|it| it.path.as_ref()));
    let by_prefix = |wanted: &HttpMatch| matches!(wanted.path, Some(PathMatch::Segments(_)));
    if (rewrites || redirects) && !matches.iter().all(by_prefix) {
        let problem = "ReplacePrefixMatch needs matches by PathPrefix";
        notes.wrong_with(rule, "filters", "IncompatibleFilters", problem);
    }
    read
}

pub(super) fn of_backend(
    rule: usize,
    index: usize,
    filters: &[HttpRouteFilter],
    notes: &mut Notes<'_>,
) -> Filters {
    let field = format!("backendRefs[{index}].");
    let read = all(rule, &field, filters, notes);
    if read.cors.is_some() || read.external_authorizer.is_some() {
        let field = format!("{field}filters");
        notes.wrong(rule, &field, "CORS and ExternalAuth are for whole rules");
    }
    read
}

fn all(rule: usize, within: &str, filters: &[HttpRouteFilter], notes: &mut Notes<'_>) -> Filters {
    let mut read = Filters::default();
    let mut seen = BTreeSet::new();
    for (index, filter) in filters.iter().enumerate() {
        let field = format!("{within}filters[{index}]");
        let once = !matches!(filter.type_.as_str(), "RequestMirror" | "ExtensionRef");
        if once && !seen.insert(filter.type_.as_str()) {
            let problem = format!("{} stands twice", filter.type_);
            notes.wrong_with(rule, &field, "IncompatibleFilters", problem);
        } else if let Err(problem) = one(rule, &field, filter, &mut read, notes) {
            notes.wrong(rule, &field, problem);
        }
    }
    if read.redirect.is_some() && read.rewrite.is_some() {
        let field = format!("{within}filters");
        let problem = "a request is either redirected or rewritten";
        notes.wrong_with(rule, &field, "IncompatibleFilters", problem);
    }
    read
}

fn one(
    rule: usize,
    field: &str,
    filter: &HttpRouteFilter,
    read: &mut Filters,
    notes: &mut Notes<'_>,
) -> Result<(), String> {
    fn given<'f, T>(field: &'f Option<T>, name: &str) -> Result<&'f T, String> {
        field.as_ref().ok_or_else(|| format!("{name} is missing"))
    }
    match filter.type_.as_str() {
        "RequestHeaderModifier" => {
            let wanted = given(&filter.request_header_modifier, "requestHeaderModifier")?;
            read.request_headers = headers(wanted, true)?;
        }
        "ResponseHeaderModifier" => {
            let wanted = given(&filter.response_header_modifier, "responseHeaderModifier")?;
            read.response_headers = headers(wanted, false)?;
        }
        "RequestMirror" => {
            let wanted = given(&filter.request_mirror, "requestMirror")?;
            let per_million = share(wanted)?;
            read.mirrors.push(Mirror {
                backend: notes.backend(&wanted.backend_ref),
                per_million,
                shadow_host: false,
            });
        }
        "RequestRedirect" => {
            let wanted = given(&filter.request_redirect, "requestRedirect")?;
            read.redirect = Some(redirect(wanted)?);
        }
        "URLRewrite" => {
            let wanted = given(&filter.url_rewrite, "urlRewrite")?;
            read.rewrite = Some(rewrite(wanted)?);
        }
        "CORS" => read.cors = Some(cors(given(&filter.cors, "cors")?)?),
        "ExternalAuth" => {
            let wanted = given(&filter.external_auth, "externalAuth")?;
            read.external_authorizer = Some(authorizer(rule, field, wanted, notes)?);
        }
        "ExtensionRef" => {
            let kind = filter
                .extension_ref
                .as_ref()
                .map_or("", |it| it.kind.as_str());
            return Err(format!("there is no extension of kind {kind:?} here"));
        }
        other => return Err(format!("{other:?} is no type of a filter")),
    }
    Ok(())
}

fn header_name(name: &str) -> Result<HeaderName, String> {
    HeaderName::from_bytes(name.as_bytes()).map_err(|_| format!("{name:?} is no header's name"))
}

/// Headers that belong to a connection or frame a message are not the user's to change.
fn headers(wanted: &HeaderModifier, of_request: bool) -> Result<HeaderEdit, String> {
    const FRAMING: [&str; 7] = [
        "connection",
        "content-length",
        "keep-alive",
        "proxy-connection",
        "te",
        "transfer-encoding",
        "upgrade",
    ];
    let name = |name: &str| {
        let name = header_name(name)?;
        match FRAMING.contains(&name.as_str()) {
            true => Err(format!("{name} belongs to the connection")),
            false => Ok(name),
        }
    };
    let host = |header: &HeaderName| *header == http::header::HOST;
    let pair = |header: &crate::crd::gateway_api::HeaderValue| {
        let value = HeaderValue::from_str(&header.value)
            .map_err(|_| format!("{:?} is no header's value", header.value))?;
        Ok::<_, String>((name(&header.name)?, value))
    };
    let edit = HeaderEdit {
        set: wanted.set.iter().map(pair).collect::<Result<_, _>>()?,
        add: wanted.add.iter().map(pair).collect::<Result<_, _>>()?,
        remove: wanted
            .remove
            .iter()
            .map(|header| name(header))
            .collect::<Result<_, _>>()?,
    };
    let added = edit.add.iter().map(|(header, _)| header);
    let sets_host = !of_request && edit.set.iter().any(|(header, _)| host(header));
    if sets_host || added.chain(&edit.remove).any(host) {
        return Err("host can only be set, on requests".to_owned());
    }
    Ok(edit)
}

fn share(wanted: &RequestMirror) -> Result<u32, String> {
    let (numerator, denominator) = match (wanted.percent, &wanted.fraction) {
        (Some(_), Some(_)) => return Err("percent and fraction exclude each other".to_owned()),
        (Some(percent), None) => (percent, 100),
        (None, Some(fraction)) => (fraction.numerator, fraction.denominator.unwrap_or(100)),
        (None, None) => (100, 100),
    };
    if denominator < 1 || !(0..=denominator).contains(&numerator) {
        return Err(format!("{numerator} of {denominator} is no share"));
    }
    let per_million = i64::from(numerator) * MILLION / i64::from(denominator);
    u32::try_from(per_million).map_err(|error| error.to_string())
}

fn path(wanted: &PathModifier) -> Result<PathRewrite, String> {
    let slash = |path: &str| match path.starts_with('/') || path.is_empty() {
        true => Ok(Str::from(path)),
        false => Err(format!("{path:?} does not start with a slash")),
    };
    match (
        wanted.type_.as_str(),
        &wanted.replace_full_path,
        &wanted.replace_prefix_match,
    ) {
        ("ReplaceFullPath", Some(path), None) => Ok(PathRewrite::Full(slash(path)?)),
        ("ReplacePrefixMatch", None, Some(path)) => Ok(PathRewrite::Prefix(slash(path)?)),
        ("ReplaceFullPath" | "ReplacePrefixMatch", ..) => {
            Err("path: its type and its field do not go together".to_owned())
        }
        (other, ..) => Err(format!("path: {other:?} is no type of a path modifier")),
    }
}

fn hostname(text: &str) -> Result<Str, String> {
    let valid =
        |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"-.".contains(&byte);
    match !text.is_empty() && text.bytes().all(valid) {
        true => Ok(text.into()),
        false => Err(format!("{text:?} is no host name")),
    }
}

fn redirect(wanted: &RequestRedirect) -> Result<Redirect, String> {
    let scheme = match wanted.scheme.as_deref() {
        None => None,
        Some(scheme @ ("http" | "https")) => Some(scheme.into()),
        Some(other) => return Err(format!("scheme: {other:?} is neither http nor https")),
    };
    let port = match wanted.port {
        None => RedirectPort::Derived,
        Some(number) => match u16::try_from(number) {
            Ok(number) if number != 0 => RedirectPort::Port(number),
            _ => return Err(format!("port: {number} is no port")),
        },
    };
    let status = match wanted.status_code.unwrap_or(302) {
        301 => StatusCode::MOVED_PERMANENTLY,
        302 => StatusCode::FOUND,
        303 => StatusCode::SEE_OTHER,
        307 => StatusCode::TEMPORARY_REDIRECT,
        308 => StatusCode::PERMANENT_REDIRECT,
        other => {
            return Err(format!(
                "statusCode: {other} is none of 301, 302, 303, 307, 308"
            ));
        }
    };
    Ok(Redirect {
        scheme,
        hostname: wanted.hostname.as_deref().map(hostname).transpose()?,
        path: wanted.path.as_ref().map(path).transpose()?,
        port,
        status,
    })
}

fn rewrite(wanted: &UrlRewrite) -> Result<Rewrite, String> {
    Ok(Rewrite {
        authority: wanted.hostname.as_deref().map(hostname).transpose()?,
        path: wanted.path.as_ref().map(path).transpose()?,
    })
}

fn cors(wanted: &CorsFilter) -> Result<Cors, String> {
    let origin = |origin: &String| match origin.as_str() {
        "*" => Ok(OriginMatch::Any),
        text if text.contains("://") => Ok(OriginMatch::Wildcard(text.into())),
        other => Err(format!("allowOrigins: {other:?} has no scheme")),
    };
    let texts = |list: &[String]| list.iter().map(|text| text.as_str().into()).collect();
    let max_age = match wanted.max_age {
        None => DEFAULT_MAX_AGE,
        Some(seconds) => match u32::try_from(seconds) {
            Ok(seconds) if seconds > 0 => seconds,
            _ => return Err(format!("maxAge: {seconds} is less than 1")),
        },
    };
    Ok(Cors {
        allow_origins: wanted
            .allow_origins
            .iter()
            .map(origin)
            .collect::<Result<_, _>>()?,
        allow_credentials: wanted.allow_credentials.unwrap_or_default(),
        allow_methods: texts(&wanted.allow_methods),
        allow_headers: texts(&wanted.allow_headers),
        expose_headers: texts(&wanted.expose_headers),
        max_age: Some(max_age),
        forward_unmatched_preflights: false,
    })
}

/// Where the authorizer cannot be found, nobody may pass: the rule is answered 500.
fn authorizer(
    rule: usize,
    field: &str,
    wanted: &ExternalAuth,
    notes: &mut Notes<'_>,
) -> Result<Str, String> {
    let texts = |list: &[String]| -> Vec<Str> {
        let lower = list.iter().map(|text| text.to_ascii_lowercase());
        lower.map(Str::from).collect()
    };
    let protocol = match (wanted.protocol.as_str(), &wanted.grpc, &wanted.http) {
        ("GRPC", grpc, None) => AuthorizerProtocol::Grpc {
            allowed_headers: grpc
                .as_ref()
                .map_or_else(Vec::new, |it| texts(&it.allowed_headers)),
        },
        ("HTTP", None, http) => {
            let absent = crate::crd::gateway_api::HttpAuth::default();
            let http = http.as_ref().unwrap_or(&absent);
            AuthorizerProtocol::Http {
                path_prefix: http.path.as_deref().unwrap_or_default().into(),
                allowed_headers: texts(&http.allowed_headers),
                add_headers: Vec::new(),
                to_upstream: texts(&http.allowed_response_headers),
                to_client_on_deny: Vec::new(),
                to_client_on_allow: Vec::new(),
            }
        }
        ("GRPC" | "HTTP", ..) => return Err("grpc or http does not go with protocol".to_owned()),
        (other, ..) => return Err(format!("protocol: {other:?} is neither GRPC nor HTTP")),
    };
    let (service, port) = notes
        .resolve(&wanted.backend_ref)
        .map_err(|unresolved| format!("backendRef: {}", unresolved.message))?;
    let body = wanted
        .forward_body
        .as_ref()
        .filter(|body| body.max_size > 0);
    let name: Str = format!("{}/{rule}/{field}", notes.route).into();
    let authorizer = ExternalAuthorizer {
        service,
        port,
        protocol,
        timeout: AUTHORIZER_TIMEOUT,
        fail_open: false,
        status_on_error: 403,
        body: body.map(|body| AuthorizerBody {
            max_bytes: body.max_size,
            allow_partial: false,
            as_bytes: false,
        }),
    };
    notes.authorizers.insert(name.clone(), authorizer);
    Ok(name)
}
