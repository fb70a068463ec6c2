//! A node tunnel's `config_dump`, ours or upstream's, as far as the tables need it. Lenient: what is missing is empty,
//! what is unknown is left alone, and what is printed as JSON is what was read.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::Value;

/// A dump, as it was read. Services and workloads are lists, also where an older tunnel wrote maps.
#[derive(Clone, Debug)]
pub(crate) struct Dump(pub Value);

/// The lists that upstream's tunnel has also written as maps from a key.
const LISTS: [&str; 4] = ["workloads", "services", "policies", "certificates"];

impl Dump {
    /// From the answer of a tunnel or a file.
    pub(crate) fn new(mut value: Value) -> Result<Self> {
        let fields = value
            .as_object_mut()
            .context("this is no config_dump: it is not a JSON object")?;
        for key in LISTS {
            let Some(list) = fields.get_mut(key) else {
                continue;
            };
            if let Value::Object(map) = list {
                *list = Value::Array(std::mem::take(map).into_iter().map(|(_, it)| it).collect());
            } else if list.is_null() {
                *list = Value::Array(Vec::new());
            }
        }
        if !LISTS.iter().any(|key| fields.contains_key(*key)) {
            anyhow::bail!("this is no config_dump of a node tunnel: it has none of {LISTS:?}");
        }
        Ok(Self(value))
    }

    /// From a file's content.
    pub(crate) fn parse(text: &[u8]) -> Result<Self> {
        Self::new(serde_json::from_slice(text).context("read the dump as JSON")?)
    }

    /// The items of a list, each as it was read and as the tables need it.
    pub(crate) fn items<T: DeserializeOwned>(&self, key: &str) -> Result<Vec<(Value, T)>> {
        let items = self.0.get(key).and_then(Value::as_array);
        let read = |(at, item): (usize, &Value)| {
            let typed = serde_json::from_value(item.clone());
            let typed = typed.with_context(|| format!("read {key}[{at}] of the dump"))?;
            Ok((item.clone(), typed))
        };
        items
            .map(Vec::as_slice)
            .unwrap_or_default()
            .iter()
            .enumerate()
            .map(read)
            .collect()
    }

    /// The pods of the tunnel's node, by uid.
    pub(crate) fn pods(&self) -> Result<BTreeMap<String, PodState>> {
        match self.0.get("workloadState") {
            None | Some(Value::Null) => Ok(BTreeMap::new()),
            Some(state) => serde_json::from_value(state.clone()).context("read workloadState"),
        }
    }
}

/// A workload, as far as the tables need it.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct Workload {
    pub uid: String,
    pub name: String,
    pub namespace: String,
    pub workload_ips: Vec<String>,
    pub hostname: String,
    pub node: String,
    pub network: String,
    pub protocol: String,
    pub waypoint: Option<Gateway>,
}

/// A waypoint or gateway.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Gateway {
    /// `namespace/hostname` or `network/ip`.
    pub destination: String,
}

/// A service.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct Service {
    pub name: String,
    pub namespace: String,
    pub hostname: String,
    pub vips: Vec<String>,
    pub cidr_vips: Vec<CidrVip>,
    pub waypoint: Option<Gateway>,
    pub endpoints: BTreeMap<String, Endpoint>,
}

/// A range of addresses.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct CidrVip {
    pub cidr: String,
}

/// An endpoint of a service.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Endpoint {
    /// Absent in dumps of tunnels that keep healthy endpoints only.
    pub status: Option<String>,
}

/// A policy.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Policy {
    pub name: String,
    pub namespace: String,
    pub action: String,
    pub scope: String,
}

/// The certificates of an identity.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct Certificates {
    pub identity: String,
    pub state: String,
    pub cert_chain: Vec<Certificate>,
    pub root_certs: Vec<Certificate>,
}

/// One certificate.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct Certificate {
    pub serial_number: String,
    pub valid_from: String,
    pub expiration_time: String,
}

/// A pod of the node.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct PodState {
    pub state: String,
    pub info: Option<PodInfo>,
    pub connections: Connections,
}

/// Which pod.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct PodInfo {
    pub name: String,
    pub namespace: String,
}

/// What is open now.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Connections {
    pub inbound: Vec<Connection>,
    pub outbound: Vec<Connection>,
}

/// An open connection.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct Connection {
    pub src: String,
    pub original_dst: Option<String>,
    pub actual_dst: String,
    pub protocol: String,
}
