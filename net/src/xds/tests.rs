use std::time::Instant as StdInstant;

use parking_lot::Mutex;
use prost_types::Any;
use proto::xds::{
    DeltaDiscoveryRequest, DeltaDiscoveryResponse,
    aggregated_discovery_service_server::{
        AggregatedDiscoveryService, AggregatedDiscoveryServiceServer,
    },
};
use tokio::{
    net::TcpListener,
    sync::{mpsc, watch},
    time::{Instant, timeout},
};
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::{
    Request, Status, Streaming, metadata::MetadataMap, transport::Endpoint, transport::Server,
};

use super::*;
use crate::{
    drain,
    fixture::SOON,
    ready::Ready,
    testing::{encoded, refusing},
};

const A: &str = proto::ADDRESS_TYPE_URL;
const P: &str = proto::AUTHORIZATION_TYPE_URL;
const ADDRESS: Subscription = Subscription {
    type_url: A,
    mode: Mode::Wildcard,
};
const POLICY: Subscription = Subscription {
    type_url: P,
    mode: Mode::Wildcard,
};
const ON_DEMAND: Subscription = Subscription {
    type_url: A,
    mode: Mode::OnDemand,
};

/// One stream, as the server sees it.
struct Stream {
    metadata: MetadataMap,
    requests: Streaming<DeltaDiscoveryRequest>,
    responses: mpsc::Sender<Result<DeltaDiscoveryResponse, Status>>,
}

impl Stream {
    async fn request(&mut self) -> DeltaDiscoveryRequest {
        let request = timeout(SOON, self.requests.message()).await;
        request.expect("soon").expect("open").expect("a request")
    }

    async fn respond(&self, response: DeltaDiscoveryResponse) {
        self.responses.send(Ok(response)).await.expect("open");
    }

    /// The stream's first requests, answered by nothing.
    async fn greeting(&mut self, count: usize) -> Vec<DeltaDiscoveryRequest> {
        let mut requests = Vec::new();
        for _ in 0..count {
            requests.push(self.request().await);
        }
        requests
    }

    async fn end(self, status: Status) {
        let _ = self.responses.send(Err(status)).await;
    }
}

struct Fake(mpsc::Sender<Stream>);

#[tonic::async_trait]
impl AggregatedDiscoveryService for Fake {
    type DeltaAggregatedResourcesStream = ReceiverStream<Result<DeltaDiscoveryResponse, Status>>;

    async fn delta_aggregated_resources(
        &self,
        request: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<tonic::Response<Self::DeltaAggregatedResourcesStream>, Status> {
        let (responses, outgoing) = mpsc::channel(16);
        let stream = Stream {
            metadata: request.metadata().clone(),
            requests: request.into_inner(),
            responses,
        };
        let _ = self.0.send(stream).await;
        Ok(tonic::Response::new(ReceiverStream::new(outgoing)))
    }
}

/// Refuses resources whose name begins with "bad"; keeps the rest.
#[derive(Clone)]
struct Recorder(Arc<watch::Sender<BTreeMap<String, Bytes>>>);

impl Recorder {
    /// Waits until exactly these names are known.
    async fn knows(&self, names: &[&str]) {
        let mut known = self.0.subscribe();
        let waited = known.wait_for(|known| known.keys().eq(names));
        // Longer than the client's own waits, which a paused clock jumps over.
        let found = timeout(SOON * 3, waited).await.is_ok();
        assert!(found, "{:?}, not {names:?}", self.0.borrow().keys());
    }
}

impl Handler for Recorder {
    fn apply(&mut self, response: Response) -> Vec<Rejection> {
        let (bad, good): (Vec<_>, Vec<_>) = response
            .resources
            .into_iter()
            .partition(|resource| resource.name.starts_with("bad"));
        self.0.send_modify(|known| {
            known.extend(good.into_iter().map(|r| (r.name.to_string(), r.body)));
            known.retain(|name, _| !response.removed.contains(name));
        });
        let reject = |resource: Resource| Rejection {
            name: resource.name.to_string(),
            reason: "as arranged".to_owned(),
        };
        bad.into_iter().map(reject).collect()
    }
}

struct Rig {
    streams: mpsc::Receiver<Stream>,
    known: Recorder,
    demand: Demand,
    ready: Ready,
    registry: Registry,
    trigger: drain::Trigger,
}

impl Rig {
    async fn new(subscriptions: &[Subscription]) -> Self {
        Self::with(subscriptions, |_| {}).await
    }

    async fn with(subscriptions: &[Subscription], change: impl FnOnce(&mut Config)) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("bound");
        let (sender, streams) = mpsc::channel(4);
        let service = AggregatedDiscoveryServiceServer::new(Fake(sender));
        let serving = Server::builder()
            .add_service(service)
            .serve_with_incoming(TcpListenerStream::new(listener));
        tokio::spawn(serving);
        let ready = Ready::new();
        let mut registry = Registry::default();
        let endpoint = Endpoint::from_shared(format!("http://{address}")).expect("an address");
        let mut config = Config {
            connect: Arc::new(move || Ok(endpoint.connect_lazy())),
            token: None,
            metadata: Vec::new(),
            node: node(),
            subscriptions: subscriptions.to_vec(),
            answer_deadline: SOON,
            ready: Some(ready.gate("state manager")),
            metrics: Metrics::register(&mut registry),
        };
        change(&mut config);
        let known = Recorder(Arc::default());
        let (client, demand) = Client::new(config, known.clone());
        let (trigger, drain) = drain::channel();
        tokio::spawn(client.run(drain));
        Self {
            streams,
            known,
            demand,
            ready,
            registry,
            trigger,
        }
    }

    async fn stream(&mut self) -> Stream {
        let stream = timeout(SOON, self.streams.recv()).await;
        stream.expect("soon").expect("the server runs")
    }

    fn metrics(&self) -> String {
        encoded(&self.registry)
    }
}

fn node() -> Node {
    Node {
        kind: NodeKind::Ztunnel,
        instance_ip: "10.0.0.9".to_owned(),
        pod_name: "ztunnel-x".to_owned(),
        pod_namespace: "istio-system".to_owned(),
        node_name: "node-a".to_owned(),
        metadata: [("CLUSTER_ID".to_owned(), "Kubernetes".into())].into(),
    }
}

fn resource(type_url: &str, name: &str, version: &str, aliases: &[&str]) -> wire::Resource {
    wire::Resource {
        name: name.to_owned(),
        version: version.to_owned(),
        aliases: aliases.iter().map(|alias| (*alias).to_owned()).collect(),
        resource: Some(Any {
            type_url: type_url.to_owned(),
            value: vec![1, 2, 3],
        }),
        ..Default::default()
    }
}

fn response(
    type_url: &str,
    nonce: &str,
    resources: Vec<wire::Resource>,
    removed: &[&str],
) -> DeltaDiscoveryResponse {
    DeltaDiscoveryResponse {
        type_url: type_url.to_owned(),
        nonce: nonce.to_owned(),
        resources,
        removed_resources: removed.iter().map(|name| (*name).to_owned()).collect(),
        ..Default::default()
    }
}

fn addresses(nonce: &str, names: &[(&str, &str)]) -> DeltaDiscoveryResponse {
    let resources = names.iter();
    let resources = resources.map(|(name, version)| resource(A, name, version, &[]));
    response(A, nonce, resources.collect(), &[])
}

fn ack(type_url: &str, nonce: &str) -> DeltaDiscoveryRequest {
    DeltaDiscoveryRequest {
        type_url: type_url.to_owned(),
        response_nonce: nonce.to_owned(),
        ..Default::default()
    }
}

fn versions(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    let pairs = pairs.iter();
    pairs
        .map(|(name, v)| ((*name).to_owned(), (*v).to_owned()))
        .collect()
}

#[tokio::test]
async fn the_first_requests_say_who_asks_and_for_what() {
    let mut rig = Rig::with(&[ADDRESS, POLICY], |config| {
        config.token = Some(Token::Static("secret\n".to_owned()));
        config.metadata = vec![
            ("ClusterID".to_owned(), "Kubernetes".to_owned()),
            ("x-more".to_owned(), "yes".to_owned()),
        ];
    })
    .await;
    let mut stream = rig.stream().await;
    assert_eq!(
        stream.metadata.get("authorization").expect("a token"),
        "Bearer secret"
    );
    assert_eq!(stream.metadata.get("clusterid").expect("set"), "Kubernetes");
    assert_eq!(stream.metadata.get("x-more").expect("set"), "yes");
    let requests = stream.greeting(2).await;
    for (request, type_url) in requests.iter().zip([A, P]) {
        assert_eq!(request.type_url, type_url);
        assert!(request.resource_names_subscribe.is_empty());
        assert!(request.initial_resource_versions.is_empty());
        let node = request.node.as_ref().expect("istiod wants it");
        let id = "ztunnel~10.0.0.9~ztunnel-x.istio-system~istio-system.svc.cluster.local";
        assert_eq!(node.id, id);
        let fields = &node.metadata.as_ref().expect("metadata").fields;
        let expected = [
            "CLUSTER_ID",
            "INSTANCE_IPS",
            "NAME",
            "NAMESPACE",
            "NODE_NAME",
        ];
        assert!(fields.keys().eq(expected.iter()), "{fields:?}");
    }
}

#[tokio::test]
async fn a_rotated_token_is_used_at_the_next_connection() {
    let file = tempfile::NamedTempFile::new().expect("a file");
    std::fs::write(file.path(), "first").expect("writable");
    let path = file.path().to_owned();
    let mut rig = Rig::with(&[ADDRESS], |config| config.token = Some(Token::File(path))).await;
    let stream = rig.stream().await;
    assert_eq!(
        stream.metadata.get("authorization").expect("a token"),
        "Bearer first"
    );
    std::fs::write(file.path(), "second\n").expect("writable");
    stream.end(Status::unknown("bye")).await;
    let stream = rig.stream().await;
    assert_eq!(
        stream.metadata.get("authorization").expect("a token"),
        "Bearer second"
    );
}

#[tokio::test]
async fn good_resources_are_applied_and_acknowledged() {
    let mut rig = Rig::new(&[ADDRESS, POLICY]).await;
    let mut stream = rig.stream().await;
    stream.greeting(2).await;
    assert!(!rig.ready.is_ready());
    stream
        .respond(addresses("n1", &[("a", "1"), ("b", "1")]))
        .await;
    assert_eq!(stream.request().await, ack(A, "n1"));
    rig.known.knows(&["a", "b"]).await;
    assert!(!rig.ready.is_ready(), "policies are still to come");
    stream.respond(response(P, "n2", Vec::new(), &[])).await;
    assert_eq!(stream.request().await, ack(P, "n2"));
    timeout(SOON, rig.ready.wait())
        .await
        .expect("both types answered");
    stream.respond(response(A, "n3", Vec::new(), &["a"])).await;
    assert_eq!(stream.request().await, ack(A, "n3"));
    rig.known.knows(&["b"]).await;
    let text = rig.metrics();
    for line in [
        format!("istio_xds_message_total{{url=\"{A}\"}} 2"),
        format!("istio_xds_message_bytes_total{{url=\"{A}\"}} 6"),
    ] {
        assert!(text.contains(&line), "{line} in {text}");
    }
}

#[tokio::test]
async fn a_bad_resource_costs_neither_the_good_ones_nor_readiness() {
    let mut rig = Rig::new(&[ADDRESS]).await;
    let mut stream = rig.stream().await;
    stream.greeting(1).await;
    let mut mixed = addresses("n1", &[("bad-1", "1"), ("good", "1")]);
    mixed.resources.push(resource(P, "policy", "1", &[]));
    mixed.resources.push(wire::Resource {
        name: "empty".to_owned(),
        ..Default::default()
    });
    stream.respond(mixed).await;
    let nack = stream.request().await;
    assert_eq!(
        (nack.type_url.as_str(), nack.response_nonce.as_str()),
        (A, "n1")
    );
    let detail = nack.error_detail.expect("a NACK");
    assert_eq!(detail.code, 0);
    let expected =
        format!("policy: resource: is a {P:?}; empty: resource: missing; bad-1: as arranged");
    assert_eq!(detail.message, expected);
    rig.known.knows(&["good"]).await;
    timeout(SOON, rig.ready.wait())
        .await
        .expect("ready all the same");
    stream.end(Status::unknown("bye")).await;
    let mut stream = rig.stream().await;
    let again = stream.greeting(1).await;
    assert_eq!(
        again[0].initial_resource_versions,
        versions(&[("good", "1")])
    );
}

#[tokio::test]
async fn readiness_is_not_reached_by_refused_resources_alone() {
    let mut rig = Rig::new(&[ADDRESS]).await;
    let mut stream = rig.stream().await;
    stream.greeting(1).await;
    stream.respond(addresses("n1", &[("bad-1", "1")])).await;
    assert!(stream.request().await.error_detail.is_some());
    assert!(!rig.ready.is_ready());
    stream.respond(addresses("n2", &[])).await;
    stream.request().await;
    timeout(SOON, rig.ready.wait())
        .await
        .expect("an empty mesh is a state");
}

#[tokio::test]
async fn a_reconnect_tells_the_versions_that_were_taken() {
    let mut rig = Rig::new(&[ADDRESS, POLICY]).await;
    let mut stream = rig.stream().await;
    stream.greeting(2).await;
    stream
        .respond(addresses("n1", &[("a", "1"), ("b", "1"), ("c", "1")]))
        .await;
    stream.respond(addresses("n2", &[("a", "2")])).await;
    stream.respond(response(A, "n3", Vec::new(), &["b"])).await;
    stream
        .respond(response(P, "n4", vec![resource(P, "p/q", "", &[])], &[]))
        .await;
    for _ in 0..4 {
        stream.request().await;
    }
    stream
        .end(Status::unavailable("transport is closing"))
        .await;
    let mut stream = rig.stream().await;
    let requests = stream.greeting(2).await;
    let expected = versions(&[("a", "2"), ("c", "1")]);
    assert_eq!(requests[0].initial_resource_versions, expected);
    assert!(requests[0].node.is_some());
    let expected = versions(&[("p/q", "")]);
    assert_eq!(requests[1].initial_resource_versions, expected);
    rig.known.knows(&["a", "c", "p/q"]).await;
    let text = rig.metrics();
    let line = "istio_xds_connection_terminations_total{reason=\"Reconnect\"} 1";
    assert!(text.contains(line), "{text}");
}

#[tokio::test]
async fn an_update_that_is_refused_keeps_the_version_before() {
    let mut session = session::Session::new(&[ADDRESS]);
    let mut refuse = Recorder(Arc::default());
    let mut take = |session: &mut session::Session, response| {
        let incoming = session.read(response).expect("followed");
        session.take(incoming, &mut refuse)
    };
    take(&mut session, addresses("1", &[("bad", "1"), ("good", "1")]));
    take(&mut session, addresses("2", &[("good", "2")]));
    let mut broken = addresses("3", &[("good", "3")]);
    broken.resources[0].resource = None;
    take(&mut session, broken);
    let first = session.first_requests(&node(), session::Versions::Told, &[]);
    let expected = versions(&[("good", "2")]);
    assert_eq!(first[0].initial_resource_versions, expected);
}

#[tokio::test]
async fn a_response_beyond_grpcs_usual_limit_is_taken() {
    let mut rig = Rig::new(&[ADDRESS]).await;
    let mut stream = rig.stream().await;
    stream.greeting(1).await;
    let mut large = addresses("n1", &[("a", "1")]);
    large.resources[0].resource = Some(Any {
        type_url: A.to_owned(),
        value: vec![0; 8 * 1024 * 1024],
    });
    stream.respond(large).await;
    assert_eq!(stream.request().await, ack(A, "n1"));
    rig.known.knows(&["a"]).await;
}

#[tokio::test]
async fn a_type_that_was_not_asked_for_is_acknowledged_and_ignored() {
    let mut rig = Rig::new(&[ADDRESS]).await;
    let mut stream = rig.stream().await;
    stream.greeting(1).await;
    stream
        .respond(response("type.googleapis.com/x", "n1", Vec::new(), &[]))
        .await;
    assert_eq!(stream.request().await, ack("type.googleapis.com/x", "n1"));
}

#[tokio::test]
async fn on_demand_subscribes_to_nothing_and_is_not_awaited() {
    let mut rig = Rig::new(&[ON_DEMAND, POLICY]).await;
    let mut stream = rig.stream().await;
    let requests = stream.greeting(2).await;
    assert_eq!(requests[0].resource_names_subscribe, ["*"]);
    assert_eq!(requests[0].resource_names_unsubscribe, ["*"]);
    assert!(requests[1].resource_names_subscribe.is_empty());
    stream.respond(response(P, "n1", Vec::new(), &[])).await;
    timeout(SOON, rig.ready.wait())
        .await
        .expect("policies are enough");
}

#[tokio::test]
async fn an_alias_wakes_all_who_wait_for_it() {
    let mut rig = Rig::new(&[ON_DEMAND]).await;
    let mut stream = rig.stream().await;
    stream.greeting(1).await;
    let ask = |key: &'static str| {
        let demand = rig.demand.clone();
        tokio::spawn(async move { demand.resource(key, Instant::now() + SOON).await })
    };
    let (first, second) = (ask("/10.0.0.1"), ask("/10.0.0.1"));
    let request = stream.request().await;
    assert_eq!(request.resource_names_subscribe, ["/10.0.0.1"]);
    assert!(request.response_nonce.is_empty() && request.node.is_none());
    let found = resource(A, "uid-1", "1", &["/10.0.0.1", "/fd00::1"]);
    stream.respond(response(A, "n1", vec![found], &[])).await;
    for waiter in [first, second] {
        assert_eq!(waiter.await.expect("no panic"), Ok(Found::Arrived));
    }
    assert_eq!(stream.request().await, ack(A, "n1"), "asked once for both");
    let third = ask("/10.0.0.9");
    assert_eq!(
        stream.request().await.resource_names_subscribe,
        ["/10.0.0.9"]
    );
    stream
        .respond(response(A, "n2", Vec::new(), &["/10.0.0.9"]))
        .await;
    assert_eq!(third.await.expect("no panic"), Ok(Found::Absent));
    assert_eq!(stream.request().await, ack(A, "n2"));
    let forgotten = stream.request().await;
    assert_eq!(forgotten.resource_names_unsubscribe, ["/10.0.0.9"]);
}

#[tokio::test]
async fn a_demand_survives_a_reconnect_and_ends_at_its_deadline() {
    let mut rig = Rig::new(&[ON_DEMAND]).await;
    let mut stream = rig.stream().await;
    stream.greeting(1).await;
    let demand = rig.demand.clone();
    let waiter = tokio::spawn(async move { demand.resource("a/web", Instant::now() + SOON).await });
    stream.request().await;
    stream.end(Status::unknown("bye")).await;
    let mut stream = rig.stream().await;
    let first = stream.greeting(1).await;
    assert_eq!(
        first[0].initial_resource_versions,
        versions(&[("a/web", "")])
    );
    stream.respond(addresses("n1", &[("a/web", "1")])).await;
    assert_eq!(waiter.await.expect("no panic"), Ok(Found::Arrived));
    let soon = Instant::now() + Duration::from_millis(20);
    let late = rig.demand.resource("a/never", soon).await;
    assert_eq!(late, Err(DemandError::Timeout));
    assert!(rig.demand.0.all().is_empty(), "nobody waits any more");
}

#[tokio::test]
async fn versions_are_withheld_from_a_server_that_finds_them_too_long() {
    let mut rig = Rig::new(&[ADDRESS]).await;
    let mut stream = rig.stream().await;
    stream.greeting(1).await;
    stream
        .respond(addresses("n1", &[("gone", "1"), ("kept", "1")]))
        .await;
    stream.request().await;
    stream
        .end(Status::resource_exhausted(
            "received message larger than max",
        ))
        .await;
    let mut stream = rig.stream().await;
    let first = stream.greeting(1).await;
    assert!(first[0].initial_resource_versions.is_empty());
    rig.known.knows(&["gone", "kept"]).await;
    stream
        .respond(addresses("n2", &[("kept", "2"), ("new", "1")]))
        .await;
    stream.request().await;
    tokio::time::pause();
    rig.known.knows(&["kept", "new"]).await;
}

#[tokio::test]
async fn a_server_that_never_answers_is_left() {
    let mut rig = Rig::with(&[ADDRESS], |config| {
        // Long enough for the second one's answer on a machine that has others' work to do.
        config.answer_deadline = Duration::from_secs(2);
    })
    .await;
    let _silent = rig.stream().await;
    let mut stream = rig.stream().await;
    stream.greeting(1).await;
    stream.respond(addresses("n1", &[("a", "1")])).await;
    rig.known.knows(&["a"]).await;
    let text = rig.metrics();
    assert!(
        text.contains("terminations_total{reason=\"Error\"} 1"),
        "{text}"
    );
}

/// Listens and answers every connection with `bytes`, or with nothing.
async fn rude(bytes: &'static [u8]) -> std::net::SocketAddr {
    use tokio::io::AsyncWriteExt;
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("bound");
    tokio::spawn(async move {
        let mut open = Vec::new();
        while let Ok((mut stream, _)) = listener.accept().await {
            let _ = stream.write_all(bytes).await;
            open.push(stream);
        }
    });
    address
}

async fn ends_for(address: std::net::SocketAddr, expected: &str) {
    let endpoint = Endpoint::from_shared(format!("http://{address}")).expect("an address");
    let rig = Rig::with(&[ADDRESS], |config| {
        config.connect = Arc::new(move || Ok(endpoint.connect_lazy()));
        config.answer_deadline = Duration::from_millis(100);
    })
    .await;
    let deadline = StdInstant::now() + SOON;
    while !rig.metrics().contains(expected) {
        assert!(
            StdInstant::now() < deadline,
            "{expected} in {}",
            rig.metrics()
        );
        tokio::task::yield_now().await;
    }
    assert!(!rig.ready.is_ready());
}

#[tokio::test]
async fn nonsense_and_silence_and_absence_are_counted_and_survived() {
    ends_for(rude(b"").await, "reason=\"Error\"").await;
    ends_for(
        rude(b"HTTP/1.1 200 OK\r\n\r\nnonsense").await,
        "terminations_total{",
    )
    .await;
    let (address, _held) = refusing();
    ends_for(address, "reason=\"ConnectionError\"").await;
}

#[tokio::test]
async fn a_clean_end_is_followed_by_another_connection() {
    let mut rig = Rig::new(&[ADDRESS]).await;
    let mut stream = rig.stream().await;
    stream.greeting(1).await;
    stream.respond(addresses("n1", &[("a", "1")])).await;
    stream.request().await;
    drop(stream);
    rig.stream().await;
    rig.known.knows(&["a"]).await;
    assert!(
        rig.metrics().contains("{reason=\"Complete\"} 1"),
        "{}",
        rig.metrics()
    );
}

#[tokio::test]
async fn a_draining_tunnel_still_hears_of_policy_and_ends_when_forced() {
    let mut rig = Rig::new(&[ADDRESS]).await;
    let mut stream = rig.stream().await;
    stream.greeting(1).await;
    rig.trigger.start(drain::Mode::graceful(SOON));
    stream.respond(addresses("n1", &[("a", "1")])).await;
    assert_eq!(stream.request().await, ack(A, "n1"));
    timeout(SOON, rig.trigger.finished())
        .await
        .expect("not held open");
    rig.trigger.start(drain::Mode::Immediate);
    let ended = timeout(SOON, stream.requests.message())
        .await
        .expect("soon");
    assert!(!matches!(ended, Ok(Some(_))), "{ended:?}");
}

#[tokio::test]
async fn too_many_demands_are_refused() {
    let waiters = Arc::new(demand::Waiters::default());
    let demand = Demand(Arc::clone(&waiters));
    let deadline = Instant::now() + SOON;
    let held = Mutex::new(Vec::new());
    for n in 0..10_000 {
        let demand = demand.clone();
        let mut waiting = Box::pin(async move { demand.resource(&n.to_string(), deadline).await });
        assert!(futures_util::poll!(&mut waiting).is_pending());
        held.lock().push(waiting);
    }
    let one_more = demand.resource("x", deadline).await;
    assert_eq!(one_more, Err(DemandError::TooMany));
    held.lock().clear();
    assert!(waiters.all().is_empty());
}

#[tokio::test]
async fn an_answered_waiter_does_not_take_the_next_question_with_it() {
    let waiters = Arc::new(demand::Waiters::default());
    let deadline = Instant::now() + SOON;
    let ask = || {
        let demand = Demand(Arc::clone(&waiters));
        Box::pin(async move { demand.resource("x", deadline).await })
    };
    let mut first = ask();
    assert!(futures_util::poll!(&mut first).is_pending());
    waiters.answer("x", Found::Absent);
    let mut second = ask();
    assert!(futures_util::poll!(&mut second).is_pending());
    assert_eq!(first.await, Ok(Found::Absent));
    waiters.answer("x", Found::Arrived);
    assert_eq!(second.await, Ok(Found::Arrived));
}

#[test]
fn a_token_is_never_printed() {
    let token = Token::Static("secret".to_owned());
    assert_eq!(format!("{token:?}"), "Static(..)");
}
