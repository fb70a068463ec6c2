//! Starting and stopping one process behind its shim.

use std::{io, os::fd::OwnedFd, process::Stdio, time::Duration};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tokio::{
    process::{Child, Command},
    sync::watch,
};

use super::{
    logs::Log,
    shim::{self, Task},
};

/// A running process with its shim.
#[derive(Debug)]
pub(super) struct Running {
    child: Child,
    shim: i32,
}

/// How a process ended, as shells number it: its exit code, or 128 plus the signal.
pub(super) type ExitCode = i32;

impl Running {
    /// Starts `task`, with its output going to `log`.
    pub(super) fn logged(task: &Task, log: &Log) -> io::Result<Self> {
        let mut command = command(task)?;
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut running = Self::spawn(command)?;
        running
            .child
            .stdout
            .take()
            .map(|pipe| tokio::spawn(log.clone().copy(pipe)));
        running
            .child
            .stderr
            .take()
            .map(|pipe| tokio::spawn(log.clone().copy(pipe)));
        Ok(running)
    }

    /// Starts `task` on somebody else's standard input, output and error.
    pub(super) fn attached(task: &Task, [input, output, error]: [OwnedFd; 3]) -> io::Result<Self> {
        let mut command = command(task)?;
        command.stdin(input).stdout(output).stderr(error);
        Self::spawn(command)
    }

    /// Starts `task` without output.
    pub(super) fn silent(task: &Task) -> io::Result<Self> {
        let mut command = command(task)?;
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        Self::spawn(command)
    }

    fn spawn(mut command: Command) -> io::Result<Self> {
        let child = command.kill_on_drop(true).spawn()?;
        let id = child
            .id()
            .ok_or_else(|| io::Error::other("the process ended at once"))?;
        Ok(Self {
            child,
            shim: i32::try_from(id).map_err(io::Error::other)?,
        })
    }

    /// Process id of the shim, through which its world can be entered.
    pub(super) fn shim(&self) -> i32 {
        self.shim
    }

    /// Waits until it has ended. Cancel-safe.
    pub(super) async fn ended(&mut self) -> ExitCode {
        use std::os::unix::process::ExitStatusExt;
        match self.child.wait().await {
            Ok(status) => status
                .code()
                .unwrap_or_else(|| 128 + status.signal().unwrap_or(0)),
            Err(_) => -1,
        }
    }

    /// Asks it to end, waits `grace`, then makes it.
    pub(super) async fn stop(&mut self, grace: Duration) -> ExitCode {
        self.signal(Signal::SIGTERM);
        if let Ok(code) = tokio::time::timeout(grace, self.ended()).await {
            return code;
        }
        self.signal(Signal::SIGKILL);
        self.ended().await
    }

    /// Sends a signal to the shim, which passes it on (`SIGKILL` ends it, and with it everything behind it).
    pub(super) fn signal(&self, signal: Signal) {
        // Once it has been waited for, the number may be another process's.
        if self.child.id().is_some() {
            let _ = kill(Pid::from_raw(self.shim), signal);
        }
    }
}

/// Completes when `stop` says so, or when whoever could say so is gone.
pub(super) async fn stopped(stop: &mut watch::Receiver<bool>) {
    let _ = stop.wait_for(|stop| *stop).await;
}

fn command(task: &Task) -> io::Result<Command> {
    let mut command = Command::new("/proc/self/exe");
    command.arg0("leyline").arg(shim::ROLE).env_clear();
    command.env(shim::VARIABLE, serde_json::to_string(task)?);
    Ok(command)
}
