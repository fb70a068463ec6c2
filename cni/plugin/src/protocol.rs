//! What the CNI specification (1.1) wants on stdout.

use serde_json::json;

/// Spoken where the configuration names no version.
pub(crate) const DEFAULT_VERSION: &str = "1.0.0";
/// Chaining, and with it `prevResult`, begins with 0.3.0.
const SUPPORTED: [&str; 5] = ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];

/// Error codes of the specification; from 100 on they are the plugin's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Code {
    /// A variable of the environment is missing or unknown.
    InvalidEnvironment = 4,
    /// Stdin could not be read.
    Io = 5,
    /// Stdin is no configuration.
    Decode = 6,
    /// The configuration cannot be used.
    InvalidConfig = 7,
    /// Nothing is wrong with the pod: the runtime should try again later.
    TryAgain = 11,
    /// The agent refuses the pod.
    Refused = 100,
    /// The plugin itself.
    Internal = 101,
}

/// Why the sandbox cannot be used.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Failure {
    pub(crate) code: Code,
    pub(crate) message: String,
}

impl Failure {
    pub(crate) fn new(code: Code, message: impl Into<String>) -> Self {
        Failure {
            code,
            message: message.into(),
        }
    }

    pub(crate) fn json(&self, version: &str) -> String {
        json!({ "cniVersion": version, "code": self.code as u32, "msg": self.message }).to_string()
    }
}

/// The answer to VERSION.
pub(crate) fn versions(version: &str) -> String {
    json!({ "cniVersion": version, "supportedVersions": SUPPORTED }).to_string()
}
