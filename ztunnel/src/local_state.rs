//! Mesh state from a file: what `LOCAL_XDS_PATH` or `LOCAL_XDS` holds, in the shapes of `/config_dump`.

use std::{io, path::PathBuf};

use mesh::{dump::LocalFile, view::Update};

use crate::{
    config::LocalState,
    yaml::{self, YamlError},
};

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

/// Reads it whole.
pub(crate) fn load(local: &LocalState) -> Result<LocalFile, LocalStateError> {
    let read;
    let text = match local {
        LocalState::Inline(text) => text,
        LocalState::File(path) => {
            read = std::fs::read_to_string(path).map_err(|source| LocalStateError::Read {
                path: path.clone(),
                source,
            })?;
            &read
        }
    };
    let mut unknown = Vec::new();
    let file: Option<LocalFile> =
        yaml::parse_noting(text, &mut unknown).map_err(LocalStateError::Parse)?;
    if !unknown.is_empty() {
        return Err(LocalStateError::UnknownFields(unknown));
    }
    Ok(file.unwrap_or_default())
}

/// As one update to an empty view.
pub(crate) fn update(file: LocalFile) -> Update {
    file.into_update()
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
        view.apply(update(file));
        assert_eq!(view.workloads().count(), 1);
        assert_eq!(view.policies().count(), 1);
        let service = view.services().next().expect("one service");
        assert_eq!(view.endpoints(&service.key()).len(), 1);
    }

    #[test]
    fn unknown_fields_are_named() {
        let text = STATE.replace("serviceAccount", "serviceAcount");
        let error = load(&LocalState::Inline(text)).unwrap_err().to_string();
        assert!(error.contains("serviceAcount"), "{error}");
    }
}
