use super::*;
use crate::{
    fixture::{identity, pod, service, socket},
    workload::{Locality, WorkloadType},
};

fn client() -> Workload {
    {
        let mut it = pod("a/client-1", &["10.1.0.5"]);
        it.set_workload_name("client".into());
        it.workload_type = WorkloadType::Deployment;
        it.canonical_name = "client".into();
        it.canonical_revision = "v2".into();
        it.locality = Arc::new(Locality {
            region: "r".into(),
            ..Locality::default()
        });
        it
    }
}

fn web() -> Workload {
    {
        let mut it = pod("b/web-1", &["10.1.1.9"]);
        it.set_workload_name("web".into());
        it.canonical_name = "web".into();
        it
    }
}

fn record() -> FlowRecord {
    let service = service("b/web.b.svc.cluster.local", &["10.96.0.7"], &[]);
    FlowRecord {
        source: Party::of_workload(&client(), Some(&identity("a", "client"))),
        destination: Party::of_workload(&web(), Some(&identity("b", "web"))),
        authority: Some("10.96.0.7:80".parse().unwrap()),
        service: Some(ServiceName::from(&service)),
        hop: Hop::Hbone,
        security: Security::MutualTls,
        received_bytes: 12,
        sent_bytes: 345,
        duration: Duration::from_millis(6),
        end: Some(EndReason::Complete),
        ..FlowRecord::new(
            Direction::Outbound,
            socket("10.1.0.5:40000"),
            socket("10.1.1.9:15008"),
        )
    }
}

#[test]
fn the_log_tells_both_ends_and_the_bytes_of_the_pod() {
    let outbound = record();
    let expected = AccessFields {
        source_addr: socket("10.1.0.5:40000"),
        source: PartyFields {
            workload: Some("client-1"),
            namespace: Some("a"),
            cluster: Some("Kubernetes"),
            identity: Some("spiffe://cluster.local/ns/a/sa/client"),
        },
        destination_addr: socket("10.1.1.9:15008"),
        authority: outbound.authority.as_ref(),
        service: Some("web.b.svc.cluster.local"),
        destination: PartyFields {
            workload: Some("web-1"),
            namespace: Some("b"),
            cluster: Some("Kubernetes"),
            identity: Some("spiffe://cluster.local/ns/b/sa/web"),
        },
        policy: None,
        end: None,
        direction: Direction::Outbound,
        bytes_sent: Some(12),
        bytes_received: Some(345),
        duration: Some(Duration::from_millis(6)),
        error: None,
    };
    assert_eq!(outbound.fields(), expected);
    let inbound = FlowRecord {
        direction: Direction::Inbound,
        ..record()
    };
    let fields = inbound.fields();
    let bytes = (fields.bytes_sent, fields.bytes_received);
    assert_eq!(bytes, (Some(345), Some(12)));
}

#[test]
fn plaintext_tells_no_identity() {
    let plain = FlowRecord {
        security: Security::Plaintext,
        ..record()
    };
    let fields = plain.fields();
    let told = [fields.source.identity, fields.destination.identity];
    assert_eq!(told, [None, None]);
}

#[test]
fn a_denial_names_the_policies() {
    let denied = |by| FlowRecord {
        end: Some(EndReason::Refused(Reason::PolicyDenied)),
        decided_by: Some(Box::new(by)),
        error: Some("explicitly denied by: b/deny-all (rule 2)".into()),
        ..record()
    };
    let key = |text: &str| text.parse().unwrap();
    let one = denied(Object::Policy(key("b/deny-all")));
    assert_eq!(one.fields().policy.as_deref(), Some("b/deny-all"));
    assert_eq!(one.fields().error.as_deref(), one.error.as_deref());
    let some = denied(Object::Policies(vec![key("b/x"), key("b/y")]));
    assert_eq!(some.fields().policy.as_deref(), Some("b/x,b/y"));
}

#[test]
fn an_end_is_told_by_its_name_whatever_its_error_says() {
    for (end, error, expected) in [
        (EndReason::Complete, None, (None, None)),
        (
            EndReason::SourceReset,
            None,
            (Some("reset by source"), None),
        ),
        (
            EndReason::SourceReset,
            Some("why"),
            (Some("reset by source"), Some("why")),
        ),
        (
            EndReason::TlsFailed,
            None,
            (Some("tls handshake failed"), Some("tls handshake failed")),
        ),
        (
            EndReason::TlsFailed,
            Some("why"),
            (Some("tls handshake failed"), Some("why")),
        ),
        (
            EndReason::TlsFailed,
            Some("tls handshake failed"),
            (Some("tls handshake failed"), Some("tls handshake failed")),
        ),
    ] {
        let ended = FlowRecord {
            end: Some(end),
            error: error.map(str::to_owned),
            ..record()
        };
        let fields = ended.fields();
        let told = (fields.end.as_deref(), fields.error.as_deref());
        assert_eq!(told, expected, "{end:?} {error:?}");
    }
}

#[test]
fn an_open_connection_has_no_end() {
    let open = FlowRecord {
        end: None,
        ..record()
    };
    let fields = open.fields();
    let told = (fields.bytes_sent, fields.bytes_received, fields.duration);
    assert_eq!(told, (None, None, None));
}

fn label<'a>(labels: &'a TcpLabels, name: &str) -> Option<&'a str> {
    let pairs = labels.pairs(ResponseFlag::None);
    let found = pairs.iter().find(|(key, _)| *key == name);
    found.map(|(_, value)| *value)
}

/// No two labels of a known end have one text, but those that are to have.
fn distinct() -> FlowRecord {
    let end = |name: &str, place| PartyLabels {
        workload: Some(format!("{name}-deployment").into()),
        canonical_service: Some(format!("{name}-canonical").into()),
        canonical_revision: Some(format!("{name}-v1").into()),
        namespace: Some(format!("{name}-ns").into()),
        principal: Some(format!("spiffe://td/ns/{name}-ns/sa/{name}").into()),
        cluster: Some(format!("{name}-cluster").into()),
        place,
        by_baggage: false,
    };
    let place = |region: &str, zone: &str| Some((region.into(), zone.into()));
    let mut record = record();
    record.source.labels = Arc::new(end("client", place("r1", "z1")));
    record.destination.labels = Arc::new(end("web", place("r2", "")));
    record
}

#[test]
fn metrics_carry_istios_labels_in_istios_order() {
    let labels = distinct().labels();
    let expected = [
        ("reporter", "source"),
        ("source_workload", "client-deployment"),
        ("source_canonical_service", "client-canonical"),
        ("source_canonical_revision", "client-v1"),
        ("source_workload_namespace", "client-ns"),
        ("source_principal", "spiffe://td/ns/client-ns/sa/client"),
        ("source_app", "client-canonical"),
        ("source_version", "client-v1"),
        ("source_cluster", "client-cluster"),
        ("destination_service", "web.b.svc.cluster.local"),
        ("destination_service_namespace", "b"),
        ("destination_service_name", "web"),
        ("destination_workload", "web-deployment"),
        ("destination_canonical_service", "web-canonical"),
        ("destination_canonical_revision", "web-v1"),
        ("destination_workload_namespace", "web-ns"),
        ("destination_principal", "spiffe://td/ns/web-ns/sa/web"),
        ("destination_app", "web-canonical"),
        ("destination_version", "web-v1"),
        ("destination_cluster", "web-cluster"),
        ("request_protocol", "tcp"),
        ("response_flags", "DENY"),
        ("connection_security_policy", "mutual_tls"),
        ("source_region", "r1"),
        ("source_zone", "z1"),
        ("destination_region", "r2"),
        ("destination_zone", "unknown"),
    ];
    assert_eq!(labels.pairs(ResponseFlag::Deny), expected);
}

#[test]
fn what_a_record_tells_of_a_workload_is_in_its_labels() {
    let labels = record().labels();
    for (name, expected) in [
        ("source_workload", "client"),
        ("source_canonical_service", "client"),
        ("source_workload_namespace", "a"),
        ("source_principal", "spiffe://cluster.local/ns/a/sa/client"),
        ("source_version", "v2"),
        ("source_cluster", "Kubernetes"),
        ("destination_workload", "web"),
        ("destination_canonical_revision", "unknown"),
        ("response_flags", "-"),
        ("source_region", "r"),
        ("source_zone", "unknown"),
    ] {
        assert_eq!(label(&labels, name), Some(expected), "{name}");
    }
}

#[test]
fn a_waypoint_reports_as_itself() {
    let through = FlowRecord {
        direction: Direction::Waypoint,
        ..record()
    };
    assert_eq!(label(&through.labels(), "reporter"), Some("waypoint"));
    let fields = through.fields();
    assert_eq!(
        (fields.bytes_sent, fields.bytes_received),
        (Some(345), Some(12))
    );
}

#[test]
fn of_a_flow_that_nothing_is_known_of_labels_say_unknown() {
    let bare = FlowRecord::new(Direction::Inbound, socket("1.1.1.1:1"), socket("2.2.2.2:2"));
    let labels = bare.labels();
    assert_eq!(label(&labels, "source_workload"), Some("unknown"));
    assert_eq!(
        label(&labels, "connection_security_policy"),
        Some("unknown")
    );
    assert_eq!(label(&labels, "source_region"), None);
}

#[test]
fn pods_of_one_workload_share_their_labels() {
    let other = Party::of_workload(
        &Workload {
            name: "web-2".into(),
            ..web()
        },
        Some(&identity("b", "web")),
    );
    assert_eq!(record().destination.labels, other.labels);
}

#[test]
fn the_same_node_is_told_truthfully() {
    let same = FlowRecord {
        security: Security::SameNode,
        ..record()
    };
    assert_eq!(
        label(&same.labels(), "connection_security_policy"),
        Some("same_node")
    );
}

#[test]
fn baggage_fills_in_for_a_record_and_never_for_an_identity() {
    let baggage = Baggage::parse(["k8s.namespace.name=evil,k8s.pod.name=w,service.name=s"]);
    let party = Party::of_baggage(&baggage, Some(&identity("b", "web")));
    assert_eq!(party.labels.namespace.as_deref(), Some("b"));
    assert_eq!(party.labels.workload.as_deref(), Some("w"));
    assert_eq!(party.fields(Security::MutualTls).workload, Some("s"));
    assert_eq!(party.labels.app().map(|it| &**it), Some("w"));
    let nothing = Party::of_baggage(&Baggage::default(), None);
    assert_eq!(*nothing.labels, PartyLabels::default());
}

#[test]
fn whatever_a_peer_answers_is_one_of_a_few_labels_and_the_usual_statuses_are_told_apart() {
    let label = |status| EndReason::PeerRefused(status).label();
    for usual in [400, 401, 403, 404, 429, 502, 503, 504] {
        assert_eq!(label(usual), format!("http status: {usual}"));
    }
    for (status, class) in [
        (204, "2xx"),
        (302, "3xx"),
        (418, "4xx"),
        (599, "5xx"),
        (999, "other"),
    ] {
        assert_eq!(label(status), format!("http status: {class}"));
        let line = EndReason::PeerRefused(status).to_string();
        assert_eq!(line, format!("http status: {status}"), "lines tell which");
    }
    let all: std::collections::BTreeSet<_> = (0..=u16::MAX).map(label).collect();
    assert_eq!(all.len(), 13);
}

/// The whole list: its label `reason`, its flag and whose doing it is. A text that is not here is none of the list.
const ENDS: [(EndReason, &str, &str, Blame); 38] = {
    use Blame::{Configuration, Destination, Network, Nobody, Operation, Ours, Policy, Source};
    use EndReason::*;
    use Reason::*;
    [
        (Complete, "complete", "-", Nobody),
        (
            PolicyChanged,
            "connection closed due to policy change",
            "DENY",
            Policy,
        ),
        (BadRequest, "invalid CONNECT request", "CONNECT", Source),
        (ConnectRefused, "connection refused", "CONNECT", Destination),
        (ConnectTimedOut, "connection timed out", "CONNECT", Network),
        (
            ConnectUnreachable,
            "destination unreachable",
            "CONNECT",
            Network,
        ),
        (
            TunnelTimedOut,
            "connection timed out, maybe a NetworkPolicy is blocking HBONE port 15008",
            "NETWORK_POLICY",
            Network,
        ),
        (ResolveFailed, "name resolution failed", "CONNECT", Network),
        (
            TlsFailed,
            "tls handshake failed",
            "TLS_FAILURE",
            Destination,
        ),
        (
            Http2Failed,
            "http2 handshake failed",
            "H2_HANDSHAKE_FAILURE",
            Destination,
        ),
        (PeerRefused(401), "http status: 401", "CONNECT", Destination),
        (TunnelLost, "tunnel lost", "CONNECT", Network),
        (
            NoCertificate,
            "no certificate",
            "IDENTITY_ERROR",
            Configuration,
        ),
        (
            TooMany,
            "too many connections of the pod",
            "CONNECT",
            Configuration,
        ),
        (
            CertificateRevoked,
            "certificate revoked",
            "CERT_REVOKED",
            Destination,
        ),
        (SourceReset, "reset by source", "-", Source),
        (DestinationReset, "reset by destination", "-", Destination),
        (Idle, "idle for too long", "-", Nobody),
        (Drained, "connection closed by drain", "-", Operation),
        (PodRemoved, "pod removed", "-", Operation),
        (Internal, "internal error", "CONNECT", Ours),
        (
            Refused(Recursion),
            "attempted recursive call to ourselves",
            "CONNECT",
            Source,
        ),
        (
            Refused(UnknownSource),
            "unknown source",
            "CONNECT",
            Configuration,
        ),
        (
            Refused(WaypointMissing),
            "required waypoint not found",
            "CONNECT",
            Configuration,
        ),
        (
            Refused(GatewayMissing),
            "no gateway to the destination's network",
            "CONNECT",
            Configuration,
        ),
        (
            Refused(NoHealthyUpstream),
            "no healthy upstream",
            "CONNECT",
            Destination,
        ),
        (
            Refused(NoAddress),
            "destination has no usable address",
            "CONNECT",
            Configuration,
        ),
        (
            Refused(DestinationUntold),
            "the control plane has not told what the destination is",
            "CONNECT",
            Configuration,
        ),
        (
            Refused(ProtocolUnsupported),
            "destination asks for an unsupported protocol",
            "CONNECT",
            Configuration,
        ),
        (Refused(AddressMismatch), "ip mismatch", "CONNECT", Source),
        (
            Refused(UnknownHostname),
            "no such service or port here",
            "CONNECT",
            Source,
        ),
        (
            Refused(NotServed),
            "not served by this waypoint",
            "CONNECT",
            Source,
        ),
        (
            Refused(UnknownPort),
            "the service has no such port",
            "CONNECT",
            Source,
        ),
        (
            Refused(NoRoute),
            "no route leads anywhere",
            "CONNECT",
            Configuration,
        ),
        (
            Refused(TooManyConnections),
            "the service's connection pool is used up",
            "CONNECT",
            Configuration,
        ),
        (Refused(PolicyDenied), "explicitly denied", "DENY", Policy),
        (
            Refused(PolicyNotAllowed),
            "allow policies exist, but none allowed",
            "DENY",
            Policy,
        ),
        (
            Refused(PolicyUnknown),
            "policy not known",
            "DENY",
            Configuration,
        ),
    ]
};

#[test]
fn every_end_has_its_flag_and_its_blame() {
    let mut texts = std::collections::BTreeSet::new();
    for (end, text, flag, blame) in ENDS {
        assert_eq!(end.to_string(), text, "{end:?}");
        assert_eq!(end.label(), text, "{end:?}");
        assert_eq!((end.flag().as_str(), end.blame()), (flag, blame), "{end:?}");
        assert_eq!(end.is_failure(), flag != "-", "{end:?}");
        assert!(texts.insert(text), "{text} twice");
    }
}

#[test]
fn a_refused_connect_is_answered_by_whose_fault_it_is() {
    let refusals = ENDS.iter().filter_map(|(end, ..)| match end {
        EndReason::Refused(reason) => Some(*reason),
        _ => None,
    });
    for reason in refusals {
        let expected = match reason {
            Reason::AddressMismatch => 400,
            Reason::PolicyDenied | Reason::PolicyNotAllowed | Reason::PolicyUnknown => 401,
            Reason::NotServed | Reason::UnknownPort => 404,
            _ => 503,
        };
        assert_eq!(reason.connect_status(), expected, "{reason:?}");
    }
}

#[test]
fn a_peer_from_another_network_is_not_looked_up_by_address() {
    let view = crate::fixture::view([client().into()]);
    let found = |forwarded| {
        let peer = "::ffff:10.1.0.5".parse().unwrap();
        peer_workload(&view, &"".into(), peer, forwarded).is_some()
    };
    assert!(found(None));
    assert!(found(Some("")));
    assert!(!found(Some("net-2")));
}

#[test]
fn a_record_tells_its_version() {
    let told = serde_json::to_value(record()).unwrap();
    assert_eq!(told["version"], VERSION);
    assert_eq!(told["security"], "mutual_tls");
    assert_eq!(told["end"], "complete");
}
