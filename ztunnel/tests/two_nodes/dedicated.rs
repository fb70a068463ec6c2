//! A tunnel of one workload, inside that workload's own namespace, with no agent.

use std::{collections::HashMap, net::SocketAddr};

use net::{mesh_state::MeshState, socket::SourceAddress};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    runtime::{Builder, Runtime},
};
use ztunnel::{Config, Tunnel};

use crate::{
    rig::{APP_PORT, Rig, application, connect, eventually, listen, network::Pod, passes, soon},
    rig_or_skip,
    telemetry::counts,
};

/// Takes the place of node `a`'s tunnel.
async fn dedicated(rig: Rig) -> (Rig, Runtime) {
    let (state, issuer) = (MeshState::new(), rig.ca.clone());
    state.publish(rig.known());
    let settings: HashMap<&str, &str> = [
        ("PROXY_MODE", "dedicated"),
        ("PROXY_WORKLOAD_INFO", "ns/a/sa-a"),
        // The rig's redirection lets the mark pass.
        ("PACKET_MARK", "1337"),
        ("XDS_ADDRESS", ""),
        ("FAKE_CA", "true"),
    ]
    .into();
    let lookup = |name: &str| settings.get(name).map(|it| (*it).to_owned());
    let config = Config::from_lookup(&lookup).expect("settings");
    let netns = rig.a.netns.clone();
    let rig = rig.without_node_a().await;
    let runtime = Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .on_thread_start(move || netns.enter().expect("the pod's namespace"))
        .build()
        .expect("a runtime");
    runtime.spawn(async move {
        let tunnel = Tunnel::new(config).with_issuer(issuer).with_state(state);
        let never = std::future::pending();
        tunnel.run_until(never).await.expect("the tunnel runs");
    });
    // Whoever answers that may not listen for connections yet.
    eventually("it is ready", async || is_ready(&rig.a).await).await;
    (rig, runtime)
}

/// What the readiness port inside the pod says; not yet, where nobody listens there.
async fn is_ready(pod: &Pod) -> bool {
    let readiness = "127.0.0.1:15021".parse().unwrap();
    let sockets = application(pod);
    let Ok(mut stream) = sockets.connect(readiness, SourceAddress::Own).await else {
        return false;
    };
    let request = b"GET /healthz/ready HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";
    let mut answer = String::new();
    let asked = stream.write_all(request).await.is_ok();
    asked && stream.read_to_string(&mut answer).await.is_ok() && answer.contains(" 200 OK")
}

#[tokio::test(flavor = "multi_thread")]
async fn one_workload_has_a_tunnel_of_its_own_in_both_directions() {
    let (rig, runtime) = dedicated(rig_or_skip!()).await;
    let (mut client, mut server) = rig.pair().await;
    passes(&mut client, &mut server, b"there").await;
    passes(&mut server, &mut client, b"back").await;
    let labels = [
        "source_principal=\"spiffe://cluster.local/ns/ns/sa/sa-a\"",
        "connection_security_policy=\"mutual_tls\"",
        "reporter=\"destination\"",
    ];
    let opened = "istio_tcp_connections_opened_total";
    counts(rig.node_b.stats, opened, &labels, 1).await;
    let to = SocketAddr::new(rig.a.v4, APP_PORT);
    let listener = listen(&rig.a, to);
    let (mut client, (mut server, _)) = soon(async {
        tokio::join!(connect(&rig.b, to), async {
            listener.accept().await.expect("accept")
        })
    })
    .await;
    passes(&mut client, &mut server, b"the other way").await;
    let labels = [
        "destination_principal=\"spiffe://cluster.local/ns/ns/sa/sa-a\"",
        "connection_security_policy=\"mutual_tls\"",
        "reporter=\"source\"",
    ];
    counts(rig.node_b.stats, opened, &labels, 1).await;
    runtime.shutdown_background();
}
