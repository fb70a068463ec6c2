//! Keys that sign tokens: a JWK set (RFC 7517), read once, and the algorithms of each key (RFC 7518, RFC 8037).
//!
//! Symmetric keys are never accepted: whoever may verify could sign.

use aws_lc_rs::signature::{
    self, RsaPublicKeyComponents, UnparsedPublicKey, VerificationAlgorithm,
};
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use serde::Deserialize;

/// Keys of one issuer beyond this are ignored: each may cost a verification.
const MAX_KEYS: usize = 100;

/// A signature algorithm that is accepted, by its `alg` name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Algorithm {
    Rs256,
    Rs384,
    Rs512,
    Ps256,
    Ps384,
    Ps512,
    Es256,
    Es384,
    Es512,
    EdDsa,
}

impl Algorithm {
    /// None: not accepted, as `none` and `HS256` are.
    pub(super) fn named(name: &str) -> Option<Self> {
        Some(match name {
            "RS256" => Self::Rs256,
            "RS384" => Self::Rs384,
            "RS512" => Self::Rs512,
            "PS256" => Self::Ps256,
            "PS384" => Self::Ps384,
            "PS512" => Self::Ps512,
            "ES256" => Self::Es256,
            "ES384" => Self::Es384,
            "ES512" => Self::Es512,
            "EdDSA" => Self::EdDsa,
            _ => return None,
        })
    }
}

/// A public key.
#[derive(Debug)]
enum Public {
    Rsa {
        n: Vec<u8>,
        e: Vec<u8>,
    },
    /// An uncompressed point, and the one algorithm of its curve.
    Curve(Algorithm, Vec<u8>),
}

/// One key of a set.
#[derive(Debug)]
pub(super) struct Key {
    id: Option<String>,
    /// The only algorithm that it may be used with, where the set says one.
    only: Option<Algorithm>,
    public: Public,
}

#[derive(Deserialize)]
struct Set {
    keys: Vec<serde_json::Value>,
}

#[derive(Deserialize)]
struct Jwk {
    kty: String,
    #[serde(rename = "use")]
    usage: Option<String>,
    alg: Option<String>,
    kid: Option<String>,
    crv: Option<String>,
    n: Option<String>,
    e: Option<String>,
    x: Option<String>,
    y: Option<String>,
}

/// The keys of a set that can verify a signature; those of other kinds are left out. None: no JWK set.
pub(super) fn parse(text: &str) -> Option<Vec<Key>> {
    let set: Set = serde_json::from_str(text).ok()?;
    let keys = set.keys.into_iter().take(MAX_KEYS);
    let keys = keys.filter_map(|key| serde_json::from_value::<Jwk>(key).ok());
    Some(keys.filter_map(Key::of).collect())
}

fn bytes(text: Option<&String>) -> Option<Vec<u8>> {
    URL_SAFE_NO_PAD.decode(text?.trim_end_matches('=')).ok()
}

impl Key {
    fn of(jwk: Jwk) -> Option<Self> {
        if jwk.usage.as_deref().is_some_and(|usage| usage != "sig") {
            return None;
        }
        let only = match &jwk.alg {
            Some(name) => Some(Algorithm::named(name)?),
            None => None,
        };
        let public = match (jwk.kty.as_str(), jwk.crv.as_deref()) {
            ("RSA", _) => Public::Rsa {
                n: bytes(jwk.n.as_ref())?,
                e: bytes(jwk.e.as_ref())?,
            },
            ("EC", Some("P-256")) => point(Algorithm::Es256, 32, &jwk)?,
            ("EC", Some("P-384")) => point(Algorithm::Es384, 48, &jwk)?,
            ("EC", Some("P-521")) => point(Algorithm::Es512, 66, &jwk)?,
            ("OKP", Some("Ed25519")) => Public::Curve(Algorithm::EdDsa, bytes(jwk.x.as_ref())?),
            _ => return None,
        };
        Some(Self {
            id: jwk.kid,
            only,
            public,
        })
    }

    /// Whether it may have signed a token of this header. A key without an id may always have.
    pub(super) fn fits(&self, id: Option<&str>, algorithm: Algorithm) -> bool {
        let named = match (&self.id, id) {
            (Some(own), Some(id)) => own == id,
            _ => true,
        };
        let allowed = self.only.is_none_or(|only| only == algorithm);
        named && allowed && self.scheme(algorithm).is_some()
    }

    /// Whether the signature is this key's.
    pub(super) fn verifies(&self, algorithm: Algorithm, message: &[u8], signature: &[u8]) -> bool {
        let verified = match (&self.public, self.scheme(algorithm)) {
            (Public::Rsa { n, e }, Some(Scheme::Rsa(parameters))) => {
                RsaPublicKeyComponents { n, e }.verify(parameters, message, signature)
            }
            (Public::Curve(_, point), Some(Scheme::Curve(scheme))) => {
                UnparsedPublicKey::new(scheme, point).verify(message, signature)
            }
            _ => return false,
        };
        verified.is_ok()
    }

    fn scheme(&self, algorithm: Algorithm) -> Option<Scheme> {
        let rsa = matches!(self.public, Public::Rsa { .. });
        let scheme = match algorithm {
            Algorithm::Rs256 => Scheme::Rsa(&signature::RSA_PKCS1_2048_8192_SHA256),
            Algorithm::Rs384 => Scheme::Rsa(&signature::RSA_PKCS1_2048_8192_SHA384),
            Algorithm::Rs512 => Scheme::Rsa(&signature::RSA_PKCS1_2048_8192_SHA512),
            Algorithm::Ps256 => Scheme::Rsa(&signature::RSA_PSS_2048_8192_SHA256),
            Algorithm::Ps384 => Scheme::Rsa(&signature::RSA_PSS_2048_8192_SHA384),
            Algorithm::Ps512 => Scheme::Rsa(&signature::RSA_PSS_2048_8192_SHA512),
            Algorithm::Es256 => Scheme::Curve(&signature::ECDSA_P256_SHA256_FIXED),
            Algorithm::Es384 => Scheme::Curve(&signature::ECDSA_P384_SHA384_FIXED),
            Algorithm::Es512 => Scheme::Curve(&signature::ECDSA_P521_SHA512_FIXED),
            Algorithm::EdDsa => Scheme::Curve(&signature::ED25519),
        };
        let own = match (&self.public, &scheme) {
            (Public::Rsa { .. }, Scheme::Rsa(_)) => rsa,
            (Public::Curve(only, _), Scheme::Curve(_)) => *only == algorithm,
            _ => false,
        };
        own.then_some(scheme)
    }
}

enum Scheme {
    Rsa(&'static signature::RsaParameters),
    Curve(&'static dyn VerificationAlgorithm),
}

fn point(algorithm: Algorithm, size: usize, jwk: &Jwk) -> Option<Public> {
    let (x, y) = (bytes(jwk.x.as_ref())?, bytes(jwk.y.as_ref())?);
    let whole = x.len() == size && y.len() == size;
    whole.then(|| Public::Curve(algorithm, [vec![4], x, y].concat()))
}
