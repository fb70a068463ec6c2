//! Whether a request is sent again: the policy's conditions, what is known to be safe, the budget.

use std::time::Duration;

use http::{Method, Response, header::RETRY_AFTER};
use mesh::{
    draw::Draw,
    l7::{response_flags::Flag, route::RetryPolicy},
};

use super::{
    arriving::Arriving,
    exchange::Exchange,
    failure::{Cause, Failed},
    forward::{Outgoing, Reached},
    grpc,
    plan::Plan,
};

/// The longest wait that an endpoint may ask for.
const LONGEST_WAIT: Duration = Duration::from_secs(10);

/// The tries of one request.
pub(super) struct Retries<'a> {
    plan: &'a Plan,
    idempotent: bool,
    made: u32,
    wanted: bool,
    counted: bool,
}

impl<'a> Retries<'a> {
    pub(super) fn new(plan: &'a Plan, outgoing: &Outgoing) -> Self {
        Self {
            plan,
            idempotent: is_idempotent(&outgoing.method),
            made: 0,
            wanted: false,
            counted: false,
        }
    }

    /// How long to wait before another try; none: there is none.
    pub(super) fn again(&mut self, outcome: &Result<Reached, Box<Failed>>) -> Option<Duration> {
        let policy = &self.plan.retry;
        if policy.attempts == 0 || !self.matches(policy, outcome) {
            return None;
        }
        self.wanted = true;
        let asked = match outcome {
            Ok(reached) => asked_wait(&reached.response)?,
            Err(_) => None,
        };
        if self.made >= policy.attempts || !self.plan.cluster.may_retry(&self.plan.members) {
            return None;
        }
        self.made += 1;
        self.counted = true;
        Some(asked.unwrap_or_else(|| backoff(policy, self.made, Draw(rand::random()))))
    }

    /// Tells that no retry was left for a failure that asks for one.
    pub(super) fn settle(&self, exchange: &mut Exchange, outcome: &Result<Reached, Box<Failed>>) {
        let policy = &self.plan.retry;
        if self.counted && self.wanted && self.matches(policy, outcome) {
            exchange.flag(Flag::RetryLimitExceeded);
        }
    }

    fn matches(&self, policy: &RetryPolicy, outcome: &Result<Reached, Box<Failed>>) -> bool {
        match outcome {
            Ok(reached) => self.response_matches(policy, &reached.response),
            Err(failed) => self.failure_matches(policy, &failed.cause),
        }
    }

    fn response_matches(&self, policy: &RetryPolicy, response: &Response<Arriving>) -> bool {
        let on = &policy.on;
        let status = response.status();
        let grpc = grpc::status(response.headers());
        if grpc.is_some_and(|it| on.grpc_statuses.contains(&it)) {
            // A call that was refused by its status alone; the user's policy, or one that says it was not processed.
            return true;
        }
        let wanted = on.any_5xx && status.is_server_error()
            || on.gateway_error && matches!(status.as_u16(), 502..=504)
            || on.retriable_4xx && status.as_u16() == 409
            || on.status_codes.contains(&status);
        wanted && self.safe(policy)
    }

    fn failure_matches(&self, policy: &RetryPolicy, cause: &Cause) -> bool {
        let on = &policy.on;
        match cause {
            Cause::Connect(_) => on.connect_failure || on.any_5xx || on.gateway_error,
            Cause::Refused(_) => on.refused_stream || on.connect_failure || on.any_5xx,
            // RFC 9112 9.3.1: a client may send an idempotent request again by itself.
            Cause::Stale(_) => self.safe(policy),
            Cause::Reset { sent, .. } => {
                let wanted = on.reset || on.any_5xx || on.reset_before_request && !sent;
                wanted && self.safe(policy)
            }
            Cause::PerTryTimeout => {
                let wanted = on.per_try_timeout || on.any_5xx || on.gateway_error;
                wanted && self.safe(policy)
            }
            Cause::Protocol(_)
            | Cause::Ambiguous
            | Cause::Unavailable(_)
            | Cause::Deadline
            | Cause::Idle
            | Cause::Client => false,
        }
    }

    /// Whether it may be processed twice.
    fn safe(&self, policy: &RetryPolicy) -> bool {
        self.idempotent || policy.on.non_idempotent
    }
}

/// RFC 9110 9.2.2.
fn is_idempotent(method: &Method) -> bool {
    matches!(
        *method,
        Method::GET | Method::HEAD | Method::OPTIONS | Method::PUT | Method::DELETE
    )
}

/// The wait that the endpoint asks for, if any (RFC 9110 10.2.3, gRPC "pushback"); outer none: it wants no retry, or
/// not before long.
#[expect(clippy::option_option, reason = "no retry is not the same as no wish")]
fn asked_wait(response: &Response<Arriving>) -> Option<Option<Duration>> {
    let headers = response.headers();
    if let Some(pushback) = headers.get("grpc-retry-pushback-ms") {
        let millis: i64 = pushback.to_str().ok()?.parse().ok()?;
        let wait = Duration::from_millis(u64::try_from(millis).ok()?);
        return (wait <= LONGEST_WAIT).then_some(Some(wait));
    }
    let after = headers.get(RETRY_AFTER).and_then(|it| it.to_str().ok());
    match after.and_then(|it| it.trim().parse().ok()) {
        Some(seconds) => {
            let wait = Duration::from_secs(seconds);
            (wait <= LONGEST_WAIT).then_some(Some(wait))
        }
        None => Some(None),
    }
}

/// Doubles with each retry up to ten times the first, and is drawn below that ("full jitter").
fn backoff(policy: &RetryPolicy, retry: u32, draw: Draw) -> Duration {
    let factor = 1_u32
        .checked_shl(retry.saturating_sub(1))
        .unwrap_or(10)
        .min(10);
    let most = policy.backoff.saturating_mul(factor).as_micros();
    let most = u64::try_from(most).unwrap_or(u64::MAX);
    Duration::from_micros(draw.below(most.saturating_add(1)).unwrap_or(0))
}
