use super::*;
use crate::{
    fixture::{apply, gateway, identity, pod, service, socket, view},
    service::{LoadBalancing, Scope, Visibility, WeightedWaypoint},
    view::Resource,
    workload::{ApplicationProtocol, ApplicationTunnel, Health, NetworkMode},
};

const WEB: &str = "a/web.a.svc.cluster.local";
const WAYPOINT: &str = "a/waypoint.a.svc.cluster.local";

/// The client, a web service of one pod, and what the row is about.
fn mesh(more: impl IntoIterator<Item = Resource>) -> MeshView {
    let mut view = view([
        pod("a/client", &["127.0.0.1", "ff06::1"]).into(),
        pod("a/web-1", &["127.0.0.2", "ff06::c3"])
            .serving(WEB, &[(80, 8080)])
            .into(),
        service(WEB, &["127.0.0.3", "ff06::3"], &[(80, 0)]).into(),
    ]);
    apply(&mut view, more);
    view
}

fn with_waypoint(waypoint: GatewayAddress) -> Service {
    Service {
        waypoint: Some(waypoint),
        ..service(WEB, &["127.0.0.3", "ff06::3"], &[(80, 0)])
    }
}

fn waypoint_pod() -> Workload {
    pod("a/waypoint", &["127.0.0.10"])
}

fn facts(destination: &str) -> OutboundFacts {
    OutboundFacts {
        source: Arc::new(pod("a/client", &["127.0.0.1", "ff06::1"])),
        network: "".into(),
        client: socket("127.0.0.1:40000"),
        original_dst: socket(destination),
    }
}

fn decide(view: &MeshView, destination: &str) -> Outcome<NextHop> {
    next_hop(view, &facts(destination), Draw(1))
}

/// One row: `protocol target authority`, as a log reader would put it.
#[track_caller]
fn goes(view: &MeshView, destination: &str, expected: &str) -> NextHop {
    let Outcome::Go(hop) = decide(view, destination) else {
        panic!("{destination}: {:?}", decide(view, destination));
    };
    let target = match &hop.target {
        Target::Address(address) => address.to_string(),
        Target::Hostname { hostname, port, .. } => format!("{hostname}:{port}"),
    };
    let authority = hop
        .authority
        .as_ref()
        .map_or("-".to_owned(), ToString::to_string);
    let told = format!("{:?} {:?} {target} {authority}", hop.route, hop.hop);
    assert_eq!(told, expected, "{destination}");
    hop
}

#[track_caller]
fn refused_because(view: &MeshView, destination: &str, reason: Reason) {
    match decide(view, destination) {
        Outcome::Refuse(refusal) => assert_eq!(refusal.reason, reason, "{destination}"),
        other => panic!("{destination}: {other:?}"),
    }
}

#[test]
fn a_connection_to_the_tunnels_own_ports_is_refused() {
    for port in RECURSION_PORTS {
        refused_because(&mesh([]), &format!("127.0.0.1:{port}"), Reason::Recursion);
        refused_because(&mesh([]), &format!("[::1]:{port}"), Reason::Recursion);
    }
    for port in RECURSION_PORTS {
        refused_because(&mesh([]), &format!("[ff06::1]:{port}"), Reason::Recursion);
    }
    goes(
        &mesh([]),
        "10.9.9.9:15008",
        "UnknownPassthrough Tcp 10.9.9.9:15008 -",
    );
    goes(
        &mesh([]),
        "127.0.0.1:15020",
        "Direct Hbone 127.0.0.1:15008 127.0.0.1:15020",
    );
}

#[test]
fn a_pods_address_is_reached_over_hbone() {
    let hop = goes(
        &mesh([]),
        "127.0.0.2:80",
        "Direct Hbone 127.0.0.2:15008 127.0.0.2:80",
    );
    assert_eq!(*hop.expected, [identity("a", "web-1")]);
    goes(
        &mesh([]),
        "[ff06::c3]:80",
        "Direct Hbone [ff06::c3]:15008 [ff06::c3]:80",
    );
    goes(
        &mesh([]),
        "[::ffff:127.0.0.2]:80",
        "Direct Hbone 127.0.0.2:15008 127.0.0.2:80",
    );
}

#[test]
fn a_service_is_reached_through_an_endpoint_with_its_target_port() {
    let sans = Service {
        subject_alt_names: vec![identity("a", "web-1"), identity("a", "other")],
        ..service(WEB, &["127.0.0.3"], &[(80, 0)])
    };
    let hop = goes(
        &mesh([sans.into()]),
        "127.0.0.3:80",
        "Direct Hbone 127.0.0.2:15008 127.0.0.2:8080",
    );
    assert_eq!(
        *hop.expected,
        [identity("a", "web-1"), identity("a", "other")]
    );
    assert_eq!(hop.service.unwrap().key().to_string(), WEB);
}

#[test]
fn a_service_follows_the_clients_family_unless_it_restricts_it() {
    let view = mesh([]);
    goes(
        &view,
        "[ff06::3]:80",
        "Direct Hbone [ff06::c3]:15008 [ff06::c3]:8080",
    );
    let v6 = Service {
        ip_families: IpFamilies::Ipv6Only,
        ..service(WEB, &["127.0.0.3"], &[(80, 0)])
    };
    goes(
        &mesh([v6.into()]),
        "127.0.0.3:80",
        "Direct Hbone [ff06::c3]:15008 [ff06::c3]:8080",
    );
}

#[test]
fn what_nothing_is_known_of_is_passed_through() {
    goes(
        &mesh([]),
        "8.8.8.8:53",
        "UnknownPassthrough Tcp 8.8.8.8:53 -",
    );
    let host = {
        let mut it = pod("a/host", &["127.0.0.9"]);
        it.network_mode = NetworkMode::HostNetwork;
        it
    };
    goes(
        &mesh([host.into()]),
        "127.0.0.9:80",
        "UnknownPassthrough Tcp 127.0.0.9:80 -",
    );
}

#[test]
fn a_service_that_is_not_visible_is_as_if_absent() {
    let hidden = Service {
        visibility: Visibility::Namespace,
        ..service("b/hidden.b.svc.cluster.local", &["127.0.0.4"], &[(80, 80)])
    };
    goes(
        &mesh([hidden.into()]),
        "127.0.0.4:80",
        "UnknownPassthrough Tcp 127.0.0.4:80 -",
    );
}

#[test]
fn a_plain_workload_is_reached_in_plaintext() {
    let plain = |mut it: Workload| {
        it.tunnel_protocol = TunnelProtocol::None;
        it
    };
    let view = mesh([plain(pod("a/web-1", &["127.0.0.2"]).serving(WEB, &[(80, 8080)])).into()]);
    goes(&view, "127.0.0.3:80", "Direct Tcp 127.0.0.2:8080 -");
    let hop = goes(&view, "127.0.0.2:99", "Direct Tcp 127.0.0.2:99 -");
    assert!(hop.expected.is_empty());
}

#[test]
fn an_unsupported_protocol_is_refused_and_never_plaintext() {
    let legacy = |mut it: Workload| {
        it.tunnel_protocol = TunnelProtocol::Unsupported;
        it
    };
    let view = mesh([legacy(pod("a/web-1", &["127.0.0.2"]).serving(WEB, &[(80, 8080)])).into()]);
    refused_because(&view, "127.0.0.2:80", Reason::ProtocolUnsupported);
    refused_because(&view, "127.0.0.3:80", Reason::ProtocolUnsupported);
}

#[test]
fn a_service_without_endpoint_or_port_is_refused() {
    refused_because(&mesh([]), "127.0.0.3:81", Reason::NoHealthyUpstream);
    let none = service("a/none.a.svc.cluster.local", &["127.0.0.4"], &[(80, 80)]);
    refused_because(
        &mesh([none.into()]),
        "127.0.0.4:80",
        Reason::NoHealthyUpstream,
    );
    let sick = Workload {
        status: Health::Unhealthy,
        ..pod("a/web-1", &["127.0.0.2"]).serving(WEB, &[(80, 8080)])
    };
    refused_because(
        &mesh([sick.into()]),
        "127.0.0.3:80",
        Reason::NoHealthyUpstream,
    );
}

#[test]
fn only_an_endpoint_that_maps_a_named_port_is_chosen() {
    let other = pod("a/web-2", &["127.0.0.6"]).serving(WEB, &[(81, 1)]);
    let view = mesh([other.into()]);
    for seed in 0..50 {
        let Outcome::Go(hop) = next_hop(&view, &facts("127.0.0.3:80"), Draw(seed)) else {
            panic!("seed {seed}");
        };
        assert_eq!(hop.authority.unwrap().to_string(), "127.0.0.2:8080");
    }
}

#[test]
fn a_passthrough_service_is_dialled_where_the_client_asked() {
    let passthrough = Service {
        load_balancing: LoadBalancing {
            mode: LoadBalancingMode::Passthrough,
            ..LoadBalancing::default()
        },
        ..service(WEB, &["127.0.0.3"], &[(80, 0)])
    };
    let hop = goes(
        &mesh([passthrough.clone().into()]),
        "127.0.0.3:80",
        "ServicePassthrough Tcp 127.0.0.3:80 -",
    );
    assert!(hop.service.is_some());
    let through = Service {
        waypoint: Some(gateway("/127.0.0.10", 15008)),
        ..passthrough
    };
    goes(
        &mesh([through.into(), waypoint_pod().into()]),
        "127.0.0.3:80",
        "ServiceWaypoint Hbone 127.0.0.10:15008 127.0.0.3:80",
    );
}

#[test]
fn a_services_waypoint_gets_the_original_destination() {
    let by_address = with_waypoint(gateway("/127.0.0.10", 15008));
    let view = mesh([by_address.into(), waypoint_pod().into()]);
    let hop = goes(
        &view,
        "127.0.0.3:80",
        "ServiceWaypoint Hbone 127.0.0.10:15008 127.0.0.3:80",
    );
    assert_eq!(*hop.expected, [identity("a", "waypoint")]);
    // A waypoint given by address keeps it, whatever the family.
    goes(
        &view,
        "[ff06::3]:80",
        "ServiceWaypoint Hbone 127.0.0.10:15008 [ff06::3]:80",
    );
    // Even for a port that the service does not name: the waypoint decides.
    goes(
        &view,
        "127.0.0.3:81",
        "ServiceWaypoint Hbone 127.0.0.10:15008 127.0.0.3:81",
    );
    // The pod's own address is not the service.
    goes(
        &view,
        "127.0.0.2:80",
        "Direct Hbone 127.0.0.2:15008 127.0.0.2:80",
    );
}

#[test]
fn a_tunnel_that_is_told_of_another_network_does_not_go_around_a_waypoint() {
    let view = mesh([
        with_waypoint(gateway("/127.0.0.10", 15008)).into(),
        waypoint_pod().into(),
    ]);
    let mistaken = OutboundFacts {
        network: "elsewhere".into(),
        ..facts("127.0.0.3:80")
    };
    let Outcome::Go(hop) = next_hop(&view, &mistaken, Draw(1)) else {
        panic!("refused");
    };
    assert_eq!(hop.route, Route::ServiceWaypoint);
}

#[test]
fn a_waypoint_by_name_is_one_of_its_services_endpoints() {
    let named = with_waypoint(gateway(WAYPOINT, 15008));
    let waypoint = Service {
        subject_alt_names: vec![identity("a", "waypoint-san")],
        ..service(WAYPOINT, &["127.0.0.11"], &[(15008, 15008)])
    };
    let view = mesh([
        named.into(),
        waypoint.into(),
        waypoint_pod().serving(WAYPOINT, &[]).into(),
    ]);
    let hop = goes(
        &view,
        "127.0.0.3:80",
        "ServiceWaypoint Hbone 127.0.0.10:15008 127.0.0.3:80",
    );
    assert_eq!(
        *hop.expected,
        [identity("a", "waypoint"), identity("a", "waypoint-san")]
    );
}

#[test]
fn a_waypoint_with_an_application_tunnel_needs_no_port_in_its_service() {
    let tunnelled = {
        let mut it = waypoint_pod().serving(WAYPOINT, &[]);
        it.application_tunnel = Some(ApplicationTunnel {
            protocol: ApplicationProtocol::Proxy,
            port: None,
        });
        it
    };
    let named = with_waypoint(gateway(WAYPOINT, 15008));
    let waypoint = service(WAYPOINT, &["127.0.0.11"], &[(80, 80)]);
    let view = mesh([named.into(), waypoint.into(), tunnelled.into()]);
    goes(
        &view,
        "127.0.0.3:80",
        "ServiceWaypoint Hbone 127.0.0.10:15008 127.0.0.3:80",
    );
}

#[test]
fn a_required_waypoint_that_is_missing_refuses() {
    for waypoint in [gateway("/127.0.0.99", 15008), gateway(WAYPOINT, 15008)] {
        let view = mesh([with_waypoint(waypoint).into()]);
        refused_because(&view, "127.0.0.3:80", Reason::WaypointMissing);
    }
    let view = mesh([
        with_waypoint(gateway(WAYPOINT, 15008)).into(),
        service(WAYPOINT, &["127.0.0.11"], &[(15008, 15008)]).into(),
    ]);
    refused_because(&view, "127.0.0.3:80", Reason::WaypointMissing);
}

#[test]
fn weighted_waypoints_share_by_weight_and_fall_back_to_the_one() {
    let weighted = |a, b| Service {
        weighted_waypoints: vec![
            WeightedWaypoint {
                destination: gateway("/127.0.0.10", 15008),
                weight: a,
            },
            WeightedWaypoint {
                destination: gateway("/127.0.0.12", 15008),
                weight: b,
            },
        ],
        ..with_waypoint(gateway("/127.0.0.13", 15008))
    };
    let shares = |service: Service| {
        let more = [
            service.into(),
            waypoint_pod().into(),
            pod("a/waypoint-2", &["127.0.0.12"]).into(),
            pod("a/waypoint-3", &["127.0.0.13"]).into(),
        ];
        let view = mesh(more);
        let mut hits = std::collections::BTreeMap::<String, u32>::new();
        for seed in 0..400 {
            let Outcome::Go(hop) = next_hop(&view, &facts("127.0.0.3:80"), Draw(seed)) else {
                panic!("seed {seed}");
            };
            *hits
                .entry(hop.workload.unwrap().name.to_string())
                .or_default() += 1;
        }
        hits
    };
    let hits = shares(weighted(1, 3));
    assert!(
        (60..140).contains(&hits["waypoint"]) && hits.len() == 2,
        "{hits:?}"
    );
    assert_eq!(shares(weighted(0, 1))["waypoint-2"], 400);
    assert_eq!(shares(weighted(0, 0))["waypoint-3"], 400);
}

#[test]
fn a_workloads_waypoint_serves_its_address_and_is_not_sent_to_itself() {
    let target = {
        let mut it = pod("a/web-1", &["127.0.0.2"]).serving(WEB, &[(80, 8080)]);
        it.waypoint = Some(gateway("/127.0.0.10", 15008));
        it
    };
    let view = mesh([target.into(), waypoint_pod().into()]);
    let hop = goes(
        &view,
        "127.0.0.2:80",
        "WorkloadWaypoint Hbone 127.0.0.10:15008 127.0.0.2:80",
    );
    assert_eq!(*hop.expected, [identity("a", "waypoint")]);
    // Service-addressed traffic never uses a workload's waypoint.
    goes(
        &view,
        "127.0.0.3:80",
        "Direct Hbone 127.0.0.2:15008 127.0.0.2:8080",
    );
    let from_waypoint = OutboundFacts {
        source: Arc::new(waypoint_pod()),
        client: socket("127.0.0.10:1"),
        ..facts("127.0.0.2:80")
    };
    let Outcome::Go(hop) = next_hop(&view, &from_waypoint, Draw(1)) else {
        panic!("refused");
    };
    assert_eq!(hop.route, Route::Direct);
    // The identity alone does not make it the waypoint.
    let elsewhere = OutboundFacts {
        client: socket("127.0.0.1:1"),
        ..from_waypoint
    };
    let Outcome::Go(hop) = next_hop(&view, &elsewhere, Draw(1)) else {
        panic!("refused");
    };
    assert_eq!(hop.route, Route::WorkloadWaypoint);
}

#[test]
fn a_workload_whose_waypoint_is_missing_is_refused() {
    let target = {
        let mut it = pod("a/web-1", &["127.0.0.2"]);
        it.waypoint = Some(gateway(WAYPOINT, 15008));
        it
    };
    refused_because(
        &mesh([target.into()]),
        "127.0.0.2:80",
        Reason::WaypointMissing,
    );
}

const GLOBAL: &str = "a/example.com";

fn remote(gateway: Option<GatewayAddress>) -> [Resource; 2] {
    let remote = {
        let mut it = pod("a/split", &[]).serving(GLOBAL, &[]);
        it.network = "remote".into();
        it.network_gateway = gateway;
        it.uid = crate::names::WorkloadUid("remote/SplitHorizonWorkload/x".into());
        it
    };
    let global = Service {
        subject_alt_names: vec![identity("a", "global")],
        ..service(GLOBAL, &["127.0.0.20"], &[(80, 8080)])
    };
    [remote.into(), global.into()]
}

#[test]
fn another_network_is_reached_through_its_gateway_by_double_hbone() {
    let mut view = mesh(remote(Some(gateway("remote/10.22.1.1", 15009))));
    let edge = {
        let mut it = pod("istio/gateway", &["10.22.1.1"]);
        it.network = "remote".into();
        it
    };
    apply(&mut view, [edge.into()]);
    let hop = goes(
        &view,
        "127.0.0.20:80",
        "Gateway DoubleHbone 10.22.1.1:15009 example.com:80",
    );
    assert_eq!(*hop.expected, [identity("istio", "gateway")]);
    assert_eq!(*hop.inner_expected, [identity("a", "global")]);
}

#[test]
fn a_gateway_by_name_is_dialled_on_its_target_port() {
    let key = "istio/gw.istio.svc.cluster.local";
    let mut view = mesh(remote(Some(gateway(key, 15009))));
    apply(
        &mut view,
        [
            service(key, &["127.0.0.30"], &[(15009, 15008)]).into(),
            pod("istio/gateway", &["127.0.0.5"])
                .serving(key, &[])
                .into(),
        ],
    );
    goes(
        &view,
        "127.0.0.20:80",
        "Gateway DoubleHbone 127.0.0.5:15008 example.com:80",
    );
}

#[test]
fn another_network_without_a_gateway_is_refused() {
    // No endpoint could be dialled at all: it is not even a candidate.
    refused_because(
        &mesh(remote(None)),
        "127.0.0.20:80",
        Reason::NoHealthyUpstream,
    );
    let unknown = Some(gateway("remote/10.22.1.1", 15009));
    refused_because(
        &mesh(remote(unknown)),
        "127.0.0.20:80",
        Reason::GatewayMissing,
    );
    let addressed = {
        let mut it = pod("a/far", &["10.1.1.1"]).serving(GLOBAL, &[]);
        it.network = "remote".into();
        it
    };
    let view = mesh([
        addressed.into(),
        service(GLOBAL, &["127.0.0.20"], &[(80, 80)]).into(),
    ]);
    refused_because(&view, "127.0.0.20:80", Reason::GatewayMissing);
}

#[test]
fn a_waypoint_of_another_network_is_reached_through_its_gateway() {
    let waypoint = {
        let mut it = pod("a/far-waypoint", &[]).serving(WAYPOINT, &[]);
        it.network = "remote".into();
        it.network_gateway = Some(gateway("remote/10.22.1.1", 15009));
        it
    };
    let edge = {
        let mut it = pod("istio/gateway", &["10.22.1.1"]);
        it.network = "remote".into();
        it
    };
    let named = Service {
        subject_alt_names: vec![identity("a", "waypoint")],
        ..service(WAYPOINT, &["127.0.0.11"], &[(15008, 15008)])
    };
    let view = mesh([
        with_waypoint(gateway(WAYPOINT, 15008)).into(),
        named.into(),
        waypoint.into(),
        edge.into(),
    ]);
    let hop = goes(
        &view,
        "127.0.0.3:80",
        "WaypointGateway DoubleHbone 10.22.1.1:15009 web.a.svc.cluster.local:80",
    );
    assert_eq!(*hop.inner_expected, [identity("a", "waypoint")]);
}

#[test]
fn a_failover_by_network_goes_away_only_when_nothing_is_near() {
    let near = |status| Workload {
        status,
        ..pod("a/near", &["127.0.0.21"]).serving(GLOBAL, &[])
    };
    let failover = |view: &mut MeshView| {
        let global = Service {
            load_balancing: LoadBalancing {
                mode: LoadBalancingMode::Failover,
                routing_preferences: vec![Scope::Network],
                ..LoadBalancing::default()
            },
            ..service(GLOBAL, &["127.0.0.20"], &[(80, 8080)])
        };
        let edge = {
            let mut it = pod("istio/gateway", &["10.22.1.1"]);
            it.network = "remote".into();
            it
        };
        apply(view, [global.into(), edge.into()]);
    };
    let mut view = mesh(remote(Some(gateway("remote/10.22.1.1", 15009))));
    apply(&mut view, [near(Health::Healthy).into()]);
    failover(&mut view);
    goes(
        &view,
        "127.0.0.20:80",
        "Direct Hbone 127.0.0.21:15008 127.0.0.21:8080",
    );
    apply(&mut view, [near(Health::Unhealthy).into()]);
    goes(
        &view,
        "127.0.0.20:80",
        "Gateway DoubleHbone 10.22.1.1:15009 example.com:80",
    );
}

#[test]
fn a_workload_known_by_name_is_resolved_and_then_named_by_address() {
    let named = {
        let mut it = pod("a/db", &[]).serving(WEB, &[(80, 5432)]);
        it.hostname = Some("db.example.com".into());
        it
    };
    let mut view = mesh([named.into()]);
    view.apply(crate::view::Update {
        removals: vec![crate::view::Removal::Address(
            "Kubernetes//Pod/a/web-1".into(),
        )],
        ..crate::view::Update::default()
    });
    let hop = goes(
        &view,
        "127.0.0.3:80",
        "Direct Hbone db.example.com:15008 db.example.com:5432",
    );
    let hop = hop.resolved("10.0.0.9".parse().unwrap());
    assert_eq!(hop.target, Target::Address(socket("10.0.0.9:15008")));
    assert_eq!(hop.authority.unwrap().to_string(), "10.0.0.9:5432");
}

#[test]
fn an_address_that_is_both_asks_the_service_unless_for_its_waypoint() {
    let both = pod("a/both", &["127.0.0.3"]);
    let view = mesh([both.clone().into()]);
    goes(
        &view,
        "127.0.0.3:80",
        "Direct Hbone 127.0.0.2:15008 127.0.0.2:8080",
    );
    let view = mesh([
        both.into(),
        with_waypoint(gateway("/127.0.0.10", 15008)).into(),
        waypoint_pod().into(),
    ]);
    goes(
        &view,
        "127.0.0.3:80",
        "Direct Hbone 127.0.0.2:15008 127.0.0.2:8080",
    );
}

#[test]
fn equal_draws_give_equal_decisions_that_can_be_told() {
    let view = mesh([]);
    let outcome = decide(&view, "127.0.0.3:80");
    assert_eq!(outcome, decide(&view, "127.0.0.3:80"));
    let told = serde_json::to_value(&outcome).unwrap();
    assert_eq!(told["Go"]["route"], "Direct");
}
