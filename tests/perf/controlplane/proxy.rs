//! Node tunnels, as far as a control plane can tell: TLS, HTTP/2, delta xDS with acknowledgements, requests for
//! certificates. A response is walked through and not decoded.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
    time::Instant,
};

use anyhow::{Context as _, Result, bail, ensure};
use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use h2::{RecvStream, SendStream, client::SendRequest};
use http::Request;
use proto::{
    ADDRESS_TYPE_URL, AUTHORIZATION_TYPE_URL, ca::IstioCertificateRequest,
    xds::DeltaDiscoveryRequest, xds_core::Node,
};
use rustls::{
    ClientConfig, DigitallySignedStruct, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::aws_lc_rs,
};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use tokio::{
    net::TcpStream,
    sync::{mpsc, oneshot},
};
use tokio_rustls::TlsConnector;

/// What a tunnel would have room for.
const WINDOW: u32 = 4 << 20;

/// When a change was seen.
pub(crate) struct Landed {
    pub(crate) first: Instant,
    pub(crate) last: Instant,
}

struct Expected {
    missing: usize,
    first: Option<Instant>,
    done: oneshot::Sender<Landed>,
}

/// Changes that are on their way.
#[derive(Default)]
pub(crate) struct Landings(Mutex<HashMap<String, Expected>>);

impl Landings {
    /// Completes when so many subscribers have got a resource of this name.
    pub(crate) fn expect(&self, name: &str, subscribers: usize) -> oneshot::Receiver<Landed> {
        let (done, landed) = oneshot::channel();
        let expected = Expected {
            missing: subscribers,
            first: None,
            done,
        };
        let mut all = self
            .0
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        all.insert(name.to_owned(), expected);
        landed
    }

    fn saw(&self, name: &[u8]) {
        let Ok(name) = std::str::from_utf8(name) else {
            return;
        };
        let now = Instant::now();
        let mut all = self
            .0
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        let Some(expected) = all.get_mut(name) else {
            return;
        };
        let first = *expected.first.get_or_insert(now);
        expected.missing = expected.missing.saturating_sub(1);
        if expected.missing == 0
            && let Some(expected) = all.remove(name)
        {
            drop(expected.done.send(Landed { first, last: now }));
        }
    }
}

/// How to reach the control plane.
#[derive(Clone)]
pub(crate) struct Connector {
    port: u16,
    tls: TlsConnector,
}

/// Whoever answers on the port that we gave it.
#[derive(Debug)]
struct Anyone(Arc<rustls::crypto::CryptoProvider>);

impl ServerCertVerifier for Anyone {
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
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        rustls::crypto::verify_tls12_signature(message, certificate, signed, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, certificate, signed, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

impl Connector {
    pub(crate) fn new(port: u16) -> Self {
        let provider = Arc::new(aws_lc_rs::default_provider());
        let mut config = ClientConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .expect("TLS 1.3 is there")
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(Anyone(provider)))
            .with_no_client_auth();
        config.alpn_protocols = vec![b"h2".to_vec()];
        Self {
            port,
            tls: Arc::new(config).into(),
        }
    }

    async fn connect(&self) -> Result<SendRequest<Bytes>> {
        let stream = TcpStream::connect(("127.0.0.1", self.port)).await?;
        stream.set_nodelay(true)?;
        let name = ServerName::try_from("istiod.istio-system.svc")?;
        let stream = self.tls.connect(name, stream).await.context("TLS")?;
        let mut builder = h2::client::Builder::new();
        builder
            .initial_window_size(WINDOW)
            .initial_connection_window_size(WINDOW);
        let (requests, connection) = builder.handshake(stream).await?;
        // Its end shows on the streams.
        tokio::spawn(async move { drop(connection.await) });
        Ok(requests)
    }

    async fn call(
        &self,
        requests: &SendRequest<Bytes>,
        node: usize,
        method: &str,
    ) -> Result<(h2::client::ResponseFuture, SendStream<Bytes>)> {
        let request = Request::post(format!("https://istiod.istio-system.svc/{method}"))
            .header("content-type", "application/grpc")
            .header("te", "trailers")
            .header("authorization", format!("Bearer ztunnel-{node}"))
            .body(())?;
        let mut ready = requests.clone().ready().await?;
        Ok(ready.send_request(request, false)?)
    }
}

/// A gRPC message with its prefix.
fn framed(message: &impl prost::Message) -> Bytes {
    let mut frame = BytesMut::with_capacity(5 + message.encoded_len());
    frame.put_u8(0);
    frame.put_u32(u32::try_from(message.encoded_len()).unwrap_or(u32::MAX));
    frame.put_slice(&message.encode_to_vec());
    frame.freeze()
}

/// The messages of a response's body.
struct Messages {
    body: RecvStream,
    buffer: BytesMut,
}

impl Messages {
    async fn next(&mut self) -> Result<Option<Bytes>> {
        loop {
            if let Some(head) = self.buffer.get(1..5) {
                let length = u32::from_be_bytes([head[0], head[1], head[2], head[3]]) as usize;
                if self.buffer.len() >= 5 + length {
                    self.buffer.advance(5);
                    return Ok(Some(self.buffer.split_to(length).freeze()));
                }
            }
            let Some(data) = self.body.data().await else {
                let trailers = self.body.trailers().await?;
                let code = trailers.as_ref().and_then(|t| t.get("grpc-status"));
                ensure!(
                    code.is_none_or(|code| code == "0"),
                    "ended with {trailers:?}"
                );
                return Ok(None);
            };
            let data = data?;
            self.body.flow_control().release_capacity(data.len())?;
            self.buffer.extend_from_slice(&data);
        }
    }
}

/// One node tunnel's stream.
pub(crate) struct Proxy {
    requests: SendStream<Bytes>,
    messages: Messages,
    _connection: SendRequest<Bytes>,
}

/// What of a response is needed.
#[derive(Default)]
struct Walked {
    resources: usize,
    nonce: String,
    type_url: String,
}

impl Proxy {
    pub(crate) async fn open(connector: &Connector, node: usize) -> Result<Self> {
        let connection = connector.connect().await?;
        let method =
            "envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources";
        let (response, mut requests) = connector.call(&connection, node, method).await?;
        let who = Node {
            id: format!("ztunnel~10.0.0.1~ztunnel-{node}.istio-system~cluster.local"),
            ..Node::default()
        };
        for (type_url, node) in [
            (ADDRESS_TYPE_URL, Some(who)),
            (AUTHORIZATION_TYPE_URL, None),
        ] {
            let subscribe = DeltaDiscoveryRequest {
                type_url: type_url.to_owned(),
                node,
                ..DeltaDiscoveryRequest::default()
            };
            requests.send_data(framed(&subscribe), false)?;
        }
        let response = response.await?;
        if let Some(status) = response.headers().get("grpc-status") {
            bail!(
                "refused: {status:?} {:?}",
                response.headers().get("grpc-message")
            );
        }
        Ok(Self {
            requests,
            messages: Messages {
                body: response.into_body(),
                buffer: BytesMut::new(),
            },
            _connection: connection,
        })
    }

    /// Reads and acknowledges, forever. Says once that it has as many resources as there are, or why it never will.
    pub(crate) async fn run(
        mut self,
        expected: usize,
        landings: &Landings,
        whole: mpsc::Sender<Result<()>>,
    ) {
        let mut word = Some(whole);
        let mut have = 0;
        let ended = loop {
            let message = match self.messages.next().await {
                Ok(Some(message)) => message,
                Ok(None) => break anyhow::anyhow!("the stream ended"),
                Err(error) => break error,
            };
            let walked = match walk(&message, word.is_none().then_some(landings)) {
                Ok(walked) => walked,
                Err(error) => break error,
            };
            have += walked.resources;
            let ack = DeltaDiscoveryRequest {
                type_url: walked.type_url,
                response_nonce: walked.nonce,
                ..DeltaDiscoveryRequest::default()
            };
            if let Err(error) = self.requests.send_data(framed(&ack), false) {
                break error.into();
            }
            if have >= expected
                && let Some(whole) = word.take()
            {
                drop(whole.send(Ok(())).await);
            }
        };
        if let Some(whole) = word {
            drop(whole.send(Err(ended)).await);
        }
    }
}

/// Walks over the fields of a `DeltaDiscoveryResponse`: resources 2, type_url 4, nonce 5.
fn walk(message: &[u8], landings: Option<&Landings>) -> Result<Walked> {
    let mut walked = Walked::default();
    fields(message, |field, value| {
        match field {
            2 => {
                walked.resources += 1;
                if let Some(landings) = landings {
                    // `Resource.name` is 3.
                    fields(value, |field, value| {
                        if field == 3 {
                            landings.saw(value);
                        }
                    })?;
                }
            }
            4 => walked.type_url = String::from_utf8(value.to_vec())?,
            5 => walked.nonce = String::from_utf8(value.to_vec())?,
            _ => {}
        }
        Ok(())
    })?;
    Ok(walked)
}

fn fields<'m, R: Outcome>(
    mut message: &'m [u8],
    mut each: impl FnMut(u64, &'m [u8]) -> R,
) -> Result<()> {
    while !message.is_empty() {
        let tag = prost::encoding::decode_varint(&mut message)?;
        let length = match tag & 7 {
            0 => {
                prost::encoding::decode_varint(&mut message)?;
                continue;
            }
            1 => 8,
            2 => usize::try_from(prost::encoding::decode_varint(&mut message)?)?,
            5 => 4,
            other => bail!("wire type {other}"),
        };
        let value = message.get(..length).context("cut short")?;
        message = &message[length..];
        if tag & 7 == 2 {
            each(tag >> 3, value).outcome()?;
        }
    }
    Ok(())
}

/// Visitors may fail, or not.
trait Outcome {
    fn outcome(self) -> Result<()>;
}

impl Outcome for () {
    fn outcome(self) -> Result<()> {
        Ok(())
    }
}

impl Outcome for Result<()> {
    fn outcome(self) -> Result<()> {
        self
    }
}

/// Asks for certificates, one after the other on each of four streams, until `end`; answers with how many came.
pub(crate) async fn certificates(
    connector: &Connector,
    node: usize,
    identity: &str,
    end: Instant,
) -> Result<u64> {
    let connection = connector.connect().await?;
    let key = rcgen::KeyPair::generate()?;
    let csr = rcgen::CertificateParams::default().serialize_request(&key)?;
    let value = prost_types::Value {
        kind: Some(prost_types::value::Kind::StringValue(identity.to_owned())),
    };
    let request = framed(&IstioCertificateRequest {
        csr: csr.pem()?,
        validity_duration: 3600,
        metadata: Some(prost_types::Struct {
            fields: [("ImpersonatedIdentity".to_owned(), value)].into(),
        }),
    });
    let ask = || async {
        let mut count = 0;
        while Instant::now() < end {
            let method = "istio.v1.auth.IstioCertificateService/CreateCertificate";
            let (response, mut stream) = connector.call(&connection, node, method).await?;
            stream.send_data(request.clone(), true)?;
            let response = response.await?;
            let refused = response.headers().get("grpc-status").cloned();
            ensure!(
                refused.is_none(),
                "no certificate: {:?}",
                response.headers()
            );
            let mut messages = Messages {
                body: response.into_body(),
                buffer: BytesMut::new(),
            };
            messages.next().await?.context("an empty answer")?;
            // To its trailers: a stream that is dropped before them counts as an abuse of the connection.
            ensure!(messages.next().await?.is_none(), "a second answer");
            count += 1;
        }
        Ok::<u64, anyhow::Error>(count)
    };
    let (a, b, c, d) = tokio::try_join!(ask(), ask(), ask(), ask())?;
    Ok(a + b + c + d)
}
