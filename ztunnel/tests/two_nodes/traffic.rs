//! Bytes, ends and resets.

use std::net::SocketAddr;

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use crate::{
    rig::{APP_PORT, VIP, connect, connect_is_reset, is_reset, listen, passes, soon},
    rig_or_skip,
};

fn reset(stream: TcpStream) {
    stream.set_zero_linger().expect("SO_LINGER");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_application_sees_its_client_and_each_half_ends_by_itself() {
    let rig = rig_or_skip!();
    let (mut client, mut server) = rig.pair().await;
    let seen = server.peer_addr().unwrap();
    assert_eq!(seen.ip(), rig.a.v4);
    passes(&mut client, &mut server, b"ping").await;
    soon(client.shutdown()).await.unwrap();
    let mut rest = Vec::new();
    soon(server.read_to_end(&mut rest)).await.unwrap();
    assert!(rest.is_empty());
    passes(&mut server, &mut client, b"still here").await;
    drop(server);
    soon(client.read_to_end(&mut rest)).await.unwrap();
    assert!(rest.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_address_and_ipv6_lead_to_the_pod() {
    let rig = rig_or_skip!();
    let listener = listen(&rig.b, "[::]:8080".parse().unwrap());
    let v6 = SocketAddr::new(rig.b.v6, APP_PORT);
    for to in [VIP.parse().unwrap(), v6] {
        let (mut client, accepted) =
            soon(async { tokio::join!(connect(&rig.a, to), listener.accept()) }).await;
        let (mut server, _) = accepted.unwrap();
        passes(&mut client, &mut server, b"hello").await;
        passes(&mut server, &mut client, b"hello yourself").await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reset_is_told_as_a_reset_both_ways() {
    let rig = rig_or_skip!();
    {
        let (mut client, mut server) = rig.pair().await;
        passes(&mut client, &mut server, b"x").await;
        reset(server);
        is_reset(&mut client).await;
    }
    let (mut client, mut server) = rig.pair().await;
    passes(&mut client, &mut server, b"x").await;
    reset(client);
    is_reset(&mut server).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_port_where_nobody_listens_is_a_reset() {
    let rig = rig_or_skip!();
    connect_is_reset(&rig.a, rig.address()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn many_bytes_arrive_as_they_were_sent() {
    let rig = rig_or_skip!();
    let (mut client, mut server) = rig.pair().await;
    let bytes: Vec<u8> = (0..8_000_000_u32).map(|n| (n % 251) as u8).collect();
    let expected = bytes.clone();
    let sending = async move {
        client.write_all(&bytes).await.unwrap();
        client.shutdown().await.unwrap();
        client
    };
    let mut received = Vec::new();
    let (_client, read) =
        soon(async { tokio::join!(sending, server.read_to_end(&mut received)) }).await;
    read.unwrap();
    assert!(received == expected, "the bytes differ");
}
