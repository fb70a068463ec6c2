//! Whether one match of a rule holds for a request.

use std::borrow::Cow;

use http::{HeaderMap, HeaderName, header::HOST};

use super::{
    request::RequestFacts,
    route::{HttpMatch, PathMatch, TextMatch},
};

/// What of the path a match took, for rewrites and redirects that replace it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Matched {
    /// No condition on the path.
    Nothing,
    /// So many bytes, whole segments.
    Segments(usize),
    /// So many bytes of text.
    Prefix(usize),
    /// All of it.
    Whole,
}

#[cfg(test)]
thread_local! {
    /// How often conditions were asked on this thread.
    pub(super) static ASKED: std::cell::Cell<usize> = const { std::cell::Cell::new(0) };
}

/// Whether all conditions hold, and what of the path they took.
pub fn holds(conditions: &HttpMatch, facts: &RequestFacts<'_>) -> Option<Matched> {
    #[cfg(test)]
    ASKED.set(ASKED.get() + 1);
    let connection = &facts.connection;
    let source = conditions.source.as_ref();
    let cheap = conditions.port.is_none_or(|it| it == connection.port)
        && optional(conditions.method.as_ref(), facts.method.as_str())
        && optional(conditions.scheme.as_ref(), facts.scheme)
        && (!conditions.grpc || facts.http2 && facts.is_grpc())
        && source.is_none_or(|it| it.holds(connection));
    if !cheap || !authority_holds(conditions.authority.as_ref(), facts.authority) {
        return None;
    }
    let matched = path(conditions, facts.path)?;
    let rest = conditions
        .headers
        .iter()
        .all(|it| header(&it.name, &it.value, facts) == Some(true))
        && conditions
            .without_headers
            .iter()
            .all(|it| !without(&it.name, &it.value, facts))
        && query_holds(conditions, facts)
        && claims_hold(conditions, facts);
    rest.then_some(matched)
}

fn optional(condition: Option<&TextMatch>, text: &str) -> bool {
    condition.is_none_or(|it| text_holds(it, text))
}

/// Whether a text that is there fits.
pub fn text_holds(condition: &TextMatch, text: &str) -> bool {
    match condition {
        TextMatch::Exact(it) => **it == *text,
        TextMatch::Prefix(it) => text.starts_with(&**it),
        TextMatch::Regex(it) => it.matches(text),
        TextMatch::Present => true,
    }
}

/// Host names know no case.
fn authority_holds(condition: Option<&TextMatch>, authority: &str) -> bool {
    match condition {
        Some(TextMatch::Exact(it)) => it.eq_ignore_ascii_case(authority),
        Some(TextMatch::Prefix(it)) => starts_without_case(authority, it),
        other => optional(other, authority),
    }
}

fn starts_without_case(text: &str, prefix: &str) -> bool {
    text.as_bytes()
        .get(..prefix.len())
        .is_some_and(|start| start.eq_ignore_ascii_case(prefix.as_bytes()))
}

fn path(conditions: &HttpMatch, path: &str) -> Option<Matched> {
    let Some(condition) = &conditions.path else {
        return Some(Matched::Nothing);
    };
    let any_case = conditions.ignore_path_case;
    match condition {
        PathMatch::Exact(it) if any_case => it.eq_ignore_ascii_case(path),
        PathMatch::Exact(it) => **it == *path,
        PathMatch::Segments(it) => return segments(it, path, any_case),
        PathMatch::Prefix(it) if any_case => {
            return starts_without_case(path, it).then_some(Matched::Prefix(it.len()));
        }
        PathMatch::Prefix(it) => {
            return path.starts_with(&**it).then_some(Matched::Prefix(it.len()));
        }
        PathMatch::Regex(it) => it.matches(path),
        PathMatch::Grpc { service, method } => {
            let (called, its_method) = grpc_path(path)?;
            optional(service.as_ref(), called) && optional(method.as_ref(), its_method)
        }
    }
    .then_some(Matched::Whole)
}

/// `/service/method`.
fn grpc_path(path: &str) -> Option<(&str, &str)> {
    let (service, method) = path.strip_prefix('/')?.split_once('/')?;
    (!service.is_empty() && !method.contains('/')).then_some((service, method))
}

/// Whether `prefix` ends where a segment of the path does.
fn segments(prefix: &str, path: &str, any_case: bool) -> Option<Matched> {
    let prefix = prefix.strip_suffix('/').unwrap_or(prefix);
    let starts = if any_case {
        starts_without_case(path, prefix)
    } else {
        path.starts_with(prefix)
    };
    let boundary = matches!(path.as_bytes().get(prefix.len()), None | Some(b'/'));
    (starts && boundary).then_some(Matched::Segments(prefix.len()))
}

/// The values of a header, joined by commas; of `host`, the request's host if it is not there.
pub(super) fn header_value<'a>(
    headers: &'a HeaderMap,
    name: &HeaderName,
    authority: &'a str,
) -> Option<Cow<'a, [u8]>> {
    let mut values = headers.get_all(name).iter();
    let Some(first) = values.next() else {
        return (name == HOST).then(|| authority.as_bytes().into());
    };
    let mut joined = Cow::Borrowed(first.as_bytes());
    for value in values {
        let joined = joined.to_mut();
        joined.push(b',');
        joined.extend_from_slice(value.as_bytes());
    }
    Some(joined)
}

/// None: there is no such header.
fn header(name: &HeaderName, condition: &TextMatch, facts: &RequestFacts<'_>) -> Option<bool> {
    let value = header_value(facts.headers, name, facts.authority)?;
    Some(match condition {
        TextMatch::Present => true,
        TextMatch::Exact(it) => *it.as_bytes() == *value,
        TextMatch::Prefix(it) => value.starts_with(it.as_bytes()),
        TextMatch::Regex(it) => std::str::from_utf8(&value).is_ok_and(|text| it.matches(text)),
    })
}

/// A header that is not there counts as an empty one, but for presence.
fn without(name: &HeaderName, condition: &TextMatch, facts: &RequestFacts<'_>) -> bool {
    header(name, condition, facts)
        .unwrap_or_else(|| *condition != TextMatch::Present && text_holds(condition, ""))
}

fn query_holds(conditions: &HttpMatch, facts: &RequestFacts<'_>) -> bool {
    conditions.query.iter().all(|it| {
        parameter(facts.query.unwrap_or_default(), &it.name)
            .is_some_and(|value| text_holds(&it.value, &value))
    })
}

/// The first value of a query's parameter, percent-decoded.
pub fn parameter<'a>(query: &'a str, name: &str) -> Option<Cow<'a, str>> {
    let mut pairs = query
        .split('&')
        .map(|pair| pair.split_once('=').unwrap_or((pair, "")));
    let (_, value) = pairs.find(|(key, _)| decode(key) == name)?;
    Some(decode(value))
}

/// Percent-decoded; bytes that are not UTF-8 become U+FFFD, broken escapes stay.
fn decode(text: &str) -> Cow<'_, str> {
    if !text.contains('%') {
        return text.into();
    }
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, after)) = rest.split_first() {
        match escaped(rest) {
            Some(byte) => {
                bytes.push(byte);
                rest = &rest[3..];
            }
            None => {
                bytes.push(first);
                rest = after;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned().into()
}

/// The byte of a `%XX` at the start.
pub(super) fn escaped(text: &[u8]) -> Option<u8> {
    let digit = |at: usize| text.get(at).and_then(|it| char::from(*it).to_digit(16));
    let value = (*text.first()? == b'%').then_some(digit(1)? * 16 + digit(2)?)?;
    u8::try_from(value).ok()
}

fn claims_hold(conditions: &HttpMatch, facts: &RequestFacts<'_>) -> bool {
    conditions.claims.iter().all(|(path, condition)| {
        facts
            .claims
            .is_some_and(|it| it.texts(path).any(|text| text_holds(condition, &text)))
    })
}
