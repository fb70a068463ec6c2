use super::*;
use crate::{
    fixture::{gateway, pod, service, view},
    workload::{Addresses, Health},
};

const SERVICE: &str = "a/web.a";

fn here(key: &str, address: &str) -> Workload {
    let mut it = pod(key, &[address]);
    it.network = "west".into();
    it
}

/// An endpoint of `web`, beyond which is `target`.
fn endpoint(key: &str, address: &str) -> Workload {
    here(key, address).serving(SERVICE, &[])
}

fn own() -> Workload {
    here("mesh/gateway", "10.0.9.9")
}

fn web() -> Service {
    service(SERVICE, &[], &[(80, 8080)])
}

fn ask(mesh: &MeshView, service: &Service, passed_waypoint: bool) -> Result<String, Refusal> {
    let own = own();
    let facts = InnerFacts {
        own: &own,
        passed_waypoint,
    };
    let onward = onward(mesh, &facts, service, 80, Draw(7), |_| true)?;
    Ok(format!("{} {}", onward.workload.name, onward.address))
}

#[test]
fn the_inner_tunnel_goes_to_an_endpoints_hbone_port() {
    let mesh = view([web().into(), endpoint("a/one", "10.0.0.1").into()]);
    assert_eq!(ask(&mesh, &web(), false).unwrap(), "one 10.0.0.1:15008");
}

#[test]
fn other_networks_plaintext_pods_sick_ones_and_the_gateway_itself_are_no_endpoints() {
    let mut far = endpoint("a/far", "10.9.0.1");
    far.network = "east".into();
    far.network_gateway = Some(gateway("east/192.0.2.1", 15008));
    let mut plain = endpoint("a/plain", "10.0.0.2");
    plain.tunnel_protocol = TunnelProtocol::None;
    let sick = Workload {
        status: Health::Unhealthy,
        ..endpoint("a/sick", "10.0.0.3")
    };
    let unplaced = Workload {
        addresses: Addresses::default(),
        ..endpoint("a/unplaced", "10.0.0.4")
    };
    let twin = Workload {
        name: "gateway-2".into(),
        uid: crate::names::WorkloadUid("Kubernetes//Pod/mesh/gateway-2".into()),
        ..endpoint("mesh/gateway", "10.0.9.8")
    };
    let mut all = vec![web().into()];
    for bad in [far, plain, sick, unplaced, twin] {
        all.push(bad.into());
    }
    let refusal = ask(&view(all.clone()), &web(), false).unwrap_err();
    assert_eq!(refusal.reason, Reason::NoHealthyUpstream);
    all.push(endpoint("a/one", "10.0.0.1").into());
    assert_eq!(
        ask(&view(all), &web(), false).unwrap(),
        "one 10.0.0.1:15008"
    );
}

#[test]
fn one_that_refused_is_left_out() {
    let one = endpoint("a/one", "10.0.0.1");
    let two = endpoint("a/two", "10.0.0.2");
    let mesh = view([web().into(), one.into(), two.into()]);
    let own = own();
    let facts = InnerFacts {
        own: &own,
        passed_waypoint: false,
    };
    for draw in 0..16 {
        let without = |workload: &Workload| &*workload.name != "one";
        let onward = onward(&mesh, &facts, &web(), 80, Draw(draw), without).unwrap();
        assert_eq!(&*onward.workload.name, "two");
    }
}

#[test]
fn a_services_waypoint_comes_first_unless_one_was_passed() {
    let bound = Service {
        waypoint: Some(gateway("a/wp.a", 15008)),
        ..web()
    };
    let mut proxy = here("a/wp", "10.0.0.7").serving("a/wp.a", &[]);
    proxy.tunnel_protocol = TunnelProtocol::None;
    let front = service("a/wp.a", &[], &[(15008, 15008)]);
    let pod = endpoint("a/one", "10.0.0.1");
    let mesh = view([
        bound.clone().into(),
        front.into(),
        proxy.into(),
        pod.clone().into(),
    ]);
    assert_eq!(ask(&mesh, &bound, false).unwrap(), "wp 10.0.0.7:15008");
    assert_eq!(ask(&mesh, &bound, true).unwrap(), "one 10.0.0.1:15008");
    // Never gone around.
    let mesh = view([bound.clone().into(), pod.into()]);
    let refusal = ask(&mesh, &bound, false).unwrap_err();
    assert_eq!(refusal.reason, Reason::WaypointMissing);
}

#[test]
fn a_waypoint_of_another_network_is_none() {
    let bound = Service {
        waypoint: Some(gateway("east/10.9.0.7", 15008)),
        ..web()
    };
    let mut proxy = pod("a/wp", &["10.9.0.7"]);
    proxy.network = "east".into();
    let mesh = view([
        bound.clone().into(),
        proxy.into(),
        endpoint("a/one", "10.0.0.1").into(),
    ]);
    let refusal = ask(&mesh, &bound, false).unwrap_err();
    assert_eq!(refusal.reason, Reason::WaypointMissing);
}
