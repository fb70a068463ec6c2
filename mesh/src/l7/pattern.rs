//! Regular expressions with bounded cost: RE2's syntax and linear time, whole-text match.

use std::fmt;

use regex::{Regex, RegexBuilder};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};

/// The longest expression that is accepted, in bytes.
pub const MAX_LENGTH: usize = 1024;
/// The most memory that one compiled expression may use, in bytes.
const MAX_COMPILED: usize = 256 * 1024;

/// An expression that matches a whole text (as Istio's and the Gateway API's do). Equal by its source.
#[derive(Clone)]
pub struct Pattern {
    source: Box<str>,
    regex: Regex,
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
        let regex = RegexBuilder::new(&format!("^(?:{source})$"))
            .size_limit(MAX_COMPILED)
            .dfa_size_limit(MAX_COMPILED)
            .build()
            .map_err(|error| InvalidPattern::Syntax(error.to_string()))?;
        Ok(Self {
            source: source.into(),
            regex,
        })
    }

    /// Whether the whole text matches.
    pub fn matches(&self, text: &str) -> bool {
        self.regex.is_match(text)
    }

    /// The expression as written.
    pub fn source(&self) -> &str {
        &self.source
    }
}

impl PartialEq for Pattern {
    fn eq(&self, other: &Self) -> bool {
        self.source == other.source
    }
}

impl Eq for Pattern {}

impl fmt::Debug for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Pattern({:?})", self.source)
    }
}

impl Serialize for Pattern {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.source)
    }
}

impl<'de> Deserialize<'de> for Pattern {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let source = <std::borrow::Cow<'de, str>>::deserialize(deserializer)?;
        Self::new(&source).map_err(D::Error::custom)
    }
}
