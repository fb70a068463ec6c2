//! `leyline waypoint`: the Gateway objects that ask for waypoints, and the namespaces that use them.

mod list;

use std::{collections::BTreeMap, process::ExitCode, time::Duration};

use anyhow::{Context, Result, anyhow, bail};
use clap::{Args, Subcommand, ValueEnum};
use controlplane::gateway::names::REVISION;
use k8s_openapi::api::core::v1::Namespace;
use kube::{
    Api,
    api::{
        ApiResource, DeleteParams, DynamicObject, GroupVersionKind, ListParams, Patch, PatchParams,
    },
};
use serde_json::{Value, json};
use tokio::time::{Instant, sleep};

use super::{
    access::Access,
    cluster::Cluster,
    duration,
    output::{self, Form},
};

/// The class that Istio's control plane serves, and the one that only ours does.
const CLASSES: [&str; 2] = ["istio-waypoint", "leyline-waypoint"];
const FOR: &str = "istio.io/waypoint-for";
const USE: &str = "istio.io/use-waypoint";
/// istioctl's, so that a waypoint that it made is ours to change, and the reverse.
const FIELD_MANAGER: &str = "istioctl";

/// Waypoints: L7 proxies for a namespace, a service or a workload
#[derive(Debug, Args)]
pub(crate) struct Waypoint {
    #[command(subcommand)]
    what: What,
    #[command(flatten)]
    access: Access,
    /// Name of the waypoint
    #[arg(long, global = true, default_value = "waypoint")]
    name: String,
    /// Revision of the control plane that serves it
    #[arg(long, short, global = true)]
    revision: Option<String>,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Ask for a waypoint, or change one
    Apply {
        #[command(flatten)]
        shape: Shape,
        /// Let the namespace use the waypoint, once it can take traffic
        #[arg(long)]
        enroll_namespace: bool,
        /// Replace the waypoint that the namespace uses now
        #[arg(long, requires = "enroll_namespace")]
        overwrite: bool,
        /// Wait until the waypoint can take traffic
        #[arg(long, short)]
        wait: bool,
        /// How long to wait for it
        #[arg(long, default_value = "90s", value_parser = duration::parse)]
        waypoint_timeout: Duration,
        /// Take over fields that another program has set
        #[arg(long)]
        force: bool,
    },
    /// Print the object that apply would send
    Generate {
        #[command(flatten)]
        shape: Shape,
    },
    /// Show the waypoints of a namespace, or of all
    List {
        /// Of every namespace
        #[arg(long, short = 'A')]
        all_namespaces: bool,
        /// Form of the output
        #[arg(long, short, value_enum, default_value_t)]
        output: Form,
    },
    /// Show what became of the waypoints, or of those named
    Status {
        /// Of every namespace
        #[arg(long, short = 'A')]
        all_namespaces: bool,
        /// Only these
        names: Vec<String>,
        /// Wait until they can take traffic
        #[arg(long, short)]
        wait: bool,
        /// How long to wait for it
        #[arg(long, default_value = "90s", value_parser = duration::parse)]
        waypoint_timeout: Duration,
        /// Form of the output
        #[arg(long, short, value_enum, default_value_t)]
        output: Form,
    },
    /// Remove waypoints
    Delete {
        /// Which; the one called `waypoint` when not given
        names: Vec<String>,
        /// Every waypoint of the namespace (with --revision: of that revision)
        #[arg(long, conflicts_with = "names")]
        all: bool,
    },
}

/// What the waypoint is to be.
#[derive(Debug, Args)]
struct Shape {
    /// Which traffic it takes
    #[arg(long = "for", value_enum)]
    traffic: Option<Traffic>,
    /// GatewayClass [default: istio-waypoint where the cluster has it, else leyline-waypoint]
    #[arg(long)]
    class: Option<String>,
}

/// `istio.io/waypoint-for`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Traffic {
    /// Addressed to services (the default)
    Service,
    /// Addressed to pods
    Workload,
    /// Both
    All,
    /// Nothing, for a test
    None,
}

impl Traffic {
    fn text(self) -> &'static str {
        match self {
            Self::Service => "service",
            Self::Workload => "workload",
            Self::All => "all",
            Self::None => "none",
        }
    }
}

/// Runs the command.
pub(crate) async fn run(command: Waypoint, before: &Access) -> Result<ExitCode> {
    let access = command.access.clone().or(before);
    let name = wanted_name(&command.name)?.to_owned();
    let revision = command.revision.clone().filter(|it| !it.is_empty());
    match command.what {
        What::Generate { shape } => {
            let namespace = access.namespace.as_deref();
            let class = shape.class.as_deref().unwrap_or(CLASSES[0]);
            let gateway = gateway(&name, namespace, class, shape.traffic, revision.as_deref());
            output::print(&output::yaml(&gateway)?)?;
            Ok(ExitCode::SUCCESS)
        }
        What::Apply {
            shape,
            enroll_namespace,
            overwrite,
            wait,
            waypoint_timeout,
            force,
        } => {
            let apply = Apply {
                cluster: Cluster::connect(&access).await?,
                name,
                revision,
                shape,
                enroll: enroll_namespace,
                overwrite,
                wait: wait.then_some(waypoint_timeout),
                limit: waypoint_timeout,
                force,
            };
            apply.run().await
        }
        What::List {
            all_namespaces,
            output,
        } => list::list(&Cluster::connect(&access).await?, all_namespaces, output).await,
        What::Status {
            all_namespaces,
            names,
            wait,
            waypoint_timeout,
            output,
        } => {
            let cluster = Cluster::connect(&access).await?;
            let scope = list::Scope {
                all_namespaces,
                names,
                wait: wait.then_some(waypoint_timeout),
            };
            list::status(&cluster, &scope, output).await
        }
        What::Delete { names, all } => {
            let cluster = Cluster::connect(&access).await?;
            delete(&cluster, names, all, &name, revision.as_deref()).await
        }
    }
}

fn wanted_name(name: &str) -> Result<&str> {
    match name {
        "" => Ok("waypoint"),
        "none" => bail!(
            "a waypoint cannot be called none: istio.io/use-waypoint=none is how an object says that it uses no waypoint\n  \
             remedy: choose another --name"
        ),
        name => Ok(name),
    }
}

/// The Gateway object of a waypoint.
fn gateway(
    name: &str,
    namespace: Option<&str>,
    class: &str,
    traffic: Option<Traffic>,
    revision: Option<&str>,
) -> Value {
    let mut labels = BTreeMap::new();
    if let Some(traffic) = traffic {
        labels.insert(FOR, traffic.text());
    }
    if let Some(revision) = revision {
        labels.insert(REVISION, revision);
    }
    let mut metadata = json!({ "name": name });
    if let Some(namespace) = namespace {
        metadata["namespace"] = json!(namespace);
    }
    if !labels.is_empty() {
        metadata["labels"] = json!(labels);
    }
    json!({
        "apiVersion": "gateway.networking.k8s.io/v1",
        "kind": "Gateway",
        "metadata": metadata,
        "spec": {
            "gatewayClassName": class,
            "listeners": [{"name": "mesh", "port": 15008, "protocol": "HBONE"}]
        }
    })
}

fn resource(kind: &str) -> ApiResource {
    ApiResource::from_gvk(&GroupVersionKind::gvk(
        "gateway.networking.k8s.io",
        "v1",
        kind,
    ))
}

fn gateways(cluster: &Cluster, namespace: &str) -> Api<DynamicObject> {
    Api::namespaced_with(cluster.client(), namespace, &resource("Gateway"))
}

/// What is missing when the API server knows no Gateways.
fn without_api(error: anyhow::Error) -> anyhow::Error {
    let told = format!("{error:#}");
    if told.contains("could not find the requested resource") || told.contains("404 page not found")
    {
        return anyhow!(
            "this cluster does not have the Gateway API (gateway.networking.k8s.io/v1)\n  remedy: leyline install brings it; \
             or install the Gateway API's CRDs"
        );
    }
    error
}

fn is_programmed(gateway: &DynamicObject) -> bool {
    condition(gateway, "Programmed").is_some_and(|it| it["status"] == "True")
}

fn condition<'a>(gateway: &'a DynamicObject, kind: &str) -> Option<&'a Value> {
    let conditions = gateway.data["status"]["conditions"].as_array()?;
    conditions.iter().find(|it| it["type"] == kind)
}

struct Apply {
    cluster: Cluster,
    name: String,
    revision: Option<String>,
    shape: Shape,
    enroll: bool,
    overwrite: bool,
    /// Wait for it, even where nothing depends on it.
    wait: Option<Duration>,
    /// How long, where the namespace is to use it.
    limit: Duration,
    force: bool,
}

impl Apply {
    async fn run(self) -> Result<ExitCode> {
        let namespace = self.cluster.namespace.clone();
        let found = self.namespace(&namespace).await?;
        let labels = found.metadata.labels.unwrap_or_default();
        if self.enroll {
            self.check_enrolment(&namespace, &labels)?;
        }
        let class = self.class().await?;
        let (traffic, revision) = (self.shape.traffic, self.revision.as_deref());
        let wanted = gateway(&self.name, Some(&namespace), &class, traffic, revision);
        self.send(&namespace, &wanted).await?;
        println!("waypoint {namespace}/{} applied", self.name);
        if labels.get("istio.io/dataplane-mode").map(String::as_str) != Some("ambient") {
            eprintln!(
                "warning: namespace {namespace} is not in the mesh, so its pods do not use the waypoint\n  remedy: kubectl \
                 label namespace {namespace} istio.io/dataplane-mode=ambient"
            );
        }
        if let Some(limit) = self.wait.or(self.enroll.then_some(self.limit)) {
            self.until_programmed(&namespace, limit).await?;
            println!("waypoint {namespace}/{} is ready", self.name);
        }
        if self.enroll {
            self.enroll(&namespace).await?;
            println!(
                "namespace {namespace} labelled with \"{USE}: {}\"",
                self.name
            );
        }
        Ok(ExitCode::SUCCESS)
    }

    async fn namespace(&self, name: &str) -> Result<Namespace> {
        let api: Api<Namespace> = self.cluster.all();
        let read = self
            .cluster
            .ask(format!("read namespace {name}"), api.get_opt(name));
        read.await?.with_context(|| {
            format!("there is no namespace {name}\n  remedy: kubectl create namespace {name}, or choose another with -n")
        })
    }

    fn check_enrolment(&self, namespace: &str, labels: &BTreeMap<String, String>) -> Result<()> {
        match labels.get(USE) {
            Some(used) if *used != self.name && !self.overwrite => bail!(
                "namespace {namespace} uses another waypoint already ({USE}: {used}); nothing was applied\n  remedy: \
                 --overwrite to replace it"
            ),
            _ => Ok(()),
        }
    }

    async fn class(&self) -> Result<String> {
        if let Some(class) = &self.shape.class {
            return Ok(class.clone());
        }
        let api: Api<DynamicObject> =
            Api::all_with(self.cluster.client(), &resource("GatewayClass"));
        for class in CLASSES {
            let read = self
                .cluster
                .ask("read the GatewayClasses", api.get_opt(class));
            if read.await?.is_some() {
                return Ok(class.to_owned());
            }
        }
        eprintln!(
            "warning: this cluster has no GatewayClass {}: nothing serves waypoints here",
            CLASSES.join(" or ")
        );
        Ok(CLASSES[0].to_owned())
    }

    async fn send(&self, namespace: &str, gateway: &Value) -> Result<()> {
        let mut params = PatchParams::apply(FIELD_MANAGER);
        params.force = self.force;
        let api = gateways(&self.cluster, namespace);
        let patch = Patch::Apply(gateway);
        let sent = api.patch(&self.name, &params, &patch);
        let sent = self
            .cluster
            .ask(format!("apply waypoint {namespace}/{}", self.name), sent);
        match sent.await.map_err(without_api) {
            Ok(_) => Ok(()),
            Err(error) if format!("{error:#}").contains("conflict") => Err(anyhow!(
                "{error:#}\n  remedy: --force takes over the fields that another program has set"
            )),
            Err(error) => Err(error),
        }
    }

    async fn until_programmed(&self, namespace: &str, limit: Duration) -> Result<()> {
        let enroll = match self.enroll {
            true => "; the namespace was not labelled, since its traffic would be refused",
            false => "",
        };
        until_programmed(&self.cluster, namespace, &self.name, limit)
            .await
            .with_context(|| format!("waypoint {namespace}/{} is not ready{enroll}", self.name))
    }

    async fn enroll(&self, namespace: &str) -> Result<()> {
        let api: Api<Namespace> = self.cluster.all();
        let patch = json!({"metadata": {"labels": {USE: self.name}}});
        let patch = Patch::Merge(&patch);
        let params = PatchParams::default();
        let sent = api.patch(namespace, &params, &patch);
        self.cluster
            .ask(format!("label namespace {namespace}"), sent)
            .await?;
        Ok(())
    }
}

/// Waits until a waypoint says that it takes traffic.
async fn until_programmed(
    cluster: &Cluster,
    namespace: &str,
    name: &str,
    limit: Duration,
) -> Result<()> {
    let deadline = Instant::now() + limit;
    let api = gateways(cluster, namespace);
    loop {
        let read = cluster.ask(
            format!("read waypoint {namespace}/{name}"),
            api.get_opt(name),
        );
        let found = read
            .await?
            .with_context(|| format!("there is no waypoint {namespace}/{name}"))?;
        if is_programmed(&found) {
            return Ok(());
        }
        if Instant::now() >= deadline {
            let said = condition(&found, "Programmed").or(condition(&found, "Accepted"));
            let said = said.map(|it| {
                let text = |key: &str| it[key].as_str().unwrap_or_default().to_owned();
                format!("{}: {}", text("reason"), text("message"))
            });
            bail!(
                "waited {} s; {}",
                limit.as_secs(),
                said.unwrap_or_else(|| "no control plane has said anything of it".to_owned())
            );
        }
        sleep(Duration::from_millis(250)).await;
    }
}

/// The waypoints among Gateways.
async fn waypoints(cluster: &Cluster, namespace: Option<&str>) -> Result<Vec<DynamicObject>> {
    let api = match namespace {
        Some(namespace) => gateways(cluster, namespace),
        None => Api::all_with(cluster.client(), &resource("Gateway")),
    };
    let params = ListParams::default();
    let listed = cluster.ask("list Gateways", api.list(&params)).await;
    let mut found = listed.map_err(without_api)?.items;
    found.retain(is_waypoint);
    found.sort_by_key(|it| (it.metadata.namespace.clone(), it.metadata.name.clone()));
    Ok(found)
}

fn is_waypoint(gateway: &DynamicObject) -> bool {
    let class = gateway.data["spec"]["gatewayClassName"].as_str();
    class.is_some_and(|it| CLASSES.contains(&it))
}

async fn delete(
    cluster: &Cluster,
    mut names: Vec<String>,
    all: bool,
    default: &str,
    revision: Option<&str>,
) -> Result<ExitCode> {
    let namespace = &cluster.namespace;
    let found = waypoints(cluster, Some(namespace)).await?;
    let of_revision = |it: &&DynamicObject| {
        let labels = it.metadata.labels.as_ref();
        let of = labels
            .and_then(|it| it.get(REVISION))
            .map_or("default", String::as_str);
        revision.is_none_or(|wanted| of == wanted)
    };
    if all || (names.is_empty() && revision.is_some()) {
        let chosen = found.iter().filter(of_revision);
        names = chosen.filter_map(|it| it.metadata.name.clone()).collect();
        if names.is_empty() {
            println!("namespace {namespace} has no waypoint");
            return Ok(ExitCode::SUCCESS);
        }
    } else if names.is_empty() {
        names.push(default.to_owned());
    }
    let missing = |name: &&String| {
        !found
            .iter()
            .any(|it| it.metadata.name.as_ref() == Some(*name))
    };
    if let Some(name) = names.iter().find(missing) {
        bail!("namespace {namespace} has no waypoint {name}\n  remedy: leyline waypoint list -A");
    }
    let api = gateways(cluster, namespace);
    for name in &names {
        let params = DeleteParams::default();
        let deleted = api.delete(name, &params);
        cluster
            .ask(format!("delete waypoint {namespace}/{name}"), deleted)
            .await?;
        println!("waypoint {namespace}/{name} deleted");
    }
    let users = list::users(cluster).await?;
    for name in &names {
        let user = (namespace.clone(), name.clone());
        if let Some(count) = users.get(&user).copied() {
            println!("{}", still_used(namespace, name, count));
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// What becomes of those that name a waypoint that is no more (design 8.2).
fn still_used(namespace: &str, name: &str, count: usize) -> String {
    format!(
        "services that name it by the label {USE}, on them or on their namespace: {count}. What goes to them is refused until a \
         waypoint {name} serves again or the label is gone\n  next: kubectl label namespace {namespace} {USE}-"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_names_a_deleted_waypoint_is_told_what_becomes_of_its_traffic() {
        assert_eq!(
            still_used("shop", "waypoint", 2),
            "\
services that name it by the label istio.io/use-waypoint, on them or on their namespace: 2. What goes to them is refused until a waypoint waypoint serves again or the label is gone
  next: kubectl label namespace shop istio.io/use-waypoint-"
        );
    }

    #[test]
    fn the_object_is_istioctls() {
        let plain = gateway("waypoint", Some("shop"), "istio-waypoint", None, None);
        assert_eq!(
            output::yaml(&plain).unwrap(),
            "\
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata:
  name: waypoint
  namespace: shop
spec:
  gatewayClassName: istio-waypoint
  listeners:
    - name: mesh
      port: 15008
      protocol: HBONE
"
        );
        let labelled = gateway(
            "w",
            None,
            "leyline-waypoint",
            Some(Traffic::All),
            Some("canary"),
        );
        assert_eq!(
            labelled["metadata"],
            json!({"name": "w", "labels": {FOR: "all", REVISION: "canary"}})
        );
    }

    #[test]
    fn a_name_that_means_no_waypoint_is_refused() {
        assert_eq!(wanted_name("").unwrap(), "waypoint");
        assert_eq!(wanted_name("w").unwrap(), "w");
        assert!(wanted_name("none").is_err());
    }

    #[test]
    fn only_a_true_condition_means_that_traffic_is_taken() {
        let object = |status: &str| -> DynamicObject {
            serde_json::from_value(json!({
                "metadata": {"name": "w"},
                "status": {"conditions": [{"type": "Programmed", "status": status}]}
            }))
            .unwrap()
        };
        assert!(is_programmed(&object("True")));
        assert!(!is_programmed(&object("Unknown")));
    }
}
