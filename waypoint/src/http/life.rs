//! The life of a request: its phases, in their order (waypoint 1.7).
//!
//! admit → route → who is the client → (CUSTOM, JWT, AUDIT, DENY, ALLOW) → limits and faults → CORS → the route's
//! action. A phase answers by returning a [`Reply`]; nothing after it runs.

use std::{convert::Infallible, sync::Arc};

use http::{
    HeaderName, HeaderValue, Request, Response, StatusCode, Version, header::RETRY_AFTER,
    request::Parts, uri::Authority,
};
use hyper::body::Incoming;
use mesh::{
    draw::Draw,
    l7::{response_flags::Flag, served::AppProtocol},
};
use net::drain;

use super::{
    action,
    arriving::Arriving,
    body::Body,
    download::{Download, Ongoing},
    exchange::{Exchange, Head, Kind},
    filter, forward, hygiene,
    interim::Closing,
    reply::Reply,
    route,
    served::Served,
    telemetry,
};

/// A request between its phases.
pub(super) struct Underway {
    /// Its head, as the backend will get it.
    pub(super) parts: Parts,
    /// Its body.
    pub(super) body: Body,
    /// Its host, where a filter has changed it.
    pub(super) host: Option<Authority>,
    /// When what it turns into must end.
    pub(super) drain: drain::Watch,
    /// What it turns into.
    pub(super) upgrade: hygiene::Upgrade,
    /// Whether the client speaks gRPC-Web.
    pub(super) web: Option<filter::grpc_web::Encoding>,
}

/// Answers one request.
pub(super) async fn respond(
    served: Arc<Served>,
    request: Request<Incoming>,
) -> Result<Response<Download>, Infallible> {
    let connection = Arc::clone(&served.connection);
    let snapshot = connection.waypoint.snapshots.load();
    let exchange = Exchange::new(connection, snapshot, Draw(rand::random()));
    let mut ongoing = Ongoing::new(exchange, served.begin());
    let (parts, incoming) = request.into_parts();
    let version = parts.version;
    let body = Body::new(Arriving::new(incoming, version));
    ongoing.carries(body.clone());
    let _closing = (version == Version::HTTP_11).then(|| {
        ongoing.exchange().interim = Some(served.interim.open());
        Closing(served.interim.clone())
    });
    let mut response = match phases(&served, &mut ongoing, parts, body).await {
        Ok(answer) => forward::answer(answer, ongoing),
        Err(reply) => Download::reply(*reply, ongoing),
    };
    served.say_goodbye(version, &mut response);
    Ok(response)
}

async fn phases(
    served: &Served,
    ongoing: &mut Ongoing,
    mut parts: Parts,
    body: Body,
) -> Result<forward::Answer, Box<Reply>> {
    let authority = hygiene::admit(&mut parts);
    let head = Head::new(&parts, authority?);
    let upgrade = hygiene::upgrade(&parts)?;
    let exchange = ongoing.exchange();
    if head.kind == Kind::Grpc {
        body.count_messages();
    }
    exchange.head = Some(head);
    let mut underway = Underway {
        parts,
        body,
        upgrade,
        web: None,
        host: None,
        drain: served.drain.clone(),
    };
    if exchange.connection.waypoint.overload.is_full() {
        return Err(Box::new(overloaded()));
    }
    route::normalize(exchange, &mut underway.parts)?;
    filter::identity::apply(exchange, &mut underway.parts.headers);
    telemetry::start(exchange, &mut underway.parts);
    enforce(exchange, &mut underway).await?;
    translate_web(&mut underway, exchange);
    filter::cors::apply(exchange, &underway.parts)?;
    action::run(ongoing, underway).await
}

fn overloaded() -> Reply {
    let (name, value) = (
        HeaderName::from_static("x-envoy-overloaded"),
        HeaderValue::from_static("true"),
    );
    Reply::new(StatusCode::SERVICE_UNAVAILABLE, "overload")
        .flag(Flag::Overload)
        .header(name, value)
        .header(RETRY_AFTER, HeaderValue::from_static("1"))
        .body("overloaded")
}

/// gRPC-Web on a port that says so.
fn translate_web(underway: &mut Underway, exchange: &mut Exchange) {
    if exchange.connection.target.protocol() != AppProtocol::GrpcWeb {
        return;
    }
    let encoding = filter::grpc_web::encoding(&underway.parts.headers);
    if let Some(encoding) = encoding {
        filter::grpc_web::translate(&mut underway.parts, &underway.body, encoding);
        underway.web = Some(encoding);
    }
}

/// Who may, how often, and how it fails on purpose. A request that no rule matches is told so only if it may pass.
async fn enforce(exchange: &mut Exchange, underway: &mut Underway) -> Result<(), Box<Reply>> {
    let mut selected = route::select(exchange, &underway.parts);
    filter::external_authz::of_policies(exchange, underway).await?;
    filter::authenticate::apply(exchange, &mut underway.parts)?;
    filter::authorize::apply(exchange, &underway.parts)?;
    let facts = exchange.connection.facts(&exchange.snapshot, None);
    if exchange.claims.is_some() && exchange.snapshot.l7.routes_ask_claims(&facts) {
        selected = route::select(exchange, &underway.parts);
    }
    selected?;
    filter::external_authz::of_route(exchange, underway).await?;
    filter::rate_limit::apply(exchange)?;
    filter::fault::apply(exchange).await
}
