use super::*;
use crate::{
    fixture::{apply, gateway, pod, service, socket, view},
    workload::ApplicationTunnel,
};

const WEB: &str = "a/web.a.svc.cluster.local";
const WAYPOINT: &str = "a/waypoint.a.svc.cluster.local";

fn web() -> Workload {
    pod("a/web", &["10.0.0.2"]).serving(WEB, &[(80, 8080)])
}

fn mesh() -> MeshView {
    view([
        web().into(),
        service(
            WEB,
            &["10.1.0.1", "fd00::9"],
            &[(80, 0), (81, 8081), (82, 0)],
        )
        .into(),
    ])
}

fn facts(workload: Workload, authority: &str) -> TunnelFacts {
    TunnelFacts {
        local: SocketAddr::new(workload.addresses[0], 15008),
        workload: Arc::new(workload),
        network: "".into(),
        authority: authority.parse().unwrap(),
        forwarded_host: None,
        socks5: None,
    }
}

/// One row: where it goes, or why not and with which status.
#[track_caller]
fn ends(view: &MeshView, facts: &TunnelFacts, expected: &str) -> Option<InboundTarget> {
    let (told, target) = match tunnel(view, facts) {
        Outcome::Go(target) => (target.destination.to_string(), Some(target)),
        Outcome::Refuse(it) => (
            format!("{} {:?}", it.reason.connect_status(), it.reason),
            None,
        ),
        Outcome::Need(need) => (format!("{need:?}"), None),
    };
    assert_eq!(told, expected, "{}", facts.authority);
    target
}

#[test]
fn the_pods_own_address_is_served() {
    let target = ends(&mesh(), &facts(web(), "10.0.0.2:8080"), "10.0.0.2:8080").unwrap();
    assert_eq!(target.service.unwrap().key().to_string(), WEB);
    assert_eq!(target.proxy_destination, None);
    let target = ends(&mesh(), &facts(web(), "10.0.0.2:9999"), "10.0.0.2:9999").unwrap();
    assert_eq!(target.service, None);
}

#[test]
fn another_pods_address_is_a_mismatch() {
    let mut view = mesh();
    apply(&mut view, [pod("a/other", &["10.0.0.3"]).into()]);
    for authority in ["10.0.0.3:80", "10.9.9.9:80", "10.1.0.1:80", "[fd00::2]:80"] {
        ends(&view, &facts(web(), authority), "400 AddressMismatch");
    }
}

#[test]
fn a_host_name_leads_to_the_pods_port_for_it() {
    let name = "web.a.svc.cluster.local";
    ends(
        &mesh(),
        &facts(web(), &format!("{name}:80")),
        "10.0.0.2:8080",
    );
    ends(
        &mesh(),
        &facts(web(), &format!("{name}:81")),
        "10.0.0.2:8081",
    );
    ends(
        &mesh(),
        &facts(web(), &format!("{name}:82")),
        "503 UnknownHostname",
    );
    ends(
        &mesh(),
        &facts(web(), &format!("{name}:83")),
        "503 UnknownHostname",
    );
    ends(
        &mesh(),
        &facts(web(), "other.a.svc.cluster.local:80"),
        "503 UnknownHostname",
    );
}

#[test]
fn the_tunnels_own_ports_are_refused() {
    for port in RECURSION_PORTS {
        ends(
            &mesh(),
            &facts(web(), &format!("10.0.0.2:{port}")),
            "503 Recursion",
        );
        let plain = PlaintextFacts {
            workload: Arc::new(web()),
            original_dst: SocketAddr::new("10.9.9.9".parse().unwrap(), port),
            socks5: None,
        };
        let refused = Refusal::new(Reason::Recursion);
        assert_eq!(plaintext(&mesh(), &plain), Outcome::Refuse(refused));
    }
    ends(&mesh(), &facts(web(), "10.0.0.2:15020"), "10.0.0.2:15020");
}

#[test]
fn the_port_of_socks5_is_the_tunnels_own_where_it_is_served() {
    for (served, port, expected) in [
        (Some(15080), 15080, "503 Recursion"),
        (Some(15080), 80, "10.0.0.2:80"),
        (None, 15080, "10.0.0.2:15080"),
    ] {
        let named = TunnelFacts {
            socks5: served,
            ..facts(web(), &format!("10.0.0.2:{port}"))
        };
        ends(&mesh(), &named, expected);
        let plain = PlaintextFacts {
            workload: Arc::new(web()),
            original_dst: SocketAddr::new("10.0.0.2".parse().unwrap(), port),
            socks5: served,
        };
        let refused = matches!(plaintext(&mesh(), &plain), Outcome::Refuse(it) if it.reason == Reason::Recursion);
        assert_eq!(refused, expected == "503 Recursion", "{served:?} {port}");
    }
}

fn tunnelled(protocol: ApplicationProtocol, port: Option<u16>) -> Workload {
    {
        let mut it = web();
        it.application_tunnel = Some(ApplicationTunnel { protocol, port });
        it
    }
}

#[test]
fn an_application_tunnel_takes_every_address_on_its_port() {
    let plain = tunnelled(ApplicationProtocol::None, Some(15088));
    let target = ends(&mesh(), &facts(plain, "10.9.9.9:80"), "10.0.0.2:15088").unwrap();
    assert_eq!(target.proxy_destination, None);
    let proxied = tunnelled(ApplicationProtocol::Proxy, None);
    let target = ends(&mesh(), &facts(proxied, "10.9.9.9:80"), "10.0.0.2:80").unwrap();
    assert_eq!(target.proxy_destination, Some(socket("10.9.9.9:80")));
    let looped = tunnelled(ApplicationProtocol::None, Some(15008));
    ends(&mesh(), &facts(looped, "10.9.9.9:80"), "503 Recursion");
}

#[test]
fn a_proxy_header_for_a_host_name_names_one_of_its_addresses() {
    let proxied = tunnelled(ApplicationProtocol::Proxy, Some(15088));
    let name = facts(proxied.clone(), "web.a.svc.cluster.local:80");
    let target = ends(&mesh(), &name, "10.0.0.2:15088").unwrap();
    assert_eq!(target.proxy_destination, Some(socket("10.1.0.1:80")));
    let headless = view([service(WEB, &[], &[(80, 8080)]).into()]);
    ends(&headless, &name, "503 NoAddress");
    let near = Service {
        vips: vec!["far/10.1.0.2".parse().unwrap(), "/fd00::9".parse().unwrap()],
        ..service(WEB, &[], &[(80, 8080)])
    };
    let target = ends(&view([near.into()]), &name, "10.0.0.2:15088").unwrap();
    assert_eq!(target.proxy_destination, Some(socket("[fd00::9]:80")));
}

#[test]
fn a_waypoint_is_asked_for_what_it_stands_before() {
    let waypoint = || pod("a/waypoint", &["10.0.0.9"]).serving(WAYPOINT, &[]);
    for reference in ["/10.0.0.9", WAYPOINT, "/10.1.0.9"] {
        let before_service = Service {
            waypoint: Some(gateway(reference, 15008)),
            ..service(WEB, &["10.1.0.1"], &[(80, 8080)])
        };
        let before_pod = {
            let mut it = web();
            it.waypoint = Some(gateway(reference, 15008));
            it
        };
        let view = view([
            before_service.into(),
            before_pod.into(),
            waypoint().into(),
            service(WAYPOINT, &["10.1.0.9"], &[(15008, 15008)]).into(),
        ]);
        ends(&view, &facts(waypoint(), "10.1.0.1:80"), "10.0.0.9:80");
        ends(&view, &facts(waypoint(), "10.0.0.2:80"), "10.0.0.9:80");
        let stranger = pod("a/stranger", &["10.0.0.8"]);
        ends(
            &view,
            &facts(stranger, "10.1.0.1:80"),
            "400 AddressMismatch",
        );
    }
}

#[test]
fn plaintext_ends_where_it_was_sent() {
    let facts = PlaintextFacts {
        workload: Arc::new(web()),
        original_dst: socket("[::ffff:10.0.0.2]:8080"),
        socks5: None,
    };
    let Outcome::Go(target) = plaintext(&mesh(), &facts) else {
        panic!("refused");
    };
    assert_eq!(target.destination, socket("10.0.0.2:8080"));
    assert_eq!(target.service.unwrap().key().to_string(), WEB);
}

#[test]
fn plaintext_never_reaches_the_pods_loopback() {
    for address in [
        "127.0.0.1:8080",
        "127.9.9.9:8080",
        "[::1]:8080",
        "[::ffff:127.0.0.1]:80",
    ] {
        let facts = PlaintextFacts {
            workload: Arc::new(web()),
            original_dst: socket(address),
            socks5: None,
        };
        let refusal = Refusal::new(Reason::AddressMismatch);
        assert_eq!(plaintext(&mesh(), &facts), refusal.into(), "{address}");
    }
}

#[test]
fn the_service_is_the_one_that_the_sender_names_if_it_is_the_pods() {
    const OTHER: &str = "a/other.a.svc.cluster.local";
    let both = web().serving(OTHER, &[]);
    let mut view = mesh();
    apply(&mut view, [service(OTHER, &[], &[(9, 8080)]).into()]);
    let attributed = |host: Option<&str>| {
        let named = TunnelFacts {
            forwarded_host: host.map(Into::into),
            ..facts(both.clone(), "10.0.0.2:8080")
        };
        let target = ends(&view, &named, "10.0.0.2:8080").unwrap();
        target.service.unwrap().key().to_string()
    };
    assert_eq!(attributed(Some("web.a.svc.cluster.local")), WEB);
    assert_eq!(attributed(Some("other.a.svc.cluster.local")), OTHER);
    assert_eq!(attributed(Some("evil.example.com")), OTHER);
    assert_eq!(attributed(None), OTHER);
}
