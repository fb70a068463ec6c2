//! The part of CEL that filters of access logs, tags of metrics and log operators use: attributes, literals,
//! comparisons, logic, and a few functions on texts. What is beyond it is refused when it is parsed.

mod attribute;
mod parse;
#[cfg(test)]
mod tests;

use std::{
    borrow::Cow,
    cmp::Ordering,
    fmt,
    time::{Duration, SystemTime},
};

pub use attribute::{Attribute, Wanted};
use regex::Regex;

use super::record::RequestRecord;
use crate::names::Str;

/// The longest expression that is accepted, in bytes.
pub const MAX_LENGTH: usize = 2048;

/// A parsed expression. Equal by its source.
#[derive(Clone, Debug)]
pub struct Expression {
    source: Str,
    root: Node,
}

/// Why an expression is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidExpression {
    /// Longer than [`MAX_LENGTH`], or nested too deeply.
    #[error("the expression is too long or nested too deeply")]
    TooLarge,
    /// Something else was expected at this byte.
    #[error("at {at}: expected {expected}")]
    Syntax {
        /// Byte offset.
        at: usize,
        /// What was expected.
        expected: &'static str,
    },
    /// An attribute that does not exist, or that a waypoint does not know.
    #[error("attribute {0:?} is not supported")]
    Attribute(String),
    /// A function that is not supported.
    #[error("function {0:?} is not supported")]
    Function(String),
    /// A regular expression that cannot be used.
    #[error("regular expression: {0}")]
    Regex(String),
}

/// A value of an expression.
#[derive(Clone, Debug, PartialEq)]
pub enum Value<'a> {
    /// A truth value.
    Bool(bool),
    /// A whole number.
    Int(i64),
    /// A number.
    Double(f64),
    /// A text.
    Text(Cow<'a, str>),
    /// A time span.
    Duration(Duration),
    /// A point in time.
    Time(SystemTime),
}

impl fmt::Display for Value<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bool(value) => value.fmt(f),
            Self::Int(value) => value.fmt(f),
            Self::Double(value) => value.fmt(f),
            Self::Text(value) => value.fmt(f),
            Self::Duration(value) => write!(f, "{}s", value.as_secs_f64()),
            Self::Time(value) => f.write_str(&super::log_format::rfc3339(*value)),
        }
    }
}

/// A number as CEL has it; beyond its range the largest.
pub(super) fn int<T: TryInto<i64>>(value: T) -> Value<'static> {
    Value::Int(value.try_into().unwrap_or(i64::MAX))
}

#[derive(Clone, Debug)]
enum Node {
    Literal(Value<'static>),
    Attribute(Attribute),
    Has(Attribute),
    List(Vec<Node>),
    Not(Box<Node>),
    Negative(Box<Node>),
    Binary(Operator, Box<(Node, Node)>),
    Choice(Box<(Node, Node, Node)>),
    Method(Method, Box<(Node, Node)>),
    Matches(Box<Node>, Regex),
    Size(Box<Node>),
    ToText(Box<Node>),
    ToInt(Box<Node>),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Operator {
    Or,
    And,
    Equal,
    Unequal,
    Less,
    AtMost,
    Greater,
    AtLeast,
    In,
    Plus,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Method {
    Contains,
    StartsWith,
    EndsWith,
}

impl Expression {
    /// Parses a text.
    ///
    /// # Errors
    /// See [`InvalidExpression`].
    pub fn parse(source: &str) -> Result<Self, InvalidExpression> {
        Ok(Self {
            source: source.into(),
            root: parse::parse(source)?,
        })
    }

    /// The text that was parsed.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Its value for a request; none: something that it needs is not known, or is of another type.
    pub fn evaluate<'a>(&'a self, record: &'a RequestRecord) -> Option<Value<'a>> {
        evaluate(&self.root, record)
    }

    /// Whether it is true: what is not known is not.
    pub fn holds(&self, record: &RequestRecord) -> bool {
        self.evaluate(record) == Some(Value::Bool(true))
    }

    /// Adds the headers that it looks at.
    pub fn wanted(&self, wanted: &mut Wanted) {
        visit(&self.root, &mut |attribute| attribute.wanted(wanted));
    }
}

impl PartialEq for Expression {
    fn eq(&self, other: &Self) -> bool {
        self.source == other.source
    }
}

impl Eq for Expression {}

fn visit(node: &Node, each: &mut impl FnMut(&Attribute)) {
    match node {
        Node::Literal(_) => {}
        Node::Attribute(attribute) | Node::Has(attribute) => each(attribute),
        Node::List(items) => items.iter().for_each(|item| visit(item, each)),
        Node::Not(inner)
        | Node::Negative(inner)
        | Node::Matches(inner, _)
        | Node::Size(inner)
        | Node::ToText(inner)
        | Node::ToInt(inner) => visit(inner, each),
        Node::Binary(_, pair) | Node::Method(_, pair) => {
            visit(&pair.0, each);
            visit(&pair.1, each);
        }
        Node::Choice(parts) => {
            visit(&parts.0, each);
            visit(&parts.1, each);
            visit(&parts.2, each);
        }
    }
}

fn evaluate<'a>(node: &'a Node, record: &'a RequestRecord) -> Option<Value<'a>> {
    match node {
        Node::Literal(value) => Some(value.clone()),
        Node::Attribute(attribute) => attribute.value(record),
        Node::Has(attribute) => Some(Value::Bool(attribute.value(record).is_some())),
        Node::List(_) => None,
        Node::Not(inner) => truth(inner, record).map(|it| Value::Bool(!it)),
        Node::Negative(inner) => negative(&evaluate(inner, record)?),
        Node::Binary(operator, pair) => binary(*operator, &pair.0, &pair.1, record),
        Node::Choice(parts) => match truth(&parts.0, record)? {
            true => evaluate(&parts.1, record),
            false => evaluate(&parts.2, record),
        },
        Node::Method(method, pair) => {
            let (on, with) = (evaluate(&pair.0, record)?, evaluate(&pair.1, record)?);
            let (Value::Text(on), Value::Text(with)) = (on, with) else {
                return None;
            };
            Some(Value::Bool(match method {
                Method::Contains => on.contains(&*with),
                Method::StartsWith => on.starts_with(&*with),
                Method::EndsWith => on.ends_with(&*with),
            }))
        }
        Node::Matches(inner, regex) => match evaluate(inner, record)? {
            Value::Text(text) => Some(Value::Bool(regex.is_match(&text))),
            _ => None,
        },
        Node::Size(inner) => match evaluate(inner, record)? {
            Value::Text(text) => Some(int(text.chars().count())),
            _ => None,
        },
        Node::ToText(inner) => {
            let value = evaluate(inner, record)?;
            Some(Value::Text(Cow::Owned(value.to_string())))
        }
        Node::ToInt(inner) => to_int(&evaluate(inner, record)?),
    }
}

fn truth(node: &Node, record: &RequestRecord) -> Option<bool> {
    match evaluate(node, record)? {
        Value::Bool(value) => Some(value),
        _ => None,
    }
}

fn negative(value: &Value<'_>) -> Option<Value<'static>> {
    match value {
        Value::Int(value) => value.checked_neg().map(Value::Int),
        Value::Double(value) => Some(Value::Double(-value)),
        _ => None,
    }
}

fn to_int(value: &Value<'_>) -> Option<Value<'static>> {
    match value {
        Value::Int(value) => Some(Value::Int(*value)),
        Value::Text(text) => text.parse().ok().map(Value::Int),
        _ => None,
    }
}

fn binary<'a>(
    operator: Operator,
    left: &'a Node,
    right: &'a Node,
    record: &'a RequestRecord,
) -> Option<Value<'a>> {
    // One side may decide although the other is not known (CEL, "logical operators").
    let decide = |by: bool| {
        let (left, right) = (truth(left, record), truth(right, record));
        let decided = left == Some(by) || right == Some(by);
        let known = left.is_some() && right.is_some();
        match decided {
            true => Some(by),
            false => known.then_some(!by),
        }
    };
    let value = match operator {
        Operator::Or => decide(true)?,
        Operator::And => decide(false)?,
        Operator::In => contains(&evaluate(left, record)?, right, record)?,
        Operator::Plus => return plus(evaluate(left, record)?, evaluate(right, record)?),
        Operator::Equal | Operator::Unequal => {
            let order = compare(&evaluate(left, record)?, &evaluate(right, record)?);
            (order == Some(Ordering::Equal)) == (operator == Operator::Equal)
        }
        Operator::Less | Operator::AtMost | Operator::Greater | Operator::AtLeast => {
            let order = compare(&evaluate(left, record)?, &evaluate(right, record)?)?;
            match operator {
                Operator::Less => order.is_lt(),
                Operator::AtMost => order.is_le(),
                Operator::Greater => order.is_gt(),
                _ => order.is_ge(),
            }
        }
    };
    Some(Value::Bool(value))
}

fn contains(value: &Value<'_>, list: &Node, record: &RequestRecord) -> Option<bool> {
    let Node::List(items) = list else {
        return None;
    };
    let mut items = items.iter().filter_map(|item| evaluate(item, record));
    Some(items.any(|item| compare(value, &item) == Some(Ordering::Equal)))
}

fn plus<'a>(left: Value<'a>, right: Value<'a>) -> Option<Value<'a>> {
    match (left, right) {
        (Value::Int(left), Value::Int(right)) => left.checked_add(right).map(Value::Int),
        (Value::Text(left), Value::Text(right)) => {
            Some(Value::Text(Cow::Owned(left.into_owned() + &right)))
        }
        _ => None,
    }
}

fn compare(left: &Value<'_>, right: &Value<'_>) -> Option<Ordering> {
    match (left, right) {
        (Value::Bool(left), Value::Bool(right)) => Some(left.cmp(right)),
        (Value::Int(left), Value::Int(right)) => Some(left.cmp(right)),
        (Value::Text(left), Value::Text(right)) => Some(left.cmp(right)),
        (Value::Duration(left), Value::Duration(right)) => Some(left.cmp(right)),
        (Value::Time(left), Value::Time(right)) => Some(left.cmp(right)),
        (left, right) => double(left)?.partial_cmp(&double(right)?),
    }
}

fn double(value: &Value<'_>) -> Option<f64> {
    match value {
        #[allow(
            clippy::cast_precision_loss,
            reason = "CEL compares numbers of both kinds; precision beyond 2^53 does not matter"
        )]
        Value::Int(value) => Some(*value as f64),
        Value::Double(value) => Some(*value),
        _ => None,
    }
}
