//! What is said of routes and policies, per parent or ancestor.

use serde_json::{Value, json};

use crate::crd::gateway_api::{ParentRef, PolicyTargetRef};

/// A parent as `status.parents[].parentRef` has it: as the route names it.
pub fn parent(reference: &ParentRef) -> Value {
    let mut written = json!({
        "group": reference.group.as_deref().unwrap_or("gateway.networking.k8s.io"),
        "kind": reference.kind.as_deref().unwrap_or("Gateway"),
        "name": reference.name,
    });
    let texts = [
        ("namespace", &reference.namespace),
        ("sectionName", &reference.section_name),
    ];
    for (field, text) in texts {
        if let Some(text) = text {
            written[field] = json!(text);
        }
    }
    if let Some(port) = reference.port {
        written["port"] = json!(port);
    }
    written
}

/// A policy's target as `status.ancestors[].ancestorRef` has it.
pub fn ancestor(namespace: &str, target: &PolicyTargetRef) -> Value {
    let mut written = json!({
        "group": target.group,
        "kind": target.kind,
        "namespace": namespace,
        "name": target.name,
    });
    if let Some(section) = &target.section_name {
        written["sectionName"] = json!(section);
    }
    written
}
