//! Enrolment on real namespaces that the tests make for themselves: two of them joined by a veth pair, a pod's and its
//! node's. Both have no name and vanish with the test, however it ends. Where namespaces are not permitted, each test
//! says so and passes.

mod agent;
mod api;
mod apply;
mod crash;
mod flows;
mod host;
mod kubernetes;
mod replies;
mod rig;
mod tunnel;
