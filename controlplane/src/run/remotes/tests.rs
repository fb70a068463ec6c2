use std::collections::BTreeMap;

use prost::Message as _;
use proto::workload as wire;
use serde_json::{Value, json};

use super::{secret::tests::kubeconfig, *};
use crate::{
    config::ServiceAccount,
    source::cluster::decode::decode,
    testing::{
        DEADLINE,
        api::{Answer, FakeApi},
    },
};

const WEB: &str = "shop/web.shop.svc.cluster.local";
const BEYOND: &str =
    "n2/SplitHorizonWorkload/istio-system/east-west/192.0.2.9/shop/web.shop.svc.cluster.local";

/// This cluster's world, and others that its Secrets name, by their names.
struct Mesh {
    api: FakeApi,
    clusters: BTreeMap<&'static str, FakeApi>,
    world: World,
    feed: Feed,
    status: Status,
    members: watch::Receiver<Members>,
    reading: watch::Sender<Reading>,
    _tasks: JoinSet<()>,
}

impl Mesh {
    /// Its own cluster is of network n1 and has the global service `web`.
    async fn start(api: FakeApi, clusters: BTreeMap<&'static str, FakeApi>) -> Self {
        let settings = Settings {
            network: "n1".into(),
            has_others: true,
            ..Settings::default()
        };
        let selectors = Selectors::default();
        let kinds = [Kind::Secret].into();
        let (world, feed) = World::fed(kinds, settings.clone(), selectors.clone()).unwrap();
        feed.send(Event::Tags([].into())).await.unwrap();
        let (reading, read) = watch::channel(Reading {
            settings,
            selectors,
        });
        let remotes = Remotes {
            client: api.client(),
            namespace: "istio-system".to_owned(),
            feed: feed.clone(),
            reading: read,
            connect: connect(&clusters),
            troubles: Troubles::default(),
            timeouts: Count::default(),
            audiences: vec!["istio-ca".to_owned()],
        };
        let (told, tasks) = remotes.start();
        let mesh = Self {
            api,
            clusters,
            world,
            feed,
            status: told.status,
            members: told.members,
            reading,
            _tasks: tasks,
        };
        mesh.own(Kind::Service, &service("web", "10.1.0.1", true))
            .await;
        mesh
    }

    async fn own(&self, kind: Kind, object: &Value) {
        let raw = serde_json::value::to_raw_value(object).unwrap();
        let told = decode(kind, &raw).unwrap();
        self.feed.send(Event::Is(Box::new(told))).await.unwrap();
    }

    fn resources(&self) -> BTreeMap<String, wire::address::Type> {
        let all = self.world.subscribe().try_next().unwrap_or_default();
        let read = |it: &Arc<crate::output::Resource>| {
            let address = wire::Address::decode(it.body.clone()).unwrap();
            (it.name.to_string(), address.r#type.unwrap())
        };
        all.upserts.iter().map(read).collect()
    }

    fn workload(&self, uid: &str) -> Option<wire::Workload> {
        match self.resources().remove(uid)? {
            wire::address::Type::Workload(workload) => Some(workload),
            wire::address::Type::Service(_) => None,
        }
    }

    fn service(&self, key: &str) -> Option<wire::Service> {
        match self.resources().remove(key)? {
            wire::address::Type::Service(service) => Some(service),
            wire::address::Type::Workload(_) => None,
        }
    }

    /// Waits until a test holds of what is served.
    async fn until(&self, what: &str, test: impl Fn(&Self) -> bool) {
        let end = std::time::Instant::now() + DEADLINE;
        while !test(self) {
            assert!(
                std::time::Instant::now() < end,
                "{what}: {:?} {:#?}",
                *self.status.borrow(),
                self.resources()
            );
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    fn stage(&self, cluster: &str) -> Option<Stage> {
        self.status.borrow().get(cluster).map(|it| it.sync_status)
    }
}

/// A kubeconfig's token names the cluster.
fn connect(clusters: &BTreeMap<&'static str, FakeApi>) -> Connect {
    let clusters = clusters.clone();
    Arc::new(move |kubeconfig: Arc<Kubeconfig>| {
        let text = format!("{:?}", kubeconfig.auth_infos[0].name);
        let found = clusters.iter().find(|(name, _)| text.contains(*name));
        let client = found.unwrap().1.client();
        Box::pin(async move { Ok(client) })
    })
}

fn secret(name: &str, clusters: &[(&str, &str)]) -> Value {
    let encode = |text: &str| serde_json::to_value(ByteString(text.as_bytes().to_vec())).unwrap();
    let data: BTreeMap<_, _> = clusters
        .iter()
        .map(|(name, it)| (*name, encode(it)))
        .collect();
    json!({"metadata": {"name": name, "namespace": "istio-system",
        "labels": {"istio/multiCluster": "true"}}, "data": data})
}

/// A kubeconfig for a cluster; another `token` makes it another one.
fn config_of(cluster: &str, token: &str) -> String {
    let text = kubeconfig(token, "");
    text.replace("users: [{name: it", &format!("users: [{{name: {cluster}"))
        .replace("user: it", &format!("user: {cluster}"))
}

fn service(name: &str, ip: &str, global: bool) -> Value {
    json!({"metadata": {"name": name, "namespace": "shop",
            "labels": {"istio.io/global": global.to_string()}},
        "spec": {"clusterIPs": [ip], "selector": {"app": name},
            "ports": [{"port": 80, "targetPort": 8080}]}})
}

fn pod(name: &str, app: &str, ip: &str, ready: bool) -> Value {
    json!({"metadata": {"name": name, "namespace": "shop", "labels": {"app": app},
            "annotations": {"ambient.istio.io/redirection": "enabled"}},
        "spec": {"serviceAccountName": app, "nodeName": "node", "containers": []},
        "status": {"podIPs": [{"ip": ip}],
            "conditions": [{"type": "Ready", "status": if ready {"True"} else {"False"}}]}})
}

/// A cluster of a network, with the global service `web` of one pod and the local one `own`.
fn cluster(network: &str, ips: &str) -> FakeApi {
    let api = FakeApi::new();
    api.put(
        "api/v1",
        "namespaces",
        json!({"metadata": {"name": "istio-system",
            "labels": {"topology.istio.io/network": network}}}),
    );
    api.put(
        "api/v1",
        "services",
        service("web", &format!("{ips}.1"), true),
    );
    api.put(
        "api/v1",
        "services",
        service("own", &format!("{ips}.2"), false),
    );
    api.put(
        "api/v1",
        "pods",
        pod("web-1", "web", &format!("{ips}.11"), true),
    );
    api.put(
        "api/v1",
        "pods",
        pod("own-1", "own", &format!("{ips}.12"), true),
    );
    api
}

fn with_gateway(api: FakeApi) -> FakeApi {
    api.put(
        "apis/apiextensions.k8s.io/v1",
        "customresourcedefinitions",
        json!({"metadata": {"name": "gateways.gateway.networking.k8s.io"}}),
    );
    let gateway = json!({"apiVersion": "gateway.networking.k8s.io/v1", "kind": "Gateway",
        "metadata": {"name": "east-west", "namespace": "istio-system"},
        "spec": {"gatewayClassName": "istio-east-west",
            "listeners": [{"name": "mesh", "port": 15008, "protocol": "HBONE"}]},
        "status": {"addresses": [{"type": "IPAddress", "value": "192.0.2.9"}]}});
    api.put("apis/gateway.networking.k8s.io/v1", "gateways", gateway);
    api
}

fn uid(cluster: &str, pod: &str) -> String {
    format!("{cluster}//Pod/shop/{pod}")
}

#[tokio::test]
async fn another_networks_pods_stand_behind_its_gateway_and_the_same_networks_are_themselves() {
    let api = FakeApi::new();
    let east = with_gateway(cluster("n2", "10.2.0"));
    let west = cluster("n1", "10.3.0");
    let (of_east, of_west) = (config_of("east", ""), config_of("west", ""));
    api.put("api/v1", "secrets", secret("a", &[("east", &of_east)]));
    api.put("api/v1", "secrets", secret("b", &[("west", &of_west)]));
    let mesh = Mesh::start(api, [("east", east), ("west", west)].into()).await;
    mesh.world.listed().await;
    mesh.until("all known", |mesh| {
        let service = mesh.service(WEB);
        service.is_some_and(|it| it.addresses.len() == 3 && !it.subject_alt_names.is_empty())
    })
    .await;

    let service = mesh.service(WEB).unwrap();
    let tagged = |it: &wire::NetworkAddress| format!("{}/{:?}", it.network, it.address);
    let addresses: Vec<String> = service.addresses.iter().map(tagged).collect();
    assert_eq!(
        addresses,
        ["n1/[10, 1, 0, 1]", "n2/[10, 2, 0, 1]", "n1/[10, 3, 0, 1]"]
    );
    assert_eq!(
        service.subject_alt_names,
        ["spiffe://cluster.local/ns/shop/sa/web"]
    );

    mesh.until("the split horizon", |mesh| mesh.workload(BEYOND).is_some())
        .await;
    let beyond = mesh.workload(BEYOND).unwrap();
    assert_eq!((beyond.capacity, beyond.addresses.len()), (Some(1), 0));
    assert_eq!(beyond.status(), wire::WorkloadStatus::Healthy);
    assert_eq!(beyond.network_gateway.unwrap().hbone_mtls_port, 15008);
    assert_eq!(beyond.services[WEB].ports[0].service_port, 80);

    let near = mesh.workload(&uid("west", "web-1")).unwrap();
    assert_eq!(
        (near.cluster_id.as_str(), near.addresses),
        ("west", vec![vec![10, 3, 0, 11]])
    );
    for hidden in [uid("east", "web-1"), uid("west", "own-1")] {
        assert!(mesh.workload(&hidden).is_none(), "{hidden}");
    }
    assert!(mesh.service("shop/own.shop.svc.cluster.local").is_none());
    assert_eq!(mesh.stage("east"), Some(Stage::Synced));
}

#[tokio::test]
async fn unready_pods_of_another_network_move_traffic_away_and_their_end_ends_it() {
    let api = FakeApi::new();
    let east = with_gateway(cluster("n2", "10.2.0"));
    api.put(
        "api/v1",
        "secrets",
        secret("a", &[("east", &config_of("east", ""))]),
    );
    let mesh = Mesh::start(api, [("east", east)].into()).await;
    let east = &mesh.clusters["east"];
    let state = |mesh: &Mesh| mesh.workload(BEYOND).map(|it| (it.capacity, it.status()));
    let healthy = wire::WorkloadStatus::Healthy;
    mesh.until("one", |mesh| state(mesh) == Some((Some(1), healthy)))
        .await;

    east.put("api/v1", "pods", pod("web-2", "web", "10.2.0.21", true));
    mesh.until("two", |mesh| state(mesh) == Some((Some(2), healthy)))
        .await;
    east.put("api/v1", "pods", pod("web-1", "web", "10.2.0.11", false));
    mesh.until("one of two", |mesh| state(mesh) == Some((Some(1), healthy)))
        .await;
    east.put("api/v1", "pods", pod("web-2", "web", "10.2.0.21", false));
    let unhealthy = wire::WorkloadStatus::Unhealthy;
    mesh.until("none", |mesh| state(mesh) == Some((Some(2), unhealthy)))
        .await;
    for name in ["web-1", "web-2"] {
        east.remove("pods", "shop", name);
    }
    mesh.until("gone", |mesh| state(mesh).is_none()).await;
}

#[tokio::test]
async fn a_broken_secret_is_named_breaks_nobody_and_takes_away_nothing() {
    let api = FakeApi::new();
    let (east, west) = (cluster("n1", "10.2.0"), cluster("n1", "10.3.0"));
    let of_east = config_of("east", "");
    api.put("api/v1", "secrets", secret("a", &[("broken", "[")]));
    api.put("api/v1", "secrets", secret("b", &[("east", &of_east)]));
    let mesh = Mesh::start(api, [("east", east), ("west", west)].into()).await;
    mesh.world.listed().await;
    let has = |mesh: &Mesh, cluster: &str| mesh.workload(&uid(cluster, "web-1")).is_some();
    mesh.until("east", |mesh| has(mesh, "east")).await;
    let broken = mesh.status.borrow()["broken"].clone();
    assert_eq!(
        (broken.sync_status, &*broken.secret_name),
        (Stage::Refused, "a")
    );
    assert!(
        broken.message.contains("cannot be parsed"),
        "{}",
        broken.message
    );

    // Mended, while another breaks: its pods stay known, and are followed on.
    let of_west = config_of("west", "");
    mesh.api
        .put("api/v1", "secrets", secret("a", &[("west", &of_west)]));
    mesh.api
        .put("api/v1", "secrets", secret("b", &[("east", "[")]));
    mesh.until("west", |mesh| {
        has(mesh, "west") && mesh.stage("broken").is_none()
    })
    .await;
    mesh.until("named", |mesh| {
        let status = mesh.status.borrow();
        status
            .get("east")
            .is_some_and(|it| it.message.contains("Secret b"))
    })
    .await;
    assert!(has(&mesh, "east"));
    mesh.clusters["east"].put("api/v1", "pods", pod("web-2", "web", "10.2.0.21", true));
    mesh.until("followed", |mesh| {
        mesh.workload(&uid("east", "web-2")).is_some()
    })
    .await;

    // No Secret: no cluster.
    mesh.api.remove("secrets", "istio-system", "b");
    mesh.until("gone", |mesh| {
        !has(mesh, "east") && mesh.stage("east").is_none()
    })
    .await;
    assert!(has(&mesh, "west"));
}

#[tokio::test]
async fn other_credentials_and_other_rules_keep_what_is_known_until_it_is_known_anew() {
    let api = FakeApi::new();
    let of_east = |token| secret("a", &[("east", &config_of("east", token))]);
    api.put("api/v1", "secrets", of_east(""));
    let mesh = Mesh::start(api, [("east", cluster("n1", "10.2.0"))].into()).await;
    let has = |mesh: &Mesh, pod: &str| mesh.workload(&uid("east", pod)).is_some();
    mesh.until("known", |mesh| has(mesh, "web-1")).await;

    // The new credentials are refused at first.
    let east = &mesh.clusters["east"];
    east.on(|_| Some(Answer::Refuse(401, "Unauthorized", "who?")));
    mesh.api
        .put("api/v1", "secrets", of_east(", username: other"));
    mesh.until("anew", |mesh| mesh.stage("east") == Some(Stage::Syncing))
        .await;
    assert!(has(&mesh, "web-1"));
    east.remove("pods", "shop", "web-1");
    east.put("api/v1", "pods", pod("web-2", "web", "10.2.0.21", true));
    east.heal();
    mesh.until("the new state", |mesh| {
        has(mesh, "web-2") && !has(mesh, "web-1")
    })
    .await;

    // By other rules, nothing is global.
    mesh.reading
        .send_modify(|it| it.settings.service_scopes = Some(Vec::new()));
    mesh.until("by other rules", |mesh| !has(mesh, "web-2"))
        .await;
}

#[tokio::test]
async fn a_service_that_this_cluster_keeps_to_itself_gets_nothing_of_others() {
    let api = FakeApi::new();
    api.put(
        "api/v1",
        "secrets",
        secret("a", &[("east", &config_of("east", ""))]),
    );
    let mesh = Mesh::start(api, [("east", cluster("n1", "10.2.0"))].into()).await;
    let has = |mesh: &Mesh| mesh.workload(&uid("east", "web-1")).is_some();
    mesh.until("global", has).await;
    mesh.own(Kind::Service, &service("web", "10.1.0.1", false))
        .await;
    mesh.until("local", |mesh| !has(mesh)).await;
    assert_eq!(mesh.service(WEB).unwrap().addresses.len(), 1);
    mesh.own(Kind::Service, &service("web", "10.1.0.1", true))
        .await;
    mesh.until("global again", has).await;
}

#[tokio::test(start_paused = true)]
async fn a_cluster_that_does_not_answer_holds_the_start_up_no_longer_than_half_a_minute() {
    let api = FakeApi::new();
    let east = cluster("n1", "10.2.0");
    east.on(|_| Some(Answer::Hang));
    api.put(
        "api/v1",
        "secrets",
        secret("a", &[("east", &config_of("east", ""))]),
    );
    let began = tokio::time::Instant::now();
    let mesh = Mesh::start(api, [("east", east)].into()).await;
    mesh.world.listed().await;
    assert!(began.elapsed() >= PATIENCE, "{:?}", began.elapsed());
    assert_eq!(mesh.stage("east"), Some(Stage::Timeout));
    mesh.until("its own", |mesh| mesh.service(WEB).is_some())
        .await;

    mesh.clusters["east"].heal();
    mesh.until("late", |mesh| {
        mesh.workload(&uid("east", "web-1")).is_some()
    })
    .await;
    assert_eq!(mesh.stage("east"), Some(Stage::Synced));
}

/// What an API server says of a token of a pod's account.
fn vouched(account: &str, pod: &str) -> Answer {
    Answer::Say(json!({
        "apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "spec": {},
        "metadata": {},
        "status": {"authenticated": true, "audiences": ["istio-ca"], "user": {
            "username": format!("system:serviceaccount:shop:{account}"),
            "groups": ["system:serviceaccounts"],
            "extra": {
                "authentication.kubernetes.io/pod-name": [pod],
                "authentication.kubernetes.io/pod-uid": [format!("{pod}-uid")],
            },
        }},
    }))
}

#[tokio::test]
async fn a_clusters_own_api_server_pods_and_waypoints_speak_for_its_proxies() {
    let api = FakeApi::new();
    let east = cluster("n1", "10.2.0");
    let mut web = pod("web-2", "web", "10.2.0.21", true);
    web["metadata"]["uid"] = "web-2-uid".into();
    east.put("api/v1", "pods", web);
    let mut waypoint = pod("way-1", "way", "10.2.0.31", true);
    waypoint["metadata"]["labels"] = json!({
        "gateway.networking.k8s.io/gateway-name": "way",
        "gateway.istio.io/managed": "istio.io-mesh-controller",
    });
    let east = with_gateway(east);
    east.put("api/v1", "pods", waypoint);
    let gateway = json!({"apiVersion": "gateway.networking.k8s.io/v1", "kind": "Gateway",
        "metadata": {"name": "way", "namespace": "shop"},
        "spec": {"gatewayClassName": "istio-waypoint",
            "listeners": [{"name": "mesh", "port": 15008, "protocol": "HBONE"}]}});
    east.put("apis/gateway.networking.k8s.io/v1", "gateways", gateway);
    east.on(|call| (call.resource == "tokenreviews").then(|| vouched("web", "web-2")));
    let of_east = secret("a", &[("east", &config_of("east", ""))]);
    api.put("api/v1", "secrets", of_east);
    let mesh = Mesh::start(api, [("east", east)].into()).await;
    mesh.until("synced", |mesh| mesh.stage("east") == Some(Stage::Synced))
        .await;

    let member = mesh.members.borrow()["east"].clone().unwrap();
    let caller = member.tokens.authenticate("a token").await.unwrap();
    assert_eq!(caller.account.to_string(), "shop/web");
    let pod = member.pods.pod_by_uid(&caller.pod.unwrap().uid).unwrap();
    assert_eq!((&*pod.name, &*pod.node), ("web-2", "node"));
    assert!(member.pods.runs_on_node("node", "shop", "own"));
    assert!(!mesh.world.runs_on_node("node", "shop", "own"));
    let way: ServiceAccount = "shop/way".parse().unwrap();
    let proxy = (member.gateway_of)(&way, Some("way-1")).unwrap();
    assert_eq!(
        (proxy.gateway.to_string().as_str(), proxy.confined),
        ("shop/way", false)
    );

    mesh.api.remove("secrets", "istio-system", "a");
    mesh.until("gone", |mesh| mesh.members.borrow().is_empty())
        .await;
}
