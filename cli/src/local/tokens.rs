//! Service account tokens with the claims that Kubernetes writes, signed with a key that lives as long as the mesh. The
//! control plane checks them against the key set written beside its settings.

use anyhow::{Context, Result};
use aws_lc_rs::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair};
use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use serde_json::{Value, json};

/// Who issues the tokens.
pub(super) const ISSUER: &str = "https://kubernetes.default.svc.cluster.local";
/// Whom they are for: the certificate authority and the discovery service.
pub(super) const AUDIENCE: &str = "istio-ca";
/// How long a token is good, in seconds; it is replaced long before.
pub(super) const LIFETIME_SECONDS: u64 = 3600;

/// Signs tokens.
pub(super) struct Minter {
    key: EncodingKey,
    public: Vec<u8>,
}

impl std::fmt::Debug for Minter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Minter")
    }
}

/// The pod that a token speaks for.
#[derive(Clone, Debug)]
pub(super) struct Bearer {
    /// Namespace of pod and account.
    pub namespace: String,
    /// The service account.
    pub service_account: String,
    /// The pod's name.
    pub pod: String,
    /// The pod's unique id.
    pub pod_uid: String,
    /// The node it runs on.
    pub node: String,
}

const KEY_ID: &str = "leyline-local";

impl Minter {
    /// A new key, which is never written anywhere.
    pub(super) fn new() -> Result<Self> {
        let pair = EcdsaKeyPair::generate(&ECDSA_P256_SHA256_FIXED_SIGNING)
            .context("make the tokens' key")?;
        let document = pair.to_pkcs8v1().context("encode the tokens' key")?;
        let public = pair.public_key().as_ref().to_vec();
        Ok(Self {
            key: EncodingKey::from_ec_der(document.as_ref()),
            public,
        })
    }

    /// The public half, as RFC 7517 writes it.
    pub(super) fn key_set(&self) -> Value {
        // SEC 1 2.3.3: 0x04, then both coordinates.
        let (x, y) = self.public[1..].split_at(32);
        let text = |bytes: &[u8]| BASE64_URL_SAFE_NO_PAD.encode(bytes);
        json!({"keys": [{"kty": "EC", "crv": "P-256", "alg": "ES256", "use": "sig", "kid": KEY_ID,
            "x": text(x), "y": text(y)}]})
    }

    /// A token for `bearer`, good from now (`now` is in seconds since 1970).
    pub(super) fn mint(&self, bearer: &Bearer, now: u64) -> Result<String> {
        let Bearer {
            namespace,
            service_account,
            pod,
            pod_uid,
            node,
        } = bearer;
        let claims = json!({
            "iss": ISSUER, "aud": [AUDIENCE],
            "sub": format!("system:serviceaccount:{namespace}:{service_account}"),
            "iat": now, "nbf": now, "exp": now + LIFETIME_SECONDS,
            "kubernetes.io": {
                "namespace": namespace,
                "serviceaccount": {"name": service_account, "uid": super::plan::uid_of(&format!("sa/{namespace}/{service_account}"))},
                "pod": {"name": pod, "uid": pod_uid},
                "node": {"name": node, "uid": super::plan::uid_of(&format!("node/{node}"))},
            },
        });
        let header = Header {
            kid: Some(KEY_ID.to_owned()),
            ..Header::new(Algorithm::ES256)
        };
        jsonwebtoken::encode(&header, &claims, &self.key).context("sign a token")
    }
}

#[cfg(test)]
mod tests {
    use jsonwebtoken::{DecodingKey, Validation, jwk::JwkSet};

    use super::*;

    #[test]
    fn a_token_is_good_under_the_published_key_and_names_pod_and_node() {
        let minter = Minter::new().unwrap();
        let bearer = Bearer {
            namespace: "istio-system".to_owned(),
            service_account: "ztunnel".to_owned(),
            pod: "ztunnel-node1".to_owned(),
            pod_uid: "u".to_owned(),
            node: "node1".to_owned(),
        };
        let now = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .unwrap()
            .as_secs();
        let token = minter.mint(&bearer, now).unwrap();
        let set: JwkSet = serde_json::from_value(minter.key_set()).unwrap();
        let key = DecodingKey::from_jwk(&set.keys[0]).unwrap();
        let mut validation = Validation::new(Algorithm::ES256);
        validation.set_audience(&[AUDIENCE]);
        validation.set_issuer(&[ISSUER]);
        let claims = jsonwebtoken::decode::<Value>(&token, &key, &validation)
            .unwrap()
            .claims;
        assert_eq!(claims["sub"], "system:serviceaccount:istio-system:ztunnel");
        assert_eq!(claims["kubernetes.io"]["node"]["name"], "node1");
        assert_eq!(claims["kubernetes.io"]["pod"]["uid"], "u");
    }
}
