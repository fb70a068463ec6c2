//! How the demo shows what it does: a heading for each claim, evidence below it, and a sign of life while it waits.

use std::{
    cell::Cell,
    io::Write,
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use crate::screen::Screen;

/// Shows, and counts what was not seen.
#[derive(Debug)]
pub(super) struct Stage {
    screen: Screen,
    failures: Cell<u32>,
}

impl Stage {
    /// An empty stage.
    pub(super) fn new(screen: Screen) -> Self {
        Self {
            screen,
            failures: Cell::new(0),
        }
    }

    /// A new claim.
    pub(super) fn claim(&self, letter: char, claim: &str) {
        println!("\n{}", self.screen.heading(&format!("({letter}) {claim}")));
    }

    /// A piece of evidence.
    pub(super) fn evidence(&self, text: &str) {
        println!("  {} {text}", self.screen.good("ok"));
    }

    /// Something quoted, as it stands in a log or a file.
    pub(super) fn quote(&self, text: &str) {
        println!("     {}", self.screen.quiet(text));
    }

    /// A piece of evidence that was not seen.
    pub(super) fn failure(&self, text: &str) {
        self.failures.set(self.failures.get() + 1);
        println!("  {} {text}", self.screen.bad("NOT SEEN"));
    }

    /// Evidence or its absence.
    pub(super) fn check(&self, seen: bool, text: &str) {
        if seen {
            self.evidence(text)
        } else {
            self.failure(text)
        }
    }

    /// How many pieces were not seen.
    pub(super) fn failures(&self) -> u32 {
        self.failures.get()
    }

    /// Does something that may take long, with a sign of life if it does.
    pub(super) fn during<T>(&self, what: &str, work: impl FnOnce() -> T) -> T {
        const PATIENCE: Duration = Duration::from_secs(1);
        let (done, waiting) = mpsc::channel::<()>();
        let (what, live) = (what.to_owned(), self.screen.is_live());
        let sign = thread::spawn(move || {
            let started = Instant::now();
            while waiting.recv_timeout(PATIENCE) == Err(mpsc::RecvTimeoutError::Timeout) {
                let seconds = started.elapsed().as_secs();
                let mut out = std::io::stdout();
                // On a terminal the line is rewritten; elsewhere it is said once.
                let _ = match (live, seconds) {
                    (true, _) => {
                        write!(out, "\r  ... {what} ({seconds} s)\x1b[K").and_then(|()| out.flush())
                    }
                    (false, 1) => writeln!(out, "  ... {what}"),
                    (false, _) => Ok(()),
                };
            }
            if live && started.elapsed() > PATIENCE {
                print!("\r\x1b[K");
            }
        });
        let result = work();
        drop(done);
        let _ = sign.join();
        result
    }
}
