//! What rules change of requests and responses.

use std::{borrow::Cow, fmt::Write as _};

use http::{
    HeaderMap, HeaderName, HeaderValue, StatusCode,
    header::{CONNECTION, HOST, PROXY_AUTHENTICATE, PROXY_AUTHORIZATION, TE, TRAILER},
    header::{TRANSFER_ENCODING, UPGRADE},
};

use super::{
    condition::Matched,
    pattern::Pattern,
    request::RequestFacts,
    route::{HeaderEdit, PathRewrite, Redirect, RedirectPort},
};

#[cfg(test)]
mod tests;

/// Headers that frame a message or name its way: a rule does not touch them.
fn forbidden(name: &HeaderName) -> bool {
    let framing = [CONNECTION, TRANSFER_ENCODING, UPGRADE, TE, TRAILER];
    framing.contains(name) || *name == http::header::CONTENT_LENGTH
}

impl HeaderEdit {
    /// Changes a request's headers: set, add, remove. Tells the host that it is to have, if that is set.
    pub fn apply_request(&self, headers: &mut HeaderMap) -> Option<HeaderValue> {
        let host = self.set.iter().rev().find(|(name, _)| name == HOST);
        self.apply(headers);
        host.map(|(_, value)| value.clone())
    }

    /// Changes a response's headers.
    pub fn apply_response(&self, headers: &mut HeaderMap) {
        self.apply(headers);
    }

    fn apply(&self, headers: &mut HeaderMap) {
        let free = |name: &HeaderName| !forbidden(name) && name != HOST;
        for (name, value) in self.set.iter().filter(|(name, _)| free(name)) {
            headers.insert(name.clone(), value.clone());
        }
        for (name, value) in self.add.iter().filter(|(name, _)| free(name)) {
            headers.append(name.clone(), value.clone());
        }
        for name in self.remove.iter().filter(|name| free(name)) {
            headers.remove(name);
        }
    }
}

/// A path after its rewrite; both without query.
pub fn rewrite_path<'a>(rewrite: &'a PathRewrite, matched: Matched, path: &'a str) -> Cow<'a, str> {
    match rewrite {
        PathRewrite::Full(to) => absolute(to),
        PathRewrite::Regex {
            pattern,
            replacement,
        } => replaced(pattern, replacement, path),
        PathRewrite::Prefix(to) => match matched {
            Matched::Whole => absolute(to),
            Matched::Nothing => joined(to, path),
            Matched::Segments(length) => joined(to, path.get(length..).unwrap_or_default()),
            Matched::Prefix(length) => {
                let rest = path.get(length..).unwrap_or_default();
                match absolute(&format!("{to}{rest}")) {
                    Cow::Borrowed(it) => it.to_owned().into(),
                    Cow::Owned(it) => it.into(),
                }
            }
        },
    }
}

fn absolute(path: &str) -> Cow<'_, str> {
    if path.starts_with('/') {
        path.into()
    } else {
        format!("/{path}").into()
    }
}

/// Whole segments: exactly one slash stands between them, none is added to the end.
fn joined<'a>(to: &str, rest: &str) -> Cow<'a, str> {
    let to = absolute(to);
    let joined = match rest {
        "" => to.into_owned(),
        rest => format!("{}{rest}", to.trim_end_matches('/')),
    };
    joined.into()
}

/// `\0` to `\9` of the replacement are the expression's groups.
fn replaced<'a>(pattern: &Pattern, replacement: &str, path: &'a str) -> Cow<'a, str> {
    pattern.replace_all(path, |groups: &regex::Captures<'_>| {
        let mut out = String::with_capacity(replacement.len());
        let mut rest = replacement.chars();
        while let Some(next) = rest.next() {
            let group = rest.as_str().chars().next().and_then(|it| it.to_digit(10));
            match (next, group) {
                ('\\', Some(group)) => {
                    rest.next();
                    let at = usize::try_from(group).unwrap_or_default();
                    out.push_str(groups.get(at).map_or("", |it| it.as_str()));
                }
                _ => out.push(next),
            }
        }
        out
    })
}

/// The answer of a redirect: its status and its `location`. None: the location would not be a header's value.
pub fn redirect(
    redirect: &Redirect,
    matched: Matched,
    facts: &RequestFacts<'_>,
) -> Option<(StatusCode, HeaderValue)> {
    let scheme = redirect.scheme.as_deref().unwrap_or(facts.scheme);
    let (asked_host, asked_port) = split_authority(facts.authority);
    let host = redirect.hostname.as_deref().unwrap_or(asked_host);
    let standard = default_port(scheme);
    let port = match redirect.port {
        RedirectPort::Port(port) => Some(port),
        RedirectPort::FromRequest => asked_port,
        RedirectPort::ProtocolDefault => None,
        RedirectPort::Derived if redirect.scheme.is_some() => standard,
        RedirectPort::Derived => Some(facts.connection.port),
    };
    let mut location = format!("{scheme}://{host}");
    if let Some(port) = port.filter(|it| Some(*it) != standard) {
        let _ = write!(location, ":{port}");
    }
    match &redirect.path {
        Some(path) => location.push_str(&rewrite_path(path, matched, facts.path)),
        None => location.push_str(facts.path),
    }
    if let Some(query) = facts.query {
        let _ = write!(location, "?{query}");
    }
    Some((redirect.status, HeaderValue::try_from(location).ok()?))
}

fn default_port(scheme: &str) -> Option<u16> {
    match scheme {
        "http" => Some(80),
        "https" => Some(443),
        _ => None,
    }
}

/// Host, with the brackets of IPv6, and port. A port that is none stays with the host.
pub fn split_authority(authority: &str) -> (&str, Option<u16>) {
    let split = authority.rsplit_once(':');
    let port = split.and_then(|(host, port)| Some((host, port.parse().ok()?)));
    match port {
        Some((host, port)) if !host.contains(':') || host.ends_with(']') => (host, Some(port)),
        _ => (authority, None),
    }
}

const HOP_BY_HOP: [&str; 4] = [
    "keep-alive",
    "proxy-connection",
    "http2-settings",
    "proxy-status",
];

/// Names that `connection` must not take away: what decides who may, and how the message is read.
const KEPT: [&str; 8] = [
    "host",
    "authorization",
    "cookie",
    "set-cookie",
    "content-length",
    "content-type",
    "forwarded",
    "traceparent",
];

/// Removes what concerns one connection only (RFC 9110, 7.6.1), and what `connection` names. `te: trailers` stays, as
/// HTTP/2 allows. An upgrade that is handled must be read before.
pub fn strip_hop_by_hop(headers: &mut HeaderMap) {
    let named: Vec<HeaderName> = headers
        .get_all(CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|name| name.trim().parse().ok())
        .filter(|name: &HeaderName| !is_kept(name.as_str()))
        .collect();
    let trailers = asks_for_trailers(headers);
    for name in named {
        headers.remove(name);
    }
    for name in HOP_BY_HOP {
        headers.remove(name);
    }
    let standard = [
        CONNECTION,
        TE,
        TRAILER,
        TRANSFER_ENCODING,
        UPGRADE,
        PROXY_AUTHENTICATE,
        PROXY_AUTHORIZATION,
    ];
    for name in standard {
        headers.remove(name);
    }
    if trailers {
        headers.insert(TE, HeaderValue::from_static("trailers"));
    }
}

fn is_kept(name: &str) -> bool {
    KEPT.contains(&name) || name.starts_with("x-forwarded-")
}

/// Whether the sender takes trailers.
pub fn asks_for_trailers(headers: &HeaderMap) -> bool {
    let values = headers.get_all(TE).iter();
    let values = values.filter_map(|value| value.to_str().ok());
    values
        .flat_map(|value| value.split(','))
        .any(|it| it.trim().eq_ignore_ascii_case("trailers"))
}

/// The gRPC status of an HTTP status that is not gRPC's own.
pub fn grpc_status(status: StatusCode) -> u16 {
    match status.as_u16() {
        400 => 13,
        401 => 16,
        403 => 7,
        404 => 12,
        429 | 502 | 503 | 504 => 14,
        _ => 2,
    }
}
