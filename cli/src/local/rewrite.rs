//! `leyline local label --write`: changes labels in the user's own YAML, and nothing else in it. Comments, order and style
//! stay; an edit that would change more than the labels is refused.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail};
use controlplane::source::tree::{self, Entry, Node, Value};

/// Labels to set, or (`None`) to take away.
pub(super) type Edits = BTreeMap<String, Option<String>>;

/// Edits the labels of a namespace or a pod in the file below `folder` that it stands in: that file's path.
pub(super) fn in_folder(
    folder: &Path,
    namespace: Option<&str>,
    name: &str,
    edits: &Edits,
) -> Result<PathBuf> {
    let mut files = Vec::new();
    yaml_files(folder, &mut files).with_context(|| format!("read {}", folder.display()))?;
    for path in files {
        let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
        if let Some(edited) = in_text(&text, namespace, name, edits) {
            let edited = edited.with_context(|| format!("edit {}", path.display()))?;
            replace(&path, &edited).with_context(|| format!("write {}", path.display()))?;
            return Ok(path);
        }
    }
    bail!("no file of {} holds {name}", folder.display())
}

fn yaml_files(folder: &Path, found: &mut Vec<PathBuf>) -> std::io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        let ending = path.extension().and_then(|ending| ending.to_str());
        if path.is_dir() {
            yaml_files(&path, found)?;
        } else if matches!(ending, Some("yaml" | "yml")) {
            found.push(path);
        }
    }
    found.sort();
    Ok(())
}

/// In one step, with the file's own permissions.
fn replace(path: &Path, text: &str) -> std::io::Result<()> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let temporary = path.with_file_name(format!(".{name}.new"));
    fs::write(&temporary, text)?;
    fs::set_permissions(&temporary, fs::metadata(path)?.permissions())?;
    fs::rename(&temporary, path)
}

/// The text with the labels edited; `None` where the object does not stand in it.
fn in_text(
    text: &str,
    namespace: Option<&str>,
    name: &str,
    edits: &Edits,
) -> Option<Result<String>> {
    let documents = tree::parse(text).ok()?;
    let index = documents
        .iter()
        .position(|document| is(document, namespace, name))?;
    Some(edit(text, index, edits))
}

/// A namespace, or (with a namespace) a pod.
fn is(document: &Node, namespace: Option<&str>, name: &str) -> bool {
    let kind = if namespace.is_some() {
        "Pod"
    } else {
        "Namespace"
    };
    let Some(metadata) = document.field("metadata") else {
        return false;
    };
    let field = |node: &Node, key: &str| {
        node.field(key)
            .and_then(|field| field.text())
            .map(str::to_owned)
    };
    let stands_in = field(metadata, "namespace").unwrap_or_else(|| "default".to_owned());
    field(document, "kind").as_deref() == Some(kind)
        && field(metadata, "name").as_deref() == Some(name)
        && namespace.is_none_or(|namespace| namespace == stands_in)
}

/// One edit after the other, each on the text that the last one left.
fn edit(text: &str, index: usize, edits: &Edits) -> Result<String> {
    let mut edited = text.to_owned();
    for (key, value) in edits {
        let documents = tree::parse(&edited)?;
        let document = documents.get(index).context("the document is gone")?;
        edited = one(&edited, document, key, value.as_deref())?;
    }
    let (before, after) = (tree::parse(text)?, tree::parse(&edited)?);
    let as_wanted = before.len() == after.len()
        && before
            .iter()
            .zip(&after)
            .enumerate()
            .all(|(at, (before, after))| {
                let wanted = if at == index {
                    labelled(before, edits)
                } else {
                    plain(before)
                };
                without_empty_labels(plain(after)) == without_empty_labels(wanted)
            });
    if !as_wanted {
        bail!(
            "it is written in a way that cannot be edited safely: please change its labels yourself"
        );
    }
    Ok(edited)
}

fn one(text: &str, document: &Node, key: &str, value: Option<&str>) -> Result<String> {
    let metadata = entry(document, "metadata").context("it has no metadata")?;
    let labels = entry(&metadata.node, "labels");
    let label = labels.and_then(|labels| entry(&labels.node, key));
    let mut lines = Lines::of(text);
    match (labels, label, value) {
        (_, Some(label), Some(value)) => lines.set(label, value),
        (Some(labels), Some(label), None) => lines.remove(labels, label),
        (_, None, None) => {}
        (Some(labels), None, Some(value)) => {
            lines.insert(labels, &format!("{key}: {}", scalar(value)))
        }
        (None, None, Some(value)) => lines.insert_labels(metadata, key, value),
        (None, Some(_), _) => unreachable!("a label stands in labels"),
    }
    Ok(lines.text())
}

fn entry<'a>(node: &'a Node, key: &str) -> Option<&'a Entry> {
    match &node.value {
        Value::Mapping(entries) => entries.iter().find(|entry| &*entry.key == key),
        _ => None,
    }
}

/// A file's lines, edited by the places that its tree names (lines and columns count from 1, columns in characters).
struct Lines(Vec<String>);

impl Lines {
    fn of(text: &str) -> Self {
        Self(text.split_inclusive('\n').map(str::to_owned).collect())
    }

    fn text(self) -> String {
        self.0.concat()
    }

    fn at(&mut self, place: tree::Place) -> Option<(&mut String, usize)> {
        let line = self
            .0
            .get_mut(usize::try_from(place.line.checked_sub(1)?).ok()?)?;
        let column = usize::try_from(place.column.checked_sub(1)?).ok()?;
        let byte = line
            .char_indices()
            .nth(column)
            .map_or(line.len(), |(byte, _)| byte);
        Some((line, byte))
    }

    /// Replaces the value of a label that is there.
    fn set(&mut self, label: &Entry, value: &str) {
        if let Some((line, start)) = self.at(label.node.place) {
            let end = start + scalar_length(&line[start..]);
            line.replace_range(start..end, &scalar(value));
        }
    }

    fn remove(&mut self, labels: &Entry, label: &Entry) {
        let flow = self.is_flow(labels);
        let (key, value) = (label.place, label.node.place);
        let Some((line, start)) = self.at(key) else {
            return;
        };
        if !flow {
            line.clear();
            let last = matches!(&labels.node.value, Value::Mapping(all) if all.len() == 1);
            if last && let Some((line, _)) = self.at(labels.place) {
                line.clear();
            }
            return;
        }
        let from = usize::try_from(value.column).unwrap_or(1) - 1;
        let from = line
            .char_indices()
            .nth(from)
            .map_or(line.len(), |(byte, _)| byte);
        let mut end = from + scalar_length(&line[from..]);
        let rest = &line[end..];
        let mut begin = start;
        match rest.trim_start().strip_prefix(',') {
            Some(after) => end = line.len() - after.trim_start_matches(' ').len(),
            // The last one: the comma before it goes.
            None => begin = line[..start].trim_end_matches([' ', ',']).len(),
        }
        line.replace_range(begin..end, "");
    }

    /// Adds an entry at the beginning of a mapping.
    fn insert(&mut self, mapping: &Entry, entry: &str) {
        let Value::Mapping(entries) = &mapping.node.value else {
            return;
        };
        if self.is_flow(mapping) {
            let comma = if entries.is_empty() { "" } else { ", " };
            if let Some((line, start)) = self.at(mapping.node.place) {
                line.insert_str(start + 1, &format!("{entry}{comma}"));
            }
        } else if let Some(first) = entries.first()
            && let Some((line, start)) = self.at(first.place)
        {
            let indent = line[..start].to_owned();
            line.insert_str(0, &format!("{indent}{entry}\n"));
        }
    }

    fn insert_labels(&mut self, metadata: &Entry, key: &str, value: &str) {
        if self.is_flow(metadata) {
            self.insert(metadata, &format!("labels: {{{key}: {}}}", scalar(value)));
            return;
        }
        let Value::Mapping(entries) = &metadata.node.value else {
            return;
        };
        let column = entries.first().map_or(3, |first| first.place.column);
        let indent = " ".repeat(usize::try_from(column + 1).unwrap_or(4));
        self.insert(
            metadata,
            &format!("labels:\n{indent}{key}: {}", scalar(value)),
        );
    }

    fn is_flow(&mut self, mapping: &Entry) -> bool {
        self.at(mapping.node.place)
            .is_some_and(|(line, start)| line[start..].starts_with('{'))
    }
}

/// How many bytes of `text` the scalar at its beginning takes, as label values are written.
fn scalar_length(text: &str) -> usize {
    match text.chars().next() {
        Some(quote @ ('"' | '\'')) => text[1..].find(quote).map_or(text.len(), |end| end + 2),
        _ => text
            .find([',', '}', ' ', '\n', '\r', '#'])
            .unwrap_or(text.len()),
    }
}

/// A label's value as YAML: in quotes unless it is plainly a word.
fn scalar(value: &str) -> String {
    const NOT_WORDS: [&str; 9] = ["true", "false", "yes", "no", "on", "off", "null", "y", "n"];
    let word = value.starts_with(|first: char| first.is_ascii_alphabetic())
        && value
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte))
        && !NOT_WORDS.contains(&value.to_ascii_lowercase().as_str());
    if word {
        value.to_owned()
    } else {
        serde_json::Value::from(value).to_string()
    }
}

/// A document without places, styles and order: what it means.
fn plain(node: &Node) -> serde_json::Value {
    match &node.value {
        Value::Plain(text) => serde_json::json!({ "plain": &**text }),
        Value::Text(text) => serde_json::json!({ "text": &**text }),
        Value::Sequence(items) => items.iter().map(|item| plain(item)).collect(),
        Value::Mapping(entries) => {
            let entries = entries
                .iter()
                .map(|entry| (entry.key.to_string(), plain(&entry.node)));
            serde_json::json!({ "mapping": entries.collect::<serde_json::Map<_, _>>() })
        }
    }
}

/// What a document should mean once its labels are edited.
fn labelled(node: &Node, edits: &Edits) -> serde_json::Value {
    let mut meant = plain(node);
    let labels = &mut meant["mapping"]["metadata"]["mapping"]["labels"];
    if !labels["mapping"].is_object() {
        *labels = serde_json::json!({ "mapping": {} });
    }
    for (key, value) in edits {
        match value {
            // Read back by the same eyes, so that a quoted word and a plain one differ here as they do in the file.
            Some(value) if scalar(value).starts_with('"') => {
                labels["mapping"][key] = serde_json::json!({ "text": value })
            }
            Some(value) => labels["mapping"][key] = serde_json::json!({ "plain": value }),
            None => drop(
                labels["mapping"]
                    .as_object_mut()
                    .map(|labels| labels.remove(key)),
            ),
        }
    }
    meant
}

/// No labels are as good as an empty list of them, or none written after `labels:`.
fn without_empty_labels(mut meant: serde_json::Value) -> serde_json::Value {
    let metadata = &mut meant["mapping"]["metadata"]["mapping"];
    let labels = &metadata["labels"];
    let empty = labels.is_null()
        || labels["plain"] == ""
        || labels["mapping"]
            .as_object()
            .is_some_and(serde_json::Map::is_empty);
    if empty && let Some(metadata) = metadata.as_object_mut() {
        metadata.remove("labels");
    }
    meant
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(before: &str, edits: &[(&str, Option<&str>)], after: &str) {
        let edits = edits
            .iter()
            .map(|(key, value)| ((*key).to_owned(), value.map(str::to_owned)));
        let edited = in_text(before, None, "a", &edits.collect()).expect("the namespace is there");
        assert_eq!(edited.expect("it can be edited"), after);
    }

    const JOIN: &[(&str, Option<&str>)] = &[("istio.io/dataplane-mode", Some("ambient"))];

    #[test]
    fn labels_are_added_and_everything_else_stays() {
        check(
            "# Mine.\nkind: Namespace\nmetadata:\n  name: a # the first\n---\nkind: Pod\n",
            JOIN,
            "# Mine.\nkind: Namespace\nmetadata:\n  labels:\n    istio.io/dataplane-mode: ambient\n  name: a # the first\n---\nkind: Pod\n",
        );
        check(
            "kind: Pod\n---\nkind: Namespace\nmetadata:\n    name: a\n    labels:\n        x: y\n",
            JOIN,
            "kind: Pod\n---\nkind: Namespace\nmetadata:\n    name: a\n    labels:\n        istio.io/dataplane-mode: ambient\n        x: y\n",
        );
        check(
            "kind: Namespace\nmetadata: {name: a}\n",
            JOIN,
            "kind: Namespace\nmetadata: {labels: {istio.io/dataplane-mode: ambient}, name: a}\n",
        );
        check(
            "kind: Namespace\nmetadata: {name: a, labels: {x: y}}\n",
            JOIN,
            "kind: Namespace\nmetadata: {name: a, labels: {istio.io/dataplane-mode: ambient, x: y}}\n",
        );
    }

    #[test]
    fn labels_are_changed_and_removed_where_they_stand() {
        let block =
            "kind: Namespace\nmetadata:\n  name: a\n  labels:\n    x: y # why\n    z: \"1\"\n";
        check(block, &[("x", Some("w"))], &block.replace("x: y", "x: w"));
        check(block, &[("z", Some("2"))], &block.replace("\"1\"", "\"2\""));
        check(
            block,
            &[("x", None)],
            &block.replace("    x: y # why\n", ""),
        );
        let none = "kind: Namespace\nmetadata:\n  name: a\n";
        check(
            &format!("{none}  labels:\n    x: y\n"),
            &[("x", None)],
            none,
        );
        let flow = "kind: Namespace\nmetadata: {name: a, labels: {x: y, z: \"1\"}}\n";
        check(
            flow,
            &[("x", Some("true"))],
            &flow.replace("x: y", "x: \"true\""),
        );
        check(flow, &[("x", None)], &flow.replace("x: y, ", ""));
        check(flow, &[("z", None)], &flow.replace(", z: \"1\"", ""));
        check(
            flow,
            &[("x", None), ("z", None), ("w", Some("v"))],
            &flow.replace("x: y, z: \"1\"", "w: v"),
        );
    }

    #[test]
    fn what_cannot_be_edited_safely_is_left_alone() {
        let anchored = "kind: Namespace\nmetadata:\n  name: a\n  labels: &l\n    x: |\n      y\n";
        let edits = Edits::from([("x".to_owned(), Some("w".to_owned()))]);
        assert!(
            in_text(anchored, None, "a", &edits)
                .expect("it is there")
                .is_err()
        );
        assert!(in_text("kind: Namespace\nmetadata: {name: b}\n", None, "a", &edits).is_none());
    }
}
