use std::sync::Arc;

use proto::{security, workload as wire};

use super::*;
use crate::{
    draw::Draw,
    fixture::{gateway, identity, pod, service},
    identity::TrustDomain,
    policy::{Action, AuthorizationPolicy, Match, PolicyScope, Rule},
    service::{
        CidrVip, HealthPolicy, IpFamilies, LoadBalancing, LoadBalancingMode, PortNames, Scope,
        Service, Visibility, WeightedWaypoint,
    },
    workload::{
        ApplicationProtocol, ApplicationTunnel, Health, Locality, NetworkMode, TunnelProtocol,
        Workload, WorkloadType,
    },
};

fn full_workload() -> Workload {
    {
        let mut it =
            pod("a/web", &["10.0.0.1", "fd00::1"]).serving("a/web.a.svc", &[(80, 8080), (81, 0)]);
        it.hostname = Some("db.example.com".into());
        it.network = "net-1".into();
        it.trust_domain = "other.example".parse().unwrap();
        it.waypoint = Some(gateway("a/waypoint", 15008));
        it.network_gateway = Some(gateway("net-2/10.0.0.9", 15009));
        it.canonical_name = "web".into();
        it.canonical_revision = "v1".into();
        it.workload_type = WorkloadType::CronJob;
        it.set_workload_name("web-v1".into());
        it.native_tunnel = true;
        it.application_tunnel = Some(ApplicationTunnel {
            protocol: ApplicationProtocol::Proxy,
            port: Some(15088),
        });
        it.authorization_policies = vec!["a/p".parse().unwrap(), "b/q".parse().unwrap()];
        it.status = Health::Unhealthy;
        it.cluster_id = "c1".into();
        it.locality = Arc::new(Locality {
            region: "r".into(),
            zone: "z".into(),
            subzone: "s".into(),
        });
        it.network_mode = NetworkMode::HostNetwork;
        it.capacity = 0;
        it.dns = crate::workload::PodDns::new(
            true,
            &["corp.example".to_owned()],
            &["fd00::53".to_owned()],
            crate::workload::PodHost::new("web", "db-0", "db"),
        )
        .map(Into::into);
        it
    }
}

fn full_service() -> Service {
    Service {
        cidr_vips: vec![CidrVip {
            network: "net-1".into(),
            cidr: "10.2.0.0/16".parse().unwrap(),
        }],
        subject_alt_names: vec![identity("a", "web")],
        waypoint: Some(gateway("/10.0.0.9", 15008)),
        weighted_waypoints: vec![WeightedWaypoint {
            destination: gateway("a/waypoint", 15008),
            weight: 7,
        }],
        load_balancing: LoadBalancing {
            routing_preferences: vec![
                Scope::Network,
                Scope::Region,
                Scope::Zone,
                Scope::Subzone,
                Scope::Node,
                Scope::Cluster,
            ],
            mode: LoadBalancingMode::Failover,
            health_policy: HealthPolicy::AllowAll,
        },
        ip_families: IpFamilies::Ipv6Only,
        canonical: true,
        visibility: Visibility::Namespace,
        port_names: PortNames::new([(80, "http")]).map(Arc::new),
        ..service(
            "a/web.a.svc",
            &["10.1.0.1", "fd00::1"],
            &[(80, 0), (81, 8081)],
        )
    }
}

fn full_policy() -> AuthorizationPolicy {
    AuthorizationPolicy {
        key: "a/p".parse().unwrap(),
        scope: PolicyScope::Namespace,
        action: Action::Deny,
        rules: serde_json::from_str(
            r#"[[[{"namespaces":[{"Exact":"a"}],"notNamespaces":[{"Prefix":"b"}],
                "principals":[{"Suffix":"c"}],"notPrincipals":[{"Presence":[]}],
                "sourceIps":["10.0.0.0/8"],"notSourceIps":["10.0.0.1/32"],
                "destinationIps":["fd00::/16"],"notDestinationIps":["fd00::1/128"],
                "destinationPorts":[80],"notDestinationPorts":[81],
                "serviceAccounts":[{"namespace":"a","serviceAccount":"b"}],
                "notServiceAccounts":[{"namespace":"c","serviceAccount":"d"}]}],[]],[]]"#,
        )
        .unwrap(),
        dry_run: true,
        faults: Vec::new(),
    }
}

#[test]
fn every_field_survives_the_wire() {
    let workload = full_workload();
    assert_eq!(
        Workload::try_from(wire::Workload::from(&workload)),
        Ok(workload)
    );
    let service = full_service();
    assert_eq!(
        Service::try_from(wire::Service::from(&service)),
        Ok(service)
    );
    let policy = full_policy();
    assert_eq!(
        AuthorizationPolicy::try_from(security::Authorization::from(&policy)),
        Ok(policy)
    );
}

#[test]
fn dns_settings_that_make_no_sense_are_those_of_any_pod() {
    let broken = wire::Extension {
        name: "any".to_owned(),
        config: Some(prost_types::Any {
            type_url: proto::POD_DNS_TYPE_URL.to_owned(),
            value: vec![0xff],
        }),
    };
    let sent = wire::Workload {
        extensions: vec![broken],
        ..wire::Workload::from(&pod("a/web", &["10.0.0.1"]))
    };
    assert_eq!(Workload::try_from(sent), Ok(pod("a/web", &["10.0.0.1"])));
    let many: Vec<_> = (0..99).map(|n| format!("10.0.0.{n}")).collect();
    let dns = crate::workload::PodDns::new(true, &many, &many, None).expect("not the default");
    assert_eq!((dns.searches.len(), dns.nameservers.len()), (32, 3));
    assert_eq!(crate::workload::PodDns::new(true, &[], &[], None), None);
}

#[test]
fn a_plain_record_survives_the_wire_and_leaves_defaults_out() {
    let workload = pod("a/web", &["10.0.0.1"]);
    let sent = wire::Workload::from(&workload);
    assert_eq!((sent.trust_domain.as_str(), sent.capacity), ("", None));
    assert_eq!(Workload::try_from(sent), Ok(workload));
    let service = service("a/web", &[], &[]);
    assert_eq!(
        Service::try_from(wire::Service::from(&service)),
        Ok(service)
    );
}

/// Every combination of the fields with few values, and draws for the rest.
#[test]
fn drawn_records_survive_the_wire() {
    let mut draw = Draw(1);
    let mut next = |bound: u64| {
        let (now, later) = draw.split();
        draw = later;
        now.below(bound).unwrap()
    };
    for _ in 0..2_000 {
        let mut workload = full_workload();
        let protocols = [
            TunnelProtocol::None,
            TunnelProtocol::Hbone,
            TunnelProtocol::Unsupported,
        ];
        let types = [
            WorkloadType::Deployment,
            WorkloadType::CronJob,
            WorkloadType::Pod,
            WorkloadType::Job,
        ];
        let mut pick = |count: usize| usize::try_from(next(u64::try_from(count).unwrap())).unwrap();
        workload.tunnel_protocol = protocols[pick(3)];
        workload.workload_type = types[pick(4)];
        workload.waypoint =
            [None, Some(gateway("a/w", 1)), Some(gateway("n/::1", 2))][pick(3)].clone();
        workload.hostname = [None, Some("h".into())][pick(2)].clone();
        workload.locality = [Arc::default(), workload.locality][pick(2)].clone();
        workload.capacity = u32::try_from(pick(3)).unwrap();
        let kept = workload.addresses.iter().copied().take(pick(3));
        workload.addresses = kept.collect();
        workload.trust_domain =
            [TrustDomain::default(), workload.trust_domain.clone()][pick(2)].clone();
        assert_eq!(
            Workload::try_from(wire::Workload::from(&workload)),
            Ok(workload)
        );
    }
}

fn minimal() -> wire::Workload {
    wire::Workload {
        uid: "u".into(),
        ..wire::Workload::default()
    }
}

#[test]
fn empty_fields_take_the_wires_defaults() {
    let workload = Workload::try_from(minimal()).unwrap();
    assert_eq!(
        workload.identity().to_string(),
        "spiffe://cluster.local/ns//sa/default"
    );
    assert_eq!(
        (&*workload.cluster_id, workload.capacity),
        ("Kubernetes", 1)
    );
    assert_eq!(workload.hostname, None);
}

#[track_caller]
fn workload_rejected(change: impl FnOnce(&mut wire::Workload), expected: &str) {
    let mut sent = minimal();
    change(&mut sent);
    let error = Workload::try_from(sent).unwrap_err();
    assert_eq!(error.to_string(), expected);
}

#[test]
fn a_rejected_workload_names_the_field() {
    workload_rejected(|it| it.uid.clear(), "uid: missing");
    workload_rejected(
        |it| it.addresses = vec![vec![1, 2, 3, 4], vec![0; 5]],
        "addresses[1]: an address of 5 bytes",
    );
    workload_rejected(
        |it| it.waypoint = Some(wire::GatewayAddress::default()),
        "waypoint.destination: missing",
    );
    workload_rejected(
        |it| {
            it.network_gateway = Some(wire::GatewayAddress {
                hbone_mtls_port: 70_000,
                ..(&gateway("a/w", 1)).into()
            });
        },
        "network_gateway.hbone_mtls_port: port 70000 is out of range",
    );
    workload_rejected(
        |it| {
            it.services.insert("web".into(), wire::PortList::default());
        },
        r#"services["web"]: "web" is not of the form namespace/hostname"#,
    );
    workload_rejected(
        |it| it.authorization_policies = vec!["a/b".into(), "c".into()],
        r#"authorization_policies[1]: "c" is not of the form namespace/name"#,
    );
    workload_rejected(
        |it| it.trust_domain = "Not a domain".into(),
        r#"trust_domain: "Not a domain" is not a trust domain: lower-case letters, digits, '.', '-' and '_', 1 to 255 of them"#,
    );
}

#[test]
fn a_rejected_service_names_the_field() {
    let rejected = |change: &dyn Fn(&mut wire::Service)| {
        let mut sent = wire::Service::from(&service("a/web", &["10.1.0.1"], &[(80, 80)]));
        change(&mut sent);
        Service::try_from(sent).unwrap_err().to_string()
    };
    assert_eq!(rejected(&|it| it.hostname.clear()), "hostname: missing");
    let long = rejected(&|it| it.addresses[0].length = Some(33));
    assert_eq!(long, "addresses[0]: a prefix of 33 bits");
    let port = rejected(&|it| it.ports[0].target_port = 65_536);
    assert_eq!(port, "ports[0]: port 65536 is out of range");
    let empty = rejected(&|it| it.weighted_waypoints = vec![wire::WeightedWaypoint::default()]);
    assert_eq!(empty, "weighted_waypoints[0].destination: missing");
    let slash = rejected(&|it| it.hostname = "a/b".to_owned());
    assert!(slash.starts_with("hostname: "), "{slash}");
}

#[test]
fn an_address_without_a_type_is_rejected() {
    let error = Resource::try_from(wire::Address::default()).unwrap_err();
    assert_eq!(error.to_string(), "type: missing");
}

#[test]
fn an_unknown_number_degrades_one_field_toward_the_closed_side() {
    let sent = wire::Workload {
        tunnel_protocol: 99,
        status: 99,
        workload_type: 99,
        network_mode: 99,
        ..minimal()
    };
    let workload = Workload::try_from(sent).unwrap();
    assert_eq!(workload.tunnel_protocol, TunnelProtocol::Unsupported);
    assert_eq!(workload.status, Health::Unhealthy);
    assert_eq!(workload.workload_type, WorkloadType::Pod);
    assert_eq!(workload.network_mode, NetworkMode::Standard);
    let mut sent = wire::Service::from(&full_service());
    sent.visibility = 99;
    sent.ip_families = 99;
    let balancing = sent.load_balancing.as_mut().unwrap();
    balancing.routing_preference = vec![0, 1, 99];
    (balancing.mode, balancing.health_policy) = (99, 99);
    let service = Service::try_from(sent).unwrap();
    assert_eq!(service.visibility, Visibility::Public);
    assert_eq!(service.ip_families, IpFamilies::Automatic);
    let expected = LoadBalancing {
        routing_preferences: vec![Scope::Region],
        ..LoadBalancing::default()
    };
    assert_eq!(service.load_balancing, expected);
}

#[test]
fn legacy_mutual_tls_is_kept_and_never_becomes_plaintext() {
    let sent = wire::Workload {
        tunnel_protocol: wire::TunnelProtocol::LegacyIstioMtls.into(),
        ..minimal()
    };
    let workload = Workload::try_from(sent).unwrap();
    assert_eq!(workload.tunnel_protocol, TunnelProtocol::Unsupported);
}

#[test]
fn a_mapped_address_is_an_ipv4_address() {
    let mapped: std::net::Ipv6Addr = "::ffff:10.0.0.1".parse().unwrap();
    let sent = wire::Workload {
        addresses: vec![mapped.octets().to_vec()],
        ..minimal()
    };
    let workload = Workload::try_from(sent).unwrap();
    assert_eq!(*workload.addresses, ["10.0.0.1".parse::<IpAddr>().unwrap()]);
    assert_eq!(
        cidr(&mapped.octets(), 104),
        Ok("10.0.0.0/8".parse().unwrap())
    );
    assert_eq!(cidr(&mapped.octets(), 95), Err(Problem::PrefixLength(95)));
}

#[test]
fn a_prefix_of_full_length_is_an_address() {
    let mut sent = wire::Service::from(&service("a/web", &["10.1.0.1", "10.1.0.2"], &[]));
    sent.addresses[0].length = Some(32);
    sent.addresses[1].length = Some(24);
    let service = Service::try_from(sent).unwrap();
    assert_eq!(service.vips, ["/10.1.0.1".parse().unwrap()]);
    assert_eq!(service.cidr_vips[0].cidr, "10.1.0.0/24".parse().unwrap());
}

#[test]
fn a_san_of_another_form_matches_no_one_and_is_left_out() {
    let mut sent = wire::Service::from(&full_service());
    sent.subject_alt_names.insert(0, "web.example.com".into());
    let service = Service::try_from(sent).unwrap();
    assert_eq!(service.subject_alt_names, [identity("a", "web")]);
}

/// A policy with one sound match and one that `spoil` has touched.
fn spoiled(
    action: security::Action,
    spoil: impl FnOnce(&mut security::Match),
) -> AuthorizationPolicy {
    let sound: AuthorizationPolicy = serde_json::from_str(
        r#"{"name":"p","namespace":"a","scope":"Global","action":"Allow",
            "rules":[[[{"destinationPorts":[80]},{"destinationPorts":[81]}]]]}"#,
    )
    .unwrap();
    let mut sent = security::Authorization::from(&sound);
    sent.action = action.into();
    spoil(&mut sent.rules[0].clauses[0].matches[1]);
    AuthorizationPolicy::try_from(sent).unwrap()
}

type Spoil = fn(&mut security::Match);

const SPOILS: [(Spoil, &str); 6] = [
    (
        |it| {
            it.source_ips = vec![security::Address {
                address: vec![1],
                length: 8,
            }]
        },
        "source_ips[0]: an address of 1 bytes",
    ),
    (
        |it| {
            it.not_source_ips = vec![security::Address {
                address: vec![1; 4],
                length: 33,
            }]
        },
        "not_source_ips[0]: a prefix of 33 bits",
    ),
    (
        |it| it.principals = vec![security::StringMatch::default()],
        "principals[0]: missing",
    ),
    (
        |it| it.not_namespaces = vec![security::StringMatch::default()],
        "not_namespaces[0]: missing",
    ),
    (
        |it| it.destination_ports = vec![65_616],
        "destination_ports[0]: port 65616 is out of range",
    ),
    (
        |it| it.not_destination_ports = vec![1 << 20],
        "not_destination_ports[0]: port 1048576 is out of range",
    ),
];

#[test]
fn a_value_that_cannot_be_understood_never_widens_an_allow() {
    for (spoil, fault) in SPOILS {
        let policy = spoiled(security::Action::Allow, spoil);
        let matches = &policy.rules[0].clauses[0].matches;
        assert_eq!(matches[0].destination_ports, [80], "{fault}");
        assert_eq!(
            matches[1],
            Match::default(),
            "the empty match never matches: {fault}"
        );
        assert_eq!(
            policy.faults,
            [format!("rules[0].clauses[0].matches[1].{fault}")]
        );
    }
}

#[test]
fn a_value_that_cannot_be_understood_makes_a_deny_deny_all() {
    for (spoil, fault) in SPOILS {
        let policy = spoiled(security::Action::Deny, spoil);
        assert_eq!(policy.rules, [Rule::default()], "{fault}");
        assert_eq!(policy.faults.len(), 1);
    }
}

#[test]
fn an_unknown_action_denies_what_it_selects_and_an_unknown_scope_rejects() {
    let mut sent = security::Authorization::from(&full_policy());
    sent.action = 2;
    let policy = AuthorizationPolicy::try_from(sent.clone()).unwrap();
    assert_eq!(
        (policy.action, policy.rules),
        (Action::Deny, vec![Rule::default()])
    );
    assert_eq!(policy.faults, ["action: unknown value 2"]);
    sent.scope = 9;
    let error = AuthorizationPolicy::try_from(sent).unwrap_err();
    assert_eq!(error.to_string(), "scope: unknown value 9");
}
