//! A waypoint's L7 resources in its admin dump: for people as text, for `leyline explain` as they are on the wire.

use prost::Message as _;
use serde::{Deserialize, Serialize};

use super::{
    backend::{BackendPolicy, BackendTls, Pem, TrafficPolicy},
    view::{Resource, Update, View},
};

/// One resource.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dumped {
    /// Its name on the wire.
    pub name: String,
    /// For people.
    pub text: String,
    /// `leyline.waypoint.v1.Resource`, in hexadecimal; never with a private key.
    pub wire: String,
}

/// Why a dump cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("resource {name}: {problem}")]
pub struct InvalidDump {
    /// The resource.
    pub name: String,
    /// What is wrong with it.
    pub problem: String,
}

/// All resources, by name.
pub fn dump(view: &View) -> Vec<Dumped> {
    let mut all: Vec<_> = view
        .resources()
        .map(|it| dumped(&without_keys(it)))
        .collect();
    all.sort_by(|a, b| a.name.cmp(&b.name));
    all
}

fn dumped(resource: &Resource) -> Dumped {
    let wire = proto::waypoint::Resource::from(resource).encode_to_vec();
    Dumped {
        name: resource.name(),
        text: format!("{resource:?}"),
        wire: wire.iter().map(|byte| format!("{byte:02x}")).collect(),
    }
}

/// A view as a dump tells it.
///
/// # Errors
/// If a resource is not one of this version's.
pub fn read(all: &[Dumped]) -> Result<View, InvalidDump> {
    let upserts = all.iter().map(resource).collect::<Result<_, _>>()?;
    let mut view = View::default();
    view.apply(Update {
        upserts,
        removals: Vec::new(),
    });
    Ok(view)
}

fn resource(dumped: &Dumped) -> Result<Resource, InvalidDump> {
    let wrong = |problem: String| InvalidDump {
        name: dumped.name.clone(),
        problem,
    };
    let bytes = bytes(&dumped.wire).ok_or_else(|| wrong("not hexadecimal".to_owned()))?;
    let wire = proto::waypoint::Resource::decode(&*bytes);
    let wire = wire.map_err(|error| wrong(error.to_string()))?;
    wire.try_into()
        .map_err(|error: crate::wire::InvalidResource| wrong(error.to_string()))
}

fn bytes(hex: &str) -> Option<Vec<u8>> {
    let pairs = hex.as_bytes().chunks(2);
    let byte = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok();
    pairs.map(byte).collect()
}

fn without_keys(resource: Resource) -> Resource {
    let Resource::Backend(mut policy) = resource else {
        return resource;
    };
    for traffic in policies(&mut policy) {
        if let Some(BackendTls::Verify { client, .. } | BackendTls::Insecure { client, .. }) =
            &mut traffic.tls
            && let Some(client) = client
        {
            client.key = Pem::Inline(Vec::new());
        }
    }
    Resource::Backend(policy)
}

fn policies(policy: &mut BackendPolicy) -> impl Iterator<Item = &mut TrafficPolicy> {
    let subsets = policy.subsets.values_mut();
    let subsets = subsets.flat_map(|it| it.policy.iter_mut().chain(it.ports.values_mut()));
    let own = std::iter::once(&mut policy.policy);
    own.chain(policy.ports.values_mut()).chain(subsets)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::l7::{
        backend::{ClientCertificate, Subset},
        fixture::{route, rule, service},
    };

    fn with_key() -> TrafficPolicy {
        let client = ClientCertificate {
            chain: Pem::Inline(b"chain".to_vec()),
            key: Pem::Inline(b"secret".to_vec()),
        };
        TrafficPolicy {
            tls: Some(BackendTls::Insecure {
                sni: None,
                client: Some(client),
            }),
            ..TrafficPolicy::default()
        }
    }

    #[test]
    fn a_dump_is_read_as_it_was_and_holds_no_key() {
        let subset = Subset {
            labels: BTreeMap::new(),
            policy: Some(with_key()),
            ports: BTreeMap::from([(80, with_key())]),
        };
        let backend = BackendPolicy {
            service: service(),
            sources: vec![],
            policy: with_key(),
            ports: BTreeMap::from([(80, with_key())]),
            subsets: BTreeMap::from([("v1".into(), subset)]),
        };
        let mut view = View::default();
        view.apply(Update {
            upserts: vec![
                Resource::Backend(Box::new(backend)),
                Resource::Route(route("HTTPRoute/a/r", vec![rule("x", vec![])])),
            ],
            removals: vec![],
        });
        let dumped = dump(&view);
        let json = serde_json::to_string(&dumped).unwrap();
        let secret: String = b"secret".iter().map(|it| format!("{it:02x}")).collect();
        assert!(
            !json.contains(&secret) && !json.contains("secret"),
            "{json}"
        );
        let read = read(&dumped).unwrap();
        assert_eq!(dump(&read), dumped);
        assert_eq!(read.routes().next(), view.routes().next());
    }

    #[test]
    fn a_dump_that_is_not_one_is_refused_by_name() {
        let with = |wire: &str| {
            let dumped = Dumped {
                name: "route/x".to_owned(),
                text: String::new(),
                wire: wire.to_owned(),
            };
            read(&[dumped]).unwrap_err().to_string()
        };
        assert_eq!(with("0x"), "resource route/x: not hexadecimal");
        assert_eq!(with(""), "resource route/x: kind: missing");
    }
}
