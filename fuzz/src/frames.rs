//! HTTP/2 frames of a peer at both ends of HBONE. Whatever comes, the connection ends when the peer is gone, and no
//! task is left.

use std::{
    future::{Future, pending},
    sync::Arc,
    time::{Duration, SystemTime},
};

use http::{HeaderMap, StatusCode};
use net::{
    hbone::{Client, Config, ConnectHead, ConnectRequest, serve},
    tls::PeerIdentity,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, copy, duplex, sink};

use crate::text::check_metadata;

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
const SETTINGS: &[u8] = b"\0\0\0\x04\0\0\0\0\0";
/// Beyond every deadline of a connection: the clock is a virtual one, and jumps when nothing else can happen.
const AN_HOUR: Duration = Duration::from_secs(3600);

fn block_on<F: Future>(future: F) -> F::Output {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .expect("a runtime needs no system resource but memory");
    let timed = async { tokio::time::timeout(AN_HOUR, future).await };
    runtime
        .block_on(timed)
        .expect("a connection whose peer is gone has ended")
}

fn peer() -> PeerIdentity {
    PeerIdentity {
        identity: "spiffe://cluster.local/ns/a/sa/b"
            .parse()
            .expect("an identity"),
        not_after: SystemTime::UNIX_EPOCH,
        chain: Arc::from([]),
    }
}

/// What a client sends after preface and SETTINGS.
pub fn hbone_server(bytes: &[u8]) {
    block_on(async {
        let (near, far) = duplex(64 << 10);
        let config = Config::default();
        let serving = serve(far, peer(), &config, pending(), handle, |_| {});
        let ((), _ended) = tokio::join!(say(near, PREFACE, bytes), serving);
    });
}

/// Says everything, hears everything, and is gone.
async fn say(io: DuplexStream, preface: &[u8], bytes: &[u8]) {
    let (mut read, mut write) = tokio::io::split(io);
    let speak = async {
        for part in [preface, bytes] {
            if write.write_all(part).await.is_err() {
                return;
            }
        }
        let _ = write.shutdown().await;
    };
    let mut nothing = sink();
    let hear = copy(&mut read, &mut nothing);
    let ((), _heard) = tokio::join!(speak, hear);
}

async fn handle(request: ConnectRequest) {
    check_metadata(request.headers());
    assert!(request.authority().port() > 0);
    if request.authority().port().is_multiple_of(2) {
        return request.refuse(StatusCode::FORBIDDEN);
    }
    if let Ok(stream) = request.accept(HeaderMap::new()) {
        let (mut send, mut recv) = stream.into_halves();
        let _ = copy(&mut recv, &mut send).await;
        let _ = send.shutdown().await;
    }
}

/// What a server sends after its SETTINGS, to a client with one stream.
pub fn hbone_client(bytes: &[u8]) {
    block_on(async {
        let (near, far) = duplex(64 << 10);
        let calling = async {
            let Ok((client, driver)) = Client::handshake(far, peer(), &Config::default()).await
            else {
                return;
            };
            let call = async {
                call(&client).await;
                drop(client);
            };
            tokio::join!(driver, call);
        };
        tokio::join!(say(near, SETTINGS, bytes), calling);
    });
}

async fn call(client: &Client) {
    let head = ConnectHead {
        authority: "10.0.0.1:80".parse().expect("an authority"),
        headers: HeaderMap::new(),
    };
    let Ok(mut tunnel) = client.connect(head, Duration::from_secs(5)).await else {
        return;
    };
    check_metadata(&tunnel.headers);
    let mut buffer = [0; 4096];
    let _ = tunnel.stream.write_all(b"hello").await;
    while tunnel.stream.read(&mut buffer).await.is_ok_and(|n| n > 0) {}
}
