//! The mesh on a real Kubernetes cluster: installed by its chart, driven by kubectl and `leyline` as a user does.
//!
//! One cluster serves all tests of a run ([`rig::cluster::bed`]). A test takes the bed `shared`, and a namespace of its own; or
//! `alone`, when it breaks what others stand on.

mod burst;
mod conformance;
mod connect;
mod join;
mod lifecycle;
mod measure;
mod networks;
mod operator;
mod policy;
mod revisions;
mod scene;
mod traffic;
mod waypoint;
