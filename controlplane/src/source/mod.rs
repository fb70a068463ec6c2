//! Where objects come from: folders of YAML, watched.

pub mod files;
pub mod read;
pub mod tree;
pub mod watch;
