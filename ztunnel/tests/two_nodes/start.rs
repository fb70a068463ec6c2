//! A tunnel that cannot serve pods yet stays out of their way, and says what it waits for.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use futures_util::FutureExt;
use mesh::identity::Identity;
use net::{
    ca::{IssueError, Issuer, Issuing},
    mesh_state::MeshState,
    testing::TestCa,
    tls::Policy,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use crate::{
    rig::{eventually, node::Begun, soon},
    rig_or_skip,
};

/// The readiness endpoint's whole answer; empty where nobody listens yet.
async fn readiness(at: SocketAddr) -> String {
    let Ok(mut stream) = TcpStream::connect(at).await else {
        return String::new();
    };
    let request = "GET /healthz/ready HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";
    stream.write_all(request.as_bytes()).await.expect("open");
    let mut answer = String::new();
    let read = stream.read_to_string(&mut answer).await;
    read.map(|_| answer).unwrap_or_default()
}

async fn says(begun: &Begun, expected: &str) {
    eventually(expected, async || {
        readiness(begun.readiness).await.contains(expected)
    })
    .await;
}

fn ca() -> Arc<TestCa> {
    Arc::new(TestCa::new("cluster.local", &Policy::default()))
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_control_plane_it_takes_no_pods_and_says_so() {
    // Nobody listens there.
    let xds = [("XDS_ADDRESS", "http://127.0.0.1:1")];
    let begun = Begun::new("node-a", ca(), MeshState::new(), &xds);
    says(&begun, "500 Internal Server Error").await;
    says(&begun, "pending: state manager, workload proxy manager\n").await;
    says(&begun, "state manager: no control plane: ").await;
    says(&begun, "Connection refused").await;
    says(&begun, "workload proxy manager: waits for the mesh state\n").await;
    let asked = begun.listener.accept().now_or_never();
    assert!(asked.is_none(), "it asked the agent for pods");
}

/// A CA that can be out of reach.
struct Remote {
    ca: Arc<TestCa>,
    gone: AtomicBool,
}

impl Issuer for Remote {
    fn issue(&self, identity: Identity) -> Issuing {
        match self.gone.load(Ordering::SeqCst) {
            true => Box::pin(async {
                let after = Duration::from_millis(1);
                Err(Arc::new(IssueError::Late { after }))
            }),
            false => self.ca.issue(identity),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn without_certificates_for_its_node_it_takes_no_pods_until_it_has_them() {
    let rig = rig_or_skip!();
    let remote = Arc::new(Remote {
        ca: ca(),
        gone: AtomicBool::new(true),
    });
    let state = MeshState::new();
    state.publish(rig.known());
    let begun = Begun::new("node-a", remote.clone(), state, &[]);
    says(&begun, "workload proxy manager: the CA does not answer: ").await;
    let asked = begun.listener.accept().now_or_never();
    assert!(asked.is_none(), "it asked the agent for pods");
    remote.gone.store(false, Ordering::SeqCst);
    let node = begun.enrol(&rig.a).await;
    let asked_before = remote.ca.issued();
    assert_eq!(asked_before, 1, "one account is enrolled on this node");
    eventually("ready", async || {
        readiness(node.readiness).await.contains("200 OK")
    })
    .await;
    soon(node.stop()).await;
    assert_eq!(remote.ca.issued(), asked_before);
}
