//! The node tunnel: one process per node that carries pods' TCP over HBONE, with identity and L4 policy.
//!
//! Facts are gathered here and in `net`, decisions are made in `mesh`, and carried out here again. Pods come and go by
//! the node agent's word ([`pods`] follows it over ZDS); each has its listeners inside its own network namespace:
//! `outbound`, `inbound`, `inbound_plaintext` and `dns` serve them. Nothing here knows Kubernetes.

mod application;
mod authorize;
pub mod config;
mod connect;
pub mod dns;
mod dump;
#[cfg(test)]
mod fixture;
mod flow;
mod handshakes;
mod identities;
mod inbound;
mod inbound_plaintext;
mod local_state;
mod metrics;
mod neighbours;
mod outbound;
mod pod;
mod pods;
mod reset;
mod revocations;
mod run;
mod runtime;
#[cfg(test)]
mod sizes;
mod socks5;
mod stages;
mod yaml;

pub use config::Config;
pub use local_state::LocalStateError;
pub use run::{RunError, Tunnel, run};
pub use runtime::main_with;
pub use yaml::YamlError;
