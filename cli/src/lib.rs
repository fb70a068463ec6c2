//! The `leyline` command: one program that is every part of the mesh, and `leyline local`, which runs them all on one
//! machine.

pub mod local;
