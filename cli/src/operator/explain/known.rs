//! What dumps say, and what arguments mean in them.

use std::{collections::BTreeMap, net::IpAddr, sync::Arc};

use anyhow::{Context, Result, anyhow, bail};
use mesh::{
    dns,
    dump::ConfigDump,
    explain::{Destination, Explanation, Node, Nodes, Question, Request, explain},
    l7,
    view::MeshView,
    workload::Workload,
};

use serde_json::Value;

use crate::operator::{
    object::{Named, Type},
    ztunnel_config::dump::{Certificates, Dump},
};

/// A node's tunnel, as its dump tells.
pub(super) struct Tunnel {
    view: MeshView,
    certificates: BTreeMap<String, String>,
    /// None where the dump has no such section.
    pods: Option<BTreeMap<String, String>>,
    domain: Option<String>,
}

impl Tunnel {
    pub(super) fn read(dump: &Dump) -> Result<Self> {
        let config: ConfigDump =
            serde_json::from_value(dump.0.clone()).context("read the dump's mesh")?;
        let certificates = dump.items::<Certificates>("certificates")?;
        let certificates = certificates
            .into_iter()
            .map(|(_, it)| (it.identity, it.state));
        let pods = dump.pods()?.into_values().filter_map(|it| {
            let info = it.info?;
            Some((format!("{}/{}", info.namespace, info.name), it.state))
        });
        let pods = dump.0.get("workloadState").map(|_| pods.collect());
        let settings = &dump.0["config"];
        // Ours keeps it with the node's settings, upstream at the top.
        let domain = [
            &settings["clusterDomain"],
            &settings["node"]["clusterDomain"],
        ];
        let domain = domain
            .into_iter()
            .find_map(|it| it.as_str())
            .map(str::to_owned);
        Ok(Self {
            view: config.into_view(),
            certificates: certificates.collect(),
            pods,
            domain,
        })
    }

    fn node(&self) -> Node<'_> {
        Node {
            view: &self.view,
            certificates: Some(&self.certificates),
            pods: self.pods.as_ref(),
        }
    }
}

/// The tunnels that could be asked.
pub(super) struct Known {
    pub source: Tunnel,
    /// By node.
    pub others: BTreeMap<String, Tunnel>,
    /// What waypoints know of requests, by `namespace/name` of their pods.
    pub waypoints: BTreeMap<String, l7::view::View>,
}

/// What a waypoint knows of requests, as its dump tells.
pub(super) fn requests(dump: &Value) -> Result<l7::view::View> {
    let section = dump
        .get("l7")
        .context("the dump has no section l7: is it a waypoint's?")?;
    let all: Vec<l7::dump::Dumped> =
        serde_json::from_value(section.clone()).context("read the dump's section l7")?;
    Ok(l7::dump::read(&all)?)
}

/// The tunnels of one question: the source's is that of its node.
struct Asked<'a> {
    known: &'a Known,
    own: &'a str,
}

impl Nodes for Asked<'_> {
    fn node(&self, name: &str) -> Option<Node<'_>> {
        if name == self.own {
            return Some(self.known.source.node());
        }
        self.known.others.get(name).map(Tunnel::node)
    }

    fn waypoint(&self, pod: &Workload) -> Option<&l7::view::View> {
        let name = format!("{}/{}", pod.namespace, pod.name);
        self.known.waypoints.get(&name)
    }
}

impl Known {
    /// Explains a connection; names without a namespace are of `namespace`.
    pub(super) fn explain(
        &self,
        source: &str,
        destination: &str,
        namespace: &str,
        request: Option<Request>,
    ) -> Result<Explanation> {
        let source = self.source(source, namespace)?;
        let (host, port) = split(destination)?;
        let mut names = dns::Settings::default();
        if let Some(domain) = &self.source.domain {
            names.domain = domain.as_str().into();
        }
        let question = Question {
            destination: self.destination(host, &source, &names)?,
            source: Arc::clone(&source),
            port,
            names,
            request,
        };
        let asked = Asked {
            known: self,
            own: &source.node,
        };
        Ok(explain(self.source.node(), &asked, &question))
    }

    fn source(&self, text: &str, namespace: &str) -> Result<Arc<Workload>> {
        let view = &self.source.view;
        if let Ok(address) = text.parse::<IpAddr>() {
            let mut all = view.workloads();
            let found = all.find(|it| it.addresses.contains(&address.to_canonical()));
            return found
                .cloned()
                .ok_or_else(|| anyhow!("the mesh knows no pod with the address {address}"));
        }
        let named: Named = text.parse().map_err(|error: String| anyhow!(error))?;
        let namespace = named.namespace.as_deref().unwrap_or(namespace);
        self.pod(&named.name, namespace).with_context(|| {
            format!(
                "the tunnel does not know pod {namespace}/{}\n  remedy: is it running? Has the tunnel what the control plane \
                 knows (leyline status)?",
                named.name
            )
        })
    }

    /// A pod by its name, or one of those that a Deployment of this name made.
    fn pod(&self, name: &str, namespace: &str) -> Option<Arc<Workload>> {
        let here = || {
            self.source
                .view
                .workloads()
                .filter(|it| &*it.namespace == namespace)
        };
        let exact = here()
            .filter(|it| &*it.name == name)
            .min_by_key(|it| !it.uid.is_pod());
        let made = || {
            here()
                .filter(|it| &**it.workload_name() == name)
                .min_by_key(|it| it.name.clone())
        };
        exact.or_else(made).cloned()
    }

    fn destination(
        &self,
        host: &str,
        source: &Workload,
        names: &dns::Settings,
    ) -> Result<Destination> {
        if let Ok(address) = host.parse::<IpAddr>() {
            return Ok(Destination::Address(address));
        }
        if !host.contains('/') {
            let view = &self.source.view;
            let known = [dns::RecordType::A, dns::RecordType::Aaaa]
                .into_iter()
                .any(|kind| {
                    let answer = dns::answer(view, names, source, host, kind, mesh::draw::Draw(0));
                    answer != dns::Answer::Forward
                });
            return match self.pod_named(host, &source.namespace).filter(|_| !known) {
                Some(address) => Ok(Destination::Address(address)),
                None => Ok(Destination::Name(host.into())),
            };
        }
        let named: Named = host.parse().map_err(|error: String| anyhow!(error))?;
        let namespace = named.namespace.as_deref().unwrap_or(&source.namespace);
        match named.kind {
            Type::Service => Ok(Destination::Name(
                format!("{}.{namespace}", named.name).into(),
            )),
            _ => {
                let pod = self.pod(&named.name, namespace);
                let address = pod.and_then(|it| it.addresses.first().copied());
                address.map(Destination::Address).with_context(|| {
                    format!(
                        "the tunnel knows no pod {namespace}/{} with an address",
                        named.name
                    )
                })
            }
        }
    }

    /// A pod that is meant where no service has the name: `NAME` or `NAME.NAMESPACE`.
    fn pod_named(&self, host: &str, namespace: &str) -> Option<IpAddr> {
        let (name, namespace) = host.rsplit_once('.').unwrap_or((host, namespace));
        let pod = self
            .pod(name, namespace)
            .or_else(|| self.pod(host, namespace))?;
        pod.addresses.first().copied()
    }
}

/// `host:port`, IPv6 in brackets.
pub(super) fn split(text: &str) -> Result<(&str, u16)> {
    let wrong = || {
        anyhow!("{text:?} is not of the form DST:PORT, such as orders.shop:7000 or [fd00::7]:80")
    };
    let (host, port) = text.rsplit_once(':').ok_or_else(wrong)?;
    let port: u16 = port.parse().map_err(|_| wrong())?;
    let bare = host.strip_prefix('[').and_then(|it| it.strip_suffix(']'));
    if port == 0 || host.is_empty() || (bare.is_none() && host.contains(':')) {
        bail!(wrong());
    }
    Ok((bare.unwrap_or(host), port))
}
