//! `envoy.service.auth.v3.Authorization/Check`.

use std::{collections::BTreeMap, net::SocketAddr, time::SystemTime};

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use mesh::{
    l7::{config::ExternalAuthorizer, record::joined},
    names::Str,
};
use proto::{
    envoy::service::auth::v3::{
        AttributeContext, CheckRequest, CheckResponse, DeniedHttpResponse, OkHttpResponse,
        attribute_context::{HttpRequest, Peer, Request},
        check_response::HttpResponse,
    },
    xds_core::{
        Address, HeaderValueOption, SocketAddress, address,
        header_value_option::HeaderAppendAction, socket_address::PortSpecifier,
    },
};

use super::{
    Denial, Edits, HeaderChange, How, MAX_ANSWER, PARTIAL, Question, Verdict, edits::may_change,
    listed,
};
use crate::service_call::{Answer, Call, CallError, grpc_message, grpc_request};

const CHECK: &str = "/envoy.service.auth.v3.Authorization/Check";

pub(super) fn call(
    authorizer: &ExternalAuthorizer,
    allowed: &[Str],
    question: &Question<'_>,
) -> Call {
    let message = request(authorizer, allowed, question);
    let (service, port) = (&authorizer.service, authorizer.port);
    Call {
        service: service.clone(),
        port,
        http2: true,
        request: grpc_request(service, port, CHECK, &message),
        max_answer: MAX_ANSWER,
    }
}

fn request(
    authorizer: &ExternalAuthorizer,
    allowed: &[Str],
    question: &Question<'_>,
) -> CheckRequest {
    let since = question.start.duration_since(SystemTime::UNIX_EPOCH);
    let since = since.unwrap_or_default();
    CheckRequest {
        attributes: Some(AttributeContext {
            source: Some(peer(question.source, question.source_principal)),
            destination: Some(peer(question.destination, question.destination_principal)),
            request: Some(Request {
                time: Some(prost_types::Timestamp {
                    seconds: i64::try_from(since.as_secs()).unwrap_or(i64::MAX),
                    nanos: i32::try_from(since.subsec_nanos()).unwrap_or_default(),
                }),
                http: Some(http_request(authorizer, allowed, question)),
            }),
            ..AttributeContext::default()
        }),
    }
}

fn peer(address: SocketAddr, principal: &str) -> Peer {
    let socket = SocketAddress {
        address: address.ip().to_canonical().to_string(),
        port_specifier: Some(PortSpecifier::PortValue(address.port().into())),
        ..SocketAddress::default()
    };
    Peer {
        address: Some(Address {
            address: Some(address::Address::SocketAddress(socket)),
        }),
        principal: principal.to_owned(),
        ..Peer::default()
    }
}

fn http_request(
    authorizer: &ExternalAuthorizer,
    allowed: &[Str],
    question: &Question<'_>,
) -> HttpRequest {
    let parts = question.parts;
    let path = parts.uri.path_and_query().map_or("/", |it| it.as_str());
    let protocol = match parts.version {
        http::Version::HTTP_2 => "HTTP/2",
        _ => "HTTP/1.1",
    };
    let id = parts.headers.get("x-request-id");
    let size = parts.headers.get(header::CONTENT_LENGTH);
    let size = size.and_then(|it| it.to_str().ok()?.parse().ok());
    let mut message = HttpRequest {
        id: id.map(text).unwrap_or_default(),
        method: parts.method.to_string(),
        headers: headers(allowed, question, path),
        path: path.to_owned(),
        host: question.authority.to_owned(),
        scheme: question.scheme.to_owned(),
        size: size.unwrap_or(-1),
        protocol: protocol.to_owned(),
        ..HttpRequest::default()
    };
    if let Some(body) = &question.body {
        match authorizer.body.is_some_and(|it| it.as_bytes) {
            true => message.raw_body = body.bytes.to_vec(),
            false => message.body = String::from_utf8_lossy(&body.bytes).into_owned(),
        }
    }
    message
}

fn text(value: &HeaderValue) -> String {
    String::from_utf8_lossy(value.as_bytes()).into_owned()
}

/// Several values of a name are joined, as the map has room for one.
fn headers(allowed: &[Str], question: &Question<'_>, path: &str) -> BTreeMap<String, String> {
    let parts = question.parts;
    let names = parts.headers.keys();
    let names = names.filter(|name| allowed.is_empty() || listed(allowed, name));
    let mut all: BTreeMap<String, String> = names
        .filter_map(|name| Some((name.to_string(), joined(&parts.headers, name)?.into_owned())))
        .collect();
    let mut add = |name: &str, value: &str| drop(all.insert(name.to_owned(), value.to_owned()));
    add(":authority", question.authority);
    add(":method", parts.method.as_str());
    add(":path", path);
    add(":scheme", question.scheme);
    if let Some(body) = &question.body {
        add(
            PARTIAL.as_str(),
            if body.partial { "true" } else { "false" },
        );
    }
    all
}

pub(super) fn verdict(answer: &Answer) -> Result<Verdict, CallError> {
    let response: CheckResponse = grpc_message(answer)?;
    let allowed = response.status.is_none_or(|status| status.code == 0);
    Ok(match (allowed, response.http_response) {
        (true, Some(HttpResponse::OkResponse(ok))) => Verdict::Allow(edits(ok)),
        (true, None) => Verdict::Allow(Edits::default()),
        (false, Some(HttpResponse::DeniedResponse(denied))) => Verdict::Deny(denial(denied)),
        // It says one thing by its status and another by its response, or refuses without more: refused.
        (true, Some(HttpResponse::DeniedResponse(denied))) => Verdict::Deny(denial(denied)),
        (false, _) => Verdict::Deny(denial(DeniedHttpResponse::default())),
    })
}

fn edits(ok: OkHttpResponse) -> Edits {
    let remove = ok.headers_to_remove.iter();
    let remove = remove.filter_map(|name| name.parse::<HeaderName>().ok());
    Edits {
        request: changes(ok.headers),
        remove: remove.filter(may_change).collect(),
        response: changes(ok.response_headers_to_add),
        set_query: ok
            .query_parameters_to_set
            .into_iter()
            .map(|it| (it.key, it.value))
            .collect(),
        remove_query: ok.query_parameters_to_remove,
    }
}

fn changes(options: Vec<HeaderValueOption>) -> Vec<HeaderChange> {
    options.iter().filter_map(header_change).collect()
}

/// None: nobody may change it, or it is none.
fn header_change(option: &HeaderValueOption) -> Option<HeaderChange> {
    let told = option.header.as_ref()?;
    let name: HeaderName = told.key.parse().ok().filter(may_change)?;
    let value = match told.raw_value.is_empty() {
        true => told.value.as_bytes(),
        false => &told.raw_value,
    };
    let how = match (option.append, option.append_action()) {
        (Some(true), _) => How::Append,
        (Some(false), _) => How::Set,
        (None, HeaderAppendAction::AddIfAbsent) => How::AddIfAbsent,
        (None, HeaderAppendAction::OverwriteIfExists) => How::SetIfPresent,
        // The default action means appending elsewhere; here `append` is what counts, and it is not set.
        (None, _) => How::Set,
    };
    Some(HeaderChange {
        name,
        value: HeaderValue::from_bytes(value).ok()?,
        how,
    })
}

fn denial(denied: DeniedHttpResponse) -> Denial {
    let status = denied.status.and_then(|it| u16::try_from(it.code).ok());
    let status = status.and_then(|it| StatusCode::from_u16(it).ok());
    let status = status.filter(|it| it.as_u16() >= 200);
    let mut headers = HeaderMap::new();
    super::edits::change(&mut headers, &changes(denied.headers));
    Denial {
        status: status.unwrap_or(StatusCode::FORBIDDEN),
        headers,
        body: Bytes::from(denied.body),
        details: "ext_authz_denied",
    }
}
