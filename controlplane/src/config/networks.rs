//! Upstream's MeshNetworks: which pods are of which network, and which gateways lead there. Meant for sidecars, whose gateways
//! pass TLS on by its server name (port 15443) and prove nothing themselves. What stands behind a gateway of ours is reached by
//! HBONE, and the gateway has an identity: objects say what a file of addresses cannot. So nothing of the file is served, and
//! what would serve instead is told.

use std::{collections::BTreeMap, io, path::Path};

use serde::Deserialize;

use super::mesh::MeshConfigError;
use crate::{
    gateway::names::NETWORK,
    source::{read::read, tree::parse},
};

/// Networks that are spoken of; of more, their number is.
const MOST: usize = 16;

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Wire {
    networks: BTreeMap<String, Network>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Network {
    endpoints: Vec<Endpoints>,
    gateways: Vec<Gateway>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct Endpoints {
    from_cidr: String,
    from_registry: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct Gateway {
    address: String,
    registry_service_name: String,
    #[serde(rename = "port")]
    _port: u32,
    #[serde(rename = "locality")]
    _locality: String,
}

/// What whoever wrote the file is to be told, a line each; nothing of a file that is not there or asks for nothing.
pub fn load(path: &Path) -> Result<Vec<String>, MeshConfigError> {
    match std::fs::read_to_string(path) {
        Ok(text) => advice(&text),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(MeshConfigError::Read(error)),
    }
}

fn advice(text: &str) -> Result<Vec<String>, MeshConfigError> {
    let Some(document) = parse(text)?.into_iter().next() else {
        return Ok(Vec::new());
    };
    let (wire, faults) = read::<Wire>(&document);
    let networks = wire.unwrap_or_default().networks;
    let spoken = networks.iter().take(MOST);
    let mut lines: Vec<String> = spoken.flat_map(|(name, it)| it.advice(name)).collect();
    lines.extend(faults.iter().map(ToString::to_string));
    if let Some(more) = networks.len().checked_sub(MOST).filter(|more| *more > 0) {
        lines.push(format!("and {more} networks more"));
    }
    Ok(lines)
}

impl Network {
    fn advice(&self, name: &str) -> Vec<String> {
        let label = format!("{NETWORK}={name}");
        let registries = self.endpoints.iter().map(|it| it.from_registry.as_str());
        let ranges = self.endpoints.iter().map(|it| it.from_cidr.as_str());
        let addresses = self.gateways.iter().map(|it| it.address.as_str());
        let services = self
            .gateways
            .iter()
            .map(|it| it.registry_service_name.as_str());
        let lines = [
            about(registries, |it| {
                format!(
                    "fromRegistry {it}: label the control plane's namespace in that cluster {label}"
                )
            }),
            about(ranges, |it| {
                format!("fromCidr {it}: label the pods {label}")
            }),
            about(addresses, |it| {
                format!(
                    "gateways at {it}: apply a Gateway of class istio-remote with the label {label}, this address, an HBONE listener and the annotation gateway.istio.io/service-account"
                )
            }),
            about(services, |it| {
                format!(
                    "gateways {it}: apply a Gateway of class leyline-east-west or istio-east-west with the label {label} in their cluster; it is found there by itself"
                )
            }),
        ];
        let lines = lines.into_iter().flatten();
        lines
            .map(|line| format!("network {name}, {line}"))
            .collect()
    }
}

fn about<'a>(
    named: impl Iterator<Item = &'a str>,
    line: impl Fn(&str) -> String,
) -> Option<String> {
    let named: Vec<&str> = named.filter(|it| !it.is_empty()).take(MOST).collect();
    (!named.is_empty()).then(|| line(&named.join(", ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_part_of_a_network_is_answered_with_what_serves_instead() {
        let lines = advice(
            "networks:
  net-west:
    endpoints: [{fromRegistry: west}, {fromRegistry: west-2}, {fromCidr: 10.0.0.0/8}]
    gateways:
    - {address: 192.0.2.1, port: 15443, locality: us-west}
    - {registryServiceName: ew.istio-system.svc.cluster.local, port: 15443}
  empty: {}
",
        );
        let lines = lines.unwrap();
        let label = "topology.istio.io/network=net-west";
        for (line, words) in lines.iter().zip([
            "fromRegistry west, west-2: ",
            "fromCidr 10.0.0.0/8: ",
            "gateways at 192.0.2.1: apply a Gateway of class istio-remote",
            "gateways ew.istio-system.svc.cluster.local: ",
        ]) {
            let begins = line.starts_with(&format!("network net-west, {words}"));
            assert!(begins && line.contains(label), "{line}");
        }
        assert_eq!(lines.len(), 4);
    }

    #[test]
    fn a_file_that_asks_for_nothing_is_answered_with_nothing_and_mistakes_are_named() {
        let folder = tempfile::tempdir().unwrap();
        assert!(load(&folder.path().join("none")).unwrap().is_empty());
        for text in ["", "networks: {}", "networks:\n      {}", "networks: null"] {
            assert!(advice(text).unwrap().is_empty(), "{text}");
        }
        let lines = advice("networks: {a: {endpoint: []}}").unwrap();
        assert!(
            lines[0].starts_with("networks.a.endpoint: unknown field"),
            "{lines:?}"
        );
        assert!(advice("networks: [").is_err());
        let many: String = (0..40)
            .map(|n| format!("  n{n}: {{endpoints: [{{fromCidr: ::/0}}]}}\n"))
            .collect();
        let lines = advice(&format!("networks:\n{many}")).unwrap();
        assert_eq!((lines.len(), &*lines[16]), (17, "and 24 networks more"));
    }
}
