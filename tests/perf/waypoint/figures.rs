//! Samples by figure and proxy, told as medians with their spread, and ratios round by round.

use std::fmt::Write as _;

use rig::figures::{ratios, spread};

struct Row {
    figure: String,
    unit: &'static str,
    ours: Vec<f64>,
    envoys: Vec<f64>,
}

/// Every sample, in the order in which figures were first measured.
#[derive(Default)]
pub(crate) struct Table(Vec<Row>);

impl Table {
    pub(crate) fn add(
        &mut self,
        figure: impl Into<String>,
        unit: &'static str,
        proxy: &str,
        value: f64,
    ) {
        let figure = figure.into();
        let at = self.0.iter().position(|row| row.figure == figure);
        let at = at.unwrap_or_else(|| {
            self.0.push(Row {
                figure,
                unit,
                ours: Vec::new(),
                envoys: Vec::new(),
            });
            self.0.len() - 1
        });
        match proxy {
            "leyline" => self.0[at].ours.push(value),
            _ => self.0[at].envoys.push(value),
        }
    }

    pub(crate) fn markdown(&self) -> String {
        let mut text = String::from(
            "| figure | unit | leyline | envoy | leyline / envoy |\n|---|---|---|---|---|\n",
        );
        for row in &self.0 {
            let ratios = ratios(&row.ours, &row.envoys);
            let cells = [&row.ours, &row.envoys, &ratios].map(|samples| spread(samples));
            // Writing to a String cannot fail.
            let _ = writeln!(
                text,
                "| {} | {} | {} |",
                row.figure,
                row.unit,
                cells.join(" | ")
            );
        }
        text
    }
}
