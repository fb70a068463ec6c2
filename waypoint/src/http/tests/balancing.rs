//! Which endpoint a request goes to.

use std::{collections::BTreeMap, time::Duration};

use http::Version;
use mesh::{
    l7::{
        backend::{BackendPolicy, BackendTls, Balancer, HashKey, HashTable, TrafficPolicy},
        view,
    },
    workload::Health,
};

use super::rig::{Answer, Backend, Rig, full};

async fn three(balancer: Balancer) -> (Rig, [Backend; 3]) {
    let backends = [
        Backend::echo(Version::HTTP_11, "a").await,
        Backend::echo(Version::HTTP_11, "b").await,
        Backend::echo(Version::HTTP_11, "c").await,
    ];
    let [a, b, c] = &backends;
    let rig = Rig::new(Version::HTTP_11, &[a, b, c]).await;
    rig.tell([view::Resource::Backend(Box::new(BackendPolicy {
        service: rig.target.clone(),
        sources: Vec::new(),
        policy: TrafficPolicy {
            balancer,
            ..TrafficPolicy::default()
        },
        ports: BTreeMap::new(),
        subsets: BTreeMap::new(),
    }))]);
    (rig, backends)
}

#[tokio::test]
async fn endpoints_in_turn_have_the_same_share() {
    let (rig, backends) = three(Balancer::RoundRobin).await;
    let mut client = rig.client(Version::HTTP_11).await;
    for _ in 0..30 {
        client.get("/").await;
    }
    assert_eq!(backends.each_ref().map(Backend::requests), [10, 10, 10]);
}

#[tokio::test]
async fn equal_keys_have_equal_endpoints() {
    let header = HashKey::Header("x-user".parse().unwrap());
    let (rig, backends) = three(Balancer::ConsistentHash {
        key: header,
        table: HashTable::Ring(1024),
    })
    .await;
    let mut client = rig.client(Version::HTTP_11).await;
    for user in 0..20 {
        let mut endpoints = Vec::new();
        for _ in 0..3 {
            let request = client
                .request("GET", "/")
                .header("x-user", user.to_string());
            let answer = Answer::of(client.send(request.body(full("")).unwrap()).await).await;
            endpoints.push(answer.header("x-backend").to_owned());
        }
        endpoints.dedup();
        assert_eq!(endpoints.len(), 1, "user {user}");
    }
    assert!(backends.iter().all(|it| it.requests() > 0));
}

#[tokio::test]
async fn a_cookie_that_is_missing_is_made_and_kept_to() {
    let key = HashKey::Cookie {
        name: "user".into(),
        path: None,
        ttl: Some(Duration::ZERO),
        attributes: Vec::new(),
    };
    let (rig, _backends) = three(Balancer::ConsistentHash {
        key,
        table: HashTable::Maglev(65_537),
    })
    .await;
    let mut client = rig.client(Version::HTTP_11).await;
    let first = client.get("/").await;
    let cookie = first
        .header("set-cookie")
        .split(';')
        .next()
        .unwrap()
        .to_owned();
    assert!(cookie.starts_with("user="), "{cookie}");
    for _ in 0..10 {
        let request = client.request("GET", "/").header("cookie", &cookie);
        let answer = Answer::of(client.send(request.body(full("")).unwrap()).await).await;
        assert_eq!(answer.header("x-backend"), first.header("x-backend"));
        assert_eq!(answer.header("set-cookie"), "");
    }
}

#[tokio::test]
async fn an_endpoint_is_used_from_when_it_is_healthy_and_until_it_is_not() {
    let echo = Backend::echo(Version::HTTP_11, "echo").await;
    let rig = Rig::new(Version::HTTP_11, &[&echo]).await;
    let mut client = rig.client(Version::HTTP_11).await;
    for (health, expected) in [
        (Health::Unhealthy, 503),
        (Health::Healthy, 200),
        (Health::Unhealthy, 503),
    ] {
        rig.health(health);
        assert_eq!(client.get("/").await.status, expected, "{health:?}");
    }
}

/// A connection that is kept was made as the policy before asked for: it may not carry a request that is to be encrypted.
#[tokio::test]
async fn a_kept_plaintext_connection_carries_nothing_once_tls_is_asked_for() {
    let backend = Backend::echo(Version::HTTP_11, "a").await;
    let rig = Rig::new(Version::HTTP_11, &[&backend]).await;
    let mut client = rig.client(Version::HTTP_11).await;
    assert_eq!(client.get("/").await.status, 200);
    assert_eq!(client.get("/").await.status, 200);
    assert_eq!(backend.connections(), 1);
    rig.tell([view::Resource::Backend(Box::new(BackendPolicy {
        service: rig.target.clone(),
        sources: Vec::new(),
        policy: TrafficPolicy {
            tls: Some(BackendTls::Invalid("its Secret is not there".into())),
            ..TrafficPolicy::default()
        },
        ports: BTreeMap::new(),
        subsets: BTreeMap::new(),
    }))]);
    assert_eq!(client.get("/").await.status, 503);
    assert_eq!(backend.requests(), 2);
}
