//! What happened to connections lately, for readers who follow it live: bounded, however fast it happens and however
//! slowly they read.
//!
//! Two kinds of events are kept apart. Traffic (a connection opens, a connection ends well) is recorded only while
//! somebody reads, and the oldest makes room. What ended badly (a refusal, a failure) is recorded always; what happens
//! again to the same two ends for the same reason is one event that counts, so a flood of one denial takes the room of one
//! and nothing of it is lost. Only where more than [`KEPT_FAILURES`] different ones stay unread is a reader told of them
//! by reason and number alone.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    hash::BuildHasherDefault,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::SystemTime,
};

use serde::Serialize;

use crate::{
    authorize::RuleRef,
    flow::{Direction, EndReason, FlowRecord, PartyLabels, ServiceName},
    outcome::Object,
};

#[cfg(test)]
mod tests;

/// Events of traffic that are kept.
pub const KEPT_TRAFFIC: usize = 4096;
/// Different refusals and failures that are kept.
pub const KEPT_FAILURES: usize = 4096;
/// Readers at a time.
pub const MAX_READERS: usize = 16;

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum What {
    /// Bytes begin to flow.
    Opened,
    /// It ended, and not badly.
    Closed,
    /// Something decided against it: a policy, a route that leads nowhere, a limit.
    Refused,
    /// It was allowed, and did not succeed.
    Failed,
}

impl What {
    /// What an end is told as.
    pub fn of_end(end: EndReason) -> Self {
        match end {
            EndReason::Refused(_)
            | EndReason::PolicyChanged
            | EndReason::BadRequest
            | EndReason::TooMany
            | EndReason::CertificateRevoked => Self::Refused,
            end if end.is_failure() => Self::Failed,
            _ => Self::Closed,
        }
    }

    fn is_traffic(self) -> bool {
        matches!(self, Self::Opened | Self::Closed)
    }
}

/// One event, or several alike.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// Events are numbered in the order in which they are told; one that counts on gets a new number.
    pub seq: u64,
    /// What happened.
    pub what: What,
    /// When; the last time, where it counts several.
    pub at: SystemTime,
    /// When it happened first.
    pub first: SystemTime,
    /// How often since then: 1 for traffic.
    pub count: u64,
    /// The policy that allowed it, where one did.
    pub allowed_by: Option<RuleRef>,
    /// The connection, the last one of several.
    pub record: Arc<FlowRecord>,
}

/// What makes two failures the same.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Likeness {
    direction: Direction,
    source_addr: IpAddr,
    source: Arc<PartyLabels>,
    destination_addr: SocketAddr,
    destination: Arc<PartyLabels>,
    service: Option<ServiceName>,
    end: Option<EndReason>,
    decided_by: Option<Object>,
}

impl Likeness {
    fn of(record: &FlowRecord) -> Self {
        Self {
            direction: record.direction,
            source_addr: record.source_addr.ip(),
            source: record.source.labels.clone(),
            destination_addr: record.destination_addr,
            destination: record.destination.labels.clone(),
            service: record.service.clone(),
            end: record.end,
            decided_by: record.decided_by.as_deref().cloned(),
        }
    }
}

/// What a reader wants to be told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Interest {
    /// Everything.
    All,
    /// Refusals and failures.
    Failures,
}

/// Where a reader begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Begin {
    /// With what happens from now on.
    Now,
    /// With the refusals and failures that are still kept.
    Kept,
}

/// A reader of a [`Journal`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ReaderId(u64);

/// As many as may read do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{MAX_READERS} others read already, as many as may")]
pub struct TooManyReaders;

/// What a reader was too slow for.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Missed {
    /// Events of traffic.
    pub traffic: u64,
    /// Refusals and failures, by reason.
    pub failures: BTreeMap<String, u64>,
}

impl Missed {
    /// Whether that is nothing.
    pub fn is_empty(&self) -> bool {
        self.traffic == 0 && self.failures.is_empty()
    }
}

/// What is new to a reader.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct News {
    /// What it was too slow for, before the events.
    pub missed: Missed,
    /// In their order.
    pub events: Vec<Arc<Event>>,
}

#[derive(Debug)]
struct Reader {
    /// The first event that it has not been given.
    next: u64,
    interest: Interest,
    missed: Missed,
}

/// The record of what happened. Not shared: its owner locks it.
#[derive(Debug)]
pub struct Journal {
    next: u64,
    traffic: VecDeque<Arc<Event>>,
    failures: BTreeMap<u64, Arc<Event>>,
    alike: HashMap<Likeness, u64, BuildHasherDefault<std::hash::DefaultHasher>>,
    readers: BTreeMap<ReaderId, Reader>,
    next_reader: u64,
    dropped_traffic: u64,
    dropped_failures: u64,
    kept_traffic: usize,
    kept_failures: usize,
}

impl Default for Journal {
    fn default() -> Self {
        Self::with_room(KEPT_TRAFFIC, KEPT_FAILURES)
    }
}

impl Journal {
    /// An empty one that keeps so many events of traffic, and so many different failures; at least one of each.
    pub fn with_room(traffic: usize, failures: usize) -> Self {
        Self {
            next: 0,
            traffic: VecDeque::new(),
            failures: BTreeMap::new(),
            alike: HashMap::default(),
            readers: BTreeMap::new(),
            next_reader: 0,
            dropped_traffic: 0,
            dropped_failures: 0,
            kept_traffic: traffic.max(1),
            kept_failures: failures.max(1),
        }
    }

    /// Enters a reader.
    ///
    /// # Errors
    /// There are [`MAX_READERS`].
    pub fn follow(&mut self, interest: Interest, begin: Begin) -> Result<ReaderId, TooManyReaders> {
        if self.readers.len() >= MAX_READERS {
            return Err(TooManyReaders);
        }
        let id = ReaderId(self.next_reader);
        self.next_reader += 1;
        let next = match begin {
            Begin::Now => self.next,
            // Traffic from before is not there, or is that of other readers.
            Begin::Kept => 0,
        };
        if begin == Begin::Kept && !self.wants_traffic() {
            self.traffic.clear();
        }
        let reader = Reader {
            next,
            interest,
            missed: Missed::default(),
        };
        self.readers.insert(id, reader);
        Ok(id)
    }

    /// Takes a reader off; unknown ones are passed over.
    pub fn unfollow(&mut self, reader: ReaderId) {
        self.readers.remove(&reader);
        if !self.wants_traffic() {
            self.traffic.clear();
        }
    }

    /// Whether anybody wants traffic: without, it need not even be told.
    pub fn wants_traffic(&self) -> bool {
        self.readers.values().any(|it| it.interest == Interest::All)
    }

    /// Enters that a connection opened or ended.
    pub fn tell(
        &mut self,
        what: What,
        at: SystemTime,
        record: FlowRecord,
        allowed_by: Option<RuleRef>,
    ) {
        let seq = self.next;
        let event = Event {
            seq,
            what,
            at,
            first: at,
            count: 1,
            allowed_by,
            record: Arc::new(record),
        };
        match what.is_traffic() {
            true if self.wants_traffic() => self.tell_traffic(event),
            true => return,
            false => self.tell_failure(event),
        }
        self.next += 1;
    }

    fn tell_traffic(&mut self, event: Event) {
        if self.traffic.len() >= self.kept_traffic
            && let Some(gone) = self.traffic.pop_front()
        {
            let unread = |it: &&mut Reader| it.interest == Interest::All && it.next <= gone.seq;
            for reader in self.readers.values_mut().filter(unread) {
                reader.missed.traffic += 1;
                self.dropped_traffic += 1;
            }
        }
        self.traffic.push_back(Arc::new(event));
    }

    fn tell_failure(&mut self, event: Event) {
        let likeness = Likeness::of(&event.record);
        let before = self.alike.insert(likeness, event.seq);
        let before = before.and_then(|seq| self.failures.remove(&seq));
        let event = match before {
            Some(before) => Event {
                first: before.first,
                count: before.count + 1,
                ..event
            },
            None => event,
        };
        self.failures.insert(event.seq, Arc::new(event));
        if self.failures.len() > self.kept_failures
            && let Some((_, gone)) = self.failures.pop_first()
        {
            self.forget(&gone);
        }
    }

    fn forget(&mut self, gone: &Event) {
        self.alike.remove(&Likeness::of(&gone.record));
        let reason = gone.record.end.map(|it| it.to_string());
        for reader in self.readers.values_mut().filter(|it| it.next <= gone.seq) {
            let by_reason = &mut reader.missed.failures;
            *by_reason
                .entry(reason.clone().unwrap_or_default())
                .or_default() += gone.count;
            self.dropped_failures += 1;
        }
    }

    /// What is new to a reader, at most `limit` events; nothing for one that is not known.
    pub fn read(&mut self, reader: ReaderId, limit: usize) -> News {
        let Some(entry) = self.readers.get_mut(&reader) else {
            return News::default();
        };
        let first = self.traffic.partition_point(|it| it.seq < entry.next);
        let traffic = match entry.interest {
            Interest::All => self.traffic.range(first..),
            Interest::Failures => self.traffic.range(self.traffic.len()..),
        };
        let mut events: Vec<_> = traffic.take(limit).cloned().collect();
        let failures = self.failures.range(entry.next..).map(|(_, it)| it);
        events.extend(failures.take(limit).cloned());
        events.sort_by_key(|it| it.seq);
        events.truncate(limit);
        entry.next = match events.last() {
            Some(last) => last.seq + 1,
            None => self.next,
        };
        News {
            missed: std::mem::take(&mut entry.missed),
            events,
        }
    }

    /// The refusals and failures that are kept, the latest last.
    pub fn failures(&self) -> impl Iterator<Item = &Arc<Event>> {
        self.failures.values()
    }

    /// How many events of traffic, and how many of failures, readers were too slow for.
    pub fn dropped(&self) -> (u64, u64) {
        (self.dropped_traffic, self.dropped_failures)
    }
}
