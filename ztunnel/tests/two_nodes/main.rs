//! Two node tunnels and a pod of each, in network namespaces of their own: what applications, agents, peers and operators
//! see of them.

mod ahead;
mod burst;
mod certificates;
mod dedicated;
mod handover;
mod hostile;
mod lifecycle;
mod names;
mod policy;
mod process;
mod rig;
mod routes;
mod settings;
mod socks5;
mod start;
mod telemetry;
mod traffic;

/// Where namespaces are not permitted the test says so and passes.
macro_rules! rig_or_skip {
    () => {
        match crate::rig::rig().await {
            Some(rig) => rig,
            None => return,
        }
    };
}
use rig_or_skip;
