mod peers;
mod scale;
mod wire;

use std::sync::Arc;

use proto::{
    ADDRESS_TYPE_URL as ADDRESS, AUTHORIZATION_TYPE_URL as POLICY, WAYPOINT_TYPE_URL as WAYPOINT,
    WORKLOAD_TYPE_URL as WORKLOAD, xds::DeltaDiscoveryRequest,
};
use tokio::time::Instant;

use super::{
    encode::{Content, Response},
    registry::{Peer, Registry},
    store::{Lagged, Store},
    subscriber::{ACK_PATIENCE, Subscriber, WINDOW},
};
use crate::{
    metrics::Metrics,
    object::Name,
    output::{GatewayProxy, Resource},
    testing::{changes, owned, pod, policy, service},
};

/// A subscriber without a socket, and its time.
struct Bench {
    store: Store,
    registry: Arc<Registry>,
    subscriber: Subscriber,
    now: Instant,
}

impl Bench {
    fn new(world: &[Arc<Resource>]) -> Self {
        let registry = Registry::new(Metrics::new());
        let bench = Self {
            store: Store::default(),
            subscriber: subscriber(&registry),
            registry,
            now: Instant::now(),
        };
        bench.apply(world, &[]);
        bench
    }

    fn apply(&self, upserts: &[Arc<Resource>], removals: &[&Arc<Resource>]) {
        self.store.apply(&changes(upserts, removals));
    }

    fn request(&mut self, request: DeltaDiscoveryRequest) {
        self.subscriber.request(request, self.now).unwrap();
    }

    fn subscribe(&mut self, type_url: &str, names: &[&str], not: &[&str]) {
        self.request(DeltaDiscoveryRequest {
            type_url: type_url.to_owned(),
            resource_names_subscribe: owned(names),
            resource_names_unsubscribe: owned(not),
            ..Default::default()
        });
    }

    /// Wildcard with what the proxy has from before.
    fn come_back(&mut self, type_url: &str, known: &[(&str, &str)]) {
        let versions = known
            .iter()
            .map(|(n, v)| ((*n).to_owned(), (*v).to_owned()));
        self.request(DeltaDiscoveryRequest {
            type_url: type_url.to_owned(),
            initial_resource_versions: versions.collect(),
            ..Default::default()
        });
    }

    fn ack(&mut self, response: &Response, error: Option<&str>) {
        self.request(DeltaDiscoveryRequest {
            type_url: response.type_url.to_string(),
            response_nonce: response.nonce.clone(),
            error_detail: error.map(|message| proto::google::rpc::Status {
                message: message.to_owned(),
                ..Default::default()
            }),
            ..Default::default()
        });
    }

    fn due(&self) -> Option<Instant> {
        let head = *self.store.watch().borrow();
        self.subscriber.due(head)
    }

    /// Lets time pass until something is owed, and acknowledges it.
    fn exchange(&mut self) -> Vec<Response> {
        self.now = self.due().expect("something is owed").max(self.now);
        let responses = self.subscriber.flush(&self.store, self.now).unwrap();
        responses
            .iter()
            .for_each(|response| self.ack(response, None));
        responses
    }
}

fn subscriber(registry: &Arc<Registry>) -> Subscriber {
    Subscriber::new(registry.connect(peer()), "node-1".into(), None)
}

fn peer() -> Peer {
    Peer {
        node_id: "ztunnel~1.2.3.4~ztunnel-1.istio-system~x".to_owned(),
        proxy: "ztunnel-1.istio-system".to_owned(),
        proxy_type: "ztunnel".to_owned(),
        node: "node-1".to_owned(),
        cluster_id: String::new(),
        version: String::new(),
        account: "istio-system/ztunnel".to_owned(),
        address: None,
    }
}

/// Responses in short: type, upserts (sorted), removals (sorted).
fn told(responses: &[Response]) -> Vec<(String, Vec<String>, Vec<String>)> {
    let short = |type_url: &str| type_url.rsplit('.').next().unwrap().to_owned();
    let all = responses.iter().map(|response| {
        let sorted = |names: &[mesh::names::Str]| {
            let mut names: Vec<String> = names.iter().map(ToString::to_string).collect();
            names.sort();
            names
        };
        let removals = match response.content {
            Content::Removals | Content::Both => sorted(&response.payload.removals.names),
            Content::Upserts | Content::Nothing => Vec::new(),
        };
        (
            short(&response.type_url),
            sorted(response.upserted()),
            removals,
        )
    });
    all.collect()
}

#[track_caller]
fn assert_told(responses: &[Response], expected: &[(&str, &[&str], &[&str])]) {
    let expected: Vec<_> = expected
        .iter()
        .map(|(kind, upserts, removals)| ((*kind).to_owned(), owned(upserts), owned(removals)))
        .collect();
    assert_eq!(told(responses), expected);
}

const POD_1: &str = "Kubernetes//Pod/shop/pod-1";
const POD_2: &str = "Kubernetes//Pod/shop/pod-2";
const POD_3: &str = "Kubernetes//Pod/shop/pod-3";
const WEB: &str = "shop/web.shop.svc.cluster.local";

#[test]
fn a_wildcard_gets_everything_and_then_only_changes() {
    let (one, two, web) = (
        pod(1, "a", &[WEB], "x"),
        pod(2, "b", &[], "x"),
        service("web", 1),
    );
    let mut bench = Bench::new(&[one.clone(), two.clone(), web]);
    bench.subscribe(ADDRESS, &[], &[]);
    assert_told(&bench.exchange(), &[("Address", &[POD_1, POD_2, WEB], &[])]);
    assert_eq!(bench.due(), None);
    bench.apply(&[pod(1, "a", &[WEB], "y"), pod(3, "a", &[], "x")], &[&two]);
    assert_told(&bench.exchange(), &[("Address", &[POD_1, POD_3], &[POD_2])]);
    bench.apply(&[pod(3, "a", &[], "x")], &[&two]);
    assert_eq!(
        bench.due(),
        None,
        "an equal resource and a repeated removal are no changes"
    );
}

#[test]
fn a_star_is_a_wildcard_and_workloads_are_pods_only() {
    let world = [pod(1, "a", &[WEB], "x"), service("web", 1)];
    let mut bench = Bench::new(&world);
    bench.subscribe(WORKLOAD, &["*"], &[]);
    let responses = bench.exchange();
    assert_told(&responses, &[("Workload", &[POD_1], &[])]);
    let body = super::view::View::of(WORKLOAD, None).body(&world[0]);
    let workload = <proto::workload::Workload as prost::Message>::decode(body).unwrap();
    assert_eq!(workload.uid, POD_1);
}

#[test]
fn policies_come_before_addresses_and_go_after_them() {
    let mut bench = Bench::new(&[pod(1, "a", &[], "x"), policy("old", 0)]);
    bench.subscribe(ADDRESS, &[], &[]);
    bench.subscribe(POLICY, &[], &[]);
    let first: &[(&str, &[&str], &[&str])] = &[
        ("Authorization", &["shop/old"], &[]),
        ("Address", &[POD_1], &[]),
    ];
    assert_told(&bench.exchange(), first);
    bench.apply(
        &[pod(1, "a", &[], "y"), policy("new", 0)],
        &[&policy("old", 0)],
    );
    assert_told(
        &bench.exchange(),
        &[
            ("Authorization", &["shop/new"], &[]),
            ("Address", &[POD_1], &[]),
            ("Authorization", &[], &["shop/old"]),
        ],
    );
}

#[test]
fn a_proxy_that_comes_back_gets_the_difference_only() {
    let (one, two) = (pod(1, "a", &[], "x"), pod(2, "a", &[], "x"));
    let (kept, new) = (policy("kept", 0), policy("new", 0));
    let mut bench = Bench::new(&[one.clone(), two.clone(), kept.clone(), new]);
    bench.come_back(
        ADDRESS,
        &[(POD_1, &one.version), (POD_2, "old"), (POD_3, "gone")],
    );
    bench.come_back(POLICY, &[("shop/kept", &kept.version)]);
    assert_told(
        &bench.exchange(),
        &[
            ("Authorization", &["shop/new"], &[]),
            ("Address", &[POD_2], &[POD_3]),
        ],
    );
}

#[test]
fn a_proxy_that_has_everything_gets_an_answer_with_nothing() {
    let one = pod(1, "a", &[], "x");
    let mut bench = Bench::new(std::slice::from_ref(&one));
    bench.come_back(ADDRESS, &[(POD_1, &one.version)]);
    assert_told(&bench.exchange(), &[("Address", &[], &[])]);
}

/// What one on-demand request is answered with.
#[track_caller]
fn on_demand(asked: &[&str], upserts: &[&str], removals: &[&str]) {
    let world = [
        pod(1, "elsewhere", &[WEB], "x"),
        pod(2, "elsewhere", &[WEB], "x"),
        pod(3, "elsewhere", &[], "x"),
        service("web", 1),
        service("other", 2),
    ];
    let mut bench = Bench::new(&world);
    bench.subscribe(ADDRESS, &["*"], &["*"]);
    assert_told(&bench.exchange(), &[("Address", &[], &[])]);
    bench.subscribe(ADDRESS, asked, &[]);
    assert_told(&bench.exchange(), &[("Address", upserts, removals)]);
}

#[test]
fn on_demand_names_stand_for_what_the_table_says() {
    on_demand(&[POD_3], &[POD_3], &[]);
    on_demand(&["/10.1.0.3"], &[POD_3], &[]);
    on_demand(&[WEB], &[POD_1, POD_2, WEB], &[]);
    on_demand(&["/10.96.0.1"], &[POD_1, POD_2, WEB], &[]);
    on_demand(&["/10.9.9.9"], &[], &["/10.9.9.9"]);
    on_demand(&["shop/none"], &[], &["shop/none"]);
    on_demand(&["/10.1.0.3", "/10.1.0.3", POD_3, "x"], &[POD_3], &["x"]);
}

#[test]
fn a_reader_on_demand_hears_of_what_it_follows_and_of_its_node() {
    let web = service("web", 1);
    let mut bench = Bench::new(&[web.clone(), pod(1, "elsewhere", &[WEB], "x")]);
    bench.subscribe(ADDRESS, &["*"], &["*"]);
    bench.exchange();
    bench.subscribe(ADDRESS, &["/10.96.0.1", "/10.1.0.9"], &[]);
    assert_told(
        &bench.exchange(),
        &[("Address", &[POD_1, WEB], &["/10.1.0.9"])],
    );

    bench.apply(
        &[pod(2, "elsewhere", &[WEB], "x"), pod(3, "node-1", &[], "x")],
        &[],
    );
    assert_told(&bench.exchange(), &[("Address", &[POD_2, POD_3], &[])]);

    bench.apply(&[pod(4, "elsewhere", &[], "x"), service("other", 2)], &[]);
    bench.now = bench.due().unwrap().max(bench.now);
    assert!(
        bench
            .subscriber
            .flush(&bench.store, bench.now)
            .unwrap()
            .is_empty()
    );

    bench.apply(&[pod(9, "elsewhere", &[], "x")], &[]);
    let late = "Kubernetes//Pod/shop/pod-9";
    assert_told(&bench.exchange(), &[("Address", &[late], &[])]);

    bench.subscribe(ADDRESS, &[], &[POD_1]);
    bench.apply(&[], &[&pod(1, "elsewhere", &[WEB], "x"), &web]);
    assert_told(&bench.exchange(), &[("Address", &[], &[WEB])]);
}

#[test]
fn a_service_that_appears_later_comes_with_its_workloads() {
    let mut bench = Bench::new(&[pod(1, "elsewhere", &[WEB], "x")]);
    bench.subscribe(ADDRESS, &["/10.96.0.1"], &[]);
    assert_told(&bench.exchange(), &[("Address", &[], &["/10.96.0.1"])]);
    bench.apply(&[service("web", 1)], &[]);
    assert_told(&bench.exchange(), &[("Address", &[POD_1, WEB], &[])]);
}

#[test]
fn a_reader_on_demand_that_comes_back_follows_what_it_has() {
    let one = pod(1, "elsewhere", &[], "x");
    let mut bench = Bench::new(&[one.clone(), pod(2, "elsewhere", &[], "x")]);
    let versions = [(POD_1, &*one.version), ("/10.1.0.2", ""), (POD_3, "gone")];
    bench.request(DeltaDiscoveryRequest {
        type_url: ADDRESS.to_owned(),
        resource_names_subscribe: owned(&["*"]),
        resource_names_unsubscribe: owned(&["*"]),
        initial_resource_versions: versions.map(|(n, v)| (n.to_owned(), v.to_owned())).into(),
        ..Default::default()
    });
    assert_told(&bench.exchange(), &[("Address", &[POD_2], &[POD_3])]);
    bench.apply(&[pod(1, "elsewhere", &[], "y")], &[]);
    assert_told(&bench.exchange(), &[("Address", &[POD_1], &[])]);
}

#[test]
fn the_workloads_of_its_node_come_unasked_to_a_reader_on_demand() {
    let mut bench = Bench::new(&[pod(1, "node-1", &[], "x"), pod(2, "elsewhere", &[], "x")]);
    bench.subscribe(ADDRESS, &["*"], &["*"]);
    assert_told(&bench.exchange(), &[("Address", &[POD_1], &[])]);
}

#[test]
fn changes_are_merged_while_an_answer_is_awaited_and_not_longer_than_patience() {
    let mut bench = Bench::new(&[pod(1, "a", &[], "0")]);
    bench.subscribe(ADDRESS, &[], &[]);
    bench.now = bench.due().unwrap();
    let unacked = bench.subscriber.flush(&bench.store, bench.now).unwrap();
    let sent = bench.now;
    for n in 0..1000 {
        bench.apply(
            &[pod(1, "a", &[], &n.to_string()), pod(2, "a", &[], "x")],
            &[],
        );
        bench.apply(&[], &[&pod(2, "a", &[], "x")]);
    }
    assert_eq!(
        bench.due(),
        Some(sent + ACK_PATIENCE),
        "it never acknowledges"
    );
    bench.ack(&unacked[0], None);
    assert_eq!(bench.due(), Some(sent + WINDOW), "or it does");
    assert_told(&bench.exchange(), &[("Address", &[POD_1], &[POD_2])]);
    assert_eq!(bench.due(), None);
}

#[test]
fn a_reader_that_never_acknowledges_hears_seldom_and_costs_little() {
    let mut bench = Bench::new(&[pod(1, "a", &[], "0")]);
    bench.subscribe(ADDRESS, &[], &[]);
    let mut sent = Vec::new();
    for n in 0..200 {
        bench.now = bench.due().unwrap();
        let responses = bench.subscriber.flush(&bench.store, bench.now).unwrap();
        sent.extend(responses.iter().map(|it| Arc::downgrade(&it.payload)));
        bench.apply(&[pod(1, "a", &[], &format!("n{n}"))], &[]);
        assert_eq!(bench.due(), Some(bench.now + ACK_PATIENCE));
    }
    // The first is the small world that is kept for newcomers.
    let mut forgotten = sent[1..100].iter();
    assert!(forgotten.all(|payload| payload.strong_count() == 0));
}

#[test]
fn changes_within_the_window_are_one_response() {
    let mut bench = Bench::new(&[]);
    bench.subscribe(ADDRESS, &[], &[]);
    bench.exchange();
    let last = bench.now;
    bench.apply(&[pod(1, "a", &[], "x")], &[]);
    bench.apply(&[pod(2, "a", &[], "x")], &[]);
    assert_eq!(bench.due(), Some(last + WINDOW));
    assert_told(&bench.exchange(), &[("Address", &[POD_1, POD_2], &[])]);
}

#[test]
fn stale_and_made_up_nonces_are_ignored() {
    let mut bench = Bench::new(&[pod(1, "a", &[], "x")]);
    bench.subscribe(ADDRESS, &[], &[]);
    let first = bench.exchange().remove(0);
    bench.ack(&first, Some("late"));
    bench.ack(
        &Response {
            nonce: "nonsense".to_owned(),
            ..first
        },
        Some("late"),
    );
    let report = &bench.registry.subscriptions()[0].types[ADDRESS];
    assert_eq!(report.last_error, None);
    assert_eq!(bench.due(), None);
}

#[test]
fn a_refused_resource_is_remembered_until_it_is_accepted() {
    let mut bench = Bench::new(&[pod(1, "a", &[], "x"), pod(2, "a", &[], "x")]);
    bench.subscribe(ADDRESS, &[], &[]);
    bench.now = bench.due().unwrap();
    let sent = bench.subscriber.flush(&bench.store, bench.now).unwrap();
    let message = format!("{POD_1}: bad waypoint: none; made/up: x; {POD_2}: bad");
    bench.ack(&sent[0], Some(&message));
    let rejected = |bench: &Bench| {
        let rejections = bench.registry.rejections();
        let mut names: Vec<_> = rejections.keys().map(|(_, n)| n.to_string()).collect();
        names.sort();
        names
    };
    assert_eq!(rejected(&bench), [POD_1, POD_2]);
    let report = bench
        .registry
        .subscriptions()
        .remove(0)
        .types
        .remove(ADDRESS)
        .unwrap();
    assert_eq!(report.last_error, Some(message));
    assert_eq!(report.rejected[POD_1], "bad waypoint: none");
    assert_eq!(report.acked, "", "a NACK acknowledges nothing");
    bench.apply(&[pod(1, "a", &[], "y")], &[]);
    bench.exchange();
    assert_eq!(rejected(&bench), [POD_2]);
    drop(bench.subscriber);
    assert!(
        bench.registry.subscriptions().is_empty(),
        "it leaves no trace"
    );
}

#[test]
fn too_many_types_or_names_end_the_stream() {
    let mut bench = Bench::new(&[]);
    let mut request = |type_url: String, name: String| {
        let request = DeltaDiscoveryRequest {
            type_url,
            resource_names_subscribe: vec![name],
            ..Default::default()
        };
        bench
            .subscriber
            .request(request, bench.now)
            .map_err(|status| status.code())
    };
    assert_eq!(
        request("t".to_owned(), "n".repeat(2000)),
        Err(tonic::Code::ResourceExhausted)
    );
    for n in 0..15 {
        request(format!("type-{n}"), "a".to_owned()).unwrap();
    }
    assert_eq!(
        request("one-more".to_owned(), "a".to_owned()),
        Err(tonic::Code::ResourceExhausted)
    );
}

#[test]
fn an_unknown_type_is_answered_with_nothing() {
    let mut bench = Bench::new(&[pod(1, "a", &[], "x")]);
    bench.subscribe("type.googleapis.com/made.Up", &[], &[]);
    assert_told(&bench.exchange(), &[("Up", &[], &[])]);
}

#[test]
fn those_who_stand_at_the_same_place_share_one_payload() {
    let bench = Bench::new(&[pod(1, "a", &[], "x")]);
    let mut subscribers: Vec<_> = (0..10).map(|_| subscriber(&bench.registry)).collect();
    for subscriber in &mut subscribers {
        let request = DeltaDiscoveryRequest {
            type_url: ADDRESS.to_owned(),
            ..Default::default()
        };
        subscriber.request(request, bench.now).unwrap();
    }
    let mut round = || {
        let head = *bench.store.watch().borrow();
        let payloads = subscribers.iter_mut().map(|subscriber| {
            let now = subscriber.due(head).unwrap_or(bench.now);
            let response = subscriber.flush(&bench.store, now).unwrap().remove(0);
            let ack = DeltaDiscoveryRequest {
                type_url: ADDRESS.to_owned(),
                response_nonce: response.nonce.clone(),
                ..Default::default()
            };
            subscriber.request(ack, now).unwrap();
            response.payload
        });
        let payloads: Vec<_> = payloads.collect();
        assert!(payloads.iter().all(|it| Arc::ptr_eq(it, &payloads[0])));
    };
    round();
    bench.apply(&[pod(2, "a", &[], "x")], &[]);
    round();
}

#[test]
fn a_reader_before_the_oldest_removal_must_start_over() {
    let bench = Bench::new(&[pod(1, "a", &[], "x")]);
    let mut behind = subscriber(&bench.registry);
    let mut on_demand = subscriber(&bench.registry);
    for (reader, names) in [(&mut behind, &[][..]), (&mut on_demand, &[POD_1][..])] {
        let request = DeltaDiscoveryRequest {
            type_url: ADDRESS.to_owned(),
            resource_names_subscribe: owned(names),
            ..Default::default()
        };
        reader.request(request, bench.now).unwrap();
        reader.flush(&bench.store, bench.now).unwrap();
    }
    let many: Vec<_> = (0..40_000).map(numbered).collect();
    bench.apply(&many, &[]);
    let gone: Vec<_> = many.iter().chain([&many[0]]).collect();
    bench.apply(&[], &gone);
    bench.apply(&[], &[&pod(1, "a", &[], "x")]);
    assert_eq!(behind.flush(&bench.store, bench.now).err(), Some(Lagged));
    let told = on_demand.flush(&bench.store, bench.now).unwrap();
    assert_told(&told, &[("Address", &[], &[POD_1])]);
}

fn route(gateway: &str, name: &str, version: &str) -> Arc<Resource> {
    Arc::new(Resource {
        type_url: WAYPOINT,
        scope: Some(Arc::new(Name::new("shop", gateway))),
        name: name.into(),
        aliases: Box::default(),
        version: version.into(),
        body: version.as_bytes().to_vec().into(),
        node: None,
        services: Box::default(),
    })
}

fn waypoint(bench: &Bench, gateway: &str) -> Subscriber {
    let gateway = Some(GatewayProxy {
        gateway: Name::new("shop", gateway),
        confined: false,
    });
    Subscriber::new(bench.registry.connect(peer()), "".into(), gateway)
}

#[test]
fn a_waypoint_gets_what_is_its_gateways_and_nobody_else_does() {
    let (mine, other) = (
        route("mine", "route/a", "1"),
        route("other", "route/a", "2"),
    );
    let mut bench = Bench::new(&[mine.clone(), other]);
    bench.subscribe(WAYPOINT, &["*", "route/a"], &[]);
    assert_told(&bench.exchange(), &[("Resource", &[], &["route/a"])]);
    bench.subscriber = waypoint(&bench, "mine");
    bench.subscribe(WAYPOINT, &[], &[]);
    assert_told(&bench.exchange(), &[("Resource", &["route/a"], &[])]);
    bench.apply(&[route("other", "route/b", "1")], &[]);
    bench.now = bench.due().unwrap().max(bench.now);
    let told = bench.subscriber.flush(&bench.store, bench.now).unwrap();
    assert!(told.is_empty(), "another waypoint's route is no news");
    bench.apply(&[route("mine", "route/b", "1")], &[&mine]);
    assert_told(
        &bench.exchange(),
        &[("Resource", &["route/b"], &["route/a"])],
    );
    assert_eq!(bench.store.count(WAYPOINT), 3);
}

/// An address that is one Gateway's alone.
fn address_of(gateway: &str) -> Arc<Resource> {
    let everyones = pod(2, "node-1", &[], "x");
    Arc::new(Resource {
        scope: Some(Arc::new(Name::new("shop", gateway))),
        ..(*everyones).clone()
    })
}

#[test]
fn a_gateway_between_networks_gets_of_each_type_what_is_for_it_and_nothing_else() {
    let everyones = pod(1, "node-1", &[], "x");
    let its = address_of("east-west");
    let mut bench = Bench::new(&[everyones, its.clone(), route("east-west", "route/a", "1")]);
    bench.subscriber = Subscriber::new(
        bench.registry.connect(peer()),
        "node-1".into(),
        Some(GatewayProxy {
            gateway: Name::new("shop", "east-west"),
            confined: true,
        }),
    );
    bench.subscribe(ADDRESS, &[], &[]);
    assert_told(&bench.exchange(), &[("Address", &[POD_2], &[])]);
    bench.subscribe(ADDRESS, &[POD_1], &[]);
    assert_told(&bench.exchange(), &[("Address", &[], &[POD_1])]);
    // Its copy is nobody else's, and not found by a name that is.
    bench.subscriber = waypoint(&bench, "mine");
    bench.subscribe(ADDRESS, &[], &[]);
    assert_told(&bench.exchange(), &[("Address", &[POD_1], &[])]);
    bench.apply(&[], &[&its]);
    let told = bench.subscriber.flush(&bench.store, bench.now).unwrap();
    assert!(told.is_empty(), "what a gateway loses is no news to others");
}

#[test]
fn a_waypoint_whose_gateway_was_forgotten_says_what_it_has() {
    let old = route("mine", "route/a", "1");
    let mut bench = Bench::new(std::slice::from_ref(&old));
    bench.subscriber = waypoint(&bench, "mine");
    bench.subscribe(WAYPOINT, &[], &[]);
    bench.exchange();
    bench.apply(&[], &[&old]);
    for n in 0..300 {
        let other = route(&format!("other-{n}"), "route/a", "1");
        bench.apply(std::slice::from_ref(&other), &[]);
        bench.apply(&[], &[&other]);
    }
    bench.apply(&[route("mine", "route/b", "1")], &[]);
    bench.now = bench.due().unwrap();
    let lagged = bench.subscriber.flush(&bench.store, bench.now).err();
    assert_eq!(lagged, Some(Lagged));
    bench.subscriber = waypoint(&bench, "mine");
    bench.come_back(WAYPOINT, &[("route/a", "1")]);
    assert_told(
        &bench.exchange(),
        &[("Resource", &["route/b"], &["route/a"])],
    );
}

fn numbered(n: u32) -> Arc<Resource> {
    Arc::new(Resource {
        type_url: ADDRESS,
        name: format!("uid-{n}").into(),
        ..Resource::clone(&pod(1, "a", &[], "x"))
    })
}
