//! `make conformance`: the Gateway API's conformance suite for meshes, whole, on a cluster of the rig; the report goes to
//! `docs/conformance`. With arguments: only these tests, and no report.

use anyhow::{Context, Result};
use rig::cluster::{bed, conformance, machine};

fn main() -> Result<()> {
    let only: Vec<String> = std::env::args().skip(1).collect();
    let only: Vec<&str> = only.iter().map(String::as_str).collect();
    let report = machine::repository().join("docs/conformance/mesh.yaml");
    let whole = only.is_empty();
    let (_turn, bed) = bed::alone()?;
    let text = conformance::run(bed, &only, whole.then_some(report.as_path()))
        .with_context(|| bed.evidence())?;
    for line in text.lines().filter(|line| is_result(line)) {
        println!("{line}");
    }
    if whole {
        println!("report: {}", report.display());
    }
    Ok(())
}

/// Whether a line is the result of one of the suite's tests, and not of a part of one.
fn is_result(line: &str) -> bool {
    line.starts_with("--- ") || line.starts_with("    --- ")
}
