//! Logs of parts and pods: bounded files that anyone with access to the runtime folder can follow.

use std::{
    fs::{self, File},
    io::{self, Read, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncReadExt};

/// A log file keeps at most this much, twice: the current file and the one before it.
const LIMIT_BYTES: u64 = 4 << 20;

/// A log that is written to. Clones write to the same file.
#[derive(Clone, Debug)]
pub struct Log {
    inner: Arc<Mutex<Inner>>,
}

#[derive(Debug)]
struct Inner {
    path: PathBuf,
    file: File,
    length: u64,
}

impl Log {
    /// Opens the log at `path` for appending.
    pub fn open(path: PathBuf) -> io::Result<Self> {
        let file = File::options().create(true).append(true).open(&path)?;
        let length = file.metadata()?.len();
        Ok(Self {
            inner: Arc::new(Mutex::new(Inner { path, file, length })),
        })
    }

    /// Appends; turns to a new file when this one is full. A full disk loses lines, never the mesh.
    pub fn append(&self, bytes: &[u8]) {
        let mut inner = self.inner.lock();
        if inner.length > LIMIT_BYTES && inner.turn().is_err() {
            return;
        }
        if inner.file.write_all(bytes).is_ok() {
            inner.length += u64::try_from(bytes.len()).unwrap_or(0);
        }
    }

    /// Appends one line of the supervisor's own.
    pub fn note(&self, text: &str) {
        self.append(format!("[leyline] {text}\n").as_bytes());
    }

    /// Copies `from` until it ends.
    pub async fn copy(self, mut from: impl AsyncRead + Unpin) {
        let mut buffer = vec![0; 8192];
        while let Ok(length @ 1..) = from.read(&mut buffer).await {
            self.append(&buffer[..length]);
        }
    }
}

impl Inner {
    fn turn(&mut self) -> io::Result<()> {
        fs::rename(&self.path, old(&self.path))?;
        self.file = File::options().create(true).append(true).open(&self.path)?;
        self.length = 0;
        Ok(())
    }
}

fn old(path: &Path) -> PathBuf {
    path.with_extension("old.log")
}

/// The last `lines` lines of the log at `path`, all of the current file when `None`.
pub fn tail(path: &Path, lines: Option<usize>) -> io::Result<String> {
    let text = String::from_utf8_lossy(&fs::read(path)?).into_owned();
    let Some(lines) = lines else { return Ok(text) };
    let from = text.lines().count().saturating_sub(lines);
    Ok(text
        .lines()
        .skip(from)
        .flat_map(|line| [line, "\n"])
        .collect())
}

/// Prints the last `lines` lines of the log (all when `None`) and what is added to it, until `until` says that nothing more
/// will come.
pub fn follow(
    path: &Path,
    lines: Option<usize>,
    mut output: impl Write,
    until: impl Fn() -> bool,
) -> io::Result<()> {
    let mut file = File::open(path)?;
    if lines.is_some() {
        output.write_all(tail(path, lines)?.as_bytes())?;
        file.seek(SeekFrom::End(0))?;
    }
    loop {
        io::copy(&mut file, &mut output)?;
        output.flush()?;
        if until() {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(100));
        // Turned to a new file: begin that one. (The old one was read to its end above, bar what came since.)
        if fs::metadata(path)?.len() < file.stream_position()? {
            io::copy(&mut (&mut file).take(LIMIT_BYTES), &mut output)?;
            file = File::open(path)?;
            file.seek(SeekFrom::Start(0))?;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_is_bounded_and_its_tail_is_its_newest_lines() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("part.log");
        let log = Log::open(path.clone()).unwrap();
        let line = [b'x'; 1 << 20];
        (0..12).for_each(|_| log.append(&line));
        log.append(b"\none\ntwo\n");
        let total = [&path, &old(&path)]
            .iter()
            .map(|path| fs::metadata(path).unwrap().len())
            .sum::<u64>();
        assert!(
            total <= 2 * (LIMIT_BYTES + line.len() as u64 + 16),
            "{total}"
        );
        assert_eq!(tail(&path, Some(2)).unwrap(), "one\ntwo\n");
    }
}
