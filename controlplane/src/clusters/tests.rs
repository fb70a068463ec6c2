use proto::{ADDRESS_TYPE_URL as ADDRESS, ca::IstioCertificateRequest, xds_core::Node};
use tonic::{Code, Status};

use super::*;
use crate::{
    auth::{Jwks, Review},
    config::ServiceAccount,
    object::Name,
    output::GatewayProxy,
    testing::{
        FakePods, Issuer, Plane, Subscriber,
        api::{Answer, FakeApi},
        bearer_of, csr, node, pod, texts,
    },
};

const WEB: &str = "spiffe://cluster.local/ns/shop/sa/web";
const FAR: &str = "spiffe://cluster.local/ns/shop/sa/far";

/// A control plane of the cluster `Kubernetes`, with `ztunnel-1` and a pod of `shop/far` on its node-1, and of the cluster
/// `east`, with `ztunnel-1` and a pod of `shop/web` on a node of the same name.
struct Mesh {
    plane: Plane,
    /// Signs east's tokens.
    east: Issuer,
}

impl Mesh {
    async fn start() -> Self {
        let plane = Plane::start().await;
        let east = Issuer::new();
        let pods = FakePods::default();
        for pods in [&pods, &*plane.pods] {
            pods.put("istio-system", "ztunnel-1", "ztunnel", "node-1");
        }
        pods.put("shop", "web-1", "web", "node-1");
        plane.pods.put("shop", "far-1", "far", "node-1");
        let jwks = Jwks::open(east.path(), vec!["istio-ca".to_owned()]).unwrap();
        let member = member(Arc::new(jwks), pods);
        plane.members.send_modify(|all| {
            all.insert("east".into(), Some(member));
            all.insert("early".into(), None);
        });
        Self { plane, east }
    }

    /// A token of the cluster's node tunnel on node-1.
    fn tunnel(issuer: &Issuer) -> String {
        issuer.token("istio-system", "ztunnel", "ztunnel-1")
    }

    async fn certificate(
        &self,
        cluster: &str,
        token: &str,
        request: IstioCertificateRequest,
    ) -> Result<(), Status> {
        use proto::ca::istio_certificate_service_client::IstioCertificateServiceClient;
        let mut client = IstioCertificateServiceClient::new(self.plane.channel(None).await);
        let request = bearer_of(request, token, Some(cluster));
        client.create_certificate(request).await.map(drop)
    }

    /// Opens a stream and asks for everything.
    async fn read(&self, cluster: &str, token: &str, node: Node) -> Result<usize, Status> {
        let channel = self.plane.channel(None).await;
        let mut stream = Subscriber::open_of(channel, token, Some(cluster)).await?;
        stream.node = Some(node);
        stream.subscribe(ADDRESS, &[], &[]);
        let answer = stream.message().await?;
        Ok(answer.map_or(0, |it| it.resources.len()))
    }
}

fn member(tokens: Arc<dyn Authenticator>, pods: FakePods) -> Member {
    let gateway_of = |account: &ServiceAccount, _: Option<&str>| {
        let of = |name: &str, confined| GatewayProxy {
            gateway: Name::new("shop", name),
            confined,
        };
        match account.to_string().as_str() {
            "shop/east-waypoint" => Some(of("east-waypoint", false)),
            "shop/east-west" => Some(of("east-west", true)),
            _ => None,
        }
    };
    Member {
        tokens,
        pods: Arc::new(pods),
        gateway_of: Arc::new(gateway_of),
    }
}

fn waypoint(account: &str, cluster: &str) -> Node {
    Node {
        id: format!("waypoint~10.1.0.2~{account}-1.shop~shop.svc.cluster.local"),
        metadata: Some(texts(&[("CLUSTER_ID", cluster)])),
        ..Node::default()
    }
}

#[track_caller]
fn assert_refused<T: std::fmt::Debug>(
    what: &str,
    result: Result<T, Status>,
    code: Code,
    words: &[&str],
) {
    let status = result.expect_err(what);
    assert_eq!(status.code(), code, "{what}: {status}");
    for word in words {
        assert!(status.message().contains(word), "{what}: {status}");
    }
}

#[tokio::test]
async fn another_clusters_tunnel_gets_certificates_for_the_pods_of_its_node_there_and_for_no_others()
 {
    let mesh = Mesh::start().await;
    let token = Mesh::tunnel(&mesh.east);
    let granted = mesh.certificate("east", &token, csr(Some(WEB))).await;
    granted.unwrap();
    let own = mesh.certificate("east", &token, csr(None)).await;
    own.unwrap();
    // It runs on this cluster's node of that name.
    let refused = mesh.certificate("east", &token, csr(Some(FAR))).await;
    let words = ["request impersonation authentication failure"];
    assert_refused("far", refused, Code::Unauthenticated, &words);
}

#[tokio::test]
async fn one_clusters_token_is_never_anothers() {
    let mesh = Mesh::start().await;
    let (ours, theirs) = (Mesh::tunnel(&mesh.plane.issuer), Mesh::tunnel(&mesh.east));
    for (what, cluster, token, words) in [
        (
            "ours as east's",
            "east",
            &ours,
            vec!["\"east\"", "does not vouch"],
        ),
        (
            "east's as ours",
            "Kubernetes",
            &theirs,
            vec!["request authenticate failure"],
        ),
        (
            "east's of no cluster",
            "",
            &theirs,
            vec!["request authenticate failure"],
        ),
        (
            "east's as an unknown one's",
            "west",
            &theirs,
            vec!["\"west\" is not known here"],
        ),
        (
            "ours as an unknown one's",
            "west",
            &ours,
            vec!["\"west\" is not known here"],
        ),
        (
            "one that is not read yet",
            "early",
            &theirs,
            vec!["\"early\" is not wholly read"],
        ),
    ] {
        let refused = mesh.certificate(cluster, token, csr(Some(WEB))).await;
        assert_refused(what, refused, Code::Unauthenticated, &words);
        let words: Vec<&str> = words
            .into_iter()
            .filter(|it| !it.starts_with("request"))
            .collect();
        let refused = mesh.read(cluster, token, node()).await;
        assert_refused(what, refused, Code::Unauthenticated, &words);
    }
    // Ours is ours, named or not.
    for cluster in ["Kubernetes", ""] {
        let granted = mesh.certificate(cluster, &ours, csr(Some(FAR))).await;
        granted.unwrap();
    }
}

#[tokio::test]
async fn a_clusters_api_server_that_does_not_answer_is_named_and_lets_nobody_in() {
    let mesh = Mesh::start().await;
    let api = FakeApi::new();
    api.on(|_| Some(Answer::Refuse(503, "ServiceUnavailable", "away")));
    let review = Review::new(api.client(), vec!["istio-ca".to_owned()]);
    let member = member(Arc::new(review), FakePods::default());
    mesh.plane.members.send_modify(|all| {
        all.insert("east".into(), Some(member));
    });
    let token = Mesh::tunnel(&mesh.east);
    let words = ["the API server of cluster \"east\" does not answer"];
    let refused = mesh.certificate("east", &token, csr(Some(WEB))).await;
    assert_refused("certificate", refused, Code::Unavailable, &words);
    let refused = mesh
        .read("east", &token, waypoint("east-waypoint", "east"))
        .await;
    assert_refused("stream", refused, Code::Unavailable, &words);

    // It comes back, and says no.
    api.heal();
    let refused = mesh.certificate("east", &token, csr(Some(WEB))).await;
    assert_refused(
        "no",
        refused,
        Code::Unauthenticated,
        &["\"east\" does not vouch"],
    );
}

#[tokio::test]
async fn another_clusters_waypoint_may_read_and_those_who_would_learn_too_little_may_not() {
    let mesh = Mesh::start().await;
    mesh.plane.apply(&[pod(1, "node-1", &[], "x")], &[]);
    let token = |account: &str| mesh.east.token("shop", account, &format!("{account}-1"));
    let read = mesh
        .read(
            "east",
            &token("east-waypoint"),
            waypoint("east-waypoint", "east"),
        )
        .await;
    assert_eq!(read.unwrap(), 1);

    let own_plane = ["of cluster \"east\"", "a control plane of that cluster"];
    let neither = ["neither a node tunnel nor a waypoint"];
    let tunnel = Mesh::tunnel(&mesh.east);
    for (what, token, node, words) in [
        ("a node tunnel", tunnel, node(), &own_plane[..]),
        (
            "a gateway between networks",
            token("east-west"),
            waypoint("east-west", "east"),
            &own_plane[..],
        ),
        // This cluster's waypoint of that account is not east's.
        (
            "nobody there",
            token("waypoint"),
            waypoint("waypoint", "east"),
            &neither[..],
        ),
        (
            "one that says to be of another cluster",
            token("east-waypoint"),
            waypoint("east-waypoint", "Kubernetes"),
            &["CLUSTER_ID"][..],
        ),
    ] {
        let refused = mesh.read("east", &token, node).await;
        assert_refused(what, refused, Code::PermissionDenied, words);
    }
}

#[tokio::test]
async fn a_cluster_that_is_taken_away_vouches_for_nobody_from_then_on() {
    let mesh = Mesh::start().await;
    let token = Mesh::tunnel(&mesh.east);
    let granted = mesh.certificate("east", &token, csr(Some(WEB))).await;
    granted.unwrap();
    mesh.plane.members.send_modify(|all| {
        all.remove("east");
    });
    let refused = mesh.certificate("east", &token, csr(Some(WEB))).await;
    assert_refused(
        "gone",
        refused,
        Code::Unauthenticated,
        &["\"east\" is not known here"],
    );
}
