//! Objects from the Kubernetes API: one informer per kind, feeding the thread that keeps the world.
//!
//! ```text
//! API server -> Informer per kind -> decode -> bounded channel -> world's thread
//!               CustomResourceDefinitions -> which custom kinds there are
//! ```
//!
//! A kind whose CRD is absent is empty, and watched as soon as its CRD is there. A kind that cannot be listed keeps the
//! first world from being whole, with its reason; later it keeps what was last known (fail static).

pub mod client;
pub mod decode;
pub mod informer;

#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use kube::Client;
use mesh::names::Str;
use parking_lot::Mutex;
use serde::Deserialize;
use serde_json::value::RawValue;
use tokio::{
    sync::{mpsc, watch},
    task::JoinSet,
};

use crate::{
    gateway::names::REVISION,
    metrics::KubernetesEvents,
    object::{Kind, ObjectRef},
    translate::remote::{ExportKey, Exported},
    world::{Selectors, Settings},
};
use decode::Told;
use informer::{Failure, Informer, Step, Target};

/// A failure that lasts is logged this often.
const REMIND: Duration = Duration::from_secs(30);

/// What the world's thread takes in.
#[derive(Debug)]
pub enum Event {
    /// A whole list of a kind begins.
    Listing(Kind),
    /// An object as it is now.
    Is(Box<Told>),
    /// An object that is no more.
    Gone(ObjectRef),
    /// The list of a kind is complete: what it did not name is no more.
    Listed(Kind),
    /// The tags that point to this control plane's revision.
    Tags(BTreeSet<Str>),
    /// Keys of tokens were fetched.
    Keys,
    /// Other discovery selectors.
    Selectors(Selectors),
    /// Other settings of the mesh.
    Settings(Box<Settings>),
    /// What another cluster tells.
    Remote {
        /// Which.
        cluster: Str,
        /// What it has told before and is not among the changes is no more.
        is_whole: bool,
        /// What changed; `None`: it is no more.
        changes: Vec<(ExportKey, Option<Arc<Exported>>)>,
    },
}

/// The way to the world's thread. Bounded: where it does not keep up, informers read no further.
pub type Feed = mpsc::Sender<Event>;

/// A kind that is watched.
#[derive(Clone, Copy, Debug)]
struct Watched {
    kind: Kind,
    group: &'static str,
    plural: &'static str,
    /// Given by a CRD, in these versions, the one to take first; Kubernetes' own kinds have `v1`.
    custom: bool,
    versions: &'static [&'static str],
    fields: &'static str,
    metadata_only: bool,
}

const CORE: Watched = Watched {
    kind: Kind::Pod,
    group: "",
    plural: "pods",
    custom: false,
    versions: &["v1"],
    fields: "",
    metadata_only: false,
};

const fn custom(kind: Kind, group: &'static str, plural: &'static str) -> Watched {
    Watched {
        kind,
        group,
        plural,
        custom: true,
        versions: &["v1", "v1beta1"],
        ..CORE
    }
}

/// Everything that is watched (control-plane.md 2).
const WATCHED: [Watched; 24] = [
    Watched {
        kind: Kind::Namespace,
        plural: "namespaces",
        metadata_only: true,
        ..CORE
    },
    // Heartbeats and images of nodes are nobody's business here.
    Watched {
        kind: Kind::Node,
        plural: "nodes",
        metadata_only: true,
        ..CORE
    },
    // Ended pods have no part in the mesh, and may be many.
    Watched {
        fields: "status.phase!=Succeeded,status.phase!=Failed",
        ..CORE
    },
    Watched {
        kind: Kind::Service,
        plural: "services",
        ..CORE
    },
    Watched {
        kind: Kind::EndpointSlice,
        group: "discovery.k8s.io",
        plural: "endpointslices",
        ..CORE
    },
    custom(
        Kind::AuthorizationPolicy,
        "security.istio.io",
        "authorizationpolicies",
    ),
    custom(
        Kind::PeerAuthentication,
        "security.istio.io",
        "peerauthentications",
    ),
    custom(Kind::ServiceEntry, "networking.istio.io", "serviceentries"),
    custom(
        Kind::WorkloadEntry,
        "networking.istio.io",
        "workloadentries",
    ),
    custom(
        Kind::RequestAuthentication,
        "security.istio.io",
        "requestauthentications",
    ),
    custom(
        Kind::DestinationRule,
        "networking.istio.io",
        "destinationrules",
    ),
    custom(
        Kind::VirtualService,
        "networking.istio.io",
        "virtualservices",
    ),
    custom(Kind::EnvoyFilter, "networking.istio.io", "envoyfilters"),
    custom(Kind::Telemetry, "telemetry.istio.io", "telemetries"),
    custom(Kind::WasmPlugin, "extensions.istio.io", "wasmplugins"),
    custom(Kind::Gateway, "gateway.networking.k8s.io", "gateways"),
    custom(
        Kind::GatewayClass,
        "gateway.networking.k8s.io",
        "gatewayclasses",
    ),
    custom(Kind::HttpRoute, "gateway.networking.k8s.io", "httproutes"),
    custom(Kind::GrpcRoute, "gateway.networking.k8s.io", "grpcroutes"),
    Watched {
        versions: &["v1", "v1alpha3", "v1alpha2"],
        ..custom(Kind::TlsRoute, "gateway.networking.k8s.io", "tlsroutes")
    },
    Watched {
        versions: &["v1", "v1alpha2"],
        ..custom(Kind::TcpRoute, "gateway.networking.k8s.io", "tcproutes")
    },
    Watched {
        versions: &["v1", "v1alpha3"],
        ..custom(
            Kind::BackendTlsPolicy,
            "gateway.networking.k8s.io",
            "backendtlspolicies",
        )
    },
    Watched {
        versions: &["v1alpha1"],
        ..custom(
            Kind::BackendTrafficPolicy,
            "gateway.networking.x-k8s.io",
            "xbackendtrafficpolicies",
        )
    },
    // Roots of BackendTLSPolicies. Those that every namespace has are left out: there are as many as namespaces.
    Watched {
        kind: Kind::ConfigMap,
        plural: "configmaps",
        fields: "metadata.name!=kube-root-ca.crt,metadata.name!=istio-ca-root-cert",
        ..CORE
    },
];

/// The kinds of which a first list must have come before the world is whole.
pub fn kinds() -> BTreeSet<Kind> {
    WATCHED.iter().map(|watched| watched.kind).collect()
}

/// The kinds that are read of other clusters: what is configured counts only in the cluster that has it (control-plane.md 2). No
/// GatewayClasses, which the role that upstream gives to readers does not cover: classes are known by their names there.
pub fn remote_kinds() -> BTreeSet<Kind> {
    let kinds = [
        Kind::Namespace,
        Kind::Node,
        Kind::Pod,
        Kind::Service,
        Kind::EndpointSlice,
        Kind::Gateway,
    ];
    kinds.into()
}

impl Watched {
    fn plural(&self) -> String {
        match self.group {
            "" => self.plural.to_owned(),
            group => format!("{}.{group}", self.plural),
        }
    }

    fn target(&self, version: &str) -> Target {
        let root = match self.group {
            "" => format!("/api/{version}"),
            group => format!("/apis/{group}/{version}"),
        };
        Target {
            path: format!("{root}/{}", self.plural),
            plural: self.plural(),
            fields: self.fields.into(),
            labels: "",
            metadata_only: self.metadata_only,
        }
    }
}

/// What cannot be watched at the moment, and why: for readiness and metrics.
#[derive(Clone, Debug, Default)]
pub struct Troubles {
    all: Arc<Mutex<BTreeMap<String, Trouble>>>,
    /// Names another cluster in what is logged.
    of: Arc<str>,
}

#[derive(Clone, Debug)]
struct Trouble {
    text: String,
    logged: Instant,
}

impl Troubles {
    /// Per resource, what is wrong.
    pub fn all(&self) -> BTreeMap<String, String> {
        let troubles = self.all.lock();
        let text = |(plural, trouble): (&String, &Trouble)| (plural.clone(), trouble.text.clone());
        troubles.iter().map(text).collect()
    }

    pub(crate) fn note(&self, plural: &str, failure: &Failure) {
        let (text, now) = (failure.to_string(), Instant::now());
        let mut troubles = self.all.lock();
        let known = troubles.get(plural);
        let is_news = known
            .is_none_or(|known| known.text != text || now.duration_since(known.logged) >= REMIND);
        let logged = match known {
            Some(known) if !is_news => known.logged,
            _ => now,
        };
        troubles.insert(plural.to_owned(), Trouble { text, logged });
        drop(troubles);
        let of = &self.of;
        match is_news {
            true => tracing::warn!(
                resource = plural,
                "{failure}{of}; what was last known stays in force"
            ),
            false => tracing::debug!(resource = plural, "{failure}{of}"),
        }
    }

    pub(crate) fn clear(&self, plural: &str) {
        if self.all.lock().remove(plural).is_some() {
            tracing::info!(resource = plural, "watched again{}", self.of);
        }
    }
}

/// Names of the CRDs there are; `None` before their first list.
type Crds = watch::Receiver<Option<Arc<BTreeSet<String>>>>;

/// Starts informers of another cluster, for a world of its own. They end with the set.
pub fn start_remote(client: &Client, cluster: &str, feed: &Feed) -> JoinSet<()> {
    let troubles = Troubles {
        of: format!(" (cluster {cluster})").into(),
        ..Troubles::default()
    };
    let mut tasks = JoinSet::new();
    let untagged = feed.clone();
    // Tags point to this cluster's control planes.
    tasks.spawn(async move { drop(untagged.send(Event::Tags(BTreeSet::new())).await) });
    let kinds = remote_kinds();
    let watched = WATCHED.iter().filter(|it| kinds.contains(&it.kind));
    spawn(
        &mut tasks,
        client,
        feed,
        &troubles,
        &KubernetesEvents::default(),
        watched,
    );
    tasks
}

/// Starts all informers. They end with the set.
pub fn start(
    client: &Client,
    revision: &str,
    feed: &Feed,
    troubles: &Troubles,
    events: &KubernetesEvents,
) -> JoinSet<()> {
    let mut tasks = JoinSet::new();
    tasks.spawn(watch_tags(
        client.clone(),
        revision.to_owned(),
        feed.clone(),
        troubles.clone(),
    ));
    spawn(&mut tasks, client, feed, troubles, events, WATCHED.iter());
    tasks
}

fn spawn<'a>(
    tasks: &mut JoinSet<()>,
    client: &Client,
    feed: &Feed,
    troubles: &Troubles,
    events: &KubernetesEvents,
    all: impl Iterator<Item = &'a Watched>,
) {
    let (found, crds) = watch::channel(None);
    tasks.spawn(watch_crds(client.clone(), found, troubles.clone()));
    for watched in all {
        let task = Task {
            watched: *watched,
            client: client.clone(),
            feed: feed.clone(),
            troubles: troubles.clone(),
            events: events.clone(),
            is_listed: AtomicBool::new(false),
        };
        match watched.custom {
            true => tasks.spawn(task.run_custom(crds.clone())),
            false => tasks.spawn(task.run()),
        };
    }
}

struct Task {
    watched: Watched,
    client: Client,
    feed: Feed,
    troubles: Troubles,
    events: KubernetesEvents,
    /// What comes now is a change, and no part of a list.
    is_listed: AtomicBool,
}

/// The world's thread has ended; so does whoever feeds it.
struct Ended;

impl Task {
    async fn run(self) {
        let version = self.watched.versions.first().copied().unwrap_or("v1");
        let mut informer = Informer::new(self.client.clone(), self.watched.target(version));
        loop {
            let step = informer.next().await;
            if let Step::Failed(failure) = &step {
                self.troubles.note(&self.watched.plural(), failure);
            }
            if self.take(step).await.is_err() {
                return;
            }
        }
    }

    /// As `run`, while the CRD is there; without it, the kind is empty.
    async fn run_custom(self, mut crds: Crds) {
        let plural = self.watched.plural();
        let is_there = move |crds: &Option<Arc<BTreeSet<String>>>| {
            crds.as_ref().map(|crds| crds.contains(&plural))
        };
        loop {
            let Ok(there) = crds
                .wait_for(|crds| is_there(crds).is_some())
                .await
                .map(|crds| is_there(&crds))
            else {
                return;
            };
            let outcome = match there {
                Some(true) => self.until_absent(&mut crds, &is_there).await,
                _ => {
                    let told = self.empty().await;
                    match crds.wait_for(|crds| is_there(crds) == Some(true)).await {
                        Ok(_) => told,
                        Err(_) => Err(Ended),
                    }
                }
            };
            if outcome.is_err() {
                return;
            }
        }
    }

    async fn until_absent(
        &self,
        crds: &mut Crds,
        is_there: &impl Fn(&Option<Arc<BTreeSet<String>>>) -> Option<bool>,
    ) -> Result<(), Ended> {
        let mut versions = self.watched.versions.iter().cycle();
        let mut target = || {
            self.watched
                .target(versions.next().copied().unwrap_or("v1"))
        };
        let mut informer = Informer::new(self.client.clone(), target());
        loop {
            let step = tokio::select! {
                step = informer.next() => step,
                gone = crds.wait_for(|crds| is_there(crds) == Some(false)) => {
                    return gone.map(|_| ()).map_err(|_| Ended);
                }
            };
            match step {
                // Another version is, or its CRD is not established yet. Only the CRD's end makes the kind empty.
                Step::Failed(failure @ Failure::NotServed) => {
                    self.troubles.note(&self.watched.plural(), &failure);
                    informer.turn_to(target());
                }
                Step::Failed(failure) => self.troubles.note(&self.watched.plural(), &failure),
                step => self.take(step).await?,
            }
        }
    }

    async fn empty(&self) -> Result<(), Ended> {
        self.troubles.clear(&self.watched.plural());
        self.take(Step::Listing).await?;
        self.take(Step::Listed).await
    }

    fn count(&self, step: &Step) {
        let change = match step {
            Step::Listing => return self.is_listed.store(false, Ordering::Relaxed),
            Step::Listed => return self.is_listed.store(true, Ordering::Relaxed),
            Step::Is(_) if self.is_listed.load(Ordering::Relaxed) => "update",
            Step::Is(_) => "add",
            Step::Gone(_) => "delete",
            Step::Failed(_) => return,
        };
        self.events.count(self.watched.kind, change);
    }

    async fn take(&self, step: Step) -> Result<(), Ended> {
        let kind = self.watched.kind;
        let unreadable = |error: decode::Unreadable| {
            let error = &error as &dyn std::error::Error;
            tracing::warn!(resource = self.watched.plural(), error, "not read");
            Ok(())
        };
        self.count(&step);
        let event = match step {
            Step::Listing => Event::Listing(kind),
            Step::Listed => {
                self.troubles.clear(&self.watched.plural());
                Event::Listed(kind)
            }
            Step::Is(raw) => match decode::decode(kind, &raw) {
                Ok(told) => Event::Is(Box::new(told)),
                Err(error) => return unreadable(error),
            },
            Step::Gone(raw) => match decode::name(kind, &raw) {
                Ok(object) => Event::Gone(object),
                Err(error) => return unreadable(error),
            },
            Step::Failed(_) => return Ok(()),
        };
        self.feed.send(event).await.map_err(|_| Ended)
    }
}

#[derive(Deserialize)]
struct Named {
    metadata: NameOnly,
}

#[derive(Deserialize)]
struct NameOnly {
    name: String,
}

fn crd_name(raw: &RawValue) -> Option<String> {
    let named: Named = serde_json::from_str(raw.get()).ok()?;
    Some(named.metadata.name)
}

/// Keeps the set of CRDs' names.
async fn watch_crds(
    client: Client,
    found: watch::Sender<Option<Arc<BTreeSet<String>>>>,
    troubles: Troubles,
) {
    let target = Target {
        path: "/apis/apiextensions.k8s.io/v1/customresourcedefinitions".to_owned(),
        plural: "customresourcedefinitions.apiextensions.k8s.io".to_owned(),
        fields: "".into(),
        labels: "",
        metadata_only: true,
    };
    let mut informer = Informer::new(client, target);
    let (mut names, mut is_listing) = (BTreeSet::new(), true);
    loop {
        match informer.next().await {
            Step::Listing => (names, is_listing) = (BTreeSet::new(), true),
            Step::Is(raw) => names.extend(crd_name(&raw)),
            Step::Gone(raw) => {
                if let Some(name) = crd_name(&raw) {
                    names.remove(&name);
                }
            }
            Step::Listed => {
                is_listing = false;
                troubles.clear(&informer.target().plural);
            }
            Step::Failed(failure) => troubles.note(&informer.target().plural, &failure),
        }
        if !is_listing {
            informer::tell(&found, &names);
        }
    }
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Labelled {
    metadata: LabelsOnly,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct LabelsOnly {
    name: String,
    labels: BTreeMap<String, String>,
}

/// Keeps the set of tags that point to our revision. They are kept in webhooks' labels, as upstream's tools write them.
async fn watch_tags(client: Client, revision: String, feed: Feed, troubles: Troubles) {
    let target = Target {
        path: "/apis/admissionregistration.k8s.io/v1/mutatingwebhookconfigurations".to_owned(),
        plural: "mutatingwebhookconfigurations.admissionregistration.k8s.io".to_owned(),
        fields: "".into(),
        labels: "istio.io/tag",
        metadata_only: true,
    };
    let mut informer = Informer::new(client, target);
    let mut tags: BTreeMap<String, Str> = BTreeMap::new();
    let (mut told, mut is_listing) = (None, true);
    loop {
        match informer.next().await {
            Step::Listing => (tags, is_listing) = (BTreeMap::new(), true),
            Step::Is(raw) => {
                let read: Labelled = serde_json::from_str(raw.get()).unwrap_or_default();
                let LabelsOnly { name, labels } = read.metadata;
                let tag = labels.get("istio.io/tag");
                let is_ours = labels.get(REVISION).is_some_and(|rev| *rev == revision);
                match tag.filter(|_| is_ours) {
                    Some(tag) => tags.insert(name, tag.as_str().into()),
                    None => tags.remove(&name),
                };
            }
            Step::Gone(raw) => {
                let read: Labelled = serde_json::from_str(raw.get()).unwrap_or_default();
                tags.remove(&read.metadata.name);
            }
            Step::Listed => {
                is_listing = false;
                troubles.clear(&informer.target().plural);
            }
            Step::Failed(failure) => troubles.note(&informer.target().plural, &failure),
        }
        let now: BTreeSet<Str> = tags.values().cloned().collect();
        if !is_listing && told.as_ref() != Some(&now) {
            told = Some(now.clone());
            if feed.send(Event::Tags(now)).await.is_err() {
                return;
            }
        }
    }
}
