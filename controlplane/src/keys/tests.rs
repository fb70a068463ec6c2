use std::{collections::HashMap, net::SocketAddr, sync::Arc};

use net::tls::{KeyExchange, Originator, Policy, Versions};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpListener,
};

use super::{FetchError, Fetcher, Reach};
use crate::translate::l7::istio::request_authentication::KeySource;

const KEYS: &str = r#"{"keys": [{"kty": "RSA", "n": "AQAB", "e": "AQAB"}]}"#;

fn fetcher(reach: Reach) -> Fetcher {
    let clock = Arc::new(net::clock::SystemClock);
    let policy = Policy::new(Versions::Tls12And13, KeyExchange::Default, clock);
    Fetcher::new(Originator::new(policy), reach)
}

/// Answers each path with a status line and a body, `ADDRESS` in them being its own.
async fn server(pages: &[(&str, &str, String)]) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let pages: HashMap<String, (String, String)> = pages
        .iter()
        .map(|(path, head, body)| {
            let own = |text: &str| text.replace("ADDRESS", &address.to_string());
            ((*path).to_owned(), (own(head), own(body)))
        })
        .collect();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut request = vec![0; 4096];
            let read = stream.read(&mut request).await.unwrap_or_default();
            let text = String::from_utf8_lossy(&request[..read]).into_owned();
            let path = text.split(' ').nth(1).unwrap_or_default().to_owned();
            let missing = ("404 Not Found".to_owned(), String::new());
            let (head, body) = pages.get(&path).unwrap_or(&missing);
            let answer = format!(
                "HTTP/1.1 {head}\r\ncontent-length: {}\r\n\r\n{body}",
                body.len()
            );
            let _ = stream.write_all(answer.as_bytes()).await;
        }
    });
    address
}

async fn fetch(
    pages: &[(&str, &str, String)],
    of: impl Fn(SocketAddr) -> KeySource,
) -> Result<String, FetchError> {
    let address = server(pages).await;
    fetcher(Reach::Local).fetch(&of(address)).await
}

fn url(path: &'static str) -> impl Fn(SocketAddr) -> KeySource {
    move |address| KeySource::Url(format!("http://{address}{path}").into())
}

#[tokio::test]
async fn keys_are_found_by_url_by_redirect_and_by_the_issuers_configuration() {
    let discovery = r#"{"issuer": "http://ADDRESS", "jwks_uri": "http://ADDRESS/keys"}"#;
    let pages = [
        ("/keys", "200 OK", KEYS.to_owned()),
        ("/moved", "302 Found\r\nlocation: /keys", String::new()),
        (
            "/.well-known/openid-configuration",
            "200 OK",
            discovery.to_owned(),
        ),
    ];
    assert_eq!(fetch(&pages, url("/keys")).await.unwrap(), KEYS);
    assert_eq!(fetch(&pages, url("/moved")).await.unwrap(), KEYS);
    let issuer = |address| KeySource::Issuer(format!("http://{address}").into());
    assert_eq!(fetch(&pages, issuer).await.unwrap(), KEYS);
}

#[tokio::test]
async fn what_is_no_set_of_keys_is_refused() {
    let pages = [
        ("/text", "200 OK", "hello".to_owned()),
        ("/empty", "200 OK", r#"{"keys": []}"#.to_owned()),
        (
            "/large",
            "200 OK",
            format!(
                "{{\"keys\": [{{}}], \"x\": \"{}\"}}",
                "x".repeat(1024 * 1024)
            ),
        ),
        ("/loop", "302 Found\r\nlocation: /loop", String::new()),
        ("/nowhere", "302 Found", String::new()),
        (
            "/.well-known/openid-configuration",
            "200 OK",
            r#"{"issuer": "http://other", "jwks_uri": "http://ADDRESS/keys"}"#.to_owned(),
        ),
    ];
    let table = [
        ("/text", "set of keys"),
        ("/empty", "set of keys"),
        ("/large", "more than 1 MiB"),
        ("/loop", "too often"),
        ("/nowhere", "to nowhere"),
        ("/gone", "404"),
    ];
    for (path, expected) in table {
        let error = fetch(&pages, url(path)).await.unwrap_err().to_string();
        assert!(error.contains(expected), "{path}: {error}");
    }
    let issuer = |address| KeySource::Issuer(format!("http://{address}").into());
    let error = fetch(&pages, issuer).await.unwrap_err().to_string();
    assert!(error.contains("configuration of this issuer"), "{error}");
}

#[tokio::test]
async fn addresses_of_this_machine_and_of_the_link_are_not_asked() {
    let strict = fetcher(Reach::Others);
    for url in [
        "http://127.0.0.1:1/keys",
        "http://[::1]:1/keys",
        "http://169.254.169.254/keys",
        "http://0.0.0.0/keys",
    ] {
        let error = strict.fetch(&KeySource::Url(url.into())).await.unwrap_err();
        assert!(matches!(error, FetchError::Address(_)), "{url}: {error}");
    }
    for url in ["ftp://a/b", "a", "http://user@a/b"] {
        let error = strict.fetch(&KeySource::Url(url.into())).await.unwrap_err();
        assert!(matches!(error, FetchError::Url(_)), "{url}: {error}");
    }
}

/// Paused time passes while nothing else is to be done.
#[tokio::test(start_paused = true)]
async fn a_server_that_never_answers_is_given_up() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let silent = listener.local_addr().unwrap();
    let source = KeySource::Url(format!("http://{silent}/keys").into());
    let error = fetcher(Reach::Local).fetch(&source).await.unwrap_err();
    assert!(matches!(error, FetchError::Timeout), "{error}");
}
