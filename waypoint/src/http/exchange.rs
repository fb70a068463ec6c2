//! One request and what became of it: the facts that phases read and add to, and that log and metrics tell.

use std::{borrow::Cow, net::SocketAddr, sync::Arc, time::SystemTime};

use http::{HeaderMap, HeaderName, HeaderValue, Method, Version, request::Parts, uri::Authority};
use mesh::{
    draw::Draw,
    identity::Identity,
    l7::{
        request::Claims,
        response_flags::{Flag, Flags},
        route::{HeaderEdit, HttpRule},
        table::Selected,
    },
    names::{NamespacedHostname, Str},
    workload::Workload,
};
use tokio::time::Instant;

use super::interim::Way;
use crate::{
    connection::Connection, external_authorization::HeaderChange, snapshot::Snapshot,
    telemetry::Observed,
};

/// What a request's bodies hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Anything.
    Http,
    /// gRPC.
    Grpc,
}

/// The head of a request as the client sent it, checked and normalised.
#[derive(Clone, Debug)]
pub(crate) struct Head {
    /// Its method.
    pub(crate) method: Method,
    /// Its host.
    pub(crate) authority: Authority,
    /// Its path and query as sent; empty for a request that was refused before they were looked at.
    pub(crate) original: Str,
    /// `http` or `https`.
    pub(crate) scheme: &'static str,
    /// Its version.
    pub(crate) version: Version,
    /// Its kind.
    pub(crate) kind: Kind,
}

/// Where a request was sent; of the last try.
#[derive(Clone, Debug)]
pub(crate) struct Upstream {
    /// The service whose endpoint it is; none: a workload by its own address.
    pub(crate) service: Option<NamespacedHostname>,
    /// Its port.
    pub(crate) port: u16,
    /// DestinationRule subset.
    pub(crate) subset: Option<Str>,
    /// The endpoint, where it is a workload.
    pub(crate) workload: Option<Arc<Workload>>,
    /// The endpoint's address, where it is known.
    pub(crate) address: Option<SocketAddr>,
    /// The endpoint's proven identity.
    pub(crate) peer: Option<Identity>,
}

/// One request.
pub(crate) struct Exchange {
    /// The connection that it came on.
    pub(crate) connection: Arc<Connection>,
    /// What is known of mesh and routes; one for the whole request.
    pub(crate) snapshot: Arc<Snapshot>,
    /// When its head had arrived.
    pub(crate) started: Instant,
    /// The same, for the log.
    pub(crate) wall: SystemTime,
    /// Chance, split for each choice.
    pub(crate) draw: Draw,
    /// None: it was refused before its head was understood.
    pub(crate) head: Option<Head>,
    /// The rule that it matched; none: the default route, or none matched.
    pub(crate) route: Option<Selected>,
    /// What verified tokens say.
    pub(crate) claims: Option<Arc<Claims>>,
    /// The chosen backend's changes of the response.
    pub(crate) backend_edit: Option<HeaderEdit>,
    /// What the response tells a browser.
    pub(crate) cors: HeaderMap,
    /// The header of the response that names the client's session.
    pub(crate) session: Option<(HeaderName, HeaderValue)>,
    /// Cookies that the response sets.
    pub(crate) cookies: Vec<HeaderValue>,
    /// What authorizers change of the response.
    pub(crate) response_changes: Vec<HeaderChange>,
    /// What is kept of it for log, metrics and trace; none: its head was not understood.
    pub(crate) observed: Option<Box<Observed>>,
    /// Where interim responses to it go; none: nowhere.
    pub(crate) interim: Option<Way>,
    /// Where it went.
    pub(crate) upstream: Option<Upstream>,
    /// Tries so far.
    pub(crate) attempts: u32,
    /// The status that the client was told.
    pub(crate) status: u16,
    /// What went other than well.
    pub(crate) flags: Flags,
    /// Why it was answered so, in Envoy's words where it has some.
    pub(crate) details: Cow<'static, str>,
    /// Why the last connection to an endpoint failed.
    pub(crate) failure: Option<String>,
    /// When the head of the endpoint's response had arrived.
    pub(crate) responded: Option<Instant>,
}

impl Exchange {
    pub(super) fn new(connection: Arc<Connection>, snapshot: Arc<Snapshot>, draw: Draw) -> Self {
        Self {
            connection,
            snapshot,
            started: Instant::now(),
            wall: SystemTime::now(),
            draw,
            head: None,
            route: None,
            claims: None,
            backend_edit: None,
            cors: HeaderMap::new(),
            session: None,
            cookies: Vec::new(),
            response_changes: Vec::new(),
            observed: None,
            interim: None,
            upstream: None,
            attempts: 0,
            status: 0,
            flags: Flags::default(),
            details: Cow::Borrowed(""),
            failure: None,
            responded: None,
        }
    }

    /// A draw for one choice.
    pub(crate) fn draw(&mut self) -> Draw {
        let (now, later) = self.draw.split();
        self.draw = later;
        now
    }

    /// Whether local answers must be gRPC.
    pub(crate) fn is_grpc(&self) -> bool {
        self.head.as_ref().is_some_and(|it| it.kind == Kind::Grpc)
    }

    /// The rule that it matched.
    pub(crate) fn rule(&self) -> Option<&HttpRule> {
        self.route.as_ref().map(Selected::rule)
    }

    /// Adds a flag.
    pub(crate) fn flag(&mut self, flag: Flag) {
        self.flags.insert(flag);
    }
}

impl Head {
    pub(super) fn new(parts: &Parts, authority: Authority) -> Self {
        let path = parts.uri.path_and_query().map_or("", |it| it.as_str());
        Self {
            method: parts.method.clone(),
            authority,
            original: path.into(),
            scheme: scheme(parts),
            version: parts.version,
            kind: match mesh::l7::request::is_grpc(&parts.headers) {
                true => Kind::Grpc,
                false => Kind::Http,
            },
        }
    }
}

/// What a proxy before us says of the client's scheme; inside the mesh's tunnel it is `http`.
fn scheme(parts: &Parts) -> &'static str {
    let told = parts.headers.get("x-forwarded-proto");
    match told.is_some_and(|it| it.as_bytes().eq_ignore_ascii_case(b"https")) {
        true => "https",
        false => "http",
    }
}
