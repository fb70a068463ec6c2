//! Secrets that waypoints are to have, each watched by its name.
//!
//! The account needs rights to them in the namespaces of such waypoints alone, and no Secret that nobody names is ever
//! read. What was read last stays in force while the API server does not answer.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use k8s_openapi::api::core::v1 as core;
use kube::Client;
use tokio::{task::JoinSet, time::timeout};

use crate::{
    object::Name,
    source::cluster::informer::{Failure, Informer, Step, Target},
    translate::l7::credential::{Credential, Found},
    world::World,
};

/// Secrets that are watched at a time; each costs an open request.
const MOST: usize = 1000;
/// How long the start waits for what is asked for to be read; longer, and who waits for a control plane waits in vain.
const PATIENCE: Duration = Duration::from_secs(5);

/// Watches the Secrets that the world asks for, for ever. Without a client, there are none but those of the folder.
pub async fn keep(world: World, client: Option<Client>) {
    let mut wanted = world.secrets();
    let mut watched = BTreeMap::new();
    let mut tasks = JoinSet::new();
    loop {
        let now = wanted.borrow_and_update().clone();
        follow(&world, client.as_ref(), &mut watched, &now, &mut tasks);
        tokio::select! {
            changed = wanted.changed() => if changed.is_err() { return },
            // One that has ended was not wanted any more.
            Some(_) = tasks.join_next(), if !tasks.is_empty() => {}
        }
    }
}

/// Waits until something has come of all that is asked for, or it took too long.
pub async fn answered(world: &World) {
    if timeout(PATIENCE, world.answered()).await.is_err() {
        tracing::warn!("not all keys and Secrets could be read: what needs them refuses");
    }
}

fn follow(
    world: &World,
    client: Option<&Client>,
    watched: &mut BTreeMap<Name, Option<tokio::task::AbortHandle>>,
    wanted: &BTreeSet<Name>,
    tasks: &mut JoinSet<()>,
) {
    watched.retain(|secret, task| {
        let stays = wanted.contains(secret);
        if let (false, Some(task)) = (stays, task) {
            task.abort();
            world.set_credential(secret.clone(), None);
        }
        stays
    });
    for secret in wanted {
        if watched.contains_key(secret) {
            continue;
        }
        let task = client.filter(|_| watched.len() < MOST).map(|client| {
            let informer = Informer::new(client.clone(), target(secret));
            tasks.spawn(follow_one(world.clone(), secret.clone(), informer))
        });
        if task.is_none() && client.is_some() {
            tracing::warn!(%secret, most = MOST, "not read: too many Secrets are named");
        }
        watched.insert(secret.clone(), task);
    }
}

fn target(secret: &Name) -> Target {
    Target {
        path: format!("/api/v1/namespaces/{}/secrets", secret.namespace),
        plural: "secrets".to_owned(),
        fields: format!("metadata.name={}", secret.name).into(),
        labels: "",
        metadata_only: false,
    }
}

async fn follow_one(world: World, secret: Name, mut informer: Informer) {
    let mut known: Option<Found> = None;
    let mut listed = Found::Absent;
    loop {
        let news = match informer.next().await {
            Step::Listing => {
                listed = Found::Absent;
                continue;
            }
            Step::Is(raw) => {
                listed = read(raw.get());
                Some(listed.clone())
            }
            Step::Gone(_) => Some(Found::Absent),
            Step::Listed => Some(listed.clone()),
            Step::Failed(failure) => failed(&secret, failure, known.as_ref()),
        };
        if let Some(news) = news.filter(|news| known.as_ref() != Some(news)) {
            known = Some(news.clone());
            world.set_credential(secret.clone(), Some(news));
        }
    }
}

fn read(raw: &str) -> Found {
    match serde_json::from_str::<core::Secret>(raw) {
        Ok(secret) => Found::Is(Credential::of(&secret)),
        // The error would show what stands there.
        Err(_) => Found::Unreadable("cannot be parsed".into()),
    }
}

/// What a failure changes: nothing, where something was read before.
fn failed(secret: &Name, failure: Failure, known: Option<&Found>) -> Option<Found> {
    if matches!(known, Some(Found::Is(_) | Found::Absent)) {
        tracing::debug!(%secret, "{failure}; what was read last stays in force");
        return None;
    }
    let why = match failure {
        Failure::Forbidden(_) => format!(
            "the control plane may not read it: name {} in the chart's istiod.credentialNamespaces",
            secret.namespace
        ),
        // A list that is compacted or went back is asked for again at once.
        Failure::Compacted | Failure::WentBack => return None,
        other => other.to_string(),
    };
    let found = Found::Unreadable(why.as_str().into());
    if known != Some(&found) {
        tracing::warn!(%secret, why, "a Secret that a DestinationRule names is not read");
    }
    Some(found)
}

#[cfg(test)]
mod tests {
    use mesh::l7::{
        backend::{BackendTls, Pem},
        view::Resource,
    };
    use prost::Message as _;
    use serde_json::{Value, json, value::to_raw_value};

    use super::*;
    use crate::{
        object::Kind,
        output::Subscription,
        source::cluster::{Event, decode::decode},
        testing::api::{Answer, FakeApi},
        world::{Selectors, Settings},
    };

    const DEADLINE: Duration = Duration::from_secs(30);

    fn block(kind: &str) -> String {
        format!("-----BEGIN {kind}-----\nMAA=\n-----END {kind}-----\n")
    }

    fn secret(parts: &Value) -> Value {
        json!({"metadata": {"name": "client", "namespace": "a"}, "stringData": parts})
    }

    fn objects() -> [(Kind, Value); 4] {
        let namespace = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "a"}});
        let gateway = json!({
            "apiVersion": "gateway.networking.k8s.io/v1", "kind": "Gateway",
            "metadata": {"name": "w", "namespace": "a"},
            "spec": {
                "gatewayClassName": "leyline-waypoint",
                "listeners": [{"name": "mesh", "port": 15008, "protocol": "HBONE"}],
            },
            "status": {"addresses": [{"type": "Hostname", "value": "w.a.svc.cluster.local"}]},
        });
        let service = json!({
            "apiVersion": "v1", "kind": "Service",
            "metadata": {"name": "web", "namespace": "a", "labels": {"istio.io/use-waypoint": "w"}},
            "spec": {"clusterIP": "10.96.0.1", "ports": [{"name": "http", "port": 80}]},
        });
        let rule = json!({
            "apiVersion": "networking.istio.io/v1", "kind": "DestinationRule",
            "metadata": {"name": "web", "namespace": "a"},
            "spec": {
                "host": "web",
                "trafficPolicy": {"tls": {"mode": "MUTUAL", "credentialName": "client"}},
            },
        });
        [
            (Kind::Namespace, namespace),
            (Kind::Gateway, gateway),
            (Kind::Service, service),
            (Kind::DestinationRule, rule),
        ]
    }

    struct Kept {
        api: FakeApi,
        told: Subscription,
        world: World,
        _tasks: JoinSet<()>,
    }

    async fn kept(api: FakeApi) -> Kept {
        let selectors = Selectors::default();
        let (world, feed) = World::fed(BTreeSet::new(), Settings::default(), selectors).unwrap();
        let told = world.subscribe();
        feed.send(Event::Tags(BTreeSet::new())).await.unwrap();
        for (kind, object) in objects() {
            let object = decode(kind, &to_raw_value(&object).unwrap()).unwrap();
            feed.send(Event::Is(Box::new(object))).await.unwrap();
        }
        let mut tasks = JoinSet::new();
        tasks.spawn(keep(world.clone(), Some(api.client())));
        // The world lives as long as its feed.
        tasks.spawn(async move {
            std::future::pending::<()>().await;
            drop(feed);
        });
        Kept {
            api,
            told,
            world,
            _tasks: tasks,
        }
    }

    impl Kept {
        /// Waits until the waypoint is told TLS of the service that passes.
        async fn until(&mut self, passes: impl Fn(&BackendTls) -> bool) {
            let seen = async {
                loop {
                    let changes = self.told.next().await;
                    let bodies = changes.upserts.iter().map(|it| it.body.clone());
                    let told = bodies.filter_map(|body| {
                        let wire = proto::waypoint::Resource::decode(body).ok()?;
                        match Resource::try_from(wire).ok()? {
                            Resource::Backend(policy) => policy.policy.tls,
                            _ => None,
                        }
                    });
                    if told.into_iter().any(|tls| passes(&tls)) {
                        return;
                    }
                }
            };
            timeout(DEADLINE, seen).await.expect("told in time");
        }

        async fn until_refused(&mut self, part: &str) {
            let is_refused =
                |tls: &BackendTls| matches!(tls, BackendTls::Invalid(why) if why.contains(part));
            self.until(is_refused).await;
        }

        async fn until_shown(&mut self, key: &str) {
            let key = Pem::Inline(key.as_bytes().to_vec());
            let is_shown = |tls: &BackendTls| matches!(tls, BackendTls::Verify { client: Some(client), .. } if client.key == key);
            self.until(is_shown).await;
        }
    }

    #[tokio::test]
    async fn a_named_secret_reaches_its_waypoint_and_follows_its_changes() {
        let mut kept = kept(FakeApi::new()).await;
        kept.until_refused("there is no Secret a/client").await;
        timeout(DEADLINE, kept.world.answered()).await.unwrap();
        let (chain, key) = (block("CERTIFICATE"), block("PRIVATE KEY"));
        let pair = json!({"tls.crt": chain, "tls.key": key});
        kept.api.put("api/v1", "secrets", secret(&pair));
        kept.until_shown(&key).await;
        let renewed = block("EC PRIVATE KEY");
        let pair = json!({"tls.crt": chain, "tls.key": renewed});
        kept.api.put("api/v1", "secrets", secret(&pair));
        kept.until_shown(&renewed).await;
        kept.api
            .put("api/v1", "secrets", secret(&json!({"tls.crt": chain})));
        kept.until_refused("has only one of").await;
        kept.api.remove("secrets", "a", "client");
        kept.until_refused("there is no Secret a/client").await;
        // Nothing else was ever asked for.
        for call in kept.api.calls() {
            let fields = call.query.get("fieldSelector").map(String::as_str);
            let named = ["metadata.name=client", "metadata.name=client-cacert"];
            assert_eq!((&*call.resource, &*call.namespace), ("secrets", "a"));
            assert!(named.contains(&fields.unwrap_or_default()), "{call:?}");
        }
    }

    #[tokio::test]
    async fn a_secret_that_may_not_be_read_is_told_and_read_once_it_may() {
        let api = FakeApi::new();
        let (chain, key) = (block("CERTIFICATE"), block("PRIVATE KEY"));
        api.put(
            "api/v1",
            "secrets",
            secret(&json!({"tls.crt": chain, "tls.key": key})),
        );
        api.on(|_| Some(Answer::Refuse(403, "Forbidden", "no")));
        let mut kept = kept(api).await;
        kept.until_refused("credentialNamespaces").await;
        kept.api.heal();
        kept.until_shown(&key).await;
    }
}
