//! Cross-origin requests: what a browser is told.

use http::{
    HeaderMap, HeaderName, HeaderValue, Method,
    header::{
        ACCESS_CONTROL_ALLOW_CREDENTIALS, ACCESS_CONTROL_ALLOW_HEADERS,
        ACCESS_CONTROL_ALLOW_METHODS, ACCESS_CONTROL_ALLOW_ORIGIN, ACCESS_CONTROL_EXPOSE_HEADERS,
        ACCESS_CONTROL_MAX_AGE, ACCESS_CONTROL_REQUEST_HEADERS, ACCESS_CONTROL_REQUEST_METHOD,
        ORIGIN, VARY,
    },
};

use super::{
    condition::text_holds,
    request::RequestFacts,
    route::{Cors, OriginMatch},
};
use crate::names::Str;

/// What becomes of a request by a rule's CORS policy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CorsDecision {
    /// Forwarded; these take the place of such headers of the response. Empty: the response is not touched.
    Forward(HeaderMap),
    /// A preflight, answered with 200 and these headers; without any if it does not match.
    Preflight(HeaderMap),
}

/// Whether a request is a preflight: OPTIONS with an origin and the method that is asked for.
pub fn is_preflight(method: &Method, headers: &HeaderMap) -> bool {
    *method == Method::OPTIONS
        && headers.contains_key(ORIGIN)
        && headers.contains_key(ACCESS_CONTROL_REQUEST_METHOD)
}

/// Decides on a request by the policy of its rule.
pub fn decide(cors: &Cors, facts: &RequestFacts<'_>) -> CorsDecision {
    let origin = facts.headers.get(ORIGIN);
    let allowed = origin.filter(|it| it.to_str().is_ok_and(|it| allows(cors, it)));
    let preflight = is_preflight(facts.method, facts.headers);
    match allowed {
        Some(origin) if preflight => {
            CorsDecision::Preflight(preflight_headers(cors, origin, facts))
        }
        Some(origin) => CorsDecision::Forward(response_headers(cors, origin)),
        None if preflight && !cors.forward_unmatched_preflights => {
            CorsDecision::Preflight(HeaderMap::new())
        }
        None => CorsDecision::Forward(HeaderMap::new()),
    }
}

fn allows(cors: &Cors, origin: &str) -> bool {
    cors.allow_origins.iter().any(|it| match it {
        OriginMatch::Any => true,
        OriginMatch::Wildcard(pattern) => wildcard(pattern, origin),
        OriginMatch::Text(text) => text_holds(text, origin),
    })
}

/// `*` stands for one or more characters but a slash; scheme and host know no case.
fn wildcard(pattern: &str, origin: &str) -> bool {
    if pattern == "*" {
        return true;
    }
    let (pattern, origin) = (pattern.to_ascii_lowercase(), origin.to_ascii_lowercase());
    let Some((start, end)) = pattern.split_once('*') else {
        return pattern == origin;
    };
    let middle = origin
        .strip_prefix(start)
        .and_then(|rest| rest.strip_suffix(end));
    middle.is_some_and(|it| !it.is_empty() && !it.contains('/'))
}

/// Any origin is told as `*` only where no credentials are; else the one that asked, for which answers then vary.
fn origin_headers(cors: &Cors, origin: &HeaderValue) -> HeaderMap {
    let any = cors.allow_origins.contains(&OriginMatch::Any) && !cors.allow_credentials;
    let mut headers = HeaderMap::new();
    if any {
        headers.insert(ACCESS_CONTROL_ALLOW_ORIGIN, HeaderValue::from_static("*"));
    } else {
        headers.insert(ACCESS_CONTROL_ALLOW_ORIGIN, origin.clone());
        headers.insert(VARY, HeaderValue::from_static("origin"));
    }
    if cors.allow_credentials {
        headers.insert(
            ACCESS_CONTROL_ALLOW_CREDENTIALS,
            HeaderValue::from_static("true"),
        );
    }
    headers
}

fn response_headers(cors: &Cors, origin: &HeaderValue) -> HeaderMap {
    let mut headers = origin_headers(cors, origin);
    put(
        &mut headers,
        ACCESS_CONTROL_EXPOSE_HEADERS,
        &cors.expose_headers,
    );
    headers
}

fn preflight_headers(cors: &Cors, origin: &HeaderValue, facts: &RequestFacts<'_>) -> HeaderMap {
    let mut headers = origin_headers(cors, origin);
    for (name, allowed, asked) in [
        (
            ACCESS_CONTROL_ALLOW_METHODS,
            &cors.allow_methods,
            ACCESS_CONTROL_REQUEST_METHOD,
        ),
        (
            ACCESS_CONTROL_ALLOW_HEADERS,
            &cors.allow_headers,
            ACCESS_CONTROL_REQUEST_HEADERS,
        ),
    ] {
        // With credentials a browser takes `*` for a name: what it asked for is named instead.
        let any = allowed.iter().any(|it| **it == *"*") && cors.allow_credentials;
        match facts.headers.get(asked) {
            Some(asked) if any => {
                headers.insert(name, asked.clone());
            }
            _ => put(&mut headers, name, allowed),
        }
    }
    if let Some(age) = cors.max_age {
        headers.insert(ACCESS_CONTROL_MAX_AGE, HeaderValue::from(age));
    }
    headers
}

/// Names joined by commas; none: no header.
fn put(headers: &mut HeaderMap, name: HeaderName, values: &[Str]) {
    let joined = values.join(", ");
    if let Ok(value) = HeaderValue::try_from(joined)
        && !values.is_empty()
    {
        headers.insert(name, value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::l7::{
        fixture::{Request, get},
        route::TextMatch,
    };

    fn cors(origins: Vec<OriginMatch>) -> Cors {
        Cors {
            allow_origins: origins,
            allow_methods: vec!["GET".into(), "PUT".into()],
            allow_headers: vec!["x-a".into(), "x-b".into()],
            expose_headers: vec!["x-c".into()],
            max_age: Some(5),
            ..Cors::default()
        }
    }

    fn from(origin: &str) -> Request {
        get("/").with("origin", origin)
    }

    fn preflight(origin: &str) -> Request {
        let request = Request {
            method: Method::OPTIONS,
            ..from(origin)
        };
        request
            .with("access-control-request-method", "DELETE")
            .with("access-control-request-headers", "x-z")
    }

    fn text(headers: &HeaderMap) -> Vec<String> {
        let lines = headers.iter();
        let lines = lines.map(|(name, value)| format!("{name}: {}", value.to_str().unwrap()));
        let mut lines: Vec<_> = lines.collect();
        lines.sort();
        lines
    }

    #[track_caller]
    fn told(decision: &CorsDecision, preflight: bool, expected: &[&str]) {
        let headers = match (decision, preflight) {
            (CorsDecision::Forward(it), false) | (CorsDecision::Preflight(it), true) => it,
            other => panic!("{other:?}"),
        };
        assert_eq!(text(headers), expected);
    }

    #[test]
    fn origins_are_matched_as_they_are_written() {
        let wild = |it: &str| OriginMatch::Wildcard(it.into());
        let exact = OriginMatch::Text(TextMatch::Exact("https://a.x".into()));
        for (matcher, origin, expected) in [
            (OriginMatch::Any, "https://a.x", true),
            (wild("*"), "null", true),
            (wild("https://*.x"), "https://a.b.x", true),
            (wild("https://*.x"), "HTTPS://A.X", true),
            (wild("https://*.x"), "https://.x", false),
            (wild("https://*.x"), "https://evil/.x", false),
            (wild("https://*.x"), "http://a.x", false),
            (wild("https://*.x"), "https://a.x:8443", false),
            (wild("https://a.x"), "https://a.x", true),
            (wild("https://a.x"), "https://a.x.evil", false),
            (exact.clone(), "https://a.x", true),
            (exact, "https://b.x", false),
        ] {
            let found = allows(&cors(vec![matcher.clone()]), origin);
            assert_eq!(found, expected, "{matcher:?} {origin}");
        }
        assert!(!allows(&cors(vec![]), "https://a.x"));
    }

    #[test]
    fn a_response_to_an_allowed_origin_tells_it() {
        let any = decide(&cors(vec![OriginMatch::Any]), &from("https://a.x").facts());
        let headers = [
            "access-control-allow-origin: *",
            "access-control-expose-headers: x-c",
        ];
        told(&any, false, &headers);
        let credentials = Cors {
            allow_credentials: true,
            ..cors(vec![OriginMatch::Any])
        };
        let decision = decide(&credentials, &from("https://a.x").facts());
        let headers = [
            "access-control-allow-credentials: true",
            "access-control-allow-origin: https://a.x",
            "access-control-expose-headers: x-c",
            "vary: origin",
        ];
        told(&decision, false, &headers);
    }

    #[test]
    fn a_preflight_of_an_allowed_origin_is_answered() {
        let some = cors(vec![OriginMatch::Wildcard("https://*.x".into())]);
        let headers = [
            "access-control-allow-headers: x-a, x-b",
            "access-control-allow-methods: GET, PUT",
            "access-control-allow-origin: https://a.x",
            "access-control-max-age: 5",
            "vary: origin",
        ];
        told(
            &decide(&some, &preflight("https://a.x").facts()),
            true,
            &headers,
        );
        let all = Cors {
            allow_credentials: true,
            allow_methods: vec!["*".into()],
            allow_headers: vec!["*".into()],
            ..some
        };
        let headers = [
            "access-control-allow-credentials: true",
            "access-control-allow-headers: x-z",
            "access-control-allow-methods: DELETE",
            "access-control-allow-origin: https://a.x",
            "access-control-max-age: 5",
            "vary: origin",
        ];
        told(
            &decide(&all, &preflight("https://a.x").facts()),
            true,
            &headers,
        );
    }

    #[test]
    fn an_origin_that_is_not_allowed_is_told_nothing() {
        let some = cors(vec![OriginMatch::Text(TextMatch::Exact(
            "https://a.x".into(),
        ))]);
        told(&decide(&some, &from("https://b.x").facts()), false, &[]);
        told(&decide(&some, &get("/").facts()), false, &[]);
        told(&decide(&some, &preflight("https://b.x").facts()), true, &[]);
        let forward = Cors {
            forward_unmatched_preflights: true,
            ..some
        };
        told(
            &decide(&forward, &preflight("https://b.x").facts()),
            false,
            &[],
        );
    }
}
