//! Where tokens are in a request: found, and taken out.

use std::sync::LazyLock;

use http::{HeaderMap, HeaderValue, Uri, header, request::Parts, uri::PathAndQuery};
use mesh::l7::request_authentication::{JwtRule, TokenPlace};

/// Where tokens are looked for if a rule says nothing.
static DEFAULT: LazyLock<[TokenPlace; 2]> = LazyLock::new(|| {
    [
        TokenPlace::Header {
            name: header::AUTHORIZATION,
            prefix: "Bearer ".into(),
        },
        TokenPlace::Query("access_token".into()),
    ]
});

/// The places of a rule.
pub(super) fn of(rule: &JwtRule) -> &[TokenPlace] {
    match rule.from.is_empty() {
        true => &*DEFAULT,
        false => &rule.from,
    }
}

/// All tokens at a place, in order.
pub(super) fn find(place: &TokenPlace, parts: &Parts) -> Vec<String> {
    match place {
        TokenPlace::Header { name, prefix } => {
            let values = parts.headers.get_all(name).iter();
            let values = values.filter_map(|value| value.to_str().ok());
            let tokens = values.filter_map(|value| after(value, prefix));
            tokens.map(str::to_owned).collect()
        }
        TokenPlace::Query(name) => {
            let pairs = parts.uri.query().unwrap_or_default().split('&');
            let values = pairs.filter_map(|pair| named(pair, name));
            values.map(str::to_owned).collect()
        }
        TokenPlace::Cookie(name) => {
            let values = parts.headers.get_all(header::COOKIE).iter();
            let values = values.filter_map(|value| value.to_str().ok());
            let pairs = values.flat_map(|value| value.split(';'));
            let values = pairs.filter_map(|pair| named(pair.trim(), name));
            values.map(|it| it.trim_matches('"').to_owned()).collect()
        }
    }
}

/// Schemes of HTTP authentication have no case (RFC 9110, 11.1); neither have prefixes here, so that none slips by.
fn after<'a>(value: &'a str, prefix: &str) -> Option<&'a str> {
    let start = value.get(..prefix.len())?;
    start
        .eq_ignore_ascii_case(prefix)
        .then(|| value[prefix.len()..].trim())
}

fn named<'a>(pair: &'a str, name: &str) -> Option<&'a str> {
    pair.strip_prefix(name)?.strip_prefix('=')
}

/// Takes a token out of its place.
pub(super) fn remove(place: &TokenPlace, parts: &mut Parts) {
    match place {
        TokenPlace::Header { name, .. } => drop(parts.headers.remove(name)),
        TokenPlace::Query(name) => {
            if let Some(uri) = without_parameter(&parts.uri, name) {
                parts.uri = uri;
            }
        }
        TokenPlace::Cookie(name) => remove_cookie(&mut parts.headers, name),
    }
}

/// None: it stays as it is.
fn without_parameter(uri: &Uri, name: &str) -> Option<Uri> {
    let pairs = uri.query()?.split('&');
    let kept: Vec<_> = pairs.filter(|pair| named(pair, name).is_none()).collect();
    let text = match kept.is_empty() {
        true => uri.path().to_owned(),
        false => format!("{}?{}", uri.path(), kept.join("&")),
    };
    let mut new = uri.clone().into_parts();
    new.path_and_query = Some(PathAndQuery::try_from(text).ok()?);
    Uri::from_parts(new).ok()
}

fn remove_cookie(headers: &mut HeaderMap, name: &str) {
    let all: Vec<_> = headers.get_all(header::COOKIE).iter().cloned().collect();
    headers.remove(header::COOKIE);
    for value in all {
        let Ok(text) = value.to_str() else {
            headers.append(header::COOKIE, value);
            continue;
        };
        let pairs = text.split(';').map(str::trim);
        let kept: Vec<_> = pairs.filter(|pair| named(pair, name).is_none()).collect();
        if let (false, Ok(value)) = (kept.is_empty(), HeaderValue::try_from(kept.join("; "))) {
            headers.append(header::COOKIE, value);
        }
    }
}
