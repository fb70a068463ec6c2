//! External authorizers: of CUSTOM policies, and of routes.

use std::sync::Arc;

use http::StatusCode;
use mesh::{
    l7::{
        authorize,
        config::{AuthorizerBody, ExternalAuthorizer},
        response_flags::Flag,
    },
    names::Str,
};

use super::super::{
    body::{Body, TooLarge},
    exchange::Exchange,
    life::Underway,
    reply::Reply,
    route,
};
use crate::{
    external_authorization::{self as external, Denial, Question, Verdict},
    http::transport::MeshTransport,
};

/// Asks the authorizers of CUSTOM policies whose rules match; all must approve.
///
/// # Errors
/// The answer to a request that may not pass.
pub(crate) async fn of_policies(
    exchange: &mut Exchange,
    underway: &mut Underway,
) -> Result<(), Box<Reply>> {
    let own = &exchange.connection.waypoint.identity.trust_domain;
    let facts = route::facts(exchange, &underway.parts);
    let questions = authorize::custom(&exchange.snapshot.l7, &facts, own);
    for question in questions {
        ask(exchange, underway, &question.provider).await?;
    }
    Ok(())
}

/// Asks the authorizer of the request's rule, where it has one.
///
/// # Errors
/// The answer to a request that may not pass.
pub(crate) async fn of_route(
    exchange: &mut Exchange,
    underway: &mut Underway,
) -> Result<(), Box<Reply>> {
    let rule = exchange.rule();
    match rule.and_then(|it| it.external_authorizer.clone()) {
        Some(name) => ask(exchange, underway, &name).await,
        None => Ok(()),
    }
}

async fn ask(
    exchange: &mut Exchange,
    underway: &mut Underway,
    name: &Str,
) -> Result<(), Box<Reply>> {
    let snapshot = Arc::clone(&exchange.snapshot);
    let config = snapshot.l7.config();
    let Some(authorizer) = config.and_then(|it| it.authorizers.get(name)) else {
        return Err(refused(external::unknown()));
    };
    let body = match authorizer.body {
        Some(wanted) => Some(read(&underway.body, wanted, authorizer).await?),
        None => None,
    };
    match verdict(exchange, underway, name, authorizer, body).await {
        Verdict::Deny(denial) => Err(refused(denial)),
        Verdict::Allow(edits) => {
            let parts = &mut underway.parts;
            edits.apply(&mut parts.uri, &mut parts.headers);
            exchange.response_changes.extend(edits.response);
            Ok(())
        }
    }
}

async fn verdict(
    exchange: &Exchange,
    underway: &Underway,
    name: &str,
    authorizer: &ExternalAuthorizer,
    body: Option<external::Body>,
) -> Verdict {
    let connection = &exchange.connection;
    let waypoint = &connection.waypoint;
    let head = exchange.head.as_ref();
    let question = Question {
        parts: &underway.parts,
        authority: head.map_or("", |it| it.authority.as_str()),
        scheme: head.map_or("http", |it| it.scheme),
        body,
        source: connection.client,
        source_principal: &connection.peer.identity.to_string(),
        destination: connection.destination,
        destination_principal: &waypoint.identity.to_string(),
        start: exchange.wall,
    };
    let transport = MeshTransport::new(waypoint);
    external::ask(&transport, name, authorizer, &question).await
}

fn refused(denial: Denial) -> Box<Reply> {
    let mut reply = Reply::new(denial.status, denial.details)
        .flag(Flag::UnauthorizedExternal)
        .body(denial.body);
    reply.headers = denial.headers;
    Box::new(reply)
}

/// The part of the body that the authorizer gets. One that does not come in the authorizer's time is refused.
async fn read(
    body: &Body,
    wanted: AuthorizerBody,
    authorizer: &ExternalAuthorizer,
) -> Result<external::Body, Box<Reply>> {
    let limit = usize::try_from(wanted.max_bytes).unwrap_or(usize::MAX);
    let reading = async {
        match wanted.allow_partial {
            true => body.peek_up_to(limit).await,
            false => body.collect_up_to(limit).await.map(|all| (all, true)),
        }
    };
    let failed = |status, details| Box::new(Reply::new(status, details));
    match tokio::time::timeout(authorizer.timeout, reading).await {
        Ok(Ok((bytes, whole))) => Ok(external::Body {
            bytes,
            partial: !whole,
        }),
        Ok(Err(error)) if error.is::<TooLarge>() => Err(failed(
            StatusCode::PAYLOAD_TOO_LARGE,
            "request_payload_too_large",
        )),
        Ok(Err(_)) => Err(failed(StatusCode::BAD_REQUEST, "request_body_broke_off")),
        Err(_) => Err(failed(StatusCode::REQUEST_TIMEOUT, "request_body_timeout")),
    }
}
