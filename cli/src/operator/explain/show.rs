//! An explanation, as people read it.

use mesh::explain::{Explanation, Mark, Path, Step, Verdict};

use crate::screen::{self, Screen};

/// The verdict first, then how it comes about: the common steps, and of each verdict one path in full.
pub(super) fn text(explanation: &Explanation, place: Option<&str>) -> String {
    let screen = screen::output();
    let mut text = format!(
        "{}  {} -> {}\n",
        painted(screen, explanation.verdict),
        explanation.source,
        explanation.destination
    );
    text.push_str(&format!("  {}\n", explanation.summary));
    if let Some(by) = &explanation.decided_by {
        text.push_str(&format!("  decided by {}", screen.heading(&by.to_string())));
        if let Some(place) = place {
            text.push_str(&format!(" ({place})"));
        }
        text.push('\n');
    }
    text.push('\n');
    text.push_str(&steps(screen, &explanation.steps));
    for (path, alike) in representative(&explanation.paths) {
        text.push_str(&heading(screen, path));
        text.push_str(&steps(screen, &path.steps));
        if !alike.is_empty() {
            text.push_str(&format!("  and the same at {}\n", listed(&alike)));
        }
    }
    text
}

fn painted(screen: Screen, verdict: Verdict) -> String {
    let word = verdict.to_string();
    match verdict {
        Verdict::Allow => screen.good(&word),
        Verdict::Deny => screen.bad(&word),
        Verdict::Mixed | Verdict::Unknown => screen.waiting(&word),
    }
}

fn heading(screen: Screen, path: &Path) -> String {
    let node = path
        .node
        .as_ref()
        .map(|it| format!(" on {it}"))
        .unwrap_or_default();
    format!(
        "\n{}  endpoint {}{node}\n",
        painted(screen, path.verdict),
        path.endpoint
    )
}

fn steps(screen: Screen, steps: &[Step]) -> String {
    let mut rows = String::new();
    for step in steps {
        let mark = match step.outcome {
            Mark::Pass => screen.good("ok"),
            Mark::Warn => screen.waiting("!!"),
            Mark::Refuse => screen.bad("no"),
        };
        rows.push_str(&format!(
            "  {mark}  {:<9} {}\n",
            step.step.text(),
            step.detail
        ));
        for line in &step.more {
            rows.push_str(&format!("                {}\n", screen.quiet(line)));
        }
    }
    rows
}

/// One path for each verdict and decider, with the names of the others like it.
fn representative(paths: &[Path]) -> Vec<(&Path, Vec<&str>)> {
    let mut found: Vec<(&Path, Vec<&str>)> = Vec::new();
    for path in paths {
        let alike = |it: &&mut (&Path, Vec<&str>)| {
            it.0.verdict == path.verdict && it.0.decided_by == path.decided_by
        };
        match found.iter_mut().find(alike) {
            Some((_, others)) => others.push(&path.endpoint),
            None => found.push((path, Vec::new())),
        }
    }
    found
}

fn listed(names: &[&str]) -> String {
    const SHOWN: usize = 5;
    let shown = names
        .iter()
        .take(SHOWN)
        .copied()
        .collect::<Vec<_>>()
        .join(", ");
    match names.len().saturating_sub(SHOWN) {
        0 => shown,
        more => format!("{shown} and {more} more"),
    }
}
