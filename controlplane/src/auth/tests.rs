use serde_json::{Value, json};

use super::{AuthenticateError, Authenticator as _, Caller, Jwks};
use crate::testing::{Issuer, claims};

async fn check(issuer: &Issuer, token: &str) -> Result<Caller, AuthenticateError> {
    let jwks = Jwks::open(issuer.path(), vec!["istio-ca".to_owned()]).unwrap();
    jwks.authenticate(token).await
}

#[tokio::test]
async fn a_bound_token_names_its_account_and_pod() {
    let issuer = Issuer::new();
    let mut claims = claims("shop", "web", "web-1");
    claims["kubernetes.io"]["node"] = json!({"name": "node-1", "uid": "n"});
    let caller = check(&issuer, &issuer.sign(&claims)).await.unwrap();
    assert_eq!(caller.account.to_string(), "shop/web");
    let pod = caller.pod.unwrap();
    assert_eq!((&*pod.name, &*pod.uid), ("web-1", "web-1-uid"));
    assert_eq!(pod.node.as_deref(), Some("node-1"));
}

#[tokio::test]
async fn spoilt_tokens_are_refused() {
    let issuer = Issuer::new();
    let now = jsonwebtoken::get_current_timestamp();
    let rows: &[(&str, &str, Value)] = &[
        ("expired", "exp", json!(now - 60)),
        ("without end", "exp", Value::Null),
        ("not yet valid", "nbf", json!(now + 600)),
        ("for another audience", "aud", json!(["other"])),
        ("for nobody", "aud", json!([])),
        (
            "of another subject",
            "sub",
            json!("system:serviceaccount:shop:admin"),
        ),
        ("of a user", "sub", json!("kubernetes-admin")),
        ("without Kubernetes' claims", "kubernetes.io", Value::Null),
        (
            "with a colon in a name",
            "kubernetes.io",
            json!({"namespace": "shop:web", "serviceaccount": {"name": "x"}}),
        ),
    ];
    for (what, key, value) in rows {
        let mut claims = claims("shop", "web", "web-1");
        claims[*key] = value.clone();
        if *what == "with a colon in a name" {
            claims["sub"] = json!("system:serviceaccount:shop:web:x");
        }
        assert!(
            check(&issuer, &issuer.sign(&claims)).await.is_err(),
            "{what}"
        );
    }
}

#[tokio::test]
async fn forged_tokens_are_refused() {
    let (issuer, stranger) = (Issuer::new(), Issuer::new());
    let valid = issuer.token("shop", "web", "web-1");
    let foreign = stranger.token("shop", "web", "web-1");
    let (signed, signature) = valid.rsplit_once('.').unwrap();
    let other = issuer.token("shop", "admin", "web-1");
    let claims = other.split('.').nth(1).unwrap();
    let header = valid.split('.').next().unwrap();
    let none = "eyJhbGciOiJub25lIn0";
    let shared = {
        let key = jsonwebtoken::EncodingKey::from_secret(issuer.jwks().as_bytes());
        let claims = crate::testing::claims("shop", "web", "web-1");
        jsonwebtoken::encode(&jsonwebtoken::Header::default(), &claims, &key).unwrap()
    };
    for (what, token) in [
        ("of another key", foreign),
        (
            "with other claims",
            format!("{header}.{claims}.{signature}"),
        ),
        ("without a signature", format!("{signed}.")),
        ("of algorithm none", format!("{none}.{claims}.")),
        ("signed with the public key as a secret", shared),
        ("nonsense", "nonsense".to_owned()),
    ] {
        assert!(check(&issuer, &token).await.is_err(), "{what}");
    }
    check(&issuer, &valid).await.unwrap();
}

#[test]
fn a_file_without_usable_keys_ends_the_start() {
    let issuer = Issuer::new();
    let symmetric = json!({"keys": [{"kty": "oct", "k": "c2VjcmV0", "alg": "HS256"}]});
    for text in ["", "{}", r#"{"keys": []}"#, &symmetric.to_string()] {
        std::fs::write(issuer.path(), text).unwrap();
        assert!(Jwks::open(issuer.path(), Vec::new()).is_err(), "{text}");
    }
    std::fs::remove_file(issuer.path()).unwrap();
    assert!(Jwks::open(issuer.path(), Vec::new()).is_err());
}
