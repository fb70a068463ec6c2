//! Pods' DNS: names of the mesh are answered here, everything else goes to the node's name servers untouched.

pub mod message;
mod names;
mod server;

pub(crate) use names::PodNames;
pub(crate) use server::Server;
