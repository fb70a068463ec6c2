//! Connections that stop being HTTP: WebSocket in HTTP/1.1 (RFC 6455) and HTTP/2 (RFC 8441), in every pair of versions.

use aws_lc_rs::digest;
use base64::{Engine as _, prelude::BASE64_STANDARD};
use http::{
    HeaderMap, HeaderValue, Method, Request, Response, StatusCode, Version,
    header::{
        CONNECTION, CONTENT_LENGTH, SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_KEY, TRANSFER_ENCODING,
        UPGRADE,
    },
};
use hyper::{ext::Protocol, upgrade::OnUpgrade};
use hyper_util::rt::TokioIo;
use mesh::l7::{edit, response_flags::Flag};
use net::drain;

use super::{
    arriving::Arriving,
    body::Upload,
    download::Ongoing,
    failure::{Cause, Failed},
    forward::{self, Answer, Outgoing, Reached},
    life::Underway,
    plan::Plan,
    reply::Reply,
};

/// What a server's answer to a key is made with (RFC 6455 4.2.2).
const GUID: &str = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11";

/// Asks an endpoint to switch. If it does, the bytes are carried until both ends are done; else its response goes to
/// the client.
///
/// # Errors
/// If no endpoint answered.
pub(super) async fn forward(
    ongoing: &mut Ongoing,
    mut underway: Underway,
    plan: &Plan,
    outgoing: &Outgoing,
    drain: drain::Watch,
) -> Result<Answer, Box<Reply>> {
    let key = outgoing.headers.get(SEC_WEBSOCKET_KEY).cloned();
    let request = |plan: &Plan, outgoing: &Outgoing| ask(plan, outgoing);
    let reached = forward::forward_with(ongoing, plan, outgoing, &request).await;
    let reached = reached.map_err(|failed| Box::new(failed.reply()))?;
    let Reached {
        mut response,
        held,
        permit,
    } = reached;
    ongoing.holds(held, permit);
    if !has_switched(&response) {
        edit::strip_hop_by_hop(response.headers_mut());
        return Ok(Answer::Stream {
            response,
            web: None,
        });
    }
    let endpoint = hyper::upgrade::on(&mut response);
    let Some(client) = underway.parts.extensions.remove::<OnUpgrade>() else {
        let failed = Failed::new(Cause::Client);
        return Err(Box::new(failed.reply()));
    };
    // The response of a tunnel has no end that a route's time could be for.
    ongoing.ends_by(None);
    let head = switched(response, underway.parts.version, key.as_ref());
    let (mut parts, ()) = head.into_parts();
    ongoing.answered(&mut parts);
    tokio::spawn(carry(ongoing.take(), client, endpoint, drain));
    Ok(Answer::Switched(Response::from_parts(parts, ())))
}

/// The request of a switch as an endpoint of the plan's version takes it.
fn ask(plan: &Plan, outgoing: &Outgoing) -> Request<Upload> {
    let mut request = forward::build(outgoing, &outgoing.authority, plan.version, Upload::Empty);
    request.headers_mut().remove(CONTENT_LENGTH);
    request.headers_mut().remove(TRANSFER_ENCODING);
    if plan.version == Version::HTTP_2 {
        *request.method_mut() = Method::CONNECT;
        request.headers_mut().remove(SEC_WEBSOCKET_KEY);
        request
            .extensions_mut()
            .insert(Protocol::from_static("websocket"));
        return request;
    }
    *request.method_mut() = Method::GET;
    let headers = request.headers_mut();
    headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
    headers.insert(UPGRADE, HeaderValue::from_static("websocket"));
    if !headers.contains_key(SEC_WEBSOCKET_KEY) {
        let key = BASE64_STANDARD.encode(rand::random::<[u8; 16]>());
        headers.extend(HeaderValue::try_from(key).map(|key| (SEC_WEBSOCKET_KEY, key)));
    }
    request
}

fn has_switched(response: &Response<Arriving>) -> bool {
    match response.version() {
        Version::HTTP_2 => response.status().is_success(),
        _ => response.status() == StatusCode::SWITCHING_PROTOCOLS,
    }
}

/// The head that tells a client of `version` that the switch is made.
fn switched(
    response: Response<Arriving>,
    version: Version,
    key: Option<&HeaderValue>,
) -> Response<()> {
    let (mut parts, _) = response.into_parts();
    parts.extensions.clear();
    parts.version = version;
    let headers: &mut HeaderMap = &mut parts.headers;
    edit::strip_hop_by_hop(headers);
    if version == Version::HTTP_2 {
        parts.status = StatusCode::OK;
        headers.remove(SEC_WEBSOCKET_ACCEPT);
        return Response::from_parts(parts, ());
    }
    parts.status = StatusCode::SWITCHING_PROTOCOLS;
    headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
    headers.insert(UPGRADE, HeaderValue::from_static("websocket"));
    if let (Some(key), false) = (key, headers.contains_key(SEC_WEBSOCKET_ACCEPT)) {
        headers.insert(SEC_WEBSOCKET_ACCEPT, accept(key));
    }
    Response::from_parts(parts, ())
}

/// A server's answer to a client's key.
fn accept(key: &HeaderValue) -> HeaderValue {
    let mut context = digest::Context::new(&digest::SHA1_FOR_LEGACY_USE_ONLY);
    context.update(key.as_bytes().trim_ascii());
    context.update(GUID.as_bytes());
    let text = BASE64_STANDARD.encode(context.finish());
    HeaderValue::try_from(text).expect("base64 is a header's value")
}

/// Carries bytes both ways, each to its end.
async fn carry(mut ongoing: Ongoing, client: OnUpgrade, endpoint: OnUpgrade, drain: drain::Watch) {
    let carrying = async {
        let (client, endpoint) = tokio::try_join!(client, endpoint).map_err(|_| ())?;
        let (mut client, mut endpoint) = (TokioIo::new(client), TokioIo::new(endpoint));
        tokio::io::copy_bidirectional(&mut client, &mut endpoint)
            .await
            .map_err(|_| ())
    };
    match drain.until_forced(carrying).await {
        Some(Ok((received, sent))) => ongoing.tunnelled(received, sent),
        Some(Err(())) => ongoing.exchange().flag(Flag::UpstreamConnectionTermination),
        None => ongoing.exchange().flag(Flag::LocalReset),
    }
    ongoing.finish(false);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_answered_as_the_rfc_says() {
        let key = HeaderValue::from_static("dGhlIHNhbXBsZSBub25jZQ==");
        assert_eq!(accept(&key), "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
    }
}
