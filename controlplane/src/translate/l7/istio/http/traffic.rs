//! Cross-origin requests, faults and retries.

use std::time::Duration;

use http::StatusCode;
use mesh::l7::route::{Abort, Cors, Fault, OriginMatch, RetryOn, RetryPolicy, TextMatch};

use crate::{
    crd::istio::{self as crd, UnmatchedPreflights},
    translate::l7::istio::read::{duration, interval, per_million, share, text_match},
    validate::Findings,
};

/// Envoy's base of exponential waits.
const BACKOFF: Duration = Duration::from_millis(25);

/// Cross-origin requests.
pub(super) fn cors(it: &crd::CorsPolicy, path: &str, found: &mut Findings) -> Cors {
    let texts = |texts: &[String]| texts.iter().map(|text| text.as_str().into()).collect();
    let mut origins: Vec<OriginMatch> = Vec::new();
    for origin in &it.allow_origin {
        origins.push(match origin.as_str() {
            "*" => OriginMatch::Any,
            text => OriginMatch::Text(TextMatch::Exact(text.into())),
        });
    }
    for (index, origin) in it.allow_origins.iter().enumerate() {
        let read = text_match(origin, &format!("{path}.allowOrigins[{index}]"), found);
        origins.extend(read.map(|read| match read {
            TextMatch::Exact(text) if &*text == "*" => OriginMatch::Any,
            other => OriginMatch::Text(other),
        }));
    }
    let age = duration(it.max_age.as_ref(), &format!("{path}.maxAge"), found);
    Cors {
        allow_origins: origins,
        allow_credentials: it.allow_credentials.unwrap_or_default(),
        allow_methods: texts(&it.allow_methods),
        allow_headers: texts(&it.allow_headers),
        expose_headers: texts(&it.expose_headers),
        max_age: age.map(|age| u32::try_from(age.as_secs()).unwrap_or(u32::MAX)),
        forward_unmatched_preflights: it.unmatched_preflights != UnmatchedPreflights::Ignore,
    }
}

/// Faults on purpose.
pub(super) fn fault(it: &crd::HttpFaultInjection, path: &str, found: &mut Findings) -> Fault {
    if it.delay.is_none() && it.abort.is_none() {
        found.error(path, "needs delay or abort");
    }
    Fault {
        delay: it
            .delay
            .as_ref()
            .and_then(|it| delay(it, &format!("{path}.delay"), found)),
        abort: it
            .abort
            .as_ref()
            .and_then(|it| abort(it, &format!("{path}.abort"), found)),
    }
}

fn delay(it: &crd::FaultDelay, path: &str, found: &mut Findings) -> Option<(u32, Duration)> {
    if it.exponential_delay.is_some() {
        found.error(
            format!("{path}.exponentialDelay"),
            "is not supported; use fixedDelay",
        );
    } else if it.fixed_delay.is_none() {
        found.error(format!("{path}.fixedDelay"), "is missing");
    }
    let older = it.percent.filter(|_| it.percentage.is_none());
    let part = match older {
        Some(percent) => per_million(f64::from(percent), &format!("{path}.percent"), found)?,
        None => given_share(it.percentage.as_ref(), path, found)?,
    };
    let time = interval(
        it.fixed_delay.as_ref(),
        &format!("{path}.fixedDelay"),
        found,
    )?;
    Some((part, time))
}

fn abort(it: &crd::FaultAbort, path: &str, found: &mut Findings) -> Option<(u32, Abort)> {
    let part = given_share(it.percentage.as_ref(), path, found);
    if it.http2_error.is_some() {
        found.error(
            format!("{path}.http2Error"),
            "is not supported; use httpStatus or grpcStatus",
        );
        return None;
    }
    let abort = match (it.http_status, &it.grpc_status) {
        (Some(code), None) => {
            let read = u16::try_from(code)
                .ok()
                .filter(|code| (200..600).contains(code));
            let status = read.and_then(|code| StatusCode::from_u16(code).ok());
            if status.is_none() {
                found.error(
                    format!("{path}.httpStatus"),
                    format!("{code} is no status from 200 to 599"),
                );
            }
            status.map(Abort::Http)
        }
        (None, Some(name)) => {
            let status = grpc_status(name);
            if status.is_none() {
                found.error(
                    format!("{path}.grpcStatus"),
                    format!("{name:?} is no status of gRPC"),
                );
            }
            status.map(Abort::Grpc)
        }
        _ => {
            found.error(path, "needs one of httpStatus and grpcStatus");
            None
        }
    };
    Some((part?, abort?))
}

/// Faults without a percentage concern nobody.
fn given_share(it: Option<&crd::Percent>, path: &str, found: &mut Findings) -> Option<u32> {
    if it.is_none() {
        found.warning(path, "has no percentage: it concerns no request");
        return None;
    }
    share(it, &format!("{path}.percentage"), found)
}

/// By name or number.
fn grpc_status(text: &str) -> Option<u16> {
    const NAMES: [&str; 17] = [
        "OK",
        "CANCELLED",
        "UNKNOWN",
        "INVALID_ARGUMENT",
        "DEADLINE_EXCEEDED",
        "NOT_FOUND",
        "ALREADY_EXISTS",
        "PERMISSION_DENIED",
        "RESOURCE_EXHAUSTED",
        "FAILED_PRECONDITION",
        "ABORTED",
        "OUT_OF_RANGE",
        "UNIMPLEMENTED",
        "INTERNAL",
        "UNAVAILABLE",
        "DATA_LOSS",
        "UNAUTHENTICATED",
    ];
    let by_name = (0u16..).zip(NAMES).find(|(_, name)| *name == text);
    by_name
        .map(|(code, _)| code)
        .or_else(|| text.parse().ok().filter(|code| *code <= 16))
}

/// A user's retries.
pub(super) fn retry(it: &crd::HttpRetry, path: &str, found: &mut Findings) -> RetryPolicy {
    if it.attempts < 0 {
        found.error(format!("{path}.attempts"), "is negative");
    }
    RetryPolicy {
        attempts: u32::try_from(it.attempts).unwrap_or_default(),
        on: retry_on(&it.retry_on, &format!("{path}.retryOn"), found),
        backoff: interval(it.backoff.as_ref(), &format!("{path}.backoff"), found)
            .unwrap_or(BACKOFF),
        per_try_timeout: interval(
            it.per_try_timeout.as_ref(),
            &format!("{path}.perTryTimeout"),
            found,
        ),
        ignore_previous: it.retry_ignore_previous_hosts.unwrap_or(true),
        remote_localities: it.retry_remote_localities.unwrap_or_default(),
    }
}

/// A comma-separated list of conditions; empty: the default ones.
fn retry_on(text: &str, path: &str, found: &mut Findings) -> RetryOn {
    const DEFAULT: &str =
        "connect-failure,refused-stream,unavailable,cancelled,retriable-status-codes";
    let mut on = RetryOn {
        non_idempotent: !text.is_empty(),
        ..RetryOn::default()
    };
    let text = if text.is_empty() { DEFAULT } else { text };
    for word in text
        .split(',')
        .map(str::trim)
        .filter(|word| !word.is_empty())
    {
        match word {
            "5xx" => on.any_5xx = true,
            "gateway-error" => on.gateway_error = true,
            "reset" => on.reset = true,
            "reset-before-request" => on.reset_before_request = true,
            "connect-failure" => on.connect_failure = true,
            "retriable-4xx" => on.retriable_4xx = true,
            "refused-stream" => on.refused_stream = true,
            "cancelled" => on.grpc_statuses.push(1),
            "deadline-exceeded" => on.grpc_statuses.push(4),
            "resource-exhausted" => on.grpc_statuses.push(8),
            "internal" => on.grpc_statuses.push(13),
            "unavailable" => on.grpc_statuses.push(14),
            // The codes stand in the list themselves.
            "retriable-status-codes" => {}
            "envoy-ratelimited" | "retriable-headers" | "http3-post-connect-failure" => {
                found.warning(path, format!("{word:?} has no effect at a waypoint"));
            }
            other => match other
                .parse()
                .ok()
                .and_then(|code| StatusCode::from_u16(code).ok())
            {
                Some(code) => on.status_codes.push(code),
                None => found.error(path, format!("{other:?} is no condition")),
            },
        }
    }
    on.per_try_timeout = on.any_5xx || on.gateway_error || on.reset;
    on
}

/// The retries of the whole mesh (`meshConfig.defaultHttpRetryPolicy`), whose conditions were not chosen for one route.
pub fn default_retry(it: &crd::HttpRetry, found: &mut Findings) -> RetryPolicy {
    let mut policy = retry(it, "defaultHttpRetryPolicy", found);
    policy.on.non_idempotent = false;
    policy
}
