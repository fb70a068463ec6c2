//! The parser: recursive descent over bytes, bounded in depth.

use std::{borrow::Cow, time::Duration};

use regex::RegexBuilder;

use super::{Attribute, InvalidExpression, MAX_LENGTH, Method, Node, Operator, Value};

const MAX_DEPTH: usize = 24;
const MAX_COMPILED: usize = 256 * 1024;

type Result<T> = std::result::Result<T, InvalidExpression>;

pub(super) fn parse(source: &str) -> Result<Node> {
    if source.len() > MAX_LENGTH {
        return Err(InvalidExpression::TooLarge);
    }
    let mut parser = Parser {
        source,
        at: 0,
        depth: 0,
    };
    let root = parser.choice()?;
    parser.space();
    match parser.at == source.len() {
        true => Ok(root),
        false => Err(parser.expected("the end")),
    }
}

struct Parser<'a> {
    source: &'a str,
    at: usize,
    depth: usize,
}

/// From weak to strong.
const LEVELS: [&[(&str, Operator)]; 4] = [
    &[("||", Operator::Or)],
    &[("&&", Operator::And)],
    &[
        ("==", Operator::Equal),
        ("!=", Operator::Unequal),
        ("<=", Operator::AtMost),
        (">=", Operator::AtLeast),
        ("<", Operator::Less),
        (">", Operator::Greater),
        ("in ", Operator::In),
    ],
    &[("+", Operator::Plus)],
];

impl<'a> Parser<'a> {
    fn rest(&self) -> &'a str {
        &self.source[self.at..]
    }

    fn space(&mut self) {
        let rest = self.rest();
        self.at += rest.len() - rest.trim_start().len();
    }

    fn take(&mut self, token: &str) -> bool {
        self.space();
        let found = self.rest().starts_with(token);
        if found {
            self.at += token.len();
        }
        found
    }

    fn need(&mut self, token: &'static str) -> Result<()> {
        match self.take(token) {
            true => Ok(()),
            false => Err(self.expected(token)),
        }
    }

    fn expected(&self, expected: &'static str) -> InvalidExpression {
        InvalidExpression::Syntax {
            at: self.at,
            expected,
        }
    }

    fn choice(&mut self) -> Result<Node> {
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return Err(InvalidExpression::TooLarge);
        }
        let condition = self.level(0)?;
        let node = match self.take("?") {
            false => condition,
            true => {
                let yes = self.choice()?;
                self.need(":")?;
                Node::Choice(Box::new((condition, yes, self.choice()?)))
            }
        };
        self.depth -= 1;
        Ok(node)
    }

    fn level(&mut self, level: usize) -> Result<Node> {
        let Some(operators) = LEVELS.get(level) else {
            return self.unary();
        };
        let mut left = self.level(level + 1)?;
        while let Some((_, operator)) = operators.iter().find(|(token, _)| self.take(token)) {
            let right = self.level(level + 1)?;
            left = Node::Binary(*operator, Box::new((left, right)));
        }
        Ok(left)
    }

    fn unary(&mut self) -> Result<Node> {
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return Err(InvalidExpression::TooLarge);
        }
        self.space();
        let not = !self.rest().starts_with("!=") && self.take("!");
        let node = match (not, !not && self.take("-")) {
            (true, _) => Node::Not(Box::new(self.unary()?)),
            (_, true) => Node::Negative(Box::new(self.unary()?)),
            _ => self.methods()?,
        };
        self.depth -= 1;
        Ok(node)
    }

    /// A primary with methods after it.
    fn methods(&mut self) -> Result<Node> {
        let mut node = self.primary()?;
        while self.take(".") {
            let name = self.name()?;
            node = self.method(node, name)?;
        }
        Ok(node)
    }

    fn method(&mut self, on: Node, name: &str) -> Result<Node> {
        self.need("(")?;
        let method = match name {
            "size" => {
                self.need(")")?;
                return Ok(Node::Size(Box::new(on)));
            }
            "matches" => {
                let pattern = self.text()?;
                self.need(")")?;
                return Ok(Node::Matches(Box::new(on), regex(&pattern)?));
            }
            "contains" => Method::Contains,
            "startsWith" => Method::StartsWith,
            "endsWith" => Method::EndsWith,
            other => return Err(InvalidExpression::Function(other.to_owned())),
        };
        let with = self.choice()?;
        self.need(")")?;
        Ok(Node::Method(method, Box::new((on, with))))
    }

    fn primary(&mut self) -> Result<Node> {
        self.space();
        match self.rest().bytes().next() {
            Some(b'(') => {
                self.at += 1;
                let inner = self.choice()?;
                self.need(")")?;
                Ok(inner)
            }
            Some(b'[') => self.list(),
            Some(b'"' | b'\'') => Ok(Node::Literal(Value::Text(Cow::Owned(self.text()?)))),
            Some(b'0'..=b'9') => self.number(),
            Some(b'a'..=b'z' | b'A'..=b'Z' | b'_') => self.named(),
            _ => Err(self.expected("a value")),
        }
    }

    fn list(&mut self) -> Result<Node> {
        self.need("[")?;
        let mut items = Vec::new();
        while !self.take("]") {
            items.push(self.choice()?);
            if !self.take(",") {
                self.need("]")?;
                break;
            }
        }
        Ok(Node::List(items))
    }

    fn named(&mut self) -> Result<Node> {
        let name = self.name()?;
        match name {
            "true" => return Ok(Node::Literal(Value::Bool(true))),
            "false" => return Ok(Node::Literal(Value::Bool(false))),
            _ => {}
        }
        match self.rest().starts_with('(') {
            true => self.function(name),
            false => self.attribute(name).map(Node::Attribute),
        }
    }

    fn function(&mut self, name: &str) -> Result<Node> {
        self.need("(")?;
        let node = match name {
            "has" => {
                let root = self.name()?;
                Node::Has(self.attribute(root)?)
            }
            "duration" => Node::Literal(Value::Duration(self.duration()?)),
            "size" => Node::Size(Box::new(self.choice()?)),
            "string" => Node::ToText(Box::new(self.choice()?)),
            "int" => Node::ToInt(Box::new(self.choice()?)),
            other => return Err(InvalidExpression::Function(other.to_owned())),
        };
        self.need(")")?;
        Ok(node)
    }

    /// `.name` and `['name']` after a first name, up to a method.
    fn attribute(&mut self, root: &str) -> Result<Attribute> {
        let mut path = vec![root.to_owned()];
        loop {
            let before = self.at;
            if self.take("[") {
                path.push(self.text()?);
                self.need("]")?;
            } else if self.take(".") {
                let name = self.name()?.to_owned();
                if self.rest().starts_with('(') {
                    self.at = before;
                    break;
                }
                path.push(name);
            } else {
                break;
            }
        }
        let path: Vec<&str> = path.iter().map(String::as_str).collect();
        Attribute::of(&path).ok_or_else(|| InvalidExpression::Attribute(path.join(".")))
    }

    fn name(&mut self) -> Result<&'a str> {
        self.space();
        let rest = self.rest();
        let end = rest.find(|c: char| !c.is_ascii_alphanumeric() && c != '_');
        let name = &rest[..end.unwrap_or(rest.len())];
        if name.is_empty() {
            return Err(self.expected("a name"));
        }
        self.at += name.len();
        Ok(name)
    }

    fn number(&mut self) -> Result<Node> {
        let rest = self.rest();
        let end = rest.find(|c: char| !c.is_ascii_digit() && c != '.');
        let text = &rest[..end.unwrap_or(rest.len())];
        let whole = text.parse().map(Value::Int);
        let value = whole.or_else(|_| text.parse().map(Value::Double));
        let value = value.map_err(|_| self.expected("a number"))?;
        self.at += text.len();
        Ok(Node::Literal(value))
    }

    fn text(&mut self) -> Result<String> {
        self.space();
        let mut rest = self.rest().char_indices();
        let quote = match rest.next() {
            Some((_, quote @ ('"' | '\''))) => quote,
            _ => return Err(self.expected("a text in quotes")),
        };
        let mut text = String::new();
        while let Some((at, char)) = rest.next() {
            match char {
                '\\' => match rest.next() {
                    Some((_, 'n')) => text.push('\n'),
                    Some((_, 't')) => text.push('\t'),
                    Some((_, char)) => text.push(char),
                    None => break,
                },
                char if char == quote => {
                    self.at += at + 1;
                    return Ok(text);
                }
                char => text.push(char),
            }
        }
        Err(self.expected("the end of a text"))
    }

    /// `"1.5s"`, `"20ms"`.
    fn duration(&mut self) -> Result<Duration> {
        let text = self.text()?;
        let units = [("ms", 1e-3), ("s", 1.0), ("m", 60.0), ("h", 3600.0)];
        let parsed = units.iter().find_map(|(unit, seconds)| {
            let number: f64 = text.strip_suffix(unit)?.parse().ok()?;
            Duration::try_from_secs_f64(number * seconds).ok()
        });
        parsed.ok_or_else(|| self.expected("a duration"))
    }
}

fn regex(pattern: &str) -> Result<regex::Regex> {
    let built = RegexBuilder::new(pattern)
        .size_limit(MAX_COMPILED)
        .dfa_size_limit(MAX_COMPILED)
        .build();
    built.map_err(|error| InvalidExpression::Regex(error.to_string()))
}
