//! The Istio API at L7.

pub mod authorization;
pub mod destination_rule;
pub mod http;
pub mod mesh;
pub mod read;
pub mod request_authentication;
pub mod telemetry;
pub mod virtual_service;
