//! YAML to typed values, through the JSON data model: the mesh config file and the local state file.

use saphyr::{LoadableYamlNode, Scalar, Tag, Yaml};
use serde::de::DeserializeOwned;
use serde_json::Value;

/// Deepest nesting that is read; a guard against stack exhaustion.
const MAX_DEPTH: usize = 64;

/// Why a text was not read.
#[derive(Debug, thiserror::Error)]
pub enum YamlError {
    /// Not YAML.
    #[error("parse YAML")]
    Syntax(#[source] saphyr::ScanError),
    /// More than one document, a key that is not text, nesting too deep, an unresolved alias.
    #[error("{0}")]
    Unsupported(&'static str),
    /// YAML, but not of the expected shape.
    #[error("at {path}")]
    Shape {
        /// Where, as `workloads[0].name`; `.` is the whole.
        path: String,
        /// What is there instead.
        source: serde_json::Error,
    },
}

impl From<serde_path_to_error::Error<serde_json::Error>> for YamlError {
    fn from(error: serde_path_to_error::Error<serde_json::Error>) -> Self {
        Self::Shape {
            path: error.path().to_string(),
            source: error.into_inner(),
        }
    }
}

/// Reads one document. An empty text reads as null.
pub(crate) fn parse<T: DeserializeOwned>(text: &str) -> Result<T, YamlError> {
    Ok(serde_path_to_error::deserialize(to_json(text)?)?)
}

/// Reads what [`parse`] has, and tells the paths of the fields that `T` does not know.
pub(crate) fn read_noting<T: DeserializeOwned>(
    value: Value,
    unknown: &mut Vec<String>,
) -> Result<T, YamlError> {
    let mut note = |path: serde_ignored::Path<'_>| unknown.push(path.to_string());
    let noting = serde_ignored::Deserializer::new(value, &mut note);
    Ok(serde_path_to_error::deserialize(noting)?)
}

fn to_json(text: &str) -> Result<Value, YamlError> {
    let documents = Yaml::load_from_str(text).map_err(YamlError::Syntax)?;
    match documents.as_slice() {
        [] => Ok(Value::Null),
        [document] => convert(document, 0),
        _ => Err(YamlError::Unsupported("one document expected")),
    }
}

fn convert(node: &Yaml<'_>, depth: usize) -> Result<Value, YamlError> {
    if depth > MAX_DEPTH {
        return Err(YamlError::Unsupported("nested too deep"));
    }
    match node {
        Yaml::Value(scalar) => Ok(convert_scalar(scalar)),
        Yaml::Sequence(items) => items.iter().map(|item| convert(item, depth + 1)).collect(),
        Yaml::Mapping(entries) => entries
            .iter()
            .map(|(key, value)| Ok((convert_key(key)?, convert(value, depth + 1)?)))
            .collect::<Result<serde_json::Map<_, _>, _>>()
            .map(Value::Object),
        Yaml::Tagged(tag, inner) if is_variant(tag) => {
            let value = convert(inner, depth + 1)?;
            Ok(serde_json::Map::from_iter([(tag.suffix.clone(), value)]).into())
        }
        Yaml::Tagged(_, inner) => convert(inner, depth + 1),
        Yaml::Representation(text, _, _) => Ok(Value::String(text.to_string())),
        Yaml::Alias(_) | Yaml::BadValue => Err(YamlError::Unsupported("unresolved alias or value")),
    }
}

/// Whether a tag is one of the reader's own, as in `!Exact a`: upstream writes and reads the variants of a value so, where
/// JSON has `{"Exact": "a"}`.
fn is_variant(tag: &Tag) -> bool {
    !tag.is_yaml_core_schema() && !tag.suffix.is_empty()
}

fn convert_scalar(scalar: &Scalar<'_>) -> Value {
    match scalar {
        Scalar::Null => Value::Null,
        Scalar::Boolean(value) => Value::Bool(*value),
        Scalar::Integer(value) => Value::from(*value),
        Scalar::FloatingPoint(value) => Value::from(value.into_inner()),
        Scalar::String(text) => Value::String(text.to_string()),
    }
}

fn convert_key(key: &Yaml<'_>) -> Result<String, YamlError> {
    match key {
        Yaml::Value(Scalar::String(text)) => Ok(text.to_string()),
        Yaml::Value(Scalar::Integer(number)) => Ok(number.to_string()),
        _ => Err(YamlError::Unsupported("a key is not text")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn yaml_reads_into_the_json_data_model() {
        let value: Value = parse("a: [1, two, true, null]\n80: {b: 1.5}\n").unwrap();
        let expected = serde_json::json!({"a": [1, "two", true, null], "80": {"b": 1.5}});
        assert_eq!(value, expected);
        assert_eq!(parse::<Value>("").unwrap(), Value::Null);
    }

    #[test]
    fn a_tag_names_the_variant_of_its_value() {
        let value: Value = parse("[!Exact a, !Presence [], !!str 1, !Exact 1]").unwrap();
        let expected = serde_json::json!([{"Exact": "a"}, {"Presence": []}, "1", {"Exact": 1}]);
        assert_eq!(value, expected);
    }

    #[test]
    fn what_json_cannot_hold_is_refused() {
        for text in ["a: 1\n---\nb: 2\n", "? [1]\n: 2\n", "a: [", "a: *b"] {
            assert!(parse::<Value>(text).is_err(), "{text:?}");
        }
        assert!(parse::<Value>(&"[".repeat(10_000)).is_err());
    }
}
