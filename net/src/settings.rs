//! Reads settings through an injected lookup and remembers every bad one, so that all are told at once.

mod remote;

use std::{fmt, path::Path, str::FromStr, time::Duration};

pub use remote::{Remote, RemoteError, RootCert, Token};

use crate::log;

/// Where a setting's text comes from; the process environment in production, a map in tests.
pub type Lookup<'a> = &'a dyn Fn(&str) -> Option<String>;

/// One setting that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BadSetting {
    /// Name of the variable or file.
    pub name: String,
    /// What is wrong with it, and what would be right.
    pub problem: String,
}

/// Every setting that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub struct ConfigError(pub Vec<BadSetting>);

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("bad settings:")?;
        for BadSetting { name, problem } in &self.0 {
            write!(f, "\n  {name}: {problem}")?;
        }
        Ok(())
    }
}

/// A variable of the process's environment. Bytes that are no text are replaced, so that what would parse is refused by
/// name instead of passed over.
pub fn variable(name: &str) -> Option<String> {
    let text = std::env::var_os(name)?;
    Some(text.to_string_lossy().into_owned())
}

/// Reads settings one by one, and keeps what is wrong with them for the end.
pub struct Reader<'a> {
    lookup: Lookup<'a>,
    names: &'a [String],
    bad: Vec<BadSetting>,
}

impl<'a> Reader<'a> {
    /// `names`: every variable that is set, for the settings that are families of names.
    pub fn new(lookup: Lookup<'a>, names: &'a [String]) -> Self {
        Self {
            lookup,
            names,
            bad: Vec::new(),
        }
    }

    /// The family of variables that begin with `prefix`: what follows it, and the text.
    pub fn family(&self, prefix: &str) -> Vec<(String, String)> {
        let rest = |name: &String| Some((name.strip_prefix(prefix)?.to_owned(), self.text(name)?));
        self.names.iter().filter_map(rest).collect()
    }

    /// What was read, unless something was wrong.
    ///
    /// # Errors
    /// Every bad setting at once.
    pub fn finish<T>(self, config: T) -> Result<T, ConfigError> {
        if self.bad.is_empty() {
            Ok(config)
        } else {
            Err(ConfigError(self.bad))
        }
    }

    /// Remembers that a setting cannot be used; once, where it is read more often.
    pub fn reject(&mut self, name: &str, problem: impl Into<String>) {
        let bad = BadSetting {
            name: name.to_owned(),
            problem: problem.into(),
        };
        if !self.bad.contains(&bad) {
            self.bad.push(bad);
        }
    }

    /// Directives of a log filter, or `info`.
    pub fn log_filter(&mut self, name: &str) -> String {
        let filter = self.parse_with(name, |text| match log::check(text) {
            Ok(()) => Ok(text.to_owned()),
            Err(error) => Err(error.to_string()),
        });
        filter.unwrap_or_else(|| log::Options::default().filter)
    }

    /// The text, also where it is empty.
    pub fn text(&self, name: &str) -> Option<String> {
        (self.lookup)(name)
    }

    /// The text, where it is not empty.
    pub fn some_text(&self, name: &str) -> Option<String> {
        self.text(name).filter(|text| !text.is_empty())
    }

    /// The text, or `default` where the setting is absent.
    pub fn text_or(&self, name: &str, default: &str) -> String {
        self.text(name).unwrap_or_else(|| default.to_owned())
    }

    /// The value, where there is a text; one that does not parse is a bad setting.
    pub fn parse<T: FromStr<Err: fmt::Display>>(&mut self, name: &str) -> Option<T> {
        self.parse_with(name, |text| text.parse().map_err(|e: T::Err| e.to_string()))
    }

    /// The value, or `default` where there is none.
    pub fn parse_or<T: FromStr<Err: fmt::Display>>(&mut self, name: &str, default: T) -> T {
        self.parse(name).unwrap_or(default)
    }

    /// As [`Reader::parse`], by a parser of one's own.
    pub fn parse_with<T>(
        &mut self,
        name: &str,
        parse: impl FnOnce(&str) -> Result<T, String>,
    ) -> Option<T> {
        let text = self.some_text(name)?;
        match parse(text.trim()) {
            Ok(value) => Some(value),
            Err(problem) => {
                self.reject(name, format!("{text:?}: {problem}"));
                None
            }
        }
    }

    /// `true` or `false`, or `default`.
    pub fn flag(&mut self, name: &str, default: bool) -> bool {
        self.optional_flag(name).unwrap_or(default)
    }

    /// `true` or `false`, where it is set.
    pub fn optional_flag(&mut self, name: &str) -> Option<bool> {
        self.parse_with(name, |text| match text {
            "true" => Ok(true),
            "false" => Ok(false),
            _ => Err("true or false expected".to_owned()),
        })
    }

    /// A duration, where it is set.
    pub fn duration(&mut self, name: &str) -> Option<Duration> {
        self.parse_with(name, parse_duration)
    }

    /// A duration, or `default`.
    pub fn duration_or(&mut self, name: &str, default: Duration) -> Duration {
        self.duration(name).unwrap_or(default)
    }

    /// A file that may be absent; unreadable for another reason is a bad setting.
    pub fn optional_file(&mut self, path: &Path) -> Option<String> {
        match std::fs::read_to_string(path) {
            Ok(text) => Some(text),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => None,
            Err(e) => {
                self.reject(&path.display().to_string(), e.to_string());
                None
            }
        }
    }
}

/// Durations as Go writes them: `5s`, `1h30m`, `1.5m`, `250ms`.
///
/// # Errors
/// What would be right.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    const FORM: &str = "a duration such as 5s, 3m or 1h30m expected";
    let mut rest = text;
    let mut total = Duration::ZERO;
    if rest.is_empty() {
        return Err(FORM.to_owned());
    }
    while !rest.is_empty() {
        let number_len = rest
            .find(|c: char| !c.is_ascii_digit() && c != '.')
            .ok_or(FORM)?;
        let (number, tail) = rest.split_at(number_len);
        let unit_len = tail
            .find(|c: char| c.is_ascii_digit() || c == '.')
            .unwrap_or(tail.len());
        let (unit, tail) = tail.split_at(unit_len);
        let seconds = match unit {
            "ms" => 0.001,
            "s" => 1.0,
            "m" => 60.0,
            "h" => 3600.0,
            "d" => 86400.0,
            _ => return Err(FORM.to_owned()),
        };
        let number: f64 = number.parse().map_err(|_| FORM.to_owned())?;
        let part = Duration::try_from_secs_f64(number * seconds).map_err(|e| e.to_string())?;
        total = total.checked_add(part).ok_or("too long")?;
        rest = tail;
    }
    Ok(total)
}

/// A quantity of processors as Kubernetes writes it (`2`, `1.5`, `500m`), rounded up.
///
/// # Errors
/// What would be right.
pub fn parse_cpus(text: &str) -> Result<usize, String> {
    const FORM: &str = "a number of processors such as 2, 1.5 or 500m expected";
    let (number, divisor) = match text.strip_suffix('m') {
        Some(number) => (number, 1000.0),
        None => (text, 1.0),
    };
    let number: f64 = number.parse().map_err(|_| FORM.to_owned())?;
    let cpus = (number / divisor).ceil();
    if !(0.0..=65536.0).contains(&cpus) {
        return Err(FORM.to_owned());
    }
    (0..=65536_u32)
        .find(|n| f64::from(*n) >= cpus)
        .map(|n| n as usize)
        .ok_or_else(|| FORM.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_read_as_go_writes_them() {
        for (text, expected_ms) in [
            ("5s", Some(5_000)),
            ("1h30m", Some(5_400_000)),
            ("250ms", Some(250)),
            ("1.5m", Some(90_000)),
            ("24h", Some(86_400_000)),
            ("", None),
            ("5", None),
            ("s", None),
            ("5 s", None),
            ("-5s", None),
        ] {
            let read = parse_duration(text).ok().map(|d| d.as_millis());
            assert_eq!(read, expected_ms, "{text:?}");
        }
    }

    #[test]
    fn processors_round_up() {
        for (text, expected) in [
            ("2", Some(2)),
            ("1.5", Some(2)),
            ("500m", Some(1)),
            ("2500m", Some(3)),
            ("0", Some(0)),
            ("-1", None),
            ("two", None),
        ] {
            assert_eq!(parse_cpus(text).ok(), expected, "{text:?}");
        }
    }
}
