//! `leyline status`: which proxies the control plane serves, and whether they have taken what they were sent; of one that is
//! named, also whether it holds what is served.

mod compare;

use std::{collections::BTreeMap, process::ExitCode, time::Duration};

use anyhow::{Result, bail};
use clap::Args;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{
    access::Access,
    cluster::{ADMIN_PORT, Cluster, DEBUG_PORT, PodName},
    output::{self, Form},
    ztunnel_config::dump::Dump,
};
use crate::screen;
use compare::{Difference, differences};

/// How long a change may be on its way to a proxy.
const A_MOMENT: Duration = Duration::from_secs(1);

/// Which proxies the control plane serves, and whether they are up to date (istioctl's proxy-status)
#[derive(Debug, Args)]
pub(crate) struct Status {
    /// Only this proxy, NAME[.NAMESPACE]: what a node tunnel holds is compared with what is served, too
    proxy: Option<String>,
    #[command(flatten)]
    access: Access,
    /// Form of the output
    #[arg(long, short, value_enum, default_value_t)]
    output: Form,
    /// Read the control plane's /debug/syncz from this file, and ask no cluster
    #[arg(long, short, value_name = "FILE")]
    file: Option<std::path::PathBuf>,
    /// A column for each type of resource; what was refused, and why
    #[arg(long, short, num_args = 0..=1, default_missing_value = "1", default_value_t = 0)]
    verbosity: u8,
    /// Only control planes of this revision
    #[arg(long, short)]
    revision: Option<String>,
}

/// A connected proxy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Proxy {
    /// `pod.namespace`.
    pub name: String,
    pub cluster: String,
    /// The control plane's pod that serves it.
    pub istiod: String,
    pub version: String,
    /// `ztunnel`, `waypoint` ...
    #[serde(rename = "type")]
    pub kind: String,
    /// By short name.
    pub types: BTreeMap<String, Synced>,
    /// What it does not hold as it is served, where that was asked.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub differences: Option<Vec<Difference>>,
}

/// How far a proxy is with one type of resource.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Synced {
    pub state: State,
    /// When it was last sent something, as the control plane tells.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sent_time: Option<String>,
    /// What it refused last.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// In istioctl's words, the worst first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub(crate) enum State {
    /// It refused what it was sent.
    #[serde(rename = "ERROR")]
    Error,
    /// It has not acknowledged what it was sent.
    #[serde(rename = "STALE")]
    Stale,
    /// Nothing was sent.
    #[serde(rename = "NOT SENT")]
    NotSent,
    /// It has what there is.
    #[serde(rename = "SYNCED")]
    Synced,
}

impl State {
    fn text(self) -> &'static str {
        match self {
            Self::Error => "ERROR",
            Self::Stale => "STALE",
            Self::NotSent => "NOT SENT",
            Self::Synced => "SYNCED",
        }
    }
}

impl Proxy {
    /// The worst of its types.
    pub(crate) fn state(&self) -> State {
        let states = self.types.values().map(|it| it.state);
        states.min().unwrap_or(State::NotSent)
    }
}

/// An item of `/debug/syncz`.
#[derive(Debug, Deserialize)]
#[serde(default)]
struct Item {
    proxy: String,
    cluster_id: String,
    proxy_type: String,
    istio_version: String,
    resources: BTreeMap<String, Report>,
}

impl Default for Item {
    fn default() -> Self {
        Self {
            proxy: String::new(),
            cluster_id: "Kubernetes".to_owned(),
            proxy_type: String::new(),
            istio_version: String::new(),
            resources: BTreeMap::new(),
        }
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Report {
    sent: Option<String>,
    acked: Option<String>,
    sent_time: Option<Value>,
    last_error: Option<String>,
}

/// The proxies of one control plane's answer.
fn read(syncz: Value, istiod: &str) -> Result<Vec<Proxy>> {
    let items: Vec<Item> = serde_json::from_value(syncz)?;
    let proxies = items.into_iter().map(|item| Proxy {
        name: item.proxy,
        cluster: item.cluster_id,
        istiod: istiod.to_owned(),
        version: item.istio_version,
        kind: item.proxy_type,
        types: item
            .resources
            .into_iter()
            .map(|(url, report)| (short(&url), synced(report)))
            .collect(),
        differences: None,
    });
    Ok(proxies.collect())
}

/// istioctl's short names of types.
fn short(url: &str) -> String {
    let last = url.rsplit(['/', '.']).next().unwrap_or(url);
    match last {
        "Address" | "Workload" => "WDS",
        "Authorization" => "WADS",
        "Cluster" => "CDS",
        "Listener" => "LDS",
        "ClusterLoadAssignment" => "EDS",
        "RouteConfiguration" => "RDS",
        "TypedExtensionConfig" => "ECDS",
        "Resource" => "WAYPOINT",
        other => other,
    }
    .to_owned()
}

fn synced(report: Report) -> Synced {
    let present = |it: Option<String>| it.filter(|it| !it.is_empty());
    let (sent, acked) = (present(report.sent), present(report.acked));
    let error = present(report.last_error);
    let state = match (&sent, &acked, &error) {
        (_, _, Some(_)) => State::Error,
        (None, _, None) => State::NotSent,
        (Some(sent), Some(acked), None) if sent == acked => State::Synced,
        (Some(_), _, None) => State::Stale,
    };
    let time = report.sent_time.and_then(|it| match it {
        Value::String(text) => Some(text),
        Value::Null => None,
        other => Some(other.to_string()),
    });
    Synced {
        state,
        sent_time: time,
        error,
    }
}

/// The proxies of every running control plane.
pub(crate) async fn proxies(cluster: &Cluster, revision: Option<&str>) -> Result<Vec<Proxy>> {
    let mut proxies = Vec::new();
    for pod in cluster.ready_control_planes(revision).await? {
        let pod = PodName::from(&pod);
        let answer = cluster.json(&pod, DEBUG_PORT, "/debug/syncz").await?;
        proxies.extend(read(answer, &pod.name)?);
    }
    proxies.sort_by(|a, b| (&a.name, &a.istiod).cmp(&(&b.name, &b.istiod)));
    Ok(proxies)
}

/// Runs the command. Fails where a proxy that was asked about holds something else than is served.
pub(crate) async fn run(command: Status, before: &Access) -> Result<ExitCode> {
    let cluster = match &command.file {
        Some(_) => None,
        None => Some(Cluster::connect(&command.access.clone().or(before)).await?),
    };
    let mut proxies = match (&command.file, &cluster) {
        (Some(path), _) => read(serde_json::from_slice(&std::fs::read(path)?)?, "-")?,
        (None, Some(cluster)) => proxies(cluster, command.revision.as_deref()).await?,
        (None, None) => Vec::new(),
    };
    if let Some(wanted) = &command.proxy {
        proxies.retain(|it| it.name == *wanted || it.name.split('.').next() == Some(wanted));
        if proxies.is_empty() {
            bail!(
                "the control plane serves no proxy {wanted}\n  remedy: leyline status lists those that it serves"
            );
        }
        if let Some(cluster) = &cluster {
            for proxy in proxies.iter_mut().filter(|it| it.kind == "ztunnel") {
                proxy.differences = Some(compared(cluster, proxy).await?);
            }
        }
    }
    match command.output.text(&serde_json::to_value(&proxies)?)? {
        Some(text) => output::print(&text)?,
        None if proxies.is_empty() => println!("The control plane serves no proxies."),
        None => {
            let verbose = command.verbosity > 0 || command.proxy.is_some();
            output::print(&text(&proxies, verbose))?;
        }
    }
    let as_served = |proxy: &Proxy| proxy.differences.as_ref().is_none_or(Vec::is_empty);
    Ok(match proxies.iter().all(as_served) {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    })
}

/// What a node tunnel does not hold as its control plane serves it. Both are asked twice, a moment apart: a change that is on its
/// way is no difference.
async fn compared(cluster: &Cluster, proxy: &Proxy) -> Result<Vec<Difference>> {
    let Some((name, namespace)) = proxy.name.split_once('.') else {
        bail!("the control plane names a proxy {:?}", proxy.name);
    };
    let proxy_pod = PodName {
        name: name.to_owned(),
        namespace: namespace.to_owned(),
    };
    let control_plane = PodName {
        name: proxy.istiod.clone(),
        namespace: cluster.istio_namespace.clone(),
    };
    let ask = async || {
        let served = cluster.json(&control_plane, DEBUG_PORT, "/debug/ambientz");
        let served = Dump::new(served.await?)?;
        let held = cluster.json(&proxy_pod, ADMIN_PORT, "/config_dump").await?;
        Ok::<_, anyhow::Error>(differences(&served, &Dump::new(held)?))
    };
    let first = ask().await?;
    if first.is_empty() {
        return Ok(first);
    }
    tokio::time::sleep(A_MOMENT).await;
    let mut both = ask().await?;
    both.retain(|it| first.contains(it));
    Ok(both)
}

fn text(proxies: &[Proxy], verbose: bool) -> String {
    let mut kinds: Vec<_> = proxies
        .iter()
        .flat_map(|it| it.types.keys())
        .cloned()
        .collect();
    kinds.sort();
    kinds.dedup();
    let mut heading: Vec<String> = ["NAME", "CLUSTER", "ISTIOD", "VERSION"]
        .map(Into::into)
        .into();
    match verbose {
        true => heading.extend(kinds.iter().cloned()),
        false => heading.extend(["SUBSCRIBED TYPES".to_owned(), "STATE".to_owned()]),
    }
    let mut rows = vec![heading];
    for proxy in proxies {
        let mut row = [&proxy.name, &proxy.cluster, &proxy.istiod, &proxy.version]
            .map(Clone::clone)
            .to_vec();
        if verbose {
            row.extend(kinds.iter().map(|it| match proxy.types.get(it) {
                Some(synced) => painted(synced.state),
                None => "IGNORED".to_owned(),
            }));
        } else {
            row.push(subscribed(proxy));
            row.push(painted(proxy.state()));
        }
        rows.push(row);
    }
    let mut text = screen::table(&rows);
    for proxy in proxies {
        for (kind, synced) in &proxy.types {
            if let Some(error) = &synced.error {
                text.push_str(&format!("\n{} refuses {kind}: {error}\n", proxy.name));
            }
        }
    }
    for proxy in proxies {
        if let Some(differences) = &proxy.differences {
            text.push_str(&compared_text(proxy, differences));
        }
    }
    text
}

fn compared_text(proxy: &Proxy, differences: &[Difference]) -> String {
    if differences.is_empty() {
        return format!(
            "\n{} holds every workload, service and policy as {} serves it.\n",
            proxy.name, proxy.istiod
        );
    }
    let lines: String = differences.iter().map(Difference::text).collect();
    format!(
        "\n{} does not hold what {} serves:\n{lines}",
        proxy.name, proxy.istiod
    )
}

fn subscribed(proxy: &Proxy) -> String {
    let kinds: Vec<_> = proxy.types.keys().map(String::as_str).collect();
    format!("{} ({})", kinds.len(), kinds.join(","))
}

fn painted(state: State) -> String {
    let screen = screen::output();
    match state {
        State::Synced => screen.good(state.text()),
        State::Error => screen.bad(state.text()),
        State::Stale => screen.waiting(state.text()),
        State::NotSent => state.text().to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn syncz() -> Value {
        json!([
            {
                "cluster_id": "Kubernetes", "proxy": "ztunnel-b.istio-system", "proxy_type": "ztunnel",
                "istio_version": "0.1.0", "node": "n2",
                "resources": {
                    "type.googleapis.com/istio.workload.Address": {"sent": "n2", "acked": "n1", "sentTime": "t"},
                    "type.googleapis.com/istio.security.Authorization": {"sent": "n1", "acked": "n1", "lastError": null}
                }
            },
            {
                "cluster_id": "Kubernetes", "proxy": "ztunnel-a.istio-system", "proxy_type": "ztunnel",
                "istio_version": "0.1.0",
                "resources": {
                    "type.googleapis.com/istio.workload.Address":
                        {"sent": "n2", "acked": "n1", "lastError": "shop/web: addresses[0]: an address of 3 bytes"},
                    "type.googleapis.com/istio.security.Authorization": {"sent": null, "acked": null}
                }
            }
        ])
    }

    #[test]
    fn a_proxy_is_as_good_as_its_worst_type() {
        let proxies = read(syncz(), "istiod-x").unwrap();
        let states: Vec<_> = proxies.iter().map(Proxy::state).collect();
        assert_eq!(states, [State::Stale, State::Error]);
        assert_eq!(proxies[1].types["WADS"].state, State::NotSent);
        assert_eq!(proxies[0].types["WADS"].state, State::Synced);
    }

    #[test]
    fn the_table_has_istioctls_columns_and_names_refusals() {
        let proxies = read(syncz(), "istiod-x").unwrap();
        assert_eq!(
            text(&proxies, false),
            "\
NAME                    CLUSTER     ISTIOD    VERSION  SUBSCRIBED TYPES  STATE
ztunnel-b.istio-system  Kubernetes  istiod-x  0.1.0    2 (WADS,WDS)      STALE
ztunnel-a.istio-system  Kubernetes  istiod-x  0.1.0    2 (WADS,WDS)      ERROR

ztunnel-a.istio-system refuses WDS: shop/web: addresses[0]: an address of 3 bytes
"
        );
        assert!(text(&proxies, true).contains("SYNCED"));
    }

    #[test]
    fn what_was_compared_is_told_in_words() {
        let mut proxies = read(syncz(), "istiod-x").unwrap();
        proxies[0].differences = Some(Vec::new());
        let told = text(&proxies, true);
        assert!(
            told.contains("ztunnel-b.istio-system holds every"),
            "{told}"
        );
        proxies[0].differences = Some(vec![Difference {
            kind: "Policy",
            name: "shop/deny".to_owned(),
            how: compare::How::Missing,
        }]);
        let told = text(&proxies, true);
        assert!(told.contains("missing  Policy shop/deny"), "{told}");
    }
}
