//! The pods of this node: told by the node agent over ZDS, each with its listeners inside its own network namespace.

mod client;
mod reconcile;
