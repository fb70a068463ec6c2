//! `leyline local demo`: a mesh, real traffic, and for every claim the evidence. It fails if one piece is not seen.

mod requests;
mod stage;
mod steps;

use std::{process::ExitCode, time::Instant};

use anyhow::{Context, Result};

use crate::{
    local::rig::{Options, Rig},
    screen,
};
use stage::Stage;

/// Runs the demo; fails if any claim lacks its evidence.
pub(crate) fn run(keep: bool) -> Result<ExitCode> {
    let started = Instant::now();
    let program = std::env::current_exe().context("find this program")?;
    let screen = screen::output();
    println!(
        "{}",
        screen.heading("Leyline: a service mesh without sidecars, on this one machine")
    );
    let stage = Stage::new(screen);
    let options = Options::new(program)
        .file("shop.yaml", include_str!("shop.yaml"))
        .file("store.yaml", include_str!("store.yaml"));
    let rig = stage.during(
        "starting two nodes, a control plane, two tunnels and nine pods",
        || Rig::start(&options),
    )?;
    stage.evidence(&format!(
        "up in {:.1} s, as {}",
        started.elapsed().as_secs_f32(),
        user(&rig)?
    ));
    let result = steps::all(&stage, &rig);
    let failed = match &result {
        Ok(()) => stage.failures(),
        Err(error) => {
            stage.failure(&format!("{error:#}"));
            stage.failures()
        }
    };
    if keep {
        println!(
            "\nThe mesh stays: leyline local status --name {}. Ctrl-C ends it.",
            rig.name()
        );
        let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
    }
    if failed > 0 {
        println!("\n{}", screen.quiet(&rig.logs()));
    }
    rig.stop().context("stop the mesh")?;
    let seconds = started.elapsed().as_secs_f32();
    println!();
    if failed > 0 {
        println!(
            "{} {failed} claims lack their evidence ({seconds:.0} s)",
            screen.bad("FAILED:")
        );
        return Ok(ExitCode::FAILURE);
    }
    println!(
        "{} every claim was seen, in {seconds:.0} s; nothing is left running",
        screen.good("Done:")
    );
    println!(
        "Next: leyline local up FOLDER runs your own YAML; leyline local --help tells the rest."
    );
    Ok(ExitCode::SUCCESS)
}

fn user(rig: &Rig) -> Result<&'static str> {
    Ok(if rig.status()?.rootless {
        "an ordinary user, in a user namespace"
    } else {
        "root"
    })
}
