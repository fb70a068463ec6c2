//! What `leyline local` commands and the supervisor say to each other: over the control socket, one JSON request in one
//! line (with open files beside it where a command is to be run on them), then one JSON reply in one line.

use std::{
    collections::BTreeMap,
    io::{self, IoSlice, IoSliceMut, Read, Write},
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
    os::unix::net::UnixStream,
    path::PathBuf,
};

use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::parts::{Action, PartState};

/// A request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "kebab-case")]
pub enum Request {
    /// Everything about the mesh: a [`Status`].
    Status,
    /// Edit labels of a namespace (`NAMESPACE`) or a pod (`NAMESPACE/POD`); `None` takes one away.
    Label {
        /// Whose.
        target: String,
        /// The edits.
        labels: BTreeMap<String, Option<String>>,
    },
    /// Run a command in a pod or on a node. Three open files travel with it: its standard input, output and error. The
    /// reply, an exit code, comes when it has ended; closing the connection ends it.
    Exec {
        /// `NAMESPACE/POD`, the name of a node, or `control`.
        target: String,
        /// Which container; the first when absent.
        container: Option<String>,
        /// Program and arguments.
        command: Vec<String>,
        /// Whether the standard input is a terminal of its own.
        terminal: bool,
        /// `TERM`, when there is a terminal.
        term: Option<String>,
    },
    /// Carry a TCP connection into the mesh. One open file travels with it: the connection. The reply comes when both
    /// sides have ended.
    Forward {
        /// `NAMESPACE/NAME` of a service or a pod.
        target: String,
        /// The port there.
        port: u16,
        /// The pod (`NAMESPACE/POD`) that connects; the first node when absent.
        from: Option<String>,
    },
    /// Do something to a part.
    Part {
        /// Its name.
        part: String,
        /// What.
        action: Action,
    },
    /// Send a request to a part's admin endpoint.
    Admin {
        /// Its name.
        part: String,
        /// Which endpoint: `admin`, `metrics` or `ready`.
        endpoint: String,
        /// `GET` or `POST`.
        method: String,
        /// The path.
        path: String,
    },
    /// Stop the mesh. The reply comes before the end; the connection closes with it.
    Down,
}

/// A reply: the result, or what went wrong as a sentence.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reply {
    /// It was done; the value depends on the request.
    Ok(Value),
    /// It was not.
    Error(String),
}

/// Everything about a mesh.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Status {
    /// Its name.
    pub name: String,
    /// The user's folder.
    pub folder: PathBuf,
    /// Whether it runs in a user namespace.
    pub rootless: bool,
    /// The process behind it all.
    pub supervisor: SupervisorStatus,
    /// The parts, by name.
    pub parts: BTreeMap<String, PartState>,
    /// The nodes, by name.
    pub nodes: BTreeMap<String, NodeStatus>,
    /// The pods, by namespace and name.
    pub pods: Vec<PodStatus>,
    /// Virtual addresses, by service (`namespace/name`).
    pub services: BTreeMap<String, Vec<String>>,
    /// What in the folder cannot be used.
    pub problems: Vec<String>,
    /// What the control plane says of the user's objects; empty while it does not answer.
    pub objects: Vec<Value>,
    /// Why `objects` is empty.
    pub objects_error: Option<String>,
}

/// The supervisor.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct SupervisorStatus {
    /// Its process id as whoever asks sees it; killing it ends the mesh.
    pub host_pid: Option<i32>,
}

/// A node.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NodeStatus {
    /// Its addresses on the link, IPv4 first.
    pub addresses: Vec<String>,
    /// How many pods it has.
    pub pods: usize,
}

/// A pod.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PodStatus {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its unique id.
    pub uid: String,
    /// Its node.
    pub node: String,
    /// Its addresses, IPv4 first.
    pub ips: Vec<String>,
    /// `Pending`, `Running`, `Succeeded`, `Failed` or `Terminating`.
    pub phase: String,
    /// Whether it may be sent traffic.
    pub ready: bool,
    /// `yes`, `no`, or `pending`.
    pub mesh: String,
    /// How often its containers were started again.
    pub restarts: u32,
    /// Why it is not ready.
    pub reason: Option<String>,
    /// The deployment it belongs to.
    pub deployment: Option<String>,
    /// Its containers, the first being the default for `exec` and `logs`.
    pub containers: Vec<String>,
}

/// The longest request.
const LIMIT_BYTES: usize = 1 << 20;

/// Sends one line with open files beside it.
pub fn send_request(
    stream: &UnixStream,
    request: &Request,
    files: &[BorrowedFd<'_>],
) -> io::Result<()> {
    let mut line = serde_json::to_vec(request)?;
    line.push(b'\n');
    let raw: Vec<RawFd> = files.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let control = if raw.is_empty() {
        &rights[..0]
    } else {
        &rights[..]
    };
    let sent = sendmsg::<()>(
        stream.as_raw_fd(),
        &[IoSlice::new(&line)],
        control,
        MsgFlags::empty(),
        None,
    )?;
    (&mut &*stream).write_all(&line[sent..])
}

/// Receives one request with the files beside it.
pub fn receive_request(stream: &UnixStream) -> io::Result<(Request, Vec<OwnedFd>)> {
    let mut line = Vec::new();
    let mut files = Vec::new();
    let mut buffer = vec![0; 16 << 10];
    while !line.ends_with(b"\n") {
        let (length, mut received) = receive_some(stream, &mut buffer)?;
        files.append(&mut received);
        if length == 0 || line.len() > LIMIT_BYTES {
            return Err(io::ErrorKind::InvalidData.into());
        }
        line.extend_from_slice(&buffer[..length]);
    }
    Ok((serde_json::from_slice(&line)?, files))
}

fn receive_some(stream: &UnixStream, buffer: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
    let mut space = nix::cmsg_space!([RawFd; 3]);
    let mut parts = [IoSliceMut::new(buffer)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let message = recvmsg::<()>(stream.as_raw_fd(), &mut parts, Some(&mut space), flags)?;
    let mut files = Vec::new();
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(received) = control {
            files.extend(received.into_iter().map(owned));
        }
    }
    Ok((message.bytes, files))
}

#[allow(
    unsafe_code,
    reason = "the kernel hands received files over as numbers"
)]
fn owned(fd: RawFd) -> OwnedFd {
    // SAFETY: the kernel has just made this descriptor for us; nobody else knows its number.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// Sends one line.
pub fn send_reply(mut stream: &UnixStream, reply: &Reply) -> io::Result<()> {
    let mut line = serde_json::to_vec(reply)?;
    line.push(b'\n');
    stream.write_all(&line)
}

/// Receives one line. Blocks until the supervisor has answered.
pub fn receive_reply(mut stream: &UnixStream) -> io::Result<Reply> {
    let mut text = Vec::new();
    let mut buffer = vec![0; 64 << 10];
    while !text.ends_with(b"\n") {
        match stream.read(&mut buffer)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            length => text.extend_from_slice(&buffer[..length]),
        }
    }
    Ok(serde_json::from_slice(&text)?)
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn requests_travel_with_their_files() {
        let (here, there) = UnixStream::pair().unwrap();
        let request = Request::Exec {
            target: "a/p".to_owned(),
            container: None,
            command: vec!["x".repeat(40_000)],
            terminal: false,
            term: None,
        };
        let (reader, mut writer) = io::pipe().unwrap();
        let sent = request.clone();
        let sender = std::thread::spawn(move || send_request(&here, &sent, &[reader.as_fd()]));
        let (received, mut files) = receive_request(&there).unwrap();
        sender.join().unwrap().unwrap();
        assert_eq!(received, request);
        writer.write_all(b"hello").unwrap();
        drop(writer);
        let mut text = String::new();
        std::fs::File::from(files.remove(0))
            .read_to_string(&mut text)
            .unwrap();
        assert_eq!(text, "hello");
    }
}
