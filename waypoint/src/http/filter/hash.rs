//! What of a request decides on its endpoint, where a service's endpoints are chosen by a hash.

use std::fmt::Write as _;

use http::{HeaderMap, HeaderValue, header::COOKIE, request::Parts};
use mesh::{
    draw::Draw,
    l7::{
        backend::{Balancer, HashKey},
        balance, condition,
    },
};

use super::super::exchange::Exchange;

/// The request's hash; none: there is nothing to hash. A cookie that is missing may be made.
pub(crate) fn of_request(
    exchange: &mut Exchange,
    parts: &Parts,
    balancer: &Balancer,
) -> Option<u64> {
    let Balancer::ConsistentHash { key, .. } = balancer else {
        return None;
    };
    match key {
        HashKey::Header(name) => {
            let value = parts.headers.get(name)?;
            Some(balance::hash(value.as_bytes()))
        }
        HashKey::SourceIp => {
            let address = exchange.connection.client.ip().to_string();
            Some(balance::hash(address.as_bytes()))
        }
        HashKey::Query(name) => {
            let value = condition::parameter(parts.uri.query()?, name)?;
            Some(balance::hash(value.as_bytes()))
        }
        HashKey::Cookie { name, ttl, .. } => {
            if let Some(value) = cookie(&parts.headers, name) {
                return Some(balance::hash(value.as_bytes()));
            }
            ttl.as_ref()?;
            let value = made(exchange.draw());
            exchange.cookies.extend(set_cookie(key, &value));
            Some(balance::hash(value.as_bytes()))
        }
    }
}

fn made(draw: Draw) -> String {
    let (high, low) = draw.split();
    format!("{:016x}{:016x}", high.0, low.0)
}

fn set_cookie(key: &HashKey, value: &str) -> Option<HeaderValue> {
    let HashKey::Cookie {
        name,
        path,
        ttl,
        attributes,
    } = key
    else {
        return None;
    };
    let mut text = format!("{name}=\"{value}\"");
    if let Some(ttl) = ttl.filter(|it| !it.is_zero()) {
        let _ = write!(text, "; Max-Age={}", ttl.as_secs());
    }
    if let Some(path) = path {
        let _ = write!(text, "; Path={path}");
    }
    for (name, value) in attributes {
        let _ = match value {
            Some(value) => write!(text, "; {name}={value}"),
            None => write!(text, "; {name}"),
        };
    }
    text.push_str("; HttpOnly");
    HeaderValue::try_from(text).ok()
}

/// The value of a cookie, without the quotes that may be around it (RFC 6265 4.2).
pub(crate) fn cookie<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    let lines = headers.get_all(COOKIE).iter();
    let pairs = lines
        .filter_map(|it| it.to_str().ok())
        .flat_map(|it| it.split(';'));
    let mut values = pairs.filter_map(|it| {
        let (found, value) = it.trim().split_once('=')?;
        (found == name).then_some(value)
    });
    let value = values.next()?;
    let unquoted = value.strip_prefix('"').and_then(|it| it.strip_suffix('"'));
    Some(unquoted.unwrap_or(value))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_cookie_is_found_among_others() {
        let mut headers = HeaderMap::new();
        headers.append(COOKIE, HeaderValue::from_static("a=1; user=\"x y\"; b=2"));
        headers.append(COOKIE, HeaderValue::from_static("late=3"));
        assert_eq!(cookie(&headers, "user"), Some("x y"));
        assert_eq!(cookie(&headers, "late"), Some("3"));
        assert_eq!(cookie(&headers, "use"), None);
    }

    #[test]
    fn a_made_cookie_has_what_the_policy_says() {
        let key = |ttl| HashKey::Cookie {
            name: "user".into(),
            path: Some("/p".into()),
            ttl: Some(Duration::from_secs(ttl)),
            attributes: vec![("SameSite".into(), Some("Lax".into()))],
        };
        assert_eq!(
            set_cookie(&key(60), "v").unwrap(),
            "user=\"v\"; Max-Age=60; Path=/p; SameSite=Lax; HttpOnly"
        );
        assert_eq!(
            set_cookie(&key(0), "v").unwrap(),
            "user=\"v\"; Path=/p; SameSite=Lax; HttpOnly"
        );
    }
}
