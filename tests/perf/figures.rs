//! What was measured, and how it is told: medians with their spread, and ratios round by round.

use std::{collections::BTreeMap, fmt::Write as _};

use rig::figures::{ratios, spread};

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
