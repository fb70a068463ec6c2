//! Durations as the Gateway API writes them (GEP-2257): `1h30m`, `500ms`.

use std::time::Duration;

/// Reads a duration: one to four groups of one to five digits with `h`, `m`, `s` or `ms`.
pub fn duration(text: &str) -> Result<Duration, String> {
    let refused = || format!("{text:?} is no duration such as 1h, 30s or 500ms");
    let mut rest = text;
    let mut total = Duration::ZERO;
    let mut groups = 0;
    while !rest.is_empty() {
        let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
        let (number, unit) = rest.split_at(digits);
        if !(1..=5).contains(&digits) || groups == 4 {
            return Err(refused());
        }
        let number: u64 = number.parse().map_err(|_| refused())?;
        let (value, left) = match unit {
            unit if unit.starts_with("ms") => (Duration::from_millis(number), &unit[2..]),
            unit if unit.starts_with('h') => (Duration::from_secs(number * 3600), &unit[1..]),
            unit if unit.starts_with('m') => (Duration::from_secs(number * 60), &unit[1..]),
            unit if unit.starts_with('s') => (Duration::from_secs(number), &unit[1..]),
            _ => return Err(refused()),
        };
        total += value;
        groups += 1;
        rest = left;
    }
    match groups {
        0 => Err(refused()),
        _ => Ok(total),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_those_of_gep_2257() {
        let good = [
            ("0s", 0),
            ("1h30m", 5_400_000),
            ("500ms", 500),
            ("1m1s1ms", 61_001),
            ("99999h", 359_996_400_000),
        ];
        for (text, millis) in good {
            assert_eq!(duration(text), Ok(Duration::from_millis(millis)), "{text}");
        }
        for text in [
            "",
            "1",
            "s",
            "1.5s",
            "-1s",
            "100000s",
            "1s1s1s1s1s",
            "1d",
            "1 s",
        ] {
            assert!(duration(text).is_err(), "{text}");
        }
    }
}
