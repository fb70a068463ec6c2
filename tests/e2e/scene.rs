//! What the suites start from: a client, a server and an intruder, on two nodes.

use anyhow::{Context, Result, ensure};
use rig::{
    Mesh, Options, Running,
    yaml::{idle_pod, pod, service},
};
use serde_json::Value;

/// The identities, as they stand in logs.
pub(crate) const CLIENT: &str = "spiffe://cluster.local/ns/shop/sa/client";
pub(crate) const SERVER: &str = "spiffe://cluster.local/ns/shop/sa/server";
pub(crate) const INTRUDER: &str = "spiffe://cluster.local/ns/shop/sa/intruder";

/// The server's service, which listens on 9000 and whose pod listens on 9001.
pub(crate) const SERVICE: &str = "server.shop.svc.cluster.local:9000";

/// A policy that keeps one identity out of the whole namespace.
pub(crate) const DENY_INTRUDER: &str = "
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: { name: no-intruder, namespace: shop }
spec:
  action: DENY
  rules: [{ from: [{ source: { principals: ['*/sa/intruder'] } }] }]
";

/// A running mesh, and the programs its pods use.
pub(crate) struct Scene {
    pub(crate) mesh: Mesh,
    pub(crate) load: String,
    pub(crate) hostile: String,
}

/// A connection that is held.
pub(crate) struct Held(Running);

impl Held {
    /// Waits until it has been cut.
    #[track_caller]
    pub(crate) fn cut(mut self, scene: &Scene) {
        let cut = || {
            ensure!(!self.0.is_running()?, "the connection lives on");
            Ok(())
        };
        scene.mesh.eventually("the connection is cut", cut);
    }

    /// Ends it; an error if it has been cut before.
    pub(crate) fn let_go(self) -> Result<()> {
        let told: Value = serde_json::from_str(&self.0.finish()?)?;
        ensure!(told["cut"] == 0, "{told}");
        Ok(())
    }
}

/// Whether the namespace `shop` starts in the mesh.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Shop {
    InMesh,
    Outside,
}

impl Scene {
    /// The usual scene; `extra` is more YAML.
    pub(crate) fn start(shop: Shop, extra: &str) -> Result<Self> {
        Self::start_with(shop, extra, &Options::default())
    }

    pub(crate) fn start_with(shop: Shop, extra: &str, options: &Options) -> Result<Self> {
        let mut mesh = Mesh::new()?;
        let load = mesh.install(env!("CARGO_BIN_EXE_load"))?;
        let hostile = mesh.install(env!("CARGO_BIN_EXE_hostile"))?;
        mesh.write("objects.yaml", &objects(&load, shop))?;
        mesh.write("extra.yaml", extra)?;
        mesh.up(options)?;
        let scene = Self {
            mesh,
            load,
            hostile,
        };
        if shop == Shop::InMesh {
            scene.joined(&["shop/client", "shop/server", "shop/intruder"]);
        }
        Ok(scene)
    }

    /// Waits until the pods are in the mesh and the tunnels know it.
    #[track_caller]
    pub(crate) fn joined(&self, pods: &[&str]) {
        for pod in pods {
            self.mesh.eventually(&format!("{pod} is in the mesh"), || {
                self.enrolment(pod, "yes")
            });
        }
        self.mesh
            .eventually("the client reaches the server by HBONE", || {
                self.ping("shop/client", SERVICE)?;
                let log = self.mesh.logs("ztunnel-node2")?;
                rig::holds(&log, CLIENT)
            });
    }

    /// An error unless the pod's enrolment is the one named (`yes`, `pending`, `no`).
    pub(crate) fn enrolment(&self, pod: &str, wanted: &str) -> Result<()> {
        let found = self.mesh.pod(pod)?;
        ensure!(found["mesh"] == wanted, "{pod}: {found}");
        Ok(())
    }

    /// A few exchanges over one connection; an error when it is refused or cut.
    pub(crate) fn ping(&self, pod: &str, address: &str) -> Result<Value> {
        self.mesh
            .json(pod, &[&self.load, "ping", address, "--count", "3"])
    }

    /// One connection to the server, open, that exchanges bytes ten times a second until it is [let go](Held::let_go).
    pub(crate) fn hold(&self, pod: &str) -> Result<Held> {
        let line = [&self.load, "live", SERVICE, "--connections", "1"];
        let mut running = self.mesh.spawn(pod, &line)?;
        running.json()?;
        Ok(Held(running))
    }

    /// An error if the pod reaches the address.
    pub(crate) fn refused(&self, pod: &str, address: &str) -> Result<()> {
        let output = self
            .mesh
            .exec(pod, &[&self.load, "ping", address, "--count", "1"])?;
        ensure!(!output.status.success(), "{pod} reached {address}");
        Ok(())
    }

    /// The line of a node's access log that holds all of `parts`, once it is there.
    #[track_caller]
    pub(crate) fn access_line(&self, node: &str, parts: &[&str]) -> String {
        self.mesh.eventually(&format!("{node} logs {parts:?}"), || {
            let log = self.mesh.logs(&format!("ztunnel-{node}"))?;
            let fits = |line: &&str| parts.iter().all(|part| line.contains(part));
            log.lines()
                .rev()
                .find(fits)
                .map(str::to_owned)
                .context("no such line")
        })
    }

    /// Waits until the identity has a connection open at the server's node.
    #[track_caller]
    pub(crate) fn access_open(&self, identity: &str) -> Result<()> {
        self.mesh.eventually("the connection is open", || {
            let series = self.mesh.metrics("node2")?;
            let opened = |line: &&str| {
                line.starts_with("istio_tcp_connections_opened_total{")
                    && line.contains(&format!("\"{identity}\""))
            };
            series.lines().find(opened).map(drop).context("none yet")
        });
        Ok(())
    }

    /// `address:port` of a pod.
    pub(crate) fn at(&self, pod: &str, port: u16) -> Result<String> {
        Ok(std::net::SocketAddr::new(self.mesh.pod_ip(pod)?, port).to_string())
    }
}

fn objects(load: &str, shop: Shop) -> String {
    let label = match shop {
        Shop::InMesh => "{ istio.io/dataplane-mode: ambient }",
        Shop::Outside => "{}",
    };
    let serve = format!("[{load}, serve, '[::]:9001']");
    [
        format!("apiVersion: v1\nkind: Namespace\nmetadata: {{ name: shop, labels: {label} }}\n"),
        "---\napiVersion: v1\nkind: Namespace\nmetadata: { name: outside }\n".to_owned(),
        idle_pod("shop", "client", "node1"),
        idle_pod("shop", "intruder", "node1"),
        pod("shop", "server", "node2", &serve),
        idle_pod("outside", "stranger", "node1"),
        pod("outside", "plain", "node2", &serve),
        service("shop", "server"),
        service("outside", "plain"),
    ]
    .concat()
}
