//! An intermediate of others in a mounted folder, taken over again when its files change.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use time::OffsetDateTime;

use super::{CaStore, StoreError};
use crate::{
    ca::{Authority, plug_in},
    metrics::Metrics,
};

/// How often the files are read. They are few and small, and reading finds every way of changing them: the swapped
/// links of a mounted Secret, a rename, a write in place.
const LOOK: Duration = Duration::from_secs(2);

/// How long a new root is only trusted before its key signs: a mounted ConfigMap follows within about a minute.
const SPREAD: Duration = Duration::from_secs(120);

/// Whether the folder holds any file of an intermediate; a complete set is asked for later.
pub(super) fn is_used(dir: &Path) -> bool {
    plug_in::FILES.iter().any(|file| dir.join(file).exists())
}

/// Reads and checks the folder.
pub(super) async fn load(dir: PathBuf) -> Result<Authority, StoreError> {
    let loaded = tokio::task::spawn_blocking(move || {
        plug_in::load(&dir).map_err(|source| StoreError::PlugIn { dir, source })
    });
    loaded.await?
}

/// The content of the files; two equal ones in a row are a state that nobody is writing.
async fn content(dir: &Path) -> Vec<Option<Vec<u8>>> {
    let dir = dir.to_owned();
    let read = move || {
        let files = plug_in::FILES
            .iter()
            .map(|file| fs::read(dir.join(file)).ok());
        files.collect()
    };
    tokio::task::spawn_blocking(read).await.unwrap_or_default()
}

impl CaStore {
    /// Takes over what the folder holds whenever it has changed and rests.
    pub(super) async fn follow_folder(&self, dir: &Path, metrics: &Metrics) {
        let mut known = content(dir).await;
        loop {
            tokio::time::sleep(LOOK).await;
            let now = content(dir).await;
            if now == known {
                continue;
            }
            tokio::time::sleep(LOOK).await;
            if content(dir).await != now {
                continue;
            }
            known = now;
            match load(dir.to_owned()).await {
                Ok(next) => self.exchange(next, metrics).await,
                Err(error) => {
                    let error = &error as &dyn std::error::Error;
                    tracing::error!(
                        error,
                        "the certificate authority's files cannot be used; the last good ones stay in force"
                    );
                }
            }
        }
    }

    async fn exchange(&self, next: Authority, metrics: &Metrics) {
        let now: Arc<Authority> = self.current.load();
        if !now.has_ended(OffsetDateTime::now_utc()) && !next.vouches_for(&now) {
            tracing::error!(
                "the new roots do not contain the one in force: certificates in use would not be believed; the old files stay in force. Add the old root to the bundle, and take it away later"
            );
            return;
        }
        if !now.vouches_for(&next) {
            tracing::info!(
                seconds = SPREAD.as_secs(),
                "a new root is trusted from now on, and signs later"
            );
            self.replace(now.trusting(&next), metrics);
            tokio::time::sleep(SPREAD).await;
        }
        tracing::info!("the certificate authority's files changed");
        self.replace(next, metrics);
    }
}
