//! DNS as a client: host names resolved through the name servers of a `resolv.conf`, and questions carried to them.

pub mod forward;
mod resolv_conf;
mod resolver;

pub use forward::{ForwardError, Transport};
pub use resolv_conf::{ResolvConf, Upstreams};
pub use resolver::{Resolver, addresses, question};
