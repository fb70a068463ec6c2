//! A compressed archive, file by file, as `tar` reads it: POSIX ustar within gzip.

use std::{
    fs::File,
    io::{self, Write},
    path::Path,
};

use flate2::{Compression, write::GzEncoder};

const BLOCK: usize = 512;
/// Where a header has its name, and where the part before the last slash that fits.
const NAME: usize = 100;
const PREFIX: usize = 155;

/// An archive that is being written.
pub(super) struct Archive<W: Write> {
    out: GzEncoder<W>,
    /// Seconds since the epoch, for every file.
    time: u64,
    files: usize,
}

impl Archive<File> {
    /// In a new file, which nobody else may read: it tells much of a cluster.
    pub(super) fn create(path: &Path, time: u64) -> io::Result<Self> {
        use std::os::unix::fs::OpenOptionsExt;
        let mut options = File::options();
        let options = options.write(true).create(true).truncate(true).mode(0o600);
        Ok(Self::new(options.open(path)?, time))
    }
}

impl<W: Write> Archive<W> {
    fn new(out: W, time: u64) -> Self {
        Self {
            out: GzEncoder::new(out, Compression::default()),
            time,
            files: 0,
        }
    }

    /// Adds a file.
    pub(super) fn add(&mut self, name: &str, content: &[u8]) -> io::Result<()> {
        let header = header(name, content.len(), self.time)
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "the name is too long"))?;
        self.out.write_all(&header)?;
        self.out.write_all(content)?;
        let rest = content.len().next_multiple_of(BLOCK) - content.len();
        self.out.write_all(&[0; BLOCK][..rest])?;
        self.files += 1;
        Ok(())
    }

    /// How many files it has.
    pub(super) fn files(&self) -> usize {
        self.files
    }

    /// Ends it.
    pub(super) fn finish(mut self) -> io::Result<W> {
        self.out.write_all(&[0; 2 * BLOCK])?;
        self.out.finish()
    }
}

/// The header of a file; `None` where its name does not fit.
fn header(name: &str, size: usize, time: u64) -> Option<[u8; BLOCK]> {
    let (prefix, name) = split(name)?;
    let mut block = [0; BLOCK];
    let mut put = |at: usize, text: &str| {
        block[at..at + text.len()].copy_from_slice(text.as_bytes());
    };
    put(0, name);
    put(100, "0000600");
    put(108, "0000000");
    put(116, "0000000");
    put(124, &octal(u64::try_from(size).ok()?)?);
    put(136, &octal(time)?);
    put(148, "        ");
    put(156, "0");
    put(257, "ustar");
    put(263, "00");
    put(345, prefix);
    let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    Some(block)
}

/// Eleven digits, which is 8 GiB.
fn octal(number: u64) -> Option<String> {
    let text = format!("{number:011o}");
    (text.len() == 11).then_some(text)
}

fn split(name: &str) -> Option<(&str, &str)> {
    if name.len() <= NAME {
        return Some(("", name));
    }
    let slashes = name.match_indices('/').map(|(at, _)| at);
    let mut fitting = slashes.filter(|at| *at <= PREFIX && name.len() - at - 1 <= NAME);
    let at = fitting.next()?;
    Some((&name[..at], &name[at + 1..]))
}

#[cfg(test)]
mod tests {
    use std::{
        io::Read,
        process::{Command, Stdio},
    };

    use super::*;

    #[test]
    fn tar_reads_what_is_written() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("it.tar.gz");
        let long = format!("{}/{}", "a".repeat(90), "b".repeat(90));
        let mut archive = Archive::create(&path, 1_700_000_000).unwrap();
        archive.add("empty", b"").unwrap();
        archive.add(&long, &[b'x'; 1000]).unwrap();
        archive.add("last.txt", b"the end").unwrap();
        assert!(archive.add(&"c".repeat(300), b"").is_err());
        assert_eq!(archive.files(), 3);
        archive.finish().unwrap();
        let mut tar = Command::new("tar");
        tar.arg("-xzf").arg(&path).arg("-C").arg(folder.path());
        let output = tar.stdin(Stdio::null()).output().unwrap();
        let told = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && told.is_empty(), "{told}");
        for (name, content) in [
            ("empty", String::new()),
            (&long, "x".repeat(1000)),
            ("last.txt", "the end".to_owned()),
        ] {
            let mut read = String::new();
            let mut file = File::open(folder.path().join(name)).unwrap();
            file.read_to_string(&mut read).unwrap();
            assert_eq!(read, content, "{name}");
        }
    }
}
