//! What the runtime says: the network configuration on stdin and the pod in `CNI_ARGS`.

use std::{
    io::Read,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use serde::Deserialize;
use serde_json::{Value, error::Category, json, value::RawValue};

use crate::protocol::{Code, DEFAULT_VERSION, Failure};

/// Our entry of the configuration list. The keys are Istio's, so that an entry that its agent wrote works too; those
/// that only its plugin needs are passed over.
#[derive(Debug, Deserialize)]
pub(crate) struct NetworkConfig {
    #[serde(rename = "cniVersion")]
    cni_version: Option<String>,
    #[serde(rename = "prevResult")]
    previous: Option<Box<RawValue>>,
    cni_agent_run_dir: Option<String>,
    ambient_enabled: Option<bool>,
    exclude_namespaces: Option<Vec<String>>,
    pod_namespace: Option<String>,
}

/// An address that the plugins before us gave the pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PodIp {
    pub(crate) address: IpAddr,
    pub(crate) prefix: u8,
    pub(crate) gateway: Option<IpAddr>,
    pub(crate) interface: Option<u64>,
}

impl NetworkConfig {
    pub(crate) fn read(input: impl Read) -> Result<Self, Failure> {
        serde_json::from_reader(input).map_err(|error| {
            let code = match error.classify() {
                Category::Io => Code::Io,
                Category::Syntax | Category::Eof => Code::Decode,
                Category::Data => Code::InvalidConfig,
            };
            Failure::new(code, format!("read the network configuration: {error}"))
        })
    }

    pub(crate) fn version(&self) -> &str {
        self.cni_version.as_deref().unwrap_or(DEFAULT_VERSION)
    }

    pub(crate) fn run_folder(&self) -> &str {
        self.cni_agent_run_dir
            .as_deref()
            .unwrap_or("/var/run/istio-cni")
    }

    pub(crate) fn ambient_enabled(&self) -> bool {
        self.ambient_enabled.unwrap_or(true)
    }

    pub(crate) fn excludes(&self, namespace: &str) -> bool {
        let excluded = self.exclude_namespaces.as_deref().unwrap_or_default();
        excluded.iter().any(|name| name == namespace)
    }

    /// Where the agent's own pods are.
    pub(crate) fn agent_namespace(&self) -> &str {
        self.pod_namespace.as_deref().unwrap_or("istio-system")
    }

    /// What the plugins before us answered, byte for byte; an empty result where there is none.
    pub(crate) fn result(&self) -> String {
        match &self.previous {
            Some(result) => result.get().to_owned(),
            None => json!({ "cniVersion": self.version() }).to_string(),
        }
    }

    /// The pod's addresses, from that answer.
    pub(crate) fn ips(&self) -> Result<Vec<PodIp>, Failure> {
        let result: Value = serde_json::from_str(&self.result()).unwrap_or_default();
        let listed = result["ips"].as_array().into_iter().flatten();
        let bad = |ip: &Value| {
            let message = format!("prevResult names an address that is none: {ip}");
            Failure::new(Code::InvalidConfig, message)
        };
        listed.map(|ip| pod_ip(ip).ok_or_else(|| bad(ip))).collect()
    }
}

/// `{"address": "10.1.0.5/16", "gateway": "10.1.0.1", "interface": 2}`.
fn pod_ip(ip: &Value) -> Option<PodIp> {
    let (address, prefix) = ip["address"].as_str()?.split_once('/')?;
    let (address, prefix): (IpAddr, u8) = (address.parse().ok()?, prefix.parse().ok()?);
    let longest = if address.is_ipv4() { 32 } else { 128 };
    (prefix <= longest).then_some(PodIp {
        address,
        prefix,
        gateway: ip["gateway"].as_str().and_then(|text| text.parse().ok()),
        interface: ip["interface"].as_u64(),
    })
}

impl PodIp {
    /// The mask's bytes, as many as the address has.
    pub(crate) fn mask(&self) -> Vec<u8> {
        let host = u32::from(self.prefix);
        match self.address {
            IpAddr::V4(_) => {
                let bits = u32::MAX.checked_shl(32 - host).unwrap_or(0);
                Ipv4Addr::from(bits).octets().to_vec()
            }
            IpAddr::V6(_) => {
                let bits = u128::MAX.checked_shl(128 - host).unwrap_or(0);
                Ipv6Addr::from(bits).octets().to_vec()
            }
        }
    }
}

/// The pod that the sandbox is for.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct PodArguments {
    pub(crate) name: String,
    pub(crate) namespace: String,
    pub(crate) uid: Option<String>,
}

impl PodArguments {
    /// `K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-0;…`; `None`: no pod of Kubernetes.
    pub(crate) fn parse(arguments: &str) -> Option<Self> {
        let value = |wanted: &str| {
            let mut pairs = arguments.split(';').filter_map(|pair| pair.split_once('='));
            let found = pairs.find(|(key, _)| *key == wanted);
            found
                .map(|(_, value)| value.to_owned())
                .filter(|value| !value.is_empty())
        };
        Some(PodArguments {
            name: value("K8S_POD_NAME")?,
            namespace: value("K8S_POD_NAMESPACE")?,
            uid: value("K8S_POD_UID"),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> NetworkConfig {
        NetworkConfig::read(text.as_bytes()).expect("a configuration")
    }

    #[test]
    fn an_entry_of_istios_agent_is_understood() {
        let config = read(
            r#"{"cniVersion":"0.3.1","name":"istio-cni","type":"istio-cni","plugin_log_level":"info","cni_agent_run_dir":"/run/x",
                "ambient_enabled":true,"enablement_selectors":[{"podSelector":{}}],"exclude_namespaces":["kube-system"],
                "pod_namespace":"mesh","native_nftables":false,"enable_ambient_detection_retry":false,"kubeconfig":"/x"}"#,
        );
        assert_eq!(config.version(), "0.3.1");
        assert_eq!(config.run_folder(), "/run/x");
        assert_eq!(config.agent_namespace(), "mesh");
        assert!(config.excludes("kube-system") && !config.excludes("shop"));
        assert_eq!(config.result(), r#"{"cniVersion":"0.3.1"}"#);
    }

    #[test]
    fn addresses_come_with_their_masks() {
        let config = read(
            r#"{"prevResult":{"ips":[{"address":"10.1.0.5/20","gateway":"10.1.0.1","interface":2},{"address":"fd00::5/64"}]}}"#,
        );
        let ips = config.ips().expect("addresses");
        assert_eq!(ips[0].mask(), [255, 255, 240, 0]);
        assert_eq!(ips[0].interface, Some(2));
        assert_eq!(
            ips[1].mask()[..9],
            [255, 255, 255, 255, 255, 255, 255, 255, 0]
        );
        assert_eq!(ips[1].gateway, None);
        for (text, mask) in [("10.0.0.1/0", [0; 4]), ("10.0.0.1/32", [255; 4])] {
            let config = read(&format!(
                r#"{{"prevResult":{{"ips":[{{"address":"{text}"}}]}}}}"#
            ));
            assert_eq!(config.ips().expect("addresses")[0].mask(), mask);
        }
        for bad in ["10.0.0.1", "10.0.0.1/33", "x/8"] {
            let config = read(&format!(
                r#"{{"prevResult":{{"ips":[{{"address":"{bad}"}}]}}}}"#
            ));
            assert_eq!(config.ips().expect_err(bad).code, Code::InvalidConfig);
        }
    }

    #[test]
    fn arguments_name_the_pod() {
        let all = "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-0;K8S_POD_UID=1-2";
        let pod = PodArguments::parse(all).expect("a pod");
        assert_eq!(
            (pod.name.as_str(), pod.namespace.as_str()),
            ("web-0", "shop")
        );
        assert_eq!(pod.uid.as_deref(), Some("1-2"));
        for none in [
            "",
            "K8S_POD_NAME=web-0",
            "K8S_POD_NAME=;K8S_POD_NAMESPACE=shop",
            "x",
        ] {
            assert_eq!(PodArguments::parse(none), None, "{none}");
        }
    }
}
