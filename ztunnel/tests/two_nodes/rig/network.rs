//! Two pods on one link, each in a nameless namespace of its own: nothing is left when the test ends, however it ends.

use std::{
    net::IpAddr,
    os::fd::{AsFd, AsRawFd},
    process::{Command, Stdio},
    thread,
};

use net::netns::Netns;
use nix::sched::{CloneFlags, unshare};

/// A pod's namespace with its address on the link.
pub(crate) struct Pod {
    pub(crate) name: &'static str,
    pub(crate) netns: Netns,
    pub(crate) v4: IpAddr,
    pub(crate) v6: IpAddr,
}

/// Makes namespaces `a` and `b` with a link between them, or says why it cannot: then the test is skipped.
pub(crate) fn two_pods() -> Result<[Pod; 2], String> {
    let a = pod("a", "10.210.0.1", "fd00:210::1")?;
    let b = pod("b", "10.210.0.2", "fd00:210::2")?;
    let peer = format!(
        "/proc/{}/fd/{}",
        std::process::id(),
        b.netns.as_fd().as_raw_fd()
    );
    in_pod(
        &a,
        &[
            "ip", "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", &peer,
        ],
    )?;
    for pod in [&a, &b] {
        configure(pod)?;
    }
    Ok([a, b])
}

/// Namespaces with nothing but a loopback, or why there are none.
pub(crate) fn bare_pods(count: usize) -> Result<Vec<Netns>, String> {
    (0..count)
        .map(|_| {
            let netns = Netns::create().map_err(|e| e.to_string())?;
            run_in(&netns, &["ip", "link", "set", "lo", "up"])?;
            Ok(netns)
        })
        .collect()
}

fn pod(name: &'static str, v4: &str, v6: &str) -> Result<Pod, String> {
    let made = thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNET).map_err(|e| format!("unshare: {e}"))?;
        net::netns::forget_current();
        Netns::open("/proc/thread-self/ns/net").map_err(|e| e.to_string())
    });
    let netns = made.join().map_err(|_| "the thread panicked")??;
    Ok(Pod {
        name,
        netns,
        v4: v4.parse().expect("an address"),
        v6: v6.parse().expect("an address"),
    })
}

fn configure(pod: &Pod) -> Result<(), String> {
    let v4 = format!("{}/24", pod.v4);
    let v6 = format!("{}/64", pod.v6);
    for command in [
        &["ip", "link", "set", "lo", "up"][..],
        &["ip", "link", "set", "eth0", "up"],
        &["ip", "address", "add", &v4, "dev", "eth0"],
        &["ip", "address", "add", &v6, "dev", "eth0", "nodad"],
        // Addresses that are nobody's still leave the pod, as they would through a default gateway.
        &["ip", "route", "add", "10.96.0.0/16", "dev", "eth0"],
        // Replies to a foreign source come back to the tunnel's socket.
        &[
            "ip",
            "rule",
            "add",
            "fwmark",
            "0x111/0xfff",
            "pref",
            "32764",
            "lookup",
            "100",
        ],
        &[
            "ip",
            "route",
            "add",
            "local",
            "0.0.0.0/0",
            "dev",
            "lo",
            "table",
            "100",
        ],
        &[
            "ip",
            "-6",
            "rule",
            "add",
            "fwmark",
            "0x111/0xfff",
            "pref",
            "32764",
            "lookup",
            "100",
        ],
        &[
            "ip", "-6", "route", "add", "local", "::/0", "dev", "lo", "table", "100",
        ],
        &["nft", RULES],
    ] {
        in_pod(pod, command)?;
    }
    Ok(())
}

/// The redirection of an enrolled pod, as short as these tests need it.
const RULES: &str = "
table inet capture {
  chain prerouting-mangle {
    type filter hook prerouting priority -150
    meta mark & 0xfff == 0x539 ct mark set 0x111
  }
  chain output-mangle {
    type route hook output priority -150
    ct mark & 0xfff == 0x111 meta mark set ct mark
  }
  chain prerouting {
    type nat hook prerouting priority -100
    meta l4proto tcp tcp dport != 15008 meta mark & 0xfff != 0x539 fib daddr type local redirect to :15006
  }
  chain output {
    type nat hook output priority -100
    meta l4proto tcp meta mark & 0xfff == 0x111 accept
    oifname lo accept
    meta l4proto udp udp dport 53 meta mark & 0xfff != 0x539 redirect to :15053
    tcp dport 53 meta mark & 0xfff != 0x539 redirect to :15053
    meta l4proto tcp meta mark & 0xfff != 0x539 redirect to :15001
  }
}";

/// Runs a program inside the pod's namespace.
pub(crate) fn in_pod(pod: &Pod, command: &[&str]) -> Result<(), String> {
    run_in(&pod.netns, command)
}

fn run_in(netns: &Netns, command: &[&str]) -> Result<(), String> {
    let netns = netns.clone();
    let command: Vec<String> = command.iter().map(|word| (*word).to_owned()).collect();
    let run = thread::spawn(move || {
        netns.enter().map_err(|e| e.to_string())?;
        let output = Command::new(&command[0])
            .args(&command[1..])
            .stdin(Stdio::null())
            .output()
            .map_err(|e| format!("{}: {e}", command[0]))?;
        match output.status.success() {
            true => Ok(()),
            false => Err(format!(
                "{}: {}",
                command.join(" "),
                String::from_utf8_lossy(&output.stderr)
            )),
        }
    });
    run.join().map_err(|_| "the thread panicked".to_owned())?
}
