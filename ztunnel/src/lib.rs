//! The node tunnel: one process per node that carries pods' TCP over HBONE, with identity and L4 policy.

pub mod config;
mod connections;
mod dns;
mod local_state;
mod pods;
mod proxy_protocol;
mod report;
mod yaml;

pub use config::Config;
