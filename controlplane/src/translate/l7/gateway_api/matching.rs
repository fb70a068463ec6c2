//! Conditions of rules.

use std::collections::HashSet;

use http::{HeaderName, Method};
use mesh::l7::{
    pattern::Pattern,
    route::{HeaderMatch, HttpMatch, PathMatch, QueryMatch, TextMatch},
};

use super::Notes;
use crate::crd::gateway_api::{
    GrpcMethodMatch, GrpcRouteMatch, HttpHeaderMatch, HttpPathMatch, HttpRouteMatch,
};

/// Conditions of an HTTPRoute.
pub(super) fn http(
    rule: usize,
    matches: &[HttpRouteMatch],
    notes: &mut Notes<'_>,
) -> Vec<HttpMatch> {
    let mut all: Vec<HttpMatch> = Vec::new();
    for (index, wanted) in matches.iter().enumerate() {
        let field = format!("matches[{index}]");
        let absent = HttpPathMatch::default();
        let path = path(wanted.path.as_ref().unwrap_or(&absent));
        let method = wanted.method.as_deref().map(method).transpose();
        all.push(HttpMatch {
            path: noted(path, rule, &format!("{field}.path"), notes),
            method: noted(method, rule, &format!("{field}.method"), notes).flatten(),
            headers: headers(rule, &field, &wanted.headers, notes),
            query: query(rule, &field, &wanted.query_params, notes),
            ..HttpMatch::default()
        });
    }
    if all.is_empty() {
        all.push(HttpMatch {
            path: Some(PathMatch::Segments("/".into())),
            ..HttpMatch::default()
        });
    }
    all
}

/// Conditions of a GRPCRoute. Without one, every gRPC request and nothing else.
pub(super) fn grpc(
    rule: usize,
    matches: &[GrpcRouteMatch],
    notes: &mut Notes<'_>,
) -> Vec<HttpMatch> {
    let mut all: Vec<HttpMatch> = Vec::new();
    for (index, wanted) in matches.iter().enumerate() {
        let field = format!("matches[{index}]");
        let method = wanted.method.as_ref().map(grpc_method).transpose();
        all.push(HttpMatch {
            path: noted(method, rule, &format!("{field}.method"), notes).flatten(),
            headers: headers(rule, &field, &wanted.headers, notes),
            grpc: true,
            ..HttpMatch::default()
        });
    }
    if all.is_empty() {
        all.push(HttpMatch {
            grpc: true,
            ..HttpMatch::default()
        });
    }
    all
}

fn noted<T>(read: Result<T, String>, rule: usize, field: &str, notes: &mut Notes<'_>) -> Option<T> {
    read.map_err(|problem| notes.wrong(rule, field, problem))
        .ok()
}

fn path(wanted: &HttpPathMatch) -> Result<PathMatch, String> {
    let value = wanted.value.as_deref().unwrap_or("/");
    let type_ = wanted.type_.as_deref().unwrap_or("PathPrefix");
    let plain = matches!(type_, "Exact" | "PathPrefix");
    if plain && !value.starts_with('/') {
        return Err(format!("{value:?} does not start with a slash"));
    }
    match type_ {
        "Exact" => Ok(PathMatch::Exact(value.into())),
        "PathPrefix" => {
            let value = value.trim_end_matches('/');
            let value = if value.is_empty() { "/" } else { value };
            Ok(PathMatch::Segments(value.into()))
        }
        "RegularExpression" => Ok(PathMatch::Regex(pattern(value)?)),
        other => Err(format!("{other:?} is no type of a path match")),
    }
}

fn method(wanted: &str) -> Result<TextMatch, String> {
    let known = Method::from_bytes(wanted.as_bytes());
    match known {
        Ok(_) => Ok(TextMatch::Exact(wanted.into())),
        Err(_) => Err(format!("{wanted:?} is no method")),
    }
}

/// An expression on a whole text.
pub(super) fn pattern(source: &str) -> Result<Pattern, String> {
    Pattern::new(source).map_err(|error| format!("{source:?} is no usable expression: {error}"))
}

fn text(type_: Option<&str>, value: &str) -> Result<TextMatch, String> {
    match type_.unwrap_or("Exact") {
        "Exact" => Ok(TextMatch::Exact(value.into())),
        "RegularExpression" => Ok(TextMatch::Regex(pattern(value)?)),
        other => Err(format!("{other:?} is no type of a match")),
    }
}

fn headers(
    rule: usize,
    field: &str,
    wanted: &[HttpHeaderMatch],
    notes: &mut Notes<'_>,
) -> Vec<HeaderMatch> {
    let mut all: Vec<HeaderMatch> = Vec::new();
    for (index, header) in wanted.iter().enumerate() {
        let field = format!("{field}.headers[{index}]");
        let name = HeaderName::from_bytes(header.name.as_bytes())
            .map_err(|_| format!("{:?} is no header's name", header.name));
        let value = text(header.type_.as_deref(), &header.value);
        let read = name.and_then(|name| {
            Ok(HeaderMatch {
                name,
                value: value?,
            })
        });
        match noted(read, rule, &field, notes) {
            Some(read) if all.iter().all(|known| known.name != read.name) => all.push(read),
            _ => {}
        }
    }
    all
}

fn query(
    rule: usize,
    field: &str,
    wanted: &[HttpHeaderMatch],
    notes: &mut Notes<'_>,
) -> Vec<QueryMatch> {
    let mut seen = HashSet::new();
    let mut all = Vec::new();
    for (index, parameter) in wanted.iter().enumerate() {
        let field = format!("{field}.queryParams[{index}]");
        let value = text(parameter.type_.as_deref(), &parameter.value);
        let value = noted(value, rule, &field, notes);
        if let Some(value) = value.filter(|_| seen.insert(parameter.name.as_str())) {
            all.push(QueryMatch {
                name: parameter.name.as_str().into(),
                value,
            });
        }
    }
    all
}

fn grpc_method(wanted: &GrpcMethodMatch) -> Result<PathMatch, String> {
    let type_ = wanted.type_.as_deref();
    let part = |part: &Option<String>| {
        let given = part.as_deref().filter(|part| !part.is_empty());
        given.map(|part| text(type_, part)).transpose()
    };
    let (service, method) = (part(&wanted.service)?, part(&wanted.method)?);
    match (&service, &method) {
        (None, None) => Err("neither a service nor a method is given".to_owned()),
        _ => Ok(PathMatch::Grpc { service, method }),
    }
}
