//! The engine in process: clients over a duplex pipe, backends over loopback.

mod basics;
pub(super) mod rig;
mod security;
mod telling;
