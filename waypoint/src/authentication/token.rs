//! One token: its form (RFC 7519, RFC 7515 compact serialization), its signature, its claims.

use std::time::{Duration, SystemTime};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use serde::Deserialize;
use serde_json::{Map, Value};

use super::keys::{Algorithm, Key};

/// The longest token that is looked at, in bytes.
pub(super) const MAX_LENGTH: usize = 16 * 1024;
/// How far clocks may be apart.
pub(super) const LEEWAY: Duration = Duration::from_secs(60);

/// Why a token is refused. The text is the response's body, in Envoy's words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum InvalidToken {
    #[error("Jwt is not in the form of Header.Payload.Signature with two dots and 3 sections")]
    Form,
    #[error("Jwt is too large")]
    TooLarge,
    #[error("Too many Jwts in the request")]
    TooMany,
    #[error("Jwt header is an invalid Base64url encoded or not a JSON")]
    Header,
    #[error("Jwt header [alg] is not supported")]
    Algorithm,
    #[error("Jwt header [crit] is not supported")]
    Critical,
    #[error("Jwt payload is an invalid Base64url encoded or not a JSON")]
    Payload,
    #[error("Jwt signature is an invalid Base64url encoded")]
    SignatureForm,
    #[error("Jwt issuer is not configured")]
    Issuer,
    #[error("Jwt is expired")]
    Expired,
    #[error("Jwt not yet valid")]
    NotYet,
    #[error("Jwt payload [exp] or [nbf] is not a number")]
    Time,
    #[error("Audiences in Jwt are not allowed")]
    Audience,
    #[error("Jwks remote fetch is failed")]
    KeysUnavailable,
    #[error("Jwks doesn't have key to match kid or alg from Jwt")]
    NoKey,
    #[error("Jwt verification fails")]
    Signature,
}

#[derive(Deserialize)]
struct Header {
    alg: String,
    kid: Option<String>,
    crit: Option<Value>,
}

/// A token that has its form; nothing is verified.
#[derive(Debug)]
pub(super) struct Unverified<'a> {
    algorithm: Algorithm,
    key_id: Option<String>,
    /// Header and payload as they were signed.
    message: &'a str,
    /// The payload in base64url.
    pub(super) payload: &'a str,
    signature: Vec<u8>,
    pub(super) claims: Map<String, Value>,
}

impl<'a> Unverified<'a> {
    pub(super) fn parse(text: &'a str) -> Result<Self, InvalidToken> {
        if text.len() > MAX_LENGTH {
            return Err(InvalidToken::TooLarge);
        }
        let (message, signature) = text.rsplit_once('.').ok_or(InvalidToken::Form)?;
        let (header, payload) = message.split_once('.').ok_or(InvalidToken::Form)?;
        if payload.contains('.') {
            return Err(InvalidToken::Form);
        }
        let decode = |text: &str| URL_SAFE_NO_PAD.decode(text).ok();
        let header = decode(header).and_then(|it| serde_json::from_slice::<Header>(&it).ok());
        let header = header.ok_or(InvalidToken::Header)?;
        if header.crit.is_some() {
            return Err(InvalidToken::Critical);
        }
        let claims = decode(payload).and_then(|it| serde_json::from_slice(&it).ok());
        Ok(Self {
            algorithm: Algorithm::named(&header.alg).ok_or(InvalidToken::Algorithm)?,
            key_id: header.kid,
            message,
            payload,
            signature: decode(signature).ok_or(InvalidToken::SignatureForm)?,
            claims: claims.ok_or(InvalidToken::Payload)?,
        })
    }

    pub(super) fn issuer(&self) -> Option<&str> {
        self.claims.get("iss")?.as_str()
    }

    /// `aud`: a text or a list of texts (RFC 7519, 4.1.3).
    pub(super) fn audiences(&self) -> Vec<&str> {
        match self.claims.get("aud") {
            Some(Value::String(one)) => vec![one],
            Some(Value::Array(many)) => many.iter().filter_map(Value::as_str).collect(),
            _ => Vec::new(),
        }
    }

    /// `exp` and `nbf`, where they are there.
    pub(super) fn check_times(&self, now: SystemTime) -> Result<(), InvalidToken> {
        let now = now.duration_since(SystemTime::UNIX_EPOCH);
        let now = now.unwrap_or_default().as_secs_f64();
        let time = |name: &str| match self.claims.get(name) {
            None => Ok(None),
            Some(value) => value.as_f64().map(Some).ok_or(InvalidToken::Time),
        };
        if time("exp")?.is_some_and(|end| end + LEEWAY.as_secs_f64() < now) {
            return Err(InvalidToken::Expired);
        }
        if time("nbf")?.is_some_and(|start| start > now + LEEWAY.as_secs_f64()) {
            return Err(InvalidToken::NotYet);
        }
        Ok(())
    }

    /// Whether one of the keys has signed it.
    pub(super) fn check_signature(&self, keys: &[Key]) -> Result<(), InvalidToken> {
        let id = self.key_id.as_deref();
        let mut fitting = keys
            .iter()
            .filter(|key| key.fits(id, self.algorithm))
            .peekable();
        if fitting.peek().is_none() {
            return Err(InvalidToken::NoKey);
        }
        let message = self.message.as_bytes();
        match fitting.any(|key| key.verifies(self.algorithm, message, &self.signature)) {
            true => Ok(()),
            false => Err(InvalidToken::Signature),
        }
    }
}
