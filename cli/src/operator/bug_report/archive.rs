//! A compressed archive, file by file, that only its owner may read: `tar`'s format within gzip.

use std::{
    fs::File,
    io::{self, Write},
    path::Path,
};

use flate2::{Compression, write::GzEncoder};
use tar::{Builder, Header};

/// An archive that is being written.
pub(super) struct Archive<W: Write> {
    out: Builder<GzEncoder<W>>,
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
            out: Builder::new(GzEncoder::new(out, Compression::default())),
            time,
            files: 0,
        }
    }

    /// Adds a file. Its name is relative and stays within the archive; others are refused.
    pub(super) fn add(&mut self, name: &str, content: &[u8]) -> io::Result<()> {
        let mut header = Header::new_gnu();
        header.set_mode(0o600);
        header.set_mtime(self.time);
        header.set_size(u64::try_from(content.len()).map_err(io::Error::other)?);
        self.out.append_data(&mut header, name, content)?;
        self.files += 1;
        Ok(())
    }

    /// How many files it has.
    pub(super) fn files(&self) -> usize {
        self.files
    }

    /// Ends it.
    pub(super) fn finish(self) -> io::Result<W> {
        self.out.into_inner()?.finish()
    }
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
        let long = format!("{}/{}", "a".repeat(200), "b".repeat(200));
        let mut archive = Archive::create(&path, 1_700_000_000).unwrap();
        archive.add("empty", b"").unwrap();
        archive.add(&long, &[b'x'; 1000]).unwrap();
        archive.add("last.txt", b"the end").unwrap();
        assert!(archive.add("../elsewhere", b"").is_err());
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
