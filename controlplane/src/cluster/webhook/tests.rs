use std::net::SocketAddr;

use mesh::identity::TrustDomain;
use rustls::{ClientConfig, RootCertStore, pki_types::ServerName};
use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio_rustls::TlsConnector;

use super::*;
use crate::{
    ca::{Current, disk, serving::ServingCertificate},
    testing::{DEADLINE, NAME},
};

struct Served {
    address: SocketAddr,
    roots: RootCertStore,
    metrics: Arc<Metrics>,
    drain: drain::Trigger,
    task: tokio::task::JoinHandle<Result<(), rustls::Error>>,
}

async fn serve() -> Served {
    let dir = tempfile::tempdir().unwrap();
    let authority = disk::load_or_create(dir.path(), &TrustDomain::default()).unwrap();
    let roots = authority.root_store().unwrap();
    let serving =
        ServingCertificate::issue(Current::new(authority), vec![NAME.to_owned()]).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (trigger, drain) = drain::channel();
    let metrics = Metrics::new();
    let webhook = Webhook::new(metrics.clone());
    Served {
        address,
        roots,
        metrics,
        drain: trigger,
        task: tokio::spawn(webhook.serve(listener, Arc::new(serving), drain)),
    }
}

impl Served {
    /// The status code, and the body.
    async fn send(&self, head: &str, body: &[u8]) -> (u16, String) {
        self.claim(head, body.len(), body).await
    }

    /// As [`Served::send`], with a length that need not be the body's.
    async fn claim(&self, head: &str, length: usize, body: &[u8]) -> (u16, String) {
        let provider = Arc::new(aws_lc_rs::default_provider());
        let config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(self.roots.clone())
            .with_no_client_auth();
        let exchange = async {
            let stream = TcpStream::connect(self.address).await.unwrap();
            let name = ServerName::try_from(NAME).unwrap();
            let connector = TlsConnector::from(Arc::new(config));
            let mut stream = connector.connect(name, stream).await.unwrap();
            let head = format!(
                "{head} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n"
            );
            stream.write_all(head.as_bytes()).await.unwrap();
            stream.write_all(body).await.unwrap();
            let mut answer = Vec::new();
            let _ = stream.read_to_end(&mut answer).await;
            String::from_utf8(answer).unwrap()
        };
        let answer = tokio::time::timeout(DEADLINE, exchange).await.unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        (
            head.split(' ').nth(1).unwrap().parse().unwrap(),
            body.to_owned(),
        )
    }

    async fn review(&self, object: serde_json::Value) -> serde_json::Value {
        let review = json!({
            "apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview",
            "request": {"uid": "u", "operation": "CREATE", "object": object},
        });
        let (code, body) = self
            .send("POST /validate?timeout=5s", review.to_string().as_bytes())
            .await;
        assert_eq!(code, 200, "{body}");
        serde_json::from_str(&body).unwrap()
    }
}

#[tokio::test]
async fn reviews_are_answered_over_tls_and_counted() {
    let served = serve().await;
    let policy = |spec| {
        json!({
            "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
            "metadata": {"name": "p", "namespace": "a"}, "spec": spec,
        })
    };
    let answer = served.review(policy(json!({"action": "DENY"}))).await;
    assert_eq!(answer["response"]["allowed"], false);
    let answer = served.review(policy(json!({}))).await;
    assert_eq!(answer["response"], json!({"uid": "u", "allowed": true}));
    for (head, body, expected) in [
        ("POST /validate", "nonsense", 400),
        ("POST /validate", "{}", 400),
        ("GET /validate", "", 404),
        ("POST /inject", "{}", 404),
    ] {
        assert_eq!(
            served.send(head, body.as_bytes()).await.0,
            expected,
            "{head}"
        );
    }
    let text = served.metrics.text();
    for line in [
        "galley_validation_passed 1",
        "galley_validation_failed 1",
        "galley_validation_http_error 4",
    ] {
        assert!(text.lines().any(|known| known == line), "{line}");
    }
    served.drain.start(net::drain::Mode::Immediate);
    served.task.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_body_that_says_it_is_too_long_is_refused_unread() {
    let served = serve().await;
    let (code, _) = served.claim("POST /validate", MAX_BODY + 1, b"").await;
    assert_eq!(code, 413);
}
