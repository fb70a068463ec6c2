//! The roles that this program takes when it executes itself: every part of the mesh, and the embedded mesh's helpers.
//! Chosen before any thread exists.

use std::process::ExitCode;

use crate::local;

/// Runs the role called `name`; `None` when there is none, and the command line is for people.
pub fn run(name: &str) -> Option<ExitCode> {
    match name {
        local::SUPERVISOR_ROLE => Some(local::supervisor_main()),
        local::SHIM_ROLE => Some(local::shim_main()),
        _ => None,
    }
}
