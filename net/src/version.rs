//! What this build is.

use serde::Serialize;

/// The `version` of `/config_dump`.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Version {
    version: &'static str,
    git_revision: &'static str,
    rust_version: &'static str,
    build_profile: &'static str,
    build_status: &'static str,
    istio_version: String,
    crypto_provider: &'static str,
}

impl Version {
    /// This build, under the version that the chart says it is.
    pub fn new(istio_version: String) -> Self {
        Self {
            version: env!("CARGO_PKG_VERSION"),
            git_revision: option_env!("LEYLINE_GIT_REVISION").unwrap_or("unknown"),
            rust_version: env!("CARGO_PKG_RUST_VERSION"),
            build_profile: if cfg!(debug_assertions) {
                "debug"
            } else {
                "release"
            },
            build_status: "unknown",
            istio_version,
            crypto_provider: "aws-lc-rs",
        }
    }
}

/// One line for `COMPONENT version`.
pub fn line(component: &str) -> String {
    let version = Version::new(String::new());
    format!(
        "leyline {component} {} ({}, {})",
        version.version, version.git_revision, version.build_profile
    )
}
