//! Points in time as text: UTC, proleptic Gregorian, without a clock.

use std::{
    fmt::Write,
    time::{Duration, SystemTime},
};

const MONTHS: [&str; 12] = [
    "Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec",
];

/// A point in time, taken apart. Before 1970: 1970.
pub(super) struct Date {
    since_1970: Duration,
    year: u64,
    month: u64,
    day: u64,
}

impl Date {
    pub(super) fn of(time: SystemTime) -> Self {
        let since_1970 = time
            .duration_since(SystemTime::UNIX_EPOCH)
            .unwrap_or_default();
        let (year, month, day) = civil(since_1970.as_secs() / 86_400);
        Self {
            since_1970,
            year,
            month,
            day,
        }
    }

    pub(super) fn rfc3339(&self) -> String {
        format!(
            "{}T{}.{:03}Z",
            self.day(),
            self.clock(),
            self.since_1970.subsec_millis()
        )
    }

    fn day(&self) -> String {
        format!("{:04}-{:02}-{:02}", self.year, self.month, self.day)
    }

    fn clock(&self) -> String {
        let [hour, minute, second] = self.time();
        format!("{hour:02}:{minute:02}:{second:02}")
    }

    fn time(&self) -> [u64; 3] {
        let second = self.since_1970.as_secs() % 86_400;
        [second / 3600, second / 60 % 60, second % 60]
    }

    fn month_name(&self) -> &'static str {
        let at = usize::try_from(self.month.saturating_sub(1)).unwrap_or_default();
        MONTHS.get(at).copied().unwrap_or_default()
    }

    /// By the conversions of `strftime` that logs use, and Envoy's: `%s` seconds since 1970; `%f` the nanoseconds,
    /// `%3f` the milliseconds and so on. Others stay as they are.
    pub(super) fn format(&self, format: &str) -> String {
        let mut text = String::new();
        let mut chars = format.chars().peekable();
        while let Some(char) = chars.next() {
            if char != '%' {
                text.push(char);
                continue;
            }
            let digits = chars.next_if(char::is_ascii_digit);
            match chars.next() {
                Some(conversion) => self.convert(conversion, digits, &mut text),
                None => text.push('%'),
            }
        }
        text
    }

    fn convert(&self, conversion: char, digits: Option<char>, text: &mut String) {
        let [hour, minute, second] = self.time();
        let digit = digits.and_then(|it| it.to_digit(10)).map(|it| it.min(9));
        let written = match conversion {
            'Y' => write!(text, "{:04}", self.year),
            'm' => write!(text, "{:02}", self.month),
            'd' => write!(text, "{:02}", self.day),
            'H' => write!(text, "{hour:02}"),
            'M' => write!(text, "{minute:02}"),
            'S' => write!(text, "{second:02}"),
            'F' => write!(text, "{}", self.day()),
            'T' => write!(text, "{}", self.clock()),
            'b' => write!(text, "{}", self.month_name()),
            'y' => write!(text, "{:02}", self.year % 100),
            'Z' => write!(text, "UTC"),
            'z' => write!(text, "+0000"),
            's' => write!(text, "{}", self.since_1970.as_secs()),
            'f' => write!(text, "{}", self.fraction(digit.unwrap_or(9))),
            '%' => write!(text, "%"),
            other => write!(
                text,
                "%{}{other}",
                digits.map(String::from).unwrap_or_default()
            ),
        };
        debug_assert!(written.is_ok(), "a String takes everything");
    }

    fn fraction(&self, digits: u32) -> String {
        let nanos = format!("{:09}", self.since_1970.subsec_nanos());
        let digits = usize::try_from(digits).unwrap_or(9);
        nanos[..digits.min(9)].to_owned()
    }
}

/// Year, month and day of a day since 1970 (the algorithm of Howard Hinnant, "chrono-compatible date algorithms").
fn civil(days: u64) -> (u64, u64, u64) {
    let shifted = days + 719_468;
    let era = shifted / 146_097;
    let of_era = shifted % 146_097;
    let year_of_era = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 {
        shifted_month + 3
    } else {
        shifted_month - 9
    };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    (year, month, day)
}
