//! Settings of a network namespace that only `/proc/sys/net` has.
//!
//! What is written there goes to the namespace of the writing thread. A container without privileges has `/proc/sys`
//! read-only, also one that may administer networks; such a one looks into a procfs of its own that is mounted nowhere,
//! which takes CAP_SYS_ADMIN.

#![allow(unsafe_code, reason = "the calls of the new mount API have no wrapper")]

use std::{
    ffi::CStr,
    io::{self, Write},
    os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
    ptr,
};

use nix::{
    fcntl::{OFlag, open, openat},
    sys::stat::Mode,
};

use crate::netns::Netns;

/// Writes settings of namespaces.
#[derive(Debug)]
pub struct Sysctl {
    /// A procfs.
    root: OwnedFd,
}

impl Sysctl {
    /// `/proc`, or where that is read-only a procfs of our own.
    ///
    /// # Errors
    /// The system's: there is no `/proc`, or no permission for another.
    pub fn open() -> io::Result<Self> {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let shared = Self {
            root: open("/proc", flags, Mode::empty())?,
        };
        match shared.probe() {
            Err(error) if error.kind() == io::ErrorKind::ReadOnlyFilesystem => Ok(Self {
                root: detached_procfs()?,
            }),
            _ => Ok(shared),
        }
    }

    /// Opens for writing what every namespace has, and writes nothing.
    fn probe(&self) -> io::Result<()> {
        self.open_setting("ipv4/ip_forward").map(drop)
    }

    /// Sets `name`, such as `ipv4/tcp_migrate_req`, in the namespace.
    ///
    /// # Errors
    /// The system's: there is no such setting, or no permission.
    pub fn set(&self, netns: &Netns, name: &str, value: &str) -> io::Result<()> {
        let write = || self.open_setting(name)?.write_all(value.as_bytes());
        netns.run(write).map_err(io::Error::other)?
    }

    fn open_setting(&self, name: &str) -> io::Result<std::fs::File> {
        let path = format!("sys/net/{name}");
        let flags = OFlag::O_WRONLY | OFlag::O_CLOEXEC;
        Ok(openat(&self.root, path.as_str(), flags, Mode::empty())?.into())
    }
}

const FSCONFIG_CMD_CREATE: libc::c_uint = 6; // linux/mount.h
const CLOEXEC: libc::c_uint = 1; // FSOPEN_CLOEXEC and FSMOUNT_CLOEXEC

/// A procfs that is mounted nowhere: it ends with its descriptor.
fn detached_procfs() -> io::Result<OwnedFd> {
    const PROC: &CStr = c"proc";
    // SAFETY: the name is a C string that outlives the call.
    let context = owned(unsafe { libc::syscall(libc::SYS_fsopen, PROC.as_ptr(), CLOEXEC) })?;
    // SAFETY: CMD_CREATE takes neither a key nor a value: null, null, 0.
    let created = unsafe {
        libc::syscall(
            libc::SYS_fsconfig,
            context.as_raw_fd(),
            FSCONFIG_CMD_CREATE,
            ptr::null::<libc::c_char>(),
            ptr::null::<libc::c_void>(),
            0,
        )
    };
    if created < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: numbers alone.
    owned(unsafe { libc::syscall(libc::SYS_fsmount, context.as_raw_fd(), CLOEXEC, 0) })
}

fn owned(result: libc::c_long) -> io::Result<OwnedFd> {
    let fd = RawFd::try_from(result).ok().filter(|fd| *fd >= 0);
    let fd = fd.ok_or_else(io::Error::last_os_error)?;
    // SAFETY: the kernel has just given us this descriptor, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::fresh_netns;

    const NAME: &str = "ipv4/ip_forward";

    fn value(netns: &Netns) -> String {
        let read = || std::fs::read_to_string("/proc/sys/net/ipv4/ip_forward");
        netns.run(read).expect("permitted").expect("/proc")
    }

    #[test]
    fn sets_what_is_of_one_namespace_and_of_no_other() {
        let (Some(one), Some(other)) = (fresh_netns(), fresh_netns()) else {
            return;
        };
        let before = value(&other);
        let sysctl = Sysctl::open().expect("/proc");
        sysctl.set(&one, NAME, "1").expect("permitted");
        assert_eq!(value(&one).trim(), "1");
        assert_eq!(value(&other), before);
    }

    #[test]
    fn a_procfs_of_our_own_does_as_well() {
        let Some(netns) = fresh_netns() else { return };
        let root = match detached_procfs() {
            Ok(root) => root,
            Err(error) => return println!("skipped: {error}"),
        };
        let sysctl = Sysctl { root };
        sysctl.set(&netns, NAME, "1").expect("permitted");
        assert_eq!(value(&netns).trim(), "1");
    }
}
