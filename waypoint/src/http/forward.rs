//! Sending a request to an endpoint, and again to another where that is safe.

use std::{future::Future, sync::Arc};

use http::{
    HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode, Version,
    header::{CONTENT_LENGTH, HOST, TRANSFER_ENCODING, UPGRADE},
    uri::{Authority, PathAndQuery},
};
use hyper::ext::on_informational;
use tokio::time::{Instant, timeout_at};

use super::{
    arriving::Arriving,
    body::{Body, Upload},
    download::{Download, Ongoing, STREAM_IDLE},
    exchange,
    failure::{Cause, Failed},
    filter::grpc_web,
    hygiene,
    plan::Plan,
    retry,
    upstream::{
        Permit,
        ask::open,
        endpoint::EndpointState,
        members::{Carries, Wanted},
        pool::Held,
    },
};

const ATTEMPT_COUNT: HeaderName = HeaderName::from_static("x-envoy-attempt-count");

/// A response of a backend, on its way.
pub(super) enum Answer {
    /// As it arrives.
    Stream {
        /// The response.
        response: Response<Arriving>,
        /// How the client of gRPC-Web wants it.
        web: Option<grpc_web::Encoding>,
    },
    /// The connection stops being HTTP; what comes of the request is told elsewhere.
    Switched(Response<()>),
}

/// What the client is told, with the body as it arrives.
pub(super) fn answer(answer: Answer, mut ongoing: Ongoing) -> Response<Download> {
    let (response, web) = match answer {
        Answer::Stream { response, web } => (response, web),
        Answer::Switched(response) => return response.map(|()| Download::none()),
    };
    let (mut parts, incoming) = response.into_parts();
    parts.extensions.clear();
    if let Some(encoding) = web {
        grpc_web::translate_response(&mut parts.headers, encoding);
    }
    ongoing.answered(&mut parts);
    let body = match web {
        Some(encoding) => Download::web(grpc_web::Encoder::new(incoming, encoding), ongoing),
        None => Download::stream(incoming, ongoing),
    };
    Response::from_parts(parts, body)
}

/// A request in the form in which each try sends it.
pub(super) struct Outgoing {
    pub(super) method: Method,
    pub(super) authority: Authority,
    pub(super) path: PathAndQuery,
    pub(super) headers: HeaderMap,
    pub(super) body: Body,
}

/// A response, and what is held while it is read.
pub(super) struct Reached {
    pub(super) response: Response<Arriving>,
    pub(super) held: Held,
    pub(super) permit: Permit,
}

/// Sends `outgoing`, and again as the plan's retry policy allows.
///
/// # Errors
/// If no try had a response; of the last one.
pub(super) async fn forward(
    ongoing: &mut Ongoing,
    plan: &Plan,
    outgoing: &Outgoing,
) -> Result<Reached, Box<Failed>> {
    forward_with(ongoing, plan, outgoing, &request).await
}

/// The same, with requests made by `build`.
///
/// # Errors
/// If no try had a response; of the last one.
pub(super) async fn forward_with(
    ongoing: &mut Ongoing,
    plan: &Plan,
    outgoing: &Outgoing,
    build: &(impl Fn(&Plan, &Outgoing) -> Request<Upload> + Sync),
) -> Result<Reached, Box<Failed>> {
    let mut tried: Vec<Arc<EndpointState>> = Vec::new();
    let mut retries = retry::Retries::new(plan, outgoing);
    plan.cluster.requested(&plan.members);
    let mut retrying = None;
    loop {
        ongoing.exchange().attempts += 1;
        let tried_now = tried.len();
        let outcome = attempt(ongoing, plan, outgoing, &mut tried, build).await;
        let again = retries.again(&outcome);
        let Some(wait) = again.filter(|_| outgoing.body.replayable() || tried.len() == tried_now)
        else {
            retries.settle(ongoing.exchange(), &outcome);
            return outcome;
        };
        drop(outcome);
        retrying.get_or_insert_with(|| plan.cluster.retrying());
        if plan.deadline.is_some_and(|it| it <= Instant::now() + wait) {
            return Err(Box::new(Failed::new(Cause::Deadline)));
        }
        tokio::time::sleep(wait).await;
    }
}

/// One try.
async fn attempt(
    ongoing: &mut Ongoing,
    plan: &Plan,
    outgoing: &Outgoing,
    tried: &mut Vec<Arc<EndpointState>>,
    build: &(impl Fn(&Plan, &Outgoing) -> Request<Upload> + Sync),
) -> Result<Reached, Box<Failed>> {
    let exchange = ongoing.exchange();
    let draw = exchange.draw();
    let avoided: &[_] = match plan.retry.ignore_previous {
        true => tried,
        false => &[],
    };
    let wanted = Wanted {
        tried: avoided,
        hash: plan.hash,
        session: plan.session.as_ref().and_then(|it| it.endpoint.as_deref()),
        destination: exchange.connection.destination,
        host: Some(outgoing.authority.host()),
        via: Some(&exchange.connection.via),
        carries: Carries::request(plan.version),
        draw,
    };
    let acquired = plan.cluster.acquire(&plan.members, &wanted);
    let mut permit = acquired.map_err(|it| Box::new(Failed::new(Cause::Unavailable(it))))?;
    let endpoint = Arc::clone(permit.endpoint());
    tried.push(Arc::clone(&endpoint));
    exchange.upstream = Some(told(plan, &endpoint));
    let connection = Arc::clone(&exchange.connection);
    let started = Instant::now();
    let attempts = exchange.attempts;
    let interim = exchange.interim.clone();
    let sending = async {
        let slot = match plan.version {
            Version::HTTP_2 => None,
            _ => plan.members.connection().await,
        };
        let lease = open(
            &connection.waypoint,
            &plan.members,
            &endpoint,
            plan.version,
            connection.destination,
            Some(connection.client),
        );
        let lease = lease.await?;
        let reused = lease.reused;
        let mut request = build(plan, outgoing);
        if plan.tell_attempt {
            let headers = request.headers_mut();
            headers.insert(ATTEMPT_COUNT, HeaderValue::from(attempts));
        }
        if let Some(interim) = interim.filter(|_| plan.version == Version::HTTP_11) {
            on_informational(&mut request, move |it| {
                interim.tell(it.status(), it.headers())
            });
        }
        let switches = request.headers().contains_key(UPGRADE);
        let sent = lease.send(request).await;
        let sent = sent.map_err(|error| Failed::sent(error, reused, &outgoing.body))?;
        let unasked = sent.0.status() == StatusCode::SWITCHING_PROTOCOLS && !switches;
        if unasked || hygiene::ends_in_doubt(sent.0.headers()) {
            return Err(Failed::new(Cause::Ambiguous));
        }
        Ok((sent, slot))
    };
    let sent = within(plan, started, &outgoing.body, sending).await;
    let exchange = ongoing.exchange();
    match sent {
        Ok(((response, held), slot)) => {
            permit.holds(slot);
            exchange.responded = Some(Instant::now());
            permit.answered(response.status().as_u16());
            Ok(Reached {
                response,
                held,
                permit,
            })
        }
        Err(failed) => {
            exchange.failure = failed.transport();
            if failed.is_endpoints() {
                permit.failed();
            }
            Err(Box::new(failed))
        }
    }
}

/// Gives a try its time: the policy's, the request's, and never more than [`STREAM_IDLE`] in which nothing moves.
async fn within<T>(
    plan: &Plan,
    started: Instant,
    body: &Body,
    sending: impl Future<Output = Result<T, Failed>>,
) -> Result<T, Failed> {
    let mut sending = std::pin::pin!(sending);
    let per_try = plan.per_try.map(|it| started + it);
    loop {
        let received = body.received();
        let idle = Instant::now() + STREAM_IDLE;
        let limits = [
            (plan.deadline, Cause::Deadline),
            (per_try, Cause::PerTryTimeout),
            (Some(idle), Cause::Idle),
        ];
        let first = limits
            .into_iter()
            .filter_map(|(at, cause)| Some((at?, cause)))
            .min_by_key(|(at, _)| *at);
        let Some((at, cause)) = first else {
            return sending.await;
        };
        match timeout_at(at, sending.as_mut()).await {
            Ok(sent) => return sent,
            Err(_) if matches!(cause, Cause::Idle) && body.received() > received => {}
            Err(_) => return Err(Failed::new(cause)),
        }
    }
}

fn told(plan: &Plan, endpoint: &Arc<EndpointState>) -> exchange::Upstream {
    exchange::Upstream {
        service: plan.members.service.as_ref().map(|it| it.key()),
        port: plan.members.port,
        subset: plan.members.subset.clone(),
        address: endpoint.address(),
        workload: endpoint.workload().cloned(),
        peer: None,
    }
}

fn request(plan: &Plan, outgoing: &Outgoing) -> Request<Upload> {
    let body = outgoing.body.upload();
    build(outgoing, &outgoing.authority, plan.version, body)
}

/// The request as an endpoint of `version` takes it.
pub(super) fn build(
    outgoing: &Outgoing,
    authority: &Authority,
    version: Version,
    body: Upload,
) -> Request<Upload> {
    let mut request = Request::new(body);
    *request.method_mut() = outgoing.method.clone();
    *request.version_mut() = version;
    *request.uri_mut() = hygiene::target(authority, outgoing.path.clone(), version);
    let headers = request.headers_mut();
    headers.clone_from(&outgoing.headers);
    if version != Version::HTTP_2 {
        // The authority was checked: it is a valid value.
        if let Ok(host) = HeaderValue::from_str(authority.as_str()) {
            headers.insert(HOST, host);
        }
        if !outgoing.body.is_empty() && !headers.contains_key(CONTENT_LENGTH) {
            headers.insert(TRANSFER_ENCODING, HeaderValue::from_static("chunked"));
        }
    }
    request
}

/// The error of HTTP/2 behind an error, if it is one.
pub(super) fn h2_error(error: &hyper::Error) -> Option<&h2::Error> {
    let mut source = std::error::Error::source(error);
    while let Some(error) = source {
        if let Some(found) = error.downcast_ref::<h2::Error>() {
            return Some(found);
        }
        source = error.source();
    }
    None
}
