//! What a tunnel holds of a mesh that it knows and has nothing to do with: workloads by the ten thousand.

use std::{thread, time::Duration};

use anyhow::{Result, bail};
use rig::NODES;

use crate::{
    figures::Table,
    modes::{Lab, settled},
};

const SIZES: [usize; 2] = [20_000, 100_000];
/// Of one file: the source refuses larger ones than 16 MiB.
const PER_FILE: usize = 10_000;
/// A record takes no less in both tunnels together: the sign that they have begun to know it.
const LEAST_BYTES: f64 = 400.0;
const DEADLINE: Duration = Duration::from_secs(180);

/// Resident memory of a tunnel by how many workloads it knows, one size after the other.
pub(crate) fn measure(name: &'static str, lab: &Lab, table: &mut Table) -> Result<()> {
    let before = settled(lab)?;
    let mut known = 0;
    for size in SIZES {
        for file in known / PER_FILE..size / PER_FILE {
            lab.mesh
                .write(&format!("many{file}.yaml"), &entries(file))?;
        }
        known = size;
        learned(lab, before + LEAST_BYTES * size as f64)?;
        let each = lab.resident()? / NODES.len() as f64;
        table.add(
            format!("resident memory of a tunnel that knows {size:>6} workloads"),
            "MiB",
            name,
            each / f64::from(1 << 20),
        );
    }
    for file in 0..known / PER_FILE {
        lab.mesh.remove(&format!("many{file}.yaml"))?;
    }
    Ok(())
}

/// Waits until both tunnels have grown by what they must, and then for sixteen seconds they and the control plane, which may be
/// longer about what it has still to tell them, have had next to nothing to do.
fn learned(lab: &Lab, least: f64) -> Result<()> {
    // Allocators hand back what nobody uses within ten seconds.
    const AT_REST: usize = 8;
    let (mut before, mut rested) = (lab.told()?, 0);
    for _ in 0..DEADLINE.as_secs() / 2 {
        thread::sleep(Duration::from_secs(2));
        let now = lab.told()?;
        let resting = now - before < 0.1 && lab.resident()? >= least;
        rested = if resting { rested + 1 } else { 0 };
        if rested == AT_REST {
            return Ok(());
        }
        before = now;
    }
    bail!("the tunnels do not come to rest, or do not come to know the workloads")
}

fn entries(file: usize) -> String {
    let entry = |number: usize| {
        let (index, high) = (file * PER_FILE + number, number / 250);
        let (b, c, d) = (64 + file, high, number % 250 + 1);
        format!(
            "---\napiVersion: networking.istio.io/v1\nkind: WorkloadEntry\n\
             metadata: {{ name: w{index}, namespace: outside, labels: {{ app: app{} }} }}\n\
             spec: {{ address: 100.{b}.{c}.{d}, serviceAccount: sa{} }}\n",
            index / 10,
            index / 10,
        )
    };
    (0..PER_FILE).map(entry).collect()
}
