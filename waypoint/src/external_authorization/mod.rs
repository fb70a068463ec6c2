//! External authorizers (Envoy's ext_authz, over gRPC or HTTP): one question per request, one answer.
//!
//! Whatever is not an answer, in time and understood, is a refusal, unless the authorizer's object says that requests
//! pass while it fails.

mod edits;
mod grpc;
mod http1;

use std::{net::SocketAddr, time::SystemTime};

use ::http::{HeaderMap, HeaderName, StatusCode, request::Parts};
use bytes::Bytes;
use mesh::{
    l7::config::{AuthorizerProtocol, ExternalAuthorizer},
    names::Str,
};

use edits::How;
pub(crate) use edits::{Edits, HeaderChange, change};

use crate::service_call::{self, CallError, Transport};

/// Longest answer of an authorizer, in bytes.
const MAX_ANSWER: usize = 256 * 1024;

/// What an authorizer is told of a request.
#[derive(Debug)]
pub(crate) struct Question<'a> {
    /// The request's head as it is now.
    pub(crate) parts: &'a Parts,
    /// Host and port as the client sent them.
    pub(crate) authority: &'a str,
    pub(crate) scheme: &'a str,
    /// The start of the body, where the authorizer gets it.
    pub(crate) body: Option<Body>,
    pub(crate) source: SocketAddr,
    /// SPIFFE ID.
    pub(crate) source_principal: &'a str,
    pub(crate) destination: SocketAddr,
    /// SPIFFE ID.
    pub(crate) destination_principal: &'a str,
    pub(crate) start: SystemTime,
}

/// A body, or its start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Body {
    pub(crate) bytes: Bytes,
    pub(crate) partial: bool,
}

/// What becomes of the request.
#[derive(Debug)]
pub(crate) enum Verdict {
    /// It goes on, changed so.
    Allow(Edits),
    /// It is answered so.
    Deny(Denial),
}

/// The answer to a request that is refused.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Denial {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
    /// `response_code_details`.
    pub(crate) details: &'static str,
}

/// Asks. `name`: of the authorizer, for the log.
pub(crate) async fn ask(
    transport: &dyn Transport,
    name: &str,
    authorizer: &ExternalAuthorizer,
    question: &Question<'_>,
) -> Verdict {
    match answer(transport, authorizer, question).await {
        Ok(verdict) => verdict,
        Err(error) if authorizer.fail_open => {
            tracing::debug!(authorizer = name, %error, "no answer of an authorizer; it fails open");
            Verdict::Allow(Edits::default())
        }
        Err(error) => {
            tracing::debug!(authorizer = name, %error, "no answer of an authorizer");
            Verdict::Deny(no_answer(authorizer))
        }
    }
}

async fn answer(
    transport: &dyn Transport,
    authorizer: &ExternalAuthorizer,
    question: &Question<'_>,
) -> Result<Verdict, CallError> {
    let call = match &authorizer.protocol {
        AuthorizerProtocol::Grpc { allowed_headers } => {
            grpc::call(authorizer, allowed_headers, question)
        }
        AuthorizerProtocol::Http { .. } => http1::call(authorizer, question),
    };
    let answer = service_call::within(transport, call, authorizer.timeout).await?;
    match &authorizer.protocol {
        AuthorizerProtocol::Grpc { .. } => grpc::verdict(&answer),
        AuthorizerProtocol::Http { .. } => http1::verdict(&authorizer.protocol, answer),
    }
}

/// The answer where no authorizer of a policy's name is known, or none answered.
fn no_answer(authorizer: &ExternalAuthorizer) -> Denial {
    let status = StatusCode::from_u16(authorizer.status_on_error);
    let status = status.ok().filter(|it| it.as_u16() >= 400);
    Denial {
        status: status.unwrap_or(StatusCode::FORBIDDEN),
        ..unknown()
    }
}

/// The answer where no authorizer of a policy's name is known.
pub(crate) fn unknown() -> Denial {
    Denial {
        status: StatusCode::FORBIDDEN,
        headers: HeaderMap::new(),
        body: Bytes::new(),
        details: "ext_authz_error",
    }
}

/// Whether a header is in a list of names; `x-*` is all that begin so. Without regard to case.
fn listed(list: &[Str], name: &HeaderName) -> bool {
    let name = name.as_str();
    list.iter().any(|entry| match entry.strip_suffix('*') {
        Some(prefix) => name
            .get(..prefix.len())
            .is_some_and(|start| start.eq_ignore_ascii_case(prefix)),
        None => entry.eq_ignore_ascii_case(name),
    })
}

/// What the authorizer is told about a body that it may have got in part.
const PARTIAL: HeaderName = HeaderName::from_static("x-envoy-auth-partial-body");

#[cfg(test)]
mod tests;
