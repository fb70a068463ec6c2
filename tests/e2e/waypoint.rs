//! Waypoints in the folder: a namespace opts in, its requests are routed, denied, retried, and never pass the waypoint by.

use anyhow::{Context, Result, ensure};
use rig::{
    Mesh, Options,
    yaml::{idle_pod, pod},
};
use serde_json::Value;

/// A namespace with a client, an intruder, and two servers of HTTP, whose waypoint serves.
pub(crate) struct Shop {
    pub(crate) mesh: Mesh,
    pub(crate) web: String,
    pub(crate) hostile: String,
}

/// A waypoint of a namespace.
fn gateway(namespace: &str, name: &str) -> String {
    format!(
        "---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {{ name: {name}, namespace: {namespace}, labels: {{ istio.io/waypoint-for: service }} }}
spec:
  gatewayClassName: leyline-waypoint
  listeners: [{{ name: mesh, port: 15008, protocol: HBONE }}]
"
    )
}

/// A service on port 80 over the pods of its name, which listen on 8080; `label` is one of its labels.
fn service(name: &str, label: &str) -> String {
    format!(
        "---
apiVersion: v1
kind: Service
metadata: {{ name: {name}, namespace: shop, labels: {{ {label} }} }}
spec:
  selector: {{ app: {name} }}
  ports: [{{ name: http, port: 80, targetPort: 8080, appProtocol: http }}]
"
    )
}

impl Shop {
    /// The shop, with more YAML; all of its requests pass the waypoint.
    pub(crate) fn open(extra: &str) -> Result<Self> {
        Self::open_with(&Options::default(), extra)
    }

    /// The same, with other tunnels on some nodes.
    pub(crate) fn open_with(options: &Options, extra: &str) -> Result<Self> {
        let shop = Self::start(options)?;
        shop.mesh
            .write("waypoint.yaml", &gateway("shop", "waypoint"))?;
        shop.mesh.write("extra.yaml", extra)?;
        shop.mesh.label("shop", "istio.io/use-waypoint=waypoint")?;
        shop.mesh
            .eventually("requests pass the waypoint", || shop.passed_waypoint("v1"));
        Ok(shop)
    }

    fn start(options: &Options) -> Result<Self> {
        let mut mesh = Mesh::new()?;
        let web = mesh.install(env!("CARGO_BIN_EXE_web"))?;
        let hostile = mesh.install(env!("CARGO_BIN_EXE_hostile"))?;
        let serve = |name: &str| format!("[{web}, serve, '[::]:8080', {name}]");
        let objects = [
            "apiVersion: v1\nkind: Namespace\nmetadata: { name: shop, labels: { istio.io/dataplane-mode: ambient } }\n"
                .to_owned(),
            "---\napiVersion: v1\nkind: Namespace\nmetadata: { name: outside }\n".to_owned(),
            idle_pod("shop", "client", "node1"),
            idle_pod("shop", "intruder", "node1"),
            idle_pod("outside", "stranger", "node1"),
            pod("shop", "v1", "node2", &serve("v1")),
            pod("shop", "v2", "node2", &serve("v2")),
            service("v1", ""),
            service("v2", ""),
        ];
        mesh.write("objects.yaml", &objects.concat())?;
        mesh.up(options)?;
        let shop = Self { mesh, web, hostile };
        for name in ["client", "intruder", "v1", "v2"] {
            shop.mesh.eventually(&format!("{name} is in the mesh"), || {
                let found = shop.mesh.pod(&format!("shop/{name}"))?;
                ensure!(found["mesh"] == "yes", "{found}");
                Ok(())
            });
        }
        shop.mesh.eventually("the server answers", || {
            shop.get("shop/client", "v1", "/", &[])
        });
        Ok(shop)
    }

    /// What comes of requests from a pod to a service; an error where one has no whole answer.
    pub(crate) fn get(
        &self,
        from: &str,
        service: &str,
        path: &str,
        flags: &[&str],
    ) -> Result<Value> {
        let found = self.try_get(from, service, path, flags)?;
        ensure!(found["failed"] == 0, "{found}");
        Ok(found)
    }

    /// The same, where a request may have none.
    pub(crate) fn try_get(
        &self,
        from: &str,
        service: &str,
        path: &str,
        flags: &[&str],
    ) -> Result<Value> {
        let url = format!("http://{service}.shop{path}");
        let line = [&[self.web.as_str(), "get", &url], flags].concat();
        self.mesh.json(from, &line)
    }

    /// The status of one request of the client.
    pub(crate) fn status(
        &self,
        from: &str,
        service: &str,
        path: &str,
        flags: &[&str],
    ) -> Result<u64> {
        let found = self.get(from, service, path, flags)?;
        let status = &found["last"]["status"];
        status.as_u64().with_context(|| format!("{found}"))
    }

    /// Waits for a status of a request of the client.
    #[track_caller]
    pub(crate) fn answers(&self, service: &str, path: &str, flags: &[&str], status: u64) {
        self.mesh
            .eventually(&format!("{service}{path}: {status}"), || {
                let found = self.status("shop/client", service, path, flags)?;
                ensure!(found == status, "{found}");
                Ok(())
            });
    }

    /// An error unless a request to a service passes a waypoint, which gives it a number.
    pub(crate) fn passed_waypoint(&self, service: &str) -> Result<()> {
        let found = self.get("shop/client", service, "/", &[])?;
        let number = &found["last"]["body"]["headers"]["x-request-id"];
        ensure!(number.is_array(), "{found}");
        Ok(())
    }

    /// The pod of a waypoint, `namespace/name`.
    pub(crate) fn waypoint(&self, name: &str) -> Result<String> {
        let status = self.mesh.status()?;
        let pods = status["pods"].as_array().context("status has pods")?;
        let mut names = pods.iter().filter_map(|pod| pod["name"].as_str());
        let found = names.find(|it| it.starts_with(&format!("{name}-")));
        let found = found.with_context(|| format!("no waypoint {name} in {status}"))?;
        Ok(format!("shop/{found}"))
    }

    /// What the server of a service remembers, asked through the waypoint.
    pub(crate) fn seen(&self, service: &str) -> Result<Value> {
        let found = self.get("shop/client", service, "/seen", &[])?;
        Ok(found["last"]["body"].clone())
    }
}

const CANARY: &str = "---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: { name: canary, namespace: shop }
spec:
  parentRefs: [{ group: '', kind: Service, name: v1, port: 80 }]
  rules:
  - matches: [{ headers: [{ name: x-version, value: v2 }] }]
    backendRefs: [{ name: v2, port: 80 }]
  - matches: [{ path: { type: PathPrefix, value: /slow } }]
    timeouts: { request: 300ms }
    backendRefs: [{ name: v1, port: 80 }]
  - matches: [{ path: { type: PathPrefix, value: /fail } }]
    retry: { attempts: 2, codes: [503] }
    backendRefs: [{ name: v1, port: 80 }]
  - backendRefs: [{ name: v1, port: 80, weight: 90 }, { name: v2, port: 80, weight: 10 }]
";

#[test]
fn a_route_sends_by_header_and_weight_and_ends_what_takes_too_long() -> Result<()> {
    let shop = Shop::open("")?;
    shop.mesh.write("route.yaml", CANARY)?;
    shop.mesh.eventually("the header decides", || {
        let flags = ["--header", "x-version: v2", "--count", "20"];
        let found = shop.get("shop/client", "v1", "/", &flags)?;
        ensure!(found["names"]["v2"] == 20, "{found}");
        Ok(())
    });
    let found = shop.get("shop/client", "v1", "/", &["--count", "300"])?;
    // 30 are expected, with a standard deviation of 5.2.
    let of_second = found["names"]["v2"].as_u64().unwrap_or(0);
    ensure!(
        (4..=56).contains(&of_second),
        "{of_second} of 300 by weight"
    );
    ensure!(shop.status("shop/client", "v1", "/slow/20000", &[])? == 504);
    // Two tries fail, and the client sees neither.
    ensure!(shop.status("shop/client", "v1", "/fail/2/once", &[])? == 200);
    // HTTP/2 from the client reaches a server of HTTP/1.1 and back.
    let found = shop.get("shop/client", "v1", "/", &["--h2", "--count", "10"])?;
    ensure!(found["statuses"]["200"] == 10, "{found}");
    Ok(())
}

/// What it holds and no more, for as long as nothing is filled in; a limit that changes is a new one.
#[test]
fn a_route_lets_as_many_requests_pass_as_its_limit_says() -> Result<()> {
    let shop = Shop::open("")?;
    let limited = |tokens: u32| {
        format!(
            "apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata:
  name: v1
  namespace: shop
  annotations: {{ leyline.dev/local-rate-limit: '{{\"maxTokens\": {tokens}, \"fillInterval\": \"1h\"}}' }}
spec:
  parentRefs: [{{ group: '', kind: Service, name: v1 }}]
  rules: [{{ backendRefs: [{{ name: v1, port: 80 }}] }}]
"
        )
    };
    shop.mesh.write("route.yaml", &limited(3))?;
    shop.answers("v1", "/", &[], 429);
    shop.mesh.write("route.yaml", &limited(1000))?;
    shop.answers("v1", "/", &[], 200);
    let found = shop.get("shop/client", "v1", "/", &["--count", "100"])?;
    ensure!(found["statuses"]["200"] == 100, "{found}");
    ensure!(shop.status("shop/client", "v2", "/", &[])? == 200);
    Ok(())
}

#[test]
fn a_route_change_loses_no_request() -> Result<()> {
    let shop = Shop::open("")?;
    let line = [
        &shop.web,
        "get",
        "http://v1.shop/",
        "--until-input-ends",
        "--rate",
        "100",
        "--parallel",
        "4",
    ];
    let load = shop.mesh.spawn("shop/client", &line)?;
    for round in 0..30 {
        let to = ["v1", "v2"][round % 2];
        let route = format!(
            "---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {{ name: all, namespace: shop }}
spec:
  parentRefs: [{{ group: '', kind: Service, name: v1 }}]
  rules: [{{ backendRefs: [{{ name: {to}, port: 80 }}] }}]
"
        );
        shop.mesh.write("route.yaml", &route)?;
        shop.mesh.eventually(&format!("{to} is served"), || {
            let found = shop.get("shop/client", "v1", "/", &[])?;
            ensure!(found["names"][to] == 1, "{found}");
            Ok(())
        });
    }
    let found: Value = serde_json::from_str(load.finish()?.trim())?;
    let requests = found["requests"].as_u64().unwrap_or(0);
    ensure!(
        // How many there were depends on how fast the changes are.
        found["failed"] == 0 && found["statuses"]["200"] == requests && requests >= 10,
        "{found}"
    );
    Ok(())
}

const NO_ADMIN: &str = "---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: { name: no-admin, namespace: shop }
spec:
  targetRefs: [{ group: '', kind: Service, name: v1 }]
  action: DENY
  rules:
  - from: [{ source: { principals: ['*/sa/intruder'] } }]
    to: [{ operation: { paths: ['/admin*'], methods: [GET] } }]
";

#[test]
fn a_denied_request_is_answered_403_however_its_path_is_written() -> Result<()> {
    let shop = Shop::open(NO_ADMIN)?;
    shop.mesh.eventually("the request is denied", || {
        ensure!(shop.status("shop/intruder", "v1", "/admin/keys", &[])? == 403);
        Ok(())
    });
    for (from, path, method, status) in [
        ("intruder", "/x/../admin/keys", "GET", 403),
        ("intruder", "/%61dmin/keys", "GET", 403),
        ("intruder", "/admin/../", "GET", 200),
        ("intruder", "/", "GET", 200),
        ("intruder", "/admin/keys", "POST", 200),
        ("client", "/admin/keys", "GET", 200),
    ] {
        let found = shop.status(&format!("shop/{from}"), "v1", path, &["--method", method])?;
        ensure!(found == status, "{from} {method} {path}: {found}");
    }
    Ok(())
}

#[test]
fn without_its_waypoint_no_request_passes_and_with_it_all_do_again() -> Result<()> {
    let shop = Shop::open("")?;
    let closed = || {
        let found = shop.get("shop/client", "v1", "/", &[]);
        ensure!(found.is_err(), "{found:?}");
        Ok(())
    };
    let bind = |to: &str| {
        shop.mesh
            .label("shop", &format!("istio.io/use-waypoint={to}"))
    };
    bind("nowhere")?;
    shop.mesh
        .eventually("a waypoint that is not there closes the way", closed);
    bind("waypoint")?;
    shop.answers("v1", "/", &[], 200);
    shop.mesh.remove("waypoint.yaml")?;
    shop.mesh
        .eventually("a waypoint that is deleted closes the way", closed);
    for _ in 0..3 {
        closed()?;
    }
    shop.mesh
        .write("waypoint.yaml", &gateway("shop", "waypoint"))?;
    shop.answers("v1", "/", &[], 200);
    Ok(())
}

#[test]
fn a_web_socket_passes_and_so_do_bodies_of_any_size() -> Result<()> {
    let shop = Shop::open("")?;
    let found = shop
        .mesh
        .json("shop/client", &[&shop.web, "upgrade", "v1.shop:80"])?;
    ensure!(found["echoed"] == "hello", "{found}");
    let body = ["--method", "POST", "--body", "30000000"];
    let found = shop.get("shop/client", "v1", "/", &body)?;
    ensure!(found["last"]["body"]["bytes"] == 30_000_000, "{found}");
    let found = shop.get("shop/client", "v1", "/stream/500", &[])?;
    ensure!(found["last"]["bytes"] == 500 << 16, "{found}");
    Ok(())
}
