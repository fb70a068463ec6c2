//! The CustomResourceDefinitions of the chart, made from these types: which fields there are comes from what the types read
//! ([`super::shape`]), what a value may be and what is printed from the tables here. The files are compared with what is
//! made; `LEYLINE_REGENERATE=1 cargo test -p leyline-controlplane published` writes them anew.

use std::{env, fmt::Write as _, fs, path::PathBuf};

use serde_json::{Map, Value, json};

use super::{
    AuthorizationPolicySpec, GatewayClassSpec, GatewaySpec, GatewayStatus, PeerAuthenticationSpec,
    ServiceEntrySpec, ServiceEntryStatus, WorkloadEntrySpec,
    istio::{DestinationRuleSpec, RequestAuthenticationSpec, TelemetrySpec, VirtualServiceSpec},
    shape::{self, Shape},
};

mod gateway_api;
mod istio;
mod routes;

/// One definition.
struct Definition {
    group: &'static str,
    kind: &'static str,
    plural: &'static str,
    short_names: &'static [&'static str],
    categories: &'static [&'static str],
    scope: &'static str,
    /// The stored version first; all have the same schema.
    versions: &'static [&'static str],
    /// Name, JSON path, type.
    columns: &'static [(&'static str, &'static str, &'static str)],
    /// Objects must have a spec.
    spec_required: bool,
    spec: Shape,
    /// `None`: nothing but what `status_rules` says.
    status: Option<Shape>,
    /// What values may be, by path from the spec: `rules[].when[].key`, `ports{}` for a map's values.
    spec_rules: Vec<(&'static str, Value)>,
    status_rules: Vec<(&'static str, Value)>,
    annotations: Value,
}

fn definitions() -> Vec<Definition> {
    let mut all = istio::definitions();
    all.extend(gateway_api::definitions());
    all.extend(routes::definitions());
    all
}

/// A shape as a structural schema.
fn schema(shape: &Shape) -> Value {
    match shape {
        Shape::Any => json!({}),
        Shape::Boolean => json!({"type": "boolean"}),
        Shape::Integer => json!({"type": "integer"}),
        Shape::Number => json!({"type": "number"}),
        Shape::Text => json!({"type": "string"}),
        Shape::OneOf(words) => json!({"type": "string", "enum": words}),
        Shape::List(item) => json!({"type": "array", "items": schema(item)}),
        Shape::Map(value) => json!({"type": "object", "additionalProperties": schema(value)}),
        Shape::Object(fields) => {
            let fields: Map<_, _> = fields
                .iter()
                .map(|(name, field)| ((*name).to_owned(), schema(field)))
                .collect();
            json!({"type": "object", "properties": fields})
        }
    }
}

/// The schema at a path.
#[track_caller]
fn at<'s>(schema: &'s mut Value, path: &str) -> &'s mut Value {
    let steps = path.split('.').filter(|step| !step.is_empty());
    steps.fold(schema, |schema, step| {
        let name = step.trim_end_matches(['[', ']', '{', '}']);
        let mut found = &mut schema["properties"][name];
        assert!(!found.is_null(), "{path}: the type has no field {name}");
        for _ in 0..step.matches("[]").count() {
            found = &mut found["items"];
        }
        if step.ends_with("{}") {
            found = &mut found["additionalProperties"];
        }
        found
    })
}

/// Adds what `rules` say to a schema. A rule for a field that the types do not have is a mistake.
fn tighten(schema: &mut Value, rules: Vec<(&'static str, Value)>) {
    for (path, rule) in rules {
        let place = at(schema, path);
        let rule = rule.as_object().expect("a rule is an object");
        for (name, value) in rule {
            place[name] = value.clone();
        }
    }
}

/// A field of which nothing is said would be pruned by the API server.
#[track_caller]
fn assert_complete(schema: &Value, path: &str) {
    let known = [
        "type",
        "x-kubernetes-int-or-string",
        "x-kubernetes-preserve-unknown-fields",
    ];
    assert!(
        known.iter().any(|key| schema.get(key).is_some()),
        "{path}: say what it is"
    );
    for (name, field) in schema["properties"].as_object().into_iter().flatten() {
        assert_complete(field, &format!("{path}.{name}"));
    }
    for inner in ["items", "additionalProperties"] {
        if let Some(inner) = schema.get(inner) {
            assert_complete(inner, path);
        }
    }
}

impl Definition {
    fn version(&self, name: &str, schema: &Value) -> Value {
        let mut columns: Vec<_> = self
            .columns
            .iter()
            .map(|(name, path, kind)| json!({"name": name, "jsonPath": path, "type": kind}))
            .collect();
        columns.push(
            json!({"name": "Age", "jsonPath": ".metadata.creationTimestamp", "type": "date"}),
        );
        json!({
            "name": name,
            "served": true,
            "storage": name == self.versions[0],
            "additionalPrinterColumns": columns,
            "schema": {"openAPIV3Schema": schema},
            "subresources": {"status": {}},
        })
    }

    fn resource(mut self) -> (String, Value) {
        let mut spec = schema(&self.spec);
        tighten(&mut spec, std::mem::take(&mut self.spec_rules));
        let mut status = self
            .status
            .as_ref()
            .map_or_else(|| json!({"type": "object", "properties": {}}), schema);
        for (path, rule) in std::mem::take(&mut self.status_rules) {
            if self.status.is_none() {
                status["properties"][path] = json!({});
            }
            tighten(&mut status, vec![(path, rule)]);
        }
        if self.group.ends_with("istio.io") {
            // Other control planes write more.
            status["x-kubernetes-preserve-unknown-fields"] = json!(true);
        }
        let mut whole = json!({
            "type": "object",
            "properties": {
                "apiVersion": {"type": "string"},
                "kind": {"type": "string"},
                "metadata": {"type": "object"},
                "spec": spec,
                "status": status,
            },
        });
        if self.spec_required {
            whole["required"] = json!(["spec"]);
        }
        assert_complete(&whole, self.kind);
        let name = format!("{}.{}", self.plural, self.group);
        let versions: Vec<_> = self
            .versions
            .iter()
            .map(|version| self.version(version, &whole))
            .collect();
        let mut metadata =
            json!({"name": name, "labels": {"app.kubernetes.io/part-of": "leyline"}});
        if !self.annotations.is_null() {
            metadata["annotations"] = self.annotations;
        }
        let definition = json!({
            "apiVersion": "apiextensions.k8s.io/v1",
            "kind": "CustomResourceDefinition",
            "metadata": metadata,
            "spec": {
                "group": self.group,
                "scope": self.scope,
                "names": {
                    "kind": self.kind,
                    "listKind": format!("{}List", self.kind),
                    "plural": self.plural,
                    "singular": self.kind.to_lowercase(),
                    "shortNames": self.short_names,
                    "categories": self.categories,
                },
                "versions": versions,
            },
        });
        (name, definition)
    }
}

/// YAML of a value; texts are quoted wherever they could be anything else.
fn yaml(value: &Value) -> String {
    let mut text = String::new();
    block(&mut text, value, 0);
    text
}

fn block(text: &mut String, value: &Value, depth: usize) {
    let indent = "  ".repeat(depth);
    match value {
        Value::Object(fields) if !fields.is_empty() => {
            for (name, value) in fields {
                let _ = write!(text, "{indent}{}:", scalar(name));
                nested(text, value, depth + 1);
            }
        }
        Value::Array(items) if !items.is_empty() => {
            for item in items {
                let mut inner = String::new();
                block(&mut inner, item, depth + 1);
                // The first line of an item stands behind its dash.
                let _ = write!(text, "{indent}- {}", inner.trim_start());
            }
        }
        other => {
            let _ = writeln!(text, "{indent}{}", leaf(other));
        }
    }
}

fn nested(text: &mut String, value: &Value, depth: usize) {
    let empty = match value {
        Value::Object(fields) => fields.is_empty(),
        Value::Array(items) => items.is_empty(),
        _ => true,
    };
    if empty {
        let _ = writeln!(text, " {}", leaf(value));
    } else {
        text.push('\n');
        block(text, value, depth);
    }
}

fn leaf(value: &Value) -> String {
    match value {
        Value::String(text) => scalar(text),
        other => other.to_string(),
    }
}

fn scalar(text: &str) -> String {
    let plain = text.starts_with(|first: char| first.is_ascii_alphabetic())
        && text
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || "-_./ ".contains(c))
        && !text.ends_with(' ')
        && !["true", "false", "null", "yes", "no", "on", "off", "y", "n"]
            .contains(&text.to_lowercase().as_str());
    if plain {
        text.to_owned()
    } else {
        // A JSON text is a YAML text.
        Value::from(text).to_string()
    }
}

fn folder() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../deploy/charts/leyline/crds")
}

#[test]
fn published_definitions_are_what_the_types_read() {
    let regenerate = env::var_os("LEYLINE_REGENERATE").is_some();
    let mut names = Vec::new();
    for definition in definitions() {
        let (name, resource) = definition.resource();
        let text = format!(
            "# Made from the types of controlplane::crd, by its test `published`.\n{}",
            yaml(&resource)
        );
        let path = folder().join(format!("{name}.yaml"));
        if regenerate {
            fs::write(&path, &text).unwrap();
        }
        let kept = fs::read_to_string(&path).unwrap_or_default();
        assert!(
            kept == text,
            "{name} differs: LEYLINE_REGENERATE=1, and review"
        );
        names.push(format!("{name}.yaml"));
    }
    let mut kept: Vec<_> = fs::read_dir(folder())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    kept.sort();
    assert_eq!(kept, names);
}

#[test]
fn every_field_of_a_nested_type_is_found() {
    let Shape::Object(fields) = shape::of::<AuthorizationPolicySpec>() else {
        panic!("a spec is an object");
    };
    let names: Vec<_> = fields.iter().map(|(name, _)| *name).collect();
    assert_eq!(
        names,
        [
            "selector",
            "targetRef",
            "targetRefs",
            "rules",
            "action",
            "provider"
        ]
    );
    assert_eq!(
        fields[4].1,
        Shape::OneOf(&["ALLOW", "DENY", "AUDIT", "CUSTOM"])
    );
    let mut rules = schema(&fields[3].1);
    let port = at(&mut rules["items"], "to[].operation.ports");
    assert_eq!(*port, json!({"type": "array", "items": {"type": "string"}}));
}
