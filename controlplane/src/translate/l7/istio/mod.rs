//! The Istio API at L7.

pub mod authorization;
