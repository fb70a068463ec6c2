//! Pods' DNS: names of the mesh are answered here, everything else goes to the node's name servers untouched.

mod forward;
mod message;
mod names;
mod resolv_conf;
mod resolver;
mod server;

pub(crate) use names::PodNames;
pub(crate) use resolv_conf::ResolvConf;
pub(crate) use resolver::Resolver;
pub(crate) use server::Server;
