//! The file of revoked certificates (`CRL_PATH`): read at the start, and again whenever it changes.

use std::{
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use super::{RevocationListError, Revocations};

/// How often the file is looked at. A mounted ConfigMap is swapped as a whole, so that a look never sees half of it.
const LOOK: Duration = Duration::from_secs(2);

/// Why the list cannot be used at the start. Who asks for checks gets them, or no proxy.
#[derive(Debug, thiserror::Error)]
pub enum RevocationsError {
    /// It is there and cannot be read.
    #[error("read {path:?}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is no list.
    #[error("{path:?} is no list of revoked certificates")]
    List {
        /// The file.
        path: PathBuf,
        /// Why.
        source: RevocationListError,
    },
}

/// Reads the list for the first time, and answers the file's content, which [`follow`] goes on from. A file that is not there
/// revokes nothing, and may come later.
///
/// # Errors
/// If there is a file and it cannot be used.
pub fn load(path: &Path, revocations: &Revocations) -> Result<Option<Vec<u8>>, RevocationsError> {
    let read = match std::fs::read(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => {
            let path = path.to_owned();
            return Err(RevocationsError::Read { path, source });
        }
    };
    let count = revocations.replace(&read).map_err(|source| {
        let path = path.to_owned();
        RevocationsError::List { path, source }
    })?;
    tracing::info!(path = %path.display(), count, "revoked certificates are refused");
    Ok(Some(read))
}

/// Takes over each change of the file since it was `known`, forever. One that is no list changes nothing: what was revoked stays
/// so.
pub async fn follow(path: PathBuf, mut known: Option<Vec<u8>>, revocations: Revocations) {
    loop {
        tokio::time::sleep(LOOK).await;
        let Ok(now) = tokio::fs::read(&path).await else {
            continue;
        };
        if known.as_ref() == Some(&now) {
            continue;
        }
        match revocations.replace(&now) {
            Ok(count) => {
                tracing::info!(path = %path.display(), count, "revoked certificates have changed")
            }
            Err(error) => {
                tracing::error!(path = %path.display(), %error, "revoked certificates stay as they were");
            }
        }
        known = Some(now);
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::{Policy, revocation::CertificateId},
        *,
    };
    use crate::testing::TestCa;

    /// Paused time passes while nothing else is to be done.
    #[tokio::test(start_paused = true)]
    async fn what_changes_between_the_first_look_and_the_second_is_not_missed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("revoked.pem");
        let revocations = Revocations::default();
        let known = load(&path, &revocations).unwrap();
        assert_eq!(known, None);
        let ca = TestCa::new("cluster.local", &Policy::default());
        let (leaf, _) = ca.sign(&ca.leaf(&ca.identity("a", "gone")));
        std::fs::write(&path, ca.revoke(&[&leaf])).unwrap();
        let following = tokio::spawn(follow(path, known, revocations.clone()));
        let chain = [CertificateId::of(&leaf).unwrap()];
        revocations.until_revoked(&chain).await;
        following.abort();
    }
}
