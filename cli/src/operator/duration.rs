//! Durations as flags have them: `90s`, `5m`, `1m30s`, `500ms`.

use std::time::Duration;

/// Reads a duration; a number alone is refused, for it says no unit.
pub(crate) fn parse(text: &str) -> Result<Duration, String> {
    let wrong = || format!("{text:?} is no duration such as 90s, 5m or 1m30s");
    let mut total = Duration::ZERO;
    let mut rest = text;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit()).ok_or_else(wrong)?;
        let number: u32 = rest[..digits].parse().map_err(|_| wrong())?;
        let after = &rest[digits..];
        let letters = after
            .find(|c: char| c.is_ascii_digit())
            .unwrap_or(after.len());
        let unit = match &after[..letters] {
            "ms" => Duration::from_millis(1),
            "s" => Duration::from_secs(1),
            "m" => Duration::from_secs(60),
            "h" => Duration::from_secs(3600),
            _ => return Err(wrong()),
        };
        total += unit * number;
        rest = &after[letters..];
    }
    match text.is_empty() {
        true => Err(wrong()),
        false => Ok(total),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_have_units() {
        for (text, seconds) in [
            ("90s", 90.0),
            ("5m", 300.0),
            ("1m30s", 90.0),
            ("500ms", 0.5),
            ("1h", 3600.0),
        ] {
            assert_eq!(
                parse(text).map(|it| it.as_secs_f64()),
                Ok(seconds),
                "{text}"
            );
        }
        for text in ["", "5", "m", "5d", "-1s", "99999999999s"] {
            assert!(parse(text).is_err(), "{text}");
        }
    }
}
