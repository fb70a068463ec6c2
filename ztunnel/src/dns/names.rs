//! What the mesh says about names to one pod.

use std::{sync::Arc, time::Duration};

use mesh::{
    dns::{Answer, RecordType, Settings, answer},
    draw::Draw,
    outcome::Outcome,
    workload::Workload,
};

use net::dns::Transport;

use super::{
    message::Addresses,
    server::{Known, Names},
};
use crate::{metrics::DnsLabels, pod::Pod};

/// Answers for one pod, from its own point of view: never from that of a packet's source address.
pub(crate) struct PodNames {
    pod: Arc<Pod>,
    settings: Settings,
}

impl PodNames {
    pub(crate) fn new(pod: Arc<Pod>) -> Self {
        let config = &pod.node.config;
        let settings = Settings {
            domain: config.node.cluster_domain.clone(),
            search: Vec::new(),
            preferred_namespace: config.dns.preferred_service_namespace.clone(),
            ipv6: config.inpod.ipv6,
        };
        Self { pod, settings }
    }

    fn client(&self) -> Option<Arc<Workload>> {
        let node = &self.pod.node;
        match node.record(&node.state.view(), &self.pod.binding) {
            Outcome::Go(workload) => Some(workload),
            Outcome::Refuse(_) | Outcome::Need(_) => None,
        }
    }

    fn labels(&self, kind: &str, transport: Transport) -> DnsLabels {
        DnsLabels::new(kind, transport.as_str(), self.client().as_deref())
    }
}

impl Names for PodNames {
    async fn lookup(&self, name: &str, ipv6: bool) -> Known {
        let Ok((client, view)) = self.pod.record().await else {
            return Known::UnknownClient;
        };
        let kind = match ipv6 {
            true => RecordType::Aaaa,
            false => RecordType::A,
        };
        let draw = Draw(rand::random());
        let answered = answer(&view, &self.settings, &client, name, kind, draw);
        tell(&client, name, kind, &answered);
        match answered {
            Answer::Forward => Known::Nothing,
            Answer::Local(records) => Known::Addresses(Addresses {
                alias_of: records.cname.map(without_dot),
                addresses: records.addresses,
                ttl: records.ttl,
            }),
        }
    }

    fn asked(&self, kind: &str, transport: Transport) {
        self.pod
            .node
            .metrics
            .dns
            .asked(&self.labels(kind, transport));
    }

    fn forwarded(&self, kind: &str, transport: Transport, took: Duration, answered: bool) {
        let labels = self.labels(kind, transport);
        self.pod.node.metrics.dns.forwarded(&labels, took, answered);
    }
}

fn without_dot(mut name: String) -> String {
    if name.ends_with('.') {
        name.pop();
    }
    name
}

fn tell(client: &Workload, name: &str, kind: RecordType, answered: &Answer) {
    let (result, endpoints) = match answered {
        Answer::Forward => ("forward", 0),
        Answer::Local(records) => ("local", records.addresses.len()),
    };
    tracing::event!(
        target: "dns",
        tracing::Level::DEBUG,
        src.workload = %client.name,
        src.namespace = %client.namespace,
        query = ?kind,
        domain = name,
        result,
        endpoints,
        "dns question"
    );
}
