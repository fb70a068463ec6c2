//! A peer that misbehaves on a tunnel's port, one way per run, and prints what came of it as one line of JSON.
//!
//! Written on rustls and raw HTTP/2 frames rather than on our own client, so that it can do what our client cannot.
//! Certificates are signed with the mesh's own root where a case needs one that would else be trusted.

mod h2;

use std::{
    env, fs,
    net::SocketAddr,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use h2::{DATA, PING, SETTINGS, connect, fields, frame, get, preface};
use rcgen::{
    CertificateParams, CustomExtension, DnType, Issuer, KeyPair, SanType, string::Ia5String,
};
use rustls::{
    ClientConfig, DigitallySignedStruct, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::aws_lc_rs,
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use serde_json::json;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWriteExt},
    net::{TcpSocket, TcpStream},
    time::timeout,
};
use tokio_rustls::{TlsConnector, client::TlsStream};

const USAGE: &str = "usage: hostile ADDRESS:PORT CASE [--ca FILE] [--authority HOST:PORT] [--identity SPIFFE-ID]
       hostile ADDRESS:PORT CASE --plain   (the same to a server of HTTP/2 without TLS: GET in place of CONNECT)
cases: good plaintext garbage no-certificate other-domain other-root expired two-uris wrong-address
       get no-authority header-flood continuation-flood rapid-reset stall silent-after-tls stop-reading
       settings-flood ping-flood empty-data-flood upper-case-name connection-header two-methods no-path
       header-line-break length-too-short";

/// Longer than any deadline that the tunnel promises; what is still open then is called so.
const PATIENCE: Duration = Duration::from_secs(40);

struct Options {
    address: SocketAddr,
    case: String,
    ca: String,
    authority: String,
    identity: String,
    plain: bool,
}

impl Options {
    fn parse() -> Result<Self> {
        let words: Vec<String> = env::args().skip(1).collect();
        let [address, case, rest @ ..] = words.as_slice() else {
            bail!("{USAGE}")
        };
        let flag = |name: &str, default: &str| {
            let value = rest.iter().skip_while(|word| *word != name).nth(1);
            value.cloned().unwrap_or_else(|| default.to_owned())
        };
        Ok(Self {
            address: address
                .parse()
                .with_context(|| format!("{address} is not ADDRESS:PORT"))?,
            case: case.clone(),
            ca: flag("--ca", "ca.pem"),
            authority: flag("--authority", address),
            identity: flag("--identity", "spiffe://cluster.local/ns/hostile/sa/default"),
            plain: rest.iter().any(|word| word == "--plain"),
        })
    }
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<()> {
    let options = Options::parse()?;
    let began = Instant::now();
    let outcome = run(&options).await?;
    println!(
        "{}",
        json!({"case": options.case, "outcome": outcome, "seconds": began.elapsed().as_secs_f64()})
    );
    Ok(())
}

async fn run(options: &Options) -> Result<String> {
    let good = Leaf::default();
    match options.case.as_str() {
        "plaintext" => raw(options, b"GET / HTTP/1.1\r\nhost: pod\r\n\r\n").await,
        "garbage" => raw(options, &[0xa5; 64 << 10]).await,
        "stall" => raw(options, b"").await,
        "no-certificate" => handshake(options, None).await,
        "other-domain" => {
            handshake(
                options,
                Some(Leaf {
                    uris: vec!["spiffe://other.example/ns/a/sa/b"],
                    ..good
                }),
            )
            .await
        }
        "other-root" => {
            handshake(
                options,
                Some(Leaf {
                    own_root: true,
                    ..good
                }),
            )
            .await
        }
        "expired" => {
            handshake(
                options,
                Some(Leaf {
                    expired: true,
                    ..good
                }),
            )
            .await
        }
        "two-uris" => {
            handshake(
                options,
                Some(Leaf {
                    uris: vec!["", "spiffe://cluster.local/ns/a/sa/b"],
                    ..good
                }),
            )
            .await
        }
        "silent-after-tls" => h2::silent(options).await,
        "good" => h2::request(options, &options.block()).await,
        "wrong-address" => h2::request(options, &connect("192.0.2.1:80")).await,
        "get" => h2::request(options, &get(&options.authority)).await,
        "no-authority" => h2::request(options, &fields(&[(":method", "CONNECT")])).await,
        "header-flood" => h2::header_flood(options).await,
        "continuation-flood" => h2::continuation_flood(options).await,
        "rapid-reset" => h2::rapid_reset(options).await,
        "stop-reading" => h2::stop_reading(options).await,
        "settings-flood" => h2::flood(options, &frame(SETTINGS, 0, 0, &[])).await,
        "ping-flood" => h2::flood(options, &frame(PING, 0, 0, &[7; 8])).await,
        "empty-data-flood" => h2::flood(options, &frame(DATA, 0, 1, &[])).await,
        "length-too-short" => h2::length_too_short(options).await,
        "two-methods" => h2::with(options, (":method", "GET")).await,
        "upper-case-name" => h2::with(options, ("X-Upper", "case")).await,
        "connection-header" => h2::with(options, ("transfer-encoding", "chunked")).await,
        "header-line-break" => h2::with(options, ("x-break", "a\r\nx-smuggled: b")).await,
        "no-path" => {
            h2::request(
                options,
                &fields(&[
                    (":method", "GET"),
                    (":scheme", "http"),
                    (":authority", &options.authority),
                ]),
            )
            .await
        }
        other => bail!("unknown case {other}\n{USAGE}"),
    }
}

// ---- TCP and TLS ----

/// What our kernel takes of answers that we do not read is little, and not what the machine's settings let it grow to: a
/// flood would else be over before its answers fill that.
const RECEIVE_BUFFER: u32 = 64 << 10;

async fn dial(options: &Options) -> Result<TcpStream> {
    let socket = match options.address {
        SocketAddr::V4(_) => TcpSocket::new_v4()?,
        SocketAddr::V6(_) => TcpSocket::new_v6()?,
    };
    socket.set_recv_buffer_size(RECEIVE_BUFFER)?;
    Ok(socket.connect(options.address).await?)
}

/// Sends bytes that are no TLS, and waits for the end.
async fn raw(options: &Options, bytes: &[u8]) -> Result<String> {
    let mut tcp = dial(options).await?;
    // The other side may close before it has read everything: that is an answer, too.
    let _ = tcp.write_all(bytes).await;
    Ok(until_end(&mut tcp).await)
}

/// How a stream ends: `closed`, `error: ...`, or `open` when it outlives our patience.
async fn until_end(stream: &mut (impl AsyncRead + Unpin)) -> String {
    let mut buffer = [0; 4096];
    let drained = async {
        loop {
            match stream.read(&mut buffer).await {
                Ok(0) => return "closed".to_owned(),
                Ok(_) => {}
                Err(error) => return format!("error: {error}"),
            }
        }
    };
    timeout(PATIENCE, drained)
        .await
        .unwrap_or_else(|_| "open".to_owned())
}

/// What a client certificate is made of.
#[derive(Clone, Default)]
struct Leaf {
    /// URI names; empty text stands for the identity asked for; no names at all: just that identity.
    uris: Vec<&'static str>,
    expired: bool,
    /// Signed by a root that nobody knows.
    own_root: bool,
}

async fn handshake(options: &Options, leaf: Option<Leaf>) -> Result<String> {
    let mut tls = match connect_tls(options, leaf).await {
        Ok(tls) => tls,
        Err(error) => return Ok(format!("error: {error:#}")),
    };
    // In TLS 1.3 the client is done before the server has judged its certificate: only the first read tells.
    let _ = tls.write_all(&preface()).await;
    let mut buffer = [0; 64];
    match timeout(PATIENCE, tls.read(&mut buffer)).await {
        Ok(Ok(0)) => Ok("closed".to_owned()),
        Ok(Ok(_)) => Ok("accepted".to_owned()),
        Ok(Err(error)) => Ok(format!("error: {error}")),
        Err(_) => Ok("open".to_owned()),
    }
}

async fn connect_tls(options: &Options, leaf: Option<Leaf>) -> Result<TlsStream<TcpStream>> {
    let builder = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(AnyServer));
    let mut config = match leaf {
        None => builder.with_no_client_auth(),
        Some(leaf) => {
            let (chain, key) = sign(options, &leaf)?;
            builder.with_client_auth_cert(chain, key)?
        }
    };
    config.alpn_protocols = vec![b"h2".to_vec()];
    config.enable_sni = false;
    let tcp = dial(options).await?;
    tcp.set_nodelay(true)?;
    let name = ServerName::IpAddress(options.address.ip().into());
    Ok(TlsConnector::from(Arc::new(config))
        .connect(name, tcp)
        .await?)
}

fn sign(
    options: &Options,
    leaf: &Leaf,
) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>)> {
    let key = KeyPair::generate()?;
    let mut params = CertificateParams::default();
    params
        .distinguished_name
        .push(DnType::CommonName, "hostile");
    let uris = if leaf.uris.is_empty() {
        vec![""]
    } else {
        leaf.uris.clone()
    };
    for uri in uris {
        let uri = if uri.is_empty() {
            options.identity.as_str()
        } else {
            uri
        };
        params
            .subject_alt_names
            .push(SanType::URI(Ia5String::try_from(uri)?));
    }
    // An extension that nobody knows, not critical: must be no reason to refuse.
    params
        .custom_extensions
        .push(CustomExtension::from_oid_content(
            &[1, 3, 6, 1, 4, 1, 99999, 1],
            vec![5, 0],
        ));
    if leaf.expired {
        params.not_before = rcgen::date_time_ymd(2020, 1, 1);
        params.not_after = rcgen::date_time_ymd(2020, 1, 2);
    } else {
        params.not_before = rcgen::date_time_ymd(2020, 1, 1);
        params.not_after = rcgen::date_time_ymd(2100, 1, 1);
    }
    let issuer = if leaf.own_root {
        unknown_root()?
    } else {
        mesh_root(Path::new(&options.ca))?
    };
    let certificate = params.signed_by(&key, &issuer)?;
    let der = PrivateKeyDer::try_from(key.serialize_der()).map_err(anyhow::Error::msg)?;
    Ok((vec![certificate.der().clone()], der))
}

/// The mesh's root and its key, which its authority keeps in one file.
fn mesh_root(file: &Path) -> Result<Issuer<'static, KeyPair>> {
    let text = fs::read_to_string(file).with_context(|| format!("read {}", file.display()))?;
    let key = KeyPair::from_pem(&block(&text, "PRIVATE KEY")?)?;
    Ok(Issuer::from_ca_cert_pem(
        &block(&text, "CERTIFICATE")?,
        key,
    )?)
}

fn block(text: &str, label: &str) -> Result<String> {
    let end = format!("-----END {label}-----");
    let from = text
        .find(&format!("-----BEGIN {label}-----"))
        .with_context(|| format!("no {label}"))?;
    let rest = &text[from..];
    let to = rest
        .find(&end)
        .with_context(|| format!("{label} does not end"))?;
    Ok(rest[..to + end.len()].to_owned() + "\n")
}

fn unknown_root() -> Result<Issuer<'static, KeyPair>> {
    let mut params = CertificateParams::default();
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    Ok(Issuer::new(params, KeyPair::generate()?))
}

/// Accepts whoever answers: the server is not what is tested here.
#[derive(Debug)]
struct AnyServer;

impl ServerCertVerifier for AnyServer {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        aws_lc_rs::default_provider()
            .signature_verification_algorithms
            .supported_schemes()
    }
}
