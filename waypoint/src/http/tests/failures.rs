//! Backends that fail at each stage: what the client is told, what is tried again, how often.

use std::{
    sync::Arc,
    sync::atomic::{AtomicU32, Ordering},
    time::{Duration, Instant},
};

use futures_util::{StreamExt, stream::FuturesUnordered};
use http::{Response, StatusCode, Version};
use mesh::{
    l7::{
        backend::{BackendPolicy, ConnectionPool, OutlierDetection, TrafficPolicy},
        route::{Action, HttpRule, Mirror, RetryOn, RetryPolicy, WeightedBackend},
        served::AppProtocol,
        view,
    },
    names::NamespacedHostname,
    view::Update,
    workload::{GatewayAddress, GatewayDestination},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    sync::Semaphore,
};

use super::{
    rig::{Answer, Backend, Rig, full},
    routes::to,
};
use crate::testing::soon;

fn retrying(attempts: u32, on: RetryOn) -> HttpRule {
    let action = Action::Forward(vec![WeightedBackend::new(1, to("echo"))]);
    let mut rule = HttpRule::new(Vec::new(), action);
    rule.retry = Some(RetryPolicy {
        attempts,
        on,
        backoff: Duration::from_millis(1),
        per_try_timeout: None,
        ignore_previous: true,
        remote_localities: false,
    });
    rule
}

fn policy(rig: &Rig, policy: TrafficPolicy) {
    rig.tell([view::Resource::Backend(Box::new(BackendPolicy {
        service: rig.target.clone(),
        sources: Vec::new(),
        policy,
        ports: Default::default(),
        subsets: Default::default(),
    }))]);
}

/// A backend whose port nobody listens on, nor begins to.
async fn nobody() -> Backend {
    let mut backend = Backend::raw(|_| async {}).await;
    let (address, held) = net::testing::refusing();
    backend.address = address;
    tokio::spawn(async move {
        let _held = held;
        std::future::pending::<()>().await;
    });
    backend
}

#[tokio::test]
async fn no_connection_is_tried_elsewhere_and_told_as_503() {
    let (down, up) = (nobody().await, Backend::echo(Version::HTTP_11, "up").await);
    let rig = Rig::new(Version::HTTP_11, &[&down, &up]).await;
    let mut client = rig.client(Version::HTTP_11).await;
    for _ in 0..3 {
        assert_eq!(client.get("/").await.header("x-backend"), "up");
    }
    let rig = Rig::new(Version::HTTP_11, &[&down]).await;
    let answer = rig.client(Version::HTTP_11).await.get("/").await;
    assert_eq!(answer.status, StatusCode::SERVICE_UNAVAILABLE);
}

#[tokio::test]
async fn resets_at_each_stage_are_told_truthfully() {
    // Before the head; within the head; what is not HTTP.
    let silent = Backend::raw(|mut stream| async move {
        let _ = stream.read(&mut [0; 1024]).await;
    });
    let cut = Backend::raw(|mut stream| async move {
        let _ = stream.read(&mut [0; 1024]).await;
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-le").await;
    });
    let noise = Backend::raw(|mut stream| async move {
        let _ = stream.read(&mut [0; 1024]).await;
        let _ = stream.write_all(b"\x00\x01 what is this\r\n\r\n").await;
    });
    let both = Backend::raw(|mut stream| async move {
        let _ = stream.read(&mut [0; 1024]).await;
        let head = b"HTTP/1.1 200 OK\r\ncontent-length: +3\r\n\r\nabc";
        let _ = stream.write_all(head).await;
    });
    for (backend, expected) in [
        (silent.await, StatusCode::SERVICE_UNAVAILABLE),
        (cut.await, StatusCode::SERVICE_UNAVAILABLE),
        (noise.await, StatusCode::BAD_GATEWAY),
        (both.await, StatusCode::BAD_GATEWAY),
    ] {
        let rig = Rig::new(Version::HTTP_11, &[&backend]).await;
        let answer = rig.client(Version::HTTP_2).await.get("/").await;
        assert_eq!(answer.status, expected);
    }
}

#[tokio::test]
async fn a_body_that_breaks_off_never_looks_complete() {
    let cut = Backend::raw(|mut stream| async move {
        let _ = stream.read(&mut [0; 1024]).await;
        let head = b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nonly this";
        let _ = stream.write_all(head).await;
    })
    .await;
    for version in [Version::HTTP_11, Version::HTTP_2] {
        let rig = Rig::new(Version::HTTP_11, &[&cut]).await;
        let mut client = rig.client(version).await;
        let request = client.request("GET", "/").body(full("")).unwrap();
        let response = client.send(request).await;
        assert_eq!(response.status(), StatusCode::OK);
        let body = http_body_util::BodyExt::collect(response.into_body()).await;
        assert!(body.is_err(), "{version:?}");
    }
}

/// A backend that answers each request on a connection with these bytes.
async fn saying(bytes: &'static [u8]) -> Backend {
    Backend::raw(move |mut stream| async move {
        let mut head = [0; 1024];
        while stream.read(&mut head).await.is_ok_and(|it| it > 0) {
            if stream.write_all(bytes).await.is_err() {
                break;
            }
        }
    })
    .await
}

#[tokio::test]
async fn an_answer_that_could_be_read_in_two_ways_is_502_and_its_connection_the_last() {
    for (bytes, expected) in [
        (&b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n"[..], 502),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ncontent-length: 2\r\n\r\n0\r\n\r\n", 502),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\nabc", 502),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nx : 1\r\n\r\nab", 502),
        // An upgrade that nobody asked for.
        (b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: x\r\n\r\n", 502),
        // A second answer behind the first is nobody's.
        (b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nokHTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nevil", 200),
        (b"HTTP/1.1 204 No Content\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nevil", 204),
    ] {
        let backend = saying(bytes).await;
        let rig = Rig::new(Version::HTTP_11, &[&backend]).await;
        let mut client = rig.client(Version::HTTP_2).await;
        for asked in 1..=3 {
            let answer = client.get("/").await;
            let shown = String::from_utf8_lossy(bytes);
            assert_eq!(answer.status, expected, "{shown}");
            assert_ne!(&answer.body[..], b"evil", "{shown}");
            assert!(backend.connections() >= asked, "{shown} was trusted again");
        }
    }
}

#[tokio::test]
async fn an_idle_connection_that_was_closed_costs_no_request() {
    let once = Backend::raw(|mut stream| async move {
        let _ = stream.read(&mut [0; 1024]).await;
        let head = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";
        let _ = stream.write_all(head).await;
    })
    .await;
    let rig = Rig::new(Version::HTTP_11, &[&once]).await;
    let mut client = rig.client(Version::HTTP_11).await;
    for _ in 0..20 {
        assert_eq!(client.get("/").await.status, StatusCode::OK);
    }
}

#[tokio::test]
async fn only_what_the_policy_names_is_tried_again_and_bodies_are_sent_again() {
    let failures = Arc::new(AtomicU32::new(2));
    let flaky = {
        let failures = Arc::clone(&failures);
        Backend::start(Version::HTTP_11, move |request| {
            let left = failures.load(Ordering::SeqCst);
            failures.store(left.saturating_sub(1), Ordering::SeqCst);
            async move {
                let body = http_body_util::BodyExt::collect(request.into_body()).await;
                let body = body.unwrap().to_bytes();
                let status = if left > 0 { 500 } else { 200 };
                Response::builder().status(status).body(full(body)).unwrap()
            }
        })
        .await
    };
    let rig = Rig::new(Version::HTTP_11, &[&flaky]).await;
    let mut client = rig.client(Version::HTTP_11).await;
    assert_eq!(client.get("/").await.status, 500, "not by default");
    failures.store(2, Ordering::SeqCst);
    rig.route(vec![retrying(
        3,
        RetryOn {
            any_5xx: true,
            non_idempotent: true,
            ..RetryOn::default()
        },
    )]);
    let request = client.request("POST", "/").body(full("again")).unwrap();
    let answer = Answer::of(client.send(request).await).await;
    assert_eq!(
        (answer.status, &answer.body[..]),
        (StatusCode::OK, &b"again"[..])
    );
}

#[tokio::test]
async fn an_outage_is_multiplied_by_a_fifth_at_most() {
    let down = Backend::start(Version::HTTP_11, |_| async {
        Response::builder().status(503).body(full("")).unwrap()
    })
    .await;
    let rig = Rig::new(Version::HTTP_11, &[&down]).await;
    let on = RetryOn {
        any_5xx: true,
        ..RetryOn::default()
    };
    rig.route(vec![retrying(5, on)]);
    let mut client = rig.client(Version::HTTP_11).await;
    for _ in 0..200 {
        assert_eq!(client.get("/").await.status, 503);
    }
    assert!(down.requests() <= 243, "{} for 200", down.requests());
    assert!(down.requests() > 200, "some are tried again");
}

#[tokio::test]
async fn time_is_up_with_504() {
    let slow = Backend::raw(|mut stream| async move {
        let mut buffer = [0; 1024];
        while stream.read(&mut buffer).await.is_ok_and(|it| it > 0) {}
    })
    .await;
    let rig = Rig::new(Version::HTTP_11, &[&slow]).await;
    let mut rule = retrying(0, RetryOn::default());
    rule.timeouts.request = Some(Duration::from_millis(80));
    rig.route(vec![rule]);
    let began = Instant::now();
    let answer = rig.client(Version::HTTP_11).await.get("/").await;
    assert_eq!(answer.status, StatusCode::GATEWAY_TIMEOUT);
    assert!(began.elapsed() < Duration::from_secs(5));
    // Of one try, and the time for all of them holds.
    let on = RetryOn {
        per_try_timeout: true,
        ..RetryOn::default()
    };
    let mut rule = retrying(2, on);
    rule.timeouts.per_try = Some(Duration::from_millis(30));
    rig.route(vec![rule]);
    let before = slow.connections();
    let answer = rig.client(Version::HTTP_11).await.get("/").await;
    assert_eq!(answer.status, StatusCode::GATEWAY_TIMEOUT);
    assert_eq!(slow.connections() - before, 3);
}

#[tokio::test]
async fn requests_over_the_limit_are_503_and_marked() {
    let stuck = Backend::raw(|mut stream| async move {
        let mut buffer = [0; 1024];
        while stream.read(&mut buffer).await.is_ok_and(|it| it > 0) {}
    })
    .await;
    let rig = Rig::new(Version::HTTP_11, &[&stuck]).await;
    policy(
        &rig,
        TrafficPolicy {
            pool: ConnectionPool {
                max_requests: Some(1),
                ..ConnectionPool::default()
            },
            ..TrafficPolicy::default()
        },
    );
    let mut first = rig.client(Version::HTTP_11).await;
    let request = first.request("GET", "/").body(full("")).unwrap();
    let waiting = tokio::spawn(async move { first.try_send(request).await.map(drop) });
    let deadline = Instant::now() + Duration::from_secs(5);
    while stuck.connections() == 0 {
        assert!(Instant::now() < deadline);
        tokio::task::yield_now().await;
    }
    let answer = rig.client(Version::HTTP_11).await.get("/").await;
    assert_eq!(answer.status, StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(answer.header("x-envoy-overloaded"), "true");
    waiting.abort();
}

#[tokio::test]
async fn connections_are_limited_and_so_are_those_who_wait_for_one() {
    let answers = Arc::new(Semaphore::new(0));
    let permits = Arc::clone(&answers);
    let slow = Backend::start(Version::HTTP_11, move |_| {
        let permits = Arc::clone(&permits);
        async move {
            permits.acquire().await.unwrap().forget();
            Response::new(full(""))
        }
    })
    .await;
    let rig = Rig::new(Version::HTTP_11, &[&slow]).await;
    let pool = ConnectionPool {
        max_connections: Some(1),
        max_pending_requests: Some(1),
        ..ConnectionPool::default()
    };
    policy(
        &rig,
        TrafficPolicy {
            pool,
            ..TrafficPolicy::default()
        },
    );
    let mut clients = Vec::new();
    for _ in 0..4 {
        clients.push(rig.client(Version::HTTP_11).await);
    }
    let mut asking: FuturesUnordered<_> = clients.iter_mut().map(|it| it.get("/")).collect();
    // Two are refused while the others wait: the one for its answer, the other for the connection.
    for _ in 0..2 {
        let refused = soon(asking.next()).await.unwrap();
        assert_eq!(refused.status, StatusCode::SERVICE_UNAVAILABLE);
    }
    answers.add_permits(2);
    for _ in 0..2 {
        let served = soon(asking.next()).await.unwrap();
        assert_eq!(served.status, StatusCode::OK);
    }
    assert_eq!((slow.requests(), slow.connections()), (2, 1));
}

#[tokio::test]
async fn an_endpoint_that_fails_in_a_row_is_passed_over() {
    let bad = Backend::start(Version::HTTP_11, |_| async {
        Response::builder().status(500).body(full("")).unwrap()
    })
    .await;
    let good = Backend::echo(Version::HTTP_11, "good").await;
    let rig = Rig::new(Version::HTTP_11, &[&bad, &good]).await;
    policy(
        &rig,
        TrafficPolicy {
            outlier: Some(OutlierDetection {
                consecutive_5xx: 3,
                consecutive_gateway_errors: 0,
                consecutive_local_failures: None,
                interval: Duration::from_secs(10),
                base_ejection_time: Duration::from_secs(30),
                max_ejection_percent: 50,
                min_health_percent: 0,
                error_codes: Vec::new(),
            }),
            ..TrafficPolicy::default()
        },
    );
    let mut client = rig.client(Version::HTTP_11).await;
    for _ in 0..100 {
        client.get("/").await;
    }
    assert_eq!(bad.requests(), 3);
    assert_eq!(good.requests(), 97);
}

#[tokio::test]
async fn a_backend_of_another_waypoint_is_not_reached_around_it() {
    let own = Backend::echo(Version::HTTP_11, "own").await;
    let other = Backend::echo(Version::HTTP_11, "other").await;
    let rig = Rig::new(Version::HTTP_11, &[&own]).await;
    let key = "demo/other.demo.svc.cluster.local";
    rig.serve(key, AppProtocol::Http, &[&other]);
    let action = Action::Forward(vec![WeightedBackend::new(1, to("other"))]);
    rig.route(vec![HttpRule::new(Vec::new(), action)]);
    let mut client = rig.client(Version::HTTP_11).await;
    assert_eq!(client.get("/").await.status, 200);
    // Now it is another waypoint's, which is not there.
    let key: NamespacedHostname = key.parse().unwrap();
    let snapshot = rig.waypoint.snapshots.load();
    let mut service = (**snapshot.mesh.service(&key).unwrap()).clone();
    service.waypoint = Some(GatewayAddress {
        destination: GatewayDestination::Address("/10.254.0.1".parse().unwrap()),
        hbone_mtls_port: 15008,
    });
    rig.waypoint.snapshots.apply_mesh(Update {
        upserts: vec![service.into()],
        removals: Vec::new(),
    });
    let mut served = (**snapshot.l7.service(&key).unwrap()).clone();
    served.bound = false;
    rig.tell([view::Resource::Service(served)]);
    assert_eq!(client.get("/").await.status, 503);
    // Nor by a copy of a request.
    let mirror = Mirror {
        backend: to("other"),
        per_million: 1_000_000,
        shadow_host: true,
    };
    let action = Action::Forward(vec![WeightedBackend::new(1, to("echo"))]);
    let mut rule = HttpRule::new(Vec::new(), action);
    rule.mirrors = vec![mirror];
    rig.route(vec![rule]);
    assert_eq!(client.get("/").await.status, 200);
    rig.copied().await;
    assert_eq!(other.requests(), 1);
}
