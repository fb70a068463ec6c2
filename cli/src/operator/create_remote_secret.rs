//! `leyline create-remote-secret`: what another cluster's control plane needs to look at this cluster, as a Secret for that one.

use std::{process::ExitCode, time::Duration};

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use k8s_openapi::api::core::v1::{Namespace, Secret, ServiceAccount};
use kube::{
    Api,
    api::{Patch, PatchParams},
};
use serde_json::{Value, json};
use tokio::time::{Instant, sleep};

use super::{access::Access, cluster::Cluster, output};

/// How long the cluster may take to fill in a token.
const PATIENCE: Duration = Duration::from_secs(10);
const FIELD_MANAGER: &str = "istioctl";

/// Print a Secret by which another cluster's control plane looks at this cluster
#[derive(Debug, Args)]
pub(crate) struct CreateRemoteSecret {
    #[command(flatten)]
    access: Access,
    /// Name of this cluster in the mesh [default: the id of its namespace kube-system]
    #[arg(long)]
    name: Option<String>,
    /// What the Secret is for; control planes of elsewhere (config) are not supported
    #[arg(long = "type", value_enum, default_value_t)]
    kind: Kind,
    /// How to log in; programs (plugin) are not supported
    #[arg(long, value_enum, default_value_t)]
    auth_type: AuthType,
    /// Address of this cluster's API server as the other cluster reaches it [default: the kubeconfig's]
    #[arg(long, value_name = "URL")]
    server: Option<String>,
    /// Account to look with
    #[arg(long, default_value = "istio-reader-service-account")]
    service_account: String,
    /// The Secret with the account's token, in place of one that is made
    #[arg(long)]
    secret_name: Option<String>,
}

#[derive(Clone, Copy, Debug, Default, ValueEnum)]
enum Kind {
    /// A cluster with pods of the mesh
    #[default]
    Remote,
}

#[derive(Clone, Copy, Debug, Default, ValueEnum)]
enum AuthType {
    /// The account's token
    #[default]
    BearerToken,
}

/// What the kubeconfig is made of.
struct Login {
    server: String,
    /// PEM in base64, as the Secret has it.
    authority: String,
    token: String,
}

/// Runs the command.
pub(crate) async fn run(command: CreateRemoteSecret, before: &Access) -> Result<ExitCode> {
    let access = command.access.clone().or(before);
    let namespace = access.istio_namespace().to_owned();
    let (Kind::Remote, AuthType::BearerToken) = (command.kind, command.auth_type);
    let cluster = Cluster::connect(&access).await?;
    let name = match &command.name {
        Some(name) => name.clone(),
        None => own_id(&cluster).await?,
    };
    let server = command
        .server
        .clone()
        .unwrap_or_else(|| cluster.url.clone());
    if !server.starts_with("https://") {
        bail!(
            "{server} is not https: no control plane would use it\n  remedy: --server https://..."
        );
    }
    let secret = token(&cluster, &namespace, &command).await?;
    let data = |key: &str| {
        let found = secret.data.as_ref().and_then(|data| data.get(key));
        found.with_context(|| {
            let name = secret.metadata.name.as_deref().unwrap_or_default();
            format!("Secret {namespace}/{name} has no {key}")
        })
    };
    let authority = serde_json::to_value(data("ca.crt")?)?;
    let login = Login {
        server,
        authority: authority.as_str().unwrap_or_default().to_owned(),
        token: String::from_utf8(data("token")?.0.clone()).context("read the token")?,
    };
    let text = output::yaml(&object(&name, &namespace, &login)?)?;
    output::print(&format!(
        "# It lets its reader see this cluster's pods and services.\n{text}"
    ))?;
    Ok(ExitCode::SUCCESS)
}

async fn own_id(cluster: &Cluster) -> Result<String> {
    let api = cluster.all::<Namespace>();
    let found = cluster.ask(
        "read namespace kube-system",
        api.get_metadata("kube-system"),
    );
    let id = found.await?.metadata.uid;
    id.context("namespace kube-system has no id\n  remedy: --name")
}

/// The Secret with the account's token: the one named, or one that is made for it.
async fn token(cluster: &Cluster, namespace: &str, command: &CreateRemoteSecret) -> Result<Secret> {
    let account = &command.service_account;
    let accounts = cluster.within::<ServiceAccount>(namespace);
    let read = cluster.ask(format!("read account {account}"), accounts.get_opt(account));
    if read.await?.is_none() {
        bail!(
            "there is no account {namespace}/{account}\n  remedy: install with --set global.enableReaderRBAC=true"
        );
    }
    let secrets = cluster.within::<Secret>(namespace);
    let name = match &command.secret_name {
        Some(name) => name.clone(),
        None => make(cluster, &secrets, account).await?,
    };
    let deadline = Instant::now() + PATIENCE;
    loop {
        let found = cluster.ask(format!("read Secret {name}"), secrets.get(&name));
        let found = found.await?;
        let is_filled = found.data.iter().any(|data| data.contains_key("token"));
        if is_filled {
            return Ok(found);
        }
        if Instant::now() >= deadline {
            bail!("the cluster has put no token into Secret {namespace}/{name}");
        }
        sleep(Duration::from_millis(200)).await;
    }
}

/// Asks the cluster for a token that does not end.
async fn make(cluster: &Cluster, secrets: &Api<Secret>, account: &str) -> Result<String> {
    let name = format!("{account}-istio-remote-secret-token");
    let object = json!({
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": name, "annotations": {"kubernetes.io/service-account.name": account}},
        "type": "kubernetes.io/service-account-token",
    });
    let params = PatchParams::apply(FIELD_MANAGER);
    let patch = Patch::Apply(&object);
    cluster
        .ask(
            format!("make Secret {name}"),
            secrets.patch(&name, &params, &patch),
        )
        .await?;
    Ok(name)
}

fn object(name: &str, namespace: &str, login: &Login) -> Result<Value> {
    let mut kubeconfigs = serde_json::Map::new();
    kubeconfigs.insert(
        name.to_owned(),
        output::yaml(&kubeconfig(name, login))?.into(),
    );
    Ok(json!({
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {
            "name": format!("istio-remote-secret-{name}"),
            "namespace": namespace,
            "labels": {"istio/multiCluster": "true"},
            "annotations": {"networking.istio.io/cluster": name},
        },
        "stringData": kubeconfigs,
    }))
}

fn kubeconfig(name: &str, login: &Login) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{
            "name": name,
            "cluster": {"server": login.server, "certificate-authority-data": login.authority},
        }],
        "users": [{"name": name, "user": {"token": login.token}}],
        "contexts": [{"name": name, "context": {"cluster": name, "user": name}}],
        "current-context": name,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_secret_is_one_that_control_planes_look_for_and_its_kubeconfig_can_be_used() {
        let login = Login {
            server: "https://192.0.2.1:6443".to_owned(),
            authority: "Y2E=".to_owned(),
            token: "a.b.c".to_owned(),
        };
        let object = object("west", "istio-system", &login).unwrap();
        let secret: Secret = serde_json::from_value(object).unwrap();
        let labels = secret.metadata.labels.unwrap();
        assert_eq!(labels["istio/multiCluster"], "true");
        let kubeconfigs = secret.string_data.unwrap();
        let read = kube::config::Kubeconfig::from_yaml(&kubeconfigs["west"]).unwrap();
        assert_eq!(read.current_context.as_deref(), Some("west"));
        let cluster = read.clusters[0].cluster.as_ref().unwrap();
        assert_eq!(cluster.server.as_deref(), Some("https://192.0.2.1:6443"));
        assert_eq!(cluster.certificate_authority_data.as_deref(), Some("Y2E="));
        assert!(
            read.auth_infos[0]
                .auth_info
                .as_ref()
                .unwrap()
                .token
                .is_some()
        );
    }
}
