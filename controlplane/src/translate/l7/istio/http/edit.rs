//! Changes of headers.

use std::collections::BTreeMap;

use http::HeaderName;
use mesh::l7::route::HeaderEdit;

use crate::{
    crd::istio as crd,
    translate::l7::istio::read::{header, header_value},
    validate::Findings,
};

/// Those of requests and those of responses.
pub(super) fn edits(
    it: Option<&crd::Headers>,
    path: &str,
    found: &mut Findings,
) -> (HeaderEdit, HeaderEdit) {
    let mut read = |part: Option<&crd::HeaderOperations>, name: &str| {
        part.map(|part| edit(part, name == "request", &format!("{path}.{name}"), found))
            .unwrap_or_default()
    };
    let request = read(it.and_then(|it| it.request.as_ref()), "request");
    (
        request,
        read(it.and_then(|it| it.response.as_ref()), "response"),
    )
}

fn edit(
    it: &crd::HeaderOperations,
    is_request: bool,
    path: &str,
    found: &mut Findings,
) -> HeaderEdit {
    let name = |text: &str, field: &str, found: &mut Findings| -> Option<HeaderName> {
        match text {
            ":authority" if is_request => Some(http::header::HOST),
            text => header(text, &format!("{path}.{field}.{text}"), found),
        }
    };
    let mut pairs = |it: &BTreeMap<String, String>, field: &str| {
        let read = |(key, value): (&String, &String)| {
            let value = header_value(value, &format!("{path}.{field}.{key}"), found);
            Some((name(key, field, found)?, value?))
        };
        it.iter().filter_map(read).collect()
    };
    let (set, add) = (pairs(&it.set, "set"), pairs(&it.add, "add"));
    let remove = it
        .remove
        .iter()
        .filter_map(|text| name(text, "remove", found))
        .collect();
    HeaderEdit { set, add, remove }
}
