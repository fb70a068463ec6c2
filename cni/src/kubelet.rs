//! How to tell the kubelet's probes from everything else on a node: by its cgroup where that can be matched, else by its
//! user.
//!
//! A container has a cgroup namespace of its own where the node has version 2 alone: seen from there, kubelet's path
//! begins with `/..`, and the kernel (since 6.11) counts the levels that `nft` names from the namespace's root. So both
//! the reading and the writing are done in the cgroup namespace of the node's first process ([`in_namespace`]).

use std::{
    fs::{self, File},
    io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use nix::sched::{CloneFlags, setns};

use crate::rules::host::ProbeSource;

/// Names of processes that are, or contain, a kubelet. The kernel cuts names at 15 bytes.
const NAMES: [&str; 4] = ["kubelet", "kubelite", "k3s", "k3s-server"];

/// Looks for the kubelet below `proc` (the host's `/proc`); `cgroup` is the host's `/sys/fs/cgroup`, as `nft` sees it.
/// `None`: there is none.
pub fn find(proc: &Path, cgroup: &Path) -> Option<ProbeSource> {
    let process = processes(proc).find(|process| is_kubelet(process))?;
    let membership = fs::read_to_string(process.join("cgroup")).unwrap_or_default();
    let by_cgroup = of_cgroup(&membership, cgroup);
    by_cgroup.or_else(|| {
        fs::metadata(&process)
            .ok()
            .map(|owner| ProbeSource::Uid(owner.uid()))
    })
}

/// Runs `action` on the calling thread in the cgroup namespace at `path`, and comes back. Where the thread is in it
/// already, or there is none (an old kernel), it just runs.
///
/// # Errors
/// The namespace cannot be entered; `action` has then not run.
pub(crate) fn in_namespace<T>(path: &Path, action: impl FnOnce() -> T) -> io::Result<T> {
    let own = match File::open("/proc/thread-self/ns/cgroup") {
        Ok(own) => own,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(action()),
        Err(error) => return Err(error),
    };
    let there = File::open(path)?;
    if there.metadata()?.ino() == own.metadata()?.ino() {
        return Ok(action());
    }
    setns(&there, CloneFlags::CLONE_NEWCGROUP)?;
    let result = action();
    // The way back needs no more than the way there. Were it refused, this thread would see paths from elsewhere.
    setns(&own, CloneFlags::CLONE_NEWCGROUP)?;
    Ok(result)
}

fn processes(proc: &Path) -> impl Iterator<Item = PathBuf> {
    let entries = fs::read_dir(proc)
        .into_iter()
        .flatten()
        .filter_map(Result::ok);
    let is_process = |name: &str| name.bytes().all(|byte| byte.is_ascii_digit());
    entries
        .filter(move |entry| entry.file_name().to_str().is_some_and(is_process))
        .map(|entry| entry.path())
}

fn is_kubelet(process: &Path) -> bool {
    fs::read_to_string(process.join("comm")).is_ok_and(|name| NAMES.contains(&name.trim_end()))
}

/// The version 2 entry of `/proc/<pid>/cgroup`, whose folder must exist: `nft` opens it. A kubelet in the root of the
/// hierarchy shares it with every other process, and one outside our cgroup namespace shows as `/..`: no match then.
fn of_cgroup(membership: &str, mount: &Path) -> Option<ProbeSource> {
    let path = membership
        .lines()
        .find_map(|line| line.strip_prefix("0::/"))?;
    if path.is_empty() || path.split('/').any(|part| part == "..") {
        return None;
    }
    let hybrid = format!("unified/{path}");
    let below_mount = if mount.join("unified").is_dir() {
        hybrid.as_str()
    } else {
        path
    };
    let source: ProbeSource = format!("cgroup:{below_mount}").parse().ok()?;
    mount.join(below_mount).is_dir().then_some(source)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn process(root: &Path, pid: &str, name: &str, cgroup: &str) {
        let folder = root.join("proc").join(pid);
        fs::create_dir_all(&folder).expect("make");
        fs::write(folder.join("comm"), format!("{name}\n")).expect("write");
        fs::write(folder.join("cgroup"), cgroup).expect("write");
    }

    fn found(kubelets_cgroup: &str, folders: &[&str]) -> Option<ProbeSource> {
        let root = tempfile::tempdir().expect("a folder");
        process(root.path(), "7", "kubelet-lookalike", "0::/other\n");
        process(root.path(), "12", "kubelet", kubelets_cgroup);
        let mount = root.path().join("cgroup");
        for folder in folders {
            fs::create_dir_all(mount.join(folder)).expect("make");
        }
        find(&root.path().join("proc"), &mount)
    }

    #[test]
    fn the_kubelets_own_cgroup_is_matched_where_it_can_be() {
        let cgroup = |path: &str, level| ProbeSource::Cgroup {
            path: path.into(),
            level,
        };
        let unified = found(
            "0::/kubelet.slice/kubelet.service\n",
            &["kubelet.slice/kubelet.service"],
        );
        assert_eq!(unified, Some(cgroup("kubelet.slice/kubelet.service", 2)));
        let hybrid = found("4:memory:/x\n0::/kubelet\n", &["unified/kubelet"]);
        assert_eq!(hybrid, Some(cgroup("unified/kubelet", 1)));
    }

    #[test]
    fn otherwise_its_user_is() {
        let user = nix::unistd::getuid().as_raw();
        for (cgroup, folders) in [
            ("0::/\n", &["x"][..]),
            ("0::/../../kubelet\n", &["x"]),
            ("0::/kubelet\n", &["x"]),
            ("1:memory:/kubelet\n", &["kubelet"]),
        ] {
            assert_eq!(
                found(cgroup, folders),
                Some(ProbeSource::Uid(user)),
                "{cgroup}"
            );
        }
    }

    #[test]
    fn a_cgroup_namespace_is_entered_and_left() {
        let inode = || {
            fs::metadata("/proc/thread-self/ns/cgroup")
                .map(|meta| meta.ino())
                .ok()
        };
        let other = std::thread::spawn(|| {
            nix::sched::unshare(CloneFlags::CLONE_NEWCGROUP).ok()?;
            File::open("/proc/thread-self/ns/cgroup").ok()
        });
        let Ok(Some(other)) = other.join() else {
            println!("skipped: cgroup namespaces are not permitted here");
            return;
        };
        let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&other));
        let (before, there) = (inode(), other.metadata().map(|meta| meta.ino()).ok());
        let inside = in_namespace(Path::new(&path), inode).expect("entered");
        assert_eq!(inside, there);
        assert_ne!(inside, before);
        assert_eq!(inode(), before, "back again");
        let same = in_namespace(Path::new("/proc/thread-self/ns/cgroup"), inode);
        assert_eq!(same.expect("no need to move"), before);
    }

    #[test]
    fn no_kubelet_is_no_answer() {
        let root = tempfile::tempdir().expect("a folder");
        process(root.path(), "7", "init", "0::/\n");
        assert_eq!(find(&root.path().join("proc"), root.path()), None);
    }
}
