//! What a proxy's process asks of the system: to be told when to end, and how many connections its files allow.

use std::{future::Future, io};

use tokio::signal::unix::{SignalKind, signal};

use crate::socket;

/// Resolves at the first SIGTERM or SIGINT. A second SIGINT ends the process at once.
///
/// # Errors
/// If signals cannot be listened for.
pub fn told_to_end() -> io::Result<impl Future<Output = ()>> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => tracing::info!("told to terminate: draining"),
            _ = interrupt.recv() => tracing::info!("interrupted: draining; once more ends at once"),
        }
        tokio::spawn(async move {
            interrupt.recv().await;
            std::process::exit(0);
        });
    })
}

/// How many connections may be carried at a time. Each takes two files: the one that was accepted and the one that was
/// dialled.
pub fn most_connections() -> usize {
    const FILES_UNKNOWN: u64 = 1024;
    let files = socket::raise_open_files_limit().unwrap_or(FILES_UNKNOWN);
    usize::try_from(files / 2).unwrap_or(usize::MAX)
}
