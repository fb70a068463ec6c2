use std::{net::SocketAddr, path::Path};

use clap::Parser as _;
use proto::ca::istio_certificate_service_client::IstioCertificateServiceClient;
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
    testing::{DEADLINE, Issuer, NAME, Subscriber, bearer, channel, csr, names},
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
    let (head, body) = ask(address, path, "").await;
    (head.lines().next().unwrap().to_owned(), body)
}

/// With header lines; answers with the head and the body.
async fn ask(address: SocketAddr, path: &str, headers: &str) -> (String, String) {
    let exchange = async {
        let mut stream = TcpStream::connect(address).await?;
        let request =
            format!("GET {path} HTTP/1.1\r\nHost: x\r\n{headers}Connection: close\r\n\r\n");
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
    (head.to_owned(), body.to_owned())
}

async fn trusted(running: &Running, dir: &Path) -> tonic::transport::Channel {
    // The root on disk is what a client is given.
    let pem = std::fs::read(dir.join("ca/root-cert.pem")).unwrap();
    let mut roots = rustls::RootCertStore::empty();
    for root in crate::ca::pem::certificates(&pem).unwrap() {
        roots.add(root).unwrap();
    }
    channel(running.xds, roots, None).await.unwrap()
}

async fn proxy(running: &Running, dir: &Path, issuer: &Issuer) -> Subscriber {
    let channel = trusted(running, dir).await;
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
        ("/debug/configz", "["),
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

#[tokio::test(flavor = "multi_thread")]
async fn a_scraper_gets_the_text_that_it_accepts() {
    let (dir, issuer) = (TempDir::new().unwrap(), Issuer::new());
    let running = start(dir.path(), &issuer).await;
    let (classic, body) = ask(running.admin, "/metrics", "").await;
    assert!(classic.contains("content-type: text/plain; version=0.0.4"));
    assert!(body.contains("istio_build{component=\"pilot\"") && !body.contains("# EOF"));
    let accept = "Accept: application/openmetrics-text; version=1.0.0\r\n";
    let (open, body) = ask(running.admin, "/metrics", accept).await;
    assert!(open.contains("content-type: application/openmetrics-text; version=1.0.0"));
    assert!(body.contains("istio_build{component=\"pilot\"") && body.contains("# EOF\n"));
    running.stop.send(()).unwrap();
    running.task.await.unwrap().unwrap();
}

const SHOP: &str = "
apiVersion: v1
kind: Namespace
metadata: {name: shop}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec:
  clusterIP: 10.96.0.10
  selector: {app: web}
  ports: [{port: 80, targetPort: 8080}]
";

fn web(revision: &str) -> String {
    format!(
        "
apiVersion: v1
kind: Pod
metadata:
  name: web-1
  namespace: shop
  uid: web-1-uid
  labels: {{app: web, version: {revision}}}
spec:
  nodeName: node-1
  serviceAccountName: web
  containers: [{{name: web, image: x}}]
status:
  phase: Running
  podIPs: [{{ip: 10.244.1.5}}]
  conditions: [{{type: Ready, status: 'True'}}]
"
    )
}

const TUNNEL: &str = "
apiVersion: v1
kind: Pod
metadata: {name: ztunnel-1, namespace: istio-system, uid: ztunnel-1-uid}
spec:
  nodeName: node-1
  serviceAccountName: ztunnel
  containers: [{name: z, image: x}]
status:
  phase: Running
  podIPs: [{ip: 10.244.1.2}]
";

#[tokio::test(flavor = "multi_thread")]
async fn a_folder_becomes_a_mesh_and_its_edits_reach_proxies() {
    let (dir, issuer) = (TempDir::new().unwrap(), Issuer::new());
    let running_config = config(dir.path(), &issuer);
    let write = |file: &str, text: &str| {
        let staged = dir.path().join(file);
        std::fs::write(&staged, text).unwrap();
        std::fs::rename(staged, dir.path().join("mesh").join(file)).unwrap();
    };
    write("shop.yaml", SHOP);
    write("web.yaml", &web("v1"));
    write("tunnel.yaml", TUNNEL);
    assert_eq!(running_config.folders.len(), 1);
    let running = start(dir.path(), &issuer).await;
    let mut proxy = proxy(&running, dir.path(), &issuer).await;
    proxy.subscribe(proto::ADDRESS_TYPE_URL, &[], &[]);
    let world = proxy.acked().await;
    let service = "shop/web.shop.svc.cluster.local";
    let (pod, tunnel) = (
        "Kubernetes//Pod/shop/web-1",
        "Kubernetes//Pod/istio-system/ztunnel-1",
    );
    assert_eq!(names(&world), [tunnel, pod, service]);

    write("web.yaml", &web("v2"));
    assert_eq!(names(&proxy.acked().await), [pod]);
    std::fs::remove_file(dir.path().join("mesh/web.yaml")).unwrap();
    assert_eq!(proxy.acked().await.removed_resources, [pod]);
    write("web.yaml", &web("v3"));
    assert_eq!(names(&proxy.acked().await), [pod]);

    let (_, ambientz) = get(running.admin, "/debug/ambientz").await;
    let ambientz: serde_json::Value = serde_json::from_str(&ambientz).unwrap();
    let workloads = ambientz["workloads"].as_array().unwrap();
    let uids: Vec<_> = workloads
        .iter()
        .filter_map(|it| it["uid"].as_str())
        .collect();
    assert_eq!(uids, [tunnel, pod]);
    let (_, status) = get(running.admin, "/status").await;
    assert!(status.contains("shop.yaml"), "{status}");

    let token = issuer.token("istio-system", "ztunnel", "ztunnel-1");
    let certificate = async |identity: &str| {
        let mut client = IstioCertificateServiceClient::new(trusted(&running, dir.path()).await);
        client
            .create_certificate(bearer(csr(Some(identity)), &token))
            .await
    };
    certificate("spiffe://cluster.local/ns/shop/sa/web")
        .await
        .unwrap();
    let refused = certificate("spiffe://cluster.local/ns/shop/sa/other").await;
    assert_eq!(refused.unwrap_err().code(), tonic::Code::Unauthenticated);
    running.stop.send(()).unwrap();
    drop(proxy);
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
