//! Other clusters of the mesh: named by Secrets, each looked at by informers and a world of its own, which tells this cluster's
//! world what is global there.
//!
//! ```text
//! Secrets -> wanted -> per cluster: informers -> World (is_remote) -> Event::Remote -> this cluster's World
//! ```
//!
//! One that cannot be reached, or whose Secret is broken, keeps what was last known of it and holds up nobody: the start waits for
//! all of them, but no longer than [`PATIENCE`].

mod secret;
#[cfg(test)]
mod tests;

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use futures_util::future::BoxFuture;
use k8s_openapi::{ByteString, apimachinery::pkg::apis::meta::v1::ObjectMeta};
use kube::{Client, config::Kubeconfig};
use mesh::names::Str;
use serde::Deserialize;
use tokio::{sync::watch, task::JoinSet};

use super::gateway_of;
use crate::{
    auth::Review,
    clusters::{Member, Members},
    metrics::Count,
    object::Kind,
    source::cluster::{
        self, Event, Feed, Troubles,
        client::ClientError,
        informer::{self, Informer, Step, Target},
    },
    world::{Selectors, Settings, World},
};
use secret::{Refused, Secrets, Wanted};

/// Upstream's `PILOT_REMOTE_CLUSTER_TIMEOUT`: how long the start waits for other clusters.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Makes a client of a kubeconfig. In tests, of anything.
pub type Connect =
    Arc<dyn Fn(Arc<Kubeconfig>) -> BoxFuture<'static, Result<Client, ClientError>> + Send + Sync>;

/// What is known of another cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Known {
    /// The Secret that names it.
    pub secret_name: Str,
    /// How far it is.
    pub sync_status: Stage,
    /// What is wrong, for people; empty: nothing.
    pub message: String,
}

/// How far another cluster is, in upstream's words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Its first lists are under way.
    Syncing,
    /// It was not whole in time; it is served without, and taken in once it is.
    Timeout,
    /// It is known, and followed.
    Synced,
    /// Its Secret cannot be used.
    Refused,
}

impl Stage {
    /// Its name.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Syncing => "syncing",
            Self::Timeout => "timeout",
            Self::Synced => "synced",
            Self::Refused => "refused",
        }
    }
}

/// What is known of all other clusters, by name.
pub type Status = watch::Receiver<BTreeMap<Str, Known>>;

/// What is told of other clusters.
#[derive(Clone, Debug)]
pub struct Told {
    /// For people.
    pub status: Status,
    /// For their proxies.
    pub members: watch::Receiver<Members>,
}

impl Told {
    /// There are no others.
    pub fn nobody() -> Self {
        Self {
            status: watch::channel(BTreeMap::new()).1,
            members: watch::channel(Members::new()).1,
        }
    }
}

/// How other clusters' objects are read; another value reads all of them anew.
#[derive(Clone, Debug, PartialEq)]
pub struct Reading {
    /// This cluster's settings.
    pub settings: Settings,
    /// Which namespaces the mesh looks at.
    pub selectors: Selectors,
}

/// Follows the Secrets and what they name.
pub struct Remotes {
    /// This cluster's API server.
    pub client: Client,
    /// Where the Secrets are.
    pub namespace: String,
    /// The way to this cluster's world.
    pub feed: Feed,
    /// How objects are read.
    pub reading: watch::Receiver<Reading>,
    /// Makes clients.
    pub connect: Connect,
    /// What of the API server cannot be watched.
    pub troubles: Troubles,
    /// Counts those that the start did not wait for any longer.
    pub timeouts: Count,
    /// Of which a token of a caller there must name one.
    pub audiences: Vec<String>,
}

struct Manager {
    remotes: Remotes,
    status: watch::Sender<BTreeMap<Str, Known>>,
    members: watch::Sender<Members>,
    running: BTreeMap<Str, Running>,
    refused: Vec<Refused>,
}

struct Running {
    digest: u64,
    reading: Reading,
    /// One task. A set, so that it ends with this.
    task: JoinSet<()>,
}

impl Running {
    fn is_over(&mut self) -> bool {
        while self.task.try_join_next().is_some() {}
        self.task.is_empty()
    }
}

impl Remotes {
    /// Starts; ends with the set.
    pub fn start(self) -> (Told, JoinSet<()>) {
        let (status, known) = watch::channel(BTreeMap::new());
        let (members, their) = watch::channel(Members::new());
        let (found, secrets) = watch::channel(None);
        let mut tasks = JoinSet::new();
        tasks.spawn(watch_secrets(
            self.client.clone(),
            self.namespace.clone(),
            found,
            self.troubles.clone(),
        ));
        let first = await_first(
            self.feed.clone(),
            secrets.clone(),
            status.clone(),
            self.timeouts.clone(),
        );
        tasks.spawn(first);
        let manager = Manager {
            remotes: self,
            status,
            members,
            running: BTreeMap::new(),
            refused: Vec::new(),
        };
        tasks.spawn(manager.run(secrets));
        let told = Told {
            status: known,
            members: their,
        };
        (told, tasks)
    }
}

type Found = watch::Receiver<Option<Arc<Secrets>>>;

/// Lets this cluster's world become whole once the others are known, or were waited for long enough.
async fn await_first(
    feed: Feed,
    mut secrets: Found,
    status: watch::Sender<BTreeMap<Str, Known>>,
    timeouts: Count,
) {
    let mut known = status.subscribe();
    let all = async {
        // Both senders live as long as the manager, and so does this task.
        let own = feed_clusters(&mut secrets).await;
        let is_done = |known: &BTreeMap<Str, Known>| {
            known.len() >= own && known.values().all(|it| it.sync_status != Stage::Syncing)
        };
        drop(known.wait_for(is_done).await);
    };
    if tokio::time::timeout(PATIENCE, all).await.is_err() {
        status.send_modify(|known| {
            for (cluster, known) in known {
                if known.sync_status == Stage::Syncing {
                    known.sync_status = Stage::Timeout;
                    timeouts.increment();
                    let secret = &known.secret_name;
                    tracing::warn!(%cluster, %secret, "not known in time; served without it until it is");
                }
            }
        });
    }
    for event in [Event::Listing(Kind::Secret), Event::Listed(Kind::Secret)] {
        if feed.send(event).await.is_err() {
            return;
        }
    }
}

/// Waits for the first list of Secrets; answers with how many Secrets there are that name clusters: at least one status for
/// each follows.
async fn feed_clusters(secrets: &mut Found) -> usize {
    let listed = secrets.wait_for(Option::is_some).await;
    let listed = listed.ok().and_then(|it| it.clone());
    let all = listed.iter().flat_map(|all| all.values());
    let names: std::collections::BTreeSet<&String> = all.flat_map(BTreeMap::keys).collect();
    names.len()
}

impl Manager {
    async fn run(mut self, mut secrets: Found) {
        loop {
            let known = secrets.borrow_and_update().clone();
            if let Some(known) = known {
                let reading = self.remotes.reading.borrow_and_update().clone();
                if self.reconcile(&known, &reading).await.is_err() {
                    return;
                }
            }
            let changed = tokio::select! {
                changed = secrets.changed() => changed,
                changed = self.remotes.reading.changed() => changed,
            };
            if changed.is_err() {
                return;
            }
        }
    }

    /// An error: this cluster's world has ended.
    async fn reconcile(&mut self, secrets: &Secrets, reading: &Reading) -> Result<(), Ended> {
        let own = &reading.settings.cluster_id;
        let (wanted, refused) = secret::wanted(own, secrets);
        let gone: Vec<Str> = self
            .running
            .keys()
            // One whose Secret broke goes on by what it had.
            .filter(|it| !wanted.contains_key(*it) && !refused.iter().any(|r| r.cluster == **it))
            .cloned()
            .collect();
        for cluster in gone {
            self.stop(&cluster).await;
            self.members.send_modify(|all| {
                all.remove(&cluster);
            });
            tracing::info!(%cluster, "no longer looked at: no Secret names it");
            self.status.send_modify(|all| {
                all.remove(&cluster);
            });
            self.tell_gone(cluster).await?;
        }
        self.told_refused(refused);
        for (cluster, wanted) in wanted {
            let same = self.running.get_mut(&cluster).is_some_and(|it| {
                it.digest == wanted.digest && it.reading == *reading && !it.is_over()
            });
            if !same {
                self.stop(&cluster).await;
                self.look_at(cluster, &wanted, reading);
            }
        }
        Ok(())
    }

    fn told_refused(&mut self, refused: Vec<Refused>) {
        let news = refused.iter().filter(|it| !self.refused.contains(it));
        for Refused {
            cluster,
            secret,
            why,
        } in news
        {
            tracing::warn!(%cluster, %secret, why, "a Secret's cluster is not looked at by it");
        }
        self.status.send_modify(|all| {
            // A mended Secret's cluster gets another state at once, and a Secret's that is gone has none.
            all.retain(|_, known| known.sync_status != Stage::Refused);
            for it in &refused {
                let known = all.entry(it.cluster.clone()).or_insert_with(|| Known {
                    secret_name: it.secret.clone(),
                    sync_status: Stage::Refused,
                    message: String::new(),
                });
                known.message = format!("Secret {}: {}", it.secret, it.why);
            }
            for (cluster, known) in all {
                if !refused.iter().any(|it| it.cluster == *cluster) {
                    known.message.clear();
                }
            }
        });
        self.refused = refused;
    }

    /// Once this returns, nothing more is told of the cluster: what is sent next is the last word.
    async fn stop(&mut self, cluster: &Str) {
        if let Some(mut running) = self.running.remove(cluster) {
            running.task.shutdown().await;
        }
    }

    async fn tell_gone(&self, cluster: Str) -> Result<(), Ended> {
        let gone = Event::Remote {
            cluster,
            is_whole: true,
            changes: Vec::new(),
        };
        self.remotes.feed.send(gone).await.map_err(|_| Ended)
    }

    fn look_at(&mut self, cluster: Str, wanted: &Wanted, reading: &Reading) {
        tracing::info!(%cluster, secret = %wanted.secret, "looked at");
        // What was read by other credentials is not followed any more: nobody is vouched for by it.
        self.members.send_modify(|all| {
            all.insert(cluster.clone(), None);
        });
        self.status.send_modify(|all| {
            let known = Known {
                secret_name: wanted.secret.clone(),
                sync_status: Stage::Syncing,
                message: String::new(),
            };
            all.insert(cluster.clone(), known);
        });
        let looking = Looking {
            cluster: cluster.clone(),
            connecting: (self.remotes.connect)(wanted.kubeconfig.clone()),
            reading: Reading {
                settings: elsewhere(&reading.settings, &cluster),
                selectors: reading.selectors.clone(),
            },
            feed: self.remotes.feed.clone(),
            status: self.status.clone(),
            members: self.members.clone(),
            audiences: self.remotes.audiences.clone(),
        };
        let mut running = Running {
            digest: wanted.digest,
            reading: reading.clone(),
            task: JoinSet::new(),
        };
        running.task.spawn(looking.look());
        self.running.insert(cluster, running);
    }
}

/// This cluster's settings, for another of the same mesh. Its network is what it says itself.
fn elsewhere(own: &Settings, cluster: &Str) -> Settings {
    Settings {
        cluster_id: cluster.clone(),
        network: "".into(),
        is_remote: true,
        ..own.clone()
    }
}

struct Ended;

/// One cluster.
struct Looking {
    cluster: Str,
    connecting: BoxFuture<'static, Result<Client, ClientError>>,
    reading: Reading,
    feed: Feed,
    status: watch::Sender<BTreeMap<Str, Known>>,
    members: watch::Sender<Members>,
    audiences: Vec<String>,
}

impl Looking {
    async fn look(self) {
        let Self {
            cluster,
            connecting,
            reading,
            feed,
            status,
            members,
            audiences,
        } = self;
        let say = |sync_status, message: String| {
            status.send_if_modified(|all| {
                let Some(known) = all.get_mut(&cluster) else {
                    return false;
                };
                (known.sync_status, known.message) = (sync_status, message);
                true
            });
        };
        let client = match connecting.await {
            Ok(client) => client,
            Err(error) => {
                let error = &error as &dyn std::error::Error;
                tracing::warn!(%cluster, error, "its kubeconfig cannot be used");
                return say(Stage::Refused, "its kubeconfig cannot be used".to_owned());
            }
        };
        let kinds = cluster::remote_kinds();
        let world = World::fed(kinds, reading.settings, reading.selectors);
        let (world, own_feed) = match world {
            Ok(made) => made,
            Err(error) => {
                let error = &error as &dyn std::error::Error;
                tracing::error!(%cluster, error, "no thread for it");
                return say(
                    Stage::Refused,
                    "the system refuses a thread for it".to_owned(),
                );
            }
        };
        let _informers = cluster::start_remote(&client, &cluster, &own_feed);
        world.listed().await;
        members.send_modify(|all| {
            let member = member(&world, client, audiences);
            all.insert(cluster.clone(), Some(member));
        });
        let mut changes = world.take_exports();
        let mut is_whole = true;
        loop {
            let event = Event::Remote {
                cluster: cluster.clone(),
                is_whole,
                changes,
            };
            if feed.send(event).await.is_err() {
                return;
            }
            if is_whole {
                tracing::info!(%cluster, "known");
                say(Stage::Synced, String::new());
            }
            is_whole = false;
            changes = world.next_exports().await;
        }
    }
}

/// Its API server judges its tokens, its pods are those of its own world.
fn member(world: &World, client: Client, audiences: Vec<String>) -> Member {
    Member {
        tokens: Arc::new(Review::new(client, audiences)),
        pods: Arc::new(world.clone()),
        gateway_of: Arc::new(gateway_of(world)),
    }
}

/// Keeps the Secrets that name clusters.
async fn watch_secrets(
    client: Client,
    namespace: String,
    found: watch::Sender<Option<Arc<Secrets>>>,
    troubles: Troubles,
) {
    let target = Target {
        path: format!("/api/v1/namespaces/{namespace}/secrets"),
        plural: "secrets".to_owned(),
        fields: "".into(),
        labels: "istio/multiCluster=true",
        metadata_only: false,
    };
    let mut informer = Informer::new(client, target);
    let (mut secrets, mut is_listing) = (Secrets::new(), true);
    loop {
        match informer.next().await {
            Step::Listing => (secrets, is_listing) = (Secrets::new(), true),
            Step::Is(raw) => {
                // What the API server hands out and this does not read names no cluster.
                let read: Secret = serde_json::from_str(raw.get()).unwrap_or_default();
                let name = read.metadata.name.unwrap_or_default();
                secrets.insert(name.as_str().into(), read.data.unwrap_or_default());
            }
            Step::Gone(raw) => {
                let read: Secret = serde_json::from_str(raw.get()).unwrap_or_default();
                secrets.remove(read.metadata.name.unwrap_or_default().as_str());
            }
            Step::Listed => {
                is_listing = false;
                troubles.clear("secrets");
            }
            Step::Failed(failure) => troubles.note("secrets", &failure),
        }
        if !is_listing {
            informer::tell(&found, &secrets);
        }
    }
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Secret {
    metadata: ObjectMeta,
    data: Option<BTreeMap<String, ByteString>>,
}
