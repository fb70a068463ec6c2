use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use futures_util::future::join_all;
use http::{Request, Response};
use http_body_util::Full;
use kube::client::Body;
use serde_json::{Value, json};

use super::*;

fn audiences() -> Vec<String> {
    vec!["istio-ca".to_owned()]
}

/// What the API server says of a token that it accepts.
fn accepted(username: &str, extra: Value) -> Value {
    json!({
        "authenticated": true,
        "audiences": ["istio-ca"],
        "user": {
            "username": username,
            "groups": ["system:serviceaccounts", "system:authenticated"],
            "extra": extra,
        },
    })
}

fn judged(status: &Value) -> Result<Caller, ReviewError> {
    let review = json!({"metadata": {}, "spec": {"token": "t"}, "status": status});
    judge(serde_json::from_value(review).unwrap(), &audiences())
}

/// An API server whose n-th answer is a code and a status by `answer`, and how often it was asked.
fn server(
    answer: impl Fn(usize) -> (u16, Value) + Send + Sync + 'static,
) -> (Review, Arc<AtomicUsize>) {
    let asked = Arc::new(AtomicUsize::new(0));
    let (answer, count) = (Arc::new(answer), asked.clone());
    let service = tower::service_fn(move |_: Request<Body>| {
        let (code, status) = answer(count.fetch_add(1, Ordering::Relaxed));
        let review = json!({
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenReview",
            "metadata": {},
            "spec": {},
            "status": status,
        });
        let body = Full::new(Bytes::from(review.to_string()));
        async move {
            tokio::task::yield_now().await;
            Response::builder().status(code).body(body)
        }
    });
    (
        Review::new(Client::new(service, "default"), audiences()),
        asked,
    )
}

#[test]
fn a_bound_token_names_its_account_pod_and_node() {
    let extra = json!({
        POD_NAME: ["web-1"],
        POD_UID: ["web-1-uid"],
        NODE_NAME: ["node-1"],
    });
    let caller = judged(&accepted("system:serviceaccount:shop:web", extra)).unwrap();
    assert_eq!(caller.account.to_string(), "shop/web");
    let pod = caller.pod.unwrap();
    assert_eq!((&*pod.name, &*pod.uid), ("web-1", "web-1-uid"));
    assert_eq!(pod.node.as_deref(), Some("node-1"));
}

#[test]
fn a_token_with_half_a_pod_is_bound_to_none() {
    let extra = json!({POD_NAME: ["web-1"], POD_UID: [""]});
    let caller = judged(&accepted("system:serviceaccount:shop:web", extra)).unwrap();
    assert_eq!(caller.pod, None);
}

#[test]
fn answers_that_prove_nobody_are_refused() {
    let of_others = json!({"authenticated": true, "audiences": ["https://kubernetes.default.svc"]});
    let of_nobody = json!({"authenticated": true});
    for status in [of_others, of_nobody] {
        let refused = judged(&status);
        assert!(
            matches!(refused, Err(ReviewError::Audience(_))),
            "{status}: {refused:?}"
        );
    }
    let expired = json!({"authenticated": false, "error": "token has expired"});
    let of_a_deleted_pod = json!({"error": "pod \"web-1\" has been deleted"});
    for status in [expired, of_a_deleted_pod, json!({}), Value::Null] {
        let refused = judged(&status);
        assert!(
            matches!(refused, Err(ReviewError::Refused(_))),
            "{status}: {refused:?}"
        );
    }
    for username in [
        "kubernetes-admin",
        "system:node:node-1",
        "system:serviceaccount:shop",
        "system:serviceaccount::web",
        "system:serviceaccount:shop:",
        "system:serviceaccount:shop:web:x",
    ] {
        let refused = judged(&accepted(username, json!({})));
        assert!(
            matches!(refused, Err(ReviewError::NoServiceAccount(_))),
            "{username}: {refused:?}"
        );
    }
}

#[test]
fn a_name_like_an_accounts_without_the_accounts_group_is_refused() {
    let mut status = accepted("system:serviceaccount:shop:web", json!({}));
    status["user"]["groups"] = json!(["system:authenticated"]);
    assert!(matches!(
        judged(&status),
        Err(ReviewError::NoServiceAccount(_))
    ));
}

#[tokio::test]
async fn an_accepted_token_is_asked_about_once_however_many_wait() {
    let (review, asked) = server(|_| (201, accepted("system:serviceaccount:shop:web", json!({}))));
    let callers = join_all((0..50).map(|_| review.check("a token"))).await;
    assert!(callers.iter().all(Result::is_ok));
    assert_eq!(asked.load(Ordering::Relaxed), 1);
    review.check("another token").await.unwrap();
    assert_eq!(asked.load(Ordering::Relaxed), 2);
}

#[tokio::test]
async fn neither_a_refusal_nor_an_absent_api_server_is_remembered() {
    let (review, _) = server(|asked| match asked {
        0 => (201, json!({"authenticated": false})),
        1 => (503, json!({})),
        _ => (201, accepted("system:serviceaccount:shop:web", json!({}))),
    });
    let refused = review.check("a token").await;
    assert!(
        matches!(refused, Err(ReviewError::Refused(_))),
        "{refused:?}"
    );
    let away = review.check("a token").await;
    assert!(matches!(away, Err(ReviewError::Ask(_))), "{away:?}");
    assert!(review.known.lock().is_empty());
    review.check("a token").await.unwrap();
}

/// Time stands still: an answer is remembered for ten seconds, and so many questions may take longer.
#[tokio::test(start_paused = true)]
async fn the_memory_of_tokens_is_bounded() {
    let (review, asked) = server(|_| (201, accepted("system:serviceaccount:shop:web", json!({}))));
    for token in 0..MOST + 10 {
        review.check(&token.to_string()).await.unwrap();
    }
    assert_eq!(review.known.lock().len(), MOST);
    assert_eq!(asked.load(Ordering::Relaxed), MOST + 10);
}
