//! What is known of one request, or of one connection that is not HTTP, when it is to be decided on.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use http::{HeaderMap, Method};
use serde_json::Value;

use super::view::View;
use crate::{
    identity::Identity,
    names::{NamespacedHostname, NetworkAddress, Str},
    view::MeshView,
};

/// A request as it is after its path was normalised and its headers were sanitised. Borrowed: making one copies
/// nothing.
#[derive(Clone, Copy, Debug)]
pub struct RequestFacts<'a> {
    /// The connection that it came on.
    pub connection: ConnectionFacts<'a>,
    /// Its method.
    pub method: &'a Method,
    /// `http` or `https`.
    pub scheme: &'a str,
    /// `Host` or `:authority`, with the port that the client wrote.
    pub authority: &'a str,
    /// Normalised, without its query.
    pub path: &'a str,
    /// Without `?`, as the client wrote it.
    pub query: Option<&'a str>,
    /// As received.
    pub headers: &'a HeaderMap,
    /// The client's address by `x-forwarded-for`, as far as it is trusted; else the connection's.
    pub remote: IpAddr,
    /// What verified tokens say.
    pub claims: Option<&'a Claims>,
    /// Whether it came over HTTP/2.
    pub http2: bool,
}

/// A connection to a service or a workload through the waypoint.
#[derive(Clone, Copy, Debug)]
pub struct ConnectionFacts<'a> {
    /// The service that is addressed; none: a workload by its address.
    pub service: Option<&'a NamespacedHostname>,
    /// The port that is addressed.
    pub port: u16,
    /// The address that is addressed.
    pub destination: IpAddr,
    /// The peer.
    pub source: SocketAddr,
    /// Proven by the peer's certificate.
    pub identity: Option<&'a Identity>,
    /// Of the workload that calls, where they are known: see [`source_labels`].
    pub source_labels: Option<&'a BTreeMap<Str, Str>>,
    /// Of a TLS connection that is passed through.
    pub sni: Option<&'a str>,
}

/// The labels of the workload that calls: the one at its address, if it is who its certificate says. What peers tell of
/// themselves counts for nothing; who comes through a gateway, whose address is another's, has none.
pub fn source_labels<'a>(
    mesh: &MeshView,
    l7: &'a View,
    at: &NetworkAddress,
    identity: &Identity,
) -> Option<&'a BTreeMap<Str, Str>> {
    if l7.knows_no_labels() {
        return None;
    }
    let workload = mesh.workload_at(at)?;
    let is_it = workload.identity() == *identity;
    l7.labels(&workload.uid).filter(|_| is_it).map(Arc::as_ref)
}

impl ConnectionFacts<'_> {
    /// The namespace of the caller.
    pub fn namespace(&self) -> Option<&str> {
        self.identity.map(|identity| &*identity.namespace)
    }
}

impl RequestFacts<'_> {
    /// Whether it is gRPC by its content type.
    pub fn is_grpc(&self) -> bool {
        is_grpc(self.headers)
    }
}

/// Whether a message is gRPC by its content type: `application/grpc`, `application/grpc+...`, with parameters.
/// gRPC-Web is not.
pub fn is_grpc(headers: &HeaderMap) -> bool {
    let value = headers.get(http::header::CONTENT_TYPE);
    let text = value.and_then(|value| value.to_str().ok());
    let rest = text.and_then(|text| {
        let start = text.get(..GRPC.len())?;
        start
            .eq_ignore_ascii_case(GRPC)
            .then(|| &text[GRPC.len()..])
    });
    rest.is_some_and(|rest| rest.is_empty() || rest.starts_with(['+', ';', ' ']))
}

const GRPC: &str = "application/grpc";

/// What a verified token says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claims {
    /// `issuer/subject`.
    pub principal: Str,
    /// `aud`.
    pub audiences: Vec<Str>,
    /// `azp`.
    pub presenter: Option<Str>,
    /// All claims; texts that are lists with spaces are lists here.
    pub all: Value,
}

impl Claims {
    /// The texts of the claim at a path of names: of a text one, of a list each, of a number or a truth value its
    /// JSON form.
    pub fn texts<'a>(&'a self, path: &[Str]) -> impl Iterator<Item = std::borrow::Cow<'a, str>> {
        let found = path
            .iter()
            .try_fold(&self.all, |value, name| value.get(&**name));
        let values = match found {
            Some(Value::Array(values)) => values.as_slice(),
            Some(value) => std::slice::from_ref(value),
            None => &[],
        };
        values.iter().filter_map(|value| match value {
            Value::String(text) => Some(text.as_str().into()),
            Value::Bool(_) | Value::Number(_) => Some(value.to_string().into()),
            Value::Null | Value::Array(_) | Value::Object(_) => None,
        })
    }
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    #[test]
    fn grpc_is_told_by_its_content_type() {
        for (value, expected) in [
            ("application/grpc", true),
            ("Application/gRPC+proto", true),
            ("application/grpc; charset=x", true),
            ("application/grpc-web", false),
            ("application/grpcx", false),
            ("application/json", false),
            ("app", false),
        ] {
            let mut headers = HeaderMap::new();
            headers.insert("content-type", HeaderValue::from_static(value));
            assert_eq!(is_grpc(&headers), expected, "{value}");
        }
        assert!(!is_grpc(&HeaderMap::new()));
    }

    #[test]
    fn claims_are_found_by_their_path_in_texts_lists_and_numbers() {
        let claims = Claims {
            principal: "i/s".into(),
            audiences: Vec::new(),
            presenter: None,
            all: serde_json::json!({"a": {"b": ["x", "y", null]}, "n": 7, "o": {}}),
        };
        let texts = |path: &[&str]| {
            let path: Vec<Str> = path.iter().map(|&it| it.into()).collect();
            claims
                .texts(&path)
                .map(std::borrow::Cow::into_owned)
                .collect::<Vec<_>>()
        };
        assert_eq!(texts(&["a", "b"]), ["x", "y"]);
        assert_eq!(texts(&["n"]), ["7"]);
        assert_eq!(texts(&["o"]), Vec::<String>::new());
        assert_eq!(texts(&["a", "c"]), Vec::<String>::new());
    }
}
