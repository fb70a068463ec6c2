//! Keeps a client at its endpoint (Gateway API SessionPersistence, GEP-1619).
//!
//! A cookie or header names the endpoint by a digest (see `EndpointState::token`) and, with an absolute time-out, the
//! second at which the session ends: `TOKEN` or `TOKEN.SECONDS`. It survives new weights: the backend that has the
//! endpoint is taken, as long as it has any weight. A token whose endpoint is gone is as none. The end is not sealed:
//! a client that writes another one only keeps its own session for longer.

use std::{
    fmt::Write as _,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use http::{HeaderMap, HeaderValue};
use mesh::l7::route::{SessionCarrier, SessionPersistence, WeightedBackend};

use super::{
    super::{
        action,
        exchange::Exchange,
        upstream::{endpoint::EndpointState, members::Members},
    },
    hash::cookie,
};

/// A client's session.
pub(crate) struct Session {
    persistence: SessionPersistence,
    /// The token of its endpoint; none: it begins.
    pub(crate) endpoint: Option<String>,
    ends: Option<u64>,
}

/// The session of a request, where the rule keeps one, else the service.
pub(crate) fn of_request(
    exchange: &Exchange,
    headers: &HeaderMap,
    members: &Members,
) -> Option<Session> {
    let rule = exchange.rule().and_then(|it| it.session.as_ref());
    let persistence = rule.or(members.policy.session.as_ref())?.clone();
    let (endpoint, ends) = match read(&persistence, headers, now()) {
        Some((token, ends)) => (Some(token.to_owned()), ends),
        None => (None, None),
    };
    Some(Session {
        persistence,
        endpoint,
        ends,
    })
}

/// The backend of a rule that has the endpoint of the request's session.
pub(crate) fn backend<'a>(
    exchange: &Exchange,
    headers: &HeaderMap,
    backends: &'a [WeightedBackend],
) -> Option<&'a WeightedBackend> {
    let persistence = exchange.rule()?.session.as_ref()?;
    let (token, _) = read(persistence, headers, now())?;
    backends.iter().filter(|it| it.weight > 0).find(|it| {
        let Ok(key) = action::cluster(&exchange.connection, &it.backend) else {
            return false;
        };
        let upstreams = &exchange.connection.waypoint.http.upstreams;
        let members = upstreams.cluster(&key).members(&exchange.snapshot);
        members.of_session(token).is_some()
    })
}

fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.unwrap_or(Duration::ZERO).as_secs()
}

/// The token that a request carries and when its session ends; none: there is none, or it is over.
fn read<'a>(
    persistence: &SessionPersistence,
    headers: &'a HeaderMap,
    now: u64,
) -> Option<(&'a str, Option<u64>)> {
    let text = match &persistence.carrier {
        SessionCarrier::Cookie { name, .. } => cookie(headers, name)?,
        SessionCarrier::Header(name) => headers.get(name)?.to_str().ok()?,
    };
    let (token, ends) = match text.split_once('.') {
        Some((token, ends)) => (token, Some(ends.parse().ok()?)),
        None => (text, None),
    };
    match (persistence.absolute_timeout, ends) {
        (Some(_), None) => None,
        (Some(_), Some(ends)) if ends <= now => None,
        _ => Some((token, ends)),
    }
}

impl Session {
    /// Tells the client of the endpoint that it has, where that is news.
    pub(crate) fn keep(
        &self,
        exchange: &mut Exchange,
        members: &Members,
        endpoint: &Arc<EndpointState>,
    ) {
        let Some(service) = &members.service else {
            return;
        };
        let token = endpoint.token(service);
        if self.endpoint.as_deref() == Some(token) {
            return;
        }
        let timeout = self.persistence.absolute_timeout;
        // A session that has to move keeps its end.
        let ends = timeout.map(|it| self.ends.unwrap_or_else(|| now() + it.as_secs()));
        let value = match ends {
            Some(ends) => format!("{token}.{ends}"),
            None => token.to_owned(),
        };
        match &self.persistence.carrier {
            SessionCarrier::Cookie {
                name,
                path,
                permanent,
            } => {
                let mut text = format!("{name}={value}; Path={}", path.as_deref().unwrap_or("/"));
                if let (true, Some(ends)) = (*permanent, ends) {
                    let _ = write!(text, "; Max-Age={}", ends.saturating_sub(now()));
                }
                text.push_str("; HttpOnly");
                exchange.cookies.extend(HeaderValue::try_from(text));
            }
            SessionCarrier::Header(name) => {
                if let Ok(value) = HeaderValue::try_from(value) {
                    exchange.session = Some((name.clone(), value));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn persistence(timeout: Option<u64>) -> SessionPersistence {
        SessionPersistence {
            carrier: SessionCarrier::Header("x-session".parse().unwrap()),
            absolute_timeout: timeout.map(Duration::from_secs),
        }
    }

    #[test]
    fn a_session_is_over_at_its_end() {
        let rows = [
            (None, "abc", Some(("abc", None))),
            (Some(60), "abc", None),
            (Some(60), "abc.1001", Some(("abc", Some(1001)))),
            (Some(60), "abc.1000", None),
            (Some(60), "abc.x", None),
        ];
        for (timeout, text, expected) in rows {
            let mut headers = HeaderMap::new();
            headers.insert("x-session", HeaderValue::from_static(text));
            let read = read(&persistence(timeout), &headers, 1000);
            assert_eq!(read, expected, "{text} {timeout:?}");
        }
    }
}
