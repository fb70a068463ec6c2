//! Admission: a review in, its answer out. Pure.
//!
//! What is refused is what cannot work; what is only doubtful is a warning. Kinds that the mesh does not know, other
//! operations than creation and change, and subresources pass.

use serde_json::{Value, json};

use super::{Findings, Problem, Severity, others, validate};
use crate::{
    object::{Kind, read_object},
    source::tree,
};

/// An object with this annotation is always refused: so the control plane proves that it is asked.
pub const ALWAYS_REJECT: &str = "internal.istio.io/webhook-always-reject";

/// The groups whose objects are looked at (control-plane.md 13).
const GROUPS: [&str; 4] = [
    "security.istio.io",
    "networking.istio.io",
    "telemetry.istio.io",
    "extensions.istio.io",
];

/// Problems told in one answer, and bytes of each: the API server cuts longer ones.
const MAX_TOLD: usize = 16;
const MAX_WARNING: usize = 250;

/// What admission says of one object.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Verdict {
    /// Why it is refused; empty: it is not.
    pub errors: Vec<Problem>,
    /// What is doubtful.
    pub warnings: Vec<Problem>,
}

/// A body that is no review.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReviewError {
    /// Another version of the API, or something else altogether.
    #[error("no AdmissionReview of admission.k8s.io/v1")]
    NoReview,
    /// It has no request.
    #[error("the AdmissionReview has no request with a uid")]
    NoRequest,
}

/// Checks an object as the API server has it: JSON with `apiVersion` and `kind`.
pub fn check(object: &Value) -> Verdict {
    let mut verdict = Verdict::default();
    for problem in problems(object) {
        match problem.severity {
            Severity::Error => verdict.errors.push(problem),
            Severity::Warning => verdict.warnings.push(problem),
        }
    }
    verdict
}

fn problems(object: &Value) -> Vec<Problem> {
    let (version, kind) = (text(object, "apiVersion"), text(object, "kind"));
    let group = version.split('/').next().unwrap_or_default();
    if !GROUPS.contains(&group) {
        return Vec::new();
    }
    let mut found = Findings::default();
    top_level(object, &mut found);
    if !found.0.is_empty() {
        return found.0;
    }
    match Kind::of(version, kind) {
        Some(known) => read_and_validate(known, object, &mut found),
        None => others::validate(kind, object, &mut found),
    }
    found.0
}

/// A misspelt `spec` would be an object that asks for nothing.
fn top_level(object: &Value, found: &mut Findings) {
    const KNOWN: [&str; 5] = ["apiVersion", "kind", "metadata", "spec", "status"];
    for field in object
        .as_object()
        .into_iter()
        .flat_map(|fields| fields.keys())
    {
        if !KNOWN.contains(&field.as_str()) {
            found.error(field, "is no field of an object");
        }
    }
}

fn read_and_validate(kind: Kind, object: &Value, found: &mut Findings) {
    // JSON is YAML; the reader bounds depth and says of every field where it is wrong.
    let mut documents = match tree::parse(&object.to_string()) {
        Ok(documents) => documents,
        Err(error) => return found.error("", error.problem),
    };
    let Some(node) = documents.pop() else {
        return found.error("", "is empty");
    };
    let (read, faults) = read_object(kind, &node);
    if faults.is_empty() {
        return found.0.extend(read.iter().flat_map(validate));
    }
    for fault in faults {
        found.error(fault.path, fault.problem);
    }
}

/// Answers an `AdmissionReview`.
pub fn respond(review: &Value) -> Result<(Value, Verdict), ReviewError> {
    if text(review, "apiVersion") != "admission.k8s.io/v1"
        || text(review, "kind") != "AdmissionReview"
    {
        return Err(ReviewError::NoReview);
    }
    let request = &review["request"];
    let uid = request["uid"].as_str().ok_or(ReviewError::NoRequest)?;
    let verdict = judge(request);
    Ok((answer(uid, &verdict), verdict))
}

fn judge(request: &Value) -> Verdict {
    let (operation, object) = (text(request, "operation"), &request["object"]);
    let subresource = !text(request, "subResource").is_empty();
    if !matches!(operation, "CREATE" | "UPDATE") || subresource || !object.is_object() {
        return Verdict::default();
    }
    if !object["metadata"]["annotations"][ALWAYS_REJECT].is_null() {
        let mut found = Findings::default();
        found.error(
            format!("metadata.annotations[{ALWAYS_REJECT:?}]"),
            "asks to be refused",
        );
        return Verdict {
            errors: found.0,
            warnings: Vec::new(),
        };
    }
    let mut verdict = check(object);
    if operation == "UPDATE" && is_no_worse(&request["oldObject"], object) {
        let errors = verdict.errors.drain(..);
        verdict.warnings.splice(0..0, errors);
    }
    verdict
}

/// An object that came in while nobody was asked must still be deleted, and be touched by those who change nothing of
/// what it asks for.
fn is_no_worse(old: &Value, new: &Value) -> bool {
    let deleting = !new["metadata"]["deletionTimestamp"].is_null();
    let same = |field: &str| old[field] == new[field];
    deleting
        || (old.is_object()
            && same("spec")
            && same("kind")
            && old["metadata"]["labels"] == new["metadata"]["labels"])
}

fn answer(uid: &str, verdict: &Verdict) -> Value {
    let mut response = json!({"uid": uid, "allowed": verdict.errors.is_empty()});
    if !verdict.errors.is_empty() {
        let message = format!("configuration is invalid: {}", list(&verdict.errors));
        response["status"] = json!({
            "status": "Failure", "code": 422, "reason": "Invalid", "message": message,
        });
    }
    let warnings: Vec<String> = verdict.warnings.iter().take(MAX_TOLD).map(told).collect();
    let warnings: Vec<&str> = warnings.iter().map(|text| cut(text)).collect();
    if !warnings.is_empty() {
        response["warnings"] = json!(warnings);
    }
    json!({"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "response": response})
}

fn list(problems: &[Problem]) -> String {
    let mut texts: Vec<String> = problems.iter().take(MAX_TOLD).map(told).collect();
    if problems.len() > MAX_TOLD {
        texts.push(format!("and {} more", problems.len() - MAX_TOLD));
    }
    texts.join("; ")
}

fn told(problem: &Problem) -> String {
    match problem.path.as_str() {
        "" => problem.message.clone(),
        path => format!("{path}: {}", problem.message),
    }
}

fn cut(text: &str) -> &str {
    let mut end = text.len().min(MAX_WARNING);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

fn text<'v>(value: &'v Value, field: &str) -> &'v str {
    value[field].as_str().unwrap_or_default()
}

#[cfg(test)]
mod tests;
