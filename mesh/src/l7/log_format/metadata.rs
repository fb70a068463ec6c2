//! What Envoy's metadata would hold, where a waypoint knows it: `METADATA(TYPE:namespace:key...)` and its short forms.

use std::borrow::Cow;

use crate::{
    l7::{expression::Value, name::ObjectRef, record::RequestRecord},
    names::Str,
};

/// Envoy's filter whose metadata verified tokens are.
const JWT: &str = "envoy.filters.http.jwt_authn";

/// One part of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Metadata {
    /// `DYNAMIC:envoy.filters.http.jwt_authn:payload:claim...`: a claim of the verified token; without a name all of them.
    Claims(Vec<Str>),
    /// `ROUTE:istio:config`: the object whose rule matched.
    Route,
    /// `UPSTREAM_HOST:istio:workload`: `workload;namespace;service;revision;cluster`.
    Endpoint,
}

impl Metadata {
    /// None: nothing here fills that part.
    pub(super) fn of(command: &str, arguments: &str) -> Option<Self> {
        let (kind, path) = match command {
            "METADATA" => arguments.split_once(':')?,
            "DYNAMIC_METADATA" => ("DYNAMIC", arguments),
            "UPSTREAM_METADATA" => ("UPSTREAM_HOST", arguments),
            _ => return None,
        };
        let path: Vec<&str> = path.split(':').collect();
        match (kind, &path[..]) {
            ("DYNAMIC", [JWT, "payload", claim @ ..]) => {
                Some(Self::Claims(claim.iter().map(|&it| it.into()).collect()))
            }
            ("ROUTE", ["istio", "config"]) => Some(Self::Route),
            ("UPSTREAM_HOST", ["istio", "workload"]) => Some(Self::Endpoint),
            _ => None,
        }
    }

    pub(super) fn value<'a>(&self, record: &'a RequestRecord) -> Option<Value<'a>> {
        let text = match self {
            Self::Claims(path) => {
                let all = &record.claims.as_ref()?.all;
                match path
                    .iter()
                    .try_fold(all, |value, name| value.get(&**name))?
                {
                    serde_json::Value::Null => return None,
                    serde_json::Value::String(text) => Cow::Borrowed(text.as_str()),
                    other => Cow::Owned(other.to_string()),
                }
            }
            Self::Route => Cow::Owned(place(&record.rule_of.as_ref()?.key)?),
            Self::Endpoint => {
                let labels = &record.destination.labels;
                let known = [
                    &labels.workload,
                    &labels.namespace,
                    &labels.canonical_service,
                    &labels.canonical_revision,
                    &labels.cluster,
                ];
                labels.workload.as_ref()?;
                let texts = known.map(|it| it.as_deref().unwrap_or_default());
                Cow::Owned(texts.join(";"))
            }
        };
        Some(Value::Text(text))
    }
}

/// Where an object is, as Istio writes it.
fn place(key: &ObjectRef) -> Option<String> {
    let (group, kind) = match &*key.kind {
        "VirtualService" => ("networking.istio.io", "virtual-service"),
        "HTTPRoute" => ("gateway.networking.k8s.io", "http-route"),
        "GRPCRoute" => ("gateway.networking.k8s.io", "grpc-route"),
        _ => return None,
    };
    let ObjectRef {
        namespace, name, ..
    } = key;
    Some(format!(
        "/apis/{group}/v1/namespaces/{namespace}/{kind}/{name}"
    ))
}
