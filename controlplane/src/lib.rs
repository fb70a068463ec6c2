//! The control plane: watches the user's objects, computes the mesh from them, serves it over delta xDS and signs
//! certificates. It never carries workload traffic.

pub mod output;
pub mod world;
