//! Servers outside the mesh behind a waypoint: names that nobody has listed, resolved when somebody asks for them.

use anyhow::{Context, Result, ensure};
use rig::yaml::{pod, service_of};

use crate::waypoint::Shop;

/// Servers outside the mesh, of which a wildcard covers those of one namespace.
fn objects(greeter: &str, web: &str) -> String {
    let greets = format!("[{greeter}, greet, '[::]:8443']");
    let serves = format!("[{web}, serve, '[::]:8080', away]");
    let entry = "---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: { name: outside, namespace: shop }
spec:
  hosts: ['*.outside.svc.cluster.local']
  location: MESH_EXTERNAL
  resolution: DYNAMIC_DNS
  ports:
  - { number: 443, name: tls, protocol: TLS, targetPort: 8443 }
  - { number: 80, name: http, protocol: HTTP, targetPort: 8080 }
";
    [
        "apiVersion: v1\nkind: Namespace\nmetadata: { name: beyond }\n".to_owned(),
        pod("outside", "far", "node2", &greets),
        pod("outside", "away", "node2", &serves),
        pod("beyond", "far", "node2", &greets),
        headless("outside", "far"),
        headless("outside", "away"),
        headless("beyond", "far"),
        entry.to_owned(),
    ]
    .concat()
}

/// A service whose name resolves to its pods.
fn headless(namespace: &str, name: &str) -> String {
    service_of(namespace, name, name, "name: tcp, port: 1") + "  clusterIP: None\n"
}

/// Where a client finds a name that the wildcard alone answers for.
fn allocated(shop: &Shop) -> Result<String> {
    let name = "any.outside.svc.cluster.local";
    let text = shop
        .mesh
        .succeed("shop/client", &["getent", "ahostsv4", name])?;
    let first = text.split_whitespace().next();
    Ok(first.context("no address")?.to_owned())
}

/// The beginning of TLS with a server of this name (RFC 8446 4.1.2, RFC 6066 3), as `web raw` takes it.
fn client_hello(name: &str) -> String {
    let short = |length: usize| {
        u16::try_from(length)
            .expect("names are short")
            .to_be_bytes()
    };
    let with = |parts: &[&[u8]]| parts.concat();
    let host = with(&[&[0], &short(name.len()), name.as_bytes()]);
    let list = with(&[&short(host.len()), &host]);
    let extension = with(&[&[0, 0], &short(list.len()), &list]);
    let version: &[u8] = &[3, 3];
    let body = with(&[
        version,
        &[7; 32],
        // No session; one suite; no compression.
        &[0, 0, 2, 0x13, 1, 1, 0],
        &short(extension.len()),
        &extension,
    ]);
    let handshake = with(&[&[1, 0], &short(body.len()), &body]);
    let record = with(&[&[22, 3, 1], &short(handshake.len()), &handshake]);
    record.iter().map(|byte| format!("\\x{byte:02x}")).collect()
}

#[test]
fn names_within_a_wildcard_are_reached_by_tls_and_http_and_no_others_are() -> Result<()> {
    let shop = Shop::open("")?;
    let load = shop.mesh.install(env!("CARGO_BIN_EXE_load"))?;
    shop.mesh.write("egress.yaml", &objects(&load, &shop.web))?;
    let egress = shop
        .mesh
        .eventually("the wildcard has an address", || allocated(&shop));
    let heard = |name: &str| -> Result<String> {
        let (address, hello) = (format!("{egress}:443"), client_hello(name));
        let found = shop
            .mesh
            .json("shop/client", &[&shop.web, "raw", &address, &hello])?;
        Ok(found["answer"].as_str().unwrap_or_default().to_owned())
    };
    shop.mesh
        .eventually("the server behind the name greets", || {
            let heard = heard("far.outside.svc.cluster.local")?;
            ensure!(!heard.is_empty(), "nothing is heard");
            Ok(())
        });
    for name in [
        "far.beyond.svc.cluster.local",
        "nobody.outside.svc.cluster.local",
    ] {
        let heard = heard(name)?;
        ensure!(heard.is_empty(), "{name}: {heard}");
    }
    let status = |host: &str| -> Result<u64> {
        let (url, header) = (format!("http://{egress}/"), format!("host: {host}"));
        let line = [&*shop.web, "get", &url, "--header", &header];
        let found = shop.mesh.json("shop/client", &line)?;
        Ok(found["last"]["status"].as_u64().unwrap_or_default())
    };
    shop.mesh
        .eventually("the server behind the host answers", || {
            let status = status("away.outside.svc.cluster.local")?;
            ensure!(status == 200, "{status}");
            Ok(())
        });
    let other = status("v1.shop.svc.cluster.local")?;
    ensure!(other >= 500, "{other}");
    Ok(())
}
