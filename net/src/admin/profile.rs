//! `/debug/pprof/*`: the paths that operators' tools ask. No profiler is built in: sampling a running process from outside
//! costs nothing until it is done, and sees the kernel too. So a good question is answered with how to do that.

use std::ops::RangeInclusive;

use axum::{Router, extract::RawQuery, http::StatusCode, response::IntoResponse, routing::any};

/// How long a profile may take, in seconds, and what is taken where nothing is said.
const SECONDS: (RangeInclusive<u32>, u32) = (1..=300, 10);
/// How often a sample may be taken, in hertz.
const FREQUENCY: (RangeInclusive<u32>, u32) = (1..=1000, 100);

pub(super) const INDEX: [(&str, &str); 3] = [
    ("/debug/pprof/profile", "how to take a profile of the CPU"),
    ("/debug/pprof/heap", "how to take a profile of the heap"),
    (
        "/debug/pprof/heap/profiling",
        "whether the heap is profiled",
    ),
];

pub(super) fn routes() -> Router {
    Router::new()
        .route("/debug/pprof/profile", any(profile))
        .route("/debug/pprof/heap", any(heap))
        .route("/debug/pprof/heap/profiling", any(heap_profiling))
}

type Answer = (StatusCode, String);

async fn profile(RawQuery(query): RawQuery) -> Answer {
    let query = query.unwrap_or_default();
    let read = number(&query, "seconds", &SECONDS)
        .and_then(|seconds| Ok((seconds, number(&query, "frequency", &FREQUENCY)?)));
    match read {
        Ok((seconds, frequency)) => (StatusCode::NOT_IMPLEMENTED, advice(seconds, frequency)),
        Err(problem) => (StatusCode::BAD_REQUEST, format!("{problem}\n")),
    }
}

fn advice(seconds: u32, frequency: u32) -> String {
    let pid = std::process::id();
    format!(
        "no profiler is built in; on the node, where this process has the number {pid} in its own namespace:\n  \
         perf record --call-graph fp -F {frequency} -p PID -- sleep {seconds}\n"
    )
}

async fn heap() -> impl IntoResponse {
    let text =
        "the heap is not profiled: the allocator is built without that; /metrics has its size\n";
    (StatusCode::INTERNAL_SERVER_ERROR, text)
}

async fn heap_profiling(RawQuery(query): RawQuery) -> Answer {
    let inactive = "heap profiling active: false\n".to_owned();
    match value(query.as_deref().unwrap_or_default(), "activate") {
        None | Some("false") => (StatusCode::OK, inactive),
        Some("true") => (
            StatusCode::INTERNAL_SERVER_ERROR,
            format!("the allocator is built without profiling\n{inactive}"),
        ),
        Some(other) => (
            StatusCode::BAD_REQUEST,
            format!("activate={other}: true or false expected\n"),
        ),
    }
}

fn value<'a>(query: &'a str, key: &str) -> Option<&'a str> {
    let pairs = query.split('&').filter_map(|pair| pair.split_once('='));
    pairs
        .filter(|(name, _)| *name == key)
        .map(|(_, value)| value)
        .next()
}

fn number(
    query: &str,
    key: &str,
    (allowed, default): &(RangeInclusive<u32>, u32),
) -> Result<u32, String> {
    let Some(text) = value(query, key) else {
        return Ok(*default);
    };
    let read = text.parse().ok().filter(|it| allowed.contains(it));
    read.ok_or_else(|| {
        let (least, most) = (allowed.start(), allowed.end());
        format!("{key}={text}: {least} to {most} expected")
    })
}
