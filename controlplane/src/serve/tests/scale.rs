//! The design point: 2,000 subscribers, a large world, changes all the time.

use std::{sync::Arc, time::Duration};

use nix::sys::{
    resource::{UsageWho, getrusage},
    time::{TimeVal, TimeValLike as _},
};
use proto::{ADDRESS_TYPE_URL as ADDRESS, xds::DeltaDiscoveryRequest};
use tokio::time::Instant;

use super::subscriber;
use crate::{
    metrics::Metrics,
    output::Resource,
    serve::{registry::Registry, store::Store, subscriber::Subscriber},
    testing::{changes, pod},
};

const SUBSCRIBERS: usize = 2_000;
const PODS: usize = 20_000;

fn numbered(n: usize, variant: &str) -> Arc<Resource> {
    let node = n % SUBSCRIBERS;
    let name = format!("Kubernetes//Pod/shop/pod-{n}");
    Arc::new(Resource {
        name: name.into(),
        aliases: [format!("/10.{}.{}.{}", n >> 16, n >> 8 & 255, n & 255).into()].into(),
        node: Some(format!("node-{node}").into()),
        ..Resource::clone(&pod(1, "", &[], variant))
    })
}

fn ask(versions: &[(&str, &str)]) -> DeltaDiscoveryRequest {
    let versions = versions
        .iter()
        .map(|(n, v)| ((*n).to_owned(), (*v).to_owned()));
    DeltaDiscoveryRequest {
        type_url: ADDRESS.to_owned(),
        initial_resource_versions: versions.collect(),
        ..Default::default()
    }
}

/// Flushes everyone and acknowledges. Bytes put on the wire, and how many distinct payloads they were.
fn round(store: &Store, subscribers: &mut [Subscriber], now: Instant) -> (usize, usize) {
    let mut bytes = 0;
    let mut payloads = Vec::new();
    for subscriber in subscribers {
        for response in subscriber.flush(store, now).unwrap() {
            bytes += response
                .pieces()
                .unwrap()
                .map(|piece| piece.len())
                .sum::<usize>();
            let ack = DeltaDiscoveryRequest {
                type_url: ADDRESS.to_owned(),
                response_nonce: response.nonce.clone(),
                ..Default::default()
            };
            subscriber.request(ack, now).unwrap();
            payloads.push(Arc::as_ptr(&response.payload));
        }
    }
    payloads.sort_unstable();
    payloads.dedup();
    (bytes, payloads.len())
}

/// What this thread has used.
fn cpu() -> Duration {
    let usage = getrusage(UsageWho::RUSAGE_THREAD).unwrap();
    let spent = |time: TimeVal| {
        let microseconds = u64::try_from(time.num_microseconds()).unwrap();
        Duration::from_micros(microseconds)
    };
    spent(usage.user_time()) + spent(usage.system_time())
}

#[test]
fn two_thousand_subscribers_of_a_changing_world_cost_one_encoding_per_change() {
    let store = Store::default();
    let world: Vec<_> = (0..PODS).map(|n| numbered(n, "x")).collect();
    store.apply(&changes(&world, &[]));
    let registry = Registry::new(Metrics::new());
    let mut subscribers: Vec<_> = (0..SUBSCRIBERS).map(|_| subscriber(&registry)).collect();
    let now = Instant::now();
    for subscriber in &mut subscribers {
        subscriber.request(ask(&[]), now).unwrap();
    }
    let (_, payloads) = round(&store, &mut subscribers, now);
    assert_eq!(payloads, 1, "the whole world is encoded once");

    let before = cpu();
    let rounds = 100;
    for n in 0..rounds {
        let change = numbered(n, &format!("y{n}"));
        store.apply(&changes(&[change], &[]));
        let (bytes, payloads) = round(&store, &mut subscribers, now);
        assert_eq!(payloads, 1);
        assert!(bytes < SUBSCRIBERS * 1024, "{bytes} bytes for one change");
    }
    // 100 changes are a second's worth at the design point. Generous: this is an unoptimised build. Of this thread's own
    // time: how long a busy machine lets it wait says nothing of it.
    let took = cpu() - before;
    assert!(
        took < Duration::from_secs(30),
        "{rounds} changes took {took:?}"
    );
    println!("{rounds} changes to {SUBSCRIBERS} subscribers: {took:?}");
}
