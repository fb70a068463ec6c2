//! The `leyline` command: one program that is every part of the mesh, and `leyline local`, which runs them all on one
//! machine.

mod args;
mod commands;
mod demo;
pub mod local;
mod operator;
mod roles;
mod screen;
mod tool;

use std::process::ExitCode;

/// The program's entry: picks the role by the first argument, before any thread exists.
pub fn main() -> ExitCode {
    if let Some(role) = std::env::args().nth(1)
        && let Some(code) = roles::run(&role)
    {
        return code;
    }
    match commands::run(args::Args::read()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("{} {error:#}", screen::errors().bad("error:"));
            ExitCode::FAILURE
        }
    }
}
