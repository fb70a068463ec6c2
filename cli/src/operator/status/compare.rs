//! What a control plane serves beside what a node tunnel holds, resource by resource.

use std::collections::BTreeMap;

use serde::Serialize;
use serde_json::{Map, Value};

use crate::operator::ztunnel_config::dump::Dump;

/// The lists of a dump that are served, the kind of their items, and the fields that make an item's name.
const LISTS: [(&str, &str, &[&str]); 3] = [
    ("workloads", "Workload", &["uid"]),
    ("services", "Service", &["namespace", "hostname"]),
    ("policies", "Policy", &["namespace", "name"]),
];

/// How a resource is not the same at both ends.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "camelCase", tag = "difference")]
pub(crate) enum How {
    /// The proxy does not hold what is served.
    Missing,
    /// The proxy holds what is not served.
    Extra,
    /// Both have it, and these fields are not the same.
    Differs { fields: Vec<String> },
}

/// A resource that is not the same at both ends.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub(crate) struct Difference {
    pub kind: &'static str,
    pub name: String,
    #[serde(flatten)]
    pub how: How,
}

/// What is not the same in the two dumps, by kind and name. Of fields that only one of them prints, nothing is said: proxies of
/// other vendors and versions print more or less.
pub(crate) fn differences(served: &Dump, held: &Dump) -> Vec<Difference> {
    let mut found = Vec::new();
    for (list, kind, names) in LISTS {
        let (served, mut held) = (items(served, list, names), items(held, list, names));
        for (name, item) in served {
            let how = match held.remove(&name) {
                None => Some(How::Missing),
                Some(other) => differing(item, other),
            };
            found.extend(how.map(|how| Difference { kind, name, how }));
        }
        found.extend(held.into_keys().map(|name| Difference {
            kind,
            name,
            how: How::Extra,
        }));
    }
    found
}

fn items<'d>(
    dump: &'d Dump,
    list: &str,
    names: &[&str],
) -> BTreeMap<String, &'d Map<String, Value>> {
    let all = dump.0.get(list).and_then(Value::as_array);
    let named = |item: &'d Value| {
        let item = item.as_object()?;
        let parts = names.iter().map(|field| item.get(*field)?.as_str());
        let parts: Option<Vec<&str>> = parts.collect();
        Some((parts?.join("/"), item))
    };
    all.into_iter().flatten().filter_map(named).collect()
}

fn differing(one: &Map<String, Value>, other: &Map<String, Value>) -> Option<How> {
    let both = one.iter().filter(|(field, value)| {
        let there = other.get(*field);
        there.is_some_and(|there| there != *value)
    });
    let fields: Vec<String> = both.map(|(field, _)| field.clone()).collect();
    (!fields.is_empty()).then_some(How::Differs { fields })
}

impl Difference {
    /// One line.
    pub(crate) fn text(&self) -> String {
        let (word, more) = match &self.how {
            How::Missing => ("missing", String::new()),
            How::Extra => ("extra", String::new()),
            How::Differs { fields } => ("differs", format!(": {}", fields.join(", "))),
        };
        format!("  {word:<8} {} {}{more}\n", self.kind, self.name)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_is_missing_extra_and_different_is_told_by_name_and_field() {
        let served = Dump::new(json!({
            "workloads": [{"uid": "same", "node": "n"}, {"uid": "stale", "status": "Healthy", "node": "n"}],
            "services": [{"namespace": "shop", "hostname": "web.shop", "vips": ["/10.0.0.1"]}],
            "policies": [],
        }));
        let held = Dump::new(json!({
            "workloads": [{"uid": "stale", "status": "Unhealthy", "node": "n"}, {"uid": "same", "node": "n", "more": 1}],
            "services": [],
            "policies": [{"namespace": "shop", "name": "old"}],
        }));
        let found = differences(&served.unwrap(), &held.unwrap());
        let lines: String = found.iter().map(Difference::text).collect();
        assert_eq!(
            lines,
            "  differs  Workload stale: status
  missing  Service shop/web.shop
  extra    Policy shop/old
"
        );
        let json = serde_json::to_value(&found[0]).unwrap();
        let wanted = json!({"kind": "Workload", "name": "stale", "difference": "differs", "fields": ["status"]});
        assert_eq!(json, wanted);
    }
}
