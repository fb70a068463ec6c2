//! Where keys that were fetched are kept, so that a control plane that begins anew while their server is down has them.
//!
//! They are public keys: what matters is that nobody else puts theirs there, which whoever may write beside the control plane's
//! own configuration could do in many ways. Each belongs to the place that it was fetched from, and is never used for
//! another; none is kept for longer than a week after it was fetched last.

use std::{
    collections::BTreeMap,
    io,
    path::{Path, PathBuf},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use k8s_openapi::api::core::v1::ConfigMap;
use kube::{
    Api, Client,
    api::{Patch, PatchParams},
};
use mesh::names::Str;
use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio::time::timeout;

use super::fetch;
use crate::{
    ca::disk, gateway::names::of_revision, translate::l7::istio::request_authentication::KeySource,
};

/// How long keys may be used after their server answered last.
const LIFE: Duration = Duration::from_secs(7 * 24 * 3600);
/// Keys that do not change are written again so often, so that they are known to be fresh.
const AGAIN: Duration = Duration::from_secs(24 * 3600);
/// All of it, in bytes; an object of Kubernetes may have 1 MiB. Beyond it, keys that were fetched longer ago are left out.
const MOST_BYTES: usize = 768 * 1024;
/// One read or write.
const PATIENCE: Duration = Duration::from_secs(10);
/// Key of the ConfigMap, and name of the file.
const NAME: &str = "token-keys.json";
const MANAGER: &str = "leyline-token-keys";

/// Where.
#[derive(Clone)]
pub enum Place {
    /// Nowhere.
    Nowhere,
    /// In this folder.
    Folder(PathBuf),
    /// In the ConfigMap of this name.
    ConfigMap(Box<Api<ConfigMap>>, String),
}

impl Place {
    /// Beside a control plane of this revision in `namespace`.
    pub fn in_cluster(client: Client, namespace: &str, revision: &str) -> Self {
        let name = of_revision(MANAGER, revision);
        Self::ConfigMap(Box::new(Api::namespaced(client, namespace)), name)
    }
}

/// Why keys were not read or written.
#[derive(Debug, thiserror::Error)]
enum StoreError {
    #[error("the file {0}")]
    File(PathBuf, #[source] io::Error),
    #[error("the ConfigMap {0}")]
    ConfigMap(String, #[source] kube::Error),
    #[error("not within {0:?}")]
    Timeout(Duration),
    #[error("what is there is not what was written")]
    Content(#[from] serde_json::Error),
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Entry {
    keys: Str,
    /// When they were fetched, in seconds since 1970.
    fetched: u64,
}

/// What is kept.
pub(super) struct Store {
    place: Place,
    /// By the text of the source.
    entries: BTreeMap<Str, Entry>,
    /// Something is not written yet.
    changed: bool,
}

impl Store {
    /// What was kept there. A place that cannot be read is empty: keys are fetched anyway.
    pub(super) async fn open(place: Place, now: SystemTime) -> Self {
        let mut entries = match read(&place).await {
            Ok(entries) => entries,
            Err(error) => {
                let error = net::report::Chain(&error).to_string();
                tracing::warn!(error, "keys of tokens that were kept cannot be read");
                BTreeMap::new()
            }
        };
        entries.retain(|_, it| is_alive(it, now) && fetch::is_set_of_keys(&it.keys));
        Self {
            place,
            entries,
            changed: false,
        }
    }

    /// The last keys of a source.
    pub(super) fn keys(&self, source: &KeySource) -> Option<Str> {
        let entry = self.entries.get(&*source.to_string());
        entry.map(|it| it.keys.clone())
    }

    /// Keeps what has just been fetched. What cannot be written now is with the next.
    pub(super) async fn keep(&mut self, source: &KeySource, keys: Str, now: SystemTime) {
        let fetched = seconds(now);
        let known = self.entries.get(&*source.to_string());
        let fresh = known.is_some_and(|it| {
            it.keys == keys && it.fetched.saturating_add(AGAIN.as_secs()) > fetched
        });
        if !fresh {
            let entry = Entry { keys, fetched };
            self.entries.insert(source.to_string().into(), entry);
            self.changed = true;
        }
        if !self.changed {
            return;
        }
        self.entries.retain(|_, it| is_alive(it, now));
        match write(&self.place, &self.entries).await {
            Ok(()) => self.changed = false,
            Err(error) => {
                let error = net::report::Chain(&error).to_string();
                tracing::warn!(error, "keys of tokens cannot be kept for the next start");
            }
        }
    }
}

fn seconds(time: SystemTime) -> u64 {
    let since = time.duration_since(UNIX_EPOCH);
    since.unwrap_or_default().as_secs()
}

fn is_alive(entry: &Entry, now: SystemTime) -> bool {
    entry.fetched.saturating_add(LIFE.as_secs()) > seconds(now)
}

async fn read(place: &Place) -> Result<BTreeMap<Str, Entry>, StoreError> {
    let text = match place {
        Place::Nowhere => None,
        Place::Folder(folder) => {
            let path = folder.join(NAME);
            match tokio::fs::read_to_string(&path).await {
                Ok(text) => Some(text),
                Err(error) if error.kind() == io::ErrorKind::NotFound => None,
                Err(error) => return Err(StoreError::File(path, error)),
            }
        }
        Place::ConfigMap(api, name) => {
            let found = timeout(PATIENCE, api.get_opt(name)).await;
            let found = found.map_err(|_| StoreError::Timeout(PATIENCE))?;
            let found = found.map_err(|error| StoreError::ConfigMap(name.clone(), error))?;
            found.and_then(|it| it.data?.remove(NAME))
        }
    };
    match text {
        Some(text) => Ok(serde_json::from_str(&text)?),
        None => Ok(BTreeMap::new()),
    }
}

async fn write(place: &Place, entries: &BTreeMap<Str, Entry>) -> Result<(), StoreError> {
    let text = serde_json::to_string(&bounded(entries))?;
    match place {
        Place::Nowhere => Ok(()),
        Place::Folder(folder) => {
            let path = folder.join(NAME);
            let to = path.clone();
            let replace = move || disk::replace(Path::new(&to), 0o600, text.as_bytes());
            let written = tokio::task::spawn_blocking(replace).await;
            let written = written.map_err(io::Error::other).and_then(|it| it);
            written.map_err(|error| StoreError::File(path, error))
        }
        Place::ConfigMap(api, name) => {
            let wanted = json!({
                "apiVersion": "v1",
                "kind": "ConfigMap",
                "metadata": {"name": name},
                "data": {NAME: text},
            });
            let params = PatchParams::apply(MANAGER).force();
            let patch = Patch::Apply(&wanted);
            let written = timeout(PATIENCE, api.patch(name, &params, &patch)).await;
            let written = written.map_err(|_| StoreError::Timeout(PATIENCE))?;
            let written = written.map_err(|error| StoreError::ConfigMap(name.clone(), error));
            written.map(drop)
        }
    }
}

/// Those fetched last, as far as there is room.
fn bounded(entries: &BTreeMap<Str, Entry>) -> BTreeMap<&Str, &Entry> {
    let mut newest: Vec<_> = entries.iter().collect();
    newest.sort_by_key(|(_, it)| std::cmp::Reverse(it.fetched));
    let mut room = MOST_BYTES;
    newest.retain(|(source, it)| {
        // A text of JSON within JSON: quotes take two bytes.
        let quotes = it.keys.matches('"').count();
        let size = source.len() + it.keys.len() + quotes + 64;
        let fits = size <= room;
        room -= if fits { size } else { 0 };
        fits
    });
    newest.into_iter().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEYS: &str = r#"{"keys": [{"kty": "RSA"}]}"#;

    fn source(name: &str) -> KeySource {
        KeySource::Url(format!("https://{name}/keys").into())
    }

    fn day(number: u64) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(number * 24 * 3600)
    }

    #[tokio::test]
    async fn keys_are_there_after_a_restart_for_their_own_source_and_a_week() {
        let folder = tempfile::tempdir().unwrap();
        let place = Place::Folder(folder.path().to_owned());
        let mut store = Store::open(place.clone(), day(1)).await;
        assert_eq!(store.keys(&source("a")), None);
        store.keep(&source("a"), KEYS.into(), day(1)).await;
        let again = Store::open(place.clone(), day(7)).await;
        assert_eq!(again.keys(&source("a")).as_deref(), Some(KEYS));
        assert_eq!(again.keys(&source("b")), None);
        assert_eq!(
            again.keys(&KeySource::Issuer("https://a/keys".into())),
            None
        );
        assert_eq!(
            Store::open(place.clone(), day(9)).await.keys(&source("a")),
            None
        );
        // Fetched again without a change, they live on.
        store.keep(&source("a"), KEYS.into(), day(6)).await;
        let again = Store::open(place, day(9)).await;
        assert_eq!(again.keys(&source("a")).as_deref(), Some(KEYS));
    }

    #[tokio::test]
    async fn what_was_damaged_is_no_set_of_keys() {
        let folder = tempfile::tempdir().unwrap();
        let place = Place::Folder(folder.path().to_owned());
        let told = |keys: &str| {
            json!({source("a").to_string(): {"keys": keys, "fetched": seconds(day(1))}}).to_string()
        };
        for (text, there) in [
            (told(KEYS), true),
            (told(r#"{"keys": []}"#), false),
            (told("x"), false),
            ("{".to_owned(), false),
        ] {
            std::fs::write(folder.path().join(NAME), &text).unwrap();
            let store = Store::open(place.clone(), day(1)).await;
            assert_eq!(store.keys(&source("a")).is_some(), there, "{text}");
        }
    }

    #[test]
    fn the_oldest_make_room() {
        let keys = Str::from("k".repeat(300 * 1024));
        let entry = |fetched| Entry {
            keys: keys.clone(),
            fetched,
        };
        let all = [("a", 2), ("b", 1), ("c", 3)];
        let all = all.map(|(name, fetched)| (Str::from(name), entry(fetched)));
        let all = BTreeMap::from(all);
        let kept: Vec<_> = bounded(&all).into_keys().map(|it| &**it).collect();
        assert_eq!(kept, ["a", "c"]);
        assert!(serde_json::to_string(&bounded(&all)).unwrap().len() <= MOST_BYTES);
    }
}
