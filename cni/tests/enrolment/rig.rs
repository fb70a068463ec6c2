//! A node and a pod, without a mesh.

use std::{
    io::{self, Read},
    net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4, SocketAddrV6},
    os::fd::{AsFd, AsRawFd},
    path::PathBuf,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use net::netns::Netns;
use nix::sched::{CloneFlags, unshare};
use tokio::net::{TcpListener, TcpSocket, TcpStream};

pub(crate) const NODE_V4: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 1);
pub(crate) const POD_V4: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 2);
pub(crate) const NODE_V6: &str = "fd09::1";
pub(crate) const POD_V6: &str = "fd09::2";

/// A deadline for whatever a test waits for.
pub(crate) const PATIENCE: Duration = Duration::from_secs(10);

pub(crate) struct Rig {
    pub(crate) node: Netns,
    pub(crate) pod: Netns,
}

impl Rig {
    /// `None`, with the reason printed, where this is not permitted or a tool is missing.
    pub(crate) fn new() -> Option<Rig> {
        match Self::build() {
            Ok(rig) => Some(rig),
            Err(reason) => {
                println!("skipped: {reason}");
                None
            }
        }
    }

    fn build() -> Result<Rig, String> {
        cni::apply::Nft::find().map_err(|error| error.to_string())?;
        let rig = Rig {
            node: namespace()?,
            pod: namespace()?,
        };
        let pod = path(&rig.pod);
        let commands: [(&Netns, String); 8] = [
            (
                &rig.node,
                format!(
                    "ip link add to-pod type veth peer name eth0 netns {}",
                    pod.display()
                ),
            ),
            (&rig.node, "ip link set lo up".into()),
            (&rig.node, format!("ip addr add {NODE_V4}/24 dev to-pod")),
            (
                &rig.node,
                format!("ip addr add {NODE_V6}/64 dev to-pod nodad"),
            ),
            (&rig.node, "ip link set to-pod up".into()),
            (&rig.pod, "ip link set lo up".into()),
            (&rig.pod, format!("ip addr add {POD_V4}/24 dev eth0")),
            (&rig.pod, format!("ip addr add {POD_V6}/64 dev eth0 nodad")),
        ];
        for (netns, command) in commands {
            run(netns, &command)?;
        }
        run(&rig.pod, "ip link set eth0 up")?;
        run(&rig.pod, &format!("ip route add default via {NODE_V4}"))?;
        run(&rig.pod, &format!("ip -6 route add default via {NODE_V6}"))?;
        rig.settle()?;
        Ok(rig)
    }

    /// The kernel tells IPv6 of a link's carrier up to a second late, which changes routes that tests compare.
    fn settle(&self) -> Result<(), String> {
        let began = Instant::now();
        loop {
            let routes = run(&self.pod, "ip -6 route show table all")?;
            let addresses = run(&self.pod, "ip -6 addr show dev eth0")?;
            if routes.contains("multicast ff00::/8 dev eth0") && !addresses.contains("tentative") {
                return Ok(());
            }
            if began.elapsed() > PATIENCE {
                return Err(format!("the link does not settle: {routes} {addresses}"));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    pub(crate) fn pod_path(&self) -> PathBuf {
        path(&self.pod)
    }
}

/// A path that leads to the namespace as long as the rig lives.
pub(crate) fn path(netns: &Netns) -> PathBuf {
    format!(
        "/proc/{}/fd/{}",
        std::process::id(),
        netns.as_fd().as_raw_fd()
    )
    .into()
}

/// One that nothing leads to, with its loopback device up.
pub(crate) fn bare_namespace() -> Result<Netns, String> {
    let netns = namespace()?;
    run(&netns, "ip link set lo up")?;
    Ok(netns)
}

/// Made by a thread of its own, which takes its membership with it when it ends.
fn namespace() -> Result<Netns, String> {
    let made = std::thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNET)
            .map_err(|error| format!("unshare a network namespace: {error}"))?;
        Netns::open("/proc/thread-self/ns/net").map_err(|error| error.to_string())
    });
    made.join().expect("the thread does not panic")
}

/// Runs a command in the namespace; answers what it printed.
pub(crate) fn run(netns: &Netns, command: &str) -> Result<String, String> {
    let mut words = command.split(' ');
    let program = words.next().unwrap_or_default();
    let mut prepared = Command::new(program);
    prepared
        .args(words)
        .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin");
    let output = netns
        .run(|| prepared.output())
        .expect("enter")
        .map_err(|error| format!("{program}: {error}"))?;
    if output.status.success() {
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    } else {
        Err(format!(
            "{command}: {}",
            String::from_utf8_lossy(&output.stderr)
        ))
    }
}

pub(crate) fn run_with_input(netns: &Netns, command: &str, input: &str) {
    let mut words = command.split(' ');
    let mut prepared = Command::new(words.next().unwrap_or_default());
    prepared
        .args(words)
        .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin")
        .stdin(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = netns
        .run(|| prepared.spawn())
        .expect("enter")
        .expect("start");
    io::Write::write_all(&mut child.stdin.take().expect("a pipe"), input.as_bytes()).expect("feed");
    let mut complaint = String::new();
    child
        .stderr
        .take()
        .expect("a pipe")
        .read_to_string(&mut complaint)
        .expect("read");
    assert!(
        child.wait().expect("wait").success(),
        "{command}: {complaint}"
    );
}

/// Everything that enrolment may change in a namespace, as text.
pub(crate) fn picture(netns: &Netns) -> String {
    let commands = [
        "nft list ruleset",
        "ip rule",
        "ip -6 rule",
        "ip route show table all",
        "ip -6 route show table all",
        "sysctl net.ipv4.tcp_fwmark_accept",
    ];
    let answers = commands.map(|command| run(netns, command).unwrap_or_default());
    // The loopback device's own entries depend on timing.
    let kept = answers
        .iter()
        .flat_map(|text| text.lines())
        .filter(|line| !line.contains("fe80"));
    kept.collect::<Vec<_>>().join("\n")
}

pub(crate) fn listen(netns: &Netns, address: &str) -> TcpListener {
    let address: SocketAddr = address.parse().expect("an address");
    netns
        .run(|| {
            let socket = if address.is_ipv4() {
                TcpSocket::new_v4()
            } else {
                TcpSocket::new_v6()
            }?;
            socket.set_reuseaddr(true)?;
            socket.bind(address)?;
            socket.listen(1024)
        })
        .expect("enter")
        .expect("listen")
}

pub(crate) async fn dial(netns: &Netns, address: SocketAddr) -> io::Result<TcpStream> {
    let socket = netns
        .run(|| {
            if address.is_ipv4() {
                TcpSocket::new_v4()
            } else {
                TcpSocket::new_v6()
            }
        })
        .expect("enter")?;
    tokio::time::timeout(PATIENCE, socket.connect(address))
        .await
        .unwrap_or_else(|_| Err(io::Error::from(io::ErrorKind::TimedOut)))
}

pub(crate) fn v4(address: Ipv4Addr, port: u16) -> SocketAddr {
    SocketAddr::V4(SocketAddrV4::new(address, port))
}

pub(crate) fn v6(address: &str, port: u16) -> SocketAddr {
    SocketAddr::V6(SocketAddrV6::new(
        address.parse().expect("an address"),
        port,
        0,
        0,
    ))
}

/// Polls until `holds`, at most [`PATIENCE`].
pub(crate) async fn eventually(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let began = Instant::now();
    while !holds().await {
        assert!(began.elapsed() < PATIENCE, "still not: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

pub(crate) fn ip(address: &str) -> IpAddr {
    address.parse().expect("an address")
}

pub(crate) fn scratch() -> tempfile::TempDir {
    tempfile::tempdir().expect("a folder")
}

/// Tests on a rig of their own. Two workers, as the agent has.
macro_rules! on_a_rig {
    ($($name:ident => $body:ident),* $(,)?) => {
        $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
        async fn $name() {
            let Some(rig) = $crate::rig::Rig::new() else { return };
            let folder = $crate::rig::scratch();
            $body(&rig, folder.path()).await;
        })*
    };
}
pub(crate) use on_a_rig;
