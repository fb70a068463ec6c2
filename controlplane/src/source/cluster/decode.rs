//! An object's JSON to what the graph takes. Pure.
//!
//! Unlike a folder, there is no last good state: what is in force follows from what the API server holds and nothing
//! else, so that replicas agree, whenever they started. A policy with a mistake is taken at its strictest, any other
//! object with one is left out.

use std::sync::Arc;

use k8s_openapi::{
    api::{core::v1 as core, discovery::v1 as discovery},
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
use mesh::names::Str;
use serde::Deserialize;
use serde_json::value::RawValue;

use crate::{
    object::{
        ConfigMap, EndpointSlice, Kind, Meta, Name, Object, ObjectRef, Pod, Service, Sourced,
    },
    output::{Condition, ObjectStatus, ObjectVersion, Truth},
    source::{
        files::checked,
        read::Fault,
        tree::{Entry, Node, Place, Value},
    },
    translate::condition,
};

/// What the API server says of one object.
#[derive(Clone, Debug, PartialEq)]
pub struct Told {
    /// Which.
    pub object: ObjectRef,
    /// What is in force of it.
    pub value: Option<Sourced<Object>>,
    /// What there is to say of it, for kinds of which something is said.
    pub report: Option<Report>,
}

/// What there is to say of an object as it was read.
#[derive(Clone, Debug, PartialEq)]
pub struct Report {
    /// Its conditions.
    pub status: ObjectStatus,
    /// Which of its versions was read.
    pub version: ObjectVersion,
}

/// An object whose metadata cannot be read: the API server's own mistake.
#[derive(Debug, thiserror::Error)]
#[error("read the metadata of an object")]
pub struct Unreadable(#[source] serde_json::Error);

#[derive(Deserialize)]
struct Head {
    #[serde(default, rename = "apiVersion")]
    api_version: String,
    metadata: ObjectMeta,
    #[serde(default)]
    status: Option<StatusHead>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct StatusHead {
    conditions: Option<Arc<serde_json::Value>>,
}

/// The name of an object that is no more.
pub fn name(kind: Kind, raw: &RawValue) -> Result<ObjectRef, Unreadable> {
    let head: Head = serde_json::from_str(raw.get()).map_err(Unreadable)?;
    let meta = Meta::new(&head.metadata, kind);
    Ok(ObjectRef {
        kind,
        name: meta.name,
    })
}

/// Reads an object.
pub fn decode(kind: Kind, raw: &RawValue) -> Result<Told, Unreadable> {
    match kind {
        Kind::Pod => typed(kind, raw, |pod: core::Pod| Object::Pod(Pod::new(&pod))),
        Kind::EndpointSlice => typed(kind, raw, |slice: discovery::EndpointSlice| {
            Object::EndpointSlice(EndpointSlice::new(&slice))
        }),
        Kind::Namespace => typed(kind, raw, |head: Head| {
            Object::Namespace(Meta::new(&head.metadata, kind))
        }),
        Kind::Node => typed(kind, raw, |head: Head| {
            Object::Node(Meta::new(&head.metadata, kind))
        }),
        Kind::ConfigMap => {
            let mut told = typed(kind, raw, |map: core::ConfigMap| {
                Object::ConfigMap(ConfigMap::new(&map))
            })?;
            // Nobody reads anything else of them.
            let has_roots = |sourced: &Sourced<Object>| matches!(&sourced.object, Object::ConfigMap(map) if map.roots.is_some());
            told.value = told.value.filter(has_roots);
            Ok(told)
        }
        Kind::Service => {
            let mut told = typed(kind, raw, |service: core::Service| {
                Object::Service(Service::new(&service))
            })?;
            told.report = Some(report(kind, raw, Vec::new())?);
            Ok(told)
        }
        _ => custom(kind, raw),
    }
}

/// One of Kubernetes' own kinds, which the API server has checked.
fn typed<'de, T: Deserialize<'de>>(
    kind: Kind,
    raw: &'de RawValue,
    make: impl FnOnce(T) -> Object,
) -> Result<Told, Unreadable> {
    let read: Result<T, _> = serde_json::from_str(raw.get());
    match read {
        Ok(read) => {
            let object = make(read);
            Ok(Told {
                object: ObjectRef {
                    kind,
                    name: object.meta().name.clone(),
                },
                value: Some(Sourced {
                    object,
                    faults: Vec::new(),
                }),
                report: None,
            })
        }
        Err(error) => {
            let object = name(kind, raw)?;
            tracing::warn!(%object, %error, "an object that cannot be read is left out");
            Ok(Told {
                object,
                value: None,
                report: None,
            })
        }
    }
}

/// A custom resource: read with the same care as from a file, for its CRD may be older or laxer than ours.
fn custom(kind: Kind, raw: &RawValue) -> Result<Told, Unreadable> {
    let object = name(kind, raw)?;
    let value: serde_json::Value = serde_json::from_str(raw.get()).map_err(Unreadable)?;
    let mut places = 0;
    let node = node(value, &mut places);
    let (read, faults, warnings) = checked(kind, &node);
    let faults: Vec<String> = faults.iter().map(Fault::to_string).collect();
    let mut conditions = vec![accepted(kind, &faults)];
    conditions.extend(warned(&warnings));
    conditions.sort();
    let in_force = read.filter(|_| faults.is_empty() || kind.is_policy());
    Ok(Told {
        object,
        value: in_force.map(|object| Sourced { object, faults }),
        report: Some(report(kind, raw, conditions)?),
    })
}

fn accepted(kind: Kind, faults: &[String]) -> Condition {
    if faults.is_empty() {
        return condition(
            "Accepted",
            Truth::True,
            "Accepted",
            "read without a mistake",
        );
    }
    let outcome = kind.when_unreadable();
    let message = format!("{}; {outcome}", faults.join("; "));
    condition("Accepted", Truth::False, "Invalid", message)
}

fn warned(warnings: &[Fault]) -> Option<Condition> {
    let texts: Vec<String> = warnings.iter().map(Fault::to_string).collect();
    (!texts.is_empty()).then(|| condition("Warned", Truth::True, "Doubtful", texts.join("; ")))
}

fn report(kind: Kind, raw: &RawValue, conditions: Vec<Condition>) -> Result<Report, Unreadable> {
    let head: Head = serde_json::from_str(raw.get()).map_err(Unreadable)?;
    let Name { namespace, name } = Meta::new(&head.metadata, kind).name;
    let text = |field: &Option<String>| Str::from(field.as_deref().unwrap_or_default());
    Ok(Report {
        version: ObjectVersion {
            uid: text(&head.metadata.uid),
            generation: head.metadata.generation.unwrap_or_default(),
            resource_version: text(&head.metadata.resource_version),
            api_version: head.api_version.as_str().into(),
            conditions: head.status.and_then(|status| status.conditions),
        },
        status: ObjectStatus {
            kind: kind.as_str().into(),
            namespace: kind.is_namespaced().then_some(namespace),
            name,
            file: "".into(),
            line: 0,
            conditions,
            parents: Arc::default(),
        },
    })
}

/// JSON as the reader takes it. Places are only there to tell values apart. What servers write for themselves is left
/// out: nobody reads it.
fn node(value: serde_json::Value, places: &mut u32) -> Node {
    *places += 1;
    let place = Place {
        line: 0,
        column: *places,
    };
    let value = match value {
        serde_json::Value::Null => Value::Plain("null".into()),
        serde_json::Value::Bool(truth) => Value::Plain(truth.to_string().into()),
        serde_json::Value::Number(number) => Value::Plain(number.to_string().into()),
        serde_json::Value::String(text) => Value::Text(text.into()),
        serde_json::Value::Array(items) => {
            let items = items.into_iter().map(|item| Arc::new(node(item, places)));
            Value::Sequence(items.collect())
        }
        serde_json::Value::Object(fields) => {
            let kept = fields.into_iter().filter(|(key, _)| key != "managedFields");
            let entry = |(key, value): (String, serde_json::Value)| Entry {
                key: key.into(),
                place,
                node: Arc::new(node(value, places)),
            };
            Value::Mapping(kept.map(entry).collect())
        }
    };
    Node::new(place, value)
}
