//! Tokens of users behind a waypoint: keys come from a server, and stay when it and the control plane go.

use anyhow::{Result, ensure};
use rig::yaml::{pod, service_of};

use crate::waypoint::Shop;

/// The public part of an Ed25519 key that nobody has any longer (RFC 8037, `x`).
const KEY: &str = "I4LI28l2xLXOa_92vKfCqHjync3b6gr7o52IeORJO-A";

/// `{"alg":"EdDSA"}` and `{"iss":"https://issuer","sub":"me"}`, signed with it.
const TOKEN: &str = "eyJhbGciOiJFZERTQSJ9.eyJpc3MiOiJodHRwczovL2lzc3VlciIsInN1YiI6Im1lIn0.\
XnQKPDpMM0RsVewa1TSTBO5692Vw-D6zJvhUR01iuMkX04-Kll-bKfxju_MJ9wIaKNnTIau_bsK_bv_Kx8vLCQ";

/// The same, signed with another key.
const FORGED: &str = "eyJhbGciOiJFZERTQSJ9.eyJpc3MiOiJodHRwczovL2lzc3VlciIsInN1YiI6Im1lIn0.\
AAQKPDpMM0RsVewa1TSTBO5692Vw-D6zJvhUR01iuMkX04-Kll-bKfxju_MJ9wIaKNnTIau_bsK_bv_Kx8vLCQ";

/// Tokens of requests to `v1`, whose `sub` the server gets in a header.
fn rule(name: &str, header: &str) -> String {
    format!(
        "---
apiVersion: security.istio.io/v1
kind: RequestAuthentication
metadata: {{ name: {name}, namespace: shop }}
spec:
  targetRefs: [{{ group: '', kind: Service, name: v1 }}]
  jwtRules:
  - issuer: https://issuer
    jwksUri: http://keys.outside.svc.cluster.local:8080/keys/{KEY}
    outputClaimToHeaders: [{{ header: {header}, claim: sub }}]
"
    )
}

/// A header of a request to `v1` as its server got it.
fn told(shop: &Shop, header: &str) -> Result<()> {
    let bearer = format!("authorization: Bearer {TOKEN}");
    let found = shop.get("shop/client", "v1", "/", &["--header", &bearer])?;
    let told = &found["last"]["body"]["headers"][header];
    ensure!(told[0] == "me", "{found}");
    Ok(())
}

#[test]
fn keys_outlive_their_server_and_the_control_plane_together() -> Result<()> {
    let shop = Shop::open("")?;
    let serves = format!("[{}, serve, '[::]:8080', keys]", shop.web);
    let port = "name: http, port: 8080";
    let server = pod("outside", "keys", "node1", &serves);
    let service = service_of("outside", "keys", "keys", port) + "  clusterIP: None\n";
    shop.mesh.write("keys.yaml", &(server + &service))?;
    shop.mesh.write("jwt.yaml", &rule("jwt", "x-first"))?;
    shop.mesh
        .eventually("the token is believed", || told(&shop, "x-first"));
    let forged = format!("authorization: Bearer {FORGED}");
    shop.answers("v1", "/", &["--header", &forged], 401);

    shop.mesh.remove("keys.yaml")?;
    shop.mesh.eventually("the server of the keys is gone", || {
        let gone = shop.mesh.pod("outside/keys").is_err();
        ensure!(gone, "it is still there");
        Ok(())
    });
    shop.mesh.kill("controlplane")?;
    shop.mesh
        .eventually("it begins anew with the keys that it had", || {
            let of = ("RequestAuthentication", "shop/jwt", "WaypointAccepted");
            let (_, _, message) = shop.mesh.condition(of.0, of.1, of.2)?;
            let kept = message.contains("the last good keys from");
            ensure!(kept, "{message}");
            Ok(())
        });
    // Of a policy that the waypoint has not known before it has no keys of its own.
    shop.mesh.write("jwt.yaml", &rule("anew", "x-second"))?;
    shop.mesh
        .eventually("the token is believed by the new rule", || {
            told(&shop, "x-second")
        });
    shop.answers("v1", "/", &["--header", &forged], 401);
    Ok(())
}
