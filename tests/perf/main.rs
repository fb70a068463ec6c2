//! Figures, as ratios in one run: plain TCP, our tunnel and (with `PEER_ZTUNNEL`) upstream's, in turn, round by round.
//!
//! `perf [--rounds N] [--only NAME,...]`. Prints Markdown; every figure with its median and spread.

mod changes;
mod figures;
mod modes;

use anyhow::{Context, Result};

use crate::{figures::Table, modes::Modes};

struct Arguments {
    rounds: usize,
    only: Option<Vec<String>>,
}

impl Arguments {
    fn parse() -> Result<Self> {
        let words: Vec<String> = std::env::args().skip(1).collect();
        let flag = |name: &str| {
            words
                .iter()
                .skip_while(|word| *word != name)
                .nth(1)
                .cloned()
        };
        let rounds = flag("--rounds")
            .map_or(Ok(5), |text| text.parse())
            .context("--rounds takes a number")?;
        let only = flag("--only").map(|list| list.split(',').map(str::to_owned).collect());
        Ok(Self { rounds, only })
    }

    fn wants(&self, name: &str) -> bool {
        self.only
            .as_ref()
            .is_none_or(|only| only.iter().any(|one| one == name))
    }
}

fn main() -> Result<()> {
    let arguments = Arguments::parse()?;
    let modes = Modes::start()?;
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
    println!("{}", table.markdown());
    if arguments.wants("changes") {
        println!("{}", changes::measure(modes.ours())?);
    }
    Ok(())
}
