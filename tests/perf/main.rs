//! Figures, as ratios in one run: plain TCP, our tunnel and (with `PEER_ZTUNNEL`) upstream's, in turn, round by round.
//!
//! `perf [--rounds N] [--only NAME,...] [--congestion-control NAME]`. Prints Markdown; every figure with its median and spread. Our tunnel is the `ztunnel`
//! beside this program, or the one that `OWN_ZTUNNEL` names.

mod changes;
mod figures;
mod knowledge;
mod modes;

use anyhow::{Context, Result, bail};

use crate::{figures::Table, modes::Modes};

const USAGE: &str = "usage: perf [--rounds N] [--only NAME,...] [--congestion-control NAME]";

/// What Linux does where nobody has set another. Machines differ in this, and figures with it by a factor of two: under `bbr`
/// a sender's own clock sets its pace, between two processes of one machine too.
const KERNELS_OWN: &str = "cubic";

struct Arguments {
    rounds: usize,
    only: Option<Vec<String>>,
    congestion_control: String,
}

impl Arguments {
    fn parse() -> Result<Self> {
        let mut arguments = Self {
            rounds: 5,
            only: None,
            congestion_control: KERNELS_OWN.to_owned(),
        };
        let mut words = std::env::args().skip(1);
        while let Some(word) = words.next() {
            let value = words.next().with_context(|| format!("{word}: {USAGE}"));
            match word.as_str() {
                "--rounds" => {
                    arguments.rounds = value?.parse().context("--rounds takes a number")?
                }
                "--congestion-control" => arguments.congestion_control = value?,
                "--only" => arguments.only = Some(value?.split(',').map(str::to_owned).collect()),
                _ => bail!("{word}: {USAGE}"),
            }
        }
        Ok(arguments)
    }

    fn wants(&self, name: &str) -> bool {
        self.only
            .as_ref()
            .is_none_or(|only| only.iter().any(|one| one == name))
    }
}

fn main() -> Result<()> {
    let arguments = Arguments::parse()?;
    let modes = Modes::start(&arguments.congestion_control)?;
    let mut table = Table::default();
    for round in 0..arguments.rounds {
        eprintln!("round {} of {}", round + 1, arguments.rounds);
        for mode in modes.all() {
            modes::round(mode, &mut table, |name| arguments.wants(name))?;
        }
        if arguments.wants("same-node") {
            for mode in modes.near() {
                modes::same_node(&mode, &mut table)?;
            }
        }
    }
    if arguments.wants("memory") {
        for mode in modes.all() {
            modes::memory(mode, &mut table)?;
        }
    }
    if arguments.wants("workloads") {
        for mode in modes
            .all()
            .iter()
            .filter(|mode| mode.name != figures::PLAIN)
        {
            knowledge::measure(mode.name, mode.lab, &mut table)?;
        }
    }
    println!("Congestion control: {}\n", arguments.congestion_control);
    println!("{}", table.markdown());
    if arguments.wants("changes") {
        println!("{}", changes::measure(modes.ours())?);
    }
    Ok(())
}
