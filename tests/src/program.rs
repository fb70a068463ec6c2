//! Programs that a test makes and runs.
//!
//! Linux runs no file that somebody holds open for writing (`ETXTBSY`, execve(2)). A descriptor that this process writes through
//! is held by every child that another thread starts meanwhile, until that child runs its own program. So a child writes.

use std::{
    ffi::OsStr,
    io::Write,
    path::Path,
    process::{Command, Stdio},
};

use anyhow::{Context, Result, ensure};

/// Puts a copy of the program `from` at `to`, for everybody to run.
pub fn copy(from: &Path, to: &Path) -> Result<()> {
    install(from.as_os_str(), to, b"")
}

/// Puts a script at `to`, for everybody to run.
pub fn script(text: &str, to: &Path) -> Result<()> {
    install(OsStr::new("/dev/stdin"), to, text.as_bytes())
}

fn install(from: &OsStr, to: &Path, text: &[u8]) -> Result<()> {
    let mut child = Command::new("install")
        .args(["-m", "755"])
        .arg(from)
        .arg(to)
        .stdin(Stdio::piped())
        .spawn()
        .context("start install")?;
    let mut input = child.stdin.take().context("a pipe was asked for")?;
    input.write_all(text)?;
    drop(input);
    let status = child.wait()?;
    ensure!(status.success(), "install {}: {status}", to.display());
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::{fs, thread};

    use super::*;

    #[test]
    fn a_script_runs_while_other_threads_start_children() -> Result<()> {
        let folder = tempfile::tempdir()?;
        thread::scope(|scope| -> Result<()> {
            let others = scope.spawn(|| {
                for _ in 0..200 {
                    Command::new("true").status()?;
                }
                std::io::Result::Ok(())
            });
            for number in 0..20 {
                let path = folder.path().join(number.to_string());
                script("#!/bin/sh\nexit 7\n", &path)?;
                assert_eq!(Command::new(&path).status()?.code(), Some(7));
            }
            Ok(others.join().expect("no panic")?)
        })
    }

    #[test]
    fn a_copy_is_whole_and_can_be_run() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("copy");
        copy(Path::new("/bin/true"), &path)?;
        assert!(Command::new(&path).status()?.success());
        assert_eq!(fs::read(&path)?, fs::read("/bin/true")?);
        Ok(())
    }
}
