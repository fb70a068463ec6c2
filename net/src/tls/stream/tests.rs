use std::sync::Arc;

use rustls_pki_types::ServerName;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
use tokio_rustls::{TlsAcceptor, TlsConnector, client, server};

use super::*;
use crate::{
    testing::TestCa,
    tls::{Policy, WorkloadCertificate, agree},
};

fn certificate() -> Arc<WorkloadCertificate> {
    let ca = TestCa::new("cluster.local", &Policy::default());
    ca.certificate(&ca.identity("a", "both"))
}

fn client_config(certificate: &WorkloadCertificate) -> Arc<rustls::ClientConfig> {
    certificate.client_config(&Arc::from([certificate.identity().clone()]))
}

fn nobody() -> ServerName<'static> {
    ServerName::IpAddress(std::net::Ipv4Addr::UNSPECIFIED.into())
}

/// Ours at both ends: who dialled, who accepted.
async fn ours() -> (RecordStream<DuplexStream>, RecordStream<DuplexStream>) {
    let certificate = certificate();
    let (a, b) = duplex(1 << 20);
    let client = agree::client(a, client_config(&certificate), nobody());
    let server = agree::server(b, certificate.server_config());
    let (client, server) = tokio::join!(client, server);
    (client.unwrap().0, server.unwrap().0)
}

/// rustls' own records at the dialling end.
async fn library_dials() -> (client::TlsStream<DuplexStream>, RecordStream<DuplexStream>) {
    let certificate = certificate();
    let (a, b) = duplex(1 << 16);
    let client = TlsConnector::from(client_config(&certificate)).connect(nobody(), a);
    let server = agree::server(b, certificate.server_config());
    let (client, server) = tokio::join!(client, server);
    (client.unwrap(), server.unwrap().0)
}

/// rustls' own records at the accepting end.
async fn library_accepts() -> (RecordStream<DuplexStream>, server::TlsStream<DuplexStream>) {
    let certificate = certificate();
    let (a, b) = duplex(1 << 16);
    let client = agree::client(a, client_config(&certificate), nobody());
    let server = TlsAcceptor::from(certificate.server_config()).accept(b);
    let (client, server) = tokio::join!(client, server);
    (client.unwrap().0, server.unwrap())
}

fn bytes(length: usize) -> Vec<u8> {
    (0..length)
        .map(|i| u8::try_from(i % 251).unwrap())
        .collect()
}

/// Sends `content` in pieces of all sizes, and the end.
async fn send(mut to: impl AsyncWrite + Unpin, content: &[u8]) {
    let mut left = content;
    let sizes = [1, 9, 1000, MAX_PLAIN - 1, MAX_PLAIN, MAX_PLAIN + 1, 300_000];
    for size in sizes.into_iter().cycle() {
        if left.is_empty() {
            break;
        }
        let (now, later) = left.split_at(size.min(left.len()));
        to.write_all(now).await.unwrap();
        left = later;
    }
    to.shutdown().await.unwrap();
}

async fn exchange(one: impl AsyncRead + AsyncWrite, other: impl AsyncRead + AsyncWrite) {
    let content = bytes(2_000_000);
    let (mut from_one, to_one) = tokio::io::split(one);
    let (mut from_other, to_other) = tokio::io::split(other);
    let (mut there, mut back) = (Vec::new(), Vec::new());
    let (_, _, got, answered) = tokio::join!(
        send(to_one, &content),
        send(to_other, &content),
        from_other.read_to_end(&mut there),
        from_one.read_to_end(&mut back),
    );
    got.and(answered).unwrap();
    assert!(there == content && back == content);
}

#[tokio::test]
async fn bytes_pass_between_us_and_the_library_both_ways() {
    let (client, server) = library_dials().await;
    exchange(client, server).await;
    let (client, server) = library_accepts().await;
    exchange(client, server).await;
    let (client, server) = ours().await;
    exchange(client, server).await;
}

#[tokio::test]
async fn keys_that_the_peer_renews_are_followed_and_answered() {
    let (mut client, mut server) = library_dials().await;
    let mut got = [0; 4];
    for round in 0..100_u8 {
        client.get_mut().1.refresh_traffic_keys().unwrap();
        client.write_all(&[round; 4]).await.unwrap();
        server.read_exact(&mut got).await.unwrap();
        assert_eq!(got, [round; 4]);
        server.write_all(&[round; 4]).await.unwrap();
        server.flush().await.unwrap();
        client.read_exact(&mut got).await.unwrap();
    }
}

#[tokio::test]
async fn keys_are_renewed_before_they_are_worn_out() {
    let (mut client, mut server) = library_accepts().await;
    client.outbound.limit = 3;
    let mut got = [0; 4];
    for round in 0..50_u8 {
        client.write_all(&[round; 4]).await.unwrap();
        client.flush().await.unwrap();
        server.read_exact(&mut got).await.unwrap();
        assert_eq!(got, [round; 4]);
        assert!(client.outbound.key.used() <= 4);
    }
}

#[tokio::test]
async fn a_connection_that_is_cut_does_not_look_complete() {
    let (client, mut server) = ours().await;
    drop(client);
    let error = server.read_u8().await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
}

fn reason(error: &io::Error) -> &Error {
    error.get_ref().unwrap().downcast_ref().unwrap()
}

#[tokio::test]
async fn a_changed_record_fails_and_its_sender_is_told() {
    let (mut client, mut server) = ours().await;
    client.outbound.push(b"before").unwrap();
    client.outbound.seal(ContentType::ApplicationData).unwrap();
    let next = client.outbound.buffer.len();
    client.outbound.push(b"changed").unwrap();
    client.outbound.seal(ContentType::ApplicationData).unwrap();
    client.outbound.buffer[next + HEADER] ^= 1;
    client.flush().await.unwrap();
    let mut got = [0; 6];
    server.read_exact(&mut got).await.unwrap();
    assert_eq!(&got, b"before");
    let error = server.read_u8().await.unwrap_err();
    assert_eq!(reason(&error), &Error::DecryptError);
    let again = server.read_u8().await.unwrap_err();
    assert_eq!(reason(&again), &Error::DecryptError);
    let told = client.read_u8().await.unwrap_err();
    let alert = Error::AlertReceived(AlertDescription::BadRecordMac);
    assert_eq!(reason(&told), &alert);
}

#[tokio::test]
async fn records_without_content_are_bounded() {
    let (mut client, mut server) = ours().await;
    let mut got = [0; 1];
    for _ in 0..QUIET_RECORDS {
        let empty = client.outbound.message(ContentType::ApplicationData, &[]);
        empty.unwrap();
    }
    client.write_all(b"x").await.unwrap();
    client.flush().await.unwrap();
    server.read_exact(&mut got).await.unwrap();
    for _ in 0..=QUIET_RECORDS {
        let warning = [WARNING, AlertDescription::UserCanceled.into()];
        client
            .outbound
            .message(ContentType::Alert, &warning)
            .unwrap();
    }
    client.flush().await.unwrap();
    let error = server.read_u8().await.unwrap_err();
    assert!(
        matches!(reason(&error), Error::PeerMisbehaved(_)),
        "{error}"
    );
}

#[tokio::test]
async fn tickets_are_skipped_also_in_parts_and_other_messages_refused() {
    let (mut client, mut server) = ours().await;
    let handshake = |server: &mut RecordStream<_>, message: &[u8]| {
        let sent = server.outbound.message(ContentType::Handshake, message);
        sent.unwrap();
    };
    handshake(&mut server, &[4, 0, 0, 10, 1, 2, 3]);
    handshake(&mut server, &[4, 5, 6, 7, 8, 9, 10]);
    server.write_all(b"x").await.unwrap();
    server.flush().await.unwrap();
    assert_eq!(client.read_u8().await.unwrap(), b'x');
    // CertificateRequest: nobody asks for proof after the handshake.
    handshake(&mut server, &[13, 0, 0, 0]);
    server.flush().await.unwrap();
    let error = client.read_u8().await.unwrap_err();
    let refused = matches!(reason(&error), Error::InappropriateHandshakeMessage { .. });
    assert!(refused, "{error}");
}

#[tokio::test]
async fn a_silent_connection_holds_no_buffer() {
    let (mut client, mut server) = ours().await;
    let content = bytes(500_000);
    let mut got = vec![0; content.len()];
    let write = async {
        client.write_all(&content).await.unwrap();
        client.flush().await.unwrap();
    };
    let (read, ()) = tokio::join!(server.read_exact(&mut got), write);
    read.unwrap();
    let nothing = std::future::poll_fn(|cx| {
        let mut buf = [0; 8];
        let read = Pin::new(&mut server).poll_read(cx, &mut ReadBuf::new(&mut buf));
        Poll::Ready(read.is_pending())
    });
    assert!(nothing.await);
    assert_eq!(client.outbound.buffer.capacity(), 0);
    assert_eq!(server.inbound.buffer.capacity(), 0);
}
