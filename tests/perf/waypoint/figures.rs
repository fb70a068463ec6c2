//! Samples by figure and proxy, told as medians with their spread, and ratios round by round.

use std::fmt::Write as _;

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
            let pairs = row.ours.iter().zip(&row.envoys);
            let ratios: Vec<f64> = pairs.map(|(ours, envoys)| ours / envoys).collect();
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

/// `median (lowest to highest)`, or a dash.
fn spread(samples: &[f64]) -> String {
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
