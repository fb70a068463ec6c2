#![allow(unsafe_code, reason = "terminal sizes are read and set by ioctl")]
//! A terminal for a command in a pod: a pair of its own, whose other end is joined to the user's.

use std::{
    io::{self, Read, Write},
    os::fd::{AsFd, AsRawFd, OwnedFd},
    thread,
};

use anyhow::{Context, Result};
use nix::{
    errno::Errno,
    libc,
    pty::{OpenptyResult, openpty},
    sys::{
        signal::{SigSet, Signal},
        termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr},
    },
};

/// Puts the user's terminal back as it was.
struct Restore(Termios);

impl Drop for Restore {
    fn drop(&mut self) {
        let _ = tcsetattr(io::stdin(), SetArg::TCSADRAIN, &self.0);
    }
}

/// Runs `body` with the end for the command; meanwhile keys go there and output comes back.
pub(super) fn with_own<T>(body: impl FnOnce(&dyn AsFd) -> Result<T>) -> Result<T> {
    let OpenptyResult { master, slave } = openpty(None, None).context("make a terminal")?;
    copy_size(&master);
    let before = tcgetattr(io::stdin()).context("read the terminal's settings")?;
    let mut raw = before.clone();
    cfmakeraw(&mut raw);
    let restore = Restore(before);
    tcsetattr(io::stdin(), SetArg::TCSADRAIN, &raw).context("change the terminal's settings")?;
    follow_size(master.try_clone()?)?;
    let keys = std::fs::File::from(master.try_clone()?);
    thread::spawn(move || copy(io::stdin(), keys));
    let output = std::fs::File::from(master);
    let shown = thread::spawn(move || copy(output, io::stdout()));
    let result = body(&slave);
    // Once the last end is closed, what is left is shown and the copying ends.
    drop(slave);
    let _ = shown.join();
    drop(restore);
    result
}

fn copy(mut from: impl Read, mut to: impl Write) {
    let mut buffer = [0; 4096];
    loop {
        match from.read(&mut buffer) {
            Ok(length @ 1..) => {
                if to
                    .write_all(&buffer[..length])
                    .and_then(|()| to.flush())
                    .is_err()
                {
                    return;
                }
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            // A terminal whose other end is gone answers with an error, not with its end.
            _ => return,
        }
    }
}

fn follow_size(master: OwnedFd) -> Result<()> {
    let signals: SigSet = [Signal::SIGWINCH].into_iter().collect();
    signals.thread_block().context("block signals")?;
    thread::spawn(move || {
        while signals.wait().is_ok() {
            copy_size(&master);
        }
    });
    Ok(())
}

fn copy_size(master: &OwnedFd) {
    let mut size = libc::winsize {
        ws_row: 0,
        ws_col: 0,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: both calls are given a valid winsize, which the first fills and the second reads.
    let copied = unsafe {
        Errno::result(libc::ioctl(0, libc::TIOCGWINSZ, &raw mut size)).and_then(|_| {
            Errno::result(libc::ioctl(
                master.as_raw_fd(),
                libc::TIOCSWINSZ,
                &raw const size,
            ))
        })
    };
    // Without a size, programs use their default.
    let _ = copied;
}
