//! Objects to what waypoints get: `mesh`'s L7 model, one resource for one object of a user.
//!
//! `istio` reads the Istio API, `gateway_api` the Gateway API. Both make resources per waypoint, because what a target
//! is, and the settings, differ from one waypoint to another.

use std::sync::Arc;

use mesh::{l7::view::Resource, names::Str};

use crate::object::Name;

pub mod istio;
pub mod target;

/// Names a resource of a waypoint: the waypoint's Gateway and [`Resource::name`].
pub type Key = (Name, Str);

/// A resource and its key.
pub fn keyed(waypoint: &Name, resource: Resource) -> (Key, Arc<Resource>) {
    let name = resource.name().into();
    ((waypoint.clone(), name), Arc::new(resource))
}
