//! Everything that touches the outside: sockets, TLS, HBONE, xDS, CA, drain, admin, metrics, logs.
//!
//! Facts are gathered and effects carried out here; what to do is decided in `mesh`.

pub mod accept;
pub mod admin;
#[cfg(test)]
mod allocations;
pub mod ca;
pub mod clock;
pub mod connections;
pub mod copy;
pub mod dns;
pub mod drain;
#[cfg(test)]
mod fixture;
pub mod flows;
pub mod handover;
pub mod hbone;
mod http1;
pub mod lanes;
pub mod log;
pub mod mesh_state;
pub mod metrics;
pub mod netns;
pub mod process;
pub mod proxy_protocol;
pub mod ready;
pub mod report;
pub mod settings;
pub mod socket;
pub mod socks5;
pub mod sysctl;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
pub mod tls;
pub mod version;
pub mod xds;
pub mod zds;
