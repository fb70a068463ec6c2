//! Enrolment of one pod: the order of its steps, and the task that carries them out.
//!
//! Each pod has one owner task and shares nothing with the others but the tunnels' queues and the node's set, so a pod
//! whose namespace is broken holds up itself alone. The goal is the latest one only: a pod that is labelled, unlabelled
//! and labelled again ends labelled, whatever was in progress. Every step is bounded in time and idempotent; one that
//! fails is retried with growing pauses, and the reason is told outside.

mod machine;
mod owner;

pub(crate) use machine::{Goal, Plan};
pub(crate) use owner::{Order, Owner, Shared, Standing};

#[cfg(test)]
mod tests;
