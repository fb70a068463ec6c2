//! The control plane: watches the user's objects, computes the mesh from them, serves it over delta xDS and signs
//! certificates. It never carries workload traffic: when it is gone, proxies go on with what they have.
//!
//! ```text
//! folder of YAML -> source -> graph + translate -> batches of encoded resources -> serve -> proxies
//!                                               -> statuses -> admin
//!                                  world's pods -> ca (who may ask for which certificate)
//! ```

pub mod admin;
pub mod auth;
pub mod ca;
pub mod cluster;
pub mod clusters;
pub mod config;
pub mod crd;
pub mod credentials;
pub mod gateway;
pub mod graph;
mod intern;
pub mod keys;
pub mod metrics;
pub mod object;
pub mod output;
pub mod run;
pub mod serve;
pub mod source;
#[cfg(test)]
mod testing;
pub mod tls;
pub mod translate;
pub mod validate;
pub mod wiring;
pub mod world;

#[cfg(test)]
mod goldens;

pub use config::Config;
pub use run::run;
