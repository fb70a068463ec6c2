//! Sees changes in folders, and those that are missing come.

use std::{
    collections::BTreeMap,
    io,
    path::{Path, PathBuf},
};

use futures_util::StreamExt;
use inotify::{EventStream, Inotify, WatchDescriptor, WatchMask};

const EVENTS_BUFFER: usize = 4096;

/// Folders, each by itself while it is there and by the nearest folder above it while it is not.
pub(super) struct Watch {
    folders: Vec<PathBuf>,
    stream: EventStream<Vec<u8>>,
    pub(super) watched: BTreeMap<PathBuf, WatchDescriptor>,
}

impl Watch {
    pub(super) fn new(folders: &[&Path]) -> io::Result<Self> {
        Ok(Self {
            folders: folders.iter().map(|it| it.to_path_buf()).collect(),
            stream: Inotify::init()?.into_event_stream(vec![0; EVENTS_BUFFER])?,
            watched: BTreeMap::new(),
        })
    }

    /// Watches what is there by now. Whoever looks at the folders afterwards is told of every later change.
    pub(super) fn follow(&mut self) -> io::Result<()> {
        let mut watched = BTreeMap::new();
        for folder in &self.folders {
            let (path, descriptor) = attach(&self.stream, folder)?;
            watched.insert(path, descriptor);
        }
        let before = std::mem::replace(&mut self.watched, watched);
        let kept = |descriptor: &WatchDescriptor| self.watched.values().any(|it| it == descriptor);
        for (_, descriptor) in before.into_iter().filter(|(_, it)| !kept(it)) {
            // One of a folder that was deleted is gone with it.
            let _ = self.stream.watches().remove(descriptor);
        }
        Ok(())
    }

    /// Waits until something changes.
    pub(super) async fn next(&mut self) {
        self.stream.next().await;
    }
}

fn attach(stream: &EventStream<Vec<u8>>, folder: &Path) -> io::Result<(PathBuf, WatchDescriptor)> {
    loop {
        let path = nearest(folder);
        let added = stream.watches().add(path, mask(path == folder));
        // What came or went between the look and the watch was not told of.
        if nearest(folder) == path {
            return Ok((path.to_owned(), added?));
        }
    }
}

/// The folder itself, or the first above it that is there.
fn nearest(folder: &Path) -> &Path {
    let mut above = folder.ancestors();
    above.find(|path| path.is_dir()).unwrap_or(folder)
}

/// Above a folder that is missing only folders matter.
fn mask(is_it: bool) -> WatchMask {
    let own = WatchMask::DELETE_SELF | WatchMask::MOVE_SELF | WatchMask::ONLYDIR;
    match is_it {
        true => own | WatchMask::CLOSE_WRITE | WatchMask::MOVE | WatchMask::DELETE,
        false => own | WatchMask::CREATE | WatchMask::MOVED_TO,
    }
}
