//! A gRPC service of the control plane, as settings name it: where, whom it must prove to be, and who we are.

use std::path::{Path, PathBuf};

use rustls::pki_types::ServerName;
use serde::Serialize;
use tonic::metadata::{AsciiMetadataKey, AsciiMetadataValue};

use super::Reader;
use crate::{ca, tls, tls::control_plane, xds};

/// Where a pod finds what vouches for the control plane, and its own token: upstream's mounts.
const ROOT_CERT: &str = "./var/run/secrets/istio/root-cert.pem";
const TOKEN: &str = "./var/run/secrets/tokens/istio-token";

/// A gRPC service of the control plane.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Remote {
    /// `https://host:port`.
    pub address: String,
    /// What its certificate must chain to.
    pub root: RootCert,
    /// Extra DNS name accepted on its certificate.
    pub alternative_hostname: Option<String>,
    /// How we prove who we are.
    pub token: Token,
    /// Extra metadata.
    #[serde(skip)]
    pub headers: Vec<(String, String)>,
}

/// What the control plane's certificate must chain to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum RootCert {
    /// A PEM file, re-read when it changes.
    File(PathBuf),
    /// The system's roots.
    System,
    /// PEM text.
    Inline(String),
}

/// How we prove who we are to the control plane.
#[derive(Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum Token {
    /// Not at all.
    None,
    /// A file, read for each request.
    File(PathBuf),
    /// The text itself, which dumps do not show.
    #[serde(serialize_with = "withheld")]
    Inline(String),
}

fn withheld<S: serde::Serializer>(_: impl Sized, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str("withheld")
}

impl std::fmt::Debug for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::None => f.write_str("None"),
            Self::File(path) => write!(f, "File({})", path.display()),
            Self::Inline(_) => f.write_str("Inline(..)"),
        }
    }
}

/// The address is no URI.
#[derive(Debug, thiserror::Error)]
#[error("{address:?} is not an address")]
pub struct RemoteError {
    /// As it was set.
    pub address: String,
    /// Why.
    pub source: http::uri::InvalidUri,
}

impl Remote {
    /// Reads the settings `PREFIX_ADDRESS`, `PREFIX_ROOT_CA`, `ALT_PREFIX_HOSTNAME`, `AUTH_TOKEN` and `PREFIX_HEADER_*`;
    /// `None` where the address is empty.
    pub fn read(
        read: &mut Reader<'_>,
        prefix: &str,
        default_address: &str,
        in_kubernetes: bool,
    ) -> Option<Remote> {
        let name = |suffix: &str| format!("{prefix}_{suffix}");
        let address = read.text_or(&name("ADDRESS"), default_address);
        if address.is_empty() {
            return None;
        }
        let address = if address.contains("://") {
            address
        } else {
            format!("https://{address}")
        };
        if !address.starts_with("https://") && !address.starts_with("http://") {
            read.reject(&name("ADDRESS"), format!("{address:?}: https:// expected"));
        } else if let Err(error) = address.parse::<http::Uri>() {
            read.reject(&name("ADDRESS"), format!("{address:?}: {error}"));
        }
        Some(Remote {
            address,
            root: read_root(read, &name("ROOT_CA")),
            alternative_hostname: read_hostname(read, &format!("ALT_{prefix}_HOSTNAME")),
            token: read_token(read, in_kubernetes),
            headers: read_headers(read, &name("HEADER_")),
        })
    }
}

fn read_hostname(read: &mut Reader<'_>, name: &str) -> Option<String> {
    read.parse_with(name, |text| match ServerName::try_from(text) {
        Ok(_) => Ok(text.to_owned()),
        Err(error) => Err(error.to_string()),
    })
}

/// What gRPC does not send would fail every request, which is told best at the start.
fn read_headers(read: &mut Reader<'_>, prefix: &str) -> Vec<(String, String)> {
    let headers = read.family(prefix);
    for (key, text) in &headers {
        let key_is_fit = AsciiMetadataKey::from_bytes(key.to_ascii_lowercase().as_bytes()).is_ok();
        if !key_is_fit || AsciiMetadataValue::try_from(text).is_err() {
            let problem = "the name of a header and printable ASCII expected";
            read.reject(&format!("{prefix}{key}"), problem);
        }
    }
    headers
}

fn read_root(read: &Reader<'_>, name: &str) -> RootCert {
    match read.some_text(name) {
        None => RootCert::File(ROOT_CERT.into()),
        Some(text) if text == "SYSTEM" => RootCert::System,
        Some(text) if text.contains("-----BEGIN") => RootCert::Inline(text),
        Some(text) => RootCert::File(text.into()),
    }
}

fn read_token(read: &mut Reader<'_>, in_kubernetes: bool) -> Token {
    match read.some_text("AUTH_TOKEN") {
        // In Kubernetes also where it is not there yet: to go on without would only be refused later.
        None if in_kubernetes || Path::new(TOKEN).exists() => Token::File(TOKEN.into()),
        None => Token::None,
        Some(text) if Path::new(&text).exists() => Token::File(text.into()),
        Some(text) => {
            if AsciiMetadataValue::try_from(&text).is_err() {
                // Without the text, which is a secret.
                read.reject("AUTH_TOKEN", "a path or printable ASCII expected");
            }
            Token::Inline(text)
        }
    }
}

impl Remote {
    /// How to dial it under the rules of `policy`.
    ///
    /// # Errors
    /// The address is no URI.
    pub fn control_plane(
        &self,
        policy: &tls::Policy,
    ) -> Result<control_plane::Config, RemoteError> {
        let address = self.address.parse().map_err(|source| RemoteError {
            address: self.address.clone(),
            source,
        })?;
        Ok(control_plane::Config {
            address,
            roots: match &self.root {
                RootCert::File(path) => control_plane::RootSource::File(path.clone()),
                RootCert::Inline(text) => control_plane::RootSource::Inline(text.clone()),
                RootCert::System => control_plane::RootSource::System,
            },
            hostname: self.alternative_hostname.clone(),
            policy: policy.clone(),
        })
    }

    /// The file that its roots are read from, if they are.
    pub fn root_file(&self) -> Option<&Path> {
        match &self.root {
            RootCert::File(path) => Some(path),
            RootCert::Inline(_) | RootCert::System => None,
        }
    }
}

impl From<&Token> for ca::Token {
    fn from(token: &Token) -> Self {
        match token {
            Token::None => Self::None,
            Token::File(path) => Self::File(path.clone()),
            Token::Inline(text) => Self::Text(text.clone()),
        }
    }
}

impl Token {
    /// As the xDS client takes it.
    pub fn for_xds(&self) -> Option<xds::Token> {
        match self {
            Self::None => None,
            Self::File(path) => Some(xds::Token::File(path.clone())),
            Self::Inline(text) => Some(xds::Token::Static(text.clone())),
        }
    }
}
