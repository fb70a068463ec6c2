//! Requests and routes for tests.

use std::{collections::BTreeMap, net::IpAddr};

use http::{HeaderMap, HeaderName, HeaderValue, Method};

use super::{
    name::ObjectRef,
    request::{Claims, ConnectionFacts, RequestFacts},
    route::{
        Action, Attachment, Backend, Callers, HttpMatch, HttpRule, Order, Route, Rules,
        WeightedBackend,
    },
};
use crate::{
    identity::Identity,
    names::{NamespacedHostname, Str},
};

pub(crate) fn service() -> NamespacedHostname {
    "a/web.a.svc.cluster.local".parse().unwrap()
}

/// A request that owns what its facts borrow.
#[derive(Clone, Debug)]
pub(crate) struct Request {
    pub(crate) method: Method,
    pub(crate) scheme: &'static str,
    pub(crate) authority: String,
    pub(crate) path: String,
    pub(crate) query: Option<String>,
    pub(crate) headers: HeaderMap,
    pub(crate) service: Option<NamespacedHostname>,
    pub(crate) port: u16,
    pub(crate) identity: Option<Identity>,
    pub(crate) source: &'static str,
    pub(crate) remote: IpAddr,
    pub(crate) claims: Option<Claims>,
    pub(crate) http2: bool,
    pub(crate) source_labels: Option<BTreeMap<Str, Str>>,
    pub(crate) sni: Option<&'static str>,
}

pub(crate) fn get(path: &str) -> Request {
    let (path, query) = match path.split_once('?') {
        Some((path, query)) => (path, Some(query.to_owned())),
        None => (path, None),
    };
    Request {
        method: Method::GET,
        scheme: "http",
        authority: "web".to_owned(),
        path: path.to_owned(),
        query,
        headers: HeaderMap::new(),
        service: Some(service()),
        port: 80,
        identity: Some("spiffe://cluster.local/ns/b/sa/client".parse().unwrap()),
        source: "10.0.0.7:4711",
        remote: [10, 0, 0, 7].into(),
        claims: None,
        http2: false,
        source_labels: Some([("app".into(), "x".into())].into()),
        sni: None,
    }
}

impl Request {
    pub(crate) fn with(mut self, name: &'static str, value: &str) -> Self {
        let value = HeaderValue::from_str(value).unwrap();
        self.headers.append(HeaderName::from_static(name), value);
        self
    }

    pub(crate) fn connection(&self) -> ConnectionFacts<'_> {
        ConnectionFacts {
            service: self.service.as_ref(),
            port: self.port,
            destination: [10, 96, 0, 1].into(),
            source: self.source.parse().unwrap(),
            identity: self.identity.as_ref(),
            source_labels: self.source_labels.as_ref(),
            sni: self.sni,
        }
    }

    pub(crate) fn facts(&self) -> RequestFacts<'_> {
        RequestFacts {
            connection: self.connection(),
            method: &self.method,
            scheme: self.scheme,
            authority: &self.authority,
            path: &self.path,
            query: self.query.as_deref(),
            headers: &self.headers,
            remote: self.remote,
            claims: self.claims.as_ref(),
            http2: self.http2,
        }
    }
}

pub(crate) fn backend(name: &str) -> Action {
    let backend = Backend::Service {
        service: format!("a/{}", name.replace('/', "-")).parse().unwrap(),
        port: 80,
        subset: None,
    };
    Action::Forward(vec![WeightedBackend::new(1, backend)])
}

/// A rule to a backend.
pub(crate) fn rule(to: &str, matches: Vec<HttpMatch>) -> HttpRule {
    HttpRule {
        name: Some(to.into()),
        ..HttpRule::new(matches, backend(to))
    }
}

/// A route of [`service`], on all ports and for all callers; VirtualServices are in order as written.
pub(crate) fn route(key: &str, rules: Vec<HttpRule>) -> Route {
    let key: ObjectRef = key.parse().unwrap();
    let order = match &*key.kind {
        "VirtualService" => Order::Written,
        _ => Order::Precedence,
    };
    Route {
        key,
        created: 0,
        attachments: vec![Attachment {
            service: service(),
            port: None,
            callers: Callers::All,
        }],
        rules: Rules::Http { order, rules },
    }
}
