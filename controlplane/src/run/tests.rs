use std::{net::SocketAddr, path::Path};

use clap::Parser as _;
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    sync::oneshot,
    task::JoinHandle,
};

use super::{ControlPlane, RunError};
use crate::{
    config::{Args, Config},
    testing::{DEADLINE, Issuer, NAME, Subscriber, channel},
};

/// A whole control plane over a folder, in this process.
struct Running {
    xds: SocketAddr,
    admin: SocketAddr,
    stop: oneshot::Sender<()>,
    task: JoinHandle<Result<(), RunError>>,
}

fn config(dir: &Path, issuer: &Issuer) -> Config {
    let path = |name: &str| dir.join(name).to_str().unwrap().to_owned();
    std::fs::create_dir_all(dir.join("mesh")).unwrap();
    let jwks = issuer.path().to_str().unwrap().to_owned();
    let args = [
        "controlplane".to_owned(),
        format!("--folder={}", path("mesh")),
        format!("--ca-dir={}", path("ca")),
        format!("--jwks={jwks}"),
        "--xds-listen=127.0.0.1:0".to_owned(),
        "--admin-listen=127.0.0.1:0".to_owned(),
        "--shutdown-seconds=20".to_owned(),
    ];
    Config::try_from(Args::parse_from(args)).unwrap()
}

async fn start(dir: &Path, issuer: &Issuer) -> Running {
    let plane = ControlPlane::bind(config(dir, issuer)).await.unwrap();
    let (stop, stopped) = oneshot::channel();
    Running {
        xds: plane.xds_address().unwrap(),
        admin: plane.admin_address().unwrap(),
        stop,
        task: tokio::spawn(plane.serve(async {
            drop(stopped.await);
        })),
    }
}

/// Status line and body.
async fn get(address: SocketAddr, path: &str) -> (String, String) {
    let exchange = async {
        let mut stream = TcpStream::connect(address).await?;
        let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await?;
        let mut text = String::new();
        stream.read_to_string(&mut text).await?;
        Ok::<_, std::io::Error>(text)
    };
    let text = tokio::time::timeout(DEADLINE, exchange)
        .await
        .unwrap()
        .unwrap();
    let (head, body) = text.split_once("\r\n\r\n").unwrap();
    (head.lines().next().unwrap().to_owned(), body.to_owned())
}

async fn proxy(running: &Running, dir: &Path, issuer: &Issuer) -> Subscriber {
    // The root on disk is what a client is given.
    let pem = std::fs::read(dir.join("ca/root-cert.pem")).unwrap();
    let mut roots = rustls::RootCertStore::empty();
    for root in crate::ca::pem::certificates(&pem).unwrap() {
        roots.add(root).unwrap();
    }
    let channel = channel(running.xds, roots, None).await.unwrap();
    let token = issuer.token("istio-system", "ztunnel", "ztunnel-1");
    Subscriber::open(channel, &token).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn it_starts_serves_ends_and_starts_again_with_the_same_root() {
    let (dir, issuer) = (TempDir::new().unwrap(), Issuer::new());
    let mut roots = Vec::new();
    for _ in 0..2 {
        let running = start(dir.path(), &issuer).await;
        let mut proxy = proxy(&running, dir.path(), &issuer).await;
        proxy.subscribe_all();
        proxy.acked().await;
        let (status, body) = get(running.admin, "/ready").await;
        assert_eq!((&*status, body.trim()), ("HTTP/1.1 200 OK", "ready"));
        let (_, syncz) = get(running.admin, "/debug/syncz").await;
        let syncz: serde_json::Value = serde_json::from_str(&syncz).unwrap();
        assert_eq!(syncz[0]["proxy"], "ztunnel-1.istio-system");
        let address = &syncz[0]["resources"][proto::ADDRESS_TYPE_URL];
        assert_eq!(address["sent"].as_str().map(str::is_empty), Some(false));
        roots.push(std::fs::read(dir.path().join("ca/root-cert.pem")).unwrap());
        running.stop.send(()).unwrap();
        while let Ok(Some(_)) = proxy.message().await {}
        drop(proxy);
        let ended = tokio::time::timeout(DEADLINE, running.task).await;
        ended.expect("within its grace").unwrap().unwrap();
    }
    assert_eq!(roots[0], roots[1]);
}

#[tokio::test(flavor = "multi_thread")]
async fn every_admin_endpoint_answers() {
    let (dir, issuer) = (TempDir::new().unwrap(), Issuer::new());
    let running = start(dir.path(), &issuer).await;
    for (path, part) in [
        ("/", "/debug/syncz"),
        ("/ready", "ready"),
        ("/metrics", "istio_build{component=\"pilot\""),
        ("/version", "controlplane"),
        ("/status", "["),
        ("/debug/syncz", "[]"),
        ("/debug/ambientz", "\"workloads\":["),
        ("/debug/connections", "\"totalClients\":0"),
        ("/debug/list", "/status"),
    ] {
        let (status, body) = get(running.admin, path).await;
        assert_eq!(status, "HTTP/1.1 200 OK", "{path}");
        assert!(body.contains(part), "{path}: {body}");
    }
    let (status, _) = get(running.admin, "/nothing").await;
    assert_eq!(status, "HTTP/1.1 404 Not Found");
    running.stop.send(()).unwrap();
    running.task.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_start_that_cannot_succeed_says_why() {
    let (dir, issuer) = (TempDir::new().unwrap(), Issuer::new());
    let good = config(dir.path(), &issuer);
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let bad = |change: &dyn Fn(&mut Config)| {
        let mut config = good.clone();
        change(&mut config);
        config
    };
    for (config, message) in [
        (
            bad(&|it| it.jwks = Some("/nowhere".into())),
            "read the keys in /nowhere",
        ),
        (
            bad(&|it| it.xds_listen = taken.local_addr().unwrap()),
            "listen on 127.0.0.1",
        ),
        (
            bad(&|it| it.ca.source = crate::config::CaSource::PlugIn(dir.path().into())),
            "missing: ca-cert.pem",
        ),
        (
            bad(&|it| it.serving_names = vec!["höst".to_owned()]),
            "write the name",
        ),
    ] {
        let error = anyhow::Error::from(ControlPlane::bind(config).await.unwrap_err());
        let chain = format!("{error:#}");
        assert!(chain.contains(message), "{chain}");
    }
    assert!(good.serving_names.iter().any(|name| name == NAME));
}
