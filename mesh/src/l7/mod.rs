//! What a waypoint knows and decides about requests: the L7 model and the pure functions on it.
//!
//! The model is one form for Gateway API and Istio API objects: `controlplane` translates into it, the wire carries
//! it (`leyline.waypoint.v1`), the waypoint, `explain`, status and admission decide on it. One object of a user is one
//! resource, so that a change is one small message.

mod attached;
pub mod authorization;
pub mod authorize;
pub mod backend;
pub mod balance;
pub mod choose;
pub mod condition;
pub mod config;
pub mod cors;
pub mod dispatch;
pub mod dump;
pub mod edit;
pub mod expression;
#[cfg(test)]
pub(crate) mod fixture;
pub mod log_format;
pub mod name;
pub mod path;
pub mod pattern;
pub mod rate_limit;
pub mod record;
pub mod request;
pub mod request_authentication;
pub mod response_flags;
pub mod route;
pub mod served;
pub mod sniff;
pub mod table;
pub mod telemetry;
pub mod trace;
pub mod via;
pub mod view;
