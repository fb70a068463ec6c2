//! From a tree to a typed object, saying of every field that is unknown and every value of a wrong type where it stands.
//!
//! A serde deserializer over [`Node`]. Rules are kubectl's: null is absence, an unknown field is a mistake (but not under
//! `status`, which servers newer than this program write), quantities may be numbers. One wrong value does not hide the
//! next: it is noted, left out, and the object is read again.

use std::{cell::RefCell, collections::HashSet, fmt};

use serde::de::{
    DeserializeSeed, Deserializer, EnumAccess, Error as _, IntoDeserializer, MapAccess, SeqAccess,
    VariantAccess, Visitor, value::StrDeserializer,
};

use super::tree::{Entry, Node, Place, Value};

/// Mistakes named in one object; more are not looked for.
const MAX_FAULTS: usize = 32;

/// A mistake in an object.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Fault {
    /// Where it stands.
    pub place: Place,
    /// The field: `spec.rules[0].form`.
    pub path: String,
    /// What is wrong.
    pub problem: String,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.path.is_empty() {
            return f.write_str(&self.problem);
        }
        write!(f, "{}: {}", self.path, self.problem)
    }
}

/// Reads a node as `T`. The value is what remains when every faulty part is left out; `None` when nothing does.
pub fn read<T: serde::de::DeserializeOwned>(node: &Node) -> (Option<T>, Vec<Fault>) {
    let findings = Findings::default();
    let mut faults = Vec::new();
    let value = loop {
        findings.unknown.borrow_mut().clear();
        let reader = Reader {
            node,
            path: Path::Root,
            findings: &findings,
        };
        match T::deserialize(reader) {
            Ok(value) => break Some(value),
            Err(error) => {
                let fault = error.0.into_fault(node.place);
                let place = fault.place;
                faults.push(fault);
                let again = findings.left_out.borrow_mut().insert(place);
                if place == node.place || !again || faults.len() >= MAX_FAULTS {
                    break None;
                }
            }
        }
    };
    faults.extend(findings.unknown.into_inner());
    faults.sort();
    faults.truncate(MAX_FAULTS);
    (value, faults)
}

#[derive(Default)]
struct Findings {
    unknown: RefCell<Vec<Fault>>,
    /// Values that could not be read, by place.
    left_out: RefCell<HashSet<Place>>,
}

#[derive(Clone, Copy)]
enum Path<'a> {
    Root,
    Field(&'a Path<'a>, &'a str),
    Item(&'a Path<'a>, usize),
}

impl Path<'_> {
    fn in_status(&self) -> bool {
        match self {
            Self::Root => false,
            Self::Field(Path::Root, key) => *key == "status",
            Self::Field(parent, _) | Self::Item(parent, _) => parent.in_status(),
        }
    }
}

impl fmt::Display for Path<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Root => Ok(()),
            Self::Field(Path::Root, key) => f.write_str(key),
            Self::Field(parent, key) if key.contains('.') => write!(f, "{parent}[{key:?}]"),
            Self::Field(parent, key) => write!(f, "{parent}.{key}"),
            Self::Item(parent, index) => write!(f, "{parent}[{index}]"),
        }
    }
}

/// serde's error, with its place once it is known: the innermost value that was being read.
#[derive(Debug)]
struct Error(Box<Unplaced>);

#[derive(Debug)]
struct Unplaced {
    at: Option<(Place, String)>,
    problem: String,
}

impl Unplaced {
    fn into_fault(self, root: Place) -> Fault {
        let (place, path) = self.at.unwrap_or((root, String::new()));
        Fault {
            place,
            path,
            problem: self.problem,
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.problem)
    }
}

impl std::error::Error for Error {}

impl serde::de::Error for Error {
    fn custom<T: fmt::Display>(problem: T) -> Self {
        Self(Box::new(Unplaced {
            at: None,
            problem: problem.to_string(),
        }))
    }
}

struct Reader<'de, 'p> {
    node: &'de Node,
    path: Path<'p>,
    findings: &'p Findings,
}

/// How a plain scalar reads when nothing else is asked for (YAML 1.2 10.3.2, with YAML 1.1's octal as kubectl has it).
enum Scalar<'a> {
    Null,
    Bool(bool),
    Signed(i64),
    Unsigned(u64),
    Float(f64),
    Text(&'a str),
}

impl<'a> Scalar<'a> {
    fn of(text: &'a str) -> Self {
        match text {
            "" | "~" | "null" | "Null" | "NULL" => return Self::Null,
            "true" | "True" | "TRUE" => return Self::Bool(true),
            "false" | "False" | "FALSE" => return Self::Bool(false),
            _ => {}
        }
        if let Some(number) = signed(text) {
            return Self::Signed(number);
        }
        if let Ok(number) = text.parse() {
            return Self::Unsigned(number);
        }
        let numeric =
            text.starts_with(|c: char| c.is_ascii_digit() || matches!(c, '-' | '+' | '.'));
        match text.parse::<f64>() {
            Ok(number) if numeric && !text.ends_with(char::is_alphabetic) => Self::Float(number),
            _ => Self::Text(text),
        }
    }

    fn name(&self) -> &'static str {
        match self {
            Self::Null => "nothing",
            Self::Bool(_) => "true or false",
            Self::Signed(_) | Self::Unsigned(_) | Self::Float(_) => "a number",
            Self::Text(_) => "text",
        }
    }
}

fn signed(text: &str) -> Option<i64> {
    let (sign, digits) = match text.strip_prefix('-') {
        Some(digits) => (-1, digits),
        None => (1, text.strip_prefix('+').unwrap_or(text)),
    };
    if !digits.starts_with(|c: char| c.is_ascii_digit()) {
        return None;
    }
    let (radix, digits) = match digits.as_bytes() {
        [b'0', b'x', ..] => (16, &digits[2..]),
        [b'0', b'o', ..] => (8, &digits[2..]),
        [b'0', _, ..] if digits.bytes().all(|b| (b'0'..=b'7').contains(&b)) => (8, &digits[1..]),
        _ => (10, digits),
    };
    i64::from_str_radix(digits, radix).ok().map(|n| n * sign)
}

/// The words that YAML 1.1, and so kubectl, takes for a truth value.
fn truth(text: &str) -> Option<bool> {
    match text.to_ascii_lowercase().as_str() {
        "true" | "yes" | "on" => Some(true),
        "false" | "no" | "off" => Some(false),
        _ => None,
    }
}

impl<'de> Reader<'de, '_> {
    fn placed<T>(&self, result: Result<T, Error>) -> Result<T, Error> {
        result.map_err(|mut error| {
            error
                .0
                .at
                .get_or_insert_with(|| (self.node.place, self.path.to_string()));
            error
        })
    }

    fn wrong<T>(&self, expected: &str) -> Result<T, Error> {
        let found = match &self.node.value {
            Value::Plain(text) => format!("{}, {text:?}", Scalar::of(text).name()),
            Value::Text(text) => format!("text, {text:?}"),
            Value::Sequence(_) => "a list".to_owned(),
            Value::Mapping(_) => "a mapping".to_owned(),
        };
        self.placed(Err(Error::custom(format!(
            "expected {expected}, found {found}"
        ))))
    }

    fn number<V: Visitor<'de>>(self, visitor: V, expected: &str) -> Result<V::Value, Error> {
        let Value::Plain(text) = &self.node.value else {
            return self.wrong(expected);
        };
        let visited = match Scalar::of(text) {
            Scalar::Signed(number) => visitor.visit_i64(number),
            Scalar::Unsigned(number) => visitor.visit_u64(number),
            Scalar::Float(number) => visitor.visit_f64(number),
            _ => return self.wrong(expected),
        };
        self.placed(visited)
    }

    /// The text of a scalar that must be text; `numbers`: a number will do.
    fn text(&self, numbers: bool) -> Result<&'de str, Error> {
        match &self.node.value {
            Value::Text(text) => Ok(text),
            Value::Plain(text) => match Scalar::of(text) {
                Scalar::Text(text) => Ok(text),
                Scalar::Null => self.wrong("text"),
                _ if numbers => Ok(text),
                _ => self.wrong(&format!("text (write \"{text}\" in quotes)")),
            },
            _ => self.wrong("text"),
        }
    }

    fn entries(&self, fields: Option<&'static [&'static str]>) -> Result<Vec<&'de Entry>, Error> {
        let Value::Mapping(entries) = &self.node.value else {
            return self.wrong("a mapping");
        };
        let left_out = self.findings.left_out.borrow();
        // In a mapping of free keys a null is the value's business.
        let is_struct = fields.is_some();
        let mut kept = Vec::with_capacity(entries.len());
        for entry in entries {
            if fields.is_some_and(|fields| !fields.contains(&&*entry.key)) {
                self.unknown(entry, fields.unwrap_or_default());
            } else {
                let absent = is_struct && entry.node.is_null();
                if !absent && !left_out.contains(&entry.node.place) {
                    kept.push(entry);
                }
            }
        }
        Ok(kept)
    }

    fn unknown(&self, entry: &Entry, fields: &[&str]) {
        let path = Path::Field(&self.path, &entry.key);
        if path.in_status() {
            return;
        }
        let problem = match nearest(&entry.key, fields) {
            Some(field) => format!("unknown field (did you mean {field:?}?)"),
            None => "unknown field".to_owned(),
        };
        self.findings.unknown.borrow_mut().push(Fault {
            place: entry.place,
            path: path.to_string(),
            problem,
        });
    }

    fn map<V: Visitor<'de>>(
        self,
        fields: Option<&'static [&'static str]>,
        visitor: V,
    ) -> Result<V::Value, Error> {
        let entries = self.entries(fields)?;
        let visited = visitor.visit_map(Entries {
            entries: entries.into_iter(),
            value: None,
            path: self.path,
            findings: self.findings,
        });
        self.placed(visited)
    }
}

/// The field that a misspelt one most likely is: at most two edits away, and fewer than half its letters.
fn nearest<'f>(key: &str, fields: &[&'f str]) -> Option<&'f str> {
    fields
        .iter()
        .map(|field| (edits(key, field), *field))
        .filter(|(edits, field)| *edits <= 2 && edits * 2 <= field.len().max(2))
        .min()
        .map(|(_, field)| field)
}

/// Edits between two words, a swap of neighbours counting as one (optimal string alignment), case ignored.
fn edits(a: &str, b: &str) -> usize {
    let (a, b) = (a.to_ascii_lowercase(), b.to_ascii_lowercase());
    let (a, b) = (a.as_bytes(), b.as_bytes());
    if a.len().abs_diff(b.len()) > 2 {
        return usize::MAX / 4;
    }
    let mut rows: Vec<Vec<usize>> = vec![(0..=b.len()).collect()];
    for i in 1..=a.len() {
        let mut row = vec![i];
        for j in 1..=b.len() {
            let changed = usize::from(a[i - 1] != b[j - 1]);
            let mut best = (rows[i - 1][j] + 1)
                .min(row[j - 1] + 1)
                .min(rows[i - 1][j - 1] + changed);
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                best = best.min(rows[i - 2][j - 2] + 1);
            }
            row.push(best);
        }
        rows.push(row);
    }
    rows[a.len()][b.len()]
}

struct Entries<'de, 'p> {
    entries: std::vec::IntoIter<&'de Entry>,
    value: Option<&'de Entry>,
    path: Path<'p>,
    findings: &'p Findings,
}

impl<'de> MapAccess<'de> for Entries<'de, '_> {
    type Error = Error;

    fn next_key_seed<K: DeserializeSeed<'de>>(
        &mut self,
        seed: K,
    ) -> Result<Option<K::Value>, Error> {
        self.value = self.entries.next();
        match self.value {
            Some(entry) => seed
                .deserialize(StrDeserializer::<Error>::new(&entry.key))
                .map(Some),
            None => Ok(None),
        }
    }

    fn next_value_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<S::Value, Error> {
        let entry = self
            .value
            .take()
            .ok_or_else(|| Error::custom("a value without a key"))?;
        let path = Path::Field(&self.path, &entry.key);
        let reader = Reader {
            node: &entry.node,
            path,
            findings: self.findings,
        };
        seed.deserialize(reader)
    }
}

struct Items<'de, 'p> {
    items: std::iter::Enumerate<std::slice::Iter<'de, std::sync::Arc<Node>>>,
    path: Path<'p>,
    findings: &'p Findings,
}

impl<'de> SeqAccess<'de> for Items<'de, '_> {
    type Error = Error;

    fn next_element_seed<S: DeserializeSeed<'de>>(
        &mut self,
        seed: S,
    ) -> Result<Option<S::Value>, Error> {
        for (index, node) in self.items.by_ref() {
            if self.findings.left_out.borrow().contains(&node.place) {
                continue;
            }
            let path = Path::Item(&self.path, index);
            let reader = Reader {
                node,
                path,
                findings: self.findings,
            };
            return seed.deserialize(reader).map(Some);
        }
        Ok(None)
    }
}

/// A unit variant, which is all that Kubernetes' enumerations have.
struct Variant<'de>(&'de str);

impl<'de> EnumAccess<'de> for Variant<'de> {
    type Error = Error;
    type Variant = Self;

    fn variant_seed<S: DeserializeSeed<'de>>(self, seed: S) -> Result<(S::Value, Self), Error> {
        let name: StrDeserializer<'de, Error> = self.0.into_deserializer();
        Ok((seed.deserialize(name)?, self))
    }
}

impl<'de> VariantAccess<'de> for Variant<'de> {
    type Error = Error;

    fn unit_variant(self) -> Result<(), Error> {
        Ok(())
    }

    fn newtype_variant_seed<S: DeserializeSeed<'de>>(self, _: S) -> Result<S::Value, Error> {
        Err(Error::custom("expected a word"))
    }

    fn tuple_variant<V: Visitor<'de>>(self, _: usize, _: V) -> Result<V::Value, Error> {
        Err(Error::custom("expected a word"))
    }

    fn struct_variant<V: Visitor<'de>>(
        self,
        _: &'static [&'static str],
        _: V,
    ) -> Result<V::Value, Error> {
        Err(Error::custom("expected a word"))
    }
}

macro_rules! numbers {
    ($($method:ident $expected:literal),+) => {$(
        fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
            self.number(visitor, $expected)
        }
    )+};
}

impl<'de> Deserializer<'de> for Reader<'de, '_> {
    type Error = Error;

    numbers! {
        deserialize_i8 "a whole number", deserialize_i16 "a whole number", deserialize_i32 "a whole number",
        deserialize_i64 "a whole number", deserialize_u8 "a whole number", deserialize_u16 "a whole number",
        deserialize_u32 "a whole number", deserialize_u64 "a whole number",
        deserialize_f32 "a number", deserialize_f64 "a number"
    }

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        let visited = match &self.node.value {
            Value::Mapping(_) => return self.map(None, visitor),
            Value::Sequence(_) => return self.deserialize_seq(visitor),
            Value::Text(text) => visitor.visit_borrowed_str(text),
            Value::Plain(text) => match Scalar::of(text) {
                Scalar::Null => visitor.visit_unit(),
                Scalar::Bool(value) => visitor.visit_bool(value),
                Scalar::Signed(value) => visitor.visit_i64(value),
                Scalar::Unsigned(value) => visitor.visit_u64(value),
                Scalar::Float(value) => visitor.visit_f64(value),
                Scalar::Text(text) => visitor.visit_borrowed_str(text),
            },
        };
        self.placed(visited)
    }

    fn deserialize_bool<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        match &self.node.value {
            Value::Plain(text) => match truth(text) {
                Some(value) => self.placed(visitor.visit_bool(value)),
                None => self.wrong("true or false"),
            },
            _ => self.wrong("true or false"),
        }
    }

    fn deserialize_str<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        let text = self.text(false)?;
        self.placed(visitor.visit_borrowed_str(text))
    }

    fn deserialize_string<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.deserialize_str(visitor)
    }

    fn deserialize_bytes<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.deserialize_str(visitor)
    }

    fn deserialize_byte_buf<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.deserialize_str(visitor)
    }

    fn deserialize_char<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.deserialize_str(visitor)
    }

    fn deserialize_identifier<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.deserialize_str(visitor)
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        if self.node.is_null() {
            return visitor.visit_none();
        }
        visitor.visit_some(self)
    }

    fn deserialize_unit<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        if self.node.is_null() {
            return visitor.visit_unit();
        }
        self.wrong("nothing")
    }

    fn deserialize_unit_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        visitor: V,
    ) -> Result<V::Value, Error> {
        self.deserialize_unit(visitor)
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        name: &'static str,
        visitor: V,
    ) -> Result<V::Value, Error> {
        // kubectl takes `cpu: 1`; a quantity is text on the wire.
        if name == "Quantity" {
            let text = self.text(true)?;
            let quantity: StrDeserializer<'_, Error> = text.into_deserializer();
            return self.placed(visitor.visit_newtype_struct(quantity));
        }
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        let Value::Sequence(items) = &self.node.value else {
            return self.wrong("a list");
        };
        let visited = visitor.visit_seq(Items {
            items: items.iter().enumerate(),
            path: self.path,
            findings: self.findings,
        });
        self.placed(visited)
    }

    fn deserialize_tuple<V: Visitor<'de>>(self, _: usize, visitor: V) -> Result<V::Value, Error> {
        self.deserialize_seq(visitor)
    }

    fn deserialize_tuple_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        _: usize,
        visitor: V,
    ) -> Result<V::Value, Error> {
        self.deserialize_seq(visitor)
    }

    fn deserialize_map<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.map(None, visitor)
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        self.map(Some(fields), visitor)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _: &'static str,
        _: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        let text = self.text(false)?;
        self.placed(visitor.visit_enum(Variant(text)))
    }

    fn deserialize_ignored_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_unit()
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::{Pod, Service};

    use super::*;
    use crate::source::tree::parse;

    fn faults<T: serde::de::DeserializeOwned>(text: &str) -> (Option<T>, Vec<String>) {
        let document = parse(text).unwrap().remove(0);
        let (value, faults) = read(&document);
        let told = faults
            .iter()
            .map(|f| format!("{}:{}: {f}", f.place.line, f.place.column));
        (value, told.collect())
    }

    #[test]
    fn every_unknown_field_and_wrong_type_is_named_with_its_place() {
        let (service, told) = faults::<Service>(
            "apiVersion: v1
kind: Service
metadata: {name: a, labels: {on: yes please, n: 3}}
spec:
  slector: {app: a}
  ports:
  - {port: eighty, name: [x]}
  - {port: 80, targetPort: http, nmae: b}
  - 7
",
        );
        assert_eq!(
            told,
            [
                "3:49: metadata.labels.n: expected text (write \"3\" in quotes), found a number, \"3\"",
                "5:3: spec.slector: unknown field (did you mean \"selector\"?)",
                "7:12: spec.ports[0].port: expected a whole number, found text, \"eighty\"",
                "7:26: spec.ports[0].name: expected text, found a list",
                "8:34: spec.ports[1].nmae: unknown field (did you mean \"name\"?)",
                "9:5: spec.ports[2]: expected a mapping, found a number, \"7\"",
            ]
        );
        let ports = service.unwrap().spec.unwrap().ports.unwrap();
        assert_eq!(ports.len(), 2, "what is not faulty remains");
    }

    #[test]
    fn what_kubectl_accepts_is_accepted() {
        let (pod, told) = faults::<Pod>(
            "apiVersion: v1
kind: Pod
metadata:
  name: a
  creationTimestamp: null
  annotations: {}
  managedFields:
  - apiVersion: v1
    fieldsType: FieldsV1
    fieldsV1: {\"f:metadata\": {\"f:labels\": {\".\": {}}}}
    manager: kubectl
    operation: Update
    time: 2024-01-02T03:04:05Z
spec:
  hostNetwork: yes
  containers:
  - name: main
    image: x
    resources: {limits: {cpu: 1, memory: 128Mi}}
    ports: [{containerPort: 0x50, name: http}]
    volumeMounts: [{name: v, mountPath: /v}]
  volumes: [{name: v, configMap: {name: c, defaultMode: 0644}}]
status:
  phase: Running
  aFieldOfTomorrow: 1
",
        );
        assert_eq!(told, Vec::<String>::new());
        let spec = pod.unwrap().spec.unwrap();
        assert_eq!(spec.host_network, Some(true));
        assert_eq!(
            spec.containers[0].ports.as_ref().unwrap()[0].container_port,
            80
        );
        let mode = spec.volumes.unwrap()[0]
            .config_map
            .as_ref()
            .unwrap()
            .default_mode;
        assert_eq!(mode, Some(0o644));
    }
}
