//! Kinds that the control plane does not read, checked in what users get wrong: WorkloadGroup. It is read as plain JSON;
//! a field of another type than ours is the CRD's business.

use serde_json::Value;

use super::{Findings, entry, is_label_key, is_label_value, is_subdomain};
use crate::crd::WorkloadEntrySpec;

pub(super) fn validate(kind: &str, object: &Value, found: &mut Findings) {
    let (check, known): (fn(&Value, &mut Findings), &[&str]) = match kind {
        "WorkloadGroup" => (workload_group, &WORKLOAD_GROUP),
        _ => return,
    };
    names(&object["metadata"], found);
    let spec = &object["spec"];
    for field in spec
        .as_object()
        .into_iter()
        .flat_map(|fields| fields.keys())
    {
        if !known.contains(&field.as_str()) {
            found.error(format!("spec.{field}"), "is unknown");
        }
    }
    check(spec, found);
}

const WORKLOAD_GROUP: [&str; 3] = ["metadata", "template", "probe"];

fn names(metadata: &Value, found: &mut Findings) {
    let name = metadata["name"].as_str().unwrap_or_default();
    // Empty where the API server has yet to make one of `generateName`.
    if !name.is_empty() && !is_subdomain(name) {
        found.error("metadata.name", format!("{name:?} is no DNS name"));
    }
    labels(&metadata["labels"], "metadata.labels", found);
}

fn labels(labels: &Value, path: &str, found: &mut Findings) {
    for (key, value) in labels.as_object().into_iter().flatten() {
        let well = value.as_str().is_some_and(is_label_value);
        if !is_label_key(key) || !well {
            found.error(path, format!("{key:?}: {value} is no label"));
        }
    }
}

/// Reads a part by its type; a part that does not fit is named.
fn part<T: serde::de::DeserializeOwned>(
    value: &Value,
    path: &str,
    found: &mut Findings,
) -> Option<T> {
    if value.is_null() {
        return None;
    }
    match T::deserialize(value) {
        Ok(part) => Some(part),
        Err(error) => {
            found.error(path, error.to_string());
            None
        }
    }
}

fn workload_group(spec: &Value, found: &mut Findings) {
    if !spec["template"].is_object() {
        return found.error("spec.template", "is missing");
    }
    // The address is each machine's own.
    let mut template = spec["template"].clone();
    if template["address"].is_null() {
        template["address"] = Value::from("0.0.0.0");
    }
    if let Some(template) = part::<WorkloadEntrySpec>(&template, "spec.template", found) {
        entry::workload_entry(&template, "spec.template", found);
    }
    labels(&spec["metadata"]["labels"], "spec.metadata.labels", found);
    probe(&spec["probe"], found);
}

fn probe(probe: &Value, found: &mut Findings) {
    const PATH: &str = "spec.probe";
    if probe.is_null() {
        return;
    }
    let ways = ["httpGet", "tcpSocket", "exec", "grpc"];
    let set = ways.iter().filter(|way| !probe[**way].is_null()).count();
    if set != 1 {
        found.error(PATH, "needs one of httpGet, tcpSocket, exec and grpc");
    }
    for way in ["httpGet", "tcpSocket", "grpc"] {
        let port = &probe[way]["port"];
        let well = port
            .as_u64()
            .is_some_and(|port| (1..=65535).contains(&port));
        if !probe[way].is_null() && !well {
            found.error(format!("{PATH}.{way}.port"), "is no port from 1 to 65535");
        }
    }
    let command = probe["exec"]["command"].as_array();
    if !probe["exec"].is_null() && command.is_none_or(Vec::is_empty) {
        found.error(format!("{PATH}.exec.command"), "is missing");
    }
    for field in [
        "initialDelaySeconds",
        "timeoutSeconds",
        "periodSeconds",
        "successThreshold",
        "failureThreshold",
    ] {
        if probe[field].as_i64().is_some_and(|number| number < 0) {
            found.error(format!("{PATH}.{field}"), "is negative");
        }
    }
}
