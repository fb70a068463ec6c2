//! A request reaches an endpoint and its response the client, in every pair of versions.

use http::{StatusCode, Version};

use super::rig::{Answer, Backend, Rig, full};

#[tokio::test]
async fn requests_pass_in_every_pair_of_versions() {
    for (client, backend) in [
        (Version::HTTP_11, Version::HTTP_11),
        (Version::HTTP_11, Version::HTTP_2),
        (Version::HTTP_2, Version::HTTP_11),
        (Version::HTTP_2, Version::HTTP_2),
    ] {
        let echo = Backend::echo(backend, "one").await;
        let rig = Rig::new(backend, &[&echo]).await;
        let mut client = rig.client(client).await;
        for round in 0..3 {
            let request = client.request("POST", "/a/b?c=d").header("x-mine", "1");
            let request = request.body(full("hello")).unwrap();
            let answer = Answer::of(client.send(request).await).await;
            assert_eq!(answer.status, StatusCode::OK, "round {round} {answer:?}");
            assert_eq!(answer.header("x-backend"), "one");
            assert!(
                answer.header("x-target").ends_with("/a/b?c=d"),
                "{answer:?}"
            );
            assert_eq!(answer.header("x-version"), format!("{backend:?}"));
            assert_eq!(answer.header("x-got-x-mine"), "1");
            assert_eq!(answer.body, "hello");
        }
        assert_eq!(echo.connections(), 1, "the connection is used again");
    }
}

#[tokio::test]
async fn no_endpoint_is_503_and_no_service_500() {
    let rig = Rig::new(Version::HTTP_11, &[]).await;
    let answer = rig.client(Version::HTTP_11).await.get("/").await;
    assert_eq!(answer.status, StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(answer.body, "no healthy upstream");
}
