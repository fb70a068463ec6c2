//! Limits of a route's requests: an annotation of HTTPRoutes, GRPCRoutes and VirtualServices, as neither API has a field for them.

use std::time::Duration;

use mesh::l7::route::{Action, RateLimit, Rules};
use serde::Deserialize;

use super::istio::read::parse_duration;
use crate::object::Meta;

/// Each rule of the route has a bucket of its own, at each replica of a waypoint:
/// `{"maxTokens": 100, "tokensPerFill": 10, "fillInterval": "1s"}`.
pub const ANNOTATION: &str = "leyline.dev/local-rate-limit";

/// Envoy's own bound, below which its buckets are filled no more often.
const SHORTEST: Duration = Duration::from_millis(50);

/// As Envoy's token buckets have it.
#[derive(Deserialize)]
#[serde(
    rename_all = "camelCase",
    deny_unknown_fields,
    expecting = "an object with maxTokens, tokensPerFill and fillInterval"
)]
struct Written {
    max_tokens: u32,
    #[serde(default = "one")]
    tokens_per_fill: u32,
    fill_interval: String,
}

fn one() -> u32 {
    1
}

/// The field that mistakes are told of.
pub fn path() -> String {
    format!("metadata.annotations[{ANNOTATION:?}]")
}

/// What a route says of itself; an error is what is wrong with it.
pub fn of(meta: &Meta) -> Result<Option<RateLimit>, String> {
    meta.annotation(ANNOTATION).map(|it| read(it)).transpose()
}

fn read(text: &str) -> Result<RateLimit, String> {
    let written: Written = serde_json::from_str(text).map_err(|error| error.to_string())?;
    let interval = parse_duration(&written.fill_interval).filter(|it| *it >= SHORTEST);
    let interval = interval.ok_or("fillInterval is no duration from 50ms on, such as 1s")?;
    if written.max_tokens == 0 || written.tokens_per_fill == 0 {
        return Err("maxTokens and tokensPerFill are at least 1".to_owned());
    }
    Ok(RateLimit {
        max_tokens: written.max_tokens,
        tokens_per_fill: written.tokens_per_fill,
        fill_interval: interval,
    })
}

/// Limits each rule of HTTP. A limit that cannot be kept spoils the rules: whoever asks for it counts on it.
pub fn apply(rules: &mut Rules, limit: &Result<Option<RateLimit>, String>) {
    let Rules::Http { rules, .. } = rules else {
        return;
    };
    for rule in rules {
        match limit {
            Ok(limit) => rule.rate_limit.clone_from(limit),
            Err(problem) => rule.action = Action::Invalid(format!("{}: {problem}", path()).into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bucket_is_read_as_envoys_is_written() {
        let whole = r#"{"maxTokens": 100, "tokensPerFill": 10, "fillInterval": "1.5s"}"#;
        let expected = RateLimit {
            max_tokens: 100,
            tokens_per_fill: 10,
            fill_interval: Duration::from_millis(1500),
        };
        assert_eq!(read(whole), Ok(expected));
        let short = read(r#"{"maxTokens": 5, "fillInterval": "50ms"}"#).unwrap();
        assert_eq!(short.tokens_per_fill, 1);
    }

    #[test]
    fn what_is_no_bucket_is_told() {
        for (text, problem) in [
            ("100/s", "expected an object with maxTokens"),
            ("{}", "missing field `maxTokens`"),
            (r#"{"maxTokens": 1}"#, "missing field `fillInterval`"),
            (r#"{"maxTokens": 1, "fillInterval": "1"}"#, "fillInterval"),
            (
                r#"{"maxTokens": 1, "fillInterval": "49ms"}"#,
                "fillInterval",
            ),
            (r#"{"maxTokens": 0, "fillInterval": "1s"}"#, "at least 1"),
            (
                r#"{"maxTokens": -1, "fillInterval": "1s"}"#,
                "invalid value",
            ),
            (
                r#"{"maxTokens": 1, "fillInterval": "1s", "key": "x"}"#,
                "unknown field `key`",
            ),
        ] {
            let told = read(text).unwrap_err();
            assert!(told.contains(problem), "{text}: {told}");
        }
    }
}
