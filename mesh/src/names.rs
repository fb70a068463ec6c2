//! Names and keys: small, shared, comparable. Nothing here knows what a name refers to.

use std::{fmt, net::IpAddr, str::FromStr, sync::Arc};

use serde::{Deserialize, Serialize};

use crate::shared::Shared;

/// A shared, immutable string. Cloning costs a reference count.
pub type Str = Arc<str>;

/// Texts that many records have in common: namespaces, service accounts, nodes, clusters.
pub type Texts = Shared<str, 256>;

/// The primary key of a workload. Opaque, but for `//Pod/` inside it (see [`WorkloadUid::is_pod`]).
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct WorkloadUid(pub Str);

impl WorkloadUid {
    /// Whether the record describes a Kubernetes pod, which wins ties for an address.
    pub fn is_pod(&self) -> bool {
        self.0.contains("//Pod/")
    }
}

impl fmt::Display for WorkloadUid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A service's key: written `namespace/hostname`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NamespacedHostname {
    /// Namespace of the service.
    pub namespace: Str,
    /// Fully qualified host name, without a trailing dot.
    pub hostname: Str,
}

/// An authorization policy's key: written `namespace/name`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PolicyKey {
    /// Namespace of the policy.
    pub namespace: Str,
    /// Name of the policy.
    pub name: Str,
}

/// An address within a network (a flat address space): written `network/ip`. The empty network is the default one.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NetworkAddress {
    /// The network's id; empty for the default network.
    pub network: Str,
    /// The address, never an IPv4-mapped IPv6 one.
    pub address: IpAddr,
}

/// A key that does not have the form `first/second`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not of the form {form}")]
pub struct ParseKeyError {
    /// The rejected text.
    pub text: String,
    /// The form that was expected.
    pub form: &'static str,
}

fn split<'a>(text: &'a str, form: &'static str) -> Result<(&'a str, &'a str), ParseKeyError> {
    match text.split_once('/') {
        Some((first, second)) if !second.is_empty() && !second.contains('/') => Ok((first, second)),
        _ => Err(ParseKeyError {
            text: text.to_owned(),
            form,
        }),
    }
}

impl FromStr for NamespacedHostname {
    type Err = ParseKeyError;
    fn from_str(text: &str) -> Result<Self, ParseKeyError> {
        let (namespace, hostname) = split(text, "namespace/hostname")?;
        Ok(Self {
            namespace: namespace.into(),
            hostname: hostname.into(),
        })
    }
}

impl FromStr for PolicyKey {
    type Err = ParseKeyError;
    fn from_str(text: &str) -> Result<Self, ParseKeyError> {
        let (namespace, name) = split(text, "namespace/name")?;
        Ok(Self {
            namespace: namespace.into(),
            name: name.into(),
        })
    }
}

impl FromStr for NetworkAddress {
    type Err = ParseKeyError;
    fn from_str(text: &str) -> Result<Self, ParseKeyError> {
        const FORM: &str = "network/ip";
        let (network, address) = split(text, FORM)?;
        let address: IpAddr = address.parse().map_err(|_| ParseKeyError {
            text: text.to_owned(),
            form: FORM,
        })?;
        Ok(Self {
            network: network.into(),
            address: address.to_canonical(),
        })
    }
}

impl fmt::Display for NamespacedHostname {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.hostname)
    }
}

impl fmt::Display for PolicyKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

impl fmt::Display for NetworkAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.network, self.address)
    }
}

macro_rules! serde_as_text {
    ($($type:ty),+) => {$(
        impl serde::Serialize for $type {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> serde::Deserialize<'de> for $type {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = <String as serde::Deserialize>::deserialize(deserializer)?;
                text.parse().map_err(serde::de::Error::custom)
            }
        }
    )+};
}
pub(crate) use serde_as_text;

serde_as_text!(NamespacedHostname, PolicyKey, NetworkAddress);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_texts_are_kept_once_while_someone_has_them() {
        let mut texts = Texts::default();
        let [mut one, mut two]: [Str; 2] = ["shop".into(), "shop".into()];
        texts.share(&mut one);
        texts.share(&mut two);
        assert!(Arc::ptr_eq(&one, &two));
        for number in 0..10_000 {
            texts.share(&mut number.to_string().into());
        }
        assert!(texts.count() <= 2 * Texts::FLOOR);
        let mut again: Str = "shop".into();
        texts.share(&mut again);
        assert!(Arc::ptr_eq(&one, &again));
    }

    #[test]
    fn keys_round_trip_through_text() {
        for text in ["a/web.a.svc.cluster.local", "/web"] {
            assert_eq!(
                text.parse::<NamespacedHostname>().unwrap().to_string(),
                text
            );
        }
        for text in ["/10.0.0.1", "net-1/fd00::1"] {
            assert_eq!(text.parse::<NetworkAddress>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn keys_of_another_form_are_refused() {
        for text in ["", "a", "a/", "a/b/c"] {
            assert!(text.parse::<PolicyKey>().is_err(), "{text:?}");
        }
        assert!("/10.0.0.256".parse::<NetworkAddress>().is_err());
    }
}
