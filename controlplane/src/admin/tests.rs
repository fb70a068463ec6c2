use std::collections::HashMap;

use proto::{ADDRESS_TYPE_URL as ADDRESS, AUTHORIZATION_TYPE_URL as POLICY};

use super::Names;
use crate::{
    output::{ObjectStatus, Truth},
    serve::registry::Rejection,
};

fn object(kind: &str, namespace: &str, name: &str) -> ObjectStatus {
    ObjectStatus {
        parents: std::sync::Arc::default(),
        kind: kind.into(),
        namespace: Some(namespace.into()),
        name: name.into(),
        file: "a.yaml".into(),
        line: 1,
        conditions: Vec::new(),
    }
}

#[test]
fn a_refused_resource_is_found_in_the_status_of_its_object() {
    let names = Names {
        cluster_id: "Kubernetes",
        cluster_domain: "cluster.local",
    };
    let rows = [
        ("AuthorizationPolicy", POLICY, "shop/web", true),
        ("AuthorizationPolicy", POLICY, "shop/web-2", false),
        ("AuthorizationPolicy", ADDRESS, "shop/web", false),
        (
            "PeerAuthentication",
            POLICY,
            "shop/converted_peer_authentication_web",
            true,
        ),
        ("Pod", ADDRESS, "Kubernetes//Pod/shop/web", true),
        ("Pod", ADDRESS, "Kubernetes//Pod/other/web", false),
        ("Service", ADDRESS, "shop/web.shop.svc.cluster.local", true),
        (
            "WorkloadEntry",
            ADDRESS,
            "Kubernetes/networking.istio.io/WorkloadEntry/shop/web",
            true,
        ),
        (
            "ServiceEntry",
            ADDRESS,
            "Kubernetes/networking.istio.io/ServiceEntry/shop/web/10.0.0.1",
            true,
        ),
        (
            "ServiceEntry",
            ADDRESS,
            "Kubernetes/networking.istio.io/ServiceEntry/shop/web-2/10.0.0.1",
            false,
        ),
        (
            "EndpointSlice",
            ADDRESS,
            "Kubernetes/discovery.k8s.io/EndpointSlice/shop/web/10.0.0.1",
            true,
        ),
        ("Namespace", ADDRESS, "shop/web", false),
    ];
    for (kind, type_url, resource, expected) in rows {
        let is_of = names.is_of(&object(kind, "shop", "web"), type_url, resource);
        assert_eq!(is_of, expected, "{kind} {resource}");
    }
}

#[test]
fn the_status_says_how_many_proxies_refuse_and_what_one_says() {
    let names = Names {
        cluster_id: "Kubernetes",
        cluster_domain: "cluster.local",
    };
    let refusal = |proxy: &str| Rejection {
        proxy: proxy.to_owned(),
        reason: "bad port".to_owned(),
    };
    let key = (POLICY.into(), "shop/web".into());
    let rejections = HashMap::from([(
        key,
        vec![refusal("z-1.s"), refusal("z-2.s"), refusal("z-2.s")],
    )]);
    let condition = names.rejected(&object("AuthorizationPolicy", "shop", "web"), &rejections);
    let condition = condition.unwrap();
    assert_eq!(condition.status, Truth::False);
    assert_eq!(
        condition.message,
        "rejected by 2 proxies; z-1.s says: bad port"
    );
    assert!(
        names
            .rejected(&object("Pod", "shop", "web"), &rejections)
            .is_none()
    );
}
