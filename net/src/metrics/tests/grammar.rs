//! A strict reader of both text formats: whatever it takes, a scraper takes.

use std::collections::BTreeMap;

use super::Format;

/// Panics at the first thing that the format does not allow.
pub(super) fn check(text: &str, format: Format) {
    let open = format == Format::OpenMetrics;
    let body = match text.strip_suffix("# EOF\n") {
        Some(body) => {
            assert!(open, "only OpenMetrics tells its end");
            body
        }
        None => {
            assert!(!open, "it has no end");
            text
        }
    };
    assert!(body.is_empty() || body.ends_with('\n'));
    let mut kinds: BTreeMap<String, String> = BTreeMap::new();
    let mut current = String::new();
    for line in body.lines() {
        match line.strip_prefix("# ") {
            Some(told) => current = comment(told, open, &mut kinds),
            None => sample(line, open, &current, &kinds[&current]),
        }
    }
}

/// The family that it is of.
fn comment(told: &str, open: bool, kinds: &mut BTreeMap<String, String>) -> String {
    let mut words = told.splitn(3, ' ');
    let (keyword, name) = (words.next().unwrap(), words.next().unwrap());
    let rest = words.next().unwrap();
    assert!(is_name(name), "{name}");
    match keyword {
        "HELP" => assert!(!kinds.contains_key(name), "{name} is told of twice"),
        "TYPE" => {
            let known = match open {
                true => ["counter", "gauge", "histogram", "info", "unknown"],
                false => ["counter", "gauge", "histogram", "summary", "untyped"],
            };
            assert!(known.contains(&rest), "{rest}");
            let before = kinds.insert(name.to_owned(), rest.to_owned());
            assert!(before.is_none(), "{name} is told of twice");
            if rest == "counter" {
                assert_eq!(name.ends_with("_total"), !open, "{name}");
            }
        }
        "UNIT" => assert!(open && name.ends_with(&format!("_{rest}"))),
        other => panic!("{other}"),
    }
    name.to_owned()
}

fn sample(line: &str, open: bool, family: &str, kind: &str) {
    let end = line.find(['{', ' ']).unwrap();
    let (name, rest) = line.split_at(end);
    let suffix = name.strip_prefix(family).unwrap();
    let allowed: &[&str] = match (kind, open) {
        ("counter", true) => &["_total"],
        ("histogram", _) => &["_sum", "_count", "_bucket"],
        ("info", _) => &["_info"],
        _ => &[""],
    };
    assert!(allowed.contains(&suffix), "{name} of {family}");
    let (labels, rest) = labels(rest);
    assert_eq!(labels.contains_key("le"), suffix == "_bucket", "{line}");
    let rest = rest.strip_prefix(' ').unwrap();
    let (value, exemplar) = match rest.split_once(" # ") {
        Some((value, exemplar)) => (value, Some(exemplar)),
        None => (rest, None),
    };
    value.parse::<f64>().unwrap();
    let Some(exemplar) = exemplar else { return };
    assert!(open && suffix == "_bucket", "{line}");
    let (labels, rest) = self::labels(exemplar);
    let length: usize = labels.iter().map(|(k, v)| k.len() + v.len()).sum();
    assert!((1..=128).contains(&length));
    let numbers: Vec<f64> = rest
        .split_whitespace()
        .map(|it| it.parse().unwrap())
        .collect();
    assert_eq!(numbers.len(), 2);
}

/// `{name="value",...}` at the start, and what follows.
fn labels(text: &str) -> (BTreeMap<String, String>, &str) {
    let mut all = BTreeMap::new();
    let Some(mut rest) = text.strip_prefix('{') else {
        return (all, text);
    };
    loop {
        let (name, after) = rest.split_once("=\"").unwrap();
        assert!(is_name(name), "{name}");
        let mut value = String::new();
        let mut chars = after.char_indices();
        let end = loop {
            let (at, char) = chars.next().expect("a value ends");
            match char {
                '"' => break at,
                '\\' => {
                    let (_, escaped) = chars.next().expect("something is escaped");
                    assert!(matches!(escaped, '"' | '\\' | 'n'), "{escaped}");
                    value.push(escaped);
                }
                other => value.push(other),
            }
        };
        assert!(all.insert(name.to_owned(), value).is_none(), "{name} twice");
        rest = &after[end + 1..];
        match rest.split_at(1) {
            (",", after) => rest = after,
            ("}", after) => return (all, after),
            (other, _) => panic!("{other} after a label"),
        }
    }
}

fn is_name(text: &str) -> bool {
    let all = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == ':';
    !text.is_empty() && text.chars().all(all) && !text.starts_with(|c: char| c.is_ascii_digit())
}
