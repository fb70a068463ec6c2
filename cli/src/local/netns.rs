//! The embedded mesh's network namespaces: made, named and worked in. A thread that entered one never leaves it, so that
//! a socket can not be made in the wrong place.

use std::{
    fs::{self, File},
    io,
    net::{SocketAddr, TcpStream},
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, setns, unshare},
};
use tokio::runtime::Handle;

/// Where the names are: on the private `/run`, not the machine's.
const FOLDER: &str = "/run/netns";

/// A named network namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Netns {
    path: PathBuf,
}

impl Netns {
    /// Makes a namespace and names it. Its loopback is down and it has no other interface.
    pub fn create(name: &str) -> io::Result<Self> {
        fs::create_dir_all(FOLDER)?;
        let path = Path::new(FOLDER).join(name);
        File::create(&path)?;
        let target = path.clone();
        on_thread(move || {
            unshare(CloneFlags::CLONE_NEWNET)?;
            let own = thread_namespace();
            mount(
                Some(&own),
                &target,
                None::<&str>,
                MsFlags::MS_BIND,
                None::<&str>,
            )?;
            Ok(())
        })?;
        Ok(Self { path })
    }

    /// Its path, which the agent and the tunnel open.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Removes the name. The namespace itself ends with its last process and socket.
    pub fn remove(&self) {
        let _ = umount2(&self.path, MntFlags::MNT_DETACH);
        let _ = fs::remove_file(&self.path);
    }

    /// Runs `body` on a thread inside, with an executor for netlink and sockets.
    pub fn run<T: Send + 'static>(
        &self,
        body: impl FnOnce(&tokio::runtime::Runtime) -> io::Result<T> + Send + 'static,
    ) -> io::Result<T> {
        let namespace = File::open(&self.path)?;
        on_thread(move || {
            setns(namespace, CloneFlags::CLONE_NEWNET)?;
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()?;
            body(&runtime)
        })
    }

    /// A TCP connection made inside. Blocking.
    pub(super) fn connect(&self, address: SocketAddr, limit: Duration) -> io::Result<TcpStream> {
        self.run(move |_| TcpStream::connect_timeout(&address, limit))
    }

    /// A runtime that stays inside: every socket made by a task of it is made there.
    pub fn runtime(&self) -> io::Result<Handle> {
        let namespace = File::open(&self.path)?;
        let (sender, receiver) = std::sync::mpsc::sync_channel(1);
        let name = self
            .path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        thread::Builder::new().name(name).spawn(move || {
            let entered = setns(namespace, CloneFlags::CLONE_NEWNET).map_err(io::Error::from);
            match entered.and_then(|()| {
                tokio::runtime::Builder::new_current_thread()
                    .enable_all()
                    .build()
            }) {
                Ok(runtime) => {
                    let _ = sender.send(Ok(runtime.handle().clone()));
                    runtime.block_on(std::future::pending::<()>());
                }
                Err(error) => {
                    let _ = sender.send(Err(error));
                }
            }
        })?;
        receiver
            .recv()
            .map_err(|_| io::Error::other("the namespace's thread ended"))?
    }
}

fn on_thread<T: Send + 'static>(
    body: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    let thread = thread::Builder::new()
        .name("netns".to_owned())
        .spawn(body)?;
    thread
        .join()
        .map_err(|_| io::Error::other("the namespace's thread panicked"))?
}

/// The calling thread's own namespace, also where `/proc` is that of an outer PID namespace.
fn thread_namespace() -> PathBuf {
    PathBuf::from("/proc/thread-self/ns/net")
}
