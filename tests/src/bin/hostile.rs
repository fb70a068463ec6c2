//! A peer that misbehaves on a tunnel's port, one way per run, and prints what came of it as one line of JSON.
//!
//! Written on rustls and raw HTTP/2 frames rather than on our own client, so that it can do what our client cannot.
//! Certificates are signed with the mesh's own root where a case needs one that would else be trusted.

use std::{
    env, fs,
    net::SocketAddr,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
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
    net::TcpStream,
    time::timeout,
};
use tokio_rustls::{TlsConnector, client::TlsStream};

const USAGE: &str = "usage: hostile ADDRESS:PORT CASE [--ca FILE] [--authority HOST:PORT] [--identity SPIFFE-ID]
cases: good plaintext garbage no-certificate other-domain other-root expired two-uris wrong-address
       get no-authority header-flood continuation-flood rapid-reset stall silent-after-tls stop-reading";

/// Longer than any deadline that the tunnel promises; what is still open then is called so.
const PATIENCE: Duration = Duration::from_secs(40);

struct Options {
    address: SocketAddr,
    case: String,
    ca: String,
    authority: String,
    identity: String,
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
        "silent-after-tls" => silent(options).await,
        "good" => request(options, &connect(&options.authority)).await,
        "wrong-address" => request(options, &connect("192.0.2.1:80")).await,
        "get" => request(options, &get(&options.authority)).await,
        "no-authority" => request(options, &fields(&[(":method", "CONNECT")])).await,
        "header-flood" => header_flood(options).await,
        "continuation-flood" => continuation_flood(options).await,
        "rapid-reset" => rapid_reset(options).await,
        "stop-reading" => stop_reading(options).await,
        other => bail!("unknown case {other}\n{USAGE}"),
    }
}

// ---- TCP and TLS ----

/// Sends bytes that are no TLS, and waits for the end.
async fn raw(options: &Options, bytes: &[u8]) -> Result<String> {
    let mut tcp = TcpStream::connect(options.address).await?;
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
    let tcp = TcpStream::connect(options.address).await?;
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

// ---- HTTP/2 frames (RFC 9113) and header fields (RFC 7541, literals only) ----

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const GOAWAY: u8 = 7;
const WINDOW_UPDATE: u8 = 8;
const CONTINUATION: u8 = 9;
const END_HEADERS: u8 = 4;

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).expect("payloads here are small");
    let mut bytes = length.to_be_bytes()[1..].to_vec();
    bytes.extend([kind, flags]);
    bytes.extend(stream.to_be_bytes());
    bytes.extend(payload);
    bytes
}

fn preface() -> Vec<u8> {
    let mut bytes = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
    bytes.extend(frame(SETTINGS, 0, 0, &[]));
    bytes
}

/// RFC 7541 6.2.2: literals without indexing, names and values as they are.
fn fields(list: &[(&str, &str)]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (name, value) in list {
        bytes.push(0);
        for text in [name, value] {
            bytes.extend(length(text.len()));
            bytes.extend(text.as_bytes());
        }
    }
    bytes
}

/// RFC 7541 5.1, with a prefix of 7 bits.
fn length(mut value: usize) -> Vec<u8> {
    let low = |value: usize| u8::try_from(value & 0x7f).expect("seven bits");
    if value < 127 {
        return vec![low(value)];
    }
    let mut bytes = vec![127];
    value -= 127;
    while value >= 128 {
        bytes.push(low(value) | 0x80);
        value >>= 7;
    }
    bytes.push(low(value));
    bytes
}

fn connect(authority: &str) -> Vec<u8> {
    fields(&[(":method", "CONNECT"), (":authority", authority)])
}

fn get(authority: &str) -> Vec<u8> {
    fields(&[
        (":method", "GET"),
        (":scheme", "http"),
        (":path", "/"),
        (":authority", authority),
    ])
}

async fn open(options: &Options) -> Result<TlsStream<TcpStream>> {
    let mut tls = connect_tls(options, Some(Leaf::default())).await?;
    tls.write_all(&preface()).await?;
    Ok(tls)
}

struct Frame {
    kind: u8,
    stream: u32,
    payload: Vec<u8>,
}

async fn read_frame(tls: &mut TlsStream<TcpStream>) -> Result<Frame> {
    let mut head = [0; 9];
    tls.read_exact(&mut head).await?;
    let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
    let mut payload = vec![0; usize::try_from(length)?];
    tls.read_exact(&mut payload).await?;
    let stream = u32::from_be_bytes([head[5], head[6], head[7], head[8]]) & 0x7fff_ffff;
    Ok(Frame {
        kind: head[3],
        stream,
        payload,
    })
}

/// What the peer answers on stream 1: `status N`, `reset CODE`, `goaway CODE`, `closed`, or `open`.
async fn answer(tls: &mut TlsStream<TcpStream>) -> String {
    let first = async {
        loop {
            let Ok(frame) = read_frame(tls).await else {
                return "closed".to_owned();
            };
            match frame.kind {
                HEADERS if frame.stream == 1 => {
                    return format!("status {}", status(&frame.payload));
                }
                RST_STREAM if frame.stream == 1 => {
                    return format!("reset {}", code(&frame.payload, 0));
                }
                GOAWAY => return format!("goaway {}", code(&frame.payload, 4)),
                _ => {}
            }
        }
    };
    timeout(PATIENCE, first)
        .await
        .unwrap_or_else(|_| "open".to_owned())
}

fn code(payload: &[u8], at: usize) -> u32 {
    let bytes = payload
        .get(at..at + 4)
        .and_then(|bytes| bytes.try_into().ok());
    bytes.map_or(u32::MAX, u32::from_be_bytes)
}

/// The status of a header block: indexed from the static table, or a literal of three digits.
fn status(block: &[u8]) -> String {
    match block.first() {
        Some(0x88) => "200".to_owned(),
        Some(0x8c) => "400".to_owned(),
        Some(0x8d) => "404".to_owned(),
        Some(0x8e) => "500".to_owned(),
        _ => huffman_or_plain(block),
    }
}

fn huffman_or_plain(block: &[u8]) -> String {
    match block {
        [_, 3, digits @ ..] if digits.len() >= 3 => {
            String::from_utf8_lossy(&digits[..3]).into_owned()
        }
        // RFC 7541, appendix B: a digit is 5 bits (0, 1, 2) or 6 bits (3 to 9: 0x19 and up).
        [_, length, rest @ ..] if length & 0x80 != 0 => {
            digits(&rest[..usize::from(length & 0x7f).min(rest.len())])
        }
        _ => format!("{block:02x?}"),
    }
}

fn digits(bytes: &[u8]) -> String {
    let bits: Vec<u8> = bytes
        .iter()
        .flat_map(|byte| (0..8).rev().map(move |bit| byte >> bit & 1))
        .collect();
    let take = |at: usize, n: usize| {
        bits.get(at..at + n)
            .map(|bits| bits.iter().fold(0u8, |value, bit| value << 1 | bit))
    };
    let (mut text, mut at) = (String::new(), 0);
    while text.len() < 3 {
        match (take(at, 5), take(at, 6)) {
            (Some(value @ 0..=2), _) => {
                text.push(char::from(b'0' + value));
                at += 5;
            }
            (_, Some(value @ 0x19..=0x1f)) => {
                text.push(char::from(b'3' + value - 0x19));
                at += 6;
            }
            _ => return format!("{bytes:02x?}"),
        }
    }
    text
}

async fn request(options: &Options, block: &[u8]) -> Result<String> {
    let mut tls = open(options).await?;
    tls.write_all(&frame(HEADERS, END_HEADERS, 1, block))
        .await?;
    Ok(answer(&mut tls).await)
}

async fn header_flood(options: &Options) -> Result<String> {
    let mut tls = open(options).await?;
    let value = "v".repeat(15_000);
    let mut list = vec![
        (":method", "CONNECT"),
        (":authority", options.authority.as_str()),
    ];
    list.extend([("x-flood", value.as_str()); 40]);
    let block = fields(&list);
    let mut pieces = block.chunks(16_000).peekable();
    let mut kind = HEADERS;
    while let Some(piece) = pieces.next() {
        let flags = if pieces.peek().is_none() {
            END_HEADERS
        } else {
            0
        };
        if tls.write_all(&frame(kind, flags, 1, piece)).await.is_err() {
            break;
        }
        kind = CONTINUATION;
    }
    Ok(answer(&mut tls).await)
}

/// A header block that never ends (CVE-2024-27316 and its kin).
async fn continuation_flood(options: &Options) -> Result<String> {
    let mut tls = open(options).await?;
    tls.write_all(&frame(HEADERS, 0, 1, &connect(&options.authority)))
        .await?;
    let piece = fields(&[("x-flood", &"v".repeat(1000))]);
    for sent in 0..100_000 {
        if tls
            .write_all(&frame(CONTINUATION, 0, 1, &piece))
            .await
            .is_err()
        {
            return Ok(format!("cut after {sent}"));
        }
    }
    Ok("taken".to_owned())
}

/// Requests that are reset at once, over and over (CVE-2023-44487).
async fn rapid_reset(options: &Options) -> Result<String> {
    let mut tls = open(options).await?;
    let block = connect(&options.authority);
    for number in 0..50_000u32 {
        let stream = 2 * number + 1;
        let mut bytes = frame(HEADERS, END_HEADERS, stream, &block);
        bytes.extend(frame(RST_STREAM, 0, stream, &8u32.to_be_bytes()));
        if tls.write_all(&bytes).await.is_err() {
            return Ok(format!("cut after {number}"));
        }
    }
    match answer(&mut tls).await.as_str() {
        "open" => Ok("taken".to_owned()),
        end => Ok(format!("cut: {end}")),
    }
}

/// A connection that shows a good certificate and then says nothing at all.
async fn silent(options: &Options) -> Result<String> {
    let mut tls = connect_tls(options, Some(Leaf::default())).await?;
    Ok(until_end(&mut tls).await)
}

/// What we may still send (RFC 9113 6.9).
struct Windows {
    connection: i64,
    stream: i64,
}

impl Windows {
    fn learn(&mut self, frame: &Frame) {
        match frame.kind {
            WINDOW_UPDATE if frame.stream == 0 => {
                self.connection += i64::from(code(&frame.payload, 0))
            }
            WINDOW_UPDATE => self.stream += i64::from(code(&frame.payload, 0)),
            SETTINGS => {
                for setting in frame
                    .payload
                    .chunks_exact(6)
                    .filter(|setting| setting[..2] == [0, 4])
                {
                    self.stream += i64::from(code(setting, 2)) - 65_535;
                }
            }
            _ => {}
        }
    }
}

/// Sends to an echo and never grants it a window: whether the tunnel stops taking bytes, and how many MiB it took.
async fn stop_reading(options: &Options) -> Result<String> {
    const BLOCK: i64 = 16_000;
    let mut tls = open(options).await?;
    tls.write_all(&frame(
        HEADERS,
        END_HEADERS,
        1,
        &connect(&options.authority),
    ))
    .await?;
    let block = frame(DATA, 0, 1, &[b'E'; 16_000]);
    let mut windows = Windows {
        connection: 65_535,
        stream: 65_535,
    };
    let mut taken = 0;
    while taken < 1 << 30 {
        if windows.connection.min(windows.stream) >= BLOCK {
            tls.write_all(&block).await?;
            windows.connection -= BLOCK;
            windows.stream -= BLOCK;
            taken += BLOCK;
            continue;
        }
        match timeout(Duration::from_secs(3), read_frame(&mut tls)).await {
            Ok(Ok(frame)) => windows.learn(&frame),
            Ok(Err(error)) => return Ok(format!("cut after {taken}: {error}")),
            Err(_) => return Ok(format!("held at {} MiB", taken >> 20)),
        }
    }
    Ok("taken".to_owned())
}
