//! The route's action: what becomes of a request that passed all filters.

use http::{
    HeaderMap, HeaderName, HeaderValue, StatusCode,
    header::{EXPECT, LOCATION, TRAILER},
    uri::{Authority, PathAndQuery},
};
use mesh::l7::{
    choose,
    condition::Matched,
    dispatch::Target,
    edit,
    response_flags::Flag,
    route::{Action, Backend, Redirect, Rewrite, WeightedBackend},
    table::Selected,
};

use super::{
    download::Ongoing,
    exchange::Exchange,
    filter::{identity, mirror, session},
    forward::{self, Answer, Outgoing},
    hygiene::Upgrade,
    life::Underway,
    plan::Plan,
    reply::Reply,
    route, upgrade,
    upstream::ClusterKey,
};
use crate::connection::Connection;

const ORIGINAL_PATH: HeaderName = HeaderName::from_static("x-envoy-original-path");

/// Carries the action out.
///
/// # Errors
/// The answer that no backend gave.
pub(super) async fn run(
    ongoing: &mut Ongoing,
    mut underway: Underway,
) -> Result<Answer, Box<Reply>> {
    let selected = ongoing.exchange().route.clone();
    let Some(selected) = selected else {
        let key = default_cluster(&ongoing.exchange().connection);
        return forward(ongoing, underway, &key, None).await;
    };
    let backend = match &selected.rule().action {
        Action::Redirect(redirect) => {
            return Err(redirected(
                ongoing.exchange(),
                &underway,
                redirect,
                selected.matched,
            ));
        }
        Action::Respond(response) => {
            let reply = Reply::new(response.status, "direct_response");
            return Err(Box::new(reply.body(response.body.clone())));
        }
        Action::Invalid(why) => return Err(invalid(why)),
        Action::Forward(backends) => {
            let exchange = ongoing.exchange();
            let draw = exchange.draw();
            let kept = session::backend(exchange, &underway.parts.headers, backends);
            kept.or_else(|| choose::backend(backends, draw))
                .ok_or_else(|| invalid("no backend has a weight"))?
        }
    };
    let exchange = ongoing.exchange();
    exchange.backend_edit = Some(backend.response_headers.clone());
    if let Some(redirect) = &backend.redirect {
        return Err(redirected(exchange, &underway, redirect, selected.matched));
    }
    edit_request(exchange, &mut underway, &selected, backend)?;
    let key = cluster(&exchange.connection, &backend.backend)?;
    forward(ongoing, underway, &key, Some((&selected, backend))).await
}

async fn forward(
    ongoing: &mut Ongoing,
    mut underway: Underway,
    key: &ClusterKey,
    chosen: Option<(&Selected, &WeightedBackend)>,
) -> Result<Answer, Box<Reply>> {
    let exchange = ongoing.exchange();
    let plan = Plan::new(exchange, &underway, key);
    let authority = exchange.head.as_ref().map(|it| it.authority.clone());
    if let Some(instead) = &underway.host {
        identity::tell_host(exchange, &mut underway.parts.headers, instead);
    }
    let outgoing = outgoing(&mut underway, authority);
    if let Some((selected, backend)) = chosen {
        mirror::start(exchange, selected, backend, &outgoing);
    }
    ongoing.ends_by(plan.deadline);
    if underway.upgrade != Upgrade::None {
        let drain = underway.drain.clone();
        return upgrade::forward(ongoing, underway, &plan, &outgoing, drain).await;
    }
    let reached = forward::forward(ongoing, &plan, &outgoing)
        .await
        .map_err(|failed| Box::new(failed.reply()))?;
    outgoing.body.release();
    if let Some(session) = &plan.session {
        session.keep(ongoing.exchange(), &plan.members, reached.permit.endpoint());
    }
    let mut response = reached.response;
    strip(response.headers_mut());
    ongoing.holds(reached.held, reached.permit);
    Ok(Answer::Stream {
        response,
        web: underway.web,
    })
}

/// The request as each try sends it.
fn outgoing(underway: &mut Underway, authority: Option<Authority>) -> Outgoing {
    let parts = &mut underway.parts;
    let mut headers = std::mem::take(&mut parts.headers);
    strip(&mut headers);
    let path = parts.uri.path_and_query().cloned();
    Outgoing {
        method: parts.method.clone(),
        authority: underway
            .host
            .clone()
            .or(authority)
            .unwrap_or_else(|| Authority::from_static("unknown")),
        path: path.unwrap_or_else(|| PathAndQuery::from_static("/")),
        headers,
        body: underway.body.clone(),
    }
}

/// Takes away what belongs to one hop. `Trailer` goes on: trailers do.
fn strip(headers: &mut HeaderMap) {
    let trailer = headers.get(TRAILER).cloned();
    edit::strip_hop_by_hop(headers);
    headers.remove(EXPECT);
    if let Some(trailer) = trailer {
        headers.insert(TRAILER, trailer);
    }
}

/// Where a request goes that no route concerns: to the service's or workload's own endpoints.
fn default_cluster(connection: &Connection) -> ClusterKey {
    match &connection.target {
        Target::Service { service, port, .. } => ClusterKey::Service {
            service: service.key(),
            port: *port,
            subset: connection.subset.clone(),
        },
        Target::Workload { workload, .. } => ClusterKey::Workload {
            uid: workload.uid.clone(),
            port: connection.target.port(),
        },
    }
}

/// The endpoints that a backend stands for.
pub(super) fn cluster(
    connection: &Connection,
    backend: &Backend,
) -> Result<ClusterKey, Box<Reply>> {
    match backend {
        Backend::Service {
            service,
            port,
            subset,
        } => Ok(ClusterKey::Service {
            service: service.clone(),
            port: *port,
            subset: connection.subset_of(service, subset.as_ref()),
        }),
        Backend::Invalid(why) => Err(invalid(why)),
    }
}

/// Gateway API HTTPRoute: what leads nowhere is answered 500.
fn invalid(why: &str) -> Box<Reply> {
    tracing::debug!(why, "a request's route leads nowhere");
    let reply = Reply::new(StatusCode::INTERNAL_SERVER_ERROR, "route_leads_nowhere");
    Box::new(reply.flag(Flag::NoCluster))
}

fn redirected(
    exchange: &Exchange,
    underway: &Underway,
    redirect: &Redirect,
    matched: Matched,
) -> Box<Reply> {
    let facts = route::facts(exchange, &underway.parts);
    match edit::redirect(redirect, matched, &facts) {
        Some((status, location)) => {
            let reply = Reply::new(status, "direct_response");
            Box::new(reply.header(LOCATION, location))
        }
        None => invalid("the redirect has no location"),
    }
}

/// The rule's edits, then the backend's; then host and path.
fn edit_request(
    exchange: &mut Exchange,
    underway: &mut Underway,
    selected: &Selected,
    backend: &WeightedBackend,
) -> Result<(), Box<Reply>> {
    let rule = selected.rule();
    let headers = &mut underway.parts.headers;
    let rule_host = rule.request_headers.apply_request(headers);
    let backend_host = backend.request_headers.apply_request(headers);
    headers.remove(http::header::HOST);
    if let Some(host) = backend_host.or(rule_host) {
        let host = Authority::try_from(host.as_bytes());
        underway.host = Some(host.map_err(|_| invalid("the host is not one"))?);
    }
    match backend.rewrite.as_ref().or(rule.rewrite.as_ref()) {
        Some(rewrite) => rewrite_request(exchange, underway, rewrite, selected.matched),
        None => Ok(()),
    }
}

fn rewrite_request(
    exchange: &Exchange,
    underway: &mut Underway,
    rewrite: &Rewrite,
    matched: Matched,
) -> Result<(), Box<Reply>> {
    if let Some(host) = &rewrite.authority {
        let host = Authority::try_from(&**host);
        underway.host = Some(host.map_err(|_| invalid("the host is not one"))?);
    }
    let Some(path) = &rewrite.path else {
        return Ok(());
    };
    let rewritten = edit::rewrite_path(path, matched, underway.parts.uri.path()).into_owned();
    route::set_path(&mut underway.parts, &rewritten)
        .map_err(|_| invalid("the rewritten path is not one"))?;
    if let Some(head) = &exchange.head
        && let Ok(original) = HeaderValue::from_str(&head.original)
    {
        underway.parts.headers.insert(ORIGINAL_PATH, original);
    }
    Ok(())
}
