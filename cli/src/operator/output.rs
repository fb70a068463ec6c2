//! The forms in which a command answers: a table for people, JSON and YAML for programs.

use std::io::{ErrorKind, Write};

use anyhow::Result;
use clap::ValueEnum;
use saphyr::{Mapping, Scalar, Yaml, YamlEmitter};
use serde_json::Value;

/// Form of the output.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Form {
    /// For people
    #[default]
    #[value(alias = "short")]
    Table,
    /// For programs
    Json,
    /// For programs
    Yaml,
}

impl Form {
    /// The value as text, where the form is one for programs.
    pub(crate) fn text(self, value: &Value) -> Result<Option<String>> {
        Ok(match self {
            Self::Table => None,
            Self::Json => Some(format!("{}\n", serde_json::to_string_pretty(value)?)),
            Self::Yaml => Some(yaml(value)?),
        })
    }
}

/// Prints to standard output. A reader that has gone (`| head`) is no error: nobody wants the rest.
pub(crate) fn print(text: &str) -> Result<()> {
    let mut output = std::io::stdout().lock();
    match output
        .write_all(text.as_bytes())
        .and_then(|()| output.flush())
    {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
        result => Ok(result?),
    }
}

/// One YAML document, keys sorted.
pub(crate) fn yaml(value: &Value) -> Result<String> {
    let mut text = String::new();
    YamlEmitter::new(&mut text).dump(&tree(value))?;
    let body = text.strip_prefix("---\n").unwrap_or(&text);
    Ok(format!("{body}\n"))
}

fn tree(value: &Value) -> Yaml<'_> {
    match value {
        Value::Null => Yaml::Value(Scalar::Null),
        Value::Bool(it) => Yaml::Value(Scalar::Boolean(*it)),
        Value::Number(it) => match (it.as_i64(), it.as_f64()) {
            (Some(whole), _) => Yaml::Value(Scalar::Integer(whole)),
            (None, Some(real)) => Yaml::Value(Scalar::FloatingPoint(real.into())),
            (None, None) => Yaml::Value(Scalar::String(it.to_string().into())),
        },
        Value::String(it) => Yaml::Value(Scalar::String(it.as_str().into())),
        Value::Array(items) => Yaml::Sequence(items.iter().map(tree).collect()),
        Value::Object(fields) => {
            let pairs = fields.iter().map(|(key, value)| {
                let key = Yaml::Value(Scalar::String(key.as_str().into()));
                (key, tree(value))
            });
            Yaml::Mapping(pairs.collect::<Mapping<'_>>())
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn yaml_quotes_what_would_be_read_as_something_else() {
        let value = json!({"a": {"list": [1, "true", "x: y"], "port": 15008, "none": null}});
        let text = yaml(&value).unwrap();
        assert_eq!(
            text,
            "a:\n  list:\n    - 1\n    - \"true\"\n    - \"x: y\"\n  none: ~\n  port: 15008\n"
        );
    }
}
