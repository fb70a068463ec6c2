//! A mesh's runtime folder: the control socket, the state that an API server would hold, keys and logs. It lies outside
//! the mesh's private mounts, belongs to the user who started the mesh and is gone when the mesh is.

use std::{
    fs::{self, File, Permissions},
    io,
    os::unix::{
        fs::{DirBuilderExt, PermissionsExt},
        net::UnixStream,
    },
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail};
use nix::{
    fcntl::{Flock, FlockArg},
    unistd::{AccessFlags, Uid, access},
};
use serde_json::Value;

/// Where everything of one mesh is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Runtime {
    root: PathBuf,
}

impl Runtime {
    /// The folder of the mesh called `name`, which need not exist.
    pub fn named(name: &str) -> Result<Self> {
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_".contains(&byte);
        if name.is_empty() || name.len() > 40 || !name.bytes().all(plain) {
            bail!(
                "{name:?} cannot be a mesh's name: letters, digits, '-' and '_', at most 40 of them"
            );
        }
        let runtimes: Vec<Self> = parents()
            .iter()
            .map(|parent| Self::at(parent.join(name)))
            .collect();
        let running = runtimes.iter().find(|runtime| runtime.runs());
        let chosen = running.or(runtimes.first()).cloned();
        chosen.context("find a folder to keep the mesh's files in: even /tmp cannot be written to")
    }

    /// The folder at `root`.
    pub fn at(root: PathBuf) -> Self {
        Self { root }
    }

    /// Makes the folder anew for one mesh and holds it until the lock is dropped. What a killed mesh left is removed.
    pub fn claim(&self) -> Result<Flock<File>> {
        let context = || format!("make {}", self.root.display());
        private_folder(self.root.parent().unwrap_or(&self.root)).with_context(context)?;
        let lock = File::create(self.root.with_extension("lock")).with_context(context)?;
        let lock = Flock::lock(lock, FlockArg::LockExclusiveNonblock).map_err(|_| {
            let name = self.root.file_name().unwrap_or_default().to_string_lossy().into_owned();
            anyhow::anyhow!("the mesh {name:?} is up already: `leyline local down` stops it, --name starts another")
        })?;
        let _ = fs::remove_dir_all(&self.root);
        private_folder(&self.root).with_context(context)?;
        for folder in [
            self.state(),
            self.logs(),
            self.authority(),
            self.nodes(),
            self.etc(),
        ] {
            private_folder(&folder).with_context(context)?;
        }
        Ok(lock)
    }

    /// Removes the folder and everything in it.
    pub fn remove(&self) {
        let _ = fs::remove_dir_all(&self.root);
        let _ = fs::remove_file(self.root.with_extension("lock"));
    }

    /// The folder itself.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The UNIX socket that takes requests.
    pub fn control_socket(&self) -> PathBuf {
        self.root.join("control.sock")
    }

    /// Objects that an API server would hold, one file each.
    pub fn state(&self) -> PathBuf {
        self.root.join("state")
    }

    /// Logs of parts and pods.
    pub fn logs(&self) -> PathBuf {
        self.root.join("logs")
    }

    /// The log of a part.
    pub fn part_log(&self, part: &str) -> PathBuf {
        self.logs().join(format!("{part}.log"))
    }

    /// The log of a container.
    pub fn container_log(&self, pod: &super::objects::Key, container: &str) -> PathBuf {
        self.logs()
            .join(format!("{}_{}_{container}.log", pod.namespace, pod.name))
    }

    /// The certificate authority's folder.
    pub fn authority(&self) -> PathBuf {
        self.root.join("ca")
    }

    /// The public keys that verify service account tokens.
    pub fn key_set(&self) -> PathBuf {
        self.root.join("jwks.json")
    }

    /// What belongs to nodes, a folder each.
    pub fn nodes(&self) -> PathBuf {
        self.root.join("nodes")
    }

    /// What belongs to one node: its agent's pods, its tunnel's token and socket.
    pub fn node(&self, node: &str) -> PathBuf {
        self.nodes().join(node)
    }

    /// Files mounted into pods: `resolv.conf` and `hosts`.
    pub fn etc(&self) -> PathBuf {
        self.root.join("etc")
    }

    /// Whether a mesh runs here.
    fn runs(&self) -> bool {
        UnixStream::connect(self.control_socket()).is_ok()
    }

    /// Whether the folder is there and belongs to no mesh any more, not even to one that is just starting.
    pub(crate) fn left_behind(&self) -> bool {
        let lock = File::open(self.root.with_extension("lock"));
        let free = |lock| Flock::lock(lock, FlockArg::LockExclusiveNonblock).is_ok();
        self.root.is_dir() && lock.map_or(true, free)
    }

    /// Names of this user's meshes that run.
    pub(crate) fn names() -> Vec<String> {
        let entries = parents()
            .into_iter()
            .filter_map(|parent| fs::read_dir(parent).ok());
        let runtimes = entries
            .flatten()
            .flatten()
            .map(|entry| Self::at(entry.path()));
        let name = |runtime: Self| Some(runtime.root.file_name()?.to_string_lossy().into_owned());
        runtimes.filter(Self::runs).filter_map(name).collect()
    }
}

/// Where a user's meshes may be: `$XDG_RUNTIME_DIR`, then `/run` where we may write to it, then `/tmp`; in each, a folder
/// of the user's own. A new mesh goes to the first; one that runs is found in any, whatever the session.
fn parents() -> Vec<PathBuf> {
    let usable = |path: &PathBuf| path.is_dir() && access(path, AccessFlags::W_OK).is_ok();
    let own = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from);
    let bases = own.into_iter().chain(["/run", "/tmp"].map(PathBuf::from));
    let folder = format!("leyline-{}", Uid::effective());
    bases
        .filter(usable)
        .map(|base| base.join(&folder))
        .collect()
}

/// Makes a folder that only its owner enters, and refuses one that belongs to somebody else.
pub fn private_folder(path: &Path) -> io::Result<()> {
    match fs::DirBuilder::new().mode(0o700).create(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            let metadata = fs::symlink_metadata(path)?;
            let own = std::os::unix::fs::MetadataExt::uid(&metadata) == Uid::effective().as_raw();
            if !metadata.is_dir() || !own {
                return Err(io::Error::other(format!(
                    "{} belongs to somebody else",
                    path.display()
                )));
            }
            fs::set_permissions(path, Permissions::from_mode(0o700))
        }
        other => other,
    }
}

/// Writes a file so that a reader sees the old content or the new, never a half. Only the owner can read it.
pub fn write_atomically(path: &Path, content: &[u8]) -> io::Result<()> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let temporary = path.with_file_name(format!(".{name}.new"));
    fs::write(&temporary, content)?;
    fs::set_permissions(&temporary, Permissions::from_mode(0o600))?;
    fs::rename(&temporary, path)
}

/// The state folder: writes only what differs from what is there.
#[derive(Debug)]
pub struct StateFolder {
    path: PathBuf,
    written: std::collections::BTreeMap<String, Vec<u8>>,
}

impl StateFolder {
    /// A state folder that is empty so far.
    pub fn new(path: PathBuf) -> Self {
        Self {
            path,
            written: std::collections::BTreeMap::new(),
        }
    }

    /// Makes the folder hold `objects` and nothing else, changing as few files as possible. Each has `kind`,
    /// `metadata.name` and, unless it is cluster-scoped, `metadata.namespace`.
    pub fn replace(&mut self, objects: &[Value]) -> io::Result<()> {
        let mut wanted = std::collections::BTreeMap::new();
        for object in objects {
            wanted.insert(
                file_name(object),
                serde_json::to_vec(object).map_err(io::Error::other)?,
            );
        }
        let gone: Vec<String> = self
            .written
            .keys()
            .filter(|name| !wanted.contains_key(*name))
            .cloned()
            .collect();
        for name in gone {
            let removed = fs::remove_file(self.path.join(&name));
            if removed
                .as_ref()
                .is_err_and(|error| error.kind() != io::ErrorKind::NotFound)
            {
                removed?;
            }
            self.written.remove(&name);
        }
        for (name, content) in wanted {
            if self.written.get(&name) != Some(&content) {
                write_atomically(&self.path.join(&name), &content)?;
                self.written.insert(name, content);
            }
        }
        Ok(())
    }
}

fn file_name(object: &Value) -> String {
    let text = |pointer: &str| {
        object
            .pointer(pointer)
            .and_then(Value::as_str)
            .unwrap_or_default()
            .to_owned()
    };
    let (kind, namespace, name) = (
        text("/kind"),
        text("/metadata/namespace"),
        text("/metadata/name"),
    );
    format!("{}_{namespace}_{name}.yaml", kind.to_ascii_lowercase())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_state_folder_follows_its_objects() {
        let folder = tempfile::tempdir().unwrap();
        let mut state = StateFolder::new(folder.path().to_owned());
        let object = |name: &str, value: u8| json!({"kind": "Pod", "metadata": {"name": name, "namespace": "a"}, "x": value});
        let names = || {
            let mut names: Vec<_> = fs::read_dir(folder.path())
                .unwrap()
                .map(|entry| entry.unwrap().file_name())
                .collect();
            names.sort();
            names
        };
        state
            .replace(&[object("one", 1), object("two", 1)])
            .unwrap();
        assert_eq!(names(), ["pod_a_one.yaml", "pod_a_two.yaml"]);
        let before = fs::metadata(folder.path().join("pod_a_one.yaml"))
            .unwrap()
            .modified()
            .unwrap();
        state
            .replace(&[object("one", 1), object("three", 1)])
            .unwrap();
        assert_eq!(names(), ["pod_a_one.yaml", "pod_a_three.yaml"]);
        let after = fs::metadata(folder.path().join("pod_a_one.yaml"))
            .unwrap()
            .modified()
            .unwrap();
        assert_eq!(before, after);
    }

    #[test]
    fn a_mesh_is_claimed_once() {
        let folder = tempfile::tempdir().unwrap();
        let runtime = Runtime::at(folder.path().join("user").join("m"));
        let held = runtime.claim().unwrap();
        fs::write(runtime.root().join("left"), "").unwrap();
        assert!(
            runtime
                .claim()
                .unwrap_err()
                .to_string()
                .contains("up already")
        );
        assert!(!runtime.left_behind());
        drop(held);
        assert!(runtime.left_behind());
        let _held = runtime.claim().unwrap();
        assert!(!runtime.root().join("left").exists());
    }

    #[test]
    fn names_of_meshes_cannot_leave_their_folder() {
        for name in ["", "a/b", "..", "a b"] {
            assert!(Runtime::named(name).is_err(), "{name:?}");
        }
        assert!(Runtime::named("blue-2").is_ok());
    }
}
