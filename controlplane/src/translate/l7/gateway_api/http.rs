//! HTTPRoute, and what it shares with GRPCRoute.

use std::time::Duration;

use http::StatusCode;
use mesh::l7::route::{
    Action, HttpRule, Order, RetryOn, RetryPolicy, Rules, Timeouts, WeightedBackend,
};

use super::{
    Notes, duration,
    filter::{self, Filters},
    matching, session,
};
use crate::crd::gateway_api::{
    HttpBackendRef, HttpRouteRetry, HttpRouteSpec, HttpRouteTimeouts, SessionPersistence,
};

/// Where the user asks for retries and does not say how many.
const DEFAULT_ATTEMPTS: i32 = 2;
/// The first wait where the user names none (Istio's).
const DEFAULT_BACKOFF: Duration = Duration::from_millis(25);

pub(super) fn rules(spec: &HttpRouteSpec, notes: &mut Notes<'_>) -> Rules {
    let mut rules = Vec::new();
    for (index, wanted) in spec.rules.iter().enumerate() {
        let matches = matching::http(index, &wanted.matches, notes);
        let filters = filter::of_rule(index, &wanted.filters, &matches, notes);
        let session = wanted.session_persistence.as_ref();
        let mut rule = rule(index, &wanted.backend_refs, filters, session, notes);
        rule.name = wanted.name.as_deref().map(Into::into);
        rule.matches = matches;
        rule.timeouts = timeouts(index, wanted.timeouts.as_ref(), notes);
        rule.retry = retry(index, wanted.retry.as_ref(), notes);
        rules.push(closed(index, rule, notes));
    }
    Rules::Http {
        order: Order::Precedence,
        rules,
    }
}

/// A rule without its conditions and times.
pub(super) fn rule(
    index: usize,
    backends: &[HttpBackendRef],
    filters: Filters,
    wanted: Option<&SessionPersistence>,
    notes: &mut Notes<'_>,
) -> HttpRule {
    let session = wanted.and_then(|wanted| match session::session(wanted) {
        Ok(session) => Some(session),
        Err((field, problem)) => {
            notes.wrong(index, &format!("sessionPersistence.{field}"), problem);
            None
        }
    });
    let action = match filters.redirect {
        Some(_) if !backends.is_empty() => {
            let problem = "a rule that redirects forwards to nobody";
            notes.wrong_with(index, "backendRefs", "IncompatibleFilters", problem);
            Action::Forward(Vec::new())
        }
        Some(redirect) => Action::Redirect(redirect),
        None => Action::Forward(weighted(index, backends, notes)),
    };
    HttpRule {
        name: None,
        matches: Vec::new(),
        request_headers: filters.request_headers,
        response_headers: filters.response_headers,
        rewrite: filters.rewrite,
        mirrors: filters.mirrors,
        cors: filters.cors,
        fault: None,
        rate_limit: None,
        external_authorizer: filters.external_authorizer,
        timeouts: Timeouts::default(),
        retry: None,
        session,
        action,
    }
}

/// A rule that cannot be kept is answered 500.
pub(super) fn closed(index: usize, mut rule: HttpRule, notes: &Notes<'_>) -> HttpRule {
    if let Some(problem) = notes.invalid(index) {
        rule.action = Action::Invalid(problem);
    }
    rule
}

fn weighted(
    rule: usize,
    backends: &[HttpBackendRef],
    notes: &mut Notes<'_>,
) -> Vec<WeightedBackend> {
    let mut all = Vec::new();
    for (index, wanted) in backends.iter().enumerate() {
        let filters = filter::of_backend(rule, index, &wanted.filters, notes);
        all.push(WeightedBackend {
            weight: notes.weight(rule, index, wanted),
            backend: notes.backend(&wanted.object()),
            request_headers: filters.request_headers,
            response_headers: filters.response_headers,
            rewrite: filters.rewrite,
            redirect: filters.redirect,
            mirrors: filters.mirrors,
        });
    }
    all
}

fn timeouts(rule: usize, wanted: Option<&HttpRouteTimeouts>, notes: &mut Notes<'_>) -> Timeouts {
    let Some(wanted) = wanted else {
        return Timeouts::default();
    };
    // 0 s: without a limit.
    let mut read = |field: &str, text: Option<&String>| match duration(text?) {
        Ok(time) => Some(time).filter(|time| !time.is_zero()),
        Err(problem) => {
            notes.wrong(rule, &format!("timeouts.{field}"), problem);
            None
        }
    };
    let request = read("request", wanted.request.as_ref());
    let per_try = read("backendRequest", wanted.backend_request.as_ref());
    if let (Some(whole), Some(one)) = (request, per_try)
        && one > whole
    {
        let problem = "is longer than the whole request's";
        notes.wrong(rule, "timeouts.backendRequest", problem);
    }
    Timeouts { request, per_try }
}

fn retry(
    rule: usize,
    wanted: Option<&HttpRouteRetry>,
    notes: &mut Notes<'_>,
) -> Option<RetryPolicy> {
    let wanted = wanted?;
    let mut status_codes = Vec::new();
    for (index, code) in wanted.codes.iter().enumerate() {
        let status = u16::try_from(*code)
            .ok()
            .and_then(|code| StatusCode::from_u16(code).ok());
        match status.filter(|status| status.is_client_error() || status.is_server_error()) {
            Some(status) => status_codes.push(status),
            None => {
                let field = format!("retry.codes[{index}]");
                notes.wrong(rule, &field, format!("{code} is none of 400 to 599"));
            }
        }
    }
    let attempts = wanted.attempts.unwrap_or(DEFAULT_ATTEMPTS);
    let attempts = u32::try_from(attempts).unwrap_or_else(|_| {
        notes.wrong(rule, "retry.attempts", format!("{attempts} is less than 0"));
        0
    });
    let backoff = match wanted.backoff.as_deref().map(duration).transpose() {
        Ok(backoff) => backoff.unwrap_or(DEFAULT_BACKOFF),
        Err(problem) => {
            notes.wrong(rule, "retry.backoff", problem);
            DEFAULT_BACKOFF
        }
    };
    Some(RetryPolicy {
        attempts,
        on: RetryOn {
            connect_failure: true,
            refused_stream: true,
            reset: true,
            per_try_timeout: true,
            status_codes,
            non_idempotent: true,
            ..RetryOn::default()
        },
        backoff,
        per_try_timeout: None,
        ignore_previous: true,
        remote_localities: false,
    })
}
