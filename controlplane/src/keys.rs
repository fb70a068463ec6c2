//! Keys of token issuers, fetched for waypoints and kept fresh.
//!
//! A source is asked again five minutes after it answered, and sooner after it failed. What was fetched last stays in
//! force while a source fails, also over a restart of this process; nothing else is ever put in its place.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::{Duration, SystemTime},
};

use tokio::{
    task::JoinSet,
    time::{Instant, sleep_until},
};

use crate::{
    cluster::backoff::Backoff,
    translate::l7::istio::request_authentication::{Fetched, KeySource},
    world::World,
};

mod fetch;
mod store;
#[cfg(test)]
mod tests;

pub use fetch::{FetchError, Fetcher, Reach};
pub use store::Place;
use store::Store;

/// Between fetches of a source that answers.
const REFRESH: Duration = Duration::from_secs(300);
/// Between tries of one that does not.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);
/// Fetches at a time.
const MOST: usize = 8;
/// While there is nothing to do.
const IDLE: Duration = Duration::from_secs(3600);

/// One source's state.
struct Kept {
    fetched: Fetched,
    due: Instant,
    backoff: Backoff,
    busy: bool,
}

/// Fetches what the world asks for, for ever; begins with what was kept at `place`.
pub async fn keep(world: World, fetcher: Arc<Fetcher>, place: Place) {
    let mut store = Store::open(place, SystemTime::now()).await;
    let mut wanted = world.key_sources();
    let mut kept: BTreeMap<KeySource, Kept> = BTreeMap::new();
    let mut fetches = JoinSet::new();
    loop {
        let sources = wanted.borrow_and_update().clone();
        follow(&world, &mut kept, &sources, &store);
        let now = Instant::now();
        for (source, it) in &mut kept {
            if it.due <= now && !it.busy && fetches.len() < MOST {
                it.busy = true;
                let (fetcher, source) = (fetcher.clone(), source.clone());
                fetches.spawn(async move { (fetcher.fetch(&source).await, source) });
            }
        }
        let waiting = kept.values().filter(|it| !it.busy).map(|it| it.due).min();
        let room = fetches.len() < MOST;
        let next = waiting.filter(|_| room).unwrap_or(now + IDLE);
        tokio::select! {
            changed = wanted.changed() => if changed.is_err() { return },
            () = sleep_until(next) => {}
            Some(Ok((result, source))) = fetches.join_next(), if !fetches.is_empty() => {
                if let Some(it) = kept.get_mut(&source) {
                    it.take(&source, result);
                    world.set_keys(source.clone(), Some(it.fetched.clone()));
                    if let Fetched { keys: Some(keys), failure: None } = &it.fetched {
                        store.keep(&source, keys.clone(), SystemTime::now()).await;
                    }
                }
            }
        }
    }
}

/// Begins with new sources and forgets those that nobody names any more.
fn follow(
    world: &World,
    kept: &mut BTreeMap<KeySource, Kept>,
    wanted: &BTreeSet<KeySource>,
    store: &Store,
) {
    let gone: Vec<KeySource> = kept
        .keys()
        .filter(|source| !wanted.contains(*source))
        .cloned()
        .collect();
    for source in gone {
        kept.remove(&source);
        world.set_keys(source, None);
    }
    for source in wanted {
        if kept.contains_key(source) {
            continue;
        }
        let fetched = Fetched {
            keys: store.keys(source),
            failure: None,
        };
        if fetched.keys.is_some() {
            world.set_keys(source.clone(), Some(fetched.clone()));
        }
        let new = Kept {
            fetched,
            due: Instant::now(),
            backoff: Backoff::new(FIRST_PAUSE, LONGEST_PAUSE),
            busy: false,
        };
        kept.insert(source.clone(), new);
    }
}

impl Kept {
    fn take(&mut self, source: &KeySource, result: Result<String, FetchError>) {
        self.busy = false;
        match result {
            Ok(keys) => {
                self.backoff.reset();
                self.due = Instant::now() + REFRESH;
                self.fetched = Fetched {
                    keys: Some(keys.into()),
                    failure: None,
                };
            }
            Err(error) => {
                let failure = net::report::Chain(&error).to_string();
                tracing::warn!(?source, failure, "keys of tokens were not fetched");
                self.due = Instant::now() + self.backoff.next();
                self.fetched.failure = Some(failure.into());
            }
        }
    }
}
