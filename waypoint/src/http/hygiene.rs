//! What a request must look like before anything decides on it, and what of a message belongs to one hop only.
//!
//! hyper and h2 reject what is not HTTP at all (see `tests/abuse.rs` for what that covers); here is what is HTTP but
//! is read differently by different programs (RFC 9112 11.2, RFC 9113 8).

use http::{
    HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Uri, Version,
    header::{CONNECTION, CONTENT_LENGTH, EXPECT, HOST, TRANSFER_ENCODING, UPGRADE},
    request::Parts,
    uri::{Authority, PathAndQuery, Scheme},
};

use mesh::l7::response_flags::Flag;

use super::reply::Reply;

/// Longest request target, in bytes; longer: 414.
const MAX_TARGET: usize = 16 * 1024;
/// Most header fields; more: 431.
pub(super) const MAX_HEADERS: usize = 100;

/// What only the waypoint itself may tell the next hop.
const OURS: [HeaderName; 4] = [
    HeaderName::from_static("x-forwarded-client-cert"),
    HeaderName::from_static("x-envoy-original-path"),
    HeaderName::from_static("x-envoy-attempt-count"),
    HeaderName::from_static("x-envoy-expected-rq-timeout-ms"),
];

/// Checks a request; afterwards its URI has the authority that counts, and it has no `host` beside it.
///
/// # Errors
/// The answer to a request that must not go on.
pub(super) fn admit(parts: &mut Parts) -> Result<Authority, Box<Reply>> {
    check_version(parts)?;
    check_method(parts)?;
    check_size(parts)?;
    check_framing(parts)?;
    check_target(parts)?;
    let authority = authority(parts)?;
    for name in OURS {
        parts.headers.remove(name);
    }
    Ok(authority)
}

fn refuse(status: StatusCode, details: &'static str) -> Box<Reply> {
    Box::new(Reply::new(status, details).flag(Flag::DownstreamProtocolError))
}

fn bad(details: &'static str) -> Box<Reply> {
    refuse(StatusCode::BAD_REQUEST, details)
}

fn check_version(parts: &Parts) -> Result<(), Box<Reply>> {
    match parts.version {
        Version::HTTP_11 | Version::HTTP_2 => Ok(()),
        _ => {
            let reply = refuse(StatusCode::UPGRADE_REQUIRED, "low_version");
            Err(Box::new(
                reply
                    .header(UPGRADE, HeaderValue::from_static("HTTP/1.1"))
                    .header(CONNECTION, HeaderValue::from_static("upgrade")),
            ))
        }
    }
}

/// CONNECT without `:protocol` asks for a tunnel through us, TRACE for what others added (RFC 9110 9.3.6, 9.3.8).
fn check_method(parts: &Parts) -> Result<(), Box<Reply>> {
    let extended = parts.extensions.get::<hyper::ext::Protocol>().is_some();
    match parts.method {
        Method::CONNECT if !extended => Err(bad("connect_not_allowed")),
        Method::TRACE => Err(bad("trace_not_allowed")),
        _ => Ok(()),
    }
}

fn check_size(parts: &Parts) -> Result<(), Box<Reply>> {
    let target = parts.uri.path_and_query().map_or(0, |it| it.as_str().len());
    if target > MAX_TARGET {
        return Err(refuse(StatusCode::URI_TOO_LONG, "request_target_too_long"));
    }
    if parts.headers.len() > MAX_HEADERS {
        let status = StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE;
        return Err(refuse(status, "too_many_headers"));
    }
    Ok(())
}

/// Where a message's end is in doubt, so is the beginning of the next: nothing more is read (RFC 9112 6.3).
fn last(mut reply: Box<Reply>, parts: &Parts) -> Box<Reply> {
    if parts.version == Version::HTTP_11 {
        let close = HeaderValue::from_static("close");
        reply.headers.insert(CONNECTION, close);
    }
    reply
}

fn check_framing(parts: &Parts) -> Result<(), Box<Reply>> {
    let mut codings = parts.headers.get_all(TRANSFER_ENCODING).iter();
    if ends_in_doubt(&parts.headers) {
        return Err(last(bad("both_length_and_transfer_encoding"), parts));
    }
    if let Some(coding) = codings.next() {
        let chunked = coding
            .as_bytes()
            .trim_ascii()
            .eq_ignore_ascii_case(b"chunked");
        if !chunked || codings.next().is_some() {
            let status = StatusCode::NOT_IMPLEMENTED;
            return Err(last(refuse(status, "unknown_transfer_encoding"), parts));
        }
    }
    let expect = parts.headers.get(EXPECT).map(HeaderValue::as_bytes);
    match expect {
        Some(it) if !it.eq_ignore_ascii_case(b"100-continue") => Err(refuse(
            StatusCode::EXPECTATION_FAILED,
            "unknown_expectation",
        )),
        _ => Ok(()),
    }
}

/// Whether programs differ on where a message ends (RFC 9112 6.3): it tells a length and comes in chunks.
pub(super) fn ends_in_doubt(headers: &HeaderMap) -> bool {
    headers.contains_key(TRANSFER_ENCODING) && headers.contains_key(CONTENT_LENGTH)
}

fn check_target(parts: &Parts) -> Result<(), Box<Reply>> {
    let path = parts.uri.path();
    if path.starts_with('/') || (path == "*" && parts.method == Method::OPTIONS) {
        return Ok(());
    }
    Err(bad("invalid_path"))
}

/// Which host the request is for: the absolute form's, else `:authority`, else the one `Host`. In HTTP/2 they must be
/// the same (RFC 9113 8.3.1), in HTTP/1.1 the absolute form counts (RFC 9112 3.2.2).
fn authority(parts: &mut Parts) -> Result<Authority, Box<Reply>> {
    let mut hosts = parts.headers.get_all(HOST).iter();
    let host = hosts.next().cloned();
    if hosts.next().is_some() {
        return Err(bad("several_hosts"));
    }
    let target = parts.uri.authority().cloned();
    let authority = match (target, host) {
        (Some(target), Some(host)) if parts.version == Version::HTTP_2 => {
            let same = host
                .as_bytes()
                .eq_ignore_ascii_case(target.as_str().as_bytes());
            same.then_some(target)
                .ok_or_else(|| bad("host_is_not_authority"))?
        }
        (None, None) => return Err(bad("missing_host")),
        (None, Some(host)) => {
            Authority::from_maybe_shared(bytes::Bytes::copy_from_slice(host.as_bytes()))
                .map_err(|_| bad("invalid_host"))?
        }
        (Some(target), _) => target,
    };
    if authority.as_str().contains('@') || authority.host().is_empty() {
        return Err(bad("invalid_host"));
    }
    parts.headers.remove(HOST);
    Ok(authority)
}

/// Which upgrade a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Upgrade {
    /// None.
    None,
    /// WebSocket (RFC 6455, RFC 8441).
    WebSocket,
}

/// Which upgrade is asked for. A request that asks for one we do not carry is an ordinary request (RFC 9110 7.8),
/// but for extended CONNECT, which has no such form.
///
/// # Errors
/// The answer to extended CONNECT of a protocol that we do not carry.
pub(super) fn upgrade(parts: &Parts) -> Result<Upgrade, Box<Reply>> {
    if let Some(protocol) = parts.extensions.get::<hyper::ext::Protocol>() {
        return match protocol.as_str() {
            it if it.eq_ignore_ascii_case("websocket") => Ok(Upgrade::WebSocket),
            _ => Err(refuse(StatusCode::NOT_IMPLEMENTED, "unknown_protocol")),
        };
    }
    let asks = tokens(&parts.headers, CONNECTION).any(|it| it.eq_ignore_ascii_case("upgrade"));
    let websocket = tokens(&parts.headers, UPGRADE).any(|it| it.eq_ignore_ascii_case("websocket"));
    match asks && websocket && parts.method == Method::GET {
        true => Ok(Upgrade::WebSocket),
        false => Ok(Upgrade::None),
    }
}

/// The elements of a list header that are text.
fn tokens(headers: &HeaderMap, name: HeaderName) -> impl Iterator<Item = &str> {
    headers
        .get_all(name)
        .iter()
        .filter_map(|it| it.to_str().ok())
        .flat_map(|it| it.split(','))
        .map(str::trim)
        .filter(|it| !it.is_empty())
}

/// Removes trailers that a receiver could take for framing, routing or authentication (RFC 9110 6.5.1).
pub(super) fn strip_forbidden_trailers(trailers: &mut HeaderMap) {
    let forbidden: Vec<HeaderName> = trailers
        .keys()
        .filter(|name| is_forbidden_trailer(name.as_str()))
        .cloned()
        .collect();
    for name in forbidden {
        trailers.remove(name);
    }
}

fn is_forbidden_trailer(name: &str) -> bool {
    const NAMES: [&str; 17] = [
        "transfer-encoding",
        "host",
        "connection",
        "keep-alive",
        "proxy-connection",
        "upgrade",
        "te",
        "trailer",
        "expect",
        "authorization",
        "proxy-authorization",
        "proxy-authenticate",
        "www-authenticate",
        "set-cookie",
        "cookie",
        "cache-control",
        "range",
    ];
    NAMES.contains(&name) || name.starts_with("content-")
}

/// The URI of a request in the form that a hop of `version` takes: origin form for HTTP/1.1, all parts for HTTP/2.
pub(super) fn target(authority: &Authority, path: PathAndQuery, version: Version) -> Uri {
    let mut parts = http::uri::Parts::default();
    parts.path_and_query = Some(path);
    if version == Version::HTTP_2 {
        parts.scheme = Some(Scheme::HTTP);
        parts.authority = Some(authority.clone());
    }
    // All parts are there, or only the path: both are valid forms.
    Uri::from_parts(parts).unwrap_or_default()
}
