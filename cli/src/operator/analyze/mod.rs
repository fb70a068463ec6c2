//! `leyline analyze`: what the control plane would say of files and of what is in a cluster, by the control plane's own
//! translation, before anything is applied.

mod findings;
mod mesh_config;
mod network;
mod selectors;
#[cfg(test)]
mod tests;
pub(super) mod validate;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    io::Read,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context, Result, bail};
use clap::Args;
use controlplane::{
    output::ObjectStatus,
    source::tree::{self, Node},
    world::{Settings, World},
};
use kube::{
    Api,
    api::{ApiResource, DynamicObject, GroupVersionKind, ListParams},
};
use serde_json::{Value, json};

use self::{
    findings::{ANALYZERS, Analyzer, Finding, Level, Suppression},
    mesh_config::MeshFile,
};
use super::{
    access::Access,
    cluster::Cluster,
    output::{self, Form},
};
use crate::screen;

/// What exits say when a finding is as bad as the threshold: istioctl's.
const FOUND: u8 = 79;
const SUPPRESS: &str = "galley.istio.io/analyze-suppress";

/// Find what is wrong with files, and with what is in the cluster
#[derive(Debug, Args)]
pub(crate) struct Analyze {
    /// Files and folders of YAML; - is standard input
    files: Vec<PathBuf>,
    #[command(flatten)]
    access: Access,
    /// Look at the cluster's objects, too
    #[arg(long, short = 'k', default_value_t = true, num_args = 0..=1, default_missing_value = "true", action = clap::ArgAction::Set)]
    use_kube: bool,
    /// Findings of every namespace
    #[arg(long, short = 'A')]
    all_namespaces: bool,
    /// Folders within folders, too
    #[arg(long, short = 'R')]
    recursive: bool,
    /// Print what is looked for
    #[arg(long, short = 'L')]
    list_analyzers: bool,
    /// Form of the output
    #[arg(long, short, value_enum, default_value_t)]
    output: Form,
    /// Exit with 79 where a finding is at least so bad
    #[arg(long, value_enum, ignore_case = true, default_value = "error")]
    failure_threshold: Level,
    /// Print only findings that are at least so bad
    #[arg(long, value_enum, ignore_case = true, default_value = "info")]
    output_threshold: Level,
    /// Look for nothing but this, by its code or name (see -L); may be repeated
    #[arg(long = "analyzer", value_name = "CODE|NAME", value_parser = findings::known)]
    analyzers: Vec<Analyzer>,
    /// The mesh's configuration, instead of what files and the cluster have of it
    #[arg(
        long = "meshConfigFile",
        alias = "mesh-config-file",
        value_name = "FILE"
    )]
    mesh_config: Option<PathBuf>,
    /// Say nothing of CODE=Kind name.namespace (with * for any letters); may be repeated
    #[arg(long, short = 'S', value_name = "CODE=ORIGIN")]
    suppress: Vec<Suppression>,
}

/// Runs the command.
pub(crate) async fn run(command: Analyze, before: &Access) -> Result<ExitCode> {
    if command.list_analyzers {
        for it in ANALYZERS {
            println!("{}  {:<8} {}", it.code, format!("{:?}", it.level), it.name);
        }
        return Ok(ExitCode::SUCCESS);
    }
    let access = command.access.clone().or(before);
    let texts = texts(&command.files, command.recursive)?;
    let cluster = match command.use_kube {
        true => Some(
            Cluster::connect(&access)
                .await
                .context("use --use-kube=false to look at files alone")?,
        ),
        false if texts.is_empty() => {
            bail!("nothing to look at: name files, or let it look at the cluster")
        }
        false => None,
    };
    let objects = match &cluster {
        Some(cluster) => exported(cluster).await?,
        None => Vec::new(),
    };
    let namespace = cluster.as_ref().map(|it| it.namespace.as_str());
    let wanted = namespace.filter(|_| !command.all_namespaces);
    let mesh = command.mesh_config.as_deref().map(mesh_file);
    let mesh = mesh.transpose()?;
    let root = access.istio_namespace();
    let mut found = judge(&texts, &objects, mesh.as_ref(), root, wanted).await?;
    found.retain(|it| command.asks_for(it));
    told(&found, command.output)?;
    let failed = found.iter().any(|it| it.level >= command.failure_threshold);
    Ok(if failed {
        ExitCode::from(FOUND)
    } else {
        ExitCode::SUCCESS
    })
}

fn mesh_file(path: &Path) -> Result<MeshFile> {
    let name = path.display().to_string();
    let text = fs::read_to_string(path).with_context(|| format!("read {name}"))?;
    Ok(MeshFile { name, text })
}

impl Analyze {
    fn asks_for(&self, it: &Finding) -> bool {
        let is_looked_for = self.analyzers.is_empty()
            || self
                .analyzers
                .iter()
                .any(|analyzer| analyzer.code == it.code);
        is_looked_for
            && it.level >= self.output_threshold
            && !self.suppress.iter().any(|wish| wish.covers(it))
    }
}

/// What is to be said of the objects in files and in a cluster, of those in the namespace `wanted` alone where one is.
async fn judge(
    texts: &BTreeMap<String, String>,
    objects: &[Value],
    mesh: Option<&MeshFile>,
    root: &str,
    wanted: Option<&str>,
) -> Result<Vec<Finding>> {
    let mesh = mesh_config::written(mesh, texts, objects, root);
    let settings = mesh_config::settings(&mesh, root);
    let mut told_of = mesh_config::findings(&mesh, &settings);
    let statuses = tokio::task::spawn_blocking({
        let (texts, objects) = (texts.clone(), objects.to_vec());
        move || statuses(&texts, &objects, settings)
    })
    .await??;
    let suppressed = suppressed(texts, objects);
    told_of.extend(selectors::findings(texts, objects, root));
    told_of.extend(network::findings(objects));
    Ok(findings(&statuses, told_of, wanted, &suppressed))
}

fn told(found: &[Finding], form: Form) -> Result<()> {
    if let Some(text) = form.text(&serde_json::to_value(found)?)? {
        output::print(&text)?;
        return Ok(());
    }
    let screen = screen::output();
    if found.is_empty() {
        return output::print(&format!("{} nothing was found\n", screen.good("ok")));
    }
    let lines = found.iter().map(|it| {
        let line = format!("{it}\n");
        match it.level {
            Level::Error => screen.bad(&line),
            Level::Warning => screen.waiting(&line),
            Level::Info => line,
        }
    });
    output::print(&lines.collect::<String>())
}

/// The findings, worst first; of one namespace, where that is wanted, and of every file.
fn findings(
    statuses: &[ObjectStatus],
    selecting: Vec<selectors::Told>,
    namespace: Option<&str>,
    suppressed: &BTreeMap<String, String>,
) -> Vec<Finding> {
    let in_cluster = |it: &ObjectStatus| it.file.is_empty() || *it.file == *CLUSTER;
    let wanted = |it: &&ObjectStatus| {
        let own = it.namespace.as_deref();
        !in_cluster(it) || namespace.is_none_or(|wanted| own.is_none_or(|own| own == wanted))
    };
    let mut found: Vec<_> = statuses
        .iter()
        .filter(wanted)
        .flat_map(|it| findings::of_object(it, !in_cluster(it)))
        .chain(selecting.into_iter().filter_map(|it| {
            let of_file = it.finding.reference.is_some();
            let wanted = of_file || namespace.is_none_or(|wanted| wanted == it.namespace);
            wanted.then_some(it.finding)
        }))
        .filter(|it| {
            let codes = suppressed.get(&it.origin);
            !codes.is_some_and(|codes| findings::annotated(codes, it.code))
        })
        .collect();
    found.sort_by(|a, b| (b.level, &a.origin, a.code).cmp(&(a.level, &b.origin, b.code)));
    found
}

/// The file of the cluster's objects, beside the user's.
const CLUSTER: &str = "cluster.json";

/// The control plane's own word on every object: its translation, run over a folder of the files and of what is in the
/// cluster and in none of them.
fn statuses(
    texts: &BTreeMap<String, String>,
    objects: &[Value],
    settings: Settings,
) -> Result<Vec<ObjectStatus>> {
    let folder = tempfile::tempdir().context("make a folder")?;
    let mut names = BTreeMap::new();
    for (at, (name, text)) in texts.iter().enumerate() {
        let file = format!("{at:04}.yaml");
        fs::write(folder.path().join(&file), text).context("write a file to look at")?;
        names.insert(file, name.clone());
    }
    let defined: BTreeSet<_> = texts.values().flat_map(|it| keys(it)).collect();
    let rest: Vec<_> = objects
        .iter()
        .filter(|it| !defined.contains(&key(it)) && it["kind"] != NETWORK_POLICY)
        .collect();
    if !rest.is_empty() {
        let list = json!({"apiVersion": "v1", "kind": "List", "items": rest});
        fs::write(folder.path().join(CLUSTER), list.to_string())
            .context("write the objects to look at")?;
    }
    let world = World::start(&[folder.path().to_owned()], settings)?;
    let mut statuses = world.statuses();
    for status in &mut statuses {
        rename(status, folder.path(), &names);
    }
    Ok(statuses)
}

/// Puts the files' own names for those of the folder, also where messages name them.
fn rename(status: &mut ObjectStatus, folder: &Path, names: &BTreeMap<String, String>) {
    let prefix = format!("{}/", folder.display());
    let plain = |text: &str| {
        let mut text = text.replace(&prefix, "");
        for (file, name) in names {
            if text.contains(file.as_str()) {
                text = text.replace(file.as_str(), name);
            }
        }
        text
    };
    status.file = plain(&status.file).as_str().into();
    status.name = plain(&status.name).as_str().into();
    for condition in &mut status.conditions {
        condition.message = plain(&condition.message).into();
    }
}

/// `Kind namespace/name` of an object of the API server.
fn key(object: &Value) -> String {
    let text = |key: &str| object["metadata"][key].as_str().unwrap_or_default();
    let kind = object["kind"].as_str().unwrap_or_default();
    format!("{kind} {}/{}", text("namespace"), text("name"))
}

/// The same of each object of a file; what cannot be read has none.
fn keys(text: &str) -> Vec<String> {
    documents(text).iter().map(|it| named(it).0).collect()
}

pub(super) fn documents(text: &str) -> Vec<std::sync::Arc<Node>> {
    tree::parse(text).unwrap_or_default()
}

/// An object's key and its origin as findings have it.
fn named(node: &Node) -> (String, String) {
    let metadata = node.field("metadata");
    let text = |key: &str| {
        metadata
            .and_then(|it| it.field(key))
            .and_then(|it| it.text())
            .map(str::to_owned)
    };
    let kind = node
        .field("kind")
        .and_then(|it| it.text())
        .unwrap_or_default();
    let name = text("name").unwrap_or_default();
    let scoped = matches!(kind, "Namespace" | "Node" | "GatewayClass");
    let namespace = match scoped {
        true => None,
        false => Some(text("namespace").unwrap_or_else(|| "default".to_owned())),
    };
    let key = format!("{kind} {}/{name}", namespace.as_deref().unwrap_or_default());
    let origin = match namespace {
        Some(namespace) => format!("{kind} {name}.{namespace}"),
        None => format!("{kind} {name}"),
    };
    (key, origin)
}

/// Objects that ask for silence by annotation: the codes, by origin.
fn suppressed(texts: &BTreeMap<String, String>, objects: &[Value]) -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    for object in objects {
        if let Some(codes) = object["metadata"]["annotations"][SUPPRESS].as_str() {
            let text = |key: &str| object["metadata"][key].as_str().unwrap_or_default();
            let kind = object["kind"].as_str().unwrap_or_default();
            found.insert(
                format!("{kind} {}.{}", text("name"), text("namespace")),
                codes.to_owned(),
            );
        }
    }
    for node in texts.values().flat_map(|it| documents(it)) {
        let annotations = node
            .field("metadata")
            .and_then(|it| it.field("annotations"));
        if let Some(codes) = annotations
            .and_then(|it| it.field(SUPPRESS))
            .and_then(|it| it.text())
        {
            found.insert(named(&node).1, codes.to_owned());
        }
    }
    found
}

/// The files' contents, by the names that people know them by.
fn texts(paths: &[PathBuf], recursive: bool) -> Result<BTreeMap<String, String>> {
    let mut texts = BTreeMap::new();
    for path in paths {
        if path.as_os_str() == "-" {
            let mut text = String::new();
            std::io::stdin()
                .read_to_string(&mut text)
                .context("read standard input")?;
            texts.insert("-".to_owned(), text);
        } else if path.is_dir() {
            folder(path, recursive, &mut texts)?;
        } else {
            texts.insert(path.display().to_string(), read(path)?);
        }
    }
    Ok(texts)
}

fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).with_context(|| format!("read {}", path.display()))
}

fn folder(path: &Path, recursive: bool, texts: &mut BTreeMap<String, String>) -> Result<()> {
    let entries = fs::read_dir(path).with_context(|| format!("read {}", path.display()))?;
    for entry in entries {
        let path = entry?.path();
        let extension = path.extension().and_then(|it| it.to_str());
        if path.is_dir() && recursive {
            folder(&path, recursive, texts)?;
        } else if path.is_file() && matches!(extension, Some("yaml" | "yml" | "json")) {
            texts.insert(path.display().to_string(), read(&path)?);
        }
    }
    Ok(())
}

/// What is read of a cluster: group, versions (the first that it has), kind. All but the last is what the control plane reads.
const KINDS: [(&str, &[&str], &str); 22] = [
    ("", &["v1"], "Namespace"),
    ("", &["v1"], "Node"),
    ("", &["v1"], "Pod"),
    ("", &["v1"], "Service"),
    ("discovery.k8s.io", &["v1"], "EndpointSlice"),
    ("networking.istio.io", &["v1"], "ServiceEntry"),
    ("networking.istio.io", &["v1"], "WorkloadEntry"),
    ("networking.istio.io", &["v1"], "VirtualService"),
    ("networking.istio.io", &["v1"], "DestinationRule"),
    ("networking.istio.io", &["v1alpha3"], "EnvoyFilter"),
    ("security.istio.io", &["v1"], "AuthorizationPolicy"),
    ("security.istio.io", &["v1"], "PeerAuthentication"),
    ("security.istio.io", &["v1"], "RequestAuthentication"),
    ("telemetry.istio.io", &["v1"], "Telemetry"),
    (GATEWAY_API, &["v1"], "Gateway"),
    (GATEWAY_API, &["v1"], "GatewayClass"),
    (GATEWAY_API, &["v1"], "HTTPRoute"),
    (GATEWAY_API, &["v1"], "GRPCRoute"),
    (GATEWAY_API, &["v1", "v1alpha3", "v1alpha2"], "TLSRoute"),
    (GATEWAY_API, &["v1", "v1alpha2"], "TCPRoute"),
    (GATEWAY_API, &["v1", "v1alpha3"], "BackendTLSPolicy"),
    ("networking.k8s.io", &["v1"], NETWORK_POLICY),
];
const GATEWAY_API: &str = "gateway.networking.k8s.io";
const NETWORK_POLICY: &str = "NetworkPolicy";

/// The findings of a whole cluster's objects, as JSON.
pub(super) async fn judged(objects: &[Value], root: &str) -> Result<Value> {
    let found = judge(&BTreeMap::new(), objects, None, root, None).await?;
    Ok(serde_json::to_value(found)?)
}

/// The cluster's objects; a kind that the cluster does not have is none.
pub(super) async fn exported(cluster: &Cluster) -> Result<Vec<Value>> {
    let mut objects = Vec::new();
    for (group, versions, kind) in KINDS {
        for version in versions {
            let resource = resource(group, version, kind);
            let Some(items) = listed(cluster, &resource).await? else {
                continue;
            };
            for item in items {
                objects.push(exported_as(&item, &resource)?);
            }
            break;
        }
    }
    objects.extend(mesh_configs(cluster).await?);
    Ok(objects)
}

fn exported_as(item: &DynamicObject, resource: &ApiResource) -> Result<Value> {
    let mut object = serde_json::to_value(item)?;
    object["apiVersion"] = resource.api_version.as_str().into();
    object["kind"] = resource.kind.as_str().into();
    // The server's own notes, which say nothing of the mesh.
    if let Some(metadata) = object["metadata"].as_object_mut() {
        metadata.remove("managedFields");
    }
    Ok(object)
}

/// The ConfigMaps of the mesh's own configuration. No others: what is in them is nobody's to look at here.
async fn mesh_configs(cluster: &Cluster) -> Result<Vec<Value>> {
    let resource = resource("", "v1", "ConfigMap");
    let api: Api<DynamicObject> =
        Api::namespaced_with(cluster.client(), &cluster.istio_namespace, &resource);
    let found = listed_by(cluster, &resource, api)
        .await?
        .unwrap_or_default();
    let named = found.iter().filter(|it| {
        let name = it.metadata.name.as_deref();
        name.is_some_and(mesh_config::is_name) && it.data["data"]["mesh"].is_string()
    });
    named.map(|it| exported_as(it, &resource)).collect()
}

/// The objects of a kind, none where they may not be seen; `None` where the cluster does not have it in this version.
async fn listed(cluster: &Cluster, resource: &ApiResource) -> Result<Option<Vec<DynamicObject>>> {
    let api: Api<DynamicObject> = Api::all_with(cluster.client(), resource);
    listed_by(cluster, resource, api).await
}

async fn listed_by(
    cluster: &Cluster,
    resource: &ApiResource,
    api: Api<DynamicObject>,
) -> Result<Option<Vec<DynamicObject>>> {
    let params = ListParams::default();
    let listed = cluster
        .ask(format!("list {}", resource.plural), api.list(&params))
        .await;
    match listed {
        Ok(listed) => Ok(Some(listed.items)),
        Err(error) => {
            let text = format!("{error:#}");
            let says = |part: &str| text.to_lowercase().contains(part);
            if says("could not find") || says("404") {
                return Ok(None);
            }
            if says("forbidden") {
                // The rest is worth looking at, and who asks knows what is left out.
                eprintln!("not looked at: {}: {text}", resource.plural);
                return Ok(Some(Vec::new()));
            }
            Err(error)
        }
    }
}

fn resource(group: &str, version: &str, kind: &str) -> ApiResource {
    ApiResource::from_gvk(&GroupVersionKind::gvk(group, version, kind))
}
