//! What the rig needs of the machine: cgroup folders, images, programs, and the network between a cluster's nodes.

use std::{
    fs,
    io::Write,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, bail, ensure};

use crate::stderr;

/// The folder of the cluster's programs: `LEYLINE_CLUSTER_BIN`, or what `tests/cluster/build` makes.
pub fn programs() -> Result<PathBuf> {
    let folder = match std::env::var_os("LEYLINE_CLUSTER_BIN") {
        Some(folder) => folder.into(),
        None => target()?.join("cluster/bin"),
    };
    for program in PROGRAMS {
        ensure!(
            folder.join(program).is_file(),
            "{} has no {program}: run tests/cluster/build",
            folder.display()
        );
    }
    Ok(folder.canonicalize()?)
}

/// A program that `tests/cluster/build` makes, made now unless it is there as its module says.
pub fn made(program: &str) -> Result<PathBuf> {
    let mut build = Command::new(repository().join("tests/cluster/build"));
    let target = target()?;
    build.arg(program).env("CARGO_TARGET_DIR", &target);
    let output = build.stdin(Stdio::null()).output();
    let output = output.context("run tests/cluster/build")?;
    ensure!(
        output.status.success(),
        "tests/cluster/build {program}: {}",
        stderr(&output)
    );
    Ok(target.join("cluster/bin").join(program))
}

const PROGRAMS: &[&str] = &[
    "etcd",
    "kube-apiserver",
    "kube-controller-manager",
    "kube-scheduler",
    "kubelet",
    "kube-proxy",
    "kubectl",
    "containerd",
    "containerd-shim-runc-v2",
    "ctr",
    "coredns",
    "helm",
    "bridge",
    "host-local",
    "loopback",
    "portmap",
];

/// What a cluster needs of the distribution, with the package that holds it.
const NEEDS: &[(&str, &str)] = &[
    ("runc", "runc"),
    ("nft", "nftables"),
    ("iptables", "iptables"),
    ("conntrack", "conntrack"),
    ("ip", "iproute2"),
    ("cc", "gcc"),
];

/// An error that names all that is missing to start a cluster here.
pub fn check() -> Result<()> {
    ensure!(
        nix::unistd::geteuid().is_root(),
        "a cluster needs root: its nodes mount file systems and run containers"
    );
    let missing: Vec<&str> = NEEDS
        .iter()
        .filter(|(program, _)| find(program).is_none())
        .map(|(_, package)| *package)
        .collect();
    ensure!(
        missing.is_empty(),
        "missing: {}; tests/prepare test installs it",
        missing.join(" ")
    );
    Ok(())
}

/// A program of the distribution, also where users do not look.
pub fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var("PATH").unwrap_or_default();
    let folders = path.split(':').chain(["/usr/sbin", "/sbin"]);
    folders
        .map(|folder| Path::new(folder).join(program))
        .find(|path| path.is_file())
}

/// Cargo's folder, in which this program stands (target/PROFILE/cluster or target/PROFILE/deps/cluster-...).
pub fn target() -> Result<PathBuf> {
    let own = std::env::current_exe()?;
    let target = own.ancestors().find(|folder| {
        folder.join("CACHEDIR.TAG").is_file() || folder.file_name().is_some_and(|n| n == "target")
    });
    Ok(target.context("find cargo's target folder")?.to_owned())
}

/// The repository's folder.
pub fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("tests/ stands in the repository")
        .to_owned()
}

/// The mounted cgroup hierarchies: all of version 1, and version 2.
fn hierarchies() -> Result<Vec<(PathBuf, bool)>> {
    let mounts = fs::read_to_string("/proc/self/mounts")?;
    let found = mounts.lines().filter_map(|line| {
        let mut fields = line.split(' ');
        let (folder, kind) = (fields.nth(1)?, fields.next()?);
        match kind {
            "cgroup" => Some((folder.into(), false)),
            "cgroup2" => Some((folder.into(), true)),
            _ => None,
        }
    });
    Ok(found.collect())
}

/// Makes a folder (`name/child`) in every cgroup hierarchy. A cpuset needs its processors before it can hold a process.
pub fn make_cgroup(name: &Path) -> Result<()> {
    for (root, second) in hierarchies()? {
        let mut folder = root.clone();
        for part in name {
            if second {
                // Absent controllers are the kubelet's to complain of.
                let _ = fs::write(
                    folder.join("cgroup.subtree_control"),
                    "+cpu +memory +pids +io +cpuset",
                );
            }
            let above = folder.clone();
            folder = folder.join(part);
            fs::create_dir_all(&folder).with_context(|| format!("{}", folder.display()))?;
            for file in ["cpuset.cpus", "cpuset.mems"] {
                if !second && let Ok(value) = fs::read(above.join(file)) {
                    fs::write(folder.join(file), value)?;
                }
            }
        }
    }
    Ok(())
}

/// The folder called `name` of the cgroup hierarchy of version 2, which `socket cgroupv2` of nftables looks at.
pub fn cgroup2(name: &Path) -> Result<PathBuf> {
    let found = hierarchies()?.into_iter().find(|(_, second)| *second);
    let (root, _) = found.context("no cgroup hierarchy of version 2 is mounted")?;
    Ok(root.join(name))
}

/// Removes a folder of every cgroup hierarchy with all below; no process may be left in them.
pub fn remove_cgroup(name: &Path) -> Result<()> {
    for (root, _) in hierarchies()? {
        remove_folders(&root.join(name))?;
    }
    Ok(())
}

fn remove_folders(folder: &Path) -> Result<()> {
    let Ok(entries) = fs::read_dir(folder) else {
        return Ok(());
    };
    for entry in entries.flatten() {
        if entry.file_type()?.is_dir() {
            remove_folders(&entry.path())?;
        }
    }
    // The kernel empties a folder a moment after its last process has ended.
    crate::until(
        std::time::Duration::from_secs(10),
        || match fs::remove_dir(folder) {
            Err(error) if folder.exists() => Err(error).context(format!("{}", folder.display())),
            _ => Ok(()),
        },
    )
}

/// Runs lines of `ip -batch` in the network namespace of the thread.
pub fn ip(lines: &str) -> Result<()> {
    feed(
        Command::new(find("ip").context("ip of iproute2")?).args(["-batch", "-"]),
        lines,
    )
}

/// Runs a program to its end with `input`.
pub fn feed(command: &mut Command, input: &str) -> Result<()> {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("{command:?}"))?;
    let mut stdin = child.stdin.take().context("a pipe")?;
    stdin.write_all(input.as_bytes())?;
    drop(stdin);
    let output = child.wait_with_output()?;
    ensure!(
        output.status.success(),
        "{command:?}: {}\n{input}",
        stderr(&output)
    );
    Ok(())
}

/// Sets a sysctl of the thread's network namespace.
pub fn sysctl(name: &str, value: &str) -> Result<()> {
    let path = format!("/proc/sys/net/{name}");
    fs::write(&path, value).with_context(|| path)
}

/// containerd's snapshotter for a folder.
pub fn snapshotter(folder: &Path) -> Result<&'static str> {
    let overlay = nix::sys::statfs::OVERLAYFS_SUPER_MAGIC;
    let on = nix::sys::statfs::statfs(folder)?.filesystem_type();
    Ok(if on == overlay { "native" } else { "overlayfs" })
}

/// Makes a folder that everybody may read.
pub fn folder(path: &Path) -> Result<()> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o755)
        .create(path)
        .with_context(|| format!("make {}", path.display()))
}

/// Whether `made` is at least as new as all of `sources`.
pub fn is_newer(made: &Path, sources: &[&Path]) -> bool {
    let time = |path: &Path| fs::metadata(path).and_then(|found| found.modified()).ok();
    let made = time(made);
    made.is_some() && sources.iter().all(|source| time(source) <= made)
}

/// The archives of the images that every cluster of the rig has, made where they are missing or old: `pause`, `coredns`, and
/// `tests` (the programs of the tests).
pub fn images(programs: &Path) -> Result<Vec<PathBuf>> {
    let target = target()?;
    let out = target.join("cluster/images");
    folder(&out)?;
    let source = repository().join("tests/cluster/pause.c");
    let pause = out.join("pause");
    if !is_newer(&pause, &[&source]) {
        let mut cc = Command::new("cc");
        cc.args(["-O2", "-static", "-s", "-o"])
            .args([&pause, &source]);
        feed(&mut cc, "")?;
    }
    let coredns = programs.join("coredns");
    let (load, web) = (beside("load")?, beside("web")?);
    let leyline = crate::leyline();
    pack(&out, "pause", "65535", &[&pause])?;
    pack(&out, "coredns", "0", &[&coredns])?;
    pack(&out, "tests", "1000", &[&load, &web, &leyline])?;
    Ok(["pause", "coredns", "tests"]
        .map(|name| out.join(format!("{name}.tar")))
        .to_vec())
}

/// The static CNI plugin, which is built apart: `LEYLINE_CNI_PLUGIN`, or where cargo puts it.
pub fn plugin() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("LEYLINE_CNI_PLUGIN") {
        return Ok(path.into());
    }
    let folder = target()?.join(format!("{}-unknown-linux-gnu", std::env::consts::ARCH));
    let built = ["release", "debug"].map(|profile| folder.join(profile).join("cni-plugin"));
    let found = built.into_iter().find(|path| path.is_file());
    found.context(
        "the CNI plugin is not built, or set LEYLINE_CNI_PLUGIN: see tests/cluster/build plugin",
    )
}

/// The `cluster` command, which the rig runs for its forwarder and its keeper.
pub fn cluster_program() -> Result<PathBuf> {
    beside("cluster")
}

/// A program of the tests, built beside this one.
pub fn beside(name: &str) -> Result<PathBuf> {
    let own = std::env::current_exe()?;
    let found = own
        .ancestors()
        .skip(1)
        .take(2)
        .map(|folder| folder.join(name))
        .find(|path| path.is_file());
    found.with_context(|| format!("{name} is not built: cargo build -p leyline-tests --bins"))
}

/// What a part of `tests/cluster/build` has made, below cargo's folder; an error that names the part where it has not.
pub fn built(part: &str) -> Result<PathBuf> {
    let folder = target()?.join("cluster").join(part);
    ensure!(
        folder.is_dir(),
        "no {}: run tests/cluster/build {part}",
        folder.display()
    );
    Ok(folder.canonicalize()?)
}

/// Makes the image `name` from files of this machine (`FILE[:DESTINATION]`, the first its program), unless it is newer than all.
pub fn pack(out: &Path, name: &str, user: &str, files: &[&Path]) -> Result<()> {
    if is_newer(&out.join(format!("{name}.tar")), files) {
        return Ok(());
    }
    let mut build = Command::new(repository().join("deploy/images/build"));
    build
        .args(["--no-gzip", "--user", user, "--tag", "dev", "--out"])
        .arg(out);
    build.arg("--files").arg(name).args(files);
    let output = build.output().context("deploy/images/build")?;
    if !output.status.success() {
        bail!("pack the image {name}: {}", stderr(&output));
    }
    Ok(())
}
