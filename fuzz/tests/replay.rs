//! The committed corpora, and inputs near them, through every target: the same inputs on every run.

use std::{
    collections::BTreeSet,
    fs,
    panic::{AssertUnwindSafe, catch_unwind},
    path::PathBuf,
};

use fuzz::TARGETS;
use mesh::draw::Draw;

/// Inputs near the corpus, for a target that only computes, and for one that runs a connection.
const MUTATIONS: usize = 4_000;
const CONNECTIONS: usize = 600;
/// The longest input that is made.
const LONGEST: usize = 4_096;

fn folder() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// A target's inputs, by file name, so that the order is the same everywhere.
fn corpus(target: &str) -> Vec<Vec<u8>> {
    let folder = folder().join("corpus").join(target);
    let entries = fs::read_dir(&folder).unwrap_or_else(|error| panic!("{folder:?}: {error}"));
    let paths: BTreeSet<_> = entries
        .map(|entry| entry.expect("an entry").path())
        .collect();
    let read = |path: &PathBuf| fs::read(path).unwrap_or_else(|error| panic!("{path:?}: {error}"));
    paths.iter().map(read).collect()
}

/// Chance that is the same on every run.
struct Chance(Draw);

impl Chance {
    fn below(&mut self, bound: usize) -> usize {
        let (now, later) = self.0.split();
        self.0 = later;
        let bound = u64::try_from(bound).expect("a length");
        let drawn = now.below(bound).unwrap_or(0);
        usize::try_from(drawn).expect("below a length")
    }

    fn byte(&mut self) -> u8 {
        // Half of the time a byte that parsers look for.
        const SPECIAL: &[u8] = b"\0\x01\x7f\x80\xff\n\r /.:;,=%\"'[](){}@#?-_*+0aA";
        match self.below(2) {
            0 => SPECIAL[self.below(SPECIAL.len())],
            _ => u8::try_from(self.below(256)).expect("below 256"),
        }
    }

    /// One to eight changes of one of the inputs.
    fn mutate(&mut self, inputs: &[Vec<u8>]) -> Vec<u8> {
        let mut input = inputs[self.below(inputs.len())].clone();
        for _ in 0..=self.below(8) {
            self.change(&mut input, inputs);
        }
        input.truncate(LONGEST);
        input
    }

    fn change(&mut self, input: &mut Vec<u8>, inputs: &[Vec<u8>]) {
        let at = self.below(input.len() + 1);
        let end = (at + self.below(16)).min(input.len());
        match self.below(7) {
            0 if at < input.len() => input[at] = self.byte(),
            1 if at < input.len() => input[at] ^= 1 << self.below(8),
            2 => drop(input.drain(at..end)),
            3 => {
                let again = input[at..end].to_vec();
                input.splice(at..at, again);
            }
            4 => input.truncate(at),
            5 => {
                let other = &inputs[self.below(inputs.len())];
                let from = self.below(other.len() + 1);
                input.truncate(at);
                input.extend_from_slice(&other[from..]);
            }
            _ => input.insert(at, self.byte()),
        }
    }
}

#[track_caller]
fn replay(target: &str, body: fn(&[u8]), input: &[u8]) {
    if catch_unwind(AssertUnwindSafe(|| body(input))).is_err() {
        panic!("{target} fails for b\"{}\"", input.escape_ascii());
    }
}

/// Replays what is committed, then what is near it.
fn run(target: &str) {
    let (_, body) = TARGETS
        .iter()
        .find(|(name, _)| *name == target)
        .expect("a target");
    let inputs = corpus(target);
    assert!(!inputs.is_empty(), "{target} has an empty corpus");
    for input in &inputs {
        replay(target, *body, input);
    }
    let count = match target.starts_with("hbone_c") || target.starts_with("hbone_s") {
        true => CONNECTIONS,
        false => MUTATIONS,
    };
    let mut chance = Chance(Draw(1));
    for _ in 0..count {
        replay(target, *body, &chance.mutate(&inputs));
    }
}

/// A test per target, named as it, and the list of them.
macro_rules! targets {
    ($($name:ident),+ $(,)?) => {
        $(#[test]
        fn $name() {
            run(stringify!($name));
        })+

        const REPLAYED: &[&str] = &[$(stringify!($name)),+];
    };
}

targets!(
    baggage,
    dns_message,
    expression,
    forwarded,
    hbone_client,
    hbone_request,
    hbone_server,
    log_format,
    path,
    proxy_header,
    routes,
    sniff,
    spiffe,
    workloads,
    zds_packet,
);

#[test]
fn every_target_is_replayed_and_has_a_binary_and_a_corpus() {
    let named: BTreeSet<_> = TARGETS.iter().map(|(name, _)| (*name).to_owned()).collect();
    let replayed: BTreeSet<_> = REPLAYED.iter().map(|name| (*name).to_owned()).collect();
    assert_eq!(named, replayed);
    let files = |path: &str| -> BTreeSet<String> {
        let entries = fs::read_dir(folder().join(path)).expect("a folder");
        let paths = entries.map(|entry| entry.expect("an entry").path());
        paths
            .filter_map(|path| Some(path.file_stem()?.to_str()?.to_owned()))
            .collect()
    };
    assert_eq!(named, files("libfuzzer/targets"));
    assert_eq!(named, files("corpus"));
}
