//! Delta xDS: what the graph computed, to every proxy that may see it.
//!
//! ```text
//! world --batches--> Store (one log per type) --wakes--> Subscriber (a cursor and an interest per type)
//!                       |                                    |  flush: what changed since the cursor
//!                       +---- Payload: encoded once, shared -+--> frames of one HTTP/2 stream
//! ```
//!
//! A subscriber costs its cursor and the names it asked for, never a copy of the world: a slow one merges, because
//! nothing is kept for it but its place in the log. Bodies are encoded by the graph; here they are only put side by
//! side, once for all subscribers that stand at the same place. This part never decides what a resource says.

pub mod access;
mod encode;
mod limit;
pub mod registry;
mod service;
pub mod store;
mod subscriber;
mod view;

#[cfg(test)]
mod tests;

pub(crate) use service::PATH;
pub use service::{DiscoveryService, Limits, MAX_AGE};
