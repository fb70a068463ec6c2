//! Values that several kinds of the Istio API write alike. What means nothing is named by its field.

use std::time::Duration;

use http::{HeaderName, HeaderValue};
use mesh::l7::{pattern::Pattern, route::TextMatch};

use crate::{
    crd::istio::{Percent, StringMatch},
    validate::Findings,
};

/// A duration as protobuf's JSON and Go write them: `1.5s`, `1m30s`, `100ms`.
pub fn parse_duration(text: &str) -> Option<Duration> {
    let mut rest = text;
    let mut total = Duration::ZERO;
    while !rest.is_empty() {
        let after = rest.trim_start_matches(|c: char| c.is_ascii_digit() || c == '.');
        let number: f64 = rest[..rest.len() - after.len()].parse().ok()?;
        let (unit, seconds) = UNITS
            .into_iter()
            .find(|(unit, _)| after.starts_with(unit))?;
        total = total.checked_add(Duration::try_from_secs_f64(number * seconds).ok()?)?;
        rest = &after[unit.len()..];
    }
    (!text.is_empty()).then_some(total)
}

/// Units and their seconds; the longer of two that start alike first.
const UNITS: [(&str, f64); 6] = [
    ("ms", 1e-3),
    ("us", 1e-6),
    ("ns", 1e-9),
    ("h", 3600.0),
    ("m", 60.0),
    ("s", 1.0),
];

/// A duration, where one is given.
pub fn duration(text: Option<&String>, path: &str, found: &mut Findings) -> Option<Duration> {
    let text = text?;
    let read = parse_duration(text);
    if read.is_none() {
        found.error(path, format!("{text:?} is no duration such as 5s"));
    }
    read
}

/// A duration of at least a millisecond.
pub fn interval(text: Option<&String>, path: &str, found: &mut Findings) -> Option<Duration> {
    let read = duration(text, path, found)?;
    if read < Duration::from_millis(1) {
        found.error(path, "is shorter than 1ms");
        return None;
    }
    Some(read)
}

/// A port.
pub fn port(number: u32, path: &str, found: &mut Findings) -> Option<u16> {
    match u16::try_from(number) {
        Ok(port) if port != 0 => Some(port),
        _ => {
            found.error(path, format!("{number} is no port from 1 to 65535"));
            None
        }
    }
}

/// The name of a header.
pub fn header(name: &str, path: &str, found: &mut Findings) -> Option<HeaderName> {
    let read = HeaderName::from_bytes(name.as_bytes()).ok();
    if read.is_none() {
        found.error(path, format!("{name:?} is no header name"));
    }
    read
}

/// The value of a header.
pub fn header_value(value: &str, path: &str, found: &mut Findings) -> Option<HeaderValue> {
    let read = HeaderValue::from_bytes(value.as_bytes()).ok();
    if read.is_none() {
        found.error(path, "is no value of a header");
    }
    read
}

/// A condition on a text; nothing given, or the expression `*`: presence.
pub fn text_match(it: &StringMatch, path: &str, found: &mut Findings) -> Option<TextMatch> {
    let given = [&it.exact, &it.prefix, &it.regex];
    if given.iter().filter(|way| way.is_some()).count() > 1 {
        found.error(path, "only one of exact, prefix and regex may be set");
        return None;
    }
    match it {
        StringMatch {
            exact: Some(text), ..
        } => Some(TextMatch::Exact(text.as_str().into())),
        StringMatch {
            prefix: Some(text), ..
        } if text.is_empty() => {
            found.error(format!("{path}.prefix"), "is empty");
            None
        }
        StringMatch {
            prefix: Some(text), ..
        } => Some(TextMatch::Prefix(text.as_str().into())),
        StringMatch {
            regex: Some(text), ..
        } if text == "*" => Some(TextMatch::Present),
        StringMatch {
            regex: Some(text), ..
        } => pattern(text, &format!("{path}.regex"), found).map(TextMatch::Regex),
        _ => Some(TextMatch::Present),
    }
}

/// An expression.
pub fn pattern(text: &str, path: &str, found: &mut Findings) -> Option<Pattern> {
    match Pattern::new(text) {
        Ok(pattern) => Some(pattern),
        Err(error) => {
            found.error(path, format!("{text:?} is no expression of RE2: {error}"));
            None
        }
    }
}

/// A percentage in parts per million.
pub fn per_million(percent: f64, path: &str, found: &mut Findings) -> Option<u32> {
    if !(0.0..=100.0).contains(&percent) {
        found.error(path, format!("{percent} is no percentage from 0 to 100"));
        return None;
    }
    #[allow(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "0 to 1,000,000 by the check above"
    )]
    Some((percent * 10_000.0).round() as u32)
}

/// A share in parts per million; none: all.
pub fn share(percent: Option<&Percent>, path: &str, found: &mut Findings) -> Option<u32> {
    match percent {
        Some(percent) => per_million(percent.value, &format!("{path}.value"), found),
        None => Some(1_000_000),
    }
}

/// A number that must not be negative; 0: not set.
pub fn limit(number: i32, path: &str, found: &mut Findings) -> Option<u32> {
    match u32::try_from(number) {
        Ok(0) => None,
        Ok(number) => Some(number),
        Err(_) => {
            found.error(path, "is negative");
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_read_as_protobuf_and_go_write_them() {
        let table = [
            ("5s", Some(Duration::from_secs(5))),
            ("1.5s", Some(Duration::from_millis(1500))),
            ("1m30s", Some(Duration::from_secs(90))),
            ("100ms", Some(Duration::from_millis(100))),
            ("0s", Some(Duration::ZERO)),
            ("", None),
            ("5", None),
            ("s", None),
            ("-5s", None),
            ("5 s", None),
            ("9999999999999999999999h", None),
        ];
        for (text, expected) in table {
            assert_eq!(parse_duration(text), expected, "{text:?}");
        }
    }
}
