//! What is not taken on when memory runs out: better a refusal to a new request than the kernel's end of all of them.

use std::{
    fs,
    sync::{
        Arc,
        atomic::{AtomicU8, Ordering},
    },
    time::Duration,
};

use net::metrics::resident_bytes;
use tokio::time::MissedTickBehavior;

use crate::waypoint::Waypoint;

/// How often memory is looked at. It takes longer to fill a share of it.
const LOOK: Duration = Duration::from_millis(100);
/// The limit of our own control group (cgroup v2), as a container sees it.
const CGROUP_LIMIT: &str = "/sys/fs/cgroup/memory.max";
/// Percent of the limit from which idle connections are closed.
const HIGH: u64 = 85;
/// Percent of the limit from which nothing new is taken on.
const FULL: u64 = 95;

/// How much of our memory is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Level {
    /// There is room, or no limit.
    Calm,
    /// What is kept for later is given up.
    High,
    /// Nothing new is taken on.
    Full,
}

/// The level now.
#[derive(Debug)]
pub(crate) struct Overload {
    limit: Option<u64>,
    level: AtomicU8,
}

/// Nothing new is taken on: memory is nearly used up.
#[derive(Debug, thiserror::Error)]
#[error("memory is nearly used up: nothing new is taken on")]
pub(crate) struct Overloaded;

impl Overload {
    /// Of `limit` bytes; without one, of what the control group is given.
    pub(crate) fn new(limit: Option<u64>) -> Self {
        let limit = limit.or_else(|| parse(&fs::read_to_string(CGROUP_LIMIT).ok()?));
        let overload = Self {
            limit,
            level: AtomicU8::new(Level::Calm as u8),
        };
        overload.look();
        overload
    }

    /// Whether nothing new is taken on.
    pub(crate) fn is_full(&self) -> bool {
        self.level.load(Ordering::Relaxed) == Level::Full as u8
    }

    fn look(&self) -> Level {
        let level = match (self.limit, resident_bytes()) {
            (Some(limit), Some(used)) => level(used, limit),
            _ => Level::Calm,
        };
        let before = self.level.swap(level as u8, Ordering::Relaxed);
        if (before == Level::Full as u8) != (level == Level::Full) {
            tracing::warn!(
                limit = self.limit,
                ?level,
                "memory: nothing new is taken on, or is again"
            );
        }
        level
    }
}

fn level(used: u64, limit: u64) -> Level {
    let percent = used.saturating_mul(100) / limit.max(1);
    match percent {
        FULL.. => Level::Full,
        HIGH.. => Level::High,
        _ => Level::Calm,
    }
}

/// `max`, or bytes.
fn parse(text: &str) -> Option<u64> {
    text.trim().parse().ok()
}

/// Looks at memory for as long as it runs, and gives up what is kept for later while there is little.
pub(crate) async fn watch(waypoint: Arc<Waypoint>) {
    if waypoint.overload.limit.is_none() {
        return;
    }
    let mut every = tokio::time::interval(LOOK);
    every.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        every.tick().await;
        if waypoint.overload.look() >= Level::High {
            waypoint.http.close_idle();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_begin_where_they_should() {
        for (used, expected) in [
            (0, Level::Calm),
            (849, Level::Calm),
            (850, Level::High),
            (949, Level::High),
            (950, Level::Full),
            (2000, Level::Full),
        ] {
            assert_eq!(level(used, 1000), expected, "{used}");
        }
        assert_eq!(level(1, 0), Level::Full);
    }

    #[test]
    fn a_control_group_without_a_limit_has_none() {
        assert_eq!(parse("max\n"), None);
        assert_eq!(parse("134217728\n"), Some(134_217_728));
    }
}
