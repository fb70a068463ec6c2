//! An authorizer of plain HTTP: it gets a request like the client's, and its answer is the verdict.

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Request, StatusCode, header};
use mesh::{
    l7::config::{AuthorizerProtocol, ExternalAuthorizer},
    names::Str,
};

use super::{
    Denial, Edits, HeaderChange, How, MAX_ANSWER, PARTIAL, Question, Verdict, edits::may_change,
    listed,
};
use crate::service_call::{Answer, Call, CallError};

pub(super) fn call(authorizer: &ExternalAuthorizer, question: &Question<'_>) -> Call {
    Call {
        service: authorizer.service.clone(),
        port: authorizer.port,
        http2: false,
        request: request(&authorizer.protocol, question),
        max_answer: MAX_ANSWER,
    }
}

fn request(protocol: &AuthorizerProtocol, question: &Question<'_>) -> Request<Bytes> {
    let AuthorizerProtocol::Http {
        path_prefix,
        allowed_headers,
        add_headers,
        ..
    } = protocol
    else {
        return Request::default();
    };
    let parts = question.parts;
    let body = question.body.as_ref();
    let mut request = Request::new(body.map(|it| it.bytes.clone()).unwrap_or_default());
    *request.method_mut() = parts.method.clone();
    let path = parts.uri.path_and_query().map_or("/", |it| it.as_str());
    let uri = format!("http://{}{path_prefix}{path}", question.authority);
    *request.uri_mut() = uri.parse().unwrap_or_default();
    let headers = request.headers_mut();
    for (name, value) in &parts.headers {
        let told = *name == header::AUTHORIZATION || listed(allowed_headers, name);
        if told && may_change(name) {
            headers.append(name, value.clone());
        }
    }
    for (name, value) in add_headers {
        if let Ok(value) = HeaderValue::from_str(value) {
            headers.insert(name, value);
        }
    }
    if let Some(body) = body {
        let partial = if body.partial { "true" } else { "false" };
        headers.insert(PARTIAL, HeaderValue::from_static(partial));
    }
    request
}

/// 200 is an approval; a failure of the authorizer is none of the client's.
pub(super) fn verdict(protocol: &AuthorizerProtocol, answer: Answer) -> Result<Verdict, CallError> {
    let AuthorizerProtocol::Http {
        to_upstream,
        to_client_on_deny,
        to_client_on_allow,
        ..
    } = protocol
    else {
        return Err(CallError::Protocol("not asked over HTTP"));
    };
    let (status, headers) = (answer.head.status, answer.head.headers);
    if status == StatusCode::OK {
        return Ok(Verdict::Allow(Edits {
            request: changes(&headers, to_upstream, How::Set),
            response: changes(&headers, to_client_on_allow, How::Append),
            ..Edits::default()
        }));
    }
    if status.is_server_error() {
        return Err(CallError::Status(status.as_u16().into(), String::new()));
    }
    Ok(Verdict::Deny(Denial {
        status,
        headers: of_refusal(&headers, to_client_on_deny),
        body: answer.body,
        details: "ext_authz_denied",
    }))
}

/// Several values of a name: the first replaces what was there, the others join it.
fn changes(headers: &HeaderMap, list: &[Str], first: How) -> Vec<HeaderChange> {
    let names = headers.keys().filter(|name| listed(list, name));
    let names = names.filter(|name| may_change(name));
    let values = names.flat_map(|name| {
        let values = headers.get_all(name).iter().enumerate();
        values.map(move |(at, value)| HeaderChange {
            name: name.clone(),
            value: value.clone(),
            how: if at == 0 { first } else { How::Append },
        })
    });
    values.collect()
}

/// What a client must see of a refusal to make sense of it, and what is listed; no list: all.
fn of_refusal(headers: &HeaderMap, list: &[Str]) -> HeaderMap {
    const ALWAYS: [HeaderName; 3] = [
        header::LOCATION,
        header::WWW_AUTHENTICATE,
        header::CONTENT_TYPE,
    ];
    let told = |name: &HeaderName| list.is_empty() || ALWAYS.contains(name) || listed(list, name);
    let pairs = headers
        .iter()
        .filter(|(name, _)| told(name) && may_change(name));
    pairs
        .map(|(name, value)| (name.clone(), value.clone()))
        .collect()
}
