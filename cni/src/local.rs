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
    fs, io,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use crate::agent::{Enrolment, EnrolmentSink, PodRef, SinkError};

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
