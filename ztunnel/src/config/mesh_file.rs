//! The mesh config file and its overlays: the file, then `PROXY_CONFIG`, then `ISTIO_META_*`.

use std::{collections::BTreeMap, path::PathBuf};

use serde::Deserialize;

use net::settings::Reader;

use super::MESH_FILE;
use crate::yaml;

/// What the file and its overlays say together.
#[derive(Debug, Default)]
pub(super) struct MeshFile {
    pub(super) discovery_address: Option<String>,
    pub(super) admin_port: Option<u16>,
    pub(super) stats_port: Option<u16>,
    pub(super) concurrency: Option<u16>,
    pub(super) metadata: BTreeMap<String, String>,
}

/// Other keys of Istio's mesh config are for other components: unknown ones are passed over.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct MeshConfig {
    default_config: Option<ProxyConfig>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct ProxyConfig {
    discovery_address: Option<String>,
    proxy_admin_port: Option<u16>,
    stats_port: Option<u16>,
    concurrency: Option<u16>,
    #[serde(default)]
    proxy_metadata: BTreeMap<String, String>,
}

impl MeshFile {
    pub(super) fn read(read: &mut Reader<'_>) -> Self {
        let mut merged = Self::default();
        let path = PathBuf::from(read.text_or("LEYLINE_MESH_CONFIG_FILE", MESH_FILE));
        if let Some(text) = read.optional_file(&path) {
            match yaml::parse::<Option<MeshConfig>>(&text) {
                Ok(file) => merged.overlay(file.and_then(|f| f.default_config)),
                Err(e) => read.reject(&path.display().to_string(), chain(&e)),
            }
        }
        if let Some(text) = read.some_text("PROXY_CONFIG") {
            match yaml::parse::<Option<ProxyConfig>>(&text) {
                Ok(overlay) => merged.overlay(overlay),
                Err(e) => read.reject("PROXY_CONFIG", chain(&e)),
            }
        }
        merged.read_metadata(read);
        merged
    }

    fn overlay(&mut self, over: Option<ProxyConfig>) {
        let Some(over) = over else { return };
        self.discovery_address = over.discovery_address.or(self.discovery_address.take());
        self.admin_port = over.proxy_admin_port.or(self.admin_port);
        self.stats_port = over.stats_port.or(self.stats_port);
        self.concurrency = over.concurrency.or(self.concurrency);
        for (key, value) in over.proxy_metadata {
            let key = key.strip_prefix("ISTIO_META_").unwrap_or(&key).to_owned();
            self.metadata.insert(key, value);
        }
    }

    fn read_metadata(&mut self, read: &Reader<'_>) {
        self.metadata.extend(read.family("ISTIO_META_"));
        for key in ["DNS_CAPTURE", "DNS_PROXY_ADDR", "ISTIO_VERSION"] {
            if let Some(text) = read.text(&format!("ISTIO_META_{key}")) {
                self.metadata.insert(key.to_owned(), text);
            }
        }
    }
}

fn chain(error: &dyn std::error::Error) -> String {
    match error.source() {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    }
}
