//! Mesh state from a file: what `LOCAL_XDS_PATH` or `LOCAL_XDS` holds, in the shapes of `/config_dump`.

use std::{
    collections::BTreeSet,
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use arc_swap::ArcSwap;

use mesh::{
    dump::LocalFile,
    names::Str,
    view::{Removal, Update},
};
use net::{mesh_state::MeshState, report::Chain};
use serde_json::{Map, Value, json};

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
    /// It says nothing at all, as a file does that is just being written: no state, and not the state without anything.
    #[error("the local mesh state is empty")]
    Empty,
    /// It holds fields that nobody knows: a slip of the pen must not widen what is allowed.
    #[error("the local mesh state has unknown fields: {}", .0.join(", "))]
    UnknownFields(Vec<String>),
}

/// Local state as it was read.
#[derive(Clone, Debug)]
pub(crate) struct Loaded {
    pub(crate) file: LocalFile,
    /// The same as it was written, for dumps.
    pub(crate) json: Value,
}

/// What the local file says now, for dumps.
pub(crate) type Current = Arc<ArcSwap<Value>>;

/// What there is to dump without a file, and of a file that leaves a part out.
pub(crate) fn nothing() -> Value {
    json!({"workloads": [], "services": [], "policies": []})
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
    let written: Option<Map<String, Value>> = yaml::parse(text).map_err(LocalStateError::Parse)?;
    let written = written.ok_or(LocalStateError::Empty)?;
    let mut unknown = Vec::new();
    let file = yaml::read_noting(Value::Object(written.clone()), &mut unknown)
        .map_err(LocalStateError::Parse)?;
    if !unknown.is_empty() {
        return Err(LocalStateError::UnknownFields(unknown));
    }
    let mut json = nothing();
    for (key, value) in written {
        json[key] = value;
    }
    Ok(Loaded { file, json })
}

/// Follows the file: a change that can be read is published, one that cannot leaves the last good state in force.
pub(crate) async fn follow(path: PathBuf, state: MeshState, first: LocalFile, current: Current) {
    let mut last = first;
    let mut modified = modified_at(&path).await;
    loop {
        tokio::time::sleep(LOOK).await;
        let now = modified_at(&path).await;
        if now == modified {
            continue;
        }
        modified = now;
        match load(&LocalState::File(path.clone())) {
            Ok(Loaded { file, json }) => {
                current.store(Arc::new(json));
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
    fn what_says_nothing_is_no_state() {
        for text in ["", "\n", "# to be written\n", "null"] {
            let read = load(&LocalState::Inline(text.into()));
            assert!(matches!(read, Err(LocalStateError::Empty)), "{text:?}");
        }
        let nothing_known = load(&LocalState::Inline("{}".into())).unwrap();
        assert_eq!(nothing_known.json, nothing());
    }

    #[test]
    fn what_cannot_be_read_is_told_with_its_place() {
        let text = STATE.replace("10.0.0.1", "10.0.0");
        let error = load(&LocalState::Inline(text)).unwrap_err();
        let told = Chain(&error).to_string();
        assert!(told.contains("workloads[0].workloadIps[0]"), "{told}");
    }

    /// A file, and when each version of it was written: those of one test may come in one tick of the kernel's clock.
    struct Written(tempfile::NamedTempFile, Duration);

    impl Written {
        fn new(text: &str) -> Self {
            let file = tempfile::NamedTempFile::new().expect("a file");
            let mut new = Self(file, Duration::ZERO);
            new.write(text);
            new
        }

        fn write(&mut self, text: &str) {
            self.1 += LOOK;
            std::fs::write(self.0.path(), text).expect("written");
            let file = self.0.as_file();
            file.set_modified(SystemTime::UNIX_EPOCH + self.1)
                .expect("its time is set");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn the_version_in_force_is_dumped_and_one_that_says_nothing_leaves_it() {
        let mut written = Written::new(STATE);
        let path = written.0.path().to_owned();
        let Loaded { file, json } = load(&LocalState::File(path.clone())).unwrap();
        let state = MeshState::new();
        state.publish(file.clone().into_update());
        let current = Current::new(ArcSwap::from_pointee(json));
        tokio::spawn(follow(path, state.clone(), file, current.clone()));
        let known = async || {
            tokio::time::sleep(2 * LOOK).await;
            let told = current.load()["policies"].as_array().map_or(0, Vec::len);
            (state.view().policies().count(), told)
        };
        assert_eq!(known().await, (1, 1));
        written.write("");
        assert_eq!(known().await, (1, 1));
        let without_policies = STATE.split("policies:").next().expect("the rest");
        written.write(without_policies);
        assert_eq!(known().await, (0, 0));
    }

    #[test]
    fn unknown_fields_are_named() {
        let text = STATE.replace("serviceAccount", "serviceAcount");
        let error = load(&LocalState::Inline(text)).unwrap_err().to_string();
        assert!(error.contains(": workloads.0.serviceAcount"), "{error}");
    }
}
