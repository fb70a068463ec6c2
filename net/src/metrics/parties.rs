//! The ends of open connections, told once however many connections share them: an idle connection pays a pointer for
//! each of its ends, and not the labels of both.

use std::sync::Arc;

use mesh::{
    flow::{FlowRecord, PartyLabels},
    shared::Shared,
};
use parking_lot::Mutex;

type Labels = Shared<PartyLabels, 64>;

/// Labels in use.
#[derive(Clone, Default)]
pub struct Parties(Arc<Mutex<Labels>>);

impl Parties {
    /// The record, its ends' labels replaced by equal ones that others have, too.
    pub fn shared(&self, mut record: FlowRecord) -> FlowRecord {
        let mut known = self.0.lock();
        known.share(&mut record.source.labels);
        known.share(&mut record.destination.labels);
        record
    }
}

#[cfg(test)]
mod tests {
    use mesh::flow::Direction;

    use super::*;

    fn record(workload: &str) -> FlowRecord {
        let address = ([10, 0, 0, 1], 80).into();
        let mut record = FlowRecord::new(Direction::Inbound, address, address);
        record.source.labels = Arc::new(PartyLabels {
            workload: Some(workload.into()),
            ..PartyLabels::default()
        });
        record
    }

    #[test]
    fn equal_ends_are_one() {
        let parties = Parties::default();
        let [one, two] = ["web", "web"].map(|name| parties.shared(record(name)));
        assert!(Arc::ptr_eq(&one.source.labels, &two.source.labels));
        let other = parties.shared(record("db"));
        assert!(!Arc::ptr_eq(&one.source.labels, &other.source.labels));
    }

    #[test]
    fn ends_that_nobody_has_any_more_are_dropped() {
        let parties = Parties::default();
        let kept = parties.shared(record("kept"));
        for number in 0..10_000 {
            parties.shared(record(&number.to_string()));
        }
        assert!(parties.0.lock().count() <= 2 * Labels::FLOOR);
        let again = parties.shared(record("kept"));
        assert!(Arc::ptr_eq(&kept.source.labels, &again.source.labels));
    }
}
