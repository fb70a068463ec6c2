//! `leyline local`: a whole mesh on one machine. Nodes and pods are network namespaces, containers are processes, and
//! everything else is real: the same control plane, agent and tunnels that run on a cluster.

pub mod address;
pub(crate) mod client;
mod control;
mod dns;
mod fabric;
mod http;
pub mod logs;
mod netns;
pub mod objects;
mod observe;
pub mod parts;
mod plan;
mod pod;
mod probe;
mod process;
pub mod protocol;
mod rewrite;
pub mod rig;
pub mod runtime;
mod sandbox;
mod services;
mod shim;
mod supervisor;
mod terminal;
mod tokens;
pub(crate) mod up;
mod vip;
mod waypoints;
mod world;

pub(crate) use shim::{ROLE as SHIM_ROLE, main as shim_main};
pub(crate) use supervisor::{ROLE as SUPERVISOR_ROLE, main as supervisor_main};
