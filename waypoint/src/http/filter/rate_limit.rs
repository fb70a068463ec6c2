//! Local rate limits: a bucket per rule, of this replica alone.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use http::{HeaderName, HeaderValue, StatusCode};
use mesh::l7::{
    name::ObjectRef,
    rate_limit::{Bucket, Taken},
    response_flags::Flag,
    route::RateLimit,
};
use parking_lot::Mutex;

use super::super::{exchange::Exchange, reply::Reply};

/// Buckets beyond which those that nothing has asked for an hour are forgotten.
const MANY: usize = 1_024;
const FORGET: Duration = Duration::from_secs(3_600);

const RATELIMITED: HeaderName = HeaderName::from_static("x-envoy-ratelimited");
const LIMIT: HeaderName = HeaderName::from_static("x-ratelimit-limit");
const REMAINING: HeaderName = HeaderName::from_static("x-ratelimit-remaining");
const RESET: HeaderName = HeaderName::from_static("x-ratelimit-reset");

/// The buckets of all rules, by route and position. Bounded by what the control plane tells.
#[derive(Debug)]
pub(crate) struct Buckets {
    began: Instant,
    all: Mutex<HashMap<(ObjectRef, usize), Kept>>,
}

#[derive(Debug)]
struct Kept {
    limit: RateLimit,
    bucket: Bucket,
    asked: Duration,
}

impl Default for Buckets {
    fn default() -> Self {
        Self {
            began: Instant::now(),
            all: Mutex::default(),
        }
    }
}

impl Buckets {
    fn take(&self, key: (ObjectRef, usize), limit: &RateLimit) -> Taken {
        let now = self.began.elapsed();
        let mut all = self.all.lock();
        if all.len() >= MANY && !all.contains_key(&key) {
            all.retain(|_, it| it.asked + FORGET > now);
        }
        let kept = all.entry(key).or_insert_with(|| Kept {
            limit: limit.clone(),
            bucket: Bucket::default(),
            asked: now,
        });
        if kept.limit != *limit {
            kept.limit = limit.clone();
            kept.bucket = Bucket::default();
        }
        kept.asked = now;
        kept.bucket.take(limit, now)
    }
}

/// Takes a token of the rule's bucket, where it has one.
///
/// # Errors
/// The answer to a request for which there is none.
pub(crate) fn apply(exchange: &Exchange) -> Result<(), Box<Reply>> {
    let Some(selected) = &exchange.route else {
        return Ok(());
    };
    let Some(limit) = &selected.rule().rate_limit else {
        return Ok(());
    };
    let buckets = &exchange.connection.waypoint.http.buckets;
    let taken = buckets.take((selected.route.key.clone(), selected.rule), limit);
    if taken.allowed {
        return Ok(());
    }
    let reset = taken.reset.as_millis().div_ceil(1_000);
    let reset = u64::try_from(reset).unwrap_or(u64::MAX);
    let reply = Reply::new(StatusCode::TOO_MANY_REQUESTS, "local_rate_limited")
        .flag(Flag::RateLimited)
        .body("local_rate_limited")
        .header(RATELIMITED, HeaderValue::from_static("true"))
        .header(LIMIT, HeaderValue::from(limit.max_tokens))
        .header(REMAINING, HeaderValue::from(taken.remaining))
        .header(RESET, HeaderValue::from(reset));
    Err(Box::new(reply))
}
