//! The mesh end to end: real processes in network namespaces, driven by the `leyline` command and a folder of YAML.

mod branches;
mod egress;
mod enrolment;
mod folder;
mod hostile;
mod interop;
mod lifecycle;
mod limits;
mod names;
mod networks;
mod on_demand;
mod policy;
mod programs;
mod revocation;
mod rotation;
mod same_node;
mod scene;
mod system;
mod telemetry;
mod tokens;
mod traffic;
mod upgrade;
mod vanish;
mod waypoint;
mod waypoint_hostile;
