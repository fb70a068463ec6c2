//! What was measured, and how it is told: medians with their spread, and ratios round by round.

use std::{collections::BTreeMap, fmt::Write as _};

/// Every sample, by figure and mode, in the order of the rounds.
#[derive(Default)]
pub(crate) struct Table {
    samples: BTreeMap<Figure, BTreeMap<&'static str, Vec<f64>>>,
}

/// What is measured, in which unit.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Figure {
    pub(crate) name: String,
    pub(crate) unit: &'static str,
}

/// The mode that all ratios are against.
pub(crate) const PLAIN: &str = "plain";
/// Ours.
pub(crate) const OURS: &str = "leyline";
/// Upstream's.
pub(crate) const PEER: &str = "peer";

impl Table {
    pub(crate) fn add(
        &mut self,
        name: impl Into<String>,
        unit: &'static str,
        mode: &'static str,
        value: f64,
    ) {
        let figure = Figure {
            name: name.into(),
            unit,
        };
        self.samples
            .entry(figure)
            .or_default()
            .entry(mode)
            .or_default()
            .push(value);
    }

    /// One line a figure: each mode's median (lowest to highest), then the ratios of ours, round by round.
    pub(crate) fn markdown(&self) -> String {
        let mut text = String::from(
            "| figure | unit | plain TCP | leyline | peer | leyline / plain | leyline / peer |\n|---|---|---|---|---|---|---|\n",
        );
        for (figure, modes) in &self.samples {
            let of = |mode: &str| modes.get(mode).map(Vec::as_slice).unwrap_or_default();
            let cells = [PLAIN, OURS, PEER].map(|mode| spread(of(mode)));
            let ratios = [PLAIN, PEER].map(|other| spread(&ratios(of(OURS), of(other))));
            let line = [cells.as_slice(), ratios.as_slice()].concat().join(" | ");
            // Writing to a String cannot fail.
            let _ = writeln!(text, "| {} | {} | {line} |", figure.name, figure.unit);
        }
        text
    }
}

fn ratios(ours: &[f64], others: &[f64]) -> Vec<f64> {
    ours.iter()
        .zip(others)
        .map(|(ours, other)| ours / other)
        .collect()
}

/// `median (lowest to highest)`, or a dash.
pub(crate) fn spread(samples: &[f64]) -> String {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    match (sorted.first(), sorted.get(sorted.len() / 2), sorted.last()) {
        (Some(low), Some(middle), Some(high)) if sorted.len() > 1 => {
            format!("{} ({} to {})", short(*middle), short(*low), short(*high))
        }
        (Some(only), ..) => short(*only),
        _ => "-".to_owned(),
    }
}

fn short(value: f64) -> String {
    match value.abs() {
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}
