//! What the waypoint tells a backend of the request itself: `x-request-id`, `x-forwarded-proto`, `x-forwarded-port`,
//! `x-forwarded-host`, `x-forwarded-client-cert`.

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, uri::Authority};
use mesh::{draw::Draw, l7::config::WaypointConfig};

use super::super::exchange::{Exchange, Head};

pub(crate) const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
const FORWARDED_PORT: HeaderName = HeaderName::from_static("x-forwarded-port");
const FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");
const CLIENT_CERT: HeaderName = HeaderName::from_static("x-forwarded-client-cert");

/// Adds what is not there yet. The client's certificate is always ours to tell: what a client wrote is already gone.
pub(crate) fn apply(exchange: &mut Exchange, headers: &mut HeaderMap) {
    let config = exchange.snapshot.l7.config().cloned();
    let config = config.as_deref();
    if !config.is_some_and(|it| it.headers.request_id_disabled) && !headers.contains_key(REQUEST_ID)
    {
        headers.insert(REQUEST_ID, request_id(exchange.draw()));
    }
    if !headers.contains_key(FORWARDED_PROTO) {
        let scheme = exchange.head.as_ref().map_or("http", |it: &Head| it.scheme);
        headers.insert(FORWARDED_PROTO, HeaderValue::from_static(scheme));
    }
    if config.is_some_and(|it| it.headers.forwarded_port) && !headers.contains_key(FORWARDED_PORT) {
        let port = exchange.connection.target.port();
        headers.insert(FORWARDED_PORT, HeaderValue::from(port));
    }
    if let Some(value) = client_cert(exchange, config) {
        headers.insert(CLIENT_CERT, value);
    }
}

/// Tells the host that was asked for, where the route puts another one in its place, after what proxies before us told.
pub(crate) fn tell_host(exchange: &Exchange, headers: &mut HeaderMap, instead: &Authority) {
    let config = exchange.snapshot.l7.config();
    let asked = exchange.head.as_ref().map(|it| &it.authority);
    let Some(asked) = asked.filter(|it| *it != instead) else {
        return;
    };
    if config.is_some_and(|it| it.headers.forwarded_host)
        && let Ok(value) = HeaderValue::from_str(asked.as_str())
    {
        headers.append(FORWARDED_HOST, value);
    }
}

fn client_cert(exchange: &Exchange, config: Option<&WaypointConfig>) -> Option<HeaderValue> {
    if !config.is_some_and(|it| it.forward_client_identity) {
        return None;
    }
    let connection = &exchange.connection;
    let (own, client) = (&connection.waypoint.identity, &connection.peer.identity);
    let text = format!("By={own};URI={client}");
    HeaderValue::try_from(text).ok()
}

/// A random UUID (RFC 9562 5.4).
fn request_id(draw: Draw) -> HeaderValue {
    const HEX: &[u8; 16] = b"0123456789abcdef";
    let (high, low) = draw.split();
    let high = high.0 & !0xf000 | 0x4000;
    let low = low.0 & !(0b11 << 62) | (0b10 << 62);
    let bytes = [high.to_be_bytes(), low.to_be_bytes()].concat();
    let mut text = Vec::with_capacity(36);
    for (at, byte) in bytes.into_iter().enumerate() {
        if matches!(at, 4 | 6 | 8 | 10) {
            text.push(b'-');
        }
        text.push(HEX[usize::from(byte >> 4)]);
        text.push(HEX[usize::from(byte & 0xf)]);
    }
    HeaderValue::from_maybe_shared(Bytes::from(text)).expect("hexadecimal digits and hyphens")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_id_is_a_version_4_uuid() {
        for seed in 0..100 {
            let id = request_id(Draw(seed));
            let text = id.to_str().unwrap();
            let lengths: Vec<_> = text.split('-').map(str::len).collect();
            assert_eq!(lengths, [8, 4, 4, 4, 12], "{text}");
            assert_eq!(&text[14..15], "4", "{text}");
            assert!(matches!(&text[19..20], "8" | "9" | "a" | "b"), "{text}");
        }
        assert_ne!(request_id(Draw(1)), request_id(Draw(2)));
    }
}
