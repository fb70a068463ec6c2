//! Generates the wire types with protox, so that no protoc is needed.

use std::{env, fs, path::PathBuf};

const FILES: [&str; 16] = [
    "workload.proto",
    "authorization.proto",
    "zds.proto",
    "ca.proto",
    "core.proto",
    "status.proto",
    "discovery.proto",
    "external_auth.proto",
    "otlp_common.proto",
    "otlp_resource.proto",
    "otlp_trace.proto",
    "otlp_logs.proto",
    "otlp_collector_trace.proto",
    "otlp_collector_logs.proto",
    "waypoint.proto",
    "pod_dns.proto",
];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto");
    let descriptors = protox::compile(FILES, ["proto"])?;
    let mut config = prost_build::Config::new();
    // Resources and payloads are shared and sliced: no copy per subscriber.
    config.bytes([".google.protobuf.Any"]);
    // A stable order makes equal resources equal bytes, on which versions rest.
    config.btree_map(["."]);
    // It holds a private key.
    config.skip_debug([".leyline.waypoint.v1.ClientCertificate"]);
    if env::var_os("CARGO_FEATURE_GRPC").is_some() {
        tonic_prost_build::configure().compile_fds_with_config(descriptors, config)?;
    } else {
        config.compile_fds(descriptors)?;
    }
    // Where prost puts one file per package; a missing one is an error here and not in a consumer.
    let out = PathBuf::from(env::var("OUT_DIR")?);
    fs::metadata(out.join("istio.workload.rs"))?;
    Ok(())
}
