//! Where objects come from: folders of YAML, or the Kubernetes API, watched.

pub mod cluster;
pub mod files;
pub mod read;
pub mod tree;
pub mod watch;
