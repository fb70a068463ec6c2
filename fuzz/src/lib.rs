//! Everything that reads bytes of others, each behind one function that takes any bytes and panics where a claim about
//! the reader does not hold.
//!
//! `fuzz/libfuzzer` hands them to libFuzzer (`fuzz/run`, outside the workspace); `tests/replay.rs` replays
//! `corpus/TARGET` through each on every run of the tests, with some thousands of mutations that are the same each time.

mod datagrams;
mod frames;
mod resources;
mod text;
mod waypoint;

pub use datagrams::{dns_message, proxy_header, zds_packet};
pub use frames::{hbone_client, hbone_server};
pub use resources::workloads;
pub use text::{baggage, forwarded, hbone_request, spiffe};
pub use waypoint::{expression, log_format, path, routes, sniff};

/// A target: its name, which is its corpus folder's and its cargo-fuzz binary's, and its body.
pub type Target = (&'static str, fn(&[u8]));

/// Every target.
pub const TARGETS: &[Target] = &[
    ("baggage", baggage),
    ("dns_message", dns_message),
    ("expression", expression),
    ("forwarded", forwarded),
    ("hbone_client", hbone_client),
    ("hbone_request", hbone_request),
    ("hbone_server", hbone_server),
    ("log_format", log_format),
    ("path", path),
    ("proxy_header", proxy_header),
    ("routes", routes),
    ("sniff", sniff),
    ("spiffe", spiffe),
    ("workloads", workloads),
    ("zds_packet", zds_packet),
];

/// The bytes as text, where they are.
fn text_of(bytes: &[u8]) -> Option<&str> {
    std::str::from_utf8(bytes).ok()
}
