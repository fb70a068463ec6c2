//! Statuses that are lists with entries of several controllers: `parents` of routes, `ancestors` of policies. Ours are
//! replaced, others' stay. Pure but for the time.

use serde_json::{Value, json};

use super::plan::Part;
use crate::{
    gateway::{class::WAYPOINT_CONTROLLER, status::stamped},
    output::{ParentStatus, StatusChange},
};

/// Such a list.
#[derive(Clone, Copy)]
pub(super) struct List {
    field: &'static str,
    reference: &'static str,
}

impl List {
    /// The list that a part is.
    pub(super) fn of(part: Part) -> Option<Self> {
        match part {
            Part::Parents => Some(Self {
                field: "parents",
                reference: "parentRef",
            }),
            Part::Ancestors => Some(Self {
                field: "ancestors",
                reference: "ancestorRef",
            }),
            _ => None,
        }
    }

    /// Our entries.
    pub(super) fn ours(self, status: &Value) -> Vec<Value> {
        let entries = status[self.field].as_array().into_iter().flatten();
        entries.filter(|entry| is_ours(entry)).cloned().collect()
    }

    /// The entries that are to stand there; a transition's time stays while the status does.
    pub(super) fn wanted(self, change: &StatusChange, standing: &[Value], now: &str) -> Vec<Value> {
        let generation = change
            .version
            .as_ref()
            .map_or(0, |version| version.generation);
        let entry = |parent: &ParentStatus| {
            let same = standing
                .iter()
                .find(|old| old[self.reference] == parent.reference);
            let before = same.map_or(&Value::Null, |old| &old["conditions"]);
            let mut entry = json!({
                "controllerName": WAYPOINT_CONTROLLER,
                "conditions": stamped(&parent.conditions, before, generation, now),
            });
            entry[self.reference] = parent.reference.clone();
            entry
        };
        change.parents.iter().map(entry).collect()
    }

    /// Whether what stands is what is wanted.
    pub(super) fn is_right(self, change: &StatusChange, standing: &[Value]) -> bool {
        // With another time, every entry that is not kept differs.
        self.wanted(change, standing, "") == standing
    }

    /// The steps (RFC 6902) from what was found to `wanted`.
    pub(super) fn steps(self, version: &str, status: &Value, wanted: Vec<Value>) -> Value {
        let others = status[self.field].as_array().into_iter().flatten();
        let others = others.filter(|entry| !is_ours(entry)).cloned();
        let all: Vec<Value> = others.chain(wanted).collect();
        let change = match status.is_object() {
            true => json!({"op": "add", "path": format!("/status/{}", self.field), "value": all}),
            false => {
                let mut status = json!({});
                status[self.field] = json!(all);
                json!({"op": "add", "path": "/status", "value": status})
            }
        };
        json!([
            {"op": "test", "path": "/metadata/resourceVersion", "value": version},
            change,
        ])
    }
}

fn is_ours(entry: &Value) -> bool {
    entry["controllerName"] == WAYPOINT_CONTROLLER
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        object::{Kind, Name, ObjectRef},
        output::{ObjectVersion, Truth},
        translate::condition,
    };

    fn change(status: Truth) -> StatusChange {
        StatusChange {
            object: ObjectRef {
                kind: Kind::HttpRoute,
                name: Name::new("shop", "web"),
            },
            version: Some(ObjectVersion {
                generation: 3,
                ..ObjectVersion::default()
            }),
            conditions: Vec::new(),
            parents: std::sync::Arc::new(vec![ParentStatus {
                reference: json!({"group": "", "kind": "Service", "name": "web"}),
                conditions: vec![condition("Accepted", status, "Accepted", "kept")],
            }]),
            addresses: Vec::new(),
        }
    }

    #[test]
    fn our_entries_are_replaced_and_others_stay() {
        let list = List::of(Part::Parents).unwrap();
        let wanted = list.wanted(&change(Truth::True), &[], "2026-01-01T00:00:00Z");
        let other = json!({"controllerName": "example.com/other", "parentRef": {"name": "gw"}});
        let stale = json!({"controllerName": WAYPOINT_CONTROLLER, "parentRef": {"name": "gone"}});
        let status = json!({"parents": [stale, other]});
        assert_eq!(list.ours(&status).len(), 1);
        let steps = list.steps("7", &status, wanted.clone());
        let expected = json!([
            {"op": "test", "path": "/metadata/resourceVersion", "value": "7"},
            {"op": "add", "path": "/status/parents", "value": [other, wanted[0]]},
        ]);
        assert_eq!(steps, expected);
        assert_eq!(wanted[0]["conditions"][0]["observedGeneration"], 3);
    }

    #[test]
    fn a_time_of_transition_stays_while_the_status_does() {
        let list = List::of(Part::Parents).unwrap();
        let standing = list.wanted(&change(Truth::True), &[], "2026-01-01T00:00:00Z");
        assert!(list.is_right(&change(Truth::True), &standing));
        assert!(!list.is_right(&change(Truth::False), &standing));
        let later = list.wanted(&change(Truth::False), &standing, "2026-02-02T00:00:00Z");
        let time = &later[0]["conditions"][0]["lastTransitionTime"];
        assert_eq!(time, "2026-02-02T00:00:00Z");
        let without = StatusChange {
            parents: std::sync::Arc::default(),
            ..change(Truth::True)
        };
        assert!(!list.is_right(&without, &standing), "ours must go");
    }
}
