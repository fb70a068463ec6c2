//! The one place where commands meet a cluster: its address and credentials, its objects, and its pods' own ports by the
//! API server's port-forward. Every call has a deadline, and every error says what to do about it.

use std::{fmt::Debug, future::Future, time::Duration};

use anyhow::{Context, Result, anyhow, bail};
use controlplane::gateway::names::REVISION;
use http_body_util::{BodyExt, Empty, Limited};
use hyper::{Request, body::Bytes, client::conn::http1};
use hyper_util::rt::TokioIo;
use k8s_openapi::api::core::v1::Pod;
use kube::{
    Api, Client, Config, Resource,
    api::{ListParams, ObjectList},
    config::{KubeConfigOptions, Kubeconfig},
};
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::{access::Access, stream};

/// The longest that one question to the API server or to a pod may take.
pub(super) const PATIENCE: Duration = Duration::from_secs(20);
/// The largest answer of a pod that is read: a dump of some 100,000 workloads.
const MAX_ANSWER_BYTES: usize = 512 << 20;

/// Where a node tunnel's and a waypoint's admin port is.
pub(crate) const ADMIN_PORT: u16 = 15000;
/// Where the control plane's debug endpoints are.
pub(crate) const DEBUG_PORT: u16 = 15014;

/// A cluster, and where commands look in it.
#[derive(Clone)]
pub(crate) struct Cluster {
    client: Client,
    /// The API server, for messages.
    pub url: String,
    /// What `-n` says, or the context.
    pub namespace: String,
    /// Where the mesh's parts are.
    pub istio_namespace: String,
}

/// An HTTP answer of a pod.
#[derive(Debug)]
pub(crate) struct Answer {
    /// The status.
    pub status: u16,
    /// The body.
    pub body: Bytes,
}

impl Answer {
    /// The body, where the status says that it is what was asked for.
    pub(crate) fn success(self, what: &str) -> Result<Bytes> {
        if self.status != 200 {
            let text = String::from_utf8_lossy(&self.body);
            bail!("{what} answers {}: {}", self.status, text.trim());
        }
        Ok(self.body)
    }
}

impl Cluster {
    /// Reads the kubeconfig; talks to nobody yet.
    pub(crate) async fn connect(access: &Access) -> Result<Self> {
        let mut config = config(access).await?;
        config.connect_timeout = Some(Duration::from_secs(10));
        if access.impersonate.is_some() {
            config.auth_info.impersonate.clone_from(&access.impersonate);
        }
        if !access.impersonate_groups.is_empty() {
            config.auth_info.impersonate_groups = Some(access.impersonate_groups.clone());
        }
        let url = config.cluster_url.to_string();
        let namespace = access.namespace.clone();
        let namespace = namespace.unwrap_or_else(|| config.default_namespace.clone());
        let client = Client::try_from(config).context("use the kubeconfig's credentials")?;
        Ok(Self {
            client,
            url: url.trim_end_matches('/').to_owned(),
            namespace,
            istio_namespace: access.istio_namespace().to_owned(),
        })
    }

    /// The client, for what this module has no words for.
    pub(crate) fn client(&self) -> Client {
        self.client.clone()
    }

    /// Objects of all namespaces, or of the cluster.
    pub(crate) fn all<K>(&self) -> Api<K>
    where
        K: Resource<DynamicType = ()>,
    {
        Api::all(self.client())
    }

    /// Objects of one namespace.
    pub(crate) fn within<K>(&self, namespace: &str) -> Api<K>
    where
        K: Resource<DynamicType = (), Scope = k8s_openapi::NamespaceResourceScope>,
    {
        Api::namespaced(self.client(), namespace)
    }

    /// Waits for a call, with a deadline; its error says what was wanted and what to do.
    pub(crate) async fn ask<T>(
        &self,
        what: impl Into<String>,
        call: impl Future<Output = kube::Result<T>>,
    ) -> Result<T> {
        let what = what.into();
        match tokio::time::timeout(PATIENCE, call).await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(error)) => Err(self.told(&what, error)),
            Err(_) => Err(anyhow!(
                "{what}: the API server at {} has not answered for {} s",
                self.url,
                PATIENCE.as_secs()
            )),
        }
    }

    /// Lists objects.
    pub(crate) async fn list<K>(
        &self,
        what: impl Into<String>,
        api: &Api<K>,
        selector: &str,
    ) -> Result<ObjectList<K>>
    where
        K: Clone + DeserializeOwned + Debug,
    {
        let params = ListParams::default().labels(selector);
        let what = format!("list {}", what.into());
        self.ask(what, api.list(&params)).await
    }

    fn told(&self, what: &str, error: kube::Error) -> anyhow::Error {
        match &error {
            kube::Error::Api(status) if status.code == 403 => anyhow!(
                "{what}: not permitted: {}\n  remedy: use an account that may, or --as one",
                status.message
            ),
            kube::Error::Api(status) if status.code == 401 => anyhow!(
                "{what}: the API server at {} does not accept these credentials\n  remedy: log in again, or choose \
                 another --context",
                self.url
            ),
            kube::Error::Api(status) => anyhow!("{what}: {}", status.message),
            kube::Error::Service(_) | kube::Error::HyperError(_) => anyhow!(
                "{what}: cannot reach the API server at {}: {}\n  remedy: check that the cluster runs, and --kubeconfig \
                 and --context",
                self.url,
                innermost(&error)
            ),
            _ => anyhow::Error::new(error).context(what.to_owned()),
        }
    }

    /// The node tunnels, wherever they run.
    pub(crate) async fn tunnels(&self) -> Result<Vec<Pod>> {
        self.parts("app=ztunnel").await
    }

    /// The control plane's pods.
    pub(crate) async fn control_planes(&self) -> Result<Vec<Pod>> {
        let api = self.within::<Pod>(&self.istio_namespace);
        let what = format!("the control plane's pods in {}", self.istio_namespace);
        Ok(self.list(&what, &api, "app=istiod").await?.items)
    }

    /// The control planes that can be asked; an error that says why where there is none.
    pub(crate) async fn ready_control_planes(&self, revision: Option<&str>) -> Result<Vec<Pod>> {
        let of_revision = |it: &Pod| {
            let labels = it.metadata.labels.as_ref();
            let of = labels.and_then(|it| it.get(REVISION));
            revision.is_none_or(|wanted| of.map_or("default", String::as_str) == wanted)
        };
        let mut pods = self.control_planes().await?;
        pods.retain(of_revision);
        let (ready, waiting): (Vec<_>, Vec<_>) = pods.into_iter().partition(is_ready);
        match (ready.is_empty(), waiting.first()) {
            (false, _) => Ok(ready),
            (true, Some(pod)) => bail!(
                "no control plane is ready: {}: {}\n  remedy: leyline check, and the pod's log",
                PodName::from(pod),
                problem(pod).unwrap_or_else(|| "not ready".to_owned())
            ),
            (true, None) => bail!(
                "no control plane is in namespace {} (no pod labelled app=istiod)\n  remedy: leyline install, or -i NAMESPACE",
                self.istio_namespace
            ),
        }
    }

    /// Pods by label: of all namespaces, or where that is not permitted of the mesh's own.
    async fn parts(&self, selector: &str) -> Result<Vec<Pod>> {
        let what = format!("pods labelled {selector}");
        if let Ok(pods) = self.list(&what, &self.all::<Pod>(), selector).await {
            return Ok(pods.items);
        }
        let api = self.within::<Pod>(&self.istio_namespace);
        Ok(self.list(&what, &api, selector).await?.items)
    }

    /// Sends a request to a pod's own port, which may be on its loopback.
    pub(crate) async fn call(
        &self,
        pod: &PodName,
        method: http::Method,
        port: u16,
        path: &str,
    ) -> Result<Answer> {
        let called = async {
            let api = self.within::<Pod>(&pod.namespace);
            let mut forward = api.portforward(&pod.name, &[port]).await?;
            let stream = forward.take_stream(port);
            let stream = stream.context("the API server opened no stream")?;
            let failure = forward.take_error(port);
            let answer = exchange(stream, method, port, path).await;
            forward.abort();
            match (answer, failure) {
                (Ok(answer), _) => Ok(answer),
                (Err(error), Some(failure)) => Err(match failure.await {
                    Some(told) => anyhow!("{}", forwarded(&told, port)),
                    None => error,
                }),
                (Err(error), None) => Err(error),
            }
        };
        let result = match tokio::time::timeout(PATIENCE, called).await {
            Ok(result) => result,
            Err(_) => Err(anyhow!("no answer for {} s", PATIENCE.as_secs())),
        };
        result.with_context(|| format!("ask {pod} on port {port} for {path}"))
    }

    /// Reads an endless answer of a pod's own port, line by line: see [`stream::lines`].
    pub(crate) async fn follow(
        &self,
        pod: &PodName,
        port: u16,
        path: &str,
        each: impl FnMut(&str) -> Result<()>,
    ) -> Result<()> {
        let api = self.within::<Pod>(&pod.namespace);
        let asked = tokio::time::timeout(PATIENCE, api.portforward(&pod.name, &[port])).await;
        let mut forward =
            asked.map_err(|_| anyhow!("no answer for {} s", PATIENCE.as_secs()))??;
        let opened = forward.take_stream(port);
        let opened = opened.context("the API server opened no stream")?;
        let followed = stream::lines(opened, port, path, each).await;
        forward.abort();
        followed.with_context(|| format!("follow {path} of {pod} on port {port}"))
    }

    /// The JSON that a pod answers.
    pub(crate) async fn json(&self, pod: &PodName, port: u16, path: &str) -> Result<Value> {
        let body = self.call(pod, http::Method::GET, port, path).await?;
        let body = body.success(&format!("{pod} on port {port}{path}"))?;
        serde_json::from_slice(&body)
            .with_context(|| format!("read what {pod} answered to {path} as JSON"))
    }
}

/// What kubelet says of a port that it cannot reach, without the names of its own files.
fn forwarded(told: &str, port: u16) -> String {
    match told.contains("connection refused") {
        true => {
            format!("nothing listens on port {port} there: the program is not up yet, or has ended")
        }
        false => told.trim().to_owned(),
    }
}

async fn config(access: &Access) -> Result<Config> {
    let options = KubeConfigOptions {
        context: access.context.clone(),
        ..KubeConfigOptions::default()
    };
    let read = match &access.kubeconfig {
        Some(path) => Kubeconfig::read_from(path)
            .with_context(|| format!("read the kubeconfig {}", path.display()))?,
        None => match Kubeconfig::read() {
            Ok(read) => read,
            Err(error) => {
                let in_cluster = Config::incluster()
                    .ok()
                    .filter(|_| access.context.is_none());
                return in_cluster.ok_or_else(|| {
                    anyhow!("no cluster is configured: {error}\n  remedy: give --kubeconfig FILE, or set KUBECONFIG")
                });
            }
        },
    };
    let contexts: Vec<_> = read.contexts.iter().map(|it| it.name.clone()).collect();
    let named = access.context.as_deref();
    if let Some(missing) = named.filter(|it| !contexts.iter().any(|known| known == it)) {
        let known = contexts.join(", ");
        bail!("the kubeconfig has no context {missing:?}\n  remedy: choose one of: {known}");
    }
    Config::from_custom_kubeconfig(read, &options)
        .await
        .context("use the kubeconfig")
}

/// The last of a chain of causes: what the system said.
fn innermost(error: &(dyn std::error::Error + 'static)) -> String {
    let mut last = error;
    while let Some(source) = last.source() {
        last = source;
    }
    last.to_string()
}

async fn exchange(
    stream: impl tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
    method: http::Method,
    port: u16,
    path: &str,
) -> Result<Answer> {
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    // Ends with the stream, whose failure the request sees.
    let driver = tokio::spawn(connection);
    let request = Request::builder()
        .method(method)
        .uri(path)
        .header(http::header::HOST, format!("localhost:{port}"))
        .body(Empty::<Bytes>::new())?;
    let response = sender.send_request(request).await?;
    let status = response.status().as_u16();
    let body = Limited::new(response.into_body(), MAX_ANSWER_BYTES);
    let body = body
        .collect()
        .await
        .map_err(|error| anyhow!("{error}"))?
        .to_bytes();
    driver.abort();
    Ok(Answer { status, body })
}

/// A pod's name and namespace: written `name.namespace`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct PodName {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
}

impl From<&Pod> for PodName {
    fn from(pod: &Pod) -> Self {
        Self {
            namespace: pod.metadata.namespace.clone().unwrap_or_default(),
            name: pod.metadata.name.clone().unwrap_or_default(),
        }
    }
}

impl std::fmt::Display for PodName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}", self.name, self.namespace)
    }
}

/// Whether the pod runs and says that it is ready.
pub(crate) fn is_ready(pod: &Pod) -> bool {
    let conditions = pod.status.as_ref().and_then(|it| it.conditions.as_deref());
    let ready =
        |it: &k8s_openapi::api::core::v1::PodCondition| it.type_ == "Ready" && it.status == "True";
    pod.metadata.deletion_timestamp.is_none() && conditions.unwrap_or_default().iter().any(ready)
}

/// Whether the pod's containers can be running: it is on a node and has not ended.
pub(crate) fn is_running(pod: &Pod) -> bool {
    let phase = pod.status.as_ref().and_then(|it| it.phase.as_deref());
    phase == Some("Running")
}

/// Why a pod's containers do not run, in kubelet's words.
pub(crate) fn problem(pod: &Pod) -> Option<String> {
    let status = pod.status.as_ref()?;
    let containers = status.container_statuses.as_deref().unwrap_or_default();
    let init = status
        .init_container_statuses
        .as_deref()
        .unwrap_or_default();
    for container in init.iter().chain(containers) {
        let state = container.state.clone().unwrap_or_default();
        if let Some(waiting) = state.waiting {
            let reason = waiting.reason.unwrap_or_default();
            let message = waiting.message.unwrap_or_default();
            let text = format!("{}: {reason} {message}", container.name);
            return Some(text.trim_end().to_owned());
        }
    }
    let conditions = status.conditions.as_deref().unwrap_or_default();
    let failed = conditions
        .iter()
        .find(|it| it.status == "False" && it.message.is_some());
    failed.and_then(|it| it.message.clone())
}

/// The node that the pod is on.
pub(crate) fn node_of(pod: &Pod) -> Option<&str> {
    pod.spec.as_ref().and_then(|it| it.node_name.as_deref())
}
