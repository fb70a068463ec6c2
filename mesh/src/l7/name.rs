//! Names of L7 resources.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

use crate::names::{NamespacedHostname, ParseKeyError, Str};

/// The user's object that a resource came from; also the resource's name on the wire: `kind/namespace/name`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ObjectRef {
    /// Kind of the object, as Kubernetes spells it.
    pub kind: Str,
    /// Namespace of the object.
    pub namespace: Str,
    /// Name of the object.
    pub name: Str,
}

impl fmt::Display for ObjectRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}/{}", self.kind, self.namespace, self.name)
    }
}

impl FromStr for ObjectRef {
    type Err = ParseKeyError;

    fn from_str(text: &str) -> Result<Self, ParseKeyError> {
        let mut pieces = text.split('/');
        let whole = [pieces.next(), pieces.next(), pieces.next(), pieces.next()];
        match whole {
            [Some(kind), Some(namespace), Some(name), None]
                if !kind.is_empty() && !name.is_empty() =>
            {
                Ok(Self {
                    kind: kind.into(),
                    namespace: namespace.into(),
                    name: name.into(),
                })
            }
            _ => Err(ParseKeyError {
                text: text.to_owned(),
                form: "kind/namespace/name",
            }),
        }
    }
}

/// What a policy is attached to.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Target {
    /// Everything that passes this waypoint (`targetRefs` to its Gateway, or to the GatewayClass in the root namespace:
    /// the control plane sends it to each waypoint concerned).
    Waypoint,
    /// Requests to one service (`Service` or `ServiceEntry`).
    Service(NamespacedHostname),
}

impl Target {
    /// Whether a request to `service` (none: to a workload's address) is concerned.
    pub fn covers(&self, service: Option<&NamespacedHostname>) -> bool {
        match self {
            Self::Waypoint => true,
            Self::Service(key) => Some(key) == service,
        }
    }
}
