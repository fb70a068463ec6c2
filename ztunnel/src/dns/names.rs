//! What the mesh says about names to one pod.

use std::{collections::HashMap, sync::Arc, time::Duration};

use futures_util::future::join_all;
use mesh::{
    dns::{
        Answer, PortRecords, RecordType, Records, Settings, answer, answer_exactly, answer_port,
        knows, name_with_port, wanted,
    },
    draw::Draw,
    names::{NamespacedHostname, Str},
    outcome::Outcome,
    view::MeshView,
    workload::Workload,
};

use net::dns::{Transport, Upstreams};
use parking_lot::Mutex;
use tokio::time::Instant;

use super::{
    message::Addresses,
    server::{Known, Names},
};
use crate::{config::Mode, metrics::DnsLabels, pod::Pod};

/// Answers for one pod, from its own point of view: never from that of a packet's source address.
pub(crate) struct PodNames {
    pod: Arc<Pod>,
    settings: Settings,
    /// Services that a control plane which is asked for each does not have, and until when that counts.
    absent: Mutex<HashMap<NamespacedHostname, Instant>>,
}

/// How long a control plane may take to tell of a name, well below the five seconds that resolvers wait: without an
/// answer the question is forwarded.
const TOLD_WITHIN: Duration = Duration::from_secs(1);
/// How long what it does not have is not asked for again.
const ABSENT_FOR: Duration = Duration::from_secs(5);
/// How many such names are kept; at more, all are forgotten.
const MAX_ABSENT: usize = 1024;

impl PodNames {
    pub(crate) fn new(pod: Arc<Pod>) -> Self {
        let config = &pod.node.config;
        let settings = Settings {
            domain: config.node.cluster_domain.clone(),
            search: search_domains(&pod),
            preferred_namespace: config.dns.preferred_service_namespace.clone(),
            ipv6: config.inpod.ipv6,
        };
        Self {
            pod,
            settings,
            absent: Mutex::default(),
        }
    }

    /// The view with what `name` may mean, where the control plane tells only what it is asked for.
    async fn with_services(
        &self,
        client: &Workload,
        view: Arc<MeshView>,
        name: &str,
    ) -> Arc<MeshView> {
        if !self.pod.node.config.xds_on_demand {
            return view;
        }
        let now = Instant::now();
        let mut wanted = wanted(&view, &self.settings, client, name);
        wanted.retain(|key| !self.is_absent(key, now));
        if wanted.is_empty() {
            return view;
        }
        join_all(wanted.into_iter().map(|key| self.ask_for(key, now))).await;
        self.pod.node.state.view()
    }

    fn is_absent(&self, key: &NamespacedHostname, now: Instant) -> bool {
        self.absent
            .lock()
            .get(key)
            .is_some_and(|until| *until > now)
    }

    async fn ask_for(&self, key: NamespacedHostname, now: Instant) {
        let state = &self.pod.node.state;
        if state.fetch(&key.to_string(), now + TOLD_WITHIN).await {
            return;
        }
        let mut absent = self.absent.lock();
        if absent.len() >= MAX_ABSENT {
            absent.clear();
        }
        absent.insert(key, Instant::now() + ABSENT_FOR);
    }

    fn client(&self) -> Option<Arc<Workload>> {
        self.client_on_view().map(|(client, _)| client)
    }

    fn client_on_view(&self) -> Option<(Arc<Workload>, Arc<MeshView>)> {
        let node = &self.pod.node;
        let view = node.state.view();
        match node.record(&view, &self.pod.binding) {
            Outcome::Go(workload) => Some((workload, view)),
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
        let view = self.with_services(&client, view, name).await;
        let kind = address_type(ipv6);
        let draw = Draw(rand::random());
        let answered = answer(&view, &self.settings, &client, name, kind, draw);
        let endpoints = match &answered {
            Answer::Forward => None,
            Answer::Local(records) => Some(records.addresses.len()),
        };
        tell(&client, name, if ipv6 { "AAAA" } else { "A" }, endpoints);
        match answered {
            Answer::Forward => Known::Nothing,
            Answer::Local(records) => Known::Addresses(addresses(records)),
        }
    }

    async fn lookup_port(&self, name: &str) -> Option<PortRecords> {
        let of = name_with_port(name)?;
        let (client, view) = self.pod.record().await.ok()?;
        let view = self.with_services(&client, view, of).await;
        let draw = Draw(rand::random());
        let known = answer_port(&view, &self.settings, &client, name, draw);
        tell(
            &client,
            name,
            "SRV",
            known.as_ref().map(|it| it.targets.len()),
        );
        known
    }

    async fn lookup_alias(&self, name: &str, ipv6: bool) -> Option<Addresses> {
        let (client, view) = self.client_on_view()?;
        let view = self.with_services(&client, view, name).await;
        let (kind, draw) = (address_type(ipv6), Draw(rand::random()));
        match answer_exactly(&view, &self.settings, &client, name, kind, draw) {
            Answer::Forward => None,
            Answer::Local(records) => Some(addresses(records)),
        }
    }

    fn knows(&self, name: &str) -> bool {
        let known = self.client_on_view();
        known.is_some_and(|(client, view)| knows(&view, &self.settings, &client, name))
    }

    fn upstreams(&self, ours: Arc<Upstreams>) -> Arc<Upstreams> {
        let client = self.client();
        let Some(dns) = client.as_ref().and_then(|it| it.dns.as_ref()) else {
            return ours;
        };
        let ipv6 = self.settings.ipv6;
        let own = dns.nameservers.iter().filter(|it| ipv6 || it.is_ipv4());
        let own: Vec<_> = own.map(|it| (*it, 53).into()).collect();
        match (own.is_empty(), dns.cluster_first) {
            (true, _) => ours,
            (false, true) => Arc::new(ours.followed_by(own)),
            (false, false) => Arc::new(ours.replaced_by(own)),
        }
    }

    fn asked(&self, kind: &str, transport: Transport) {
        self.pod
            .node
            .metrics
            .dns
            .asked(&self.labels(kind, transport));
    }

    fn dropped(&self) {
        let client = self.client();
        self.pod.node.metrics.dns.dropped(client.as_deref());
    }

    fn forwarded(&self, kind: &str, transport: Transport, took: Duration, answered: bool) {
        let labels = self.labels(kind, transport);
        self.pod.node.metrics.dns.forwarded(&labels, took, answered);
    }
}

/// A tunnel of its own shares its workload's `resolv.conf`; otherwise the pod's record tells (node-tunnel 8).
fn search_domains(pod: &Pod) -> Vec<Str> {
    match pod.node.config.mode {
        Mode::Shared => Vec::new(),
        Mode::Dedicated(_) => {
            let read = pod.node.upstreams.current();
            read.search.iter().map(|it| it.as_str().into()).collect()
        }
    }
}

fn address_type(ipv6: bool) -> RecordType {
    match ipv6 {
        true => RecordType::Aaaa,
        false => RecordType::A,
    }
}

fn addresses(records: Records) -> Addresses {
    Addresses {
        alias_of: records.cname.map(without_dot),
        addresses: records.addresses,
        ttl: records.ttl,
    }
}

fn without_dot(mut name: String) -> String {
    if name.ends_with('.') {
        name.pop();
    }
    name
}

/// `endpoints`: how many were told; `None`: the question was forwarded.
fn tell(client: &Workload, name: &str, query: &str, endpoints: Option<usize>) {
    let result = if endpoints.is_some() {
        "local"
    } else {
        "forward"
    };
    let endpoints = endpoints.unwrap_or_default();
    tracing::event!(
        target: "dns",
        tracing::Level::DEBUG,
        src.workload = &*client.name,
        src.namespace = &*client.namespace,
        query,
        domain = format!("{name}."),
        result,
        endpoints,
        "dns question"
    );
}

#[cfg(test)]
mod tests {
    use mesh::{
        view::{Resource, Update},
        workload::PodDns,
    };
    use net::{
        socket::Factory,
        testing::{assert_line, encoded},
        xds::Demand,
    };
    use prometheus_client::registry::Registry;
    use tokio::sync::mpsc;

    use super::*;
    use crate::{
        config::OriginalSource,
        fixture::{binding, counted_node, lines, node_with, workload},
    };

    /// A pod's names in a mesh that is told on demand, and where there is nothing but the pod.
    fn on_demand() -> (PodNames, Asked) {
        let node = node_with(&[("XDS_ON_DEMAND", "true")]);
        node.state.publish(Update {
            upserts: vec![Resource::Workload(workload())],
            removals: Vec::new(),
        });
        let (tell, asked) = mpsc::unbounded_channel();
        let (demand, answering) = Demand::of_nothing(tell);
        node.state.fetch_through(demand);
        tokio::spawn(answering);
        let (sockets, never) = (Factory::default(), OriginalSource::Never);
        let pod = Pod::new(node, "uid".into(), binding(), sockets, never);
        (PodNames::new(pod), Asked(asked))
    }

    /// What the control plane is asked for.
    struct Asked(mpsc::UnboundedReceiver<String>);

    impl Asked {
        /// Since the last time.
        fn lately(&mut self) -> Vec<String> {
            let mut names: Vec<_> = std::iter::from_fn(|| self.0.try_recv().ok()).collect();
            names.sort();
            names
        }
    }

    const NOBODY: &str = "nobody.shop.svc.cluster.local";

    #[tokio::test(start_paused = true)]
    async fn what_the_control_plane_does_not_have_is_asked_for_again_after_five_seconds() {
        let (names, mut asked) = on_demand();
        assert_eq!(names.lookup(NOBODY, false).await, Known::Nothing);
        let first = asked.lately();
        assert!(first.contains(&format!("shop/{NOBODY}")), "{first:?}");
        for _ in 0..2 {
            tokio::time::advance(ABSENT_FOR - Duration::from_millis(1)).await;
            for ipv6 in [false, true] {
                assert_eq!(names.lookup(NOBODY, ipv6).await, Known::Nothing);
            }
            assert_eq!(asked.lately(), [""; 0], "it is remembered");
            tokio::time::advance(Duration::from_millis(1)).await;
            assert_eq!(names.lookup(NOBODY, false).await, Known::Nothing);
            assert_eq!(asked.lately(), first);
        }
        assert_eq!(ABSENT_FOR, Duration::from_secs(5));
    }

    #[tokio::test(start_paused = true)]
    async fn the_memory_of_what_the_control_plane_does_not_have_is_bounded() {
        let (names, mut asked) = on_demand();
        let mut most = 0;
        for number in 0..2 * MAX_ABSENT {
            let name = format!("nobody-{number}.shop.svc.cluster.local");
            names.lookup(&name, false).await;
            most = most.max(names.absent.lock().len());
        }
        assert_eq!(most, MAX_ABSENT, "at more, all are forgotten");
        assert!(asked.lately().len() >= 2 * MAX_ABSENT);
    }

    /// Whom a pod asks whose `dnsPolicy` and `dnsConfig` are these, where the node asks `10.0.0.53`.
    fn servers(settings: &[(&str, &str)], dns: Option<PodDns>) -> Vec<String> {
        let node = node_with(settings);
        let mut record = workload();
        record.dns = dns.map(Into::into);
        node.state.publish(Update {
            upserts: vec![Resource::Workload(record)],
            removals: Vec::new(),
        });
        let sockets = Factory::default();
        let never = OriginalSource::Never;
        let pod = Pod::new(node, "uid".into(), binding(), sockets, never);
        let ours = Upstreams::parse("nameserver 10.0.0.53", true);
        let asked = PodNames::new(pod).upstreams(Arc::new(ours));
        asked.servers.iter().map(ToString::to_string).collect()
    }

    #[tokio::test]
    async fn a_pod_asks_its_own_name_servers_after_the_nodes_or_instead() {
        let own = ["192.0.2.1".to_owned(), "2001:db8::1".to_owned()];
        let dns = |cluster_first, own: &[String]| {
            let searches = ["corp.example".to_owned()];
            PodDns::new(cluster_first, &searches, own, None)
        };
        let asked = |dns| servers(&[], dns);
        let (node, v4, v6) = ("10.0.0.53:53", "192.0.2.1:53", "[2001:db8::1]:53");
        assert_eq!(asked(None), [node]);
        assert_eq!(asked(dns(true, &[])), [node]);
        assert_eq!(asked(dns(true, &own)), [node, v4, v6]);
        assert_eq!(asked(dns(false, &own)), [v4, v6]);
        assert_eq!(asked(dns(false, &[])), [node], "there are no others");
        let without_ipv6 = [("IPV6_ENABLED", "false")];
        assert_eq!(servers(&without_ipv6, dns(false, &own)), [v4]);
    }

    #[tokio::test]
    async fn what_becomes_of_questions_is_counted_as_that_of_the_pod() {
        let mut registry = Registry::default();
        let node = counted_node(&[], &mut registry);
        let pod = Pod::new(
            node.clone(),
            "uid".into(),
            binding(),
            Factory::default(),
            OriginalSource::Never,
        );
        let names = PodNames::new(pod);
        let of_nobody =
            "source_canonical_service=\"unknown\",source_canonical_revision=\"unknown\"";
        names.dropped();
        node.state.publish(Update {
            upserts: vec![Resource::Workload(workload())],
            removals: Vec::new(),
        });
        let of_pod = "source_canonical_service=\"web-canonical\",source_canonical_revision=\"v2\"";
        for _ in 0..2 {
            names.dropped();
        }
        names.asked("a", Transport::Udp);
        names.forwarded("txt", Transport::Tcp, Duration::from_millis(1), false);
        let told = encoded(&registry);
        let tcp = "request_query_type=\"txt\",request_protocol=\"tcp\"";
        for line in [
            format!("leyline_dns_questions_dropped_total{{{of_nobody}}} 1"),
            format!("leyline_dns_questions_dropped_total{{{of_pod}}} 2"),
            format!(
                "istio_dns_requests_total{{request_query_type=\"a\",request_protocol=\"udp\",{of_pod}}} 1"
            ),
            format!("istio_dns_upstream_requests_total{{{tcp},{of_pod}}} 1"),
            format!("istio_dns_upstream_failures_total{{{tcp},{of_pod}}} 1"),
        ] {
            assert_line(&told, &line);
        }
    }

    #[test]
    fn a_question_is_logged_with_who_asked_and_what_became_of_it() {
        let told = lines("dns=debug", || {
            tell(&workload(), "db.shop", "AAAA", Some(2));
            tell(&workload(), "example.com", "A", None);
        });
        let who = "debug\tdns\tdns question\tsrc.workload=\"web-1\" src.namespace=\"shop\"";
        let expected = [
            format!("{who} query=\"AAAA\" domain=\"db.shop.\" result=\"local\" endpoints=2"),
            format!("{who} query=\"A\" domain=\"example.com.\" result=\"forward\" endpoints=0"),
        ];
        assert_eq!(told, expected);
    }
}
