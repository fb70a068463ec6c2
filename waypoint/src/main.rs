//! The waypoint's process. Everything is in the library; see [`waypoint::main_with`].

use std::process::ExitCode;

#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> ExitCode {
    waypoint::main_with(std::env::args().skip(1))
}
