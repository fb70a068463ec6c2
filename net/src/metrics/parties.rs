//! The ends of open connections, told once however many connections share them: an idle connection pays a pointer for
//! each of its ends, and not the labels of both.

use std::{collections::HashMap, sync::Arc};

use mesh::{
    flow::{FlowRecord, Party, PartyLabels},
    identity::Identity,
    shared::Shared,
    workload::Workload,
};
use parking_lot::Mutex;

type Labels = Shared<PartyLabels, 64>;

/// Workloads whose ends are remembered; at more, all are forgotten. Each may keep a record alive that is gone.
const RECENT: usize = 256;

/// Labels in use.
#[derive(Clone, Default)]
pub struct Parties(Arc<Mutex<Known>>);

#[derive(Default)]
struct Known {
    labels: Labels,
    /// By the address of the record, which stays where it is while it is kept here, and whether an identity is told.
    recent: HashMap<(usize, bool), Recent>,
}

/// How a workload was told last.
struct Recent {
    _workload: Arc<Workload>,
    identity: Option<Identity>,
    party: Party,
}

impl Parties {
    /// [`Party::of_workload`], which costs texts and hashes only when the record is another one than before.
    pub fn of_workload(&self, workload: &Arc<Workload>, identity: Option<&Identity>) -> Party {
        let key = (Arc::as_ptr(workload).addr(), identity.is_some());
        let mut known = self.0.lock();
        match known.recent.get(&key) {
            Some(recent) if recent.identity.as_ref() == identity => recent.party.clone(),
            _ => known.remember(key, workload, identity),
        }
    }

    /// The end, its labels replaced by equal ones that others have, too.
    pub fn kept(&self, mut party: Party) -> Party {
        self.0.lock().labels.share(&mut party.labels);
        party
    }

    /// The same for both ends of a record.
    pub fn shared(&self, mut record: FlowRecord) -> FlowRecord {
        record.source = self.kept(record.source);
        record.destination = self.kept(record.destination);
        record
    }
}

impl Known {
    fn remember(
        &mut self,
        key: (usize, bool),
        workload: &Arc<Workload>,
        identity: Option<&Identity>,
    ) -> Party {
        let mut party = Party::of_workload(workload, identity);
        self.labels.share(&mut party.labels);
        if self.recent.len() >= RECENT {
            self.recent.clear();
        }
        let recent = Recent {
            _workload: workload.clone(),
            identity: identity.cloned(),
            party: party.clone(),
        };
        self.recent.insert(key, recent);
        party
    }
}

#[cfg(test)]
mod tests {
    use mesh::flow::Direction;

    use super::*;
    use crate::allocations::Count;

    fn record(workload: &str) -> FlowRecord {
        let address = ([10, 0, 0, 1], 80).into();
        let mut record = FlowRecord::new(Direction::Inbound, address, address);
        record.source.labels = Arc::new(PartyLabels {
            workload: Some(workload.into()),
            ..PartyLabels::default()
        });
        record
    }

    fn workload(name: &str) -> Arc<Workload> {
        let uid = mesh::names::WorkloadUid(format!("c//Pod/ns/{name}").into());
        Arc::new(Workload::new(uid, name.into(), "ns".into()))
    }

    #[test]
    fn a_workload_that_was_told_before_is_told_without_an_allocation() {
        let (parties, web) = (Parties::default(), workload("web"));
        let identity = web.identity();
        let first = parties.of_workload(&web, Some(&identity));
        let count = Count::start();
        let again = parties.of_workload(&web, Some(&identity));
        assert_eq!(count.allocations(), 0);
        assert!(Arc::ptr_eq(&first.labels, &again.labels));
        let count = Count::start();
        parties.kept(Party::of_workload(&web, Some(&identity)));
        assert!(count.allocations() >= 3, "{}", count.allocations());
    }

    #[test]
    fn what_is_told_of_a_workload_follows_its_record_and_its_identity() {
        let (parties, old) = (Parties::default(), workload("web"));
        let other = Identity {
            service_account: "other".into(),
            ..old.identity()
        };
        for identity in [None, Some(&old.identity()), Some(&other), None] {
            let told = parties.of_workload(&old, identity);
            assert_eq!(told, Party::of_workload(&old, identity));
        }
        let mut new = Workload::clone(&old);
        new.canonical_revision = "v2".into();
        let new = Arc::new(new);
        assert_eq!(
            parties.of_workload(&new, None),
            Party::of_workload(&new, None)
        );
        for number in 0..2 * RECENT {
            parties.of_workload(&workload(&number.to_string()), None);
        }
        assert!(parties.0.lock().recent.len() <= RECENT);
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
        assert!(parties.0.lock().labels.count() <= 2 * Labels::FLOOR);
        let again = parties.shared(record("kept"));
        assert!(Arc::ptr_eq(&kept.source.labels, &again.source.labels));
    }
}
