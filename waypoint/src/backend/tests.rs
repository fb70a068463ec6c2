//! Ways to endpoints, over real sockets: TLS of our own to a server of the world, TLS of the application untouched, another
//! network through its gateway.

use std::{net::IpAddr, sync::Arc};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use http::HeaderMap;
use mesh::{
    authority::Authority,
    l7::{
        backend::{BackendPolicy, BackendTls, ClientCertificate, Pem, TrafficPolicy},
        name::ObjectRef,
        route::{self, Attachment, Callers, Route, Rules, TlsRule},
        served::AppProtocol,
        view::Resource,
    },
    names::{NamespacedHostname, WorkloadUid},
    outbound::HBONE_PORT,
    service::Service,
    workload::{GatewayAddress, GatewayDestination, PortMap, TunnelProtocol, Workload},
};
use net::hbone::{self, ConnectRequest, Stream};
use parking_lot::Mutex;
use rustls::{ClientConfig, RootCertStore, ServerConfig, server::WebPkiClientVerifier};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use crate::testing::{DEADLINE, Rig, VIP, loopback, soon};

mod via;

/// A server of TLS that greets with `greeting`, at an address of its own, port `port`.
async fn tls_server(rig: &Rig, host: &str, port: u16, greeting: &'static str) -> IpAddr {
    let (address, listener) = loopback(port).await;
    let mut leaf = rig.ca.leaf(&rig.ca.identity("world", "server"));
    leaf.uris = Vec::new();
    leaf.dns = vec![host.to_owned()];
    let (chain, key) = rig.ca.sign(&leaf);
    tokio::spawn(greet(listener, server_config(chain, key), greeting));
    address
}

fn server_config(chain: CertificateDer<'static>, key: PrivateKeyDer<'static>) -> ServerConfig {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![chain], key)
        .unwrap()
}

async fn greet(listener: TcpListener, config: ServerConfig, greeting: &'static str) {
    let acceptor = TlsAcceptor::from(Arc::new(config));
    while let Ok((tcp, _)) = listener.accept().await {
        // Who does not want us is not greeted.
        if let Ok(mut stream) = acceptor.accept(tcp).await {
            let _ = stream.write_all(greeting.as_bytes()).await;
            let _ = stream.shutdown().await;
        }
    }
}

async fn all(mut stream: impl tokio::io::AsyncRead + Unpin) -> std::io::Result<String> {
    let mut text = String::new();
    soon(stream.read_to_string(&mut text)).await?;
    Ok(text)
}

fn key() -> NamespacedHostname {
    "shop/web.shop.svc.cluster.local".parse().unwrap()
}

fn verified(rig: &Rig, sni: &str) -> Resource {
    with_tls(BackendTls::Verify {
        sni: Some(sni.into()),
        roots: Some(Pem::Inline(rig.ca.root_pem().into_bytes())),
        revoked: None,
        subject_alt_names: Vec::new(),
        client: None,
    })
}

fn with_tls(tls: BackendTls) -> Resource {
    Resource::Backend(Box::new(BackendPolicy {
        service: key(),
        sources: Vec::new(),
        policy: TrafficPolicy {
            tls: Some(tls),
            ..TrafficPolicy::default()
        },
        ports: [].into(),
        subsets: [].into(),
    }))
}

/// A server that greets those who show a certificate of the rig's authority.
async fn mutual_server(rig: &Rig, port: u16) -> IpAddr {
    let (address, listener) = loopback(port).await;
    let mut leaf = rig.ca.leaf(&rig.ca.identity("world", "server"));
    leaf.uris = Vec::new();
    leaf.dns = vec!["api.example.com".to_owned()];
    let (chain, key) = rig.ca.sign(&leaf);
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut roots = RootCertStore::empty();
    roots.add(rig.ca.own()).unwrap();
    let verifier = WebPkiClientVerifier::builder_with_provider(roots.into(), provider.clone());
    let config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_client_cert_verifier(verifier.build().unwrap())
        .with_single_cert(vec![chain], key)
        .unwrap();
    tokio::spawn(greet(listener, config, "greetings"));
    address
}

fn pem(kind: &str, der: &[u8]) -> String {
    let text = BASE64_STANDARD.encode(der);
    format!("-----BEGIN {kind}-----\n{text}\n-----END {kind}-----\n")
}

/// Chain and key of a new certificate, PEM.
fn client_pair(rig: &Rig) -> (String, String) {
    let identity = rig.ca.identity("shop", "client");
    let (chain, key) = rig.ca.sign(&rig.ca.leaf(&identity));
    (
        pem("CERTIFICATE", &chain),
        pem("PRIVATE KEY", key.secret_der()),
    )
}

/// What is heard at the service: the greeting, or nothing.
async fn heard(rig: &Rig) -> Option<String> {
    let stream = rig.connect(&format!("{VIP}:8443")).await.ok()?.stream;
    all(stream).await.ok().filter(|text| !text.is_empty())
}

#[tokio::test]
async fn a_certificate_is_shown_to_a_server_that_asks_for_one() {
    let rig = Rig::new();
    rig.serve(&[(8443, AppProtocol::Tcp)]);
    rig.plain_endpoint("api", mutual_server(&rig, 8443).await);
    let tls = |client| BackendTls::Verify {
        sni: Some("api.example.com".into()),
        roots: Some(Pem::Inline(rig.ca.root_pem().into_bytes())),
        revoked: None,
        subject_alt_names: Vec::new(),
        client,
    };
    rig.tell(vec![with_tls(tls(None))]);
    assert_eq!(heard(&rig).await, None);
    let (chain, key) = client_pair(&rig);
    let shown = ClientCertificate {
        chain: Pem::Inline(chain.into_bytes()),
        key: Pem::Inline(key.into_bytes()),
    };
    rig.tell(vec![with_tls(tls(Some(shown)))]);
    assert_eq!(heard(&rig).await.as_deref(), Some("greetings"));
}

#[tokio::test]
async fn a_certificate_in_files_is_read_anew_when_they_change_and_closes_when_it_cannot_be() {
    let rig = Rig::new();
    rig.serve(&[(8443, AppProtocol::Tcp)]);
    rig.plain_endpoint("api", mutual_server(&rig, 8443).await);
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str| folder.path().join(name);
    let path = |name: &str| Pem::File(file(name).to_str().unwrap().into());
    rig.tell(vec![with_tls(BackendTls::Verify {
        sni: Some("api.example.com".into()),
        roots: Some(path("roots")),
        revoked: None,
        subject_alt_names: Vec::new(),
        client: Some(ClientCertificate {
            chain: path("chain"),
            key: path("key"),
        }),
    })]);
    // Nothing is there yet.
    assert_eq!(heard(&rig).await, None);
    let (chain, key) = client_pair(&rig);
    std::fs::write(file("roots"), rig.ca.root_pem()).unwrap();
    std::fs::write(file("chain"), chain).unwrap();
    std::fs::write(file("key"), &key).unwrap();
    assert_eq!(heard(&rig).await.as_deref(), Some("greetings"));
    // Another authority's: the server turns it away.
    let other = Rig::new();
    let (chain, key) = client_pair(&other);
    std::fs::write(file("chain"), chain).unwrap();
    std::fs::write(file("key"), key).unwrap();
    assert_eq!(heard(&rig).await, None);
    std::fs::write(file("key"), "none").unwrap();
    assert_eq!(heard(&rig).await, None);
}

#[tokio::test]
async fn a_server_whose_certificate_was_taken_back_is_not_spoken_to() {
    let rig = Rig::new();
    rig.serve(&[(8443, AppProtocol::Tcp)]);
    let (address, listener) = loopback(8443).await;
    let mut leaf = rig.ca.leaf(&rig.ca.identity("world", "server"));
    leaf.dns = vec!["api.example.com".to_owned()];
    let (chain, key) = rig.ca.sign(&leaf);
    let list = rig.ca.revoke(&[&chain]);
    let other = rig.ca.revoke(&[&rig.ca.sign(&leaf).0]);
    tokio::spawn(greet(listener, server_config(chain, key), "greetings"));
    rig.plain_endpoint("api", address);
    for (list, expected) in [(other, Some("greetings")), (list, None), ("?".into(), None)] {
        rig.tell(vec![with_tls(BackendTls::Verify {
            sni: Some("api.example.com".into()),
            roots: Some(Pem::Inline(rig.ca.root_pem().into_bytes())),
            revoked: Some(Pem::Inline(list.into_bytes())),
            subject_alt_names: Vec::new(),
            client: None,
        })]);
        assert_eq!(heard(&rig).await.as_deref(), expected);
    }
}

#[tokio::test]
async fn plaintext_of_the_client_is_tls_to_a_server_that_proves_its_name() {
    let rig = Rig::new();
    rig.serve(&[(8443, AppProtocol::Tcp)]);
    let address = tls_server(&rig, "api.example.com", 8443, "greetings").await;
    rig.plain_endpoint("api", address);
    rig.tell(vec![verified(&rig, "api.example.com")]);
    let authority = format!("{VIP}:8443");
    let stream = rig.connect(&authority).await.unwrap().stream;
    assert_eq!(all(stream).await.unwrap(), "greetings");
    // Another name than the one that it can prove.
    rig.tell(vec![verified(&rig, "other.example.com")]);
    let refused = rig.connect(&authority).await;
    assert!(refused.is_err(), "{refused:?}");
}

fn to(name: &str) -> route::Backend {
    route::Backend::Service {
        service: format!("shop/{name}.shop.svc.cluster.local")
            .parse()
            .unwrap(),
        port: 443,
        subset: None,
    }
}

/// A service of its own, which no waypoint is for, with one endpoint.
fn behind(rig: &Rig, name: &str, address: IpAddr) {
    let host = format!("{name}.shop.svc.cluster.local");
    let mut service = Service::new(name.into(), "shop".into(), host.as_str().into());
    service.ports = [(443, 8444)].into_iter().collect();
    let uid = WorkloadUid(format!("Kubernetes//Pod/shop/{name}").into());
    let mut workload = Workload::new(uid, name.into(), "shop".into());
    workload.addresses = vec![address].into();
    workload.services = [(service.key(), PortMap::new())].into_iter().collect();
    rig.tell_mesh(vec![service.into(), workload.into()]);
}

fn by_name() -> Resource {
    let rule = |sni: &str, backend| TlsRule {
        name: None,
        sni: vec![sni.into()],
        port: None,
        source: None,
        destinations: vec![],
        backends: vec![(1, backend)],
    };
    Resource::Route(Route {
        key: ObjectRef {
            kind: "TLSRoute".into(),
            namespace: "shop".into(),
            name: "by-name".into(),
        },
        created: 0,
        attachments: vec![Attachment {
            service: key(),
            port: None,
            callers: Callers::All,
        }],
        rules: Rules::Tls(vec![
            rule("one.example.com", to("one")),
            rule("*.two.example.com", to("two")),
        ]),
    })
}

/// Speaks TLS with whoever is behind the waypoint.
async fn ask(rig: &Rig, name: &'static str) -> std::io::Result<String> {
    let mut roots = RootCertStore::empty();
    let root = CertificateDer::from_pem_slice(rig.ca.root_pem().as_bytes()).unwrap();
    roots.add(root).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let stream = rig.connect(&format!("{VIP}:443")).await.unwrap().stream;
    let name = ServerName::try_from(name).unwrap();
    let stream = soon(TlsConnector::from(Arc::new(config)).connect(name, stream)).await?;
    all(stream).await
}

#[tokio::test]
async fn tls_of_the_application_is_routed_by_its_name_and_not_opened() {
    let rig = Rig::new();
    rig.serve(&[(443, AppProtocol::Tls)]);
    for (name, host, greeting) in [
        ("one", "one.example.com", "I am one"),
        ("two", "b.two.example.com", "I am two"),
    ] {
        let address = tls_server(&rig, host, 8444, greeting).await;
        behind(&rig, name, address);
    }
    rig.tell(vec![by_name()]);
    // The certificates are the servers' own: nobody else ended the TLS.
    assert_eq!(ask(&rig, "one.example.com").await.unwrap(), "I am one");
    assert_eq!(ask(&rig, "b.two.example.com").await.unwrap(), "I am two");
    let nobody = ask(&rig, "three.example.com").await;
    assert!(nobody.is_err(), "{nobody:?}");
}

/// What a gateway was asked for, and what the endpoint behind it was.
type Asked = Arc<Mutex<Vec<String>>>;

/// The inner tunnel ends at the endpoint, which alone can read it.
async fn endpoint(
    stream: Stream,
    config: Arc<ServerConfig>,
    rig_ca: Arc<net::testing::TestCa>,
    asked: Asked,
) {
    let stream = TlsAcceptor::from(config).accept(stream).await.unwrap();
    let peer = net::tls::PeerIdentity {
        identity: rig_ca.identity("shop", "wp"),
        not_after: std::time::SystemTime::now() + DEADLINE,
        chain: Arc::from([]),
    };
    let handler = move |request: ConnectRequest| {
        let asked = Arc::clone(&asked);
        async move {
            let network = request.headers().get("x-forwarded-network").cloned();
            asked
                .lock()
                .push(format!("inner {} {network:?}", request.authority()));
            let mut stream = request.accept(HeaderMap::new()).unwrap();
            stream.write_all(b"from afar").await.unwrap();
            stream.shutdown().await.unwrap();
            // Its own end says that it has got all.
            let _ = stream.read(&mut [0]).await;
        }
    };
    let config = hbone::Config::default();
    let _ = hbone::serve(
        stream,
        peer,
        &config,
        std::future::pending(),
        handler,
        |_| {},
    )
    .await;
}

/// A gateway of another network with an endpoint behind it; where it is.
async fn gateway(rig: &Rig, asked: &Asked) -> IpAddr {
    let (address, listener) = loopback(HBONE_PORT).await;
    let own = rig.ca.certificate(&rig.ca.identity("istio", "gateway"));
    let inner = rig.ca.certificate(&rig.ca.identity("shop", "far"));
    let (ca, asked) = (rig.ca.clone(), Arc::clone(asked));
    tokio::spawn(async move {
        while let Ok((tcp, _)) = listener.accept().await {
            let (own, inner) = (own.server_config(), inner.server_config());
            let (ca, asked) = (ca.clone(), Arc::clone(&asked));
            let handler = move |request: ConnectRequest| {
                let (inner, ca, asked) = (inner.clone(), ca.clone(), Arc::clone(&asked));
                async move {
                    let source = request.headers().get("x-istio-source").cloned();
                    asked
                        .lock()
                        .push(format!("outer {} {source:?}", request.authority()));
                    let stream = request.accept(HeaderMap::new()).unwrap();
                    endpoint(stream, inner, ca, asked).await;
                }
            };
            let (io, peer) = net::tls::accept(tcp, own, DEADLINE).await.unwrap();
            let config = hbone::Config::default();
            tokio::spawn(async move {
                let _ =
                    hbone::serve(io, peer, &config, std::future::pending(), handler, |_| {}).await;
            });
        }
    });
    address
}

#[tokio::test]
async fn an_endpoint_of_another_network_is_reached_by_a_tunnel_in_a_tunnel() {
    let rig = Rig::new();
    rig.serve(&[(80, AppProtocol::Tcp)]);
    let asked = Asked::default();
    let address = gateway(&rig, &asked).await;
    let edge = {
        let mut it = Workload::new(
            WorkloadUid("far//Pod/istio/gateway".into()),
            "gateway".into(),
            "istio".into(),
        );
        it.network = "far".into();
        it.addresses = vec![address].into();
        it.service_account = "gateway".into();
        it.tunnel_protocol = TunnelProtocol::Hbone;
        it
    };
    let destination = GatewayDestination::Address(format!("far/{address}").parse().unwrap());
    let far = {
        let mut it = Workload::new(
            WorkloadUid("far//Pod/shop/web".into()),
            "web".into(),
            "shop".into(),
        );
        it.network = "far".into();
        it.service_account = "far".into();
        it.tunnel_protocol = TunnelProtocol::Hbone;
        it.network_gateway = Some(GatewayAddress {
            destination,
            hbone_mtls_port: HBONE_PORT,
        });
        it.services = [(key(), PortMap::new())].into_iter().collect();
        it
    };
    let mut service = Service::new("web".into(), "shop".into(), key().hostname);
    service.vips = vec![format!("/{VIP}").parse().unwrap()];
    service.ports = [(80, 8080)].into_iter().collect();
    service.subject_alt_names = vec![rig.ca.identity("shop", "far")];
    rig.tell_mesh(vec![edge.into(), far.into(), service.into()]);
    let stream = rig.connect(&format!("{VIP}:80")).await.unwrap().stream;
    assert_eq!(all(stream).await.unwrap(), "from afar");
    let asked = asked.lock().clone();
    let host = Authority::Hostname("web.shop.svc.cluster.local".into(), 80);
    assert!(
        asked[0].starts_with(&format!("outer {host} Some(\"waypoint\")")),
        "{asked:?}"
    );
    assert!(asked[1].starts_with(&format!("inner {host}")), "{asked:?}");
}

/// A forward proxy that lets everyone go on to `allowed`, whose greeting is then `greeting`.
async fn forward_proxy(listener: TcpListener, allowed: &'static str, greeting: &'static str) {
    while let Ok((mut stream, _)) = listener.accept().await {
        let mut asked = Vec::new();
        while !asked.ends_with(b"\r\n\r\n") {
            match stream.read_u8().await {
                Ok(byte) => asked.push(byte),
                Err(_) => break,
            }
        }
        let asked = String::from_utf8(asked).unwrap();
        let answer = match asked.starts_with(&format!("CONNECT {allowed} HTTP/1.1\r\n")) {
            true => format!("HTTP/1.1 200 OK\r\n\r\n{greeting}"),
            false => "HTTP/1.1 403 Forbidden\r\n\r\n".to_owned(),
        };
        let _ = stream.write_all(answer.as_bytes()).await;
    }
}

#[tokio::test]
async fn a_forward_proxy_is_asked_for_the_other_end() {
    let rig = Rig::new();
    rig.serve(&[(8443, AppProtocol::Tcp)]);
    let (address, listener) = loopback(8443).await;
    rig.plain_endpoint("proxy", address);
    tokio::spawn(forward_proxy(listener, "api.example.com:443", "from afar"));
    for (authority, expected) in [
        ("api.example.com:443", Some("from afar")),
        ("other.example.com:443", None),
    ] {
        rig.tell(vec![Resource::Backend(Box::new(BackendPolicy {
            service: key(),
            sources: Vec::new(),
            policy: TrafficPolicy {
                forward_to: Some(authority.into()),
                ..TrafficPolicy::default()
            },
            ports: [].into(),
            subsets: [].into(),
        }))]);
        assert_eq!(heard(&rig).await.as_deref(), expected, "{authority}");
    }
}
