//! Strategic merge patches, as Kubernetes defines them, for the kinds that a Gateway comes to.
//!
//! Maps are merged field by field, null deletes, lists are replaced, but for those whose items Kubernetes merges by a key
//! (containers by name, service ports by number). Source: Kubernetes "strategic-merge-patch.md", and `patchMergeKey` in the
//! API types. Pure.

use serde_json::{Map, Value};

/// A patch that cannot be applied.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MergeError {
    /// An item of a list that is merged by a key has no such key.
    #[error("{path}: an item without {key}")]
    NoKey {
        /// The list.
        path: String,
        /// The field by which its items are told apart.
        key: &'static str,
    },
    /// An unknown `$patch`.
    #[error("{path}: unknown $patch {directive}")]
    Directive {
        /// Where.
        path: String,
        /// What it says.
        directive: String,
    },
}

/// How a list takes a patch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ListKind {
    /// The patch's list replaces it.
    Atomic,
    /// Items are found by a field.
    Keyed(&'static str),
    /// Texts that are added when they are not there.
    Set,
}

/// What a map of the patch asks for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Directive {
    Merge,
    Replace,
    Delete,
}

const PATCH: &str = "$patch";
const RETAIN_KEYS: &str = "$retainKeys";
const DELETE_FROM: &str = "$deleteFromPrimitiveList/";

/// Applies `patch` to an object.
pub fn merge(object: &mut Value, patch: &Value) -> Result<(), MergeError> {
    merge_value(&mut Vec::new(), object, patch)
}

fn merge_value<'p>(
    path: &mut Vec<&'p str>,
    target: &mut Value,
    patch: &'p Value,
) -> Result<(), MergeError> {
    match patch {
        Value::Object(fields) => merge_map(path, target, fields),
        Value::Array(items) => merge_list(path, target, items),
        scalar => {
            *target = scalar.clone();
            Ok(())
        }
    }
}

fn merge_map<'p>(
    path: &mut Vec<&'p str>,
    target: &mut Value,
    patch: &'p Map<String, Value>,
) -> Result<(), MergeError> {
    let replace = directive(path, patch)? != Directive::Merge || !target.is_object();
    if replace {
        *target = Value::Object(Map::new());
    }
    let Value::Object(fields) = target else {
        return Ok(());
    };
    if let Some(Value::Array(retained)) = patch.get(RETAIN_KEYS) {
        fields.retain(|key, _| retained.iter().any(|kept| kept == key));
    }
    for (key, value) in patch {
        if let Some(list) = key.strip_prefix(DELETE_FROM) {
            remove_values(fields, list, value);
        } else if !key.starts_with('$') {
            path.push(key);
            merge_field(path, fields, key, value)?;
            path.pop();
        }
    }
    Ok(())
}

fn merge_field<'p>(
    path: &mut Vec<&'p str>,
    fields: &mut Map<String, Value>,
    key: &'p str,
    patch: &'p Value,
) -> Result<(), MergeError> {
    let deletes = match patch {
        Value::Null => true,
        Value::Object(map) => directive(path, map)? == Directive::Delete,
        _ => false,
    };
    if deletes {
        fields.remove(key);
        return Ok(());
    }
    merge_value(path, fields.entry(key).or_insert(Value::Null), patch)
}

fn directive(path: &[&str], patch: &Map<String, Value>) -> Result<Directive, MergeError> {
    match patch.get(PATCH) {
        None => Ok(Directive::Merge),
        Some(Value::String(text)) if text == "merge" => Ok(Directive::Merge),
        Some(Value::String(text)) if text == "replace" => Ok(Directive::Replace),
        Some(Value::String(text)) if text == "delete" => Ok(Directive::Delete),
        Some(other) => Err(MergeError::Directive {
            path: path.join("."),
            directive: other.to_string(),
        }),
    }
}

fn remove_values(fields: &mut Map<String, Value>, list: &str, removed: &Value) {
    let removed = removed.as_array();
    if let (Some(Value::Array(items)), Some(removed)) = (fields.get_mut(list), removed) {
        items.retain(|item| !removed.contains(item));
    }
}

fn merge_list<'p>(
    path: &mut Vec<&'p str>,
    target: &mut Value,
    patch: &'p [Value],
) -> Result<(), MergeError> {
    let kind = list_kind(path);
    let replaces = patch.iter().any(is_bare_replace);
    if replaces || kind == ListKind::Atomic || !target.is_array() {
        *target = Value::Array(Vec::new());
    }
    let Value::Array(items) = target else {
        return Ok(());
    };
    for value in patch.iter().filter(|value| !is_bare_replace(value)) {
        match kind {
            ListKind::Atomic => items.push(value.clone()),
            ListKind::Set if items.contains(value) => {}
            ListKind::Set => items.push(value.clone()),
            ListKind::Keyed(key) => merge_item(path, items, key, value)?,
        }
    }
    Ok(())
}

/// `{$patch: replace}` among the items of a list: the others are the whole list.
fn is_bare_replace(item: &Value) -> bool {
    item.as_object()
        .is_some_and(|map| map.len() == 1 && map.get(PATCH).is_some_and(|d| d == "replace"))
}

fn merge_item<'p>(
    path: &mut Vec<&'p str>,
    items: &mut Vec<Value>,
    key: &'static str,
    patch: &'p Value,
) -> Result<(), MergeError> {
    let no_key = || MergeError::NoKey {
        path: path.join("."),
        key,
    };
    let map = patch.as_object().ok_or_else(no_key)?;
    let wanted = map.get(key).ok_or_else(no_key)?;
    let found = items.iter().position(|item| item.get(key) == Some(wanted));
    match (directive(path, map)?, found) {
        (Directive::Delete, Some(index)) => drop(items.remove(index)),
        (Directive::Delete, None) => {}
        (_, Some(index)) => merge_value(path, &mut items[index], patch)?,
        (_, None) => {
            let mut item = Value::Null;
            merge_value(path, &mut item, patch)?;
            items.push(item);
        }
    }
    Ok(())
}

/// `patchStrategy` and `patchMergeKey` of the API types. Items of lists have no name of their own in a path.
fn list_kind(path: &[&str]) -> ListKind {
    const CONTAINERS: [&str; 3] = ["containers", "initContainers", "ephemeralContainers"];
    match path {
        [.., "metadata", "ownerReferences"] => ListKind::Keyed("uid"),
        [.., "metadata", "finalizers"] => ListKind::Set,
        [.., "spec", list] if CONTAINERS.contains(list) => ListKind::Keyed("name"),
        [
            ..,
            "spec",
            "volumes" | "imagePullSecrets" | "resourceClaims",
        ] => ListKind::Keyed("name"),
        [.., "spec", "hostAliases"] => ListKind::Keyed("ip"),
        [.., "spec", "topologySpreadConstraints"] => ListKind::Keyed("topologyKey"),
        ["spec", "ports"] => ListKind::Keyed("port"),
        ["secrets"] => ListKind::Keyed("name"),
        [.., of, list] if CONTAINERS.contains(of) => match *list {
            "env" => ListKind::Keyed("name"),
            "ports" => ListKind::Keyed("containerPort"),
            "volumeMounts" => ListKind::Keyed("mountPath"),
            "volumeDevices" => ListKind::Keyed("devicePath"),
            _ => ListKind::Atomic,
        },
        _ => ListKind::Atomic,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[track_caller]
    fn merges(mut object: Value, patch: &Value, expected: &Value) {
        merge(&mut object, patch).unwrap();
        assert_eq!(&object, expected);
    }

    fn pod(containers: &Value) -> Value {
        json!({"spec": {"template": {"spec": {"containers": containers}}}})
    }

    #[test]
    fn maps_are_merged_and_null_deletes() {
        merges(
            json!({"spec": {"a": 1, "b": {"c": 2}, "d": [1]}}),
            &json!({"spec": {"a": null, "b": {"e": 3}, "d": [2]}}),
            &json!({"spec": {"b": {"c": 2, "e": 3}, "d": [2]}}),
        );
        merges(
            json!({"a": 1}),
            &json!({"a": {"b": null, "c": 1}}),
            &json!({"a": {"c": 1}}),
        );
    }

    #[test]
    fn containers_are_found_by_name_and_their_lists_by_their_keys() {
        merges(
            pod(
                &json!([{"name": "p", "image": "x", "env": [{"name": "A", "value": "1"}], "args": ["a"],
                "ports": [{"containerPort": 80, "name": "http"}]}]),
            ),
            &pod(&json!([
                {"name": "p", "env": [{"name": "A", "value": "2"}, {"name": "B", "value": "3"}], "args": ["b"],
                 "ports": [{"containerPort": 81}]},
                {"name": "second", "image": "y"},
            ])),
            &pod(&json!([
                {"name": "p", "image": "x", "env": [{"name": "A", "value": "2"}, {"name": "B", "value": "3"}],
                 "args": ["b"], "ports": [{"containerPort": 80, "name": "http"}, {"containerPort": 81}]},
                {"name": "second", "image": "y"},
            ])),
        );
    }

    #[test]
    fn service_ports_are_found_by_number() {
        merges(
            json!({"spec": {"ports": [{"port": 15008, "name": "mesh"}]}}),
            &json!({"spec": {"ports": [{"port": 15008, "nodePort": 30000}]}}),
            &json!({"spec": {"ports": [{"port": 15008, "name": "mesh", "nodePort": 30000}]}}),
        );
    }

    #[test]
    fn directives_replace_delete_and_retain() {
        merges(
            json!({"spec": {"strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1}}}}),
            &json!({"spec": {"strategy": {"$retainKeys": ["type"], "type": "Recreate"}}}),
            &json!({"spec": {"strategy": {"type": "Recreate"}}}),
        );
        merges(
            json!({"a": {"b": 1}, "c": {"d": 1}}),
            &json!({"a": {"$patch": "replace", "x": 1}, "c": {"$patch": "delete"}}),
            &json!({"a": {"x": 1}}),
        );
        merges(
            pod(&json!([{"name": "p"}, {"name": "q"}])),
            &pod(&json!([{"name": "p", "$patch": "delete"}])),
            &pod(&json!([{"name": "q"}])),
        );
        merges(
            pod(&json!([{"name": "p"}])),
            &pod(&json!([{"$patch": "replace"}, {"name": "q"}])),
            &pod(&json!([{"name": "q"}])),
        );
        merges(
            json!({"metadata": {"finalizers": ["a", "b"]}}),
            &json!({"metadata": {"finalizers": ["c"], "$deleteFromPrimitiveList/finalizers": ["a"]}}),
            &json!({"metadata": {"finalizers": ["b", "c"]}}),
        );
    }

    #[test]
    fn what_cannot_be_merged_is_named() {
        let refused = |patch: &Value| merge(&mut pod(&json!([])), patch).unwrap_err().to_string();
        assert_eq!(
            refused(&pod(&json!([{"image": "x"}]))),
            "spec.template.spec.containers: an item without name"
        );
        assert_eq!(
            refused(&json!({"spec": {"$patch": "what"}})),
            "spec: unknown $patch \"what\""
        );
    }
}
