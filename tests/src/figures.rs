//! How samples are told: a median with its spread, and ratios round by round.

/// Ours to theirs, round by round.
pub fn ratios(ours: &[f64], others: &[f64]) -> Vec<f64> {
    ours.iter()
        .zip(others)
        .map(|(ours, other)| ours / other)
        .collect()
}

/// `median (lowest to highest)`, or a dash.
pub fn spread(samples: &[f64]) -> String {
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
