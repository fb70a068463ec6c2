//! What never becomes a CONNECT is counted and logged all the same, for a reason of the closed list.

use std::sync::Arc;

use http::{Request, StatusCode};
use mesh::identity::Identity;
use net::{
    ca::{Certificates, CertificatesConfig},
    clock::SystemClock,
    drain, log,
    testing::{Output, TestCa, assert_line, encoded, tcp_pair},
    tls::{self, Policy},
};
use prometheus_client::registry::Registry;
use tokio::{io::AsyncWriteExt, net::TcpStream, task::JoinHandle};
use tracing::subscriber::{DefaultGuard, set_default};

use crate::{
    inbound,
    run::assemble,
    snapshot::Snapshots,
    testing::{DEADLINE, config, soon},
};

/// A waypoint with one client, which has proven itself; what the waypoint tells can be read.
struct Told {
    registry: Registry,
    output: Output,
    logs: log::Handle,
    serving: JoinHandle<()>,
    _drain: drain::Trigger,
    _lines: DefaultGuard,
}

impl Told {
    async fn by_one_client() -> (Self, tls::Stream<TcpStream>) {
        let output = Output::default();
        let (subscriber, logs) = log::subscriber(&log::Options::default(), output.clone()).unwrap();
        let lines = set_default(subscriber);
        let config = Arc::new(config(&[]));
        let ca = Arc::new(TestCa::new("cluster.local", &Policy::default()));
        let own = config.node.identity();
        let clock = Arc::new(SystemClock);
        let certificates = Certificates::new(ca.clone(), clock, CertificatesConfig::default());
        let snapshots = Snapshots::new(&config.node);
        let mut registry = Registry::default();
        let waypoint = assemble(config, snapshots, certificates, None, &mut registry);
        let (near, far) = tcp_pair().await;
        let (drain, watch) = drain::channel();
        let from = near.local_addr().unwrap();
        let serving = inbound::serve(waypoint, tls::Revocations::default(), far, from, watch);
        let told = Self {
            registry,
            output,
            logs,
            serving: tokio::spawn(serving),
            _drain: drain,
            _lines: lines,
        };
        (told, prove(&ca, own, near).await)
    }

    /// Waits for the end of the connection; one refusal was counted, and one line says what was wrong with it.
    async fn refused(self, error: &str) {
        soon(self.serving).await.unwrap();
        let counted = "leyline_connections_refused_total{reporter=\"waypoint\",\
            reason=\"invalid CONNECT request\",response_flags=\"CONNECT\"} 1";
        assert_line(&encoded(&self.registry), counted);
        self.logs.flush();
        let text = self.output.text();
        let lines: Vec<_> = text
            .lines()
            .filter(|it| it.contains("connection failed"))
            .collect();
        assert!(
            matches!(lines[..], [line] if line.contains(error)),
            "no {error:?} in {text}"
        );
    }
}

async fn prove(ca: &TestCa, server: Identity, tcp: TcpStream) -> tls::Stream<TcpStream> {
    let certificate = ca.certificate(&ca.identity("shop", "client"));
    let tls = certificate.client_config(&Arc::from([server]));
    tls::connect(tcp, tls, DEADLINE).await.unwrap().0
}

#[tokio::test]
async fn a_request_that_is_no_connect_is_told_with_what_it_was() {
    let (told, io) = Told::by_one_client().await;
    let (mut requests, connection) = h2::client::handshake(io).await.unwrap();
    let connection = tokio::spawn(connection);
    let request = Request::get("http://10.96.0.1/cart").body(()).unwrap();
    let (response, _) = requests.send_request(request, true).unwrap();
    assert_eq!(
        soon(response).await.unwrap().status(),
        StatusCode::BAD_REQUEST
    );
    connection.abort();
    drop(requests);
    told.refused("GET http://10.96.0.1/cart is no CONNECT to HOST:PORT")
        .await;
}

#[tokio::test]
async fn a_peer_that_breaks_http2_is_told_as_cut_off() {
    let (told, mut io) = Told::by_one_client().await;
    let request = b"GET / HTTP/1.1\r\nhost: web\r\n\r\n";
    io.write_all(request).await.unwrap();
    io.flush().await.unwrap();
    told.refused("cut off, as it breaks the rules of HTTP/2")
        .await;
}
