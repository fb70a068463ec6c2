use std::collections::HashMap;

use super::*;

fn read(settings: &[(&str, &str)]) -> Result<Config, ConfigError> {
    let pod = [
        ("POD_NAME", "wp-1"),
        ("POD_NAMESPACE", "shop"),
        ("SERVICE_ACCOUNT", "wp"),
    ];
    let map: HashMap<_, _> = pod.iter().chain(settings).copied().collect();
    Config::from_lookup(&|name| map.get(name).map(|text| (*text).to_owned()))
}

#[test]
fn defaults_are_those_of_a_waypoints_pod() {
    let config = read(&[]).unwrap();
    let identity = config.node.identity().to_string();
    assert_eq!(identity, "spiffe://cluster.local/ns/shop/sa/wp");
    assert_eq!(config.listen.hbone.to_string(), "[::]:15008");
    assert_eq!(config.listen.stats.port(), 15020);
    assert_eq!(config.listen.readiness.port(), 15021);
    assert!(config.listen.admin.iter().all(|it| it.ip().is_loopback()));
    assert_eq!(config.drain.propagation, Duration::from_secs(5));
    assert_eq!(config.drain.deadline, Duration::from_secs(24));
    assert_eq!(config.detection_deadline, Duration::from_millis(150));
}

#[test]
fn istios_names_are_read_where_ours_are_absent() {
    let config = read(&[
        ("ISTIO_META_NETWORK", "net-1"),
        ("ISTIO_META_CLUSTER_ID", "c-1"),
        ("ISTIO_META_NODE_NAME", "n-1"),
        ("ISTIO_META_WORKLOAD_NAME", "wp"),
        ("TERMINATION_DRAIN_DURATION_SECONDS", "2"),
        ("TERMINATION_GRACE_PERIOD_SECONDS", "10"),
    ])
    .unwrap();
    let node = &config.node;
    let texts = [&node.network, &node.cluster_id, &node.name, &node.gateway];
    assert_eq!(
        texts.map(|it| it.to_string()),
        ["net-1", "c-1", "n-1", "wp"]
    );
    assert_eq!(config.drain.propagation, Duration::from_secs(2));
    assert_eq!(config.drain.deadline, Duration::from_secs(7));
}

#[test]
fn bad_settings_are_all_told() {
    let error = read(&[
        ("POD_NAME", ""),
        ("CA_ADDRESS", ""),
        ("HTTP2_FRAME_SIZE", "1"),
        ("LEYLINE_ADMIN_ADDRESS", "0.0.0.0:15000"),
        ("LEYLINE_MAX_HANDSHAKES", "0"),
        ("TRUST_DOMAIN", "a b"),
    ])
    .unwrap_err();
    let names: Vec<_> = error.0.iter().map(|bad| bad.name.as_str()).collect();
    assert_eq!(
        names,
        [
            "TRUST_DOMAIN",
            "CA_ADDRESS",
            "LEYLINE_ADMIN_ADDRESS",
            "HTTP2_FRAME_SIZE",
            "POD_NAME",
            "LEYLINE_MAX_HANDSHAKES",
        ]
    );
}
