//! Where pods' network namespaces are: told by the plugin, remembered across restarts, or looked for.
//!
//! A container runtime that speaks CNI keeps each sandbox's namespace as a file (`/var/run/netns/cni-…`). Those files
//! are read once each, into an index by address; a pod is found by the addresses in its status. Only a pod that is not
//! among them is looked for in `/proc`, by the uid in its processes' cgroups, one pass for all pods of a burst.
//! Whatever is found is checked again when it is used: the same namespace, with the pod's address in it.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fs, io,
    net::IpAddr,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use net::netns::{Netns, NetnsError, NetnsId};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

/// How old a pass over `/proc` may be before the next: bounds the passes of a burst.
const PASS_EVERY: Duration = Duration::from_secs(1);
/// A pod's uid has this many characters, with `-` or `_` between its groups.
const UID_CHARS: usize = 36;

/// Where to look.
#[derive(Clone, Debug)]
pub struct Places {
    /// The runtime's namespace files, as seen from the agent.
    pub netns_folder: PathBuf,
    /// The host's `/proc`.
    pub host_proc: PathBuf,
    /// Where what is known is kept for the next agent; `None`: nowhere.
    pub memory: Option<PathBuf>,
}

/// One pod's sandbox.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sandbox {
    /// Where its namespace can be opened.
    pub netns: PathBuf,
    /// Which namespace that was.
    inode: u64,
    device: u64,
    /// The pod's addresses.
    pub ips: Vec<IpAddr>,
}

/// All sandboxes that are known. Everything here may block on the filesystem for some milliseconds.
pub struct Sandboxes {
    places: Places,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    known: BTreeMap<String, Sandbox>,
    /// By the runtime's file.
    files: HashMap<PathBuf, (NetnsId, Vec<IpAddr>)>,
    /// By pod uid, and when it was read.
    processes: Option<(Instant, HashMap<String, Vec<PathBuf>>)>,
    changed: bool,
}

impl Sandboxes {
    /// Takes up what an earlier agent knew. A memory that cannot be read is none.
    pub fn new(places: Places) -> Self {
        let known = places.memory.as_deref().map(recall).unwrap_or_default();
        let state = State {
            known,
            ..State::default()
        };
        Sandboxes {
            places,
            state: Mutex::new(state),
        }
    }

    /// What was last said or found of the pod, unchecked.
    pub fn last(&self, uid: &str) -> Option<Sandbox> {
        self.state.lock().known.get(uid).cloned()
    }

    /// Whether anything was ever known of the pod: its namespace may hold rules of ours.
    pub fn knows(&self, uid: &str) -> bool {
        self.state.lock().known.contains_key(uid)
    }

    /// Takes the plugin's word for a sandbox that is being made. `path` is the host's; what it leads to from here is
    /// the answer.
    ///
    /// # Errors
    /// The path leads to no network namespace.
    pub fn admit(&self, uid: &str, path: &Path, ips: Vec<IpAddr>) -> Result<Sandbox, NetnsError> {
        let netns = self.seen_from_here(path);
        let id = Netns::open(&netns)?.id();
        let sandbox = Sandbox {
            netns,
            inode: id.inode,
            device: id.device,
            ips,
        };
        let mut state = self.state.lock();
        state.known.insert(uid.to_owned(), sandbox.clone());
        state.changed = true;
        Ok(sandbox)
    }

    /// The pod's sandbox. `ips` are those in its status; with none, only what is known already can be the answer.
    pub fn find(&self, uid: &str, ips: &[IpAddr]) -> Option<Sandbox> {
        let mut state = self.state.lock();
        if let Some(sandbox) = state.known.get(uid)
            && sandbox.is_there()
            && (ips.is_empty() || ips.iter().any(|ip| sandbox.ips.contains(ip)))
        {
            return Some(sandbox.clone());
        }
        let found = self.by_address(&mut state, ips);
        let found = found.or_else(|| self.by_process(&mut state, uid, ips))?;
        state.known.insert(uid.to_owned(), found.clone());
        state.changed = true;
        Some(found)
    }

    /// The pod no longer exists.
    pub fn forget(&self, uid: &str) {
        let mut state = self.state.lock();
        state.changed |= state.known.remove(uid).is_some();
    }

    /// No other pods exist.
    pub fn keep_only(&self, uids: &BTreeSet<String>) {
        let mut state = self.state.lock();
        let before = state.known.len();
        state.known.retain(|uid, _| uids.contains(uid));
        state.changed |= state.known.len() != before;
    }

    /// Writes what is known for the next agent, if it changed. Losing it costs a look-up, so a failure is only logged.
    pub fn save(&self) {
        let Some(path) = &self.places.memory else {
            return;
        };
        let bytes = {
            let mut state = self.state.lock();
            if !std::mem::take(&mut state.changed) {
                return;
            }
            serde_json::to_vec(&state.known)
        };
        let written = bytes
            .map_err(io::Error::other)
            .and_then(|bytes| write(path, &bytes));
        if let Err(error) = written {
            tracing::warn!(path = %path.display(), %error, "remember pods' namespaces");
        }
    }

    fn seen_from_here(&self, path: &Path) -> PathBuf {
        for folder in ["/var/run/netns", "/run/netns"] {
            if let Ok(name) = path.strip_prefix(folder) {
                return self.places.netns_folder.join(name);
            }
        }
        match path.strip_prefix("/proc") {
            Ok(rest) => self.places.host_proc.join(rest),
            Err(_) => path.to_owned(),
        }
    }

    fn by_address(&self, state: &mut State, ips: &[IpAddr]) -> Option<Sandbox> {
        if ips.is_empty() {
            return None;
        }
        indexed(&state.files, ips).or_else(|| {
            self.read_files(&mut state.files);
            indexed(&state.files, ips)
        })
    }

    /// Files that are new, lead elsewhere by now, or had no address yet. A namespace that cannot be entered is none.
    fn read_files(&self, files: &mut HashMap<PathBuf, (NetnsId, Vec<IpAddr>)>) {
        let listed = fs::read_dir(&self.places.netns_folder);
        let present: BTreeSet<PathBuf> = listed
            .into_iter()
            .flatten()
            .filter_map(|entry| Some(entry.ok()?.path()))
            .collect();
        files.retain(|path, _| present.contains(path));
        for path in present {
            let Ok(netns) = Netns::open(&path) else {
                files.remove(&path);
                continue;
            };
            let known = files
                .get(&path)
                .is_some_and(|(id, ips)| *id == netns.id() && !ips.is_empty());
            if !known {
                files.insert(path, (netns.id(), addresses(&netns)));
            }
        }
    }

    fn by_process(&self, state: &mut State, uid: &str, ips: &[IpAddr]) -> Option<Sandbox> {
        let fresh = state
            .processes
            .as_ref()
            .is_some_and(|(read, _)| read.elapsed() < PASS_EVERY);
        if !fresh {
            state.processes = Some((Instant::now(), processes(&self.places.host_proc)));
        }
        let (_, by_uid) = state.processes.as_ref()?;
        let candidates = by_uid.get(uid)?;
        candidates
            .iter()
            .find_map(|path| sandbox_with(path.clone(), ips))
    }
}

impl Sandbox {
    /// Which namespace it is.
    pub fn netns_id(&self) -> NetnsId {
        NetnsId {
            device: self.device,
            inode: self.inode,
        }
    }

    /// The path still leads to the namespace that it led to.
    fn is_there(&self) -> bool {
        Netns::open(&self.netns).is_ok_and(|netns| netns.id() == self.netns_id())
    }
}

fn indexed(files: &HashMap<PathBuf, (NetnsId, Vec<IpAddr>)>, ips: &[IpAddr]) -> Option<Sandbox> {
    let matching = files
        .iter()
        .filter(|(_, (_, held))| ips.iter().any(|ip| held.contains(ip)));
    // What was read may be old: an address moves to the next pod as soon as its pod has ended.
    matching
        .map(|(path, _)| path.clone())
        .find_map(|path| sandbox_with(path, ips))
}

/// The sandbox at `path`, if one of the addresses is configured in it.
fn sandbox_with(path: PathBuf, ips: &[IpAddr]) -> Option<Sandbox> {
    let netns = Netns::open(&path).ok()?;
    let held = addresses(&netns);
    if !ips.iter().any(|ip| held.contains(ip)) {
        return None;
    }
    Some(Sandbox {
        netns: path,
        inode: netns.id().inode,
        device: netns.id().device,
        ips: ips.to_vec(),
    })
}

/// Addresses configured in a namespace, without those of the loopback.
fn addresses(netns: &Netns) -> Vec<IpAddr> {
    let listed = netns.run(|| nix::ifaddrs::getifaddrs().map(Iterator::collect::<Vec<_>>));
    let Ok(Ok(listed)) = listed else {
        return Vec::new();
    };
    let ip = |interface: nix::ifaddrs::InterfaceAddress| {
        let address = interface.address?;
        let v4 = address.as_sockaddr_in().map(|v4| IpAddr::V4(v4.ip()));
        v4.or_else(|| address.as_sockaddr_in6().map(|v6| IpAddr::V6(v6.ip())))
    };
    listed
        .into_iter()
        .filter_map(ip)
        .filter(|ip| !ip.is_loopback())
        .collect()
}

/// One pass: namespaces of the processes of each pod, oldest process first, each namespace once.
fn processes(proc: &Path) -> HashMap<String, Vec<PathBuf>> {
    let mut pids: Vec<u32> = fs::read_dir(proc)
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .collect();
    pids.sort_unstable();
    let mut by_uid: HashMap<String, Vec<PathBuf>> = HashMap::new();
    let mut seen = BTreeSet::new();
    for pid in pids {
        let folder = proc.join(pid.to_string());
        let cgroup = fs::read_to_string(folder.join("cgroup")).unwrap_or_default();
        let Some(uid) = pod_uid(&cgroup) else {
            continue;
        };
        let path = folder.join("ns/net");
        let target = fs::read_link(&path).unwrap_or_else(|_| path.clone());
        if seen.insert((uid.clone(), target)) {
            by_uid.entry(uid).or_default().push(path);
        }
    }
    by_uid
}

/// The uid in a cgroup's path: `…/pod<uid>/…`, or `…-pod<uid>.slice` with underscores for its dashes.
fn pod_uid(cgroup: &str) -> Option<String> {
    cgroup.match_indices("pod").find_map(|(at, word)| {
        let candidate = cgroup.get(at + word.len()..)?.get(..UID_CHARS)?;
        let uid = candidate.replace('_', "-");
        let groups: Vec<usize> = uid.split('-').map(str::len).collect();
        let hex = uid.chars().all(|c| c == '-' || c.is_ascii_hexdigit());
        (hex && groups == [8, 4, 4, 4, 12]).then_some(uid)
    })
}

fn recall(path: &Path) -> BTreeMap<String, Sandbox> {
    let bytes = match fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return BTreeMap::new(),
        Err(error) => {
            tracing::warn!(path = %path.display(), %error, "read what an earlier agent knew");
            return BTreeMap::new();
        }
    };
    serde_json::from_slice(&bytes).unwrap_or_else(|error| {
        tracing::warn!(path = %path.display(), %error, "what an earlier agent knew is not readable");
        BTreeMap::new()
    })
}

fn write(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let hidden = path.with_extension("tmp");
    fs::write(&hidden, bytes)?;
    fs::rename(&hidden, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    const UID: &str = "0b1c2d3e-0000-4000-8000-00000000000a";

    #[test]
    fn a_pods_uid_is_read_from_every_form_of_cgroup() {
        let scope = UID.replace('-', "_");
        for cgroup in [
            format!("0::/kubepods/besteffort/pod{UID}/abc\n"),
            format!("0::/../../kubepods/pod{UID}/abc\n"),
            format!(
                "0::/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{scope}.slice/cri-containerd-1.scope"
            ),
            format!("3:cpuset:/kubepods/pod{UID}/abc\n0::/\n"),
            format!("0::/podman/pods/kubepods-pod{scope}.slice/crio-1.scope"),
        ] {
            assert_eq!(pod_uid(&cgroup).as_deref(), Some(UID), "{cgroup}");
        }
        for cgroup in ["0::/", "0::/kubepods/besteffort", "0::/pod0b1c", "0::/podé"] {
            assert_eq!(pod_uid(cgroup), None, "{cgroup}");
        }
    }

    fn places(folder: &Path) -> Places {
        Places {
            netns_folder: folder.join("netns"),
            host_proc: folder.join("proc"),
            memory: Some(folder.join("pods.json")),
        }
    }

    #[test]
    fn the_hosts_paths_are_translated() {
        let sandboxes = Sandboxes::new(places(Path::new("/x")));
        for (host, here) in [
            ("/var/run/netns/cni-1", "/x/netns/cni-1"),
            ("/run/netns/cni-1", "/x/netns/cni-1"),
            ("/proc/7/ns/net", "/x/proc/7/ns/net"),
            ("/elsewhere/1", "/elsewhere/1"),
        ] {
            assert_eq!(
                sandboxes.seen_from_here(Path::new(host)),
                PathBuf::from(here),
                "{host}"
            );
        }
    }

    #[test]
    fn what_is_known_outlives_the_agent_while_it_is_true() {
        let folder = tempfile::tempdir().expect("a folder");
        let ip: IpAddr = "10.0.0.1".parse().expect("an address");
        let sandboxes = Sandboxes::new(places(folder.path()));
        let admitted = sandboxes
            .admit(UID, Path::new("/elsewhere"), vec![ip])
            .expect_err("no such file");
        assert!(matches!(admitted, NetnsError::Open { .. }));
        let own = format!("/proc/{}/ns/net", std::process::id());
        std::os::unix::fs::symlink("/proc", folder.path().join("proc")).expect("link");
        let known = sandboxes
            .admit(UID, Path::new(&own), vec![ip])
            .expect("a namespace");
        sandboxes.save();
        let next = Sandboxes::new(places(folder.path()));
        assert_eq!(next.find(UID, &[]), Some(known.clone()));
        assert_eq!(next.find(UID, &[ip]), Some(known));
        let other: IpAddr = "10.0.0.2".parse().expect("an address");
        assert_eq!(
            next.find(UID, &[other]),
            None,
            "another address is another sandbox"
        );
        next.keep_only(&BTreeSet::new());
        next.save();
        assert!(!Sandboxes::new(places(folder.path())).knows(UID));
    }

    #[test]
    fn a_broken_memory_is_none() {
        let folder = tempfile::tempdir().expect("a folder");
        fs::write(folder.path().join("pods.json"), b"{\"a\":").expect("write");
        assert!(!Sandboxes::new(places(folder.path())).knows("a"));
    }
}
