//! Objects to what waypoints are told: `mesh`'s L7 model, one resource for one object of a user. Pure; `wiring::l7`
//! fetches the facts.
//!
//! `istio` reads the Istio API, `gateway_api` the Gateway API. Both make resources per waypoint, because what a target
//! is, and the settings, differ from one waypoint to another.

use std::sync::Arc;

use mesh::{l7::view, names::Str};
use prost::Message as _;

use crate::{object::Name, output::Resource};

pub mod backend;
pub mod config;
pub mod credential;
pub mod gateway_api;
pub mod istio;
pub mod rate_limit;
pub mod references;
pub mod served;
pub mod target;

/// Names a resource of a waypoint: the waypoint's Gateway and [`view::Resource::name`].
pub type Key = (Name, Str);

/// What an object comes to at the waypoints.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Outcome {
    /// At most one of a name per waypoint.
    pub resources: Vec<(Key, Arc<view::Resource>)>,
    /// Where it is in force; `None`: there is nothing to say.
    pub condition: Option<crate::output::Condition>,
}

/// A resource and its key.
pub fn keyed(waypoint: &Name, resource: view::Resource) -> (Key, Arc<view::Resource>) {
    let name = resource.name().into();
    ((waypoint.clone(), name), Arc::new(resource))
}

/// Encodes what one waypoint gets.
pub fn resource(gateway: &Name, resource: &view::Resource) -> Resource {
    let message = proto::waypoint::Resource::from(resource);
    let body = bytes::Bytes::from(message.encode_to_vec());
    let version = format!("{:x}", twox_hash::XxHash64::oneshot(0, &body));
    Resource {
        type_url: proto::WAYPOINT_TYPE_URL,
        scope: Some(Arc::new(gateway.clone())),
        name: resource.name().into(),
        aliases: Box::default(),
        version: version.into(),
        body,
        node: None,
        services: Box::default(),
    }
}
