//! YAML text to a tree that knows where each value stands. Bounded in size, depth and what aliases may expand to.
//!
//! Built on the parser's events and not on its tree: every limit holds before memory is spent, and a plain scalar keeps
//! its text until the reader says what it is to be, so that `port: 0644`, `hostNetwork: yes` and `cpu: 1` mean what they
//! mean to kubectl.

use std::{collections::HashMap, sync::Arc};

use saphyr_parser::{Event, Parser, ScalarStyle, ScanError, Span, StrInput, Tag};

/// The largest file read, in bytes.
pub const MAX_FILE_BYTES: usize = 16 << 20;
/// The deepest nesting read.
pub const MAX_DEPTH: u32 = 64;
/// The most nodes that all aliases of one document may stand for.
pub const MAX_ALIASED_NODES: u64 = 100_000;

/// Where a value starts, from 1 in both directions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Place {
    /// Line.
    pub line: u32,
    /// Column, in characters.
    pub column: u32,
}

/// A value and its place.
#[derive(Clone, Debug, PartialEq)]
pub struct Node {
    /// Where it starts.
    pub place: Place,
    /// What it is.
    pub value: Value,
    /// How many nodes it stands for, aliases expanded.
    weight: u64,
}

/// What a node is.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// A scalar without quotes: its type is the reader's to decide.
    Plain(Box<str>),
    /// A scalar that is text whatever it looks like.
    Text(Box<str>),
    /// A sequence.
    Sequence(Vec<Arc<Node>>),
    /// A mapping, in the order of the file. Keys are unique.
    Mapping(Vec<Entry>),
}

/// One entry of a mapping.
#[derive(Clone, Debug, PartialEq)]
pub struct Entry {
    /// The key, as text.
    pub key: Box<str>,
    /// Where the key stands.
    pub place: Place,
    /// The value.
    pub node: Arc<Node>,
}

/// A text that is not YAML, or more than is read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}:{}: {problem}", place.line, place.column)]
pub struct ParseError {
    /// Where.
    pub place: Place,
    /// What is wrong.
    pub problem: String,
}

impl Place {
    fn of(span: Span) -> Self {
        Self::at(span.start.line(), span.start.col())
    }

    fn at(line: usize, column: usize) -> Self {
        let number = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        Self {
            line: number(line),
            column: number(column).saturating_add(1),
        }
    }

    fn error(self, problem: impl Into<String>) -> ParseError {
        ParseError {
            place: self,
            problem: problem.into(),
        }
    }
}

impl From<ScanError> for ParseError {
    fn from(error: ScanError) -> Self {
        let marker = error.marker();
        Place::at(marker.line(), marker.col()).error(error.info())
    }
}

/// Reads all documents of a text. Empty documents are left out.
pub fn parse(text: &str) -> Result<Vec<Arc<Node>>, ParseError> {
    if text.len() > MAX_FILE_BYTES {
        let problem = format!("larger than {} MiB", MAX_FILE_BYTES >> 20);
        return Err(Place { line: 1, column: 1 }.error(problem));
    }
    let mut builder = Builder {
        parser: Parser::new_from_str(text),
        anchors: HashMap::new(),
        aliased: 0,
    };
    builder.documents()
}

struct Builder<'t> {
    parser: Parser<'t, StrInput<'t>>,
    /// A node that is being built has none yet: an alias to it is a cycle.
    anchors: HashMap<usize, Arc<Node>>,
    aliased: u64,
}

impl<'t> Builder<'t> {
    fn documents(&mut self) -> Result<Vec<Arc<Node>>, ParseError> {
        let mut documents = Vec::new();
        loop {
            match self.event()? {
                (Event::StreamEnd, _) => return Ok(documents),
                (Event::StreamStart | Event::DocumentStart(_), _) => {
                    self.anchors.clear();
                    self.aliased = 0;
                }
                (Event::DocumentEnd | Event::Nothing, _) => {}
                (event, span) => {
                    let node = self.node(event, span, 0)?;
                    if !node.is_null() {
                        documents.push(node);
                    }
                }
            }
        }
    }

    fn event(&mut self) -> Result<(Event<'t>, Span), ParseError> {
        match self.parser.next_event() {
            Some(event) => Ok(event?),
            None => Ok((Event::StreamEnd, Span::default())),
        }
    }

    fn node(&mut self, event: Event<'t>, span: Span, depth: u32) -> Result<Arc<Node>, ParseError> {
        let place = Place::of(span);
        if depth > MAX_DEPTH {
            return Err(place.error(format!("nested deeper than {MAX_DEPTH} levels")));
        }
        let (value, anchor) = match event {
            Event::Alias(anchor) => return self.alias(anchor, place),
            Event::Scalar(text, style, anchor, tag) => {
                (scalar(&text, style, tag.as_deref()), anchor)
            }
            Event::SequenceStart(anchor, _) => (self.sequence(depth)?, anchor),
            Event::MappingStart(anchor, _) => (self.mapping(depth)?, anchor),
            other => return Err(place.error(format!("unexpected {other:?}"))),
        };
        let node = Arc::new(Node::new(place, value));
        if anchor != 0 {
            self.anchors.insert(anchor, node.clone());
        }
        Ok(node)
    }

    fn alias(&mut self, anchor: usize, place: Place) -> Result<Arc<Node>, ParseError> {
        let unknown = || place.error("an alias to something that contains it, or to nothing");
        let node = self.anchors.get(&anchor).ok_or_else(unknown)?;
        self.aliased = self.aliased.saturating_add(node.weight);
        if self.aliased > MAX_ALIASED_NODES {
            let problem = format!("aliases stand for more than {MAX_ALIASED_NODES} values");
            return Err(place.error(problem));
        }
        Ok(node.clone())
    }

    fn sequence(&mut self, depth: u32) -> Result<Value, ParseError> {
        let mut items = Vec::new();
        loop {
            match self.event()? {
                (Event::SequenceEnd, _) => return Ok(Value::Sequence(items)),
                (event, span) => items.push(self.node(event, span, depth + 1)?),
            }
        }
    }

    fn mapping(&mut self, depth: u32) -> Result<Value, ParseError> {
        let mut entries: Vec<Entry> = Vec::new();
        let mut merged = Vec::new();
        let mut seen: HashMap<Box<str>, Place> = HashMap::new();
        loop {
            let (event, span) = self.event()?;
            if matches!(event, Event::MappingEnd) {
                break;
            }
            let key = self.node(event, span, depth + 1)?;
            let (event, span) = self.event()?;
            let node = self.node(event, span, depth + 1)?;
            let (Value::Plain(text) | Value::Text(text)) = &key.value else {
                return Err(key.place.error("a key that is not text"));
            };
            if **text == *"<<" && matches!(key.value, Value::Plain(_)) {
                merge_sources(&node, &mut merged)?;
                continue;
            }
            if let Some(first) = seen.insert(text.clone(), key.place) {
                let problem = format!("the key {text:?} is already set at line {}", first.line);
                return Err(key.place.error(problem));
            }
            entries.push(Entry {
                key: text.clone(),
                place: key.place,
                node,
            });
        }
        for entry in merged {
            if !seen.contains_key(&entry.key) {
                seen.insert(entry.key.clone(), entry.place);
                entries.push(entry);
            }
        }
        Ok(Value::Mapping(entries))
    }
}

/// What a merge key (`<<`) brings in: the entries of a mapping, or of several, the first winning.
fn merge_sources(node: &Node, into: &mut Vec<Entry>) -> Result<(), ParseError> {
    match &node.value {
        Value::Mapping(entries) => into.extend(entries.iter().cloned()),
        Value::Sequence(items) => {
            for item in items {
                merge_sources(item, into)?;
            }
        }
        _ => return Err(node.place.error("a merge key needs a mapping")),
    }
    Ok(())
}

fn scalar(text: &str, style: ScalarStyle, tag: Option<&Tag>) -> Value {
    let tagged_text = tag.is_some_and(|tag| tag.is_yaml_core_schema() && tag.suffix == "str");
    match style {
        ScalarStyle::Plain if !tagged_text => Value::Plain(text.into()),
        _ => Value::Text(text.into()),
    }
}

impl Node {
    /// A node and the weight of what it holds.
    pub fn new(place: Place, value: Value) -> Self {
        let below = match &value {
            Value::Plain(_) | Value::Text(_) => 0,
            Value::Sequence(items) => items
                .iter()
                .fold(0, |sum: u64, item| sum.saturating_add(item.weight)),
            Value::Mapping(entries) => entries
                .iter()
                .fold(0, |sum: u64, entry| sum.saturating_add(entry.node.weight)),
        };
        Self {
            place,
            value,
            weight: below.saturating_add(1),
        }
    }

    /// Whether it is YAML's null (YAML 1.2 10.2.1.1, and the empty scalar).
    pub fn is_null(&self) -> bool {
        matches!(&self.value, Value::Plain(text) if matches!(&**text, "" | "~" | "null" | "Null" | "NULL"))
    }

    /// The value under a key of a mapping, unless it is null.
    pub fn field(&self, key: &str) -> Option<&Arc<Node>> {
        let Value::Mapping(entries) = &self.value else {
            return None;
        };
        let entry = entries.iter().find(|entry| &*entry.key == key)?;
        (!entry.node.is_null()).then_some(&entry.node)
    }

    /// The text of a scalar.
    pub fn text(&self) -> Option<&str> {
        match &self.value {
            Value::Plain(_) if self.is_null() => None,
            Value::Plain(text) | Value::Text(text) => Some(text),
            Value::Sequence(_) | Value::Mapping(_) => None,
        }
    }

    /// Where a field of the form `spec.rules[0].from` stands, or the nearest thing that holds it.
    pub fn locate(&self, path: &str) -> Place {
        let Some((step, rest)) = first_step(path) else {
            return self.place;
        };
        let below = match (&self.value, step) {
            (Value::Sequence(items), Step::Item(index)) => {
                items.get(index).map(|node| (node.place, node))
            }
            (Value::Mapping(entries), Step::Field(key)) => entries
                .iter()
                .find(|entry| &*entry.key == key)
                .map(|entry| (entry.place, &entry.node)),
            _ => None,
        };
        match below {
            Some((place, _)) if rest.is_empty() => place,
            Some((_, node)) => node.locate(rest),
            None => self.place,
        }
    }

    /// A copy in which `key` holds `node`; a node that is no mapping becomes one.
    pub fn with(&self, key: &str, node: Arc<Node>) -> Self {
        let mut entries = match &self.value {
            Value::Mapping(entries) => entries.clone(),
            _ => Vec::new(),
        };
        match entries.iter_mut().find(|entry| &*entry.key == key) {
            Some(entry) => entry.node = node,
            None => entries.push(Entry {
                key: key.into(),
                place: node.place,
                node,
            }),
        }
        Self::new(self.place, Value::Mapping(entries))
    }
}

enum Step<'a> {
    Field(&'a str),
    Item(usize),
}

fn first_step(path: &str) -> Option<(Step<'_>, &str)> {
    let path = path.strip_prefix('.').unwrap_or(path);
    if let Some(inside) = path.strip_prefix('[') {
        let (index, rest) = inside.split_once(']')?;
        let step = match index.parse() {
            Ok(index) => Step::Item(index),
            Err(_) => Step::Field(index.trim_matches('"')),
        };
        return Some((step, rest));
    }
    let end = path.find(['.', '[']).unwrap_or(path.len());
    let (key, rest) = path.split_at(end);
    (!key.is_empty()).then_some((Step::Field(key), rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problem(text: &str) -> String {
        parse(text).expect_err("refused").to_string()
    }

    #[test]
    fn values_know_their_places() {
        let documents = parse("# first\n---\na:\n  b: [x, y]\n---\n---\nc: 1\n").unwrap();
        assert_eq!(documents.len(), 2);
        let list = documents[0].field("a").unwrap().field("b").unwrap();
        assert_eq!(list.place, Place { line: 4, column: 6 });
        assert_eq!(documents[1].place, Place { line: 7, column: 1 });
    }

    #[test]
    fn a_text_that_is_not_yaml_is_refused_with_its_place() {
        assert!(
            problem("a: [1\nb: 2\n").starts_with("2:"),
            "{}",
            problem("a: [1\nb: 2\n")
        );
        assert_eq!(
            problem("a: 1\na: 2\n"),
            "2:1: the key \"a\" is already set at line 1"
        );
        assert!(problem("a: *nothing\n").starts_with("1:"));
        assert!(problem("a: &x [*x]\n").contains("alias"));
    }

    #[test]
    fn a_billion_laughs_are_refused() {
        let mut text = String::from("a0: &a0 [x, x, x, x, x, x, x, x, x]\n");
        for level in 1..12 {
            let below = level - 1;
            text += &format!(
                "a{level}: &a{level} [*a{below}, *a{below}, *a{below}, *a{below}, *a{below}, *a{below}]\n"
            );
        }
        assert!(problem(&text).contains("aliases stand for more than"));
    }

    #[test]
    fn depth_and_size_are_bounded() {
        let deep = format!("a: {}", "[".repeat(200));
        assert!(problem(&deep).contains("deeper than"), "{}", problem(&deep));
        assert!(problem(&" ".repeat(MAX_FILE_BYTES + 1)).contains("larger than 16 MiB"));
    }

    #[test]
    fn a_merge_key_brings_what_is_not_set() {
        let documents = parse("base: &b {x: 1, y: 2}\nall:\n  <<: *b\n  y: 3\n").unwrap();
        let all = documents[0].field("all").unwrap();
        assert_eq!(all.field("x").unwrap().text(), Some("1"));
        assert_eq!(all.field("y").unwrap().text(), Some("3"));
    }
}
