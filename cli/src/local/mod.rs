//! `leyline local`: a whole mesh on one machine. Nodes and pods are network namespaces, containers are processes, and
//! everything else is real: the same control plane, agent and tunnels that run on a cluster.

pub mod address;
mod dns;
mod fabric;
pub mod logs;
mod netns;
pub mod objects;
mod plan;
mod pod;
mod probe;
mod process;
pub mod runtime;
mod sandbox;
mod services;
mod shim;
mod tokens;
mod vip;
