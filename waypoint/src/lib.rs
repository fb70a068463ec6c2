//! The waypoint: L7 policy and routing for the services that ask for it.
//!
//! Node tunnels send it CONNECTs for services and workloads that are bound to it (`inbound`). What each is for is decided
//! in `mesh::l7::dispatch`, what it speaks is declared or looked at (`detect`); HTTP goes to `http`, everything else to
//! `tcp`. Both reach endpoints through `backend`. What is known is one snapshot (`snapshot`), written by the xDS client.

mod authentication;
mod authorize;
mod backend;
pub mod config;
mod connection;
mod detect;
mod dump;
mod external_authorization;
mod flow;
mod http;
mod inbound;
mod limits;
mod metrics;
mod overload;
mod run;
mod runtime;
mod service_call;
mod snapshot;
mod tcp;
mod telemetry;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
mod waypoint;

pub use config::Config;
pub use run::{Process, RunError, run};
pub use runtime::main_with;
