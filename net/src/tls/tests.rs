use std::{net::Ipv4Addr, sync::Arc, time::Duration};

use mesh::identity::Identity;
use rcgen::ExtendedKeyUsagePurpose;
use rustls::{AlertDescription, ClientConfig};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

use super::*;
use crate::{
    clock::{SystemClock, TestClock},
    testing::{Leaf, TestCa, reckless_client, reckless_client_with},
};

const DEADLINE: Duration = Duration::from_secs(5);

async fn pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let dialled = TcpStream::connect(listener.local_addr().unwrap());
    let (dialled, accepted) = tokio::join!(dialled, listener.accept());
    (dialled.unwrap(), accepted.unwrap().0)
}

/// A handshake of `client` with `server`: what the server makes of it, and the client.
async fn handshake(
    server: &WorkloadCertificate,
    client: Arc<ClientConfig>,
) -> (
    Result<PeerIdentity, HandshakeError>,
    Result<PeerIdentity, HandshakeError>,
) {
    let (near, far) = pair().await;
    let dialling = async {
        let (mut stream, peer) = connect(near, client, DEADLINE).await?;
        // In TLS 1.3 the server's refusal comes with the first read.
        match stream.read_u8().await {
            Err(error) if error.get_ref().is_some() => Err(HandshakeError::from(error)),
            _ => Ok(peer),
        }
    };
    let accepting = async {
        let (mut stream, peer) = accept(far, server.server_config(), DEADLINE).await?;
        let _ = stream.shutdown().await;
        Ok(peer)
    };
    tokio::join!(accepting, dialling)
}

fn only(identity: &Identity) -> Arc<[Identity]> {
    Arc::from([identity.clone()])
}

#[tokio::test]
async fn both_ends_learn_each_others_identity() {
    let ca = TestCa::new("cluster.local", &Policy::default());
    let (a, b) = (ca.identity("a", "client"), ca.identity("b", "server"));
    let (client, server) = (ca.certificate(&a), ca.certificate(&b));
    let (seen, dialled) = handshake(&server, client.client_config(&only(&b))).await;
    assert_eq!(seen.unwrap().identity, a);
    assert_eq!(dialled.unwrap().identity, b);
}

#[tokio::test]
async fn configurations_are_made_once_per_generation_and_expected_set() {
    let ca = TestCa::new("cluster.local", &Policy::default());
    let id = ca.identity("a", "b");
    let (first, second) = (ca.certificate(&id), ca.certificate(&id));
    assert!(Arc::ptr_eq(&first.server_config(), &first.server_config()));
    let (one, other) = (
        first.client_config(&only(&id)),
        first.client_config(&only(&id)),
    );
    assert!(Arc::ptr_eq(&one, &other));
    let elsewhere = only(&ca.identity("a", "c"));
    assert!(!Arc::ptr_eq(&one, &first.client_config(&elsewhere)));
    assert!(second.generation() > first.generation());
}

#[tokio::test]
async fn a_server_that_is_not_expected_is_refused() {
    let ca = TestCa::new("cluster.local", &Policy::default());
    let (a, b) = (ca.identity("a", "client"), ca.identity("b", "server"));
    let (client, server) = (ca.certificate(&a), ca.certificate(&b));
    for expected in [only(&a), Arc::from([])] {
        let (_, dialled) = handshake(&server, client.client_config(&expected)).await;
        let error = dialled.unwrap_err();
        assert_eq!(error.blame(), Blame::Peer);
        let HandshakeError::PeerCertificate(PeerCertificateError::Unexpected { presented, .. }) =
            error
        else {
            panic!("{error:?}");
        };
        assert_eq!(presented, b);
    }
}

/// Presents `change`d leaves of `signer` to a server of `cluster.local` and answers why they are refused.
async fn refusal(signer: &str, change: impl Fn(&mut Leaf)) -> PeerCertificateError {
    let policy = Policy::default();
    let ca = TestCa::new("cluster.local", &policy);
    let other = TestCa::new(signer, &policy);
    let signer = if signer == "cluster.local" {
        &ca
    } else {
        &other
    };
    let server = ca.certificate(&ca.identity("b", "server"));
    let mut leaf = signer.leaf(&signer.identity("a", "client"));
    change(&mut leaf);
    let client = reckless_client(Some(signer.sign(&leaf)), &[b"h2"]);
    let (seen, dialled) = handshake(&server, client).await;
    assert!(dialled.is_err(), "the client must learn of it");
    match seen.unwrap_err() {
        HandshakeError::PeerCertificate(error) => error,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn clients_with_bad_certificates_are_refused() {
    let hour = Duration::from_secs(3600);
    let of_cluster = "spiffe://cluster.local/ns/a/sa/client".to_owned();
    let untrusted = PeerCertificateError::UntrustedDomain("other".parse().unwrap());
    assert_eq!(refusal("other", |_| ()).await, untrusted);

    // A root of one domain does not vouch for another, whatever the leaf claims.
    let claims = refusal("other", |leaf| leaf.uris = vec![of_cluster.clone()]).await;
    let domain = "cluster.local".parse().unwrap();
    assert_eq!(claims, PeerCertificateError::UnknownIssuer(domain));

    let expired = |leaf: &mut Leaf| {
        leaf.not_after = leaf.not_before - hour;
        leaf.not_before -= 2 * hour;
    };
    assert_eq!(
        refusal("cluster.local", expired).await,
        PeerCertificateError::Expired
    );
    let early = |leaf: &mut Leaf| leaf.not_before += hour;
    assert_eq!(
        refusal("cluster.local", early).await,
        PeerCertificateError::NotValidYet
    );
    let two = |leaf: &mut Leaf| leaf.uris.push("spiffe://cluster.local/ns/b/sa/c".into());
    assert_eq!(
        refusal("cluster.local", two).await,
        PeerCertificateError::UriNames(2)
    );
    let two_of_which_one_is_foreign = |leaf: &mut Leaf| leaf.uris.push("https://a.example".into());
    assert_eq!(
        refusal("cluster.local", two_of_which_one_is_foreign).await,
        PeerCertificateError::UriNames(2)
    );
    let none = |leaf: &mut Leaf| {
        leaf.uris.clear();
        leaf.dns.push("client.a.svc".into());
    };
    assert_eq!(
        refusal("cluster.local", none).await,
        PeerCertificateError::UriNames(0)
    );
    let foreign = |leaf: &mut Leaf| leaf.uris = vec!["spiffe://cluster.local/host/a".into()];
    assert!(matches!(
        refusal("cluster.local", foreign).await,
        PeerCertificateError::NotSpiffe(_)
    ));
    let server_only = |leaf: &mut Leaf| leaf.uses = vec![ExtendedKeyUsagePurpose::ServerAuth];
    assert_eq!(
        refusal("cluster.local", server_only).await,
        PeerCertificateError::WrongUse
    );
}

#[tokio::test]
async fn a_certificate_without_extended_key_usage_is_accepted() {
    let ca = TestCa::new("cluster.local", &Policy::default());
    let server = ca.certificate(&ca.identity("b", "server"));
    let id = ca.identity("a", "client");
    let mut leaf = ca.leaf(&id);
    leaf.uses.clear();
    let client = reckless_client(Some(ca.sign(&leaf)), &[b"h2"]);
    assert_eq!(handshake(&server, client).await.0.unwrap().identity, id);
}

#[tokio::test]
async fn a_client_without_a_certificate_is_refused() {
    let ca = TestCa::new("cluster.local", &Policy::default());
    let server = ca.certificate(&ca.identity("b", "server"));
    let (seen, dialled) = handshake(&server, reckless_client(None, &[b"h2"])).await;
    assert!(
        matches!(seen, Err(HandshakeError::NoCertificate)),
        "{seen:?}"
    );
    let dialled = dialled.unwrap_err();
    assert!(
        matches!(
            dialled,
            HandshakeError::Alert(AlertDescription::CertificateRequired)
        ),
        "{dialled:?}"
    );
    assert_eq!(dialled.blame(), Blame::Us);
}

#[tokio::test]
async fn alpn_may_be_missing_but_not_foreign() {
    let ca = TestCa::new("cluster.local", &Policy::default());
    let server = ca.certificate(&ca.identity("b", "server"));
    let leaf = || Some(ca.sign(&ca.leaf(&ca.identity("a", "client"))));
    let (none, _) = handshake(&server, reckless_client(leaf(), &[])).await;
    assert!(none.is_ok());
    let (foreign, _) = handshake(&server, reckless_client(leaf(), &[b"http/1.1"])).await;
    assert!(
        matches!(foreign, Err(HandshakeError::Protocol(_))),
        "{foreign:?}"
    );
}

#[tokio::test]
async fn plaintext_is_told_from_broken_tls() {
    let ca = TestCa::new("cluster.local", &Policy::default());
    let server = ca.certificate(&ca.identity("b", "server"));
    for (text, is_plain) in [
        (&b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"[..], true),
        (b"\x16\x03\x01\x00\x05garba", false),
    ] {
        let (mut near, far) = pair().await;
        near.write_all(text).await.unwrap();
        let error = accept(far, server.server_config(), DEADLINE)
            .await
            .unwrap_err();
        assert_eq!(
            matches!(error, HandshakeError::NotTls),
            is_plain,
            "{error:?}"
        );
        assert_eq!(error.blame(), Blame::Peer);
    }
}

#[tokio::test(start_paused = true)]
async fn a_stalled_handshake_times_out() {
    let ca = TestCa::new("cluster.local", &Policy::default());
    let server = ca.certificate(&ca.identity("b", "server"));
    let (near, far) = pair().await;
    let error = accept(far, server.server_config(), DEADLINE)
        .await
        .unwrap_err();
    assert!(matches!(error, HandshakeError::Timeout { after } if after == DEADLINE));
    drop(near);
}

#[tokio::test]
async fn certificates_expire_by_the_clock_that_is_given() {
    let clock = TestClock::new(std::time::SystemTime::now());
    let policy = Policy::new(Versions::Tls13, KeyExchange::Default, clock.clone());
    let ca = TestCa::new("cluster.local", &policy);
    let (a, b) = (ca.identity("a", "client"), ca.identity("b", "server"));
    let (client, server) = (ca.certificate(&a), ca.certificate(&b));
    assert!(client.is_valid());
    clock.jump(Duration::from_secs(25 * 3600));
    assert!(!client.is_valid());
    let (_, dialled) = handshake(&server, client.client_config(&only(&b))).await;
    let error = dialled.unwrap_err();
    assert!(
        matches!(
            error,
            HandshakeError::PeerCertificate(PeerCertificateError::Expired)
        ),
        "{error:?}"
    );
}

#[tokio::test]
async fn post_quantum_policy_refuses_classical_peers() {
    let strict = Policy::new(
        Versions::Tls13,
        KeyExchange::PostQuantum,
        Arc::new(SystemClock),
    );
    let ca = TestCa::new("cluster.local", &strict);
    let (a, b) = (ca.identity("a", "client"), ca.identity("b", "server"));
    let (client, server) = (ca.certificate(&a), ca.certificate(&b));
    let (seen, _) = handshake(&server, client.client_config(&only(&b))).await;
    assert!(seen.is_ok());
    let offers = [rustls::NamedGroup::X25519, rustls::NamedGroup::secp256r1];
    let classical = reckless_client_with(Some(ca.sign(&ca.leaf(&a))), &[b"h2"], &offers);
    let (seen, _) = handshake(&server, classical).await;
    assert!(matches!(seen, Err(HandshakeError::Protocol(_))), "{seen:?}");
}

#[test]
fn a_leaf_that_peers_would_refuse_is_refused_at_home() {
    let policy = Policy::default();
    let ca = TestCa::new("cluster.local", &policy);
    let mut leaf = ca.leaf(&ca.identity("a", "client"));
    leaf.uris.push("spiffe://cluster.local/ns/b/sa/c".into());
    let (der, key) = ca.sign(&leaf);
    let error = WorkloadCertificate::new(&policy, vec![der], key, ca.trust()).unwrap_err();
    assert!(matches!(
        error,
        BuildCertificateError::Leaf(PeerCertificateError::UriNames(2))
    ));
    let (der, _) = ca.sign(&ca.leaf(&ca.identity("a", "client")));
    let (_, other) = ca.sign(&ca.leaf(&ca.identity("a", "client")));
    let error = WorkloadCertificate::new(&policy, vec![der], other, ca.trust()).unwrap_err();
    assert!(matches!(error, BuildCertificateError::Key(_)), "{error:?}");
}

#[test]
fn config_dump_gets_text_and_no_key() {
    use base64::{Engine, engine::general_purpose::STANDARD};
    let ca = TestCa::new("cluster.local", &Policy::default());
    let certificate = ca.certificate(&ca.identity("a", "b"));
    let [shown] = &certificate.chain()[..] else {
        panic!("one leaf");
    };
    let pem = String::from_utf8(STANDARD.decode(&shown.pem).unwrap()).unwrap();
    assert!(pem.starts_with("-----BEGIN CERTIFICATE-----\n"));
    assert!(pem.ends_with("-----END CERTIFICATE-----\n"));
    assert!(pem.lines().all(|line| line.len() <= 64));
    assert!(shown.serial_number.bytes().all(|b| b.is_ascii_digit()));
    assert_eq!(certificate.roots().len(), 1);
    assert!(!format!("{certificate:?}").to_lowercase().contains("key"));
}

#[test]
fn roots_that_are_no_certificates_are_skipped_unless_all_are() {
    let ca = TestCa::new("cluster.local", &Policy::default());
    let junk = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
    let pem = format!("{junk}{}", ca.root_pem());
    let bundle = TrustBundle::from_pem("cluster.local".parse().unwrap(), pem.as_bytes()).unwrap();
    assert_eq!(bundle.certificates().count(), 1);
    assert!(TrustBundle::from_pem("a".parse().unwrap(), junk.as_bytes()).is_err());
}

/// A client and a server under one policy, and the leaf of one of them.
fn revocable(ca: &TestCa, policy: &Policy, name: &str) -> (WorkloadCertificate, String) {
    let (leaf, key) = ca.sign(&ca.leaf(&ca.identity("a", name)));
    let list = ca.revoke(&[&leaf]);
    let certificate = WorkloadCertificate::new(policy, vec![leaf], key, ca.trust());
    (certificate.expect("leaf, key and root fit"), list)
}

#[tokio::test]
async fn a_revoked_certificate_is_refused_at_either_end() {
    for (revoke_client, end) in [(true, PeerEnd::Client), (false, PeerEnd::Server)] {
        let policy = Policy::default();
        let ca = TestCa::new("cluster.local", &policy);
        let (client, clients) = revocable(&ca, &policy, "client");
        let (server, servers) = revocable(&ca, &policy, "server");
        let expected = only(server.identity());
        let (seen, _) = handshake(&server, client.client_config(&expected)).await;
        assert!(seen.is_ok(), "before: {seen:?}");

        let list = if revoke_client { clients } else { servers };
        assert_eq!(policy.revocations().replace(list.as_bytes()), Ok(1));
        let (seen, dialled) = handshake(&server, client.client_config(&expected)).await;
        let refusal = if revoke_client { seen } else { dialled };
        assert!(
            matches!(
                refusal,
                Err(HandshakeError::PeerCertificate(
                    PeerCertificateError::Revoked(_)
                ))
            ),
            "{refusal:?}"
        );
        assert_eq!(policy.revocations().refused(end), 1);
    }
}

#[tokio::test]
async fn whoever_holds_a_chain_learns_of_its_revocation() {
    let policy = Policy::default();
    let ca = TestCa::new("cluster.local", &policy);
    let (client, list) = revocable(&ca, &policy, "client");
    let (server, _) = revocable(&ca, &policy, "server");
    let (seen, _) = handshake(&server, client.client_config(&only(server.identity()))).await;
    let chain = seen.unwrap().chain;
    let told = policy.revocations().until_revoked(&chain);
    tokio::pin!(told);
    let other = ca.revoke(&[&ca.sign(&ca.leaf(&ca.identity("a", "other"))).0]);
    policy.revocations().replace(other.as_bytes()).unwrap();
    assert!(futures_util::poll!(&mut told).is_pending());
    policy.revocations().replace(list.as_bytes()).unwrap();
    tokio::time::timeout(DEADLINE, told).await.expect("told");
}

#[test]
fn a_file_that_is_no_list_leaves_the_revoked_as_they_were() {
    let policy = Policy::default();
    let ca = TestCa::new("cluster.local", &policy);
    let (_, list) = revocable(&ca, &policy, "client");
    let two = format!("{list}\n{}", revocable(&ca, &policy, "other").1);
    let revocations = policy.revocations();
    assert_eq!(revocations.replace(two.as_bytes()), Ok(2));
    let cut = &list.as_bytes()[..list.len() / 2];
    for (file, about) in [
        (b"junk".as_slice(), "junk"),
        (cut, "half a list"),
        (ca.root_pem().as_bytes(), "another PEM"),
    ] {
        assert!(revocations.replace(file).is_err(), "{about}");
    }
    assert_eq!(format!("{revocations:?}"), "Revocations { revoked: 2, .. }");
    assert_eq!(
        revocations.replace(b" \n"),
        Ok(0),
        "empty: none are revoked"
    );
}

/// A mesh that is changing its name from `old.example` to `new.example`: one root, certificates of both.
fn renamed(names: &[&str]) -> (Policy, TestCa) {
    let names = names.iter().map(|it| it.parse().unwrap());
    let policy = Policy::default().with_domain_names(names);
    let ca = TestCa::new("new.example", &policy);
    (policy, ca)
}

fn certificate_of(ca: &TestCa, policy: &Policy, identity: &Identity) -> WorkloadCertificate {
    let (leaf, key) = ca.sign(&ca.leaf(identity));
    let roots = ca.root_pem();
    let trust = TrustBundle::from_pem(identity.trust_domain.clone(), roots.as_bytes()).unwrap();
    WorkloadCertificate::new(policy, vec![leaf], key, trust).unwrap()
}

#[tokio::test]
async fn peers_of_the_domains_other_name_are_taken_in_both_directions() {
    let (policy, ca) = renamed(&["new.example", "old.example"]);
    let new = ca.identity("a", "web");
    let old = Identity {
        trust_domain: "old.example".parse().unwrap(),
        ..new.clone()
    };
    for (client, server) in [(&old, &new), (&new, &old)] {
        let dialling = certificate_of(&ca, &policy, client);
        let serving = certificate_of(&ca, &policy, server);
        // Whoever dials knows the server's account by either name.
        for expected in [&old, &new] {
            let dial = dialling.client_config(&only(expected));
            let (seen, dialled) = handshake(&serving, dial).await;
            assert_eq!(&seen.unwrap().identity, client, "told as it is presented");
            assert_eq!(&dialled.unwrap().identity, server);
        }
        let another = only(&ca.identity("a", "api"));
        let (_, dialled) = handshake(&serving, dialling.client_config(&another)).await;
        assert!(dialled.is_err(), "another account under either name");
    }
}

#[tokio::test]
async fn a_domain_that_is_no_name_of_ours_is_refused_in_both_directions() {
    let (policy, ca) = renamed(&["new.example", "old.example"]);
    let new = ca.identity("a", "web");
    let foreign = Identity {
        trust_domain: "foreign.example".parse().unwrap(),
        ..new.clone()
    };
    for (client, server) in [(&foreign, &new), (&new, &foreign)] {
        let dialling = certificate_of(&ca, &policy, client);
        let serving = certificate_of(&ca, &policy, server);
        let (seen, dialled) = handshake(&serving, dialling.client_config(&only(&new))).await;
        assert!(seen.is_err() && dialled.is_err());
    }
}
