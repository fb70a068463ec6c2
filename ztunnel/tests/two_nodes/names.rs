//! DNS as a pod's application asks it.

use hickory_proto::{
    op::{Message, MessageType, OpCode, Query},
    rr::{Name, RData, RecordType, rdata},
};
use mesh::{view::Resource, workload::PodDns};

use crate::{
    rig::{Rig, application, soon},
    rig_or_skip,
};

/// What pod `a` is answered.
pub(crate) async fn ask(rig: &Rig, name: &str, kind: RecordType) -> Message {
    let mut message = Message::new(7, MessageType::Query, OpCode::Query);
    message.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
    let socket = application(&rig.a)
        .bind_udp("0.0.0.0:0".parse().unwrap())
        .unwrap();
    // Nobody is there: the redirection takes it to the tunnel.
    socket.connect("10.96.0.10:53").await.unwrap();
    socket.send(&message.to_vec().unwrap()).await.unwrap();
    let mut reply = [0; 512];
    let length = soon(socket.recv(&mut reply)).await.unwrap();
    Message::from_vec(&reply[..length]).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_resolves_by_its_short_name_inside_the_pod() {
    let rig = rig_or_skip!();
    for (name, kind, expected) in [
        ("web.", RecordType::A, 1),
        ("web.ns.svc.cluster.local.", RecordType::A, 1),
        ("web.", RecordType::AAAA, 0),
    ] {
        let reply = ask(&rig, name, kind).await;
        assert!(reply.metadata.authoritative, "{name} {kind}");
        assert_eq!(reply.answers.len(), expected, "{name} {kind}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_named_port_of_a_service_is_found_inside_the_pod() {
    let rig = rig_or_skip!();
    let reply = ask(&rig, "_http._tcp.web.", RecordType::SRV).await;
    assert!(reply.metadata.authoritative);
    let target = Name::from_ascii("web.ns.svc.cluster.local.").unwrap();
    let place = rdata::SRV::new(0, 100, 80, target);
    assert_eq!(reply.answers[0].data, RData::SRV(place));
    let address = RData::A("10.96.0.7".parse().unwrap());
    assert_eq!(reply.additionals[0].data, address);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pods_own_search_domain_is_taken_off_a_name_of_the_mesh() {
    let rig = rig_or_skip!();
    let searches = ["corp.example".to_owned()];
    let client = {
        let mut it = rig.workload_a();
        it.dns = PodDns::new(true, &searches, &[], None).map(Into::into);
        it
    };
    rig.publish([Resource::Workload(client)]);
    let name = "web.ns.svc.cluster.local.corp.example.";
    let reply = ask(&rig, name, RecordType::A).await;
    let kinds: Vec<_> = reply.answers.iter().map(|it| it.record_type()).collect();
    assert_eq!(kinds, [RecordType::CNAME, RecordType::A]);
    assert_eq!(
        reply.answers[1].name.to_ascii(),
        "web.ns.svc.cluster.local."
    );
}
