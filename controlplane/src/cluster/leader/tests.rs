use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use super::*;
use crate::testing::api::{Answer, FakeApi};

const LEASES: (&str, &str, &str) = ("leases", "istio-system", "leyline-leader");

fn elector(api: &FakeApi, me: &str) -> (Elector, Leadership) {
    Elector::new(api.client(), LEASES.1, LEASES.2.to_owned(), me.to_owned())
}

fn holder(api: &FakeApi) -> String {
    let lease = api.object(LEASES.0, LEASES.1, LEASES.2).unwrap();
    lease["spec"]["holderIdentity"].as_str().unwrap().to_owned()
}

#[test]
fn a_lease_is_taken_only_when_it_is_free_or_over() {
    let lease = |holder: &str, seconds| LeaseSpec {
        holder_identity: Some(holder.to_owned()),
        lease_duration_seconds: Some(seconds),
        ..LeaseSpec::default()
    };
    let seconds = Duration::from_secs;
    for (spec, unchanged, expected) in [
        (None, 0, Act::Create),
        (Some(LeaseSpec::default()), 0, Act::Take),
        (Some(lease("", 30)), 0, Act::Take),
        (Some(lease("me", 30)), 100, Act::Renew),
        (Some(lease("other", 30)), 0, Act::Wait),
        (Some(lease("other", 30)), 30, Act::Wait),
        (Some(lease("other", 30)), 31, Act::Take),
        // What the holder says counts, not what we would say.
        (Some(lease("other", 60)), 31, Act::Wait),
        (Some(lease("other", -1)), 1, Act::Take),
    ] {
        let act = decide("me", spec.as_ref(), seconds(unchanged));
        assert_eq!(act, expected, "{spec:?} {unchanged}");
    }
}

/// Runs writers that count themselves, and fails if two ever write at once.
struct Replica {
    leadership: Leadership,
    stop: tokio::sync::oneshot::Sender<()>,
    tasks: Vec<tokio::task::JoinHandle<()>>,
}

struct Writing(Arc<AtomicUsize>);

impl Writing {
    fn new(writers: &Arc<AtomicUsize>) -> Self {
        assert_eq!(
            writers.fetch_add(1, Ordering::SeqCst),
            0,
            "two write at once"
        );
        Self(writers.clone())
    }
}

impl Drop for Writing {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

fn replica(api: &FakeApi, me: &str, writers: &Arc<AtomicUsize>) -> Replica {
    let (elector, leadership) = elector(api, me);
    let (stop, stopped) = tokio::sync::oneshot::channel();
    let election = tokio::spawn(elector.run(async {
        drop(stopped.await);
    }));
    let (watched, writers) = (leadership.clone(), writers.clone());
    let writing = tokio::spawn(async move {
        let write = || {
            let writers = writers.clone();
            async move {
                let _writing = Writing::new(&writers);
                std::future::pending::<()>().await;
            }
        };
        watched.while_leading("test", write).await;
    });
    Replica {
        leadership,
        stop,
        tasks: vec![election, writing],
    }
}

async fn leads(replica: &Replica) -> Instant {
    let mut until = replica.leadership.0.clone();
    let led = tokio::time::timeout(Duration::from_secs(120), until.wait_for(Option::is_some));
    led.await.expect("within two minutes").unwrap();
    Instant::now()
}

#[tokio::test(start_paused = true)]
async fn of_two_replicas_one_leads_and_the_other_follows_at_once_when_it_ends() {
    let (api, writers) = (FakeApi::new(), Arc::default());
    let first = replica(&api, "a", &writers);
    leads(&first).await;
    let second = replica(&api, "b", &writers);
    tokio::time::sleep(Duration::from_secs(300)).await;
    assert!(first.leadership.leads() && !second.leadership.leads());
    assert_eq!(holder(&api), "a");
    let ended = Instant::now();
    first.stop.send(()).unwrap();
    for task in first.tasks {
        task.await.unwrap();
    }
    assert!(
        leads(&second).await - ended <= RETRY,
        "the lease was given back"
    );
    assert_eq!(holder(&api), "b");
    let lease = api.object(LEASES.0, LEASES.1, LEASES.2).unwrap();
    assert_eq!(lease["spec"]["leaseTransitions"], 1);
}

#[tokio::test(start_paused = true)]
async fn a_holder_that_cannot_renew_stops_before_anybody_else_starts() {
    let (api, writers) = (FakeApi::new(), Arc::<AtomicUsize>::default());
    let first = replica(&api, "a", &writers);
    leads(&first).await;
    let second = replica(&api, "b", &writers);
    tokio::time::sleep(Duration::from_secs(20)).await;
    // Only the first replica is cut off.
    let cut = Instant::now();
    api.on(|call| {
        let by_a = call.body["spec"]["holderIdentity"] == "a";
        by_a.then_some(Answer::Hang)
    });
    let mut until = first.leadership.0.clone();
    until.wait_for(Option::is_none).await.unwrap();
    let stopped = Instant::now();
    assert!(stopped - cut <= RENEW_DEADLINE + ANSWER);
    assert!(!first.leadership.leads());
    let taken = leads(&second).await;
    assert!(taken - cut >= LEASE - RETRY, "not before the lease is over");
    assert!(taken - cut <= LEASE + 2 * RETRY);
    // The first comes back, and does not write.
    api.heal();
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert!(!first.leadership.leads() && second.leadership.leads());
}

#[tokio::test(start_paused = true)]
async fn writers_stop_at_the_deadline_even_while_a_renewal_hangs() {
    let (api, writers) = (FakeApi::new(), Arc::<AtomicUsize>::default());
    let first = replica(&api, "a", &writers);
    leads(&first).await;
    tokio::time::sleep(Duration::from_millis(10)).await;
    assert_eq!(writers.load(Ordering::SeqCst), 1);
    api.on(|_| Some(Answer::Hang));
    tokio::time::sleep(RENEW_DEADLINE).await;
    assert_eq!(writers.load(Ordering::SeqCst), 0);
    api.heal();
    leads(&first).await;
    tokio::time::sleep(RETRY).await;
    assert_eq!(
        writers.load(Ordering::SeqCst),
        1,
        "its own lease is its again"
    );
}

#[tokio::test(start_paused = true)]
async fn a_write_whose_answer_is_lost_is_found_to_be_ours() {
    let (api, writers) = (FakeApi::new(), Arc::<AtomicUsize>::default());
    let mut once = false;
    api.on(move |call| {
        let first = call.verb == "create" && !std::mem::replace(&mut once, true);
        first.then_some(Answer::Lose)
    });
    let first = replica(&api, "a", &writers);
    leads(&first).await;
    assert_eq!(holder(&api), "a");
}

#[tokio::test]
async fn a_lease_ends_with_the_deployment_of_its_replicas() {
    let api = FakeApi::new();
    let owners = |api: &FakeApi| {
        let lease = api.object(LEASES.0, LEASES.1, LEASES.2).unwrap();
        lease["metadata"]["ownerReferences"].clone()
    };
    let (elector, _) = elector(&api, "one");
    let mut elector = elector.of_deployment(api.client(), LEASES.1, "istiod".to_owned());
    // Run by hand, without one.
    assert!(elector.once(Instant::now()).await.unwrap());
    assert!(owners(&api).is_null());

    api.remove(LEASES.0, LEASES.1, LEASES.2);
    let metadata = serde_json::json!({"name": "istiod", "namespace": LEASES.1, "uid": "its-uid"});
    let deployment = serde_json::json!({"metadata": metadata});
    api.put("apis/apps/v1", "deployments", deployment);
    assert!(elector.once(Instant::now()).await.unwrap());
    let owner = &owners(&api)[0];
    assert_eq!(
        (&owner["kind"], &owner["name"]),
        (&"Deployment".into(), &"istiod".into())
    );
    assert!(
        owner["blockOwnerDeletion"].is_null(),
        "nothing waits for the lease"
    );
    assert_eq!(owner["uid"], "its-uid");
}
