#![allow(unsafe_code, reason = "clone with new namespaces has no safe wrapper")]
//! Entering the embedded mesh's own namespaces: one process is cloned into new mount, network, PID (and, for an ordinary
//! user, user) namespaces and executes the supervisor's role at once. Runs before any thread exists.

use std::{
    ffi::CString,
    fs, io,
    os::fd::{AsRawFd, OwnedFd},
    path::Path,
};

use nix::{
    errno::Errno,
    libc,
    sys::signal::Signal,
    unistd::{Gid, Pid, Uid},
};

/// How the supervisor is started.
#[derive(Debug)]
pub(super) struct Start {
    /// Arguments of the new process, its own name first.
    pub arguments: Vec<CString>,
    /// Its environment, `NAME=value` each.
    pub environment: Vec<CString>,
    /// Whether it dies with its parent (`up` in the foreground) or outlives it (`--detach`).
    pub die_with_parent: bool,
    /// Where the child says what failed before it could execute: one line of text.
    pub report: OwnedFd,
    /// Its standard output and error. Its standard input is empty.
    pub output: OwnedFd,
}

/// Why this system refuses the namespaces, with the remedy.
#[derive(Debug, thiserror::Error)]
#[error("create the mesh's own namespaces{}", hint.as_deref().map(|hint| format!(" ({hint})")).unwrap_or_default())]
pub(super) struct SandboxError {
    /// The setting that forbids it, and how to change it, where we can tell.
    pub hint: Option<String>,
    source: Errno,
}

/// Whether the caller needs a user namespace of its own: it is not root, or root without the power to make namespaces.
pub(super) fn needs_user_namespace() -> bool {
    !Uid::effective().is_root() || !has_sys_admin()
}

/// Clones the supervisor. Must be called while the process has one thread.
///
/// The child is PID 1 of its own PID namespace: when it ends, the kernel ends everything in it.
pub(super) fn spawn(start: &Start) -> Result<Pid, SandboxError> {
    let rootless = needs_user_namespace();
    let mut flags =
        libc::CLONE_NEWNS | libc::CLONE_NEWNET | libc::CLONE_NEWPID | libc::CLONE_NEWIPC;
    if rootless {
        flags |= libc::CLONE_NEWUSER;
    }
    let ids = (Uid::effective(), Gid::effective());
    let flags = libc::c_ulong::try_from(flags | libc::SIGCHLD).expect("clone flags are positive");
    // SAFETY: without CLONE_VM and with no stack given, clone behaves as fork does; there is one thread, and the child
    // does nothing but prepare and execute.
    let pid = unsafe { libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0) };
    match Errno::result(pid) {
        Ok(0) => child(start, rootless.then_some(ids)),
        Ok(pid) => Ok(Pid::from_raw(
            i32::try_from(pid).expect("a process id fits"),
        )),
        Err(errno) => Err(SandboxError {
            hint: hint(errno),
            source: errno,
        }),
    }
}

/// What stands in the way of an ordinary user's namespaces on this system, with its remedy.
pub(super) fn hint(errno: Errno) -> Option<String> {
    let setting = |path: &str| {
        fs::read_to_string(path)
            .ok()
            .map(|text| text.trim().to_owned())
    };
    if setting("/proc/sys/kernel/unprivileged_userns_clone").as_deref() == Some("0") {
        return Some("run as root, or: sudo sysctl kernel.unprivileged_userns_clone=1".to_owned());
    }
    if setting("/proc/sys/user/max_user_namespaces").as_deref() == Some("0") {
        return Some("run as root, or: sudo sysctl user.max_user_namespaces=15000".to_owned());
    }
    if setting("/proc/sys/kernel/apparmor_restrict_unprivileged_userns").as_deref() == Some("1") {
        return Some(
            "AppArmor restricts user namespaces: run as root, or: \
             sudo sysctl kernel.apparmor_restrict_unprivileged_userns=0"
                .to_owned(),
        );
    }
    match errno {
        Errno::EPERM | Errno::EACCES => Some(
            "the system forbids user namespaces to this process: run as root, or outside the container whose \
             seccomp profile forbids it"
                .to_owned(),
        ),
        Errno::ENOSPC => Some("the limit of user namespaces is reached: see sysctl user.max_user_namespaces".to_owned()),
        _ => None,
    }
}

fn child(start: &Start, rootless: Option<(Uid, Gid)>) -> ! {
    let Err(error) = prepare_and_execute(start, rootless);
    let hint = error
        .raw_os_error()
        .and_then(|code| hint(Errno::from_raw(code)));
    let line = match hint {
        Some(hint) => format!("error: enter the mesh's own namespaces: {error} ({hint})\n"),
        None => format!("error: enter the mesh's own namespaces: {error}\n"),
    };
    let _ = nix::unistd::write(&start.report, line.as_bytes());
    // SAFETY: _exit only ends the process; nothing of the parent's must run twice.
    unsafe { libc::_exit(1) }
}

fn prepare_and_execute(
    start: &Start,
    rootless: Option<(Uid, Gid)>,
) -> io::Result<std::convert::Infallible> {
    if let Some((uid, gid)) = rootless {
        map_ids(uid, gid, 0)?;
    }
    nix::unistd::setsid()?;
    if start.die_with_parent {
        nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?;
    }
    keep_across_exec(&start.report)?;
    nix::unistd::dup2_stdin(fs::File::open("/dev/null")?)?;
    nix::unistd::dup2_stdout(&start.output)?;
    nix::unistd::dup2_stderr(&start.output)?;
    std::env::set_current_dir("/")?;
    Ok(nix::unistd::execve(
        c"/proc/self/exe",
        &start.arguments,
        &start.environment,
    )?)
}

/// Maps one user and one group: `uid` and `gid` outside are `inside` within. Needs no privilege.
pub(super) fn map_ids(uid: Uid, gid: Gid, inside: u32) -> io::Result<()> {
    let this = Path::new("/proc/self");
    fs::write(this.join("setgroups"), "deny")?;
    fs::write(this.join("uid_map"), format!("{inside} {uid} 1"))?;
    fs::write(this.join("gid_map"), format!("{inside} {gid} 1"))
}

/// Lets `fd` live through an exec.
pub(super) fn keep_across_exec(fd: &impl AsRawFd) -> io::Result<()> {
    // SAFETY: F_SETFD on a descriptor that the caller owns changes only its flags.
    Errno::result(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFD, 0) })?;
    Ok(())
}

fn has_sys_admin() -> bool {
    const CAP_SYS_ADMIN: u64 = 21;
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let bits = effective.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok());
    bits.is_none_or(|bits| bits & (1 << CAP_SYS_ADMIN) != 0)
}
