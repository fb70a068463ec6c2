//! Network namespaces: opening one, telling two apart, and creating things inside one.
//!
//! A socket belongs for life to the namespace it was created in, so the tunnel enters a pod's namespace only for the
//! microseconds that `socket` and `bind` take. Nothing here configures a namespace.

use std::{
    cell::RefCell,
    fmt, fs,
    io::{self, Write},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::fs::MetadataExt,
    },
    path::{Path, PathBuf},
    process,
    sync::Arc,
    thread,
};

use nix::{
    errno::Errno,
    sched::{CloneFlags, setns, unshare},
    sys::statfs::{FsType, fstatfs},
};

/// The kernel's identity of a namespace: the device and inode of its file. Equal for every path and fd that leads to
/// the same namespace, and not reused while any fd of it is open.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NetnsId {
    /// Device of the namespace filesystem.
    pub device: u64,
    /// Inode; the number that `lsns` and `ip netns identify` print.
    pub inode: u64,
}

impl fmt::Display for NetnsId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "net:[{}]", self.inode)
    }
}

/// An open network namespace. Cloning shares the descriptor; the namespace lives at least as long as the last clone.
#[derive(Clone)]
pub struct Netns(Arc<Open>);

struct Open {
    fd: OwnedFd,
    id: NetnsId,
}

/// A namespace that could not be opened or entered.
#[derive(Debug, thiserror::Error)]
pub enum NetnsError {
    /// There is nothing to open at the path, or no permission to.
    #[error("open network namespace {}", path.display())]
    Open {
        /// What was opened.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// A descriptor that does not lead to a namespace file.
    #[error("the descriptor is no network namespace")]
    NotANamespace(#[source] io::Error),
    /// It was sent, and could not be taken: no file is left for it.
    #[error("the namespace's descriptor was lost: too many open files")]
    Lost,
    /// `unshare` was refused.
    #[error("create a network namespace")]
    Create(#[source] io::Error),
    /// `setns` was refused: it needs CAP_SYS_ADMIN in the namespace's user namespace and in our own.
    #[error("enter network namespace {id}")]
    Enter {
        /// The namespace.
        id: NetnsId,
        /// Why it failed.
        source: io::Error,
    },
}

thread_local! {
    /// The namespace this thread is in, once it is known: saves an open of `/proc` per entry.
    static HERE: RefCell<Option<Netns>> = const { RefCell::new(None) };
}

impl Netns {
    /// Opens the namespace file at `path`, such as `/run/netns/x` or `/proc/1/ns/net`.
    ///
    /// # Errors
    /// [`NetnsError::Open`], or [`NetnsError::NotANamespace`] when the path leads to an ordinary file: what a namespace's
    /// mount point becomes when the namespace is gone.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, NetnsError> {
        let path = path.as_ref();
        let file = fs::File::open(path).map_err(|source| NetnsError::Open {
            path: path.to_owned(),
            source,
        })?;
        Self::from_fd(file.into())
    }

    /// Takes over a descriptor, for example one received with a ZDS Add.
    ///
    /// # Errors
    /// [`NetnsError::NotANamespace`] for a descriptor of anything else. A namespace of another kind (mount, pid) is
    /// found only by [`Netns::run`], which the kernel then refuses.
    pub fn from_fd(fd: OwnedFd) -> Result<Self, NetnsError> {
        const NSFS_MAGIC: FsType = FsType(libc::NSFS_MAGIC);
        let kind = fstatfs(&fd).map_err(|errno| NetnsError::NotANamespace(errno.into()))?;
        if kind.filesystem_type() != NSFS_MAGIC {
            return Err(NetnsError::NotANamespace(Errno::EINVAL.into()));
        }
        let file = fs::File::from(fd);
        let meta = file.metadata().map_err(NetnsError::NotANamespace)?;
        let id = NetnsId {
            device: meta.dev(),
            inode: meta.ino(),
        };
        Ok(Self(Arc::new(Open {
            fd: file.into(),
            id,
        })))
    }

    /// The namespace of the calling thread.
    ///
    /// # Errors
    /// As [`Netns::open`], for instance where `/proc` is not mounted.
    pub fn current() -> Result<Self, NetnsError> {
        if let Some(here) = HERE.with_borrow(Clone::clone) {
            return Ok(here);
        }
        let here = Self::open("/proc/thread-self/ns/net")?;
        HERE.set(Some(here.clone()));
        Ok(here)
    }

    /// A new namespace, with nothing but a loopback that is down. It has no name: it ends with its last descriptor,
    /// also after a crash.
    ///
    /// # Errors
    /// [`NetnsError::Create`] without CAP_SYS_ADMIN, or at the system's limit of namespaces.
    pub fn create() -> Result<Self, NetnsError> {
        // unshare moves the thread that calls it, so a thread of its own does, and ends.
        let made = thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).map_err(|e| NetnsError::Create(e.into()))?;
            Self::open("/proc/thread-self/ns/net")
        });
        made.join().expect("the thread does not panic")
    }

    /// Which namespace this is.
    pub fn id(&self) -> NetnsId {
        self.0.id
    }

    /// Runs `action` inside the namespace, on the calling thread, and comes back, also when `action` panics.
    ///
    /// `action` is synchronous on purpose: no await can move or interleave it, and it should only create and bind
    /// sockets. It may nest. Cost: two `setns`, together about 3 µs; nothing when the thread is
    /// already there. A helper thread would cost two context switches per outbound connection instead.
    ///
    /// # Errors
    /// [`NetnsError::Enter`]; `action` has then not run.
    ///
    /// # Aborts
    /// When the thread cannot come back. It would be a runtime's worker in a pod's namespace, and whatever it opened
    /// next would carry one pod's traffic in another's name. The kernel allows the way back to whoever was allowed in,
    /// so this takes a capability dropped in between, or no memory for a few bytes: the latter is retried first.
    pub fn run<R>(&self, action: impl FnOnce() -> R) -> Result<R, NetnsError> {
        let home = Self::current()?;
        if home.id() == self.id() {
            return Ok(action());
        }
        self.enter()?;
        let _way_back = WayBack(home);
        Ok(action())
    }

    /// Moves the calling thread into the namespace for good. Only for threads that the caller owns.
    ///
    /// # Errors
    /// [`NetnsError::Enter`]; the thread has not moved.
    pub fn enter(&self) -> Result<(), NetnsError> {
        setns(&self.0.fd, CloneFlags::CLONE_NEWNET).map_err(|errno| NetnsError::Enter {
            id: self.id(),
            source: errno.into(),
        })?;
        HERE.set(Some(self.clone()));
        Ok(())
    }
}

/// Tells this module that the calling thread has changed its namespace by other means, such as `unshare`.
pub fn forget_current() {
    HERE.set(None);
}

impl AsFd for Netns {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.fd.as_fd()
    }
}

impl fmt::Debug for Netns {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.id())
    }
}

/// Two are equal when they are the same namespace, however they were opened.
impl PartialEq for Netns {
    fn eq(&self, other: &Self) -> bool {
        self.id() == other.id()
    }
}

impl Eq for Netns {}

struct WayBack(Netns);

impl Drop for WayBack {
    fn drop(&mut self) {
        const TRIES: usize = 100;
        for _ in 0..TRIES {
            match self.0.enter() {
                Ok(()) => return,
                Err(NetnsError::Enter { source, .. })
                    if source.kind() == io::ErrorKind::OutOfMemory =>
                {
                    thread::yield_now();
                }
                Err(_) => break,
            }
        }
        // Not through the log: its thread may be what holds the memory.
        let _ = writeln!(
            io::stderr(),
            "a thread cannot return to its network namespace {}: aborting",
            self.0.id()
        );
        process::abort();
    }
}

#[cfg(test)]
mod tests;
