//! `leyline version`: this program, the control plane, and the proxies that it serves.

use std::{collections::BTreeMap, process::ExitCode};

use anyhow::Result;
use clap::Args;
use controlplane::gateway::names::REVISION;
use serde::Serialize;
use serde_json::Value;

use super::{
    access::Access,
    cluster::{Cluster, DEBUG_PORT, PodName},
    output::{self, Form},
    status::{self, Proxy},
};

/// Print the versions of this program, the control plane and the proxies
#[derive(Debug, Args)]
pub(crate) struct Version {
    #[command(flatten)]
    pub access: Access,
    /// One line each (the form is the same)
    #[arg(long, short)]
    short: bool,
    /// Ask the cluster, too
    #[arg(long, default_value_t = true, num_args = 0..=1, default_missing_value = "true", action = clap::ArgAction::Set)]
    remote: bool,
    /// Form of the output
    #[arg(long, short, value_enum, default_value_t)]
    output: Form,
    /// Only control planes of this revision
    #[arg(long, short)]
    revision: Option<String>,
}

/// All versions, in istioctl's shape.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Versions {
    client_version: Build,
    #[serde(skip_serializing_if = "Option::is_none")]
    mesh_version: Option<Vec<Server>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    data_plane_version: Option<Vec<Served>>,
}

#[derive(Clone, Debug, Serialize)]
struct Build {
    version: String,
}

/// A control plane's pod.
#[derive(Debug, Serialize)]
#[serde(rename_all = "PascalCase")]
struct Server {
    component: &'static str,
    revision: String,
    info: Build,
}

/// A proxy.
#[derive(Debug, Serialize)]
#[serde(rename_all = "PascalCase")]
struct Served {
    #[serde(rename = "ID")]
    id: String,
    istio_version: String,
    node_type: String,
}

/// Runs the command. Without a configured cluster the client's version is all there is.
pub(crate) async fn run(command: Version, before: &Access) -> Result<ExitCode> {
    let access = command.access.clone().or(before);
    let mut versions = Versions::of_this_program();
    let mut trouble = None;
    if command.remote {
        // Somebody without a cluster asks for this program's version only.
        let named = access.kubeconfig.is_some() || access.context.is_some();
        match Cluster::connect(&access).await {
            Ok(cluster) => {
                let revision = command.revision.as_deref();
                trouble = versions.ask(&cluster, revision).await.err();
            }
            Err(error) if named => trouble = Some(error),
            Err(_) => {}
        }
    }
    match command.output.text(&serde_json::to_value(&versions)?)? {
        Some(text) => output::print(&text)?,
        None => output::print(&lines(&versions))?,
    }
    match trouble {
        Some(error) => Err(error),
        None => Ok(ExitCode::SUCCESS),
    }
}

/// All versions of a cluster, as JSON.
pub(super) async fn told(cluster: &Cluster) -> Result<Value> {
    let mut versions = Versions::of_this_program();
    versions.ask(cluster, None).await?;
    Ok(serde_json::to_value(&versions)?)
}

impl Versions {
    fn of_this_program() -> Self {
        Self {
            client_version: Build {
                version: env!("CARGO_PKG_VERSION").to_owned(),
            },
            mesh_version: None,
            data_plane_version: None,
        }
    }

    /// Adds those of a cluster.
    async fn ask(&mut self, cluster: &Cluster, revision: Option<&str>) -> Result<()> {
        let (servers, served) = remote(cluster, revision).await?;
        self.mesh_version = Some(servers);
        self.data_plane_version = Some(served);
        Ok(())
    }
}

async fn remote(cluster: &Cluster, revision: Option<&str>) -> Result<(Vec<Server>, Vec<Served>)> {
    if cluster.control_planes().await?.is_empty() {
        return Ok((Vec::new(), Vec::new()));
    }
    let mut servers = Vec::new();
    for pod in cluster.ready_control_planes(revision).await? {
        let labels = pod.metadata.labels.as_ref();
        let of = labels.and_then(|it| it.get(REVISION)).cloned();
        let version = server_version(cluster, &PodName::from(&pod)).await?;
        servers.push(Server {
            component: "pilot",
            revision: of.unwrap_or_else(|| "default".to_owned()),
            info: Build { version },
        });
    }
    let proxies = status::proxies(cluster, revision).await?;
    Ok((servers, proxies.iter().map(served).collect()))
}

/// Ours answers JSON, upstream's a text `1.30.0-<commit>-Clean`.
async fn server_version(cluster: &Cluster, pod: &PodName) -> Result<String> {
    let answer = cluster
        .call(pod, http::Method::GET, DEBUG_PORT, "/version")
        .await?;
    let text = String::from_utf8_lossy(&answer.body).trim().to_owned();
    let json: Option<Value> = serde_json::from_str(&text).ok();
    let told = json.as_ref().and_then(|it| it["version"].as_str());
    Ok(told.map_or(text.clone(), str::to_owned))
}

fn served(proxy: &Proxy) -> Served {
    Served {
        id: proxy.name.clone(),
        istio_version: proxy.version.clone(),
        node_type: proxy.kind.clone(),
    }
}

fn lines(versions: &Versions) -> String {
    let mut text = format!("client version: {}\n", versions.client_version.version);
    let (Some(servers), Some(served)) = (&versions.mesh_version, &versions.data_plane_version)
    else {
        return text;
    };
    if servers.is_empty() {
        text.push_str("control plane version: none runs (leyline install)\n");
        return text;
    }
    let of_servers = servers.iter().map(|it| it.info.version.as_str());
    let of_proxies = served.iter().map(|it| it.istio_version.as_str());
    text.push_str(&format!(
        "control plane version: {}\n",
        counted(of_servers, None)
    ));
    let proxies = match served.is_empty() {
        true => "no proxies".to_owned(),
        false => counted(of_proxies, Some("proxies")),
    };
    text.push_str(&format!("data plane version: {proxies}\n"));
    text
}

/// The versions; with how many of each, where there is a word for them or they differ.
fn counted<'a>(versions: impl Iterator<Item = &'a str>, word: Option<&str>) -> String {
    let mut counts = BTreeMap::<&str, usize>::new();
    for version in versions {
        *counts.entry(version).or_default() += 1;
    }
    let differ = counts.len() > 1;
    let each = counts.iter().map(|(version, count)| match word {
        Some(word) => format!("{version} ({count} {word})"),
        None if differ => format!("{version} ({count})"),
        None => (*version).to_owned(),
    });
    each.collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn versions() -> Versions {
        let served = |id: &str, version: &str| Served {
            id: id.to_owned(),
            istio_version: version.to_owned(),
            node_type: "ztunnel".to_owned(),
        };
        Versions {
            client_version: Build {
                version: "0.1.0".to_owned(),
            },
            mesh_version: Some(vec![Server {
                component: "pilot",
                revision: "default".to_owned(),
                info: Build {
                    version: "0.1.0".to_owned(),
                },
            }]),
            data_plane_version: Some(vec![
                served("ztunnel-a.istio-system", "1.30.0"),
                served("ztunnel-b.istio-system", "0.1.0"),
            ]),
        }
    }

    #[test]
    fn versions_are_told_as_istioctl_tells_them() {
        let expected = "client version: 0.1.0\ncontrol plane version: 0.1.0\ndata plane version: 0.1.0 (1 proxies), \
                        1.30.0 (1 proxies)\n";
        assert_eq!(lines(&versions()), expected);
    }

    #[test]
    fn the_json_has_istioctls_keys() {
        let json = serde_json::to_value(versions()).unwrap();
        assert_eq!(json["clientVersion"]["version"], "0.1.0");
        assert_eq!(json["meshVersion"][0]["Component"], "pilot");
        assert_eq!(json["meshVersion"][0]["Info"]["version"], "0.1.0");
        assert_eq!(json["dataPlaneVersion"][0]["ID"], "ztunnel-a.istio-system");
        assert_eq!(json["dataPlaneVersion"][0]["IstioVersion"], "1.30.0");
    }
}
