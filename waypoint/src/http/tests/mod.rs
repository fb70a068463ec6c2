//! The engine in process: clients over a duplex pipe, backends over loopback.

mod abuse;
mod abuse_http2;
mod balancing;
mod basics;
mod draining;
mod failures;
pub(super) mod rig;
mod routes;
mod security;
mod streams;
mod telling;
