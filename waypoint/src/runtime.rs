//! The process around [`crate::run()`]: arguments, settings, logs, limits and the runtime.

use std::process::ExitCode;

use net::{log, report::Chain, socket, version};
use tokio::runtime;

use crate::{config::Config, run};

const USAGE: &str = "\
usage: waypoint [proxy|version|help]

  proxy     run the waypoint (the default); further arguments are ignored
  version   print the version
  help      print this

Settings come from the environment.";

/// Runs the program with the arguments after its name; answers its exit code.
pub fn main_with(mut args: impl Iterator<Item = String>) -> ExitCode {
    match args.next().as_deref() {
        None | Some("proxy") => proxy(),
        Some("version") => {
            println!("{}", version::line("waypoint"));
            ExitCode::SUCCESS
        }
        Some("help" | "--help" | "-h") => {
            println!("{USAGE}");
            ExitCode::SUCCESS
        }
        Some(other) => {
            eprintln!("unknown command: {other}\n{USAGE}");
            ExitCode::FAILURE
        }
    }
}

/// Lets the allocator hand freed memory back by itself: without a thread of its own it does so only when it is called.
fn give_back_freed_memory() {
    if let Err(error) = tikv_jemalloc_ctl::background_thread::write(true) {
        // Memory is kept longer, and nothing else.
        tracing::debug!(%error, "the allocator has no thread of its own");
    }
}

fn proxy() -> ExitCode {
    let config = match Config::from_env() {
        Ok(config) => config,
        Err(error) => {
            eprintln!("{error}");
            return ExitCode::FAILURE;
        }
    };
    let options = log::Options {
        format: match config.log.json {
            true => log::Format::Json,
            false => log::Format::Plain,
        },
        filter: config.log.filter.clone(),
    };
    let logs = match log::init(&options) {
        Ok(logs) => logs,
        Err(error) => {
            eprintln!("{}", Chain(&error));
            return ExitCode::FAILURE;
        }
    };
    give_back_freed_memory();
    let code = match start(config, &logs) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(error = Chain(&*error).to_string(), "waypoint ends");
            ExitCode::FAILURE
        }
    };
    logs.flush();
    code
}

fn start(config: Config, logs: &log::Handle) -> Result<(), Box<dyn std::error::Error>> {
    match socket::raise_open_files_limit() {
        Ok(limit) => tracing::debug!(limit, "open files"),
        Err(error) => tracing::warn!(%error, "the limit of open files stays as it is"),
    }
    let runtime = runtime::Builder::new_multi_thread()
        .worker_threads(config.worker_threads)
        .thread_name("waypoint")
        .enable_all()
        .build()?;
    let ended = runtime.block_on(run::run_with(config, Some(logs.clone())));
    runtime.shutdown_background();
    Ok(ended?)
}
