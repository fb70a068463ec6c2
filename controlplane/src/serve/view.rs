//! What a place in the log is, and how a type on the wire is had from it.

use proto::{ADDRESS_TYPE_URL, WAYPOINT_TYPE_URL, WORKLOAD_TYPE_URL};

use crate::{
    object::Name,
    output::{GatewayProxy, Resource},
};

/// A place in the log. 0 stands before everything.
pub(super) type Sequence = u64;

/// How one type on the wire is had from the log: `Workload` is the first half of `Address`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct View<'a> {
    type_url: &'a str,
    /// The Gateway whose proxy reads, for types of which it has its own.
    scope: Option<&'a Name>,
}

/// Whether each waypoint has its own resources of this type. They are nobody else's.
fn is_scoped(type_url: &str) -> bool {
    type_url == WAYPOINT_TYPE_URL
}

impl<'a> View<'a> {
    /// How the type is had from the log by a reader that is the proxy of a Gateway, or none.
    pub(super) fn of(type_url: &'a str, reader: Option<&'a GatewayProxy>) -> Self {
        let own = reader.filter(|it| it.confined || is_scoped(type_url));
        Self {
            type_url,
            scope: own.map(|it| &it.gateway),
        }
    }

    /// Whose resources it shows; `None`: everyone's.
    pub(super) fn scope(self) -> Option<&'a Name> {
        self.scope
    }

    /// The type on the wire.
    pub(super) fn type_url(self) -> &'a str {
        self.type_url
    }

    /// The type whose log it is had from.
    pub(super) fn log(self) -> &'a str {
        match self.type_url {
            WORKLOAD_TYPE_URL => ADDRESS_TYPE_URL,
            other => other,
        }
    }

    /// Whether the type has this resource of its log.
    pub(super) fn shows(self, resource: &Resource) -> bool {
        self.type_url != WORKLOAD_TYPE_URL || workload(&resource.body).is_some()
    }

    /// The marshalled message of this type.
    pub(super) fn body(self, resource: &Resource) -> &[u8] {
        match self.type_url {
            WORKLOAD_TYPE_URL => workload(&resource.body).unwrap_or_default(),
            _ => &resource.body,
        }
    }
}

/// Whether an address is a service's.
pub(super) fn is_service(resource: &Resource) -> bool {
    workload(&resource.body).is_none()
}

/// The `Workload` within a marshalled `Address` (Istio workload.proto `Address.workload`, field 1).
fn workload(address: &[u8]) -> Option<&[u8]> {
    const WORKLOAD: u8 = 1 << 3 | 2;
    let mut rest = address.strip_prefix(&[WORKLOAD])?;
    let length = prost::decode_length_delimiter(&mut rest).ok()?;
    (rest.len() == length).then_some(rest)
}
