//! Mesh state from a file: what `LOCAL_XDS_PATH` or `LOCAL_XDS` holds, in the shapes of `/config_dump`.

use std::{
    collections::BTreeSet,
    io,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use mesh::{
    dump::LocalFile,
    names::Str,
    view::{Removal, Update},
};
use net::{mesh_state::MeshState, report::Chain};

use crate::{
    config::LocalState,
    yaml::{self, YamlError},
};

/// Findings that are told one by one.
const TOLD: usize = 20;
/// How often the file is looked at.
const LOOK: Duration = Duration::from_secs(1);

/// Why local state was not loaded.
#[derive(Debug, thiserror::Error)]
pub enum LocalStateError {
    /// The file cannot be read.
    #[error("read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Its text cannot be.
    #[error("read the local mesh state")]
    Parse(#[source] YamlError),
    /// It holds fields that nobody knows: a slip of the pen must not widen what is allowed.
    #[error("the local mesh state has unknown fields: {}", .0.join(", "))]
    UnknownFields(Vec<String>),
}

/// Local state as it was read.
#[derive(Clone, Debug)]
pub(crate) struct Loaded {
    pub(crate) file: LocalFile,
    /// The same as it was written, for dumps.
    pub(crate) json: serde_json::Value,
}

/// Reads it whole, and says what it cannot mean.
pub(crate) fn load(local: &LocalState) -> Result<Loaded, LocalStateError> {
    let loaded = read(local)?;
    tell(&loaded.file);
    Ok(loaded)
}

/// At WARN: what is meant may be elsewhere, so nothing is refused for it here.
fn tell(file: &LocalFile) {
    let findings = file.findings();
    for finding in findings.iter().take(TOLD) {
        tracing::warn!(%finding, "local mesh state");
    }
    if let Some(more) = findings.len().checked_sub(TOLD).filter(|more| *more > 0) {
        tracing::warn!(more, "local mesh state: more findings of this kind");
    }
}

fn read(local: &LocalState) -> Result<Loaded, LocalStateError> {
    match local {
        LocalState::Inline(text) => parse(text),
        LocalState::File(path) => {
            let text = std::fs::read_to_string(path).map_err(|source| LocalStateError::Read {
                path: path.clone(),
                source,
            })?;
            parse(&text)
        }
    }
}

fn parse(text: &str) -> Result<Loaded, LocalStateError> {
    let mut unknown = Vec::new();
    let file: Option<LocalFile> =
        yaml::parse_noting(text, &mut unknown).map_err(LocalStateError::Parse)?;
    if !unknown.is_empty() {
        return Err(LocalStateError::UnknownFields(unknown));
    }
    Ok(Loaded {
        file: file.unwrap_or_default(),
        json: yaml::parse(text).map_err(LocalStateError::Parse)?,
    })
}

/// Follows the file: a change that can be read is published, one that cannot leaves the last good state in force.
pub(crate) async fn follow(path: PathBuf, state: MeshState, first: Loaded) {
    let mut last = first.file;
    let mut modified = modified_at(&path).await;
    loop {
        tokio::time::sleep(LOOK).await;
        let now = modified_at(&path).await;
        if now == modified {
            continue;
        }
        modified = now;
        match load(&LocalState::File(path.clone())) {
            Ok(Loaded { file, .. }) => {
                state.publish(change(&last, file.clone()));
                last = file;
            }
            Err(error) => {
                let error = Chain(&error).to_string();
                tracing::warn!(error, "the local mesh state stays as it was");
            }
        }
    }
}

async fn modified_at(path: &Path) -> Option<SystemTime> {
    tokio::fs::metadata(path).await.ok()?.modified().ok()
}

/// What leads from one version of the file to the next.
fn change(from: &LocalFile, to: LocalFile) -> Update {
    let gone_addresses = gone(addresses(from), addresses(&to));
    let gone_policies = gone(policies(from), policies(&to));
    let addresses = gone_addresses.into_iter().map(Removal::Address);
    let policies = gone_policies.into_iter().map(Removal::Policy);
    Update {
        removals: addresses.chain(policies).collect(),
        ..to.into_update()
    }
}

fn gone(before: BTreeSet<Str>, after: BTreeSet<Str>) -> Vec<Str> {
    before.difference(&after).cloned().collect()
}

fn addresses(file: &LocalFile) -> BTreeSet<Str> {
    let workloads = file.workloads.iter().map(|it| it.uid.0.clone());
    let services = file.services.iter().map(|it| it.key().to_string().into());
    workloads.chain(services).collect()
}

fn policies(file: &LocalFile) -> BTreeSet<Str> {
    let policies = file.policies.iter();
    policies.map(|it| it.key.to_string().into()).collect()
}

#[cfg(test)]
mod tests {
    use mesh::view::MeshView;

    use super::*;

    const STATE: &str = r#"
workloads:
- uid: Kubernetes//Pod/ns/web
  name: web
  namespace: ns
  serviceAccount: web
  workloadIps: [10.0.0.1]
  protocol: HBONE
  node: node-1
  services:
    ns/web.ns.svc.cluster.local: {80: 8080}
services:
- name: web
  namespace: ns
  hostname: web.ns.svc.cluster.local
  vips: [/10.96.0.1]
  ports: {80: 8080}
policies:
- name: deny
  namespace: ns
  scope: Namespace
  action: Deny
  rules: [[[{principals: [{Exact: td/ns/x/sa/y}]}]]]
"#;

    #[test]
    fn a_file_becomes_a_view() {
        let file = load(&LocalState::Inline(STATE.into())).unwrap();
        let mut view = MeshView::default();
        view.apply(file.file.into_update());
        assert_eq!(view.workloads().count(), 1);
        assert_eq!(view.policies().count(), 1);
        let service = view.services().next().expect("one service");
        assert_eq!(view.endpoints(&service.key()).len(), 1);
    }

    #[test]
    fn what_the_next_version_leaves_out_is_removed() {
        let first = parse(STATE).unwrap().file;
        let mut view = MeshView::default();
        view.apply(first.clone().into_update());
        view.apply(change(&first, LocalFile::default()));
        let left = (view.workloads().count(), view.services().count());
        assert_eq!((left, view.policies().count()), ((0, 0), 0));
    }

    #[test]
    fn unknown_fields_are_named() {
        let text = STATE.replace("serviceAccount", "serviceAcount");
        let error = load(&LocalState::Inline(text)).unwrap_err().to_string();
        assert!(error.contains("serviceAcount"), "{error}");
    }
}
