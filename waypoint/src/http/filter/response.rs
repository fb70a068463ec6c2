//! What the route changes of a response's head, whoever gave it.

use http::{HeaderMap, HeaderName, HeaderValue, header::SERVER};

use super::super::exchange::Exchange;
use crate::external_authorization;

const SERVICE_TIME: HeaderName = HeaderName::from_static("x-envoy-upstream-service-time");

/// The backend's edits, then the rule's; then what is for the browser.
pub(crate) fn apply(exchange: &Exchange, headers: &mut HeaderMap) {
    if let Some(edit) = &exchange.backend_edit {
        edit.apply_response(headers);
    }
    if let Some(rule) = exchange.rule() {
        rule.response_headers.apply_response(headers);
    }
    for (name, value) in &exchange.cors {
        headers.insert(name.clone(), value.clone());
    }
    if let Some((name, value)) = &exchange.session {
        headers.insert(name.clone(), value.clone());
    }
    for cookie in &exchange.cookies {
        headers.append(http::header::SET_COOKIE, cookie.clone());
    }
    external_authorization::change(headers, &exchange.response_changes);
    let Some(config) = exchange.snapshot.l7.config() else {
        return;
    };
    if let Some(server) = &config.headers.server
        && let Ok(server) = HeaderValue::from_str(server)
    {
        headers.insert(SERVER, server);
    }
    if config.headers.debug_headers
        && let Some(responded) = exchange.responded
    {
        let time = responded.duration_since(exchange.started).as_millis();
        let time = u64::try_from(time).unwrap_or(u64::MAX);
        headers.insert(SERVICE_TIME, HeaderValue::from(time));
    }
}
