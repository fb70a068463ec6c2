//! Kinds that the control plane does not read yet, checked in what users get wrong: RequestAuthentication,
//! WorkloadGroup, Telemetry. They are read as plain JSON; a field of another type than ours is the CRD's business.

use serde_json::Value;

use super::{Findings, entry, is_label_key, is_label_value, is_subdomain};
use crate::crd::{MatchLabels, TargetRef, WorkloadEntrySpec};

pub(super) fn validate(kind: &str, object: &Value, found: &mut Findings) {
    let (check, known): (fn(&Value, &mut Findings), &[&str]) = match kind {
        "RequestAuthentication" => (request_authentication, &REQUEST_AUTHENTICATION),
        "Telemetry" => (telemetry, &TELEMETRY),
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

const REQUEST_AUTHENTICATION: [&str; 4] = ["selector", "targetRef", "targetRefs", "jwtRules"];
const TELEMETRY: [&str; 6] = [
    "selector",
    "targetRef",
    "targetRefs",
    "tracing",
    "metrics",
    "accessLogging",
];
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

fn selection(spec: &Value, found: &mut Findings) {
    let selector: Option<MatchLabels> = part(&spec["selector"], "spec.selector", found);
    let target: Option<TargetRef> = part(&spec["targetRef"], "spec.targetRef", found);
    let targets = part(&spec["targetRefs"], "spec.targetRefs", found);
    let targets: Vec<TargetRef> = targets.unwrap_or_default();
    super::selection(selector.as_ref(), target.as_ref(), &targets, found);
}

fn items<'v>(value: &'v Value, path: &str) -> Vec<(String, &'v Value)> {
    let items = value.as_array().into_iter().flatten().enumerate();
    items
        .map(|(index, item)| (format!("{path}[{index}]"), item))
        .collect()
}

fn text<'v>(value: &'v Value, field: &str) -> &'v str {
    value[field].as_str().unwrap_or_default()
}

fn request_authentication(spec: &Value, found: &mut Findings) {
    selection(spec, found);
    for (path, rule) in items(&spec["jwtRules"], "spec.jwtRules") {
        jwt_rule(rule, &path, found);
    }
}

fn jwt_rule(rule: &Value, path: &str, found: &mut Findings) {
    let uri = text(rule, "jwksUri");
    if text(rule, "issuer").is_empty() && uri.is_empty() {
        found.error(path, "needs issuer or jwksUri");
    }
    let scheme = uri.split_once("://").map(|(scheme, _)| scheme);
    if !uri.is_empty() && !matches!(scheme, Some("http" | "https")) {
        found.error(
            format!("{path}.jwksUri"),
            format!("{uri:?} is no http or https URL"),
        );
    }
    keys(text(rule, "jwks"), &format!("{path}.jwks"), found);
    for field in ["audiences", "fromParams", "fromCookies"] {
        for (path, value) in items(&rule[field], &format!("{path}.{field}")) {
            if value.as_str().is_none_or(str::is_empty) {
                found.error(path, "is empty");
            }
        }
    }
    for (path, header) in items(&rule["fromHeaders"], &format!("{path}.fromHeaders")) {
        if !is_header(text(header, "name")) {
            found.error(format!("{path}.name"), "is no header name");
        }
    }
    for (path, output) in items(
        &rule["outputClaimToHeaders"],
        &format!("{path}.outputClaimToHeaders"),
    ) {
        if !is_header(text(output, "header")) {
            found.error(format!("{path}.header"), "is no header name");
        }
        if text(output, "claim").is_empty() {
            found.error(format!("{path}.claim"), "is missing");
        }
    }
    let timeout = text(rule, "timeout");
    if !timeout.is_empty() && !is_duration(timeout) {
        found.error(
            format!("{path}.timeout"),
            format!("{timeout:?} is no duration such as 5s"),
        );
    }
}

/// A JSON Web Key Set (RFC 7517), written inline.
fn keys(text: &str, path: &str, found: &mut Findings) {
    if text.is_empty() {
        return;
    }
    let set: Value = match serde_json::from_str(text) {
        Ok(set) => set,
        Err(error) => return found.error(path, format!("is no JSON: {error}")),
    };
    let Some(keys) = set["keys"].as_array() else {
        return found.error(path, "is no key set: it has no list of keys");
    };
    for (index, key) in keys.iter().enumerate() {
        let path = format!("{path}.keys[{index}]");
        if key["kty"].as_str().is_none_or(str::is_empty) {
            found.error(&path, "has no kty");
        }
        // RFC 7518 6: `d` of RSA and EC, `k` of a shared key.
        if !key["d"].is_null() || !key["k"].is_null() {
            found.warning(
                &path,
                "holds a private key, which everybody can read who can read this object",
            );
        }
    }
}

/// RFC 9110 5.1.
fn is_header(name: &str) -> bool {
    http::HeaderName::from_bytes(name.as_bytes()).is_ok()
}

/// As protobuf's JSON and Go write them: `1.5s`, `1m30s`, `100ms`.
fn is_duration(text: &str) -> bool {
    let mut rest = text;
    while !rest.is_empty() {
        let digits = rest.trim_start_matches(|c: char| c.is_ascii_digit() || c == '.');
        let number = &rest[..rest.len() - digits.len()];
        let unit = ["ms", "us", "ns", "h", "m", "s"]
            .into_iter()
            .find(|unit| digits.starts_with(unit));
        let (Ok(_), Some(unit)) = (number.parse::<f64>(), unit) else {
            return false;
        };
        rest = &digits[unit.len()..];
    }
    !text.is_empty()
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

fn telemetry(spec: &Value, found: &mut Findings) {
    selection(spec, found);
    for (path, tracing) in items(&spec["tracing"], "spec.tracing") {
        let sampling = &tracing["randomSamplingPercentage"];
        let well = sampling
            .as_f64()
            .is_some_and(|percent| (0.0..=100.0).contains(&percent));
        if !sampling.is_null() && !well {
            found.error(
                format!("{path}.randomSamplingPercentage"),
                "is no percentage from 0 to 100",
            );
        }
        let tags = tracing["customTags"].as_object();
        for (name, tag) in tags.into_iter().flatten() {
            custom_tag(name, tag, &path, found);
        }
    }
    for (path, metrics) in items(&spec["metrics"], "spec.metrics") {
        for (path, item) in items(&metrics["overrides"], &format!("{path}.overrides")) {
            let tags = item["tagOverrides"].as_object();
            for (tag, change) in tags.into_iter().flatten() {
                tag_override(change, &format!("{path}.tagOverrides.{tag}"), found);
            }
        }
    }
    for (path, logging) in items(&spec["accessLogging"], "spec.accessLogging") {
        let filter = &logging["filter"];
        if !filter.is_null() && text(filter, "expression").is_empty() {
            found.error(format!("{path}.filter.expression"), "is empty");
        }
    }
}

fn custom_tag(name: &str, tag: &Value, path: &str, found: &mut Findings) {
    let path = format!("{path}.customTags.{name}");
    if name.is_empty() {
        found.error(&path, "a tag needs a name");
    }
    let sources = [
        ("literal", "value"),
        ("environment", "name"),
        ("header", "name"),
    ];
    let set: Vec<_> = sources
        .iter()
        .filter(|(way, _)| !tag[*way].is_null())
        .collect();
    match set[..] {
        [(way, field)] if text(&tag[*way], field).is_empty() => {
            found.error(format!("{path}.{way}.{field}"), "is empty");
        }
        [_] => {}
        _ => found.error(path, "needs one of literal, environment and header"),
    }
}

fn tag_override(change: &Value, path: &str, found: &mut Findings) {
    let removes = text(change, "operation") == "REMOVE";
    match (removes, text(change, "value").is_empty()) {
        (false, true) => found.error(format!("{path}.value"), "UPSERT needs a value"),
        (true, false) => found.error(format!("{path}.value"), "REMOVE has no value"),
        _ => {}
    }
}
