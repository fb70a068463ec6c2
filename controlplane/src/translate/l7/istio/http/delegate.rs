//! The rules of delegates within their roots.

use crate::crd::istio as crd;

/// A delegate's rule within its root's. `None`: it matches nothing that the root's does.
pub fn under(root: &crd::HttpRoute, child: &crd::HttpRoute) -> Option<crd::HttpRoute> {
    let mut merged = child.clone();
    merged.matches = match (&root.matches[..], &child.matches[..]) {
        ([], matches) | (matches, []) => matches.to_vec(),
        (roots, children) => {
            let pairs = roots
                .iter()
                .flat_map(|root| children.iter().map(move |child| (root, child)));
            let merged: Vec<_> = pairs
                .filter_map(|(root, child)| both(root, child))
                .collect();
            if merged.is_empty() {
                return None;
            }
            merged
        }
    };
    if !root.name.is_empty() {
        merged.name = match child.name.is_empty() {
            true => root.name.clone(),
            false => format!("{}-{}", root.name, child.name),
        };
    }
    let base = root.clone();
    merged.rewrite = merged.rewrite.or(base.rewrite);
    merged.timeout = merged.timeout.or(base.timeout);
    merged.retries = merged.retries.or(base.retries);
    merged.fault = merged.fault.or(base.fault);
    merged.mirror = merged.mirror.or(base.mirror);
    merged.mirror_percentage = merged.mirror_percentage.or(base.mirror_percentage);
    merged.cors_policy = merged.cors_policy.or(base.cors_policy);
    merged.headers = merged.headers.or(base.headers);
    if merged.mirrors.is_empty() {
        merged.mirrors = base.mirrors;
    }
    Some(merged)
}

/// What both conditions ask for. `None`: no request can meet both.
fn both(
    root: &crd::HttpMatchRequest,
    child: &crd::HttpMatchRequest,
) -> Option<crd::HttpMatchRequest> {
    let mut merged = child.clone();
    merged.uri = match (&root.uri, &child.uri) {
        (Some(root), Some(child)) => Some(inner(root, child)?),
        (root, child) => child.clone().or_else(|| root.clone()),
    };
    merged.scheme = same(root.scheme.as_ref(), child.scheme.as_ref())?;
    merged.method = same(root.method.as_ref(), child.method.as_ref())?;
    merged.authority = same(root.authority.as_ref(), child.authority.as_ref())?;
    merged.port = match (root.port, child.port) {
        (Some(root), Some(child)) if root != child => return None,
        (root, child) => child.or(root),
    };
    for (ours, theirs) in [
        (&mut merged.headers, &root.headers),
        (&mut merged.without_headers, &root.without_headers),
        (&mut merged.query_params, &root.query_params),
    ] {
        for (name, value) in theirs {
            if ours
                .insert(name.clone(), value.clone())
                .is_some_and(|own| own != *value)
            {
                return None;
            }
        }
    }
    for (name, value) in &root.source_labels {
        let own = merged.source_labels.insert(name.clone(), value.clone());
        if own.is_some_and(|own| own != *value) {
            return None;
        }
    }
    if merged.source_namespace.is_empty() {
        merged.source_namespace.clone_from(&root.source_namespace);
    } else if !root.source_namespace.is_empty() && root.source_namespace != merged.source_namespace
    {
        return None;
    }
    merged.ignore_uri_case |= root.ignore_uri_case;
    merged.gateways.extend(root.gateways.iter().cloned());
    Some(merged)
}

/// The child's path, if it lies within the root's.
fn inner(root: &crd::StringMatch, child: &crd::StringMatch) -> Option<crd::StringMatch> {
    let text = child.exact.as_ref().or(child.prefix.as_ref());
    let within = match (root, text) {
        (
            crd::StringMatch {
                prefix: Some(prefix),
                ..
            },
            Some(text),
        ) => text.starts_with(prefix.as_str()),
        _ => root == child,
    };
    within.then(|| child.clone())
}

/// One of two conditions, where only one is given or both are equal; `None`: they contradict each other.
#[allow(clippy::option_option, reason = "no condition is not a contradiction")]
fn same(
    root: Option<&crd::StringMatch>,
    child: Option<&crd::StringMatch>,
) -> Option<Option<crd::StringMatch>> {
    match (root, child) {
        (Some(root), Some(child)) if root != child => None,
        (root, child) => Some(child.or(root).cloned()),
    }
}
