//! Session persistence (GEP-1619), of rules and of XBackendTrafficPolicy.

use http::HeaderName;
use mesh::l7::route::{SessionCarrier, SessionPersistence};

use super::duration;
use crate::crd::gateway_api;

/// Where the user names none.
const DEFAULT_COOKIE: &str = "leyline-session";
const DEFAULT_HEADER: &str = "x-leyline-session";

/// What keeps a client at its endpoint. The error names the field below `sessionPersistence`, and why.
pub fn session(
    wanted: &gateway_api::SessionPersistence,
) -> Result<SessionPersistence, (&'static str, String)> {
    let absolute_timeout = wanted
        .absolute_timeout
        .as_deref()
        .map(duration)
        .transpose()
        .map_err(|problem| ("absoluteTimeout", problem))?;
    if wanted.idle_timeout.is_some() {
        let problem = "ends of idle sessions are not supported: a session has no memory here";
        return Err(("idleTimeout", problem.to_owned()));
    }
    let carrier = match wanted.type_.as_deref().unwrap_or("Cookie") {
        "Cookie" => cookie(wanted, absolute_timeout.is_some())?,
        "Header" => header(wanted)?,
        other => return Err(("type", format!("{other:?} is neither Cookie nor Header"))),
    };
    Ok(SessionPersistence {
        carrier,
        absolute_timeout,
    })
}

fn cookie(
    wanted: &gateway_api::SessionPersistence,
    ends: bool,
) -> Result<SessionCarrier, (&'static str, String)> {
    let absent = gateway_api::CookieConfig::default();
    let cookie = wanted.cookie.as_ref().or(wanted.cookie_config.as_ref());
    let cookie = cookie.unwrap_or(&absent);
    let permanent = match cookie.lifetime_type.as_deref().unwrap_or("Session") {
        "Session" => false,
        "Permanent" if ends => true,
        "Permanent" => {
            let problem = "a permanent cookie needs it".to_owned();
            return Err(("absoluteTimeout", problem));
        }
        other => {
            let problem = format!("{other:?} is neither Session nor Permanent");
            return Err(("cookie.lifetimeType", problem));
        }
    };
    let name = cookie.name.as_deref().or(wanted.session_name.as_deref());
    let name = name.unwrap_or(DEFAULT_COOKIE);
    let token = |byte: u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte);
    if name.is_empty() || !name.bytes().all(token) {
        return Err(("cookie.name", format!("{name:?} is no cookie's name")));
    }
    Ok(SessionCarrier::Cookie {
        name: name.into(),
        path: cookie.path.as_deref().map(Into::into),
        permanent,
    })
}

fn header(
    wanted: &gateway_api::SessionPersistence,
) -> Result<SessionCarrier, (&'static str, String)> {
    let given = wanted.header.as_ref().and_then(|it| it.name.as_deref());
    let name = given.or(wanted.session_name.as_deref());
    let name = name.unwrap_or(DEFAULT_HEADER);
    HeaderName::from_bytes(name.as_bytes())
        .map(SessionCarrier::Header)
        .map_err(|_| ("header.name", format!("{name:?} is no header's name")))
}
