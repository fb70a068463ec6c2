//! Enrolment: brings pods of this node into the mesh and out of it again.
//!
//! The agent decides which pods take part, hands their network namespaces to the node tunnel (ZDS), writes the
//! redirection rules into them, lets the node's probes pass and tells the cluster. It never carries a workload's
//! bytes and never holds a workload's key.

pub mod agent;
pub mod facts;
pub mod local;
pub mod rules;
