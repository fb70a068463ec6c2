//! Bad input at a waypoint: refused or bounded, the servers never see it, and other requests are unharmed.

use anyhow::{Context, Result, ensure};
use rig::yaml::{idle_pod, pod};

use crate::waypoint::Shop;

/// Requests that programs read differently; none may reach a server as two, or at all.
const SMUGGLING: &[(&str, &str)] = &[
    (
        "length and chunked",
        r"POST / HTTP/1.1\r\nHost: v1.shop\r\nContent-Length: 6\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: v1.shop\r\n\r\n",
    ),
    (
        "two lengths",
        r"POST / HTTP/1.1\r\nHost: v1.shop\r\nContent-Length: 0\r\nContent-Length: 44\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: v1.shop\r\n\r\n",
    ),
    (
        "a signed length",
        r"POST / HTTP/1.1\r\nHost: v1.shop\r\nContent-Length: +0\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: v1.shop\r\n\r\n",
    ),
    (
        "a list of lengths",
        r"POST / HTTP/1.1\r\nHost: v1.shop\r\nContent-Length: 0, 44\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: v1.shop\r\n\r\n",
    ),
];

#[test]
fn what_programs_read_differently_is_refused_and_reaches_no_server() -> Result<()> {
    let shop = Shop::open("")?;
    for (about, text) in SMUGGLING {
        let line = [shop.web.as_str(), "raw", "v1.shop:80", text];
        let found = shop.mesh.json("shop/client", &line)?;
        let answer = found["answer"].as_str().context("an answer")?;
        let refused = answer.is_empty()
            || answer.starts_with("HTTP/1.1 4")
            || answer.starts_with("HTTP/1.1 5");
        ensure!(refused, "{about}: {answer:?}");
        ensure!(
            answer.matches("HTTP/1.1 ").count() <= 1,
            "{about} was two requests: {answer:?}"
        );
    }
    for service in ["v1", "v2"] {
        let seen = shop.seen(service)?.to_string();
        ensure!(!seen.contains("smuggled"), "{service} saw {seen}");
    }
    Ok(())
}

#[test]
fn abuse_of_http2_is_cut_off_and_harms_nobody() -> Result<()> {
    let shop = Shop::open("")?;
    let line = [
        shop.web.as_str(),
        "get",
        "http://v1.shop/",
        "--until-input-ends",
        "--rate",
        "20",
    ];
    let held = shop.mesh.spawn("shop/client", &line)?;
    let address = service_address(&shop, "v1")?;
    for case in [
        "rapid-reset",
        "continuation-flood",
        "header-flood",
        "settings-flood",
        "ping-flood",
        "empty-data-flood",
    ] {
        let line = [
            shop.hostile.as_str(),
            &address,
            case,
            "--plain",
            "--authority",
            "v1.shop",
        ];
        let found = shop.mesh.json("shop/intruder", &line)?;
        let outcome = found["outcome"].as_str().context("an outcome")?;
        ensure!(
            !outcome.contains("status 200") && outcome != "taken" && outcome != "open",
            "{case}: {outcome}"
        );
    }
    let found: serde_json::Value = serde_json::from_str(held.finish()?.trim())?;
    ensure!(
        found["failed"] == 0 && found["statuses"]["200"] == found["requests"],
        "{found}"
    );
    Ok(())
}

#[test]
fn a_server_that_breaks_off_is_told_to_the_client() -> Result<()> {
    let shop = Shop::open("")?;
    for stage in ["accept", "request", "head", "body"] {
        let serve = format!("[{}, reset, '[::]:8080', {stage}]", shop.web);
        let name = format!("broken-{stage}");
        let service = format!(
            "---
apiVersion: v1
kind: Service
metadata: {{ name: {name}, namespace: shop }}
spec:
  selector: {{ app: {name} }}
  ports: [{{ name: http, port: 80, targetPort: 8080, appProtocol: http }}]
"
        );
        let objects = pod("shop", &name, "node2", &serve) + &service;
        shop.mesh.write(&format!("{name}.yaml"), &objects)?;
        if stage == "body" {
            shop.mesh
                .eventually("a body that breaks off is no whole answer", || {
                    let found = shop.try_get("shop/client", &name, "/", &[])?;
                    ensure!(
                        found["failed"] == 1 && found["errors"].to_string().contains("body"),
                        "{found}"
                    );
                    Ok(())
                });
        } else {
            shop.answers(&name, "/", &[], 503);
        }
    }
    Ok(())
}

#[test]
fn a_client_that_goes_away_ends_the_servers_work() -> Result<()> {
    let shop = Shop::open("")?;
    for flags in [
        &["--abort-after", "100000"][..],
        &["--abort-after", "100000", "--h2"],
    ] {
        shop.get("shop/client", "v1", "/stream/100000", flags)?;
        shop.mesh.eventually("no answer is being written", || {
            let seen = shop.seen("v1")?;
            ensure!(seen["live"] == 0, "{seen}");
            Ok(())
        });
    }
    Ok(())
}

/// The client dials the waypoint itself, with a certificate of the mesh: only what is bound to it is served.
#[test]
fn a_waypoint_serves_only_what_is_bound_to_it() -> Result<()> {
    let elsewhere = [
        "---\napiVersion: v1\nkind: Namespace\nmetadata: { name: elsewhere, labels: { istio.io/dataplane-mode: ambient } }\n".to_owned(),
        idle_pod("elsewhere", "v3", "node2"),
        "---\napiVersion: v1\nkind: Service\nmetadata: { name: v3, namespace: elsewhere }\nspec: { selector: { app: v3 }, ports: [{ port: 80 }] }\n".to_owned(),
    ];
    let shop = Shop::open(&elsewhere.concat())?;
    let waypoint = shop.mesh.pod_ip(&shop.waypoint("waypoint")?)?;
    let (bound, foreign) = (
        service_ip(&shop, "v1.shop")?,
        service_ip(&shop, "v3.elsewhere")?,
    );
    let server = shop.mesh.pod_ip("shop/v1")?;
    let ca = shop.mesh.authority()?;
    let address = format!("{waypoint}:15008");
    for (about, authority, served) in [
        ("a service that is bound", format!("{bound}:80"), true),
        ("a port that it has not", format!("{bound}:81"), false),
        (
            "a service that is not bound",
            format!("{foreign}:80"),
            false,
        ),
        ("a workload", format!("{server}:8080"), false),
        (
            "the waypoint's own admin port",
            format!("{waypoint}:15000"),
            false,
        ),
        ("its loopback", "127.0.0.1:15000".to_owned(), false),
        (
            "a link-local address",
            "169.254.169.254:80".to_owned(),
            false,
        ),
        (
            "a name",
            "v1.elsewhere.svc.cluster.local:80".to_owned(),
            false,
        ),
    ] {
        let line = [
            shop.hostile.as_str(),
            &address,
            "good",
            "--ca",
            &ca,
            "--authority",
            &authority,
        ];
        let found = shop.mesh.json("outside/stranger", &line)?;
        let status = found["outcome"] == "status 200";
        ensure!(status == served, "{about} ({authority}): {found}");
    }
    Ok(())
}

/// `address:port` of a service, as the client resolves it.
fn service_address(shop: &Shop, name: &str) -> Result<String> {
    Ok(format!("{}:80", service_ip(shop, &format!("{name}.shop"))?))
}

fn service_ip(shop: &Shop, name: &str) -> Result<String> {
    let text = shop
        .mesh
        .succeed("shop/client", &["getent", "ahostsv4", name])?;
    let word = text.split_whitespace().next().map(str::to_owned);
    word.with_context(|| format!("{name} has no address: {text}"))
}
