//! The process around [`crate::run()`]: arguments, settings, logs, limits and the runtimes.

use std::process::ExitCode;

use net::{lanes::Lanes, log, netns::Netns, report::Chain, socket};
use tokio::runtime;

use crate::{
    config::{Config, Mode},
    run,
};

const USAGE: &str = "\
usage: ztunnel [proxy|version|help]

  proxy     run the node tunnel (the default); further arguments are ignored
  version   print the version
  help      print this

Settings come from the environment and from ./etc/istio/config/mesh.";

/// Runs the program with the arguments after its name; answers its exit code.
///
/// Must be called before any thread is started: the process may enter namespaces.
pub fn main_with(mut args: impl Iterator<Item = String>) -> ExitCode {
    match args.next().as_deref() {
        None | Some("proxy") => proxy(),
        Some("version") => {
            println!("{}", net::version::line("ztunnel"));
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

/// Lets the allocator hand freed memory back by itself. Without a thread of its own it does so only when it is called,
/// and a tunnel whose connections have ended is not. Called once the role is chosen: the thread must not be there before.
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
            tracing::error!(error = Chain(&*error).to_string(), "ztunnel ends");
            ExitCode::FAILURE
        }
    };
    logs.flush();
    code
}

/// Checks what a node tunnel must be permitted to do, so that it fails at start-up and not at the first pod.
fn check_permissions(config: &Config) -> Result<(), Box<dyn std::error::Error>> {
    if config.mode == Mode::Shared {
        Netns::current()?.enter()?;
    }
    if let Some(mark) = config.inpod.mark {
        socket::check_mark(mark)?;
    }
    Ok(())
}

fn start(config: Config, logs: &log::Handle) -> Result<(), Box<dyn std::error::Error>> {
    match socket::raise_open_files_limit() {
        Ok(limit) => tracing::debug!(limit, "open files"),
        Err(error) => tracing::warn!(%error, "the limit of open files stays as it is"),
    }
    check_permissions(&config)?;
    let (lanes, _running) = Lanes::start(config.worker_threads, "ztunnel-data")?;
    let control = runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    Ok(control.block_on(run::run_on(config, lanes, Some(logs.clone())))?)
}
