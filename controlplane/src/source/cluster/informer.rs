//! One kind's objects, listed and then watched, over every fault of a watch: compacted history, cut connections, an API
//! server that is down, forbids, or has gone back in time.
//!
//! Why not `kube::runtime::watcher`: it resumes from the last version whatever happens, so that an API server restored
//! from a backup (whose versions are lower again) leaves it deaf without a word; and one object that cannot be read fails
//! its whole list. Here a version that falls leads to a new list, and objects are handed on as text.

use std::{borrow::Cow, fmt, sync::Arc, time::Duration};

use bytes::{Buf as _, BytesMut};
use http::{HeaderValue, Request, StatusCode, header};
use http_body_util::BodyExt as _;
use kube::{
    Client,
    api::{ListParams, WatchParams},
    client::Body,
};
use serde::Deserialize;
use serde_json::value::RawValue;
use tokio::sync::watch;

/// Objects per page of a list: what is held in memory at once.
const PAGE: u32 = 500;
/// A list's page that takes longer is asked for again.
const REQUEST: Duration = Duration::from_secs(60);
/// API servers send a bookmark about once a minute; a watch that is silent for longer is opened anew, which costs one
/// request and finds a connection whose other end is gone.
const SILENCE: Duration = Duration::from_secs(90);
/// Longest line of a watch: etcd takes objects of 1.5 MiB, and JSON may write a byte in six.
const MAX_LINE: usize = 16 << 20;
/// Waits between attempts double from the first to the last.
const FIRST_WAIT: Duration = Duration::from_millis(100);
const LONGEST_WAIT: Duration = Duration::from_secs(10);

/// Tells what is known by now, if it is not what was told before.
pub(crate) fn tell<T: Clone + PartialEq>(found: &watch::Sender<Option<Arc<T>>>, now: &T) {
    found.send_if_modified(|known| {
        let changed = known.as_deref() != Some(now);
        if changed {
            *known = Some(Arc::new(now.clone()));
        }
        changed
    });
}

/// What is watched.
#[derive(Clone, Debug)]
pub struct Target {
    /// `/apis/security.istio.io/v1/authorizationpolicies`.
    pub path: String,
    /// Names it to people: `authorizationpolicies.security.istio.io`.
    pub plural: String,
    /// Field selector; empty: all.
    pub fields: Cow<'static, str>,
    /// Label selector; empty: all.
    pub labels: &'static str,
    /// Only names, labels and annotations are wanted.
    pub metadata_only: bool,
}

/// What happened.
#[derive(Debug)]
pub enum Step {
    /// A list begins: what it does not name is no more.
    Listing,
    /// An object as it is now.
    Is(Box<RawValue>),
    /// An object that is no more, as it was.
    Gone(Box<RawValue>),
    /// The list is complete.
    Listed,
    /// Something failed. The next step is another attempt, after a wait.
    Failed(Failure),
}

/// Why a list or a watch failed.
#[derive(Debug)]
pub enum Failure {
    /// The kind is not served.
    NotServed,
    /// The API server does not let us.
    Forbidden(String),
    /// Its history does not reach back as far as asked; a new list follows.
    Compacted,
    /// Its versions are lower than they were: it was restored from a backup. A new list follows.
    WentBack,
    /// It answered with another error.
    Refused(String),
    /// It could not be reached, or what it said could not be read.
    Broken(String),
}

/// Lists and watches one kind.
pub struct Informer {
    client: Client,
    target: Target,
    state: State,
    /// Failures since the last success.
    failures: u32,
}

/// The requests. Owns what it needs, because a response's body cannot be shared between threads and informers hold one.
struct Api {
    client: Client,
    target: Target,
}

#[derive(Debug)]
enum State {
    /// Nothing is known yet, or no longer.
    Unlisted,
    /// In the middle of a list.
    Listing {
        items: std::vec::IntoIter<Box<RawValue>>,
        next: Option<String>,
        version: String,
    },
    /// Everything up to this version is known; `resumed`: a watch from it has been open before.
    Known { version: String, resumed: bool },
    /// A watch is open.
    Watching { version: String, lines: Lines },
}

/// A watch's response, cut into lines.
struct Lines {
    body: Body,
    buffer: BytesMut,
    /// How much of the buffer holds no line end.
    searched: usize,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct ListMeta {
    resource_version: String,
    #[serde(rename = "continue")]
    next: Option<String>,
}

#[derive(Deserialize)]
struct List {
    #[serde(default)]
    metadata: ListMeta,
    // Go writes an empty list as null.
    items: Option<Vec<Box<RawValue>>>,
}

#[derive(Deserialize)]
struct Event {
    #[serde(rename = "type")]
    kind: EventKind,
    object: Box<RawValue>,
}

#[derive(Deserialize)]
#[serde(rename_all = "UPPERCASE")]
enum EventKind {
    Added,
    Modified,
    Deleted,
    Bookmark,
    Error,
}

#[derive(Deserialize)]
struct Versioned {
    #[serde(default)]
    metadata: ListMeta,
}

/// `metav1.Status`.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Status {
    code: u16,
    reason: String,
    message: String,
}

impl fmt::Debug for Informer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Informer")
            .field("path", &self.target.path)
            .field("state", &self.state)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for Lines {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lines")
            .field("buffered", &self.buffer.len())
            .finish_non_exhaustive()
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotServed => f.write_str("the API server does not serve this kind"),
            Self::Forbidden(why) => write!(
                f,
                "forbidden: the control plane's role needs get, list and watch ({why})"
            ),
            Self::Compacted => {
                f.write_str("the API server's history does not reach back far enough")
            }
            Self::WentBack => f.write_str("the API server's state went back in time"),
            Self::Refused(why) => write!(f, "the API server refuses: {why}"),
            Self::Broken(why) => write!(f, "the API server cannot be reached or read: {why}"),
        }
    }
}

impl Failure {
    /// Only a new list mends it.
    fn is_staleness(&self) -> bool {
        matches!(self, Self::Compacted | Self::WentBack)
    }

    fn of(status: &Status) -> Self {
        let text = || match status.message.is_empty() {
            true => format!("{} {}", status.code, status.reason),
            false => status.message.clone(),
        };
        match status.code {
            404 => Self::NotServed,
            401 | 403 => Self::Forbidden(text()),
            410 => Self::Compacted,
            // "Too large resource version": it does not know of what we have seen.
            504 if status.message.contains("Too large resource version") => Self::WentBack,
            _ => Self::Refused(text()),
        }
    }

    fn broken(error: &(dyn std::error::Error + 'static)) -> Self {
        let mut text = error.to_string();
        let mut cause = error.source();
        while let Some(error) = cause {
            let deeper = error.to_string();
            // kube's errors repeat their causes.
            if !text.contains(&deeper) {
                text = format!("{text}: {deeper}");
            }
            cause = error.source();
        }
        Self::Broken(text)
    }
}

impl Informer {
    /// Nothing is asked for before the first [`Informer::next`].
    pub fn new(client: Client, target: Target) -> Self {
        Self {
            client,
            target,
            state: State::Unlisted,
            failures: 0,
        }
    }

    /// What is watched.
    pub fn target(&self) -> &Target {
        &self.target
    }

    /// Watches something else from now on, from a new list.
    pub fn turn_to(&mut self, target: Target) {
        self.target = target;
        self.state = State::Unlisted;
    }

    /// The next thing that happens, forever.
    pub async fn next(&mut self) -> Step {
        loop {
            if self.failures > 0
                && !matches!(self.state, State::Listing { .. } | State::Watching { .. })
            {
                tokio::time::sleep(wait(self.failures)).await;
            }
            let state = std::mem::replace(&mut self.state, State::Unlisted);
            let moved = match state {
                State::Unlisted => self
                    .list(None, String::new())
                    .await
                    .map(|()| Some(Step::Listing)),
                State::Listing {
                    items,
                    next,
                    version,
                } => self.page(items, next, version).await,
                State::Known { version, resumed } => self.watch(version, resumed).await,
                State::Watching { version, lines } => self.read(version, lines).await,
            };
            match moved {
                Ok(Some(step)) => return step,
                Ok(None) => {}
                Err(failure) => {
                    self.failures = self.failures.saturating_add(1);
                    return Step::Failed(failure);
                }
            }
        }
    }

    async fn list(&mut self, next: Option<String>, seen: String) -> Result<(), Failure> {
        let list = self.api().fetch(PAGE, next).await?;
        let version = match list.metadata.resource_version {
            version if version.is_empty() => seen,
            version => version,
        };
        self.state = State::Listing {
            items: list.items.unwrap_or_default().into_iter(),
            next: list.metadata.next.filter(|token| !token.is_empty()),
            version,
        };
        Ok(())
    }

    async fn page(
        &mut self,
        mut items: std::vec::IntoIter<Box<RawValue>>,
        next: Option<String>,
        version: String,
    ) -> Result<Option<Step>, Failure> {
        if let Some(item) = items.next() {
            self.state = State::Listing {
                items,
                next,
                version,
            };
            return Ok(Some(Step::Is(item)));
        }
        if next.is_some() {
            self.list(next, version).await?;
            return Ok(None);
        }
        self.failures = 0;
        let resumed = false;
        self.state = State::Known { version, resumed };
        Ok(Some(Step::Listed))
    }

    async fn watch(&mut self, version: String, resumed: bool) -> Result<Option<Step>, Failure> {
        let api = self.api();
        let opened = match resumed {
            true => api.resume(&version).await,
            false => api.open(&version).await,
        };
        match opened {
            Ok(lines) => {
                self.state = State::Watching { version, lines };
                Ok(None)
            }
            Err(failure) => {
                if !failure.is_staleness() {
                    let resumed = true;
                    self.state = State::Known { version, resumed };
                }
                Err(failure)
            }
        }
    }

    async fn read(&mut self, version: String, mut lines: Lines) -> Result<Option<Step>, Failure> {
        let line = match tokio::time::timeout(SILENCE, lines.next()).await {
            Ok(Ok(Some(line))) => line,
            // The end of a watch's time, or of its connection: goes on with a new one.
            Ok(Ok(None)) | Err(_) => {
                let resumed = true;
                self.state = State::Known { version, resumed };
                return Ok(None);
            }
            Ok(Err(failure)) => {
                let resumed = true;
                self.state = State::Known { version, resumed };
                return Err(failure);
            }
        };
        let event: Event =
            serde_json::from_slice(&line).map_err(|error| Failure::broken(&error))?;
        let object = event.object;
        if matches!(event.kind, EventKind::Error) {
            let status: Status = serde_json::from_str(object.get()).unwrap_or_default();
            return Err(Failure::of(&status));
        }
        let versioned: Versioned =
            serde_json::from_str(object.get()).map_err(|error| Failure::broken(&error))?;
        let now = versioned.metadata.resource_version;
        if is_older(&now, &version) {
            return Err(Failure::WentBack);
        }
        self.failures = 0;
        let version = if now.is_empty() { version } else { now };
        self.state = State::Watching { version, lines };
        Ok(match event.kind {
            EventKind::Added | EventKind::Modified => Some(Step::Is(object)),
            EventKind::Deleted => Some(Step::Gone(object)),
            EventKind::Bookmark | EventKind::Error => None,
        })
    }

    fn api(&self) -> Api {
        Api {
            client: self.client.clone(),
            target: self.target.clone(),
        }
    }
}

impl Api {
    /// A watch that goes on where another ended, if the API server has not gone back meanwhile: it would say nothing until
    /// its versions are past ours again.
    async fn resume(&self, version: &str) -> Result<Lines, Failure> {
        let now = self.fetch(1, None).await?.metadata.resource_version;
        match is_older(&now, version) {
            true => Err(Failure::WentBack),
            false => self.open(version).await,
        }
    }

    /// A page of a list. Without a version: as new as anything that was ever answered, so that nobody goes back in time.
    async fn fetch(&self, limit: u32, next: Option<String>) -> Result<List, Failure> {
        let params = ListParams {
            field_selector: selector(&self.target.fields),
            label_selector: selector(self.target.labels),
            limit: Some(limit),
            continue_token: next,
            ..ListParams::default()
        };
        let request = kube::core::Request::new(self.target.path.as_str())
            .list(&params)
            .map_err(|error| Failure::broken(&error))?;
        let exchange = async {
            let response = self.send(request, "PartialObjectMetadataList").await?;
            let body = response
                .collect()
                .await
                .map_err(|error| Failure::broken(&error))?;
            serde_json::from_slice(&body.to_bytes()).map_err(|error| Failure::broken(&error))
        };
        match tokio::time::timeout(REQUEST, exchange).await {
            Ok(answer) => answer,
            Err(_) => Err(Failure::Broken(format!("no answer within {REQUEST:?}"))),
        }
    }

    async fn open(&self, version: &str) -> Result<Lines, Failure> {
        let params = WatchParams {
            field_selector: selector(&self.target.fields),
            label_selector: selector(self.target.labels),
            // Not all watches of all replicas at once.
            timeout: Some(rand::random_range(240..300)),
            bookmarks: true,
            ..WatchParams::default()
        };
        let request = kube::core::Request::new(self.target.path.as_str())
            .watch(&params, version)
            .map_err(|error| Failure::broken(&error))?;
        let opening = self.send(request, "PartialObjectMetadata");
        match tokio::time::timeout(REQUEST, opening).await {
            Ok(body) => Ok(Lines {
                body: body?,
                buffer: BytesMut::new(),
                searched: 0,
            }),
            Err(_) => Err(Failure::Broken(format!("no answer within {REQUEST:?}"))),
        }
    }

    async fn send(&self, mut request: Request<Vec<u8>>, partial: &str) -> Result<Body, Failure> {
        if self.target.metadata_only {
            let accept = format!("application/json;as={partial};g=meta.k8s.io;v=v1");
            let accept = HeaderValue::try_from(accept);
            let accept = accept.map_err(|error| Failure::broken(&error))?;
            request.headers_mut().insert(header::ACCEPT, accept);
        }
        let sent = self.client.send(request.map(Body::from)).await;
        let response = sent.map_err(|error| Failure::broken(&error))?;
        let code = response.status();
        if code.is_success() {
            return Ok(response.into_body());
        }
        Err(refusal(code, response.into_body()).await)
    }
}

async fn refusal(code: StatusCode, body: Body) -> Failure {
    let body = http_body_util::Limited::new(body, 64 << 10).collect().await;
    let status: Status = body
        .ok()
        .and_then(|body| serde_json::from_slice(&body.to_bytes()).ok())
        .unwrap_or_default();
    Failure::of(&Status {
        code: code.as_u16(),
        ..status
    })
}

fn selector(text: &str) -> Option<String> {
    (!text.is_empty()).then(|| text.to_owned())
}

/// Versions are etcd's revisions, which only grow in one history. Others than numbers cannot be compared.
fn is_older(now: &str, known: &str) -> bool {
    match (now.parse::<u64>(), known.parse::<u64>()) {
        (Ok(now), Ok(known)) => now < known,
        _ => false,
    }
}

/// Doubling, and drawn from its upper half so that replicas and kinds spread.
fn wait(failures: u32) -> Duration {
    let doubled = FIRST_WAIT.saturating_mul(2_u32.saturating_pow(failures.saturating_sub(1)));
    doubled
        .min(LONGEST_WAIT)
        .mul_f64(rand::random_range(0.5..=1.0))
}

impl Lines {
    /// The next line, without its end; `None` at the end of the response.
    async fn next(&mut self) -> Result<Option<BytesMut>, Failure> {
        loop {
            if let Some(at) = self.buffer[self.searched..]
                .iter()
                .position(|b| *b == b'\n')
            {
                let line = self.buffer.split_to(self.searched + at);
                self.buffer.advance(1);
                self.searched = 0;
                if line.iter().any(|b| !b.is_ascii_whitespace()) {
                    return Ok(Some(line));
                }
                continue;
            }
            self.searched = self.buffer.len();
            if self.searched > MAX_LINE {
                return Err(Failure::Broken(format!(
                    "an event of over {MAX_LINE} bytes"
                )));
            }
            match self.body.frame().await {
                // What is left of a line that was cut off is not looked at: it comes again.
                None => return Ok(None),
                Some(Err(error)) => return Err(Failure::broken(&error)),
                Some(Ok(frame)) => {
                    if let Ok(data) = frame.into_data() {
                        self.buffer.extend_from_slice(&data);
                    }
                }
            }
        }
    }
}
