use std::{
    future::pending,
    net::{Ipv4Addr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, SystemTime},
};

use futures_util::future::join_all;
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    service::TowerToHyperService,
};
use mesh::identity::Identity;
use parking_lot::Mutex;
use proto::ca::{
    IstioCertificateRequest, IstioCertificateResponse,
    istio_certificate_service_server::{IstioCertificateService, IstioCertificateServiceServer},
};
use rcgen::CertificateSigningRequestParams;
use rustls_pki_types::CertificateDer;
use tokio::{net::TcpListener, task::JoinHandle, time::Instant};
use tokio_rustls::TlsAcceptor;
use tonic::{Code, Request, Response, Status};
use x509_parser::prelude::{FromDer, GeneralName, ParsedExtension, X509CertificationRequest};

use super::*;
use crate::{
    clock::{Clock, TestClock},
    testing::{TestCa, refusing},
    tls::{
        BuildCertificateError, KeyExchange, Policy, Versions,
        control_plane::{self, RootSource},
    },
};

/// What the CA of a test does.
#[derive(Clone, Copy, Debug)]
enum Manner {
    Good,
    Empty,
    NoRoot,
    Junk,
    JunkRoot,
    ForAnother,
    ForAnotherKey,
    Expired,
    Denies,
    Hangs,
}

struct FakeCa {
    ca: Arc<TestCa>,
    manner: Manner,
    requests: Arc<Mutex<Vec<(tonic::metadata::MetadataMap, IstioCertificateRequest)>>>,
}

fn pem(der: &CertificateDer<'_>) -> String {
    use base64::{Engine, engine::general_purpose::STANDARD};
    let body = STANDARD.encode(der);
    format!("-----BEGIN CERTIFICATE-----\n{body}\n-----END CERTIFICATE-----\n")
}

#[tonic::async_trait]
impl IstioCertificateService for FakeCa {
    async fn create_certificate(
        &self,
        request: Request<IstioCertificateRequest>,
    ) -> Result<Response<IstioCertificateResponse>, Status> {
        let (metadata, _, message) = request.into_parts();
        let csr = CertificateSigningRequestParams::from_pem(&message.csr).unwrap();
        self.requests.lock().push((metadata, message));
        let mut identity = self.ca.identity("a", "client");
        if matches!(self.manner, Manner::ForAnother) {
            identity = self.ca.identity("a", "another");
        }
        let mut leaf = self.ca.leaf(&identity);
        if matches!(self.manner, Manner::Expired) {
            leaf.not_after = leaf.not_before - Duration::from_secs(60);
            leaf.not_before -= Duration::from_secs(3600);
        }
        let signed = match self.manner {
            Manner::ForAnotherKey => self.ca.sign(&leaf).0,
            _ => self.ca.sign_for(&leaf, &csr.public_key),
        };
        let good = vec![pem(&signed), self.ca.root_pem()];
        let cert_chain = match self.manner {
            Manner::Empty => Vec::new(),
            Manner::NoRoot => good[..1].to_vec(),
            Manner::Junk => vec!["no certificate".to_owned(), good[1].clone()],
            Manner::JunkRoot => vec![good[0].clone(), "no certificate".to_owned()],
            Manner::Denies => return Err(Status::unauthenticated("request authenticate failure")),
            Manner::Hangs => pending().await,
            _ => good,
        };
        Ok(Response::new(IstioCertificateResponse { cert_chain }))
    }
}

/// A CA on loopback, over TLS as `localhost`.
struct Running {
    ca: Arc<TestCa>,
    address: SocketAddr,
    requests: Arc<Mutex<Vec<(tonic::metadata::MetadataMap, IstioCertificateRequest)>>>,
    task: JoinHandle<()>,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn start(manner: Manner) -> Running {
    let ca = Arc::new(TestCa::new("cluster.local", &Policy::default()));
    let mut leaf = ca.leaf(&ca.identity("istio-system", "istiod"));
    leaf.dns.push("localhost".into());
    let (certificate, key) = ca.sign(&leaf);
    let mut tls = rustls::ServerConfig::builder_with_provider(Arc::new(
        rustls::crypto::aws_lc_rs::default_provider(),
    ))
    .with_safe_default_protocol_versions()
    .unwrap()
    .with_no_client_auth()
    .with_single_cert(vec![certificate], key)
    .unwrap();
    tls.alpn_protocols = vec![b"h2".to_vec()];
    let acceptor = TlsAcceptor::from(Arc::new(tls));
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    let requests = Arc::new(Mutex::new(Vec::new()));
    let fake = FakeCa {
        ca: Arc::clone(&ca),
        manner,
        requests: Arc::clone(&requests),
    };
    let service = IstioCertificateServiceServer::new(fake);
    let task = tokio::spawn(async move {
        let mut serving = tokio::task::JoinSet::new();
        loop {
            let (tcp, _) = listener.accept().await.unwrap();
            let (acceptor, service) = (acceptor.clone(), service.clone());
            serving.spawn(async move {
                let Ok(io) = acceptor.accept(tcp).await else {
                    return;
                };
                let _ = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
                    .serve_connection(TokioIo::new(io), TowerToHyperService::new(service))
                    .await;
            });
        }
    });
    Running {
        ca,
        address,
        requests,
        task,
    }
}

fn config(address: SocketAddr, root_pem: String) -> CaConfig {
    CaConfig {
        control_plane: control_plane::Config {
            address: format!("https://localhost:{}", address.port())
                .parse()
                .unwrap(),
            roots: RootSource::Inline(root_pem),
            hostname: None,
            policy: Policy::default(),
        },
        token: Token::Text("token-1".into()),
        cluster_id: "Kubernetes".into(),
        headers: vec![("X-Extra".into(), "1".into())],
        lifetime: Duration::from_secs(86_400),
        impersonation: Impersonation::Workloads,
        deadline: Duration::from_secs(1),
    }
}

async fn ask(running: &Running) -> Result<WorkloadCertificate, Arc<IssueError>> {
    let client = CaClient::new(config(running.address, running.ca.root_pem())).unwrap();
    client.issue(running.ca.identity("a", "client")).await
}

#[tokio::test]
async fn a_certificate_is_asked_for_as_istiod_expects() {
    let running = start(Manner::Good).await;
    let identity = running.ca.identity("a", "client");
    let certificate = ask(&running).await.unwrap();
    assert_eq!(certificate.identity(), &identity);
    let requests = running.requests.lock();
    let (metadata, message) = &requests[0];
    assert_eq!(metadata.get("authorization").unwrap(), "Bearer token-1");
    assert_eq!(metadata.get("clusterid").unwrap(), "Kubernetes");
    assert_eq!(metadata.get("x-extra").unwrap(), "1");
    assert_eq!(message.validity_duration, 86_400);
    let fields = &message.metadata.as_ref().unwrap().fields;
    assert_eq!(
        fields["ImpersonatedIdentity"].kind,
        Some(prost_types::value::Kind::StringValue(identity.to_string()))
    );
    check_csr(&message.csr, &identity);
}

/// Spec: EC P-256, empty subject, one critical SAN extension with a single URI.
#[track_caller]
fn check_csr(pem: &str, identity: &Identity) {
    let (_, pem) = x509_parser::pem::parse_x509_pem(pem.as_bytes()).unwrap();
    let (_, csr) = X509CertificationRequest::from_der(&pem.contents).unwrap();
    let info = &csr.certification_request_info;
    assert_eq!(info.subject.iter().count(), 0);
    let names: Vec<_> = csr
        .requested_extensions()
        .unwrap()
        .filter_map(|extension| match extension {
            ParsedExtension::SubjectAlternativeName(names) => Some(names.general_names.clone()),
            _ => None,
        })
        .collect();
    let [names] = &names[..] else {
        panic!("one extension of names");
    };
    assert_eq!(names[..], [GeneralName::URI(&identity.to_string())]);
    // The OID of the extension, followed by BOOLEAN TRUE: critical.
    let critical = b"\x06\x03\x55\x1d\x11\x01\x01\xff";
    assert!(pem.contents.windows(critical.len()).any(|w| w == critical));
}

#[tokio::test]
async fn nonsense_from_the_ca_is_refused_by_name() {
    async fn answer(manner: Manner) -> IssueError {
        let error = ask(&start(manner).await).await.unwrap_err();
        Arc::into_inner(error).unwrap()
    }
    let error = answer(Manner::Empty).await;
    assert!(matches!(error, IssueError::Incomplete(0)), "{error:?}");
    let error = answer(Manner::NoRoot).await;
    assert!(matches!(error, IssueError::Incomplete(1)), "{error:?}");
    let error = answer(Manner::Junk).await;
    assert!(matches!(error, IssueError::NotPem(0)), "{error:?}");
    let error = answer(Manner::JunkRoot).await;
    assert!(matches!(error, IssueError::Roots(_)), "{error:?}");
    let error = answer(Manner::ForAnother).await;
    assert!(
        matches!(error, IssueError::WrongIdentity { .. }),
        "{error:?}"
    );
    let error = answer(Manner::ForAnotherKey).await;
    assert!(
        matches!(error, IssueError::Unusable(BuildCertificateError::Key(_))),
        "{error:?}"
    );
    let error = answer(Manner::Expired).await;
    assert!(matches!(error, IssueError::NotValidNow), "{error:?}");
    let error = answer(Manner::Denies).await;
    assert!(
        matches!(&error, IssueError::Ca { code: Code::Unauthenticated, message }
            if message.contains("authenticate")),
        "{error:?}"
    );
}

#[tokio::test]
async fn a_ca_that_hangs_is_given_up() {
    let error = ask(&start(Manner::Hangs).await).await.unwrap_err();
    assert!(matches!(*error, IssueError::Late { .. }), "{error:?}");
}

#[tokio::test]
async fn a_ca_that_cannot_be_reached_says_why() {
    let running = start(Manner::Good).await;
    let (address, _held) = refusing();
    let client = CaClient::new(config(address, running.ca.root_pem())).unwrap();
    let error = client.issue(running.ca.identity("a", "client")).await;
    let error = error.unwrap_err().to_string();
    assert!(error.contains("refused"), "{error}");
}

#[tokio::test]
async fn a_ca_with_another_root_or_name_is_not_spoken_to() {
    let running = start(Manner::Good).await;
    let other = TestCa::new("cluster.local", &Policy::default());
    let foreign = config(running.address, other.root_pem());
    let mut misnamed = config(running.address, running.ca.root_pem());
    misnamed.control_plane.hostname = Some("istiod.istio-system.svc".into());
    for config in [foreign, misnamed] {
        let client = CaClient::new(config).unwrap();
        let error = client.issue(running.ca.identity("a", "client")).await;
        let error = error.unwrap_err().to_string();
        assert!(error.contains("certificate"), "{error}");
    }
    assert!(running.requests.lock().is_empty());
}

#[tokio::test]
async fn token_and_roots_are_read_anew() {
    let running = start(Manner::Good).await;
    let folder = tempfile::tempdir().unwrap();
    let (token, roots) = (folder.path().join("token"), folder.path().join("root.pem"));
    let mut config = config(running.address, String::new());
    config.token = Token::File(token.clone());
    config.control_plane.roots = RootSource::File(roots.clone());
    let client = CaClient::new(config).unwrap();
    let identity = running.ca.identity("a", "client");
    let missing = client.issue(identity.clone()).await.unwrap_err();
    assert!(matches!(*missing, IssueError::ReadToken { .. }));
    std::fs::write(&token, "first\n").unwrap();
    let rootless = client.issue(identity.clone()).await.unwrap_err();
    assert!(matches!(*rootless, IssueError::Ca { .. }));
    std::fs::write(&roots, running.ca.root_pem()).unwrap();
    client.issue(identity.clone()).await.unwrap();
    std::fs::write(&token, "second").unwrap();
    client.issue(identity).await.unwrap();
    let requests = running.requests.lock();
    let tokens: Vec<_> = requests
        .iter()
        .map(|(metadata, _)| metadata.get("authorization").unwrap().clone())
        .collect();
    assert_eq!(tokens, ["Bearer first", "Bearer second"]);
}

#[test]
fn a_token_is_not_printed() {
    assert!(!format!("{:?}", Token::Text("secret".into())).contains("secret"));
}

/// An issuer that follows a script, and keeps count.
struct Scripted {
    ca: TestCa,
    fails: Mutex<bool>,
    asked: Mutex<Vec<(Identity, Duration)>>,
    running: AtomicUsize,
    most_running: AtomicUsize,
    /// How long an answer takes.
    takes: Duration,
    begin: Instant,
}

impl Scripted {
    fn asked(&self) -> usize {
        self.asked.lock().len()
    }
}

struct Shared(Arc<Scripted>);

impl Issuer for Shared {
    fn issue(&self, identity: Identity) -> Issuing {
        let script = Arc::clone(&self.0);
        Box::pin(async move {
            let at = script.begin.elapsed();
            script.asked.lock().push((identity.clone(), at));
            let running = script.running.fetch_add(1, Ordering::SeqCst) + 1;
            script.most_running.fetch_max(running, Ordering::SeqCst);
            tokio::time::sleep(script.takes).await;
            script.running.fetch_sub(1, Ordering::SeqCst);
            if *script.fails.lock() {
                let after = script.takes;
                return Err(Arc::new(IssueError::Late { after }));
            }
            script.ca.issue(identity).await
        })
    }
}

/// Certificates of an hour, by a clock that follows the paused runtime.
struct Rig {
    script: Arc<Scripted>,
    clock: Arc<TestClock>,
    certificates: Certificates,
}

const HOUR: Duration = Duration::from_secs(3600);

fn rig(takes: Duration) -> Rig {
    let clock = TestClock::new(SystemTime::now());
    let as_clock: Arc<dyn Clock> = clock.clone();
    let policy = Policy::new(Versions::Tls13, KeyExchange::Default, Arc::clone(&as_clock));
    let script = Arc::new(Scripted {
        ca: TestCa::new("cluster.local", &policy).with_lifetime(HOUR),
        fails: Mutex::new(false),
        asked: Mutex::default(),
        running: AtomicUsize::new(0),
        most_running: AtomicUsize::new(0),
        takes,
        begin: Instant::now(),
    });
    let issuer = Arc::new(Shared(Arc::clone(&script)));
    let config = CertificatesConfig {
        wait_deadline: Duration::from_secs(30),
        ..CertificatesConfig::default()
    };
    Rig {
        script,
        clock,
        certificates: Certificates::new(issuer, as_clock, config),
    }
}

impl Rig {
    fn patience(&self) -> Duration {
        CertificatesConfig::default().patience
    }

    fn identity(&self, account: usize) -> Identity {
        self.script.ca.identity("a", &format!("sa-{account}"))
    }
}

#[tokio::test(start_paused = true)]
async fn waiters_share_one_request() {
    let rig = rig(Duration::from_secs(2));
    let identity = rig.identity(0);
    let fetches = (0..20).map(|_| rig.certificates.fetch(&identity, Priority::RealTime));
    let got: Vec<_> = join_all(fetches).await;
    let first = got[0].as_ref().unwrap();
    assert!(got.iter().all(|c| Arc::ptr_eq(c.as_ref().unwrap(), first)));
    assert_eq!(rig.script.asked(), 1);
    assert!(rig.certificates.current(&identity).is_some());
}

#[tokio::test(start_paused = true)]
async fn renewal_comes_at_about_half_of_the_life() {
    let rig = rig(Duration::ZERO);
    let identity = rig.identity(0);
    rig.certificates
        .fetch(&identity, Priority::RealTime)
        .await
        .unwrap();
    let mut watch = rig.certificates.watch(&identity).unwrap();
    watch.mark_unchanged();
    let first = rig.certificates.current(&identity).unwrap();
    watch.changed().await.unwrap();
    let second = rig.certificates.current(&identity).unwrap();
    assert!(second.generation() > first.generation());
    let at = rig.script.asked.lock()[1].1;
    let (from, to) = (HOUR.mul_f64(0.44), HOUR.mul_f64(0.56));
    assert!((from..to).contains(&at), "{at:?}");
}

#[tokio::test(start_paused = true)]
async fn a_jump_of_the_time_of_day_is_noticed() {
    let rig = rig(Duration::ZERO);
    let identity = rig.identity(0);
    rig.certificates
        .fetch(&identity, Priority::RealTime)
        .await
        .unwrap();
    // The machine sleeps past the certificate's end.
    rig.clock.jump(2 * HOUR);
    assert!(rig.certificates.current(&identity).is_none());
    let fresh = rig.certificates.fetch(&identity, Priority::RealTime).await;
    assert!(fresh.unwrap().is_valid());
    assert_eq!(rig.script.asked(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_valid_certificate_outlives_a_broken_ca_until_it_expires() {
    let rig = rig(Duration::ZERO);
    let identity = rig.identity(0);
    let first = rig
        .certificates
        .fetch(&identity, Priority::RealTime)
        .await
        .unwrap();
    *rig.script.fails.lock() = true;
    tokio::time::sleep(HOUR.mul_f64(0.9)).await;
    assert!(rig.script.asked() > 5, "it keeps trying");
    let still = rig.certificates.fetch(&identity, Priority::RealTime).await;
    assert!(Arc::ptr_eq(&still.unwrap(), &first));
    tokio::time::sleep(HOUR.mul_f64(0.2)).await;
    let error = rig.certificates.fetch(&identity, Priority::RealTime).await;
    assert!(matches!(error, Err(FetchError::Issue { .. })), "{error:?}");
    let states = rig.certificates.states();
    assert!(states[0].1.to_string().starts_with("Unavailable: "));
    *rig.script.fails.lock() = false;
    let mut watch = rig.certificates.watch(&identity).unwrap();
    let back = watch.wait_for(|s| matches!(s, CertificateState::Available(_)));
    tokio::time::timeout(Duration::from_secs(200), back)
        .await
        .unwrap()
        .unwrap();
}

#[tokio::test(start_paused = true)]
async fn failures_are_told_at_once_and_retried_ever_more_slowly() {
    let rig = rig(Duration::ZERO);
    *rig.script.fails.lock() = true;
    let identity = rig.identity(0);
    rig.certificates.prefetch(&identity);
    tokio::time::sleep(rig.patience()).await;
    let asked_before = rig.script.asked();
    let began = Instant::now();
    for _ in 0..50 {
        let error = rig.certificates.fetch(&identity, Priority::RealTime).await;
        assert!(matches!(error, Err(FetchError::Issue { .. })));
    }
    assert_eq!(began.elapsed(), Duration::ZERO);
    assert_eq!(rig.script.asked(), asked_before);
    tokio::time::sleep(Duration::from_secs(200)).await;
    let asked = rig.script.asked.lock();
    let pauses: Vec<_> = asked.windows(2).map(|w| w[1].1 - w[0].1).collect();
    for (at, pause) in pauses.iter().enumerate() {
        let nominal = (0.1 * 2_f64.powi(i32::try_from(at).unwrap())).min(15.0);
        let range = nominal * 0.79..nominal * 1.21 + 0.01;
        assert!(range.contains(&pause.as_secs_f64()), "{at}: {pause:?}");
    }
}

/// A pod that has just been made may be news to the CA: its first connection waits and does not fail.
#[tokio::test(start_paused = true)]
async fn callers_wait_through_the_first_refusals_of_a_new_identity() {
    let rig = rig(Duration::ZERO);
    *rig.script.fails.lock() = true;
    let identity = rig.identity(0);
    let fetching = rig.certificates.fetch(&identity, Priority::RealTime);
    let learns = async {
        tokio::time::sleep(Duration::from_secs(1)).await;
        *rig.script.fails.lock() = false;
    };
    let began = Instant::now();
    let (fetched, ()) = tokio::join!(fetching, learns);
    fetched.expect("it came");
    assert!(
        began.elapsed() < Duration::from_secs(3),
        "{:?}",
        began.elapsed()
    );
    // Who is refused for longer is told so, with the CA's words.
    *rig.script.fails.lock() = true;
    let began = Instant::now();
    let refused = rig
        .certificates
        .fetch(&rig.identity(1), Priority::RealTime)
        .await;
    assert!(matches!(refused, Err(FetchError::Issue { .. })));
    assert_eq!(began.elapsed(), rig.patience());
}

#[tokio::test(start_paused = true)]
async fn few_requests_run_at_once_and_the_urgent_go_first() {
    let rig = rig(Duration::from_secs(1));
    for account in 0..20 {
        rig.certificates.prefetch(&rig.identity(account));
    }
    let urgent = rig.identity(99);
    let begin = Instant::now();
    // Two rounds of eight would come before it; it is in the second.
    rig.certificates
        .fetch(&urgent, Priority::RealTime)
        .await
        .unwrap();
    assert!(
        begin.elapsed() <= Duration::from_millis(2100),
        "{:?}",
        begin.elapsed()
    );
    // One that waits already is raised.
    let last = rig.identity(19);
    rig.certificates
        .fetch(&last, Priority::RealTime)
        .await
        .unwrap();
    assert!(
        begin.elapsed() <= Duration::from_millis(3100),
        "{:?}",
        begin.elapsed()
    );
    assert_eq!(rig.script.most_running.load(Ordering::SeqCst), 8);
}

#[tokio::test(start_paused = true)]
async fn a_caller_does_not_wait_for_ever() {
    let rig = rig(Duration::from_secs(1000));
    let identity = rig.identity(0);
    let begin = Instant::now();
    let error = rig.certificates.fetch(&identity, Priority::RealTime).await;
    assert!(matches!(error, Err(FetchError::Late { .. })), "{error:?}");
    assert_eq!(begin.elapsed().as_secs(), 30);
    assert_eq!(rig.certificates.states()[0].1.to_string(), "Initializing");
}

#[tokio::test(start_paused = true)]
async fn forgetting_ends_the_task_and_frees_its_turn() {
    let rig = rig(Duration::from_secs(5));
    for account in 0..30 {
        rig.certificates.prefetch(&rig.identity(account));
    }
    tokio::time::sleep(Duration::from_secs(1)).await;
    let waiting = rig.certificates.watch(&rig.identity(0)).unwrap();
    for account in 0..30 {
        rig.certificates.forget(&rig.identity(account));
    }
    assert!(rig.certificates.states().is_empty());
    let wanted = rig.identity(99);
    rig.certificates
        .fetch(&wanted, Priority::RealTime)
        .await
        .unwrap();
    assert!(waiting.has_changed().is_err(), "its watchers learn of it");
    assert_eq!(rig.script.asked(), 9);
}

#[tokio::test(start_paused = true)]
async fn changed_roots_renew_everything() {
    let rig = rig(Duration::ZERO);
    for account in 0..3 {
        let identity = rig.identity(account);
        rig.certificates
            .fetch(&identity, Priority::Warmup)
            .await
            .unwrap();
    }
    rig.certificates.renew_all();
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(rig.script.asked(), 6);
}

#[tokio::test(start_paused = true)]
async fn identities_are_bounded() {
    let rig = rig(Duration::ZERO);
    let issuer = Arc::new(Shared(Arc::clone(&rig.script)));
    let config = CertificatesConfig {
        max_identities: 2,
        ..CertificatesConfig::default()
    };
    let certificates = Certificates::new(issuer, rig.clock.clone(), config);
    for account in 0..2 {
        let identity = rig.identity(account);
        certificates
            .fetch(&identity, Priority::RealTime)
            .await
            .unwrap();
    }
    let error = certificates
        .fetch(&rig.identity(2), Priority::RealTime)
        .await;
    assert!(matches!(error, Err(FetchError::TooMany { limit: 2, .. })));
    certificates.forget(&rig.identity(0));
    assert!(
        certificates
            .fetch(&rig.identity(2), Priority::RealTime)
            .await
            .is_ok()
    );
}

#[test]
fn a_refusal_is_an_answer_and_silence_is_none() {
    let ca = |code| IssueError::Ca {
        code,
        message: String::new(),
    };
    let after = Duration::from_secs(1);
    for (error, expected) in [
        (ca(Code::PermissionDenied), true),
        (ca(Code::Unauthenticated), true),
        (ca(Code::InvalidArgument), true),
        (ca(Code::Unavailable), false),
        (ca(Code::DeadlineExceeded), false),
        (IssueError::Late { after }, false),
        (IssueError::NotValidNow, true),
        (IssueError::Incomplete(0), true),
    ] {
        assert_eq!(error.is_answer(), expected, "{error:?}");
    }
}
