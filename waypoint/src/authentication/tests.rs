use std::time::Duration;

use aws_lc_rs::{
    rand::SystemRandom,
    rsa::KeySize,
    signature::{
        self, ECDSA_P256_SHA256_FIXED_SIGNING, ECDSA_P521_SHA512_FIXED_SIGNING, EcdsaKeyPair,
        Ed25519KeyPair, KeyPair, RsaKeyPair,
    },
};
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use http::Request;
use mesh::{l7::name::Target, names::PolicyKey};
use serde_json::json;

use super::*;

const ISSUER: &str = "https://issuer.example";
/// Seconds since 1970.
const NOW: u64 = 1_800_000_000;

fn encode(bytes: impl AsRef<[u8]>) -> String {
    URL_SAFE_NO_PAD.encode(bytes)
}

/// Signs with any of the algorithms; what is signed is the test's business.
enum Signer {
    Ec(&'static str, &'static str, EcdsaKeyPair),
    Ed(Ed25519KeyPair),
    Rsa(RsaKeyPair),
}

impl Signer {
    fn ec() -> Self {
        let pair = EcdsaKeyPair::generate(&ECDSA_P256_SHA256_FIXED_SIGNING).unwrap();
        Self::Ec("ES256", "P-256", pair)
    }

    fn ec_large() -> Self {
        let pair = EcdsaKeyPair::generate(&ECDSA_P521_SHA512_FIXED_SIGNING).unwrap();
        Self::Ec("ES512", "P-521", pair)
    }

    fn ed() -> Self {
        Self::Ed(Ed25519KeyPair::generate().unwrap())
    }

    fn rsa() -> Self {
        Self::Rsa(RsaKeyPair::generate(KeySize::Rsa2048).unwrap())
    }

    fn algorithm(&self) -> &'static str {
        match self {
            Self::Ec(algorithm, ..) => algorithm,
            Self::Ed(_) => "EdDSA",
            Self::Rsa(_) => "RS256",
        }
    }

    fn jwk(&self, id: &str) -> Value {
        match self {
            Self::Ec(_, curve, pair) => {
                let point = &pair.public_key().as_ref()[1..];
                let (x, y) = point.split_at(point.len() / 2);
                json!({"kty": "EC", "crv": curve, "kid": id, "x": encode(x), "y": encode(y)})
            }
            Self::Ed(pair) => {
                let x = encode(pair.public_key().as_ref());
                json!({"kty": "OKP", "crv": "Ed25519", "kid": id, "x": x})
            }
            Self::Rsa(pair) => {
                let public = signature::RsaPublicKeyComponents::<Vec<u8>>::from(pair.public_key());
                json!({"kty": "RSA", "kid": id, "n": encode(public.n), "e": encode(public.e)})
            }
        }
    }

    fn sign(&self, header: &Value, claims: &Value) -> String {
        let message = format!(
            "{}.{}",
            encode(header.to_string()),
            encode(claims.to_string())
        );
        let random = SystemRandom::new();
        let signature = match self {
            Self::Ec(_, _, pair) => pair
                .sign(&random, message.as_bytes())
                .unwrap()
                .as_ref()
                .to_vec(),
            Self::Ed(pair) => pair.sign(message.as_bytes()).as_ref().to_vec(),
            Self::Rsa(pair) => {
                let scheme = match header["alg"].as_str() {
                    Some("PS256") => &signature::RSA_PSS_SHA256,
                    _ => &signature::RSA_PKCS1_SHA256,
                };
                let mut signature = vec![0; pair.public_modulus_len()];
                pair.sign(scheme, &random, message.as_bytes(), &mut signature)
                    .unwrap();
                signature
            }
        };
        format!("{message}.{}", encode(signature))
    }

    fn token(&self, claims: &Value) -> String {
        self.sign(&json!({"alg": self.algorithm(), "kid": "k"}), claims)
    }
}

fn claims() -> Value {
    json!({"iss": ISSUER, "sub": "me", "aud": ["a", "b"], "exp": NOW + 600, "scope": "read write", "azp": "app"})
}

fn with(change: &Value) -> Value {
    let mut all = claims();
    for (name, value) in change.as_object().unwrap() {
        all[name] = value.clone();
    }
    all
}

fn rule(keys: &[Value]) -> JwtRule {
    JwtRule {
        issuer: ISSUER.into(),
        audiences: Vec::new(),
        keys: Jwks::Keys(json!({"keys": keys}).to_string().into()),
        keys_from: None,
        from: Vec::new(),
        payload_header: None,
        claim_headers: Vec::new(),
        forward_token: false,
        space_delimited_claims: Vec::new(),
        timeout: Duration::from_secs(5),
    }
}

fn policy(rules: Vec<JwtRule>) -> Arc<RequestAuthentication> {
    Arc::new(RequestAuthentication {
        key: PolicyKey {
            namespace: "default".into(),
            name: "jwt".into(),
        },
        targets: vec![Target::Waypoint],
        rules,
    })
}

fn request(headers: &[(&str, &str)]) -> Parts {
    let mut request = Request::builder().uri("http://web.default/api?x=1");
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    request.body(()).unwrap().into_parts().0
}

fn bearer(token: &str) -> Parts {
    request(&[("authorization", &format!("Bearer {token}"))])
}

fn check(rules: Vec<JwtRule>, parts: &mut Parts) -> Verdict {
    let now = SystemTime::UNIX_EPOCH + Duration::from_secs(NOW);
    Authentication::default().check([policy(rules)].iter(), parts, "web.default", now)
}

#[track_caller]
fn reason(rules: Vec<JwtRule>, mut parts: Parts) -> InvalidToken {
    match check(rules, &mut parts) {
        Verdict::Refused(refusal) => refusal.reason,
        other => panic!("not refused: {other:?}"),
    }
}

#[track_caller]
fn verified(rules: Vec<JwtRule>, parts: &mut Parts) -> Claims {
    match check(rules, parts) {
        Verdict::Verified(claims) => *claims,
        other => panic!("not verified: {other:?}"),
    }
}

#[test]
fn a_token_of_each_algorithm_is_verified_and_taken_out() {
    for signer in [
        Signer::ec(),
        Signer::ec_large(),
        Signer::ed(),
        Signer::rsa(),
    ] {
        let mut parts = bearer(&signer.token(&claims()));
        let claims = verified(vec![rule(&[signer.jwk("k")])], &mut parts);
        assert_eq!(&*claims.principal, "https://issuer.example/me");
        assert_eq!(claims.audiences, ["a".into(), "b".into()]);
        assert_eq!(claims.presenter.as_deref(), Some("app"));
        assert_eq!(claims.all["scope"], json!(["read", "write"]));
        assert!(!parts.headers.contains_key("authorization"));
    }
    let rsa = Signer::rsa();
    let token = rsa.sign(&json!({"alg": "PS256"}), &claims());
    verified(vec![rule(&[rsa.jwk("k")])], &mut bearer(&token));
}

#[test]
fn a_request_without_a_token_is_nobodys() {
    let rules = || vec![rule(&[Signer::ec().jwk("k")])];
    for headers in [&[][..], &[("authorization", "Basic x")]] {
        assert!(matches!(
            check(rules(), &mut request(headers)),
            Verdict::Anonymous
        ));
    }
}

#[test]
fn tokens_that_nobody_should_believe_are_refused() {
    use InvalidToken as E;
    let (signer, other, rsa) = (Signer::ec(), Signer::ec(), Signer::rsa());
    let rules = || vec![rule(&[signer.jwk("k"), rsa.jwk("r")])];
    let payload = encode(claims().to_string());
    let unsigned = |algorithm: &str| {
        format!(
            "{}.{payload}.",
            encode(json!({"alg": algorithm}).to_string())
        )
    };
    // HMAC with the public key as its secret: the classic confusion of algorithms.
    let secret = aws_lc_rs::hmac::Key::new(
        aws_lc_rs::hmac::HMAC_SHA256,
        signer.jwk("k").to_string().as_bytes(),
    );
    let message = format!(
        "{}.{payload}",
        encode(json!({"alg": "HS256", "kid": "k"}).to_string())
    );
    let confused = format!(
        "{message}.{}",
        encode(aws_lc_rs::hmac::sign(&secret, message.as_bytes()))
    );
    let good = signer.token(&claims());
    let (head, signature) = good.rsplit_once('.').unwrap();
    let changed = format!(
        "{}.{}.{signature}",
        head.split_once('.').unwrap().0,
        encode(with(&json!({"sub": "root"})).to_string())
    );
    for (token, expected) in [
        (unsigned("none"), E::Algorithm),
        (unsigned("None"), E::Algorithm),
        (confused, E::Algorithm),
        (unsigned("ES256"), E::Signature),
        (other.token(&claims()), E::Signature),
        (changed, E::Signature),
        (
            signer.sign(&json!({"alg": "ES256", "kid": "elsewhere"}), &claims()),
            E::NoKey,
        ),
        (
            signer.sign(&json!({"alg": "RS256", "kid": "k"}), &claims()),
            E::NoKey,
        ),
        (
            signer.sign(&json!({"alg": "ES256", "crit": ["b64"]}), &claims()),
            E::Critical,
        ),
        (
            signer.token(&with(&json!({"iss": "https://other"}))),
            E::Issuer,
        ),
        (signer.token(&with(&json!({"iss": 1}))), E::Issuer),
        (signer.token(&with(&json!({"exp": NOW - 61}))), E::Expired),
        (signer.token(&with(&json!({"exp": "soon"}))), E::Time),
        (signer.token(&with(&json!({"nbf": NOW + 61}))), E::NotYet),
        (signer.token(&json!([])), E::Payload),
        ("a.b".to_owned(), E::Form),
        ("a.b.c.d".to_owned(), E::Form),
        (String::new(), E::Form),
        ("!.!.!".to_owned(), E::Header),
        (format!("{}x", &good), E::SignatureForm),
        ("a".repeat(17_000), E::TooLarge),
    ] {
        assert_eq!(reason(rules(), bearer(&token)), expected, "{token}");
    }
}

#[test]
fn clocks_may_be_a_minute_apart() {
    let signer = Signer::ec();
    let skewed = with(&json!({"exp": NOW - 59, "nbf": NOW + 59}));
    verified(
        vec![rule(&[signer.jwk("k")])],
        &mut bearer(&signer.token(&skewed)),
    );
    let mut forever = claims();
    forever.as_object_mut().unwrap().remove("exp");
    verified(
        vec![rule(&[signer.jwk("k")])],
        &mut bearer(&signer.token(&forever)),
    );
}

#[test]
fn an_audience_that_is_not_allowed_is_forbidden() {
    let signer = Signer::ec();
    let for_audience = |audience: &str| JwtRule {
        audiences: vec!["x".into(), audience.into()],
        ..rule(&[signer.jwk("k")])
    };
    let token = signer.token(&claims());
    verified(vec![for_audience("b")], &mut bearer(&token));
    let Verdict::Refused(refusal) = check(vec![for_audience("c")], &mut bearer(&token)) else {
        panic!("not refused");
    };
    assert_eq!(refusal.status, StatusCode::FORBIDDEN);
    assert_eq!(
        refusal.details(),
        "jwt_authn_access_denied{Audiences_in_Jwt_are_not_allowed}"
    );
}

#[test]
fn a_refusal_tells_the_client_how_to_authenticate() {
    let rules = vec![rule(&[Signer::ec().jwk("k")])];
    let Verdict::Refused(refusal) = check(rules, &mut bearer("x")) else {
        panic!("not refused");
    };
    assert_eq!(refusal.status, StatusCode::UNAUTHORIZED);
    let expected = "Bearer realm=\"http://web.default/api\", error=\"invalid_token\"";
    assert_eq!(refusal.challenge, expected);
}

#[test]
fn many_tokens_are_refused_before_any_is_verified() {
    let mut parts = request(&[]);
    for _ in 0..5 {
        let value = HeaderValue::from_static("Bearer x.y.z");
        parts.headers.append(header::AUTHORIZATION, value);
    }
    assert_eq!(reason(vec![rule(&[])], parts), InvalidToken::TooMany);
}

#[test]
fn every_token_of_a_request_must_be_valid() {
    let signer = Signer::ec();
    let mut parts = bearer(&signer.token(&claims()));
    parts.uri = "/?access_token=a.b.c".parse().unwrap();
    assert_eq!(
        reason(vec![rule(&[signer.jwk("k")])], parts),
        InvalidToken::Header
    );
}

#[test]
fn without_keys_every_token_of_the_issuer_is_refused() {
    let token = Signer::ec().token(&claims());
    for keys in [
        Jwks::Unavailable("never fetched".into()),
        Jwks::Keys("no set".into()),
    ] {
        let rules = vec![JwtRule { keys, ..rule(&[]) }];
        assert_eq!(reason(rules, bearer(&token)), InvalidToken::KeysUnavailable);
    }
    let oct = json!({"kty": "oct", "kid": "k", "k": encode("secret")});
    assert_eq!(
        reason(vec![rule(&[oct])], bearer(&token)),
        InvalidToken::NoKey
    );
}

#[test]
fn keys_are_used_as_the_set_says() {
    let signer = Signer::ec();
    let token = signer.sign(&json!({"alg": "ES256"}), &claims());
    let mut encryption = signer.jwk("k");
    encryption["use"] = json!("enc");
    assert_eq!(
        reason(vec![rule(&[encryption])], bearer(&token)),
        InvalidToken::NoKey
    );
    let mut another = signer.jwk("k");
    another["alg"] = json!("ES384");
    assert_eq!(
        reason(vec![rule(&[another])], bearer(&token)),
        InvalidToken::NoKey
    );
    let unknown = json!({"kty": "new"});
    verified(
        vec![rule(&[unknown, Signer::ec().jwk("other"), signer.jwk("k")])],
        &mut bearer(&token),
    );
}

#[test]
fn rotated_keys_hold_from_the_next_policy_on() {
    let (old, new) = (Signer::ec(), Signer::ec());
    let now = SystemTime::UNIX_EPOCH + Duration::from_secs(NOW);
    let authentication = Authentication::default();
    let mut policies = vec![policy(vec![rule(&[old.jwk("k")])])];
    let verdict = |policies: &[_], signer: &Signer| {
        authentication.check(
            policies.iter(),
            &mut bearer(&signer.token(&claims())),
            "web.default",
            now,
        )
    };
    assert!(matches!(verdict(&policies, &old), Verdict::Verified(_)));
    assert!(matches!(verdict(&policies, &new), Verdict::Refused(_)));
    for _ in 0..10 {
        policies = vec![policy(vec![rule(&[new.jwk("k")])])];
        assert!(matches!(verdict(&policies, &old), Verdict::Refused(_)));
        assert!(matches!(verdict(&policies, &new), Verdict::Verified(_)));
    }
    assert_eq!(
        authentication.sets.read().len(),
        1,
        "replaced policies are forgotten"
    );
}

#[test]
fn tokens_are_found_where_rules_look_and_nowhere_else() {
    let signer = Signer::ec();
    let token = signer.token(&claims());
    let at = |place| JwtRule {
        from: vec![place],
        ..rule(&[signer.jwk("k")])
    };
    let header = TokenPlace::Header {
        name: "x-token".parse().unwrap(),
        prefix: "JWT ".into(),
    };
    let mut parts = request(&[
        ("x-token", &format!("jwt {token}")),
        ("authorization", "Bearer x"),
    ]);
    verified(vec![at(header)], &mut parts);
    assert!(!parts.headers.contains_key("x-token"));
    assert!(parts.headers.contains_key("authorization"));

    let mut parts = request(&[]);
    parts.uri = format!("http://web/p?a=1&t={token}&b=2").parse().unwrap();
    verified(vec![at(TokenPlace::Query("t".into()))], &mut parts);
    assert_eq!(parts.uri, "http://web/p?a=1&b=2");

    let mut parts = request(&[("cookie", &format!("a=1; session={token}; b=2"))]);
    verified(vec![at(TokenPlace::Cookie("session".into()))], &mut parts);
    assert_eq!(parts.headers["cookie"], "a=1; b=2");
}

#[test]
fn rules_of_several_issuers_each_accept_their_own() {
    let (first, second) = (Signer::ec(), Signer::ed());
    let other = JwtRule {
        issuer: "https://second".into(),
        ..rule(&[second.jwk("k")])
    };
    let rules = || vec![rule(&[first.jwk("k")]), other.clone()];
    let token = second.token(&with(&json!({"iss": "https://second"})));
    let claims = verified(rules(), &mut bearer(&token));
    assert_eq!(&*claims.principal, "https://second/me");
    let crossed = first.token(&with(&json!({"iss": "https://second"})));
    assert_eq!(reason(rules(), bearer(&crossed)), InvalidToken::NoKey);
}

#[test]
fn headers_of_rules_are_written_here_and_never_by_clients() {
    let signer = Signer::ec();
    let name = |text: &str| text.parse::<http::HeaderName>().unwrap();
    let nested = with(&json!({"realm": {"id": 7}, "list": ["x"]}));
    let telling = || JwtRule {
        payload_header: Some(name("x-payload")),
        claim_headers: vec![
            (name("x-sub"), vec!["sub".into()]),
            (name("x-realm"), vec!["realm".into(), "id".into()]),
            (name("x-list"), vec!["list".into()]),
        ],
        forward_token: true,
        ..rule(&[signer.jwk("k")])
    };
    let forged = [
        ("x-payload", "forged"),
        ("x-sub", "root"),
        ("x-realm", "0"),
        ("x-list", "l"),
    ];
    let mut parts = request(&forged);
    assert!(matches!(
        check(vec![telling()], &mut parts),
        Verdict::Anonymous
    ));
    assert!(parts.headers.is_empty());

    let mut parts = request(&forged);
    let value = format!("Bearer {}", signer.token(&nested));
    parts
        .headers
        .insert(header::AUTHORIZATION, value.parse().unwrap());
    verified(vec![telling()], &mut parts);
    assert_eq!(parts.headers["x-payload"], encode(nested.to_string()));
    assert_eq!(parts.headers["x-sub"], "me");
    assert_eq!(parts.headers["x-realm"], "7");
    assert!(!parts.headers.contains_key("x-list"));
    assert!(
        parts.headers.contains_key("authorization"),
        "it is forwarded"
    );
}

#[test]
fn preflights_are_exempt_but_forge_nothing() {
    let telling = JwtRule {
        payload_header: Some("x-payload".parse().unwrap()),
        ..rule(&[])
    };
    let mut parts = request(&[
        ("origin", "https://page"),
        ("access-control-request-method", "GET"),
        ("authorization", "Bearer x"),
        ("x-payload", "forged"),
    ]);
    parts.method = Method::OPTIONS;
    assert!(matches!(
        check(vec![telling], &mut parts),
        Verdict::Anonymous
    ));
    assert!(!parts.headers.contains_key("x-payload"));
}
