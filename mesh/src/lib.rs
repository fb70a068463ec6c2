//! What the mesh knows and decides: facts in, decision out.
//!
//! The node tunnel, the waypoint, `leyline explain`, status and admission all call the functions of this crate, so
//! there is one answer to each question. Nothing here opens a socket, reads a clock, an environment or a file, or
//! spawns a task; chance is passed in as a [`draw::Draw`].

#![warn(missing_docs)]

pub mod authority;
pub mod authorize;
pub mod dns;
pub mod draw;
pub mod dump;
pub mod east_west;
pub mod enrol;
pub mod explain;
pub mod flow;
pub mod headers;
pub mod identity;
pub mod inbound;
pub mod journal;
pub mod l7;
pub mod names;
pub mod outbound;
pub mod outcome;
pub mod policy;
pub mod select;
pub mod service;
pub mod shared;
pub mod view;
pub mod wire;
pub mod workload;

#[cfg(test)]
mod fixture;
