//! HTTP rules of VirtualServices.

use std::collections::BTreeMap;

use http::StatusCode;
use mesh::{
    l7::route::{
        Action, DirectResponse, HeaderMatch, HttpMatch, HttpRule, Mirror, PathMatch, PathRewrite,
        QueryMatch, Redirect, RedirectPort, Rewrite, TextMatch, Timeouts, WeightedBackend,
    },
    names::Str,
};

use super::{
    read::{duration, header, pattern, per_million, port, share, text_match},
    virtual_service::{Around, destination, is_for_mesh, source, weights},
};
use crate::{
    crd::istio::{self as crd, RedirectPortSelection},
    validate::Findings,
};

mod delegate;
mod edit;
mod traffic;

pub use delegate::under;
use edit::edits;
pub use traffic::default_retry;
use traffic::{cors, fault, retry};

const CLAIMS: &str = "@request.auth.claims";
/// The longest body of a direct response, in bytes.
const MAX_BODY: usize = 1024 * 1024;

/// What must be there, and what excludes what.
pub fn check(it: &crd::HttpRoute, delegated: bool, path: &str, found: &mut Findings) {
    let actions = [
        ("route", !it.route.is_empty()),
        ("redirect", it.redirect.is_some()),
        ("directResponse", it.direct_response.is_some()),
        ("delegate", it.delegate.is_some()),
    ];
    let given: Vec<&str> = actions
        .iter()
        .filter(|(_, given)| *given)
        .map(|(field, _)| *field)
        .collect();
    match &given[..] {
        [] => found.error(path, "needs route, redirect, directResponse or delegate"),
        [_] => {}
        more => found.error(path, format!("only one of {} may be set", more.join(", "))),
    }
    if it.redirect.is_some() && it.rewrite.is_some() {
        found.error(path, "redirect and rewrite exclude each other");
    }
    if delegated && it.delegate.is_some() {
        found.error(format!("{path}.delegate"), "a delegate cannot delegate");
    }
    for (index, it) in it.route.iter().enumerate() {
        destination(
            it.destination.as_ref(),
            it.weight,
            &format!("{path}.route[{index}]"),
            found,
        );
    }
    for (index, it) in it.mirrors.iter().enumerate() {
        destination(
            it.destination.as_ref(),
            None,
            &format!("{path}.mirrors[{index}]"),
            found,
        );
    }
    let positive = it.route.iter().any(|it| it.weight.unwrap_or_default() > 0);
    if it.route.len() > 1 && !positive {
        found.warning(
            format!("{path}.route"),
            "no destination has a weight: every request is answered 500",
        );
    }
}

/// The rules that one of the object comes to: one for each match where the rewrite depends on what matched, one for each
/// port where a destination's port is the request's.
pub fn rules(
    it: &crd::HttpRoute,
    around: Around<'_>,
    path: &str,
    found: &mut Findings,
) -> Vec<HttpRule> {
    let Some(matches) = matches(it, path, found) else {
        return Vec::new();
    };
    let by_match = it
        .rewrite
        .as_ref()
        .is_some_and(|rewrite| !rewrite.uri.is_empty())
        || it
            .redirect
            .as_ref()
            .is_some_and(|redirect| !redirect.prefix_rewrite.is_empty());
    let groups: Vec<Vec<HttpMatch>> = match by_match {
        true if matches.is_empty() => vec![vec![any_path(HttpMatch::default())]],
        true => matches.into_iter().map(|one| vec![any_path(one)]).collect(),
        false => vec![matches],
    };
    let targets = it.route.iter().map(|it| it.destination.as_ref());
    let mirrors = it.mirrors.iter().map(|it| it.destination.as_ref());
    let mut all = targets.chain(mirrors).chain([it.mirror.as_ref()]);
    let follows = all.any(|target| around.follows_request(target));
    let mut rules = Vec::new();
    for group in groups {
        if !follows {
            rules.push(rule(it, group, None, around, path, found));
            continue;
        }
        for port in around.ports {
            if let Some(group) = on_port(&group, *port) {
                rules.push(rule(it, group, Some(*port), around, path, found));
            }
        }
    }
    rules
}

/// A match without a path matches everything below the root.
fn any_path(mut it: HttpMatch) -> HttpMatch {
    it.path.get_or_insert_with(|| PathMatch::Prefix("/".into()));
    it
}

/// The matches that requests on this port may meet; `None`: there are some, and none does.
fn on_port(matches: &[HttpMatch], port: u16) -> Option<Vec<HttpMatch>> {
    if matches.is_empty() {
        return Some(vec![HttpMatch {
            port: Some(port),
            ..HttpMatch::default()
        }]);
    }
    let on = matches
        .iter()
        .filter(|it| it.port.is_none_or(|own| own == port));
    let on: Vec<_> = on
        .map(|it| HttpMatch {
            port: Some(port),
            ..it.clone()
        })
        .collect();
    (!on.is_empty()).then_some(on)
}

fn rule(
    it: &crd::HttpRoute,
    matches: Vec<HttpMatch>,
    request_port: Option<u16>,
    around: Around<'_>,
    path: &str,
    found: &mut Findings,
) -> HttpRule {
    let by_prefix = matches
        .first()
        .is_none_or(|it| matches!(it.path, None | Some(PathMatch::Prefix(_))));
    let headers = it.headers.as_ref();
    let (request_headers, response_headers) = edits(headers, &format!("{path}.headers"), found);
    HttpRule {
        name: (!it.name.is_empty()).then(|| it.name.as_str().into()),
        matches,
        request_headers,
        response_headers,
        rewrite: it
            .rewrite
            .as_ref()
            .map(|it| rewrite(it, by_prefix, &format!("{path}.rewrite"), found)),
        mirrors: mirrors(it, request_port, around, path, found),
        cors: it
            .cors_policy
            .as_ref()
            .map(|it| cors(it, &format!("{path}.corsPolicy"), found)),
        fault: it
            .fault
            .as_ref()
            .map(|it| fault(it, &format!("{path}.fault"), found)),
        rate_limit: None,
        external_authorizer: None,
        timeouts: Timeouts {
            request: duration(it.timeout.as_ref(), &format!("{path}.timeout"), found)
                .filter(|timeout| !timeout.is_zero()),
            per_try: None,
        },
        retry: it
            .retries
            .as_ref()
            .map(|it| retry(it, &format!("{path}.retries"), found)),
        session: None,
        action: action(it, request_port, around, path, found),
    }
}

/// `None`: it is for gateways only.
fn matches(it: &crd::HttpRoute, path: &str, found: &mut Findings) -> Option<Vec<HttpMatch>> {
    let mut matches = Vec::new();
    for (index, one) in it.matches.iter().enumerate() {
        let read = http_match(one, &format!("{path}.match[{index}]"), found);
        matches.extend(Some(read).filter(|_| is_for_mesh(&one.gateways)));
    }
    (it.matches.is_empty() || !matches.is_empty()).then_some(matches)
}

fn http_match(it: &crd::HttpMatchRequest, path: &str, found: &mut Findings) -> HttpMatch {
    let mut text = |it: &Option<crd::StringMatch>, field: &str| {
        it.as_ref()
            .and_then(|it| text_match(it, &format!("{path}.{field}"), found))
    };
    let uri = text(&it.uri, "uri");
    let (method, scheme, authority) = (
        text(&it.method, "method"),
        text(&it.scheme, "scheme"),
        text(&it.authority, "authority"),
    );
    let (headers, claims) = headers(&it.headers, &format!("{path}.headers"), found);
    let (without_headers, without_claims) = self::headers(
        &it.without_headers,
        &format!("{path}.withoutHeaders"),
        found,
    );
    if !without_claims.is_empty() {
        found.error(
            format!("{path}.withoutHeaders"),
            "claims cannot be excluded, only matched",
        );
    }
    let mut query = Vec::new();
    for (name, value) in &it.query_params {
        let value = text_match(value, &format!("{path}.queryParams.{name}"), found);
        let name = Str::from(name.as_str());
        query.extend(value.map(|value| QueryMatch { name, value }));
    }
    HttpMatch {
        path: uri.and_then(path_match),
        ignore_path_case: it.ignore_uri_case,
        method,
        scheme,
        authority,
        headers,
        without_headers,
        query,
        port: it
            .port
            .and_then(|number| port(number, &format!("{path}.port"), found)),
        source: source(&it.source_namespace, &it.source_labels),
        claims,
        grpc: false,
    }
}

fn path_match(it: TextMatch) -> Option<PathMatch> {
    match it {
        TextMatch::Exact(path) => Some(PathMatch::Exact(path)),
        TextMatch::Prefix(path) => Some(PathMatch::Prefix(path)),
        TextMatch::Regex(pattern) => Some(PathMatch::Regex(pattern)),
        TextMatch::Present => None,
    }
}

type Claims = Vec<(Vec<Str>, TextMatch)>;

fn headers(
    it: &BTreeMap<String, crd::StringMatch>,
    path: &str,
    found: &mut Findings,
) -> (Vec<HeaderMatch>, Claims) {
    let mut headers = Vec::new();
    let mut claims = Vec::new();
    for (name, value) in it {
        let path = format!("{path}.{name}");
        let Some(value) = text_match(value, &path, found) else {
            continue;
        };
        if let Some(rest) = name.strip_prefix(CLAIMS) {
            match claim(rest) {
                Some(names) => claims.push((names, value)),
                None => found.error(path, "names no claim"),
            }
        } else if let Some(name) = header(name, &path, found) {
            headers.push(HeaderMatch { name, value });
        }
    }
    (headers, claims)
}

/// `.name` or `[a][b]`.
fn claim(rest: &str) -> Option<Vec<Str>> {
    let names: Vec<Str> = match rest.strip_prefix('.') {
        Some(name) => name.split('.').map(Str::from).collect(),
        None => {
            let inner = rest.strip_prefix('[')?.strip_suffix(']')?;
            inner.split("][").map(Str::from).collect()
        }
    };
    names.iter().all(|name| !name.is_empty()).then_some(names)
}

fn action(
    it: &crd::HttpRoute,
    request_port: Option<u16>,
    around: Around<'_>,
    path: &str,
    found: &mut Findings,
) -> Action {
    if let Some(it) = &it.redirect {
        return Action::Redirect(redirect(it, &format!("{path}.redirect"), found));
    }
    if let Some(it) = &it.direct_response {
        return direct_response(it, &format!("{path}.directResponse"), found);
    }
    let weights = weights(it.route.iter().map(|it| it.weight));
    let backends = it
        .route
        .iter()
        .zip(weights)
        .enumerate()
        .map(|(index, (it, weight))| {
            let path = format!("{path}.route[{index}].headers");
            let (request_headers, response_headers) = edits(it.headers.as_ref(), &path, found);
            WeightedBackend {
                weight,
                backend: around.backend(it.destination.as_ref(), request_port),
                request_headers,
                response_headers,
                rewrite: None,
                redirect: None,
                mirrors: Vec::new(),
            }
        });
    Action::Forward(backends.collect())
}

fn redirect(it: &crd::HttpRedirect, path: &str, found: &mut Findings) -> Redirect {
    if it.port.is_some() && it.derive_port.is_some() {
        found.error(path, "only one of port and derivePort may be set");
    }
    if !it.uri.is_empty() && !it.prefix_rewrite.is_empty() {
        found.error(path, "only one of uri and prefixRewrite may be set");
    }
    let (host, own_port) = match it.authority.rsplit_once(':') {
        Some((host, number))
            if !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit()) =>
        {
            (host, number.parse().ok())
        }
        _ => (it.authority.as_str(), None),
    };
    let number = it
        .port
        .and_then(|number| port(number, &format!("{path}.port"), found));
    let port = match (number.or(own_port), it.derive_port) {
        (Some(number), _) => RedirectPort::Port(number),
        (None, Some(RedirectPortSelection::FromProtocolDefault)) => RedirectPort::ProtocolDefault,
        (None, Some(RedirectPortSelection::FromRequestPort)) => RedirectPort::FromRequest,
        (None, None) if it.authority.is_empty() => RedirectPort::FromRequest,
        (None, None) => RedirectPort::ProtocolDefault,
    };
    let code = it.redirect_code.filter(|code| *code != 0).unwrap_or(301);
    let status = u16::try_from(code)
        .ok()
        .filter(|code| [301, 302, 303, 307, 308].contains(code));
    if status.is_none() {
        found.error(
            format!("{path}.redirectCode"),
            format!("{code} is none of 301, 302, 303, 307, 308"),
        );
    }
    let given = |text: &str| (!text.is_empty()).then(|| Str::from(text));
    let path = given(&it.uri).map(PathRewrite::Full);
    Redirect {
        scheme: given(&it.scheme),
        hostname: given(host),
        path: path.or_else(|| given(&it.prefix_rewrite).map(PathRewrite::Prefix)),
        port,
        status: status
            .and_then(|code| StatusCode::from_u16(code).ok())
            .unwrap_or(StatusCode::MOVED_PERMANENTLY),
    }
}

fn direct_response(it: &crd::HttpDirectResponse, path: &str, found: &mut Findings) -> Action {
    let status = u16::try_from(it.status)
        .ok()
        .filter(|code| (200..600).contains(code));
    let Some(status) = status.and_then(|code| StatusCode::from_u16(code).ok()) else {
        found.error(
            format!("{path}.status"),
            format!("{} is no status from 200 to 599", it.status),
        );
        return Action::Invalid(format!("{path}.status: {} is no status", it.status).into());
    };
    let none = crd::HttpBody::default();
    let body = it.body.as_ref().unwrap_or(&none);
    let body = match (&body.string, &body.bytes) {
        (Some(_), Some(_)) => {
            found.error(
                format!("{path}.body"),
                "only one of string and bytes may be set",
            );
            Vec::new()
        }
        (Some(text), None) => text.as_bytes().to_vec(),
        (None, Some(bytes)) => base64(bytes, &format!("{path}.body.bytes"), found),
        (None, None) => Vec::new(),
    };
    if body.len() > MAX_BODY {
        found.error(format!("{path}.body"), "is larger than 1 MiB");
    }
    Action::Respond(DirectResponse { status, body })
}

fn base64(text: &str, path: &str, found: &mut Findings) -> Vec<u8> {
    use ::base64::{Engine as _, engine::general_purpose::STANDARD};
    match STANDARD.decode(text) {
        Ok(bytes) => bytes,
        Err(error) => {
            found.error(path, format!("is no base64: {error}"));
            Vec::new()
        }
    }
}

/// A new URI replaces a matched prefix, or the whole path where something else matched.
fn rewrite(it: &crd::HttpRewrite, by_prefix: bool, path: &str, found: &mut Findings) -> Rewrite {
    let regex = it.uri_regex_rewrite.as_ref().and_then(|it| {
        let path = format!("{path}.uriRegexRewrite");
        let replacement = Str::from(it.rewrite.as_str());
        let pattern = pattern(&it.pattern, &format!("{path}.match"), found)?;
        Some(PathRewrite::Regex {
            pattern,
            replacement,
        })
    });
    if regex.is_some() && !it.uri.is_empty() {
        found.error(path, "only one of uri and uriRegexRewrite may be set");
    }
    let uri = Str::from(it.uri.as_str());
    let uri = match (uri.is_empty(), by_prefix) {
        (true, _) => None,
        (false, true) => Some(PathRewrite::Prefix(uri)),
        (false, false) => Some(PathRewrite::Full(uri)),
    };
    Rewrite {
        authority: (!it.authority.is_empty()).then(|| it.authority.as_str().into()),
        path: uri.or(regex),
    }
}

fn mirrors(
    it: &crd::HttpRoute,
    request_port: Option<u16>,
    around: Around<'_>,
    path: &str,
    found: &mut Findings,
) -> Vec<Mirror> {
    let mirror = |target, per_million| Mirror {
        backend: around.backend(target, request_port),
        per_million,
        shadow_host: true,
    };
    let mut mirrors = Vec::new();
    if it.mirror.is_some() {
        let older = it.mirror_percent.filter(|_| it.mirror_percentage.is_none());
        let part = match older {
            Some(percent) => {
                per_million(f64::from(percent), &format!("{path}.mirrorPercent"), found)
            }
            None => share(
                it.mirror_percentage.as_ref(),
                &format!("{path}.mirrorPercentage"),
                found,
            ),
        };
        mirrors.extend(part.map(|part| mirror(it.mirror.as_ref(), part)));
    }
    for (index, it) in it.mirrors.iter().enumerate() {
        let part = share(
            it.percentage.as_ref(),
            &format!("{path}.mirrors[{index}].percentage"),
            found,
        );
        mirrors.extend(part.map(|part| mirror(it.destination.as_ref(), part)));
    }
    mirrors
}
