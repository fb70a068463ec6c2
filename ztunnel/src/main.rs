//! The node tunnel's process. Everything is in the library; see [`ztunnel::main_with`].

use std::process::ExitCode;

#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> ExitCode {
    ztunnel::main_with(std::env::args().skip(1))
}
