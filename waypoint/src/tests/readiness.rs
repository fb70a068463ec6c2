//! When a waypoint is ready. That its first answers of each type open the other gate is tested with the xDS client.

use std::sync::Arc;

use mesh::identity::Identity;
use net::{
    ca::{Issuer, Issuing},
    testing::TestCa,
    tls::Policy,
};
use tokio::{sync::Semaphore, time::Instant};

use crate::{run::Process, testing};

/// Issues nothing without a permit.
struct Held {
    ca: TestCa,
    permits: Arc<Semaphore>,
}

impl Held {
    fn new(permits: &Arc<Semaphore>) -> Arc<Self> {
        Arc::new(Self {
            ca: TestCa::new("cluster.local", &Policy::default()),
            permits: Arc::clone(permits),
        })
    }
}

impl Issuer for Held {
    fn issue(&self, identity: Identity) -> Issuing {
        let (permits, issuing) = (Arc::clone(&self.permits), self.ca.issue(identity));
        Box::pin(async move {
            permits.acquire().await.expect("never closed").forget();
            issuing.await
        })
    }
}

/// The clock goes on by itself as soon as all that is left to do waits for it, and not before.
#[tokio::test(start_paused = true)]
async fn with_its_certificate_it_is_ready_and_waits_for_no_timer() {
    let permits = Arc::new(Semaphore::new(0));
    let process = Process::new(testing::config(&[])).with_issuer(Held::new(&permits));
    let running = process.start().expect("the waypoint starts");
    let ready = running.ready();
    for _ in 0..10 {
        tokio::task::yield_now().await;
        assert_eq!(ready.pending(), ["certificate"]);
    }
    let certified = Instant::now();
    permits.add_permits(1);
    ready.wait().await;
    assert_eq!(certified.elapsed(), std::time::Duration::ZERO);
}

#[tokio::test]
async fn it_waits_for_its_certificate_and_for_the_control_plane_and_for_nothing_else() {
    let permits = Arc::new(Semaphore::new(0));
    // Nobody listens there.
    let config = testing::config(&[("XDS_ADDRESS", "http://127.0.0.1:1")]);
    let process = Process::new(config).with_issuer(Held::new(&permits));
    let running = process.start().expect("the waypoint starts");
    assert_eq!(running.ready().pending(), ["certificate", "state manager"]);
}
