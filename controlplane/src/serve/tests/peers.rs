//! Against the clients that node tunnels really use.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use mesh::identity::Identity;
use net::{
    ca::{CaClient, CaConfig, Impersonation, Issuer as _},
    clock::SystemClock,
    drain,
    tls::{KeyExchange, Policy, Versions, control_plane},
    xds::{Client, Config, Found, Handler, Mode, Node, Rejection, Response, Subscription, Token},
};
use parking_lot::Mutex;
use proto::{ADDRESS_TYPE_URL as ADDRESS, AUTHORIZATION_TYPE_URL as POLICY};
use tokio::{sync::watch, time::Instant};

use super::{POD_1, POD_2};
use crate::testing::{DEADLINE, NAME, Plane, pod, policy, service};

/// What a proxy has, by name, with what it was told in order.
#[derive(Clone, Default)]
struct Proxy {
    has: Arc<Mutex<BTreeSet<String>>>,
    refuses: Arc<Mutex<Option<String>>>,
    responses: watch::Sender<usize>,
}

impl Handler for Proxy {
    fn apply(&mut self, response: Response) -> Vec<Rejection> {
        let refused = self.refuses.lock().clone();
        let mut has = self.has.lock();
        let mut rejections = Vec::new();
        for resource in response.resources {
            if refused.as_deref() == Some(&resource.name) {
                let reason = "the test does not like it".to_owned();
                rejections.push(Rejection {
                    name: resource.name.to_string(),
                    reason,
                });
            } else {
                has.insert(resource.name.to_string());
            }
        }
        response.removed.iter().for_each(|name| {
            has.remove(name);
        });
        self.responses.send_modify(|count| *count += 1);
        rejections
    }
}

impl Proxy {
    async fn until(&self, done: impl Fn(&BTreeSet<String>) -> bool) {
        let mut responses = self.responses.subscribe();
        let met = responses.wait_for(|_| done(&self.has.lock()));
        let met = tokio::time::timeout(DEADLINE, met).await;
        met.expect("within the deadline").unwrap();
    }
}

fn control_plane(plane: &Plane) -> control_plane::Config {
    let clock = Arc::new(SystemClock);
    control_plane::Config {
        address: format!("https://{}", plane.address).parse().unwrap(),
        roots: control_plane::RootSource::Inline(plane.authority.load().roots_pem()),
        hostname: Some(NAME.to_owned()),
        policy: Policy::new(Versions::Tls13, KeyExchange::Default, clock),
    }
}

fn config(plane: &Plane, addresses: Mode) -> Config {
    let subscription = |type_url, mode| Subscription { type_url, mode };
    Config {
        connect: net::xds::connect_to(control_plane(plane)),
        token: Some(Token::Static(plane.node_token())),
        metadata: vec![("clusterid".to_owned(), "Kubernetes".to_owned())],
        node: Node {
            kind: net::xds::NodeKind::default(),
            instance_ip: "10.0.0.9".to_owned(),
            pod_name: "ztunnel-1".to_owned(),
            pod_namespace: "istio-system".to_owned(),
            node_name: "node-1".to_owned(),
            metadata: BTreeMap::new(),
        },
        subscriptions: vec![
            subscription(ADDRESS, addresses),
            subscription(POLICY, Mode::Wildcard),
        ],
        answer_deadline: DEADLINE,
        ready: None,
        metrics: net::xds::Metrics::default(),
    }
}

#[tokio::test]
async fn our_client_follows_and_tells_what_it_refuses() {
    let plane = Plane::start().await;
    plane.apply(
        &[
            policy("bad", 0),
            policy("good", 0),
            pod(1, "node-1", &[], "x"),
        ],
        &[],
    );
    let proxy = Proxy::default();
    *proxy.refuses.lock() = Some("shop/bad".to_owned());
    let (client, _) = Client::new(config(&plane, Mode::Wildcard), proxy.clone());
    let (_trigger, watch) = drain::channel();
    let running = tokio::spawn(client.run(watch));
    proxy.until(|has| has.len() == 2).await;
    plane.apply(
        &[pod(2, "node-1", &[], "x")],
        &[&pod(1, "node-1", &[], "x")],
    );
    proxy
        .until(|has| has.contains(POD_2) && !has.contains(POD_1))
        .await;
    // The NACK was sent before the acknowledgement of what came later.
    let rejections = plane.registry.rejections();
    let refused = &rejections[&(POLICY.into(), "shop/bad".into())];
    assert_eq!(refused[0].reason, "the test does not like it");
    running.abort();
}

#[tokio::test]
async fn our_client_finds_on_demand_what_there_is() {
    let plane = Plane::start().await;
    let web = "shop/web.shop.svc.cluster.local";
    plane.apply(&[service("web", 1), pod(1, "elsewhere", &[web], "x")], &[]);
    let proxy = Proxy::default();
    let (client, demand) = Client::new(config(&plane, Mode::OnDemand), proxy.clone());
    let (_trigger, watch) = drain::channel();
    let running = tokio::spawn(client.run(watch));
    let ask = async |key| {
        demand
            .resource(key, Instant::now() + DEADLINE)
            .await
            .unwrap()
    };
    assert_eq!(ask("/10.96.0.1").await, Found::Arrived);
    assert_eq!(*proxy.has.lock(), [POD_1, web].map(str::to_owned).into());
    assert_eq!(ask("/10.1.0.1").await, Found::Arrived);
    assert_eq!(ask("/10.77.0.1").await, Found::Absent);
    plane.apply(&[pod(2, "elsewhere", &[web], "x")], &[]);
    proxy.until(|has| has.contains(POD_2)).await;
    running.abort();
}

#[tokio::test]
async fn our_client_gets_certificates_for_the_pods_of_its_node_only() {
    let plane = Plane::start().await;
    plane
        .pods
        .put("istio-system", "ztunnel-1", "ztunnel", "node-1");
    plane.pods.put("shop", "web-1", "web", "node-1");
    let client = CaClient::new(CaConfig {
        control_plane: control_plane(&plane),
        token: net::ca::Token::Text(plane.node_token()),
        cluster_id: "Kubernetes".to_owned(),
        headers: Vec::new(),
        lifetime: Duration::from_secs(3600),
        impersonation: Impersonation::Workloads,
        deadline: DEADLINE,
    })
    .unwrap();
    let web: Identity = "spiffe://cluster.local/ns/shop/sa/web".parse().unwrap();
    let certificate = client.issue(web.clone()).await.unwrap();
    assert_eq!(certificate.identity(), &web);
    assert!(certificate.is_valid());
    let far = "spiffe://cluster.local/ns/shop/sa/far".parse().unwrap();
    assert!(client.issue(far).await.is_err());
}
