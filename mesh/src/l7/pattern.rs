//! Regular expressions with bounded cost: RE2's syntax and linear time, whole-text match.

use std::{
    borrow::Cow,
    fmt,
    sync::{Arc, OnceLock},
};

use regex::{Captures, Regex, RegexBuilder};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};

/// The longest expression that is accepted, in bytes.
pub const MAX_LENGTH: usize = 1024;
/// The most memory that one compiled expression may use, in bytes.
const MAX_COMPILED: usize = 256 * 1024;

/// An expression that matches a whole text (as Istio's and the Gateway API's do). Equal by its source. As small as a
/// pointer: most matches that could hold one hold none.
#[derive(Clone)]
pub struct Pattern(Arc<Compiled>);

struct Compiled {
    source: Box<str>,
    regex: Regex,
    /// The same without anchors, for rewrites: made when it is first asked for.
    within: OnceLock<Option<Regex>>,
}

/// Why an expression is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidPattern {
    /// Longer than [`MAX_LENGTH`].
    #[error("an expression of {0} bytes is longer than {MAX_LENGTH}")]
    TooLong(usize),
    /// Not an expression, or one too large when compiled.
    #[error("{0}")]
    Syntax(String),
}

impl Pattern {
    /// Compiles an expression.
    ///
    /// # Errors
    /// If it is too long, not of RE2's syntax, or too large when compiled.
    pub fn new(source: &str) -> Result<Self, InvalidPattern> {
        if source.len() > MAX_LENGTH {
            return Err(InvalidPattern::TooLong(source.len()));
        }
        // Alone first: `a)|(b` is an expression only inside of the parentheses that anchor it.
        compile(source)?;
        Ok(Self(Arc::new(Compiled {
            source: source.into(),
            regex: compile(&format!("^(?:{source})$"))?,
            within: OnceLock::new(),
        })))
    }

    /// Whether the whole text matches.
    pub fn matches(&self, text: &str) -> bool {
        self.0.regex.is_match(text)
    }

    /// Replaces every match within a text.
    pub(super) fn replace_all<'a>(
        &self,
        text: &'a str,
        replacement: impl Fn(&Captures<'_>) -> String,
    ) -> Cow<'a, str> {
        let Compiled { source, within, .. } = &*self.0;
        match within.get_or_init(|| compile(source).ok()) {
            Some(regex) => regex.replace_all(text, replacement),
            None => text.into(),
        }
    }

    /// The expression as written.
    pub fn source(&self) -> &str {
        &self.0.source
    }
}

fn compile(source: &str) -> Result<Regex, InvalidPattern> {
    RegexBuilder::new(source)
        .size_limit(MAX_COMPILED)
        .dfa_size_limit(MAX_COMPILED)
        .build()
        .map_err(|error| InvalidPattern::Syntax(error.to_string()))
}

impl PartialEq for Pattern {
    fn eq(&self, other: &Self) -> bool {
        self.0.source == other.0.source
    }
}

impl Eq for Pattern {}

impl fmt::Debug for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Pattern({:?})", self.source())
    }
}

impl Serialize for Pattern {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.source())
    }
}

impl<'de> Deserialize<'de> for Pattern {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let source = <std::borrow::Cow<'de, str>>::deserialize(deserializer)?;
        Self::new(&source).map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_expression_matches_the_whole_text_and_nothing_less() {
        let pattern = Pattern::new("a|b+").unwrap();
        for (text, expected) in [("a", true), ("bb", true), ("ab", false), ("a\n", false)] {
            assert_eq!(pattern.matches(text), expected, "{text:?}");
        }
    }

    #[test]
    fn an_expression_cannot_leave_its_anchors() {
        for source in ["a)|(b", "(?x)a #", "(a", "[", r"(a)\1", "(?=a)"] {
            let found = Pattern::new(source);
            assert!(matches!(found, Err(InvalidPattern::Syntax(_))), "{source}");
        }
    }

    #[test]
    fn an_expression_that_costs_too_much_is_refused() {
        let long = "a".repeat(MAX_LENGTH + 1);
        assert_eq!(
            Pattern::new(&long),
            Err(InvalidPattern::TooLong(MAX_LENGTH + 1))
        );
        assert!(matches!(
            Pattern::new(r"(\w{500}){500}"),
            Err(InvalidPattern::Syntax(_))
        ));
    }
}
