//! Pods without a cluster: a folder for each node, written by a supervisor and watched by the agent.
//!
//! ```text
//! <folder>/pods/<uid>.json         written by the supervisor: one [`PodFacts`]
//! <folder>/enrolments/<uid>.json   written by the agent:      one [`EnrolmentFile`]
//! ```
//!
//! Both sides write a file under a name that starts with a dot and rename it, so that a reader never sees half a file;
//! names that start with a dot or do not end in `.json` are ignored. Removing `pods/<uid>.json` says that the pod no
//! longer exists; the agent removes `enrolments/<uid>.json` when the pod is not in the mesh. Both folders are made by
//! whoever comes first. A pod's file, with everything that may be left out left out:
//!
//! ```json
//! {"uid": "0b1c…", "name": "web-0", "namespace": "shop", "podIPs": ["10.244.1.5"], "netns": "/run/netns/web-0"}
//! ```

use std::{
    collections::VecDeque,
    ffi::OsStr,
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use futures_util::StreamExt;
use inotify::{EventMask, EventStream, Inotify, WatchMask};
use serde::{Deserialize, Serialize};

use crate::{
    agent::{Enrolment, EnrolmentSink, PodRef, PodSource, SinkError},
    facts::{PodEvent, PodFacts, REDIRECTION_ANNOTATION},
};

/// Room for the kernel's events; longer names than this do not occur.
const EVENTS_BUFFER: usize = 16 * 1024;
/// Pause after the kernel could not be asked for changes.
const WATCH_PAUSE: Duration = Duration::from_secs(1);

/// What the agent says of a pod that is, or should be, in the mesh.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EnrolmentFile {
    /// The pod.
    pub uid: String,
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// `enabled` or `pending`: the value of the annotation `ambient.istio.io/redirection`.
    pub redirection: String,
    /// What a pending pod is waiting for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// Folder of the pods' files.
pub fn pods_folder(folder: &Path) -> PathBuf {
    folder.join("pods")
}

/// Folder of the enrolments' files.
pub fn enrolments_folder(folder: &Path) -> PathBuf {
    folder.join("enrolments")
}

/// Writes `bytes` to `<folder>/<uid>.json` in one step, as seen by readers.
///
/// # Errors
/// The system's.
pub fn write_atomically(folder: &Path, uid: &str, bytes: &[u8]) -> io::Result<()> {
    let hidden = folder.join(format!(".{uid}.json.tmp"));
    fs::write(&hidden, bytes)?;
    fs::rename(&hidden, folder.join(format!("{uid}.json")))
}

/// Writes the enrolments' files.
#[derive(Clone, Debug)]
pub struct FolderSink {
    folder: PathBuf,
}

impl FolderSink {
    /// Below `folder`, which is the node's.
    ///
    /// # Errors
    /// The folder cannot be made.
    pub fn new(folder: &Path) -> io::Result<Self> {
        let folder = enrolments_folder(folder);
        fs::create_dir_all(&folder)?;
        Ok(FolderSink { folder })
    }

    fn write(&self, pod: &PodRef, enrolment: &Enrolment) -> io::Result<()> {
        let (redirection, reason) = match enrolment {
            Enrolment::Enabled => ("enabled", None),
            Enrolment::Pending { reason } => ("pending", Some(reason.clone())),
            Enrolment::None => {
                return match fs::remove_file(self.folder.join(format!("{}.json", pod.uid))) {
                    Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
                    _ => Ok(()),
                };
            }
        };
        let file = EnrolmentFile {
            uid: pod.uid.clone(),
            namespace: pod.namespace.clone(),
            name: pod.name.clone(),
            redirection: redirection.to_owned(),
            reason,
        };
        write_atomically(&self.folder, &pod.uid, &serde_json::to_vec_pretty(&file)?)
    }
}

impl EnrolmentSink for FolderSink {
    async fn set(&self, pod: &PodRef, enrolment: &Enrolment) -> Result<(), SinkError> {
        // A small file on a local disk: not worth a thread.
        self.write(pod, enrolment).map_err(|source| SinkError {
            pod: pod.clone(),
            source: source.into(),
        })
    }
}

/// Reads and watches the pods' files.
pub struct FolderSource {
    folder: PathBuf,
    enrolments: PathBuf,
    changes: EventStream<Vec<u8>>,
    ready: VecDeque<PodEvent>,
}

impl FolderSource {
    /// Below `folder`, which is the node's. Must run within a runtime.
    ///
    /// # Errors
    /// The folder cannot be made or watched.
    pub fn new(folder: &Path) -> io::Result<Self> {
        let enrolments = enrolments_folder(folder);
        let folder = pods_folder(folder);
        fs::create_dir_all(&folder)?;
        let inotify = Inotify::init()?;
        // Watched before it is read: what changes in between is read twice and missed never.
        let changes = WatchMask::CLOSE_WRITE
            | WatchMask::MOVED_TO
            | WatchMask::MOVED_FROM
            | WatchMask::DELETE;
        inotify.watches().add(&folder, changes)?;
        let changes = inotify.into_event_stream(vec![0; EVENTS_BUFFER])?;
        let mut source = FolderSource {
            folder,
            enrolments,
            changes,
            ready: VecDeque::new(),
        };
        let snapshot = source.scan()?;
        source.ready.push_back(snapshot);
        Ok(source)
    }

    fn scan(&self) -> io::Result<PodEvent> {
        let mut pods = Vec::new();
        for entry in fs::read_dir(&self.folder)? {
            pods.extend(uid_of(&entry?.file_name()).and_then(|uid| self.read(&uid)));
        }
        Ok(PodEvent::Snapshot(pods))
    }

    fn rescan(&self) -> Option<PodEvent> {
        let scanned = self.scan();
        scanned
            .inspect_err(|error| tracing::error!(%error, "read the folder of pods"))
            .ok()
    }

    /// A file that cannot be read changes nothing: what the pod was before still counts.
    fn read(&self, uid: &str) -> Option<PodFacts> {
        let path = self.folder.join(format!("{uid}.json"));
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            // Removed since; the event about that follows.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return None,
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "read a pod's file");
                return None;
            }
        };
        match serde_json::from_slice::<PodFacts>(&bytes) {
            Ok(pod) if pod.uid == uid => Some(self.with_enrolment(pod)),
            Ok(pod) => {
                tracing::warn!(path = %path.display(), uid = pod.uid, "a pod's file is named otherwise than its uid");
                None
            }
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "a pod's file is not readable");
                None
            }
        }
    }

    /// What an earlier agent told is in its own file, where Kubernetes has an annotation.
    fn with_enrolment(&self, mut pod: PodFacts) -> PodFacts {
        let file = fs::read(self.enrolments.join(format!("{}.json", pod.uid))).ok();
        let told = file.and_then(|bytes| serde_json::from_slice::<EnrolmentFile>(&bytes).ok());
        match told {
            Some(told) => pod
                .annotations
                .insert(REDIRECTION_ANNOTATION.to_owned(), told.redirection),
            None => pod.annotations.remove(REDIRECTION_ANNOTATION),
        };
        pod
    }

    fn take(&mut self, mask: EventMask, name: Option<&OsStr>) {
        if mask.contains(EventMask::Q_OVERFLOW) {
            self.ready.extend(self.rescan());
            return;
        }
        let Some(uid) = name.and_then(uid_of) else {
            return;
        };
        if mask.intersects(EventMask::DELETE | EventMask::MOVED_FROM) {
            self.ready.push_back(PodEvent::Remove { uid });
        } else {
            self.ready
                .extend(self.read(&uid).map(|pod| PodEvent::Upsert(Box::new(pod))));
        }
    }
}

impl PodSource for FolderSource {
    async fn next(&mut self) -> Option<PodEvent> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Some(event);
            }
            match self.changes.next().await? {
                Ok(event) => self.take(event.mask, event.name.as_deref()),
                Err(error) => {
                    tracing::error!(%error, "watch the folder of pods");
                    tokio::time::sleep(WATCH_PAUSE).await;
                    self.ready.extend(self.rescan());
                }
            }
        }
    }
}

/// `<uid>.json`, and nothing that could lead out of the folder.
fn uid_of(name: &OsStr) -> Option<String> {
    let uid = name.to_str()?.strip_suffix(".json")?;
    (!uid.is_empty() && !uid.starts_with('.')).then(|| uid.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn event(source: &mut FolderSource) -> PodEvent {
        let deadline = Duration::from_secs(5);
        tokio::time::timeout(deadline, source.next())
            .await
            .expect("in time")
            .expect("an event")
    }

    fn write(folder: &Path, uid: &str) {
        let text = format!(r#"{{"uid":"{uid}","name":"a","namespace":"b"}}"#);
        write_atomically(&pods_folder(folder), uid, text.as_bytes()).expect("write");
    }

    #[tokio::test]
    async fn files_come_as_a_snapshot_and_then_as_changes() {
        let folder = tempfile::tempdir().expect("a folder");
        fs::create_dir_all(pods_folder(folder.path())).expect("make");
        write(folder.path(), "1");
        let mut source = FolderSource::new(folder.path()).expect("watch");
        let PodEvent::Snapshot(pods) = event(&mut source).await else {
            panic!("a snapshot first")
        };
        assert_eq!(pods.len(), 1);
        write(folder.path(), "2");
        assert!(matches!(event(&mut source).await, PodEvent::Upsert(pod) if pod.uid == "2"));
        fs::remove_file(pods_folder(folder.path()).join("1.json")).expect("remove");
        assert_eq!(
            event(&mut source).await,
            PodEvent::Remove { uid: "1".into() }
        );
    }

    #[tokio::test]
    async fn broken_and_misnamed_files_are_passed_over() {
        let folder = tempfile::tempdir().expect("a folder");
        let mut source = FolderSource::new(folder.path()).expect("watch");
        assert_eq!(event(&mut source).await, PodEvent::Snapshot(Vec::new()));
        let pods = pods_folder(folder.path());
        write_atomically(&pods, "broken", b"{").expect("write");
        write_atomically(
            &pods,
            "other",
            br#"{"uid":"../x","name":"a","namespace":"b"}"#,
        )
        .expect("write");
        fs::write(pods.join("notes.txt"), "x").expect("write");
        write(folder.path(), "good");
        assert!(matches!(event(&mut source).await, PodEvent::Upsert(pod) if pod.uid == "good"));
    }

    #[tokio::test]
    async fn what_was_told_is_read_back() {
        let folder = tempfile::tempdir().expect("a folder");
        let sink = FolderSink::new(folder.path()).expect("a sink");
        let pod = PodRef {
            uid: "1".into(),
            namespace: "b".into(),
            name: "a".into(),
        };
        sink.set(&pod, &Enrolment::Enabled).await.expect("told");
        fs::create_dir_all(pods_folder(folder.path())).expect("make");
        write(folder.path(), "1");
        let redirection = async || {
            let mut source = FolderSource::new(folder.path()).expect("watch");
            let PodEvent::Snapshot(pods) = event(&mut source).await else {
                panic!("a snapshot first")
            };
            pods[0].annotations.get(REDIRECTION_ANNOTATION).cloned()
        };
        assert_eq!(redirection().await.as_deref(), Some("enabled"));
        sink.set(&pod, &Enrolment::None).await.expect("told");
        sink.set(&pod, &Enrolment::None)
            .await
            .expect("twice is harmless");
        assert_eq!(redirection().await, None);
    }
}
