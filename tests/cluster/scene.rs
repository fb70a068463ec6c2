//! What most tests start from: a namespace of their own with a client, an intruder and a server on two nodes.

use anyhow::{Context, Result};
use rig::cluster::bed::Bed;
use serde_json::Value;

/// The annotation that tells whether a pod is in the mesh (Istio's).
const REDIRECTION: &str = "ambient.istio.io/redirection";

/// Whether a namespace starts in the mesh.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Start {
    InMesh,
    Outside,
}

/// A namespace and its pods; it goes when the value goes.
pub(crate) struct Scene<'a> {
    pub(crate) bed: &'a Bed,
    pub(crate) namespace: String,
}

impl<'a> Scene<'a> {
    /// The namespace `name` with pods `client` and `intruder` on the first node, `server` (port 8080, Service port 80) on the
    /// second, each with an account of its own. All are ready, and in the mesh where it starts there.
    pub(crate) fn start(bed: &'a Bed, name: &str, start: Start) -> Result<Self> {
        let scene = Self::empty(bed, name, start)?;
        let client = pod("client", bed.node(0), "[leyline, tool, echo, '9000']", "");
        let intruder = pod("intruder", bed.node(0), "[leyline, tool, echo, '9000']", "");
        let server = pod(
            "server",
            bed.node(1),
            "[load, serve, '[::]:8080']",
            "readinessProbe: {tcpSocket: {port: 8080}, periodSeconds: 1}",
        );
        scene.apply(&[client, intruder, server, service("server", 80, 8080)].concat())?;
        scene.ready(&["client", "intruder", "server"])?;
        if start == Start::InMesh {
            scene.joined(&["client", "intruder", "server"])?;
        }
        Ok(scene)
    }

    /// A namespace with accounts but no pods.
    pub(crate) fn empty(bed: &'a Bed, name: &str, start: Start) -> Result<Self> {
        let label = match start {
            Start::InMesh => "{istio.io/dataplane-mode: ambient}",
            Start::Outside => "{}",
        };
        // A run that was killed may have left it.
        bed.kube()
            .run(&["delete", "namespace", name, "--ignore-not-found"])?;
        let mut yaml = format!(
            "{{apiVersion: v1, kind: Namespace, metadata: {{name: {name}, labels: {label}}}}}\n"
        );
        for account in ["client", "intruder", "server"] {
            yaml.push_str(&format!(
                "---\n{{apiVersion: v1, kind: ServiceAccount, metadata: {{name: {account}, namespace: {name}}}}}\n"
            ));
        }
        bed.kube().apply(&yaml)?;
        Ok(Self {
            bed,
            namespace: name.to_owned(),
        })
    }

    /// Applies objects, those without a namespace in this one.
    pub(crate) fn apply(&self, yaml: &str) -> Result<()> {
        self.bed.kube().apply_in(&self.namespace, yaml)
    }

    /// `namespace/pod`.
    pub(crate) fn pod(&self, name: &str) -> String {
        format!("{}/{name}", self.namespace)
    }

    /// The server's Service, by its full name.
    pub(crate) fn service(&self) -> String {
        format!("server.{}.svc.cluster.local:80", self.namespace)
    }

    /// `address:port` of a pod.
    pub(crate) fn at(&self, pod: &str, port: u16) -> Result<String> {
        let ip = self.bed.pod_ip(&self.pod(pod))?;
        Ok(match ip.contains(':') {
            true => format!("[{ip}]:{port}"),
            false => format!("{ip}:{port}"),
        })
    }

    /// The SPIFFE ID of an account here.
    pub(crate) fn identity(&self, account: &str) -> String {
        format!("spiffe://cluster.local/ns/{}/sa/{account}", self.namespace)
    }

    /// Waits until pods are ready.
    pub(crate) fn ready(&self, pods: &[&str]) -> Result<()> {
        for pod in pods {
            self.bed
                .kube()
                .wait(
                    &self.namespace,
                    &format!("pod/{pod}"),
                    "condition=Ready",
                    120,
                )
                .with_context(|| self.bed.evidence())?;
        }
        Ok(())
    }

    /// Waits until pods are in the mesh.
    pub(crate) fn joined(&self, pods: &[&str]) -> Result<()> {
        let condition = r"jsonpath={.metadata.annotations.ambient\.istio\.io/redirection}=enabled";
        for pod in pods {
            self.bed
                .kube()
                .wait(&self.namespace, &format!("pod/{pod}"), condition, 30)
                .with_context(|| format!("{pod} does not join\n{}", self.bed.evidence()))?;
        }
        Ok(())
    }

    /// Waits until a Gateway is deployed and serves.
    pub(crate) fn programmed(&self, gateway: &str) -> Result<()> {
        let (gateway, condition) = (format!("gateway/{gateway}"), "condition=Programmed");
        self.bed
            .kube()
            .wait(&self.namespace, &gateway, condition, 120)
            .with_context(|| self.bed.evidence())
    }

    /// Waits until pods are no longer in the mesh.
    #[track_caller]
    pub(crate) fn left(&self, pods: &[&str]) {
        for pod in pods {
            self.bed.eventually(&format!("{pod} leaves"), || {
                let found = self.object("pod", pod)?;
                let annotation = &found["metadata"]["annotations"][REDIRECTION];
                anyhow::ensure!(annotation != "enabled", "it is in the mesh");
                Ok(())
            });
        }
    }

    /// An object of this namespace.
    pub(crate) fn object(&self, kind: &str, name: &str) -> Result<Value> {
        self.bed.kube().json(&["-n", &self.namespace, kind, name])
    }

    /// Puts the namespace into the mesh, or takes it out.
    pub(crate) fn label(&self, start: Start) -> Result<()> {
        let label = match start {
            Start::InMesh => "istio.io/dataplane-mode=ambient",
            Start::Outside => "istio.io/dataplane-mode-",
        };
        self.bed
            .kube()
            .run(&["label", "--overwrite", "namespace", &self.namespace, label])
            .map(drop)
    }

    /// The line of a node's access log that holds all of `parts`, once it is there.
    #[track_caller]
    pub(crate) fn access_line(&self, node: &str, parts: &[&str]) -> String {
        self.bed.eventually(&format!("{node} logs {parts:?}"), || {
            let log = self.bed.ztunnel_log(node)?;
            let fits = |line: &&str| parts.iter().all(|part| line.contains(part));
            log.lines()
                .rev()
                .find(fits)
                .map(str::to_owned)
                .context("no such line")
        })
    }
}

impl Drop for Scene<'_> {
    fn drop(&mut self) {
        let name = self.namespace.as_str();
        let arguments = ["delete", "namespace", name, "--wait=false"];
        if let Err(error) = self.bed.kube().run(&arguments) {
            eprintln!("delete {name}: {error:#}");
        }
    }
}

/// A pod of the tests' image with the account of its name (up to the first dash); `more` is YAML of the container.
pub(crate) fn pod(name: &str, node: &str, command: &str, more: &str) -> String {
    let account = name.split('-').next().unwrap_or(name);
    format!(
        "---
apiVersion: v1
kind: Pod
metadata: {{name: {name}, labels: {{app: {name}}}}}
spec:
  serviceAccountName: {account}
  nodeSelector: {{kubernetes.io/hostname: {node}}}
  terminationGracePeriodSeconds: 0
  containers:
  - name: main
    image: leyline.dev/tests:dev
    command: {command}
    {more}
"
    )
}

/// Two pods that are not taken into the mesh: `client-apart` on the node `apart`, by its label, and `client-host` on the
/// host network of the node `host`, where it listens on `port`.
pub(crate) fn strangers(apart: &str, host: &str, port: u16) -> String {
    let echo = |port: u16| format!("[leyline, tool, echo, '{port}']");
    let apart = pod("client-apart", apart, &echo(9000), "")
        .replace("labels: {", "labels: {istio.io/dataplane-mode: none, ");
    let host = pod("client-host", host, &echo(port), "")
        .replace("spec:\n", "spec:\n  hostNetwork: true\n");
    apart + &host
}

/// A Service over the pods with the label `app: NAME`.
pub(crate) fn service(name: &str, port: u16, target: u16) -> String {
    format!(
        "---
apiVersion: v1
kind: Service
metadata: {{name: {name}}}
spec:
  ipFamilyPolicy: PreferDualStack
  selector: {{app: {name}}}
  ports: [{{port: {port}, targetPort: {target}}}]
"
    )
}

/// A Job of one pod, whose init container runs the same command before; the account is the name's up to the first dash.
pub(crate) fn job(name: &str, node: &str, command: &str) -> String {
    let account = name.split('-').next().unwrap_or(name);
    let container = format!("image: leyline.dev/tests:dev, command: {command}");
    format!(
        "---
apiVersion: batch/v1
kind: Job
metadata: {{name: {name}}}
spec:
  backoffLimit: 0
  template:
    metadata: {{labels: {{app: {account}-job}}}}
    spec:
      serviceAccountName: {account}
      nodeSelector: {{kubernetes.io/hostname: {node}}}
      restartPolicy: Never
      initContainers: [{{name: first, {container}}}]
      containers: [{{name: main, {container}}}]
"
    )
}
