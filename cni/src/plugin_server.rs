//! Where the CNI plugin asks: HTTP over UNIX sockets in the run folder, for the node's root alone.
//!
//! `pluginevent.sock` takes `POST /cmdadd`, one question for each sandbox that is being made; 200 lets the pod start.
//! `log.sock` takes `POST /log` from Istio's plugin, a list of log lines. Bodies, connections and time are bounded.

use std::{
    convert::Infallible,
    fs, io,
    net::IpAddr,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full, Limited};
use hyper::{
    body::{Bytes, Incoming},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use serde::Deserialize;
use tokio::{
    net::{UnixListener, UnixStream},
    sync::Semaphore,
    task::JoinSet,
    time::{Instant, timeout},
};

/// File names in the run folder. Source: `spec/cni.md` 1.
pub const EVENT_SOCKET: &str = "pluginevent.sock";
/// See [`EVENT_SOCKET`].
pub const LOG_SOCKET: &str = "log.sock";

/// Sandboxes that may be asked about at once: more than a node may have pods.
const CONNECTIONS: usize = 512;
/// A question is a few hundred bytes.
const BODY_LIMIT: usize = 64 * 1024;
/// A question that has not been sent by then will not be.
const READ_WITHIN: Duration = Duration::from_secs(5);
/// Longer than the plugin waits for its answer (10 s).
const CONNECTION_WITHIN: Duration = Duration::from_secs(15);
/// Lines of Istio's plugin that are kept of one message, and of each its beginning.
const LOG_LINES: usize = 100;
const LOG_CHARS: usize = 2000;

/// A sandbox that is being made: Istio's message, with the uid that our plugin adds.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct SandboxRequest {
    /// Its network namespace, as the host names it.
    pub netns: PathBuf,
    /// The pod.
    pub pod_name: String,
    /// Its namespace.
    pub pod_namespace: String,
    /// Its uid, where the runtime told it.
    #[serde(default, rename = "PodUID")]
    pub pod_uid: Option<String>,
    /// The addresses it got.
    #[serde(default, rename = "IPs")]
    ips: Option<Vec<Ip>>,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Ip {
    address: Address,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
struct Address {
    #[serde(rename = "IP")]
    ip: IpAddr,
}

impl SandboxRequest {
    /// The pod's addresses.
    pub fn ips(&self) -> Vec<IpAddr> {
        let ips = self.ips.iter().flatten();
        ips.map(|ip| ip.address.ip).collect()
    }

    fn read(body: &[u8]) -> Result<Self, String> {
        let request: SandboxRequest =
            serde_json::from_slice(body).map_err(|error| format!("the question: {error}"))?;
        let named = !request.pod_name.is_empty()
            && !request.pod_namespace.is_empty()
            && request.netns.is_absolute();
        if named {
            Ok(request)
        } else {
            Err("the question names no pod or no network namespace".to_owned())
        }
    }
}

/// Why a pod must not start (yet).
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// The question makes no sense; asking again does not help.
    #[error("{0}")]
    Bad(String),
    /// The pod cannot be enrolled now; a new sandbox may be.
    #[error("{0}")]
    NotYet(String),
}

/// Decides about sandboxes.
pub trait Gatekeeper: Send + Sync + 'static {
    /// `Ok`: the pod may start, enrolled if it takes part. Dropped when the plugin no longer waits.
    fn admit(&self, sandbox: SandboxRequest) -> impl Future<Output = Result<(), Refusal>> + Send;

    /// One question was answered with this HTTP status, after this time.
    fn answered(&self, status: u16, took: Duration);
}

/// Both sockets, listening.
pub struct Server {
    events: UnixListener,
    logs: UnixListener,
}

impl Server {
    /// Listens in `folder`, which is made where it is missing; sockets of an earlier agent are replaced.
    ///
    /// # Errors
    /// The system's, naming the path.
    pub fn bind(folder: &Path) -> io::Result<Server> {
        fs::create_dir_all(folder).map_err(|error| named(folder, &error))?;
        Ok(Server {
            events: listen(&folder.join(EVENT_SOCKET))?,
            logs: listen(&folder.join(LOG_SOCKET))?,
        })
    }

    /// Serves until dropped.
    pub async fn run<G: Gatekeeper>(self, gatekeeper: Arc<G>) {
        let ask = move |request| answer_event(gatekeeper.clone(), request);
        tokio::join!(accept(self.events, ask), accept(self.logs, answer_log));
    }
}

fn listen(path: &Path) -> io::Result<UnixListener> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(named(path, &error)),
        _ => {}
    }
    let listener = UnixListener::bind(path).map_err(|error| named(path, &error))?;
    let private = fs::Permissions::from_mode(0o600);
    fs::set_permissions(path, private).map_err(|error| named(path, &error))?;
    Ok(listener)
}

fn named(path: &Path, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}

async fn accept<F, A>(listener: UnixListener, answer: F)
where
    F: Fn(Request<Incoming>) -> A + Clone + Send + 'static,
    A: Future<Output = Response<Full<Bytes>>> + Send + 'static,
{
    let room = Arc::new(Semaphore::new(CONNECTIONS));
    let mut connections = JoinSet::new();
    loop {
        let Ok(place) = room.clone().acquire_owned().await else {
            return;
        };
        let stream = tokio::select! {
            accepted = listener.accept() => accepted,
            Some(_) = connections.join_next() => continue,
        };
        match stream {
            Ok((stream, _)) if is_root(&stream) => {
                let answer = answer.clone();
                connections.spawn(async move {
                    serve(stream, answer).await;
                    drop(place);
                });
            }
            Ok(_) => tracing::warn!("a process that is not root asked for a sandbox"),
            Err(error) => {
                tracing::warn!(%error, "accept the plugin");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

/// The runtime starts plugins as root. The agent's own user counts too: it is root in a user namespace of its own.
fn is_root(stream: &UnixStream) -> bool {
    let own = nix::unistd::geteuid().as_raw();
    stream
        .peer_cred()
        .is_ok_and(|peer| peer.uid() == 0 || peer.uid() == own)
}

async fn serve<F, A>(stream: UnixStream, answer: F)
where
    F: Fn(Request<Incoming>) -> A + Send + 'static,
    A: Future<Output = Response<Full<Bytes>>> + Send + 'static,
{
    let service = service_fn(move |request| {
        let answered = answer(request);
        async move { Ok::<_, Infallible>(answered.await) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(READ_WITHIN)
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), service);
    match timeout(CONNECTION_WITHIN, connection).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::debug!(%error, "the plugin hung up"),
        Err(_) => tracing::debug!("the plugin took too long"),
    }
}

async fn answer_event<G: Gatekeeper>(
    gatekeeper: Arc<G>,
    request: Request<Incoming>,
) -> Response<Full<Bytes>> {
    let asked = Instant::now();
    let outcome = match read(request, "/cmdadd").await {
        Ok(body) => decide(gatekeeper.as_ref(), &body).await,
        Err((status, why)) => Err((status, why.to_owned())),
    };
    let (status, text) =
        outcome.map_or_else(|refused| refused, |()| (StatusCode::OK, String::new()));
    gatekeeper.answered(status.as_u16(), asked.elapsed());
    respond(status, text)
}

async fn decide<G: Gatekeeper>(gatekeeper: &G, body: &[u8]) -> Result<(), (StatusCode, String)> {
    let sandbox = SandboxRequest::read(body).map_err(|why| (StatusCode::BAD_REQUEST, why))?;
    let (pod, namespace) = (sandbox.pod_name.clone(), sandbox.pod_namespace.clone());
    gatekeeper.admit(sandbox).await.map_err(|refusal| {
        tracing::warn!(pod, namespace, %refusal, "a pod must not start yet");
        let status = match refusal {
            Refusal::Bad(_) => StatusCode::BAD_REQUEST,
            Refusal::NotYet(_) => StatusCode::SERVICE_UNAVAILABLE,
        };
        (status, refusal.to_string())
    })
}

async fn answer_log(request: Request<Incoming>) -> Response<Full<Bytes>> {
    match read(request, "/log").await.map(|body| log_lines(&body)) {
        Ok(Some(lines)) => {
            for line in lines {
                tracing::info!(plugin = line);
            }
            respond(StatusCode::OK, String::new())
        }
        Ok(None) => respond(StatusCode::BAD_REQUEST, "not a list of lines".to_owned()),
        Err((status, why)) => respond(status, why.to_owned()),
    }
}

fn log_lines(body: &[u8]) -> Option<Vec<String>> {
    let lines: Vec<String> = serde_json::from_slice(body).ok()?;
    let short = |line: String| line.trim_end().chars().take(LOG_CHARS).collect();
    Some(lines.into_iter().take(LOG_LINES).map(short).collect())
}

async fn read(request: Request<Incoming>, path: &str) -> Result<Bytes, (StatusCode, &'static str)> {
    if request.uri().path() != path {
        return Err((StatusCode::NOT_FOUND, "no such question"));
    }
    if request.method() != Method::POST {
        return Err((StatusCode::METHOD_NOT_ALLOWED, "questions are posted"));
    }
    let body = Limited::new(request.into_body(), BODY_LIMIT).collect();
    match timeout(READ_WITHIN, body).await {
        Ok(Ok(body)) => Ok(body.to_bytes()),
        Ok(Err(_)) => Err((
            StatusCode::BAD_REQUEST,
            "the question is too long or cut off",
        )),
        Err(_) => Err((StatusCode::REQUEST_TIMEOUT, "the question does not end")),
    }
}

fn respond(status: StatusCode, text: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(text)));
    *response.status_mut() = status;
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn istios_question_is_read() {
        let text = br#"{"Netns":"/var/run/netns/cni-1","PodName":"web-0","PodNamespace":"shop","IPs":[
            {"Interface":2,"Address":{"IP":"10.1.0.5","Mask":"////AA=="},"Gateway":"10.1.0.1"},
            {"Interface":null,"Address":{"IP":"fd00::5","Mask":"//////////8AAAAAAAAAAA=="},"Gateway":null}]}"#;
        let request = SandboxRequest::read(text).expect("a question");
        assert_eq!(request.pod_uid, None);
        let ips: Vec<String> = request.ips().iter().map(ToString::to_string).collect();
        assert_eq!(ips, ["10.1.0.5", "fd00::5"]);
        let bare = br#"{"Netns":"/x","PodName":"a","PodNamespace":"b","IPs":null,"PodUID":"1"}"#;
        let request = SandboxRequest::read(bare).expect("a question");
        assert_eq!(
            (request.ips().len(), request.pod_uid.as_deref()),
            (0, Some("1"))
        );
    }

    #[test]
    fn a_question_without_pod_or_namespace_is_refused() {
        for bad in [
            "",
            "{}",
            r#"{"Netns":"","PodName":"a","PodNamespace":"b"}"#,
            r#"{"Netns":"relative","PodName":"a","PodNamespace":"b"}"#,
            r#"{"Netns":"/x","PodName":"","PodNamespace":"b"}"#,
            r#"{"Netns":"/x","PodName":"a","PodNamespace":"b","IPs":[{"Address":{"IP":"x"}}]}"#,
        ] {
            assert!(SandboxRequest::read(bad.as_bytes()).is_err(), "{bad}");
        }
    }

    #[test]
    fn log_lines_are_bounded() {
        let many: Vec<String> = vec!["x".repeat(3000); 200];
        let body = serde_json::to_vec(&many).expect("JSON");
        let lines = log_lines(&body).expect("lines");
        assert_eq!((lines.len(), lines[0].len()), (100, 2000));
        assert_eq!(log_lines(b"{}"), None);
    }
}
