//! Filters: one file each. The order in which they run is in [`super::life`], nowhere else.

pub(super) mod authenticate;
pub(super) mod authorize;
pub(super) mod cors;
pub(super) mod external_authz;
pub(super) mod fault;
pub(super) mod grpc_web;
pub(super) mod hash;
pub(super) mod identity;
pub(super) mod mirror;
pub(super) mod rate_limit;
pub(super) mod response;
pub(super) mod session;
