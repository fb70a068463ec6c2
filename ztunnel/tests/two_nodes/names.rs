//! DNS as a pod's application asks it.

use hickory_proto::{
    op::{Message, MessageType, OpCode, Query},
    rr::{Name, RecordType},
};

use crate::{
    rig::{application, soon},
    rig_or_skip,
};

#[tokio::test(flavor = "multi_thread")]
async fn a_service_resolves_by_its_short_name_inside_the_pod() {
    let rig = rig_or_skip!();
    for (name, kind, expected) in [
        ("web.", RecordType::A, 1),
        ("web.ns.svc.cluster.local.", RecordType::A, 1),
        ("web.", RecordType::AAAA, 0),
    ] {
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
        let reply = Message::from_vec(&reply[..length]).unwrap();
        assert!(reply.metadata.authoritative, "{name} {kind}");
        assert_eq!(reply.answers.len(), expected, "{name} {kind}");
    }
}
