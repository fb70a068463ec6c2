//! What a process uses, from /proc, and how samples are told.

use std::fmt;

use anyhow::{Context as _, Result};

/// A process.
pub(crate) struct Usage(u32);

impl Usage {
    pub(crate) fn of(pid: u32) -> Self {
        Self(pid)
    }

    /// Seconds of CPU since its start.
    pub(crate) fn cpu(&self) -> Result<f64> {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.0))?;
        let after = stat.rsplit_once(") ").context("read stat")?.1;
        let ticks = after.split(' ').skip(11).take(2);
        let ticks: Result<Vec<f64>, _> = ticks.map(str::parse).collect();
        // USER_HZ is 100 on every Linux that Rust runs on.
        Ok(ticks?.iter().sum::<f64>() / 100.0)
    }

    /// Bytes of memory of its own.
    pub(crate) fn memory(&self) -> Result<u64> {
        self.status("VmRSS:")
    }

    /// The most it had.
    pub(crate) fn peak(&self) -> Result<u64> {
        self.status("VmHWM:")
    }

    fn status(&self, field: &str) -> Result<u64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.0))?;
        let line = status.lines().find_map(|line| line.strip_prefix(field));
        let kib = line.and_then(|line| line.split_whitespace().next());
        Ok(kib
            .with_context(|| format!("read {field}"))?
            .parse::<u64>()?
            * 1024)
    }
}

/// Samples, told by their middle and their ends.
pub(crate) struct Spread(Vec<f64>);

impl Spread {
    pub(crate) fn of(mut samples: Vec<f64>) -> Self {
        samples.sort_by(f64::total_cmp);
        Self(samples)
    }
}

impl fmt::Display for Spread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let last = self.0.len().saturating_sub(1);
        let at = |part: usize| self.0.get(last * part / 100).copied().unwrap_or_default();
        write!(
            f,
            "median {:.1}, p99 {:.1} (lowest {:.1}, highest {:.1}, {} samples)",
            at(50),
            at(99),
            at(0),
            at(100),
            self.0.len()
        )
    }
}
