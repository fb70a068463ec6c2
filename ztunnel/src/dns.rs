//! Pods' DNS: names of the mesh are answered here, everything else goes to the node's name servers untouched.

mod forward;
mod message;
mod resolv_conf;
pub(crate) mod resolver;
mod server;
