//! Watches folders and says which files changed, in batches.
//!
//! inotify, one watch per directory. A file counts as changed when its writer closes it or renames it into place; other
//! events lead to a comparison of the whole tree with what is known, which also mends a lost event (queue overflow).
//! Hidden files and editors' leftovers are not read. Blocking; belongs on a thread of its own.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    fs::{self, Metadata},
    io::{self, Read},
    os::{fd::AsFd, unix::fs::MetadataExt},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use inotify::{EventMask, Inotify, WatchDescriptor, WatchMask};
use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
};

use super::{
    files::{Content, FileId},
    tree::{MAX_DEPTH, MAX_FILE_BYTES},
};

/// Changes that follow each other this closely belong together.
const QUIET: Duration = Duration::from_millis(2);
/// The longest a change is held back for others to join it.
const WINDOW: Duration = Duration::from_millis(10);

/// The folders under watch.
#[derive(Debug)]
pub struct Watcher {
    folders: Vec<PathBuf>,
    inotify: Inotify,
    directories: HashMap<WatchDescriptor, PathBuf>,
    known: BTreeMap<PathBuf, Stamp>,
    /// Files that somebody is writing to: read when closed.
    being_written: HashSet<PathBuf>,
    buffer: Vec<u8>,
}

/// A file that changed.
#[derive(Debug, PartialEq, Eq)]
pub struct Change {
    /// Which.
    pub file: FileId,
    /// What it holds now.
    pub content: Content,
    /// The time its directory entry or its bytes last changed, seconds and nanoseconds since 1970; for latency figures.
    pub changed: Option<(i64, i64)>,
}

/// What tells one state of a file from another without reading it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

/// What events ask for.
#[derive(Debug, Default)]
struct Suspects {
    files: BTreeSet<PathBuf>,
    everything: bool,
}

impl Watcher {
    /// Watches these folders, which must exist. Nothing is read yet: see [`Watcher::rescan`].
    pub fn new(folders: &[PathBuf]) -> io::Result<Self> {
        for folder in folders {
            fs::read_dir(folder)?;
        }
        Ok(Self {
            folders: folders.to_vec(),
            inotify: Inotify::init()?,
            directories: HashMap::new(),
            known: BTreeMap::new(),
            being_written: HashSet::new(),
            buffer: vec![0; 64 << 10],
        })
    }

    /// Waits until files changed or `wake` is readable; answers with the changes, which may be none.
    pub fn next(&mut self, wake: impl AsFd) -> io::Result<Vec<Change>> {
        let mut suspects = Suspects::default();
        if !self.readable(Some(&wake), None)? {
            return Ok(Vec::new());
        }
        let first = Instant::now();
        loop {
            self.take_events(&mut suspects)?;
            let left = WINDOW.saturating_sub(first.elapsed());
            if left.is_zero() || !self.readable(None::<&io::Stderr>, Some(QUIET.min(left)))? {
                break;
            }
        }
        if suspects.everything {
            return self.rescan();
        }
        let changes = suspects
            .files
            .into_iter()
            .filter_map(|path| self.look(&path));
        Ok(changes.collect())
    }

    /// Compares all folders with what is known, and watches directories that are not watched yet.
    pub fn rescan(&mut self) -> io::Result<Vec<Change>> {
        let mut found = BTreeSet::new();
        for folder in self.folders.clone() {
            self.walk(&folder, 0, &mut found)?;
        }
        found.extend(self.known.keys().cloned());
        Ok(found.iter().filter_map(|path| self.look(path)).collect())
    }

    /// Whether inotify has something to tell; false when `wake` has, or the time is over.
    fn readable(&self, wake: Option<&impl AsFd>, limit: Option<Duration>) -> io::Result<bool> {
        let mut fds = vec![PollFd::new(self.inotify.as_fd(), PollFlags::POLLIN)];
        fds.extend(wake.map(|wake| PollFd::new(wake.as_fd(), PollFlags::POLLIN)));
        let timeout = limit.map_or(PollTimeout::NONE, |limit| {
            PollTimeout::try_from(limit).unwrap_or(PollTimeout::ZERO)
        });
        loop {
            match poll(&mut fds, timeout) {
                Err(Errno::EINTR) => {}
                Err(error) => return Err(error.into()),
                Ok(_) => return Ok(fds[0].any().unwrap_or_default()),
            }
        }
    }

    fn take_events(&mut self, suspects: &mut Suspects) -> io::Result<()> {
        let mut seen = Vec::new();
        match self.inotify.read_events(&mut self.buffer) {
            Ok(events) => {
                seen.extend(
                    events.map(|event| (event.wd, event.mask, event.name.map(PathBuf::from))),
                );
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
        for (watch, mask, name) in seen {
            self.suspect(&watch, mask, name.as_deref(), suspects);
        }
        Ok(())
    }

    fn suspect(
        &mut self,
        watch: &WatchDescriptor,
        mask: EventMask,
        name: Option<&Path>,
        suspects: &mut Suspects,
    ) {
        if mask.contains(EventMask::IGNORED) {
            self.directories.remove(watch);
        }
        let path = self
            .directories
            .get(watch)
            .zip(name)
            .map(|(directory, name)| directory.join(name));
        let Some(path) = path.filter(|_| !mask.contains(EventMask::ISDIR)) else {
            // A directory came, went or moved, or events were lost.
            suspects.everything = true;
            return;
        };
        if !is_read(&path) {
            // A volume of Kubernetes (ConfigMap) changes by renaming its hidden link `..data`.
            suspects.everything |= name == Some(Path::new("..data"));
            return;
        }
        if mask.contains(EventMask::MODIFY) {
            self.being_written.insert(path);
            return;
        }
        self.being_written.remove(&path);
        suspects.files.insert(path);
    }

    fn walk(
        &mut self,
        directory: &Path,
        depth: u32,
        found: &mut BTreeSet<PathBuf>,
    ) -> io::Result<()> {
        let mask = WatchMask::CLOSE_WRITE
            | WatchMask::MODIFY
            | WatchMask::CREATE
            | WatchMask::DELETE
            | WatchMask::MOVE
            | WatchMask::DELETE_SELF
            | WatchMask::MOVE_SELF
            | WatchMask::ONLYDIR;
        match self.inotify.watches().add(directory, mask) {
            Ok(watch) => self.directories.insert(watch, directory.to_owned()),
            Err(error) if vanished(&error) => return Ok(()),
            Err(error) => return Err(error),
        };
        // Listed after the watch is in place: what comes later leads to an event.
        let entries = match fs::read_dir(directory) {
            Ok(entries) => entries,
            Err(error) if vanished(&error) => return Ok(()),
            Err(error) => return Err(error),
        };
        for entry in entries.flatten() {
            let path = entry.path();
            let is_directory = entry.file_type().is_ok_and(|kind| kind.is_dir());
            if is_directory && !is_hidden(&path) && depth < MAX_DEPTH {
                self.walk(&path, depth + 1, found)?;
            } else if is_read(&path) {
                found.insert(path);
            }
        }
        Ok(())
    }

    /// Reads a file if it is not as it was.
    fn look(&mut self, path: &Path) -> Option<Change> {
        if self.being_written.contains(path) {
            return None;
        }
        let metadata = fs::metadata(path).ok().filter(Metadata::is_file);
        let stamp = metadata.as_ref().map(Stamp::new);
        if self.known.get(path).copied() == stamp {
            return None;
        }
        match stamp {
            Some(stamp) => self.known.insert(path.to_owned(), stamp),
            None => self.known.remove(path),
        };
        Some(Change {
            file: self.file(path),
            content: stamp.map_or(Content::Gone, |_| content(path)),
            changed: stamp.map(|stamp| stamp.changed.max(stamp.modified)),
        })
    }

    fn file(&self, path: &Path) -> FileId {
        let folder = self
            .folders
            .iter()
            .position(|folder| path.starts_with(folder));
        FileId {
            folder: folder.unwrap_or_default(),
            path: path.to_string_lossy().into(),
        }
    }
}

impl Stamp {
    fn new(metadata: &Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.size(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }
}

fn vanished(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
    )
}

fn is_hidden(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().as_encoded_bytes();
    name.starts_with(b".") || name.starts_with(b"#")
}

fn is_read(path: &Path) -> bool {
    let extension = path.extension().and_then(|extension| extension.to_str());
    matches!(extension, Some("yaml" | "yml" | "json")) && !is_hidden(path)
}

fn content(path: &Path) -> Content {
    let unreadable =
        |problem: String| Content::Unreadable(format!("{}: {problem}", path.display()));
    let limit = u64::try_from(MAX_FILE_BYTES)
        .unwrap_or(u64::MAX)
        .saturating_add(1);
    let mut bytes = Vec::new();
    match fs::File::open(path).and_then(|file| file.take(limit).read_to_end(&mut bytes)) {
        Err(error) if vanished(&error) => return Content::Gone,
        Err(error) => return unreadable(error.to_string()),
        Ok(_) => {}
    }
    match String::from_utf8(bytes) {
        Ok(text) => Content::Text(text),
        Err(_) => unreadable("not UTF-8 text".to_owned()),
    }
}
