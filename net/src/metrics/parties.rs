//! The ends of open connections, told once however many connections share them: an idle connection pays a pointer for
//! each of its ends, and not the labels of both.

use std::{collections::HashSet, sync::Arc};

use mesh::flow::{FlowRecord, PartyLabels};
use parking_lot::Mutex;

/// Labels in use. Those that no connection has any more are dropped whenever the set has doubled, so that it holds at
/// most twice as many as are in use, and [`Parties::FLOOR`].
#[derive(Clone, Default)]
pub struct Parties(Arc<Mutex<Known>>);

#[derive(Default)]
struct Known {
    labels: HashSet<Arc<PartyLabels>>,
    prune_at: usize,
}

impl Parties {
    /// Below this, nothing is dropped.
    const FLOOR: usize = 64;

    /// The record, its ends' labels replaced by equal ones that others have, too.
    pub fn shared(&self, mut record: FlowRecord) -> FlowRecord {
        let mut known = self.0.lock();
        known.share(&mut record.source.labels);
        known.share(&mut record.destination.labels);
        record
    }
}

impl Known {
    fn share(&mut self, labels: &mut Arc<PartyLabels>) {
        match self.labels.get(labels) {
            Some(same) => *labels = same.clone(),
            None => self.insert(labels.clone()),
        }
    }

    fn insert(&mut self, labels: Arc<PartyLabels>) {
        if self.labels.len() >= self.prune_at.max(Parties::FLOOR) {
            self.labels.retain(|it| Arc::strong_count(it) > 1);
            self.prune_at = 2 * self.labels.len();
        }
        self.labels.insert(labels);
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
        assert!(parties.0.lock().labels.len() <= 2 * Parties::FLOOR);
        let again = parties.shared(record("kept"));
        assert!(Arc::ptr_eq(&kept.source.labels, &again.source.labels));
    }
}
