use tokio::io::duplex;

use super::*;

/// What comes of these bytes, and what the client is sent.
async fn served(bytes: &[u8]) -> (Result<Destination, RequestError>, Vec<u8>) {
    let (mut ours, mut theirs) = duplex(1024);
    theirs.write_all(bytes).await.unwrap();
    theirs.shutdown().await.unwrap();
    let requested = request(&mut ours).await;
    drop(ours);
    let mut sent = Vec::new();
    theirs.read_to_end(&mut sent).await.unwrap();
    (requested, sent)
}

const GREETING: [u8; 3] = [5, 1, 0];

async fn asked(request: &[u8]) -> Destination {
    let (requested, sent) = served(&[&GREETING, request].concat()).await;
    assert_eq!(sent, [5, 0], "nothing is answered before it is known");
    requested.unwrap()
}

#[tokio::test]
async fn addresses_and_names_are_read() {
    let v4 = asked(&[5, 1, 0, 1, 10, 0, 0, 1, 0, 80]).await;
    assert_eq!(v4, Destination::Address("10.0.0.1:80".parse().unwrap()));
    let mut v6 = vec![5, 1, 0, 4];
    v6.extend("fd00::1".parse::<Ipv6Addr>().unwrap().octets());
    v6.extend([1, 187]);
    let v6 = asked(&v6).await;
    assert_eq!(v6, Destination::Address("[fd00::1]:443".parse().unwrap()));
    let name = asked(b"\x05\x01\x00\x03\x05Web.A\x00\x50").await;
    assert_eq!(name, Destination::Name("web.a".into(), 80));
    let written = asked(b"\x05\x01\x00\x03\x08127.0.0.\x00\x50").await;
    assert_eq!(written, Destination::Name("127.0.0".into(), 80));
    let written = asked(b"\x05\x01\x00\x03\x0910.0.0.12\x00\x50").await;
    assert_eq!(
        written,
        Destination::Address("10.0.0.12:80".parse().unwrap())
    );
}

#[tokio::test]
async fn what_is_not_served_is_said() {
    let told = async |request: &[u8]| served(&[&GREETING, request].concat()).await.1;
    let bind = [5, 2, 0, 1, 10, 0, 0, 1, 0, 80];
    assert_eq!(told(&bind).await[..4], [5, 0, 5, 7]);
    let strange = [5, 1, 0, 9, 0];
    assert_eq!(told(&strange).await[..4], [5, 0, 5, 8]);
    let empty = [5, 1, 0, 3, 0, 0, 80];
    assert_eq!(told(&empty).await[..4], [5, 0, 5, 1]);
    let (error, sent) = served(&[5, 1, 2]).await;
    assert!(matches!(error, Err(RequestError::Authentication)));
    assert_eq!(sent, [5, 0xff]);
    let (error, sent) = served(&[4, 1, 0, 80, 10, 0, 0, 1, 0]).await;
    assert!(matches!(error, Err(RequestError::Version(4))));
    assert!(sent.is_empty());
    let (error, _) = served(&[5, 1]).await;
    assert!(matches!(error, Err(RequestError::Io(_))));
}

#[tokio::test]
async fn a_reply_has_the_address_and_the_code() {
    let (mut ours, mut theirs) = duplex(64);
    let from = Some("10.0.0.1:8080".parse().unwrap());
    reply(&mut ours, Reply::Succeeded, from).await.unwrap();
    drop(ours);
    let mut sent = Vec::new();
    theirs.read_to_end(&mut sent).await.unwrap();
    assert_eq!(sent, [5, 0, 0, 1, 10, 0, 0, 1, 0x1f, 0x90]);
    for (reason, expected) in [
        (EndReason::ConnectRefused, Reply::ConnectionRefused),
        (EndReason::PeerRefused(401), Reply::NotAllowed),
        (EndReason::PeerRefused(503), Reply::GeneralFailure),
        (
            EndReason::Refused(Reason::NoHealthyUpstream),
            Reply::HostUnreachable,
        ),
        (EndReason::Refused(Reason::PolicyUnknown), Reply::NotAllowed),
        (EndReason::TooMany, Reply::GeneralFailure),
        (EndReason::ConnectTimedOut, Reply::HostUnreachable),
    ] {
        assert_eq!(Reply::from(reason), expected, "{reason:?}");
    }
}
