use std::{collections::HashMap, path::Path};

use super::*;

mod variables;

fn read(settings: &[(&str, &str)]) -> Result<Config, ConfigError> {
    let map: HashMap<_, _> = settings.iter().copied().collect();
    Config::from_lookup(&|name| map.get(name).map(|text| (*text).to_owned()))
}

#[track_caller]
fn good(settings: &[(&str, &str)]) -> Config {
    match read(settings) {
        Ok(config) => config,
        Err(e) => panic!("{e}"),
    }
}

#[test]
fn defaults_are_those_of_the_chart() {
    let config = good(&[]);
    assert_eq!(config.node.network.as_ref(), "");
    assert_eq!(config.node.cluster_id.as_ref(), "Kubernetes");
    assert_eq!(config.inpod.mark, Some(0x539));
    assert_eq!(config.http2.max_streams_per_connection, 100);
    assert_eq!(config.drain_deadline, Duration::from_secs(5));
    assert_eq!(config.secret_ttl, Duration::from_secs(86_400));
    assert_eq!(config.dns.port, 15053);
    assert!(config.dns.enabled);
    let xds = config.xds.expect("xDS is on by default");
    assert_eq!(xds.address, "https://localhost:15012");
    assert_eq!(
        xds.root,
        RootCert::File("./var/run/secrets/istio/root-cert.pem".into())
    );
}

#[test]
fn every_bad_setting_is_reported_at_once() {
    let error = read(&[
        ("SECRET_TTL", "soon"),
        ("IPV6_ENABLED", "yes"),
        ("PACKET_MARK", "-1"),
        ("HTTP2_FRAME_SIZE", "1"),
        ("LOG_FORMAT", "xml"),
        ("LOCAL_XDS", "a"),
        ("LOCAL_XDS_PATH", "b"),
        ("CA_ADDRESS", ""),
        ("COMPLIANCE_POLICY", "none"),
        ("ZTUNNEL_WORKER_THREADS", "101%"),
        ("LEYLINE_ADMIN_ADDRESS", "0.0.0.0:15000"),
    ])
    .expect_err("bad settings");
    let text = error.to_string();
    for name in [
        "SECRET_TTL",
        "IPV6_ENABLED",
        "PACKET_MARK",
        "HTTP2_FRAME_SIZE",
        "LOG_FORMAT",
        "LOCAL_XDS",
        "CA_ADDRESS",
        "COMPLIANCE_POLICY",
        "ZTUNNEL_WORKER_THREADS",
        "LEYLINE_ADMIN_ADDRESS",
    ] {
        assert!(text.contains(name), "{name} is missing in: {text}");
    }
}

#[test]
fn the_control_plane_is_found_in_order_of_precedence() {
    let address = |settings: &[(&str, &str)]| good(settings).xds.map(|xds| xds.address);
    let istiod = "https://istiod.istio-system.svc:15012";
    let kubernetes = ("KUBERNETES_SERVICE_HOST", "10.96.0.1");
    let overlay = ("PROXY_CONFIG", r#"{"discoveryAddress": "cp.example:1"}"#);
    assert_eq!(address(&[kubernetes]).as_deref(), Some(istiod));
    assert_eq!(
        address(&[kubernetes, overlay]).as_deref(),
        Some("https://cp.example:1")
    );
    assert_eq!(
        address(&[overlay, ("XDS_ADDRESS", "http://other:2")]).as_deref(),
        Some("http://other:2")
    );
    assert_eq!(address(&[("XDS_ADDRESS", "")]), None);
}

#[test]
fn the_drain_leaves_room_in_the_grace_period() {
    for (grace, expected) in [("30", 25), ("11", 6), ("10", 9), ("1", 1), ("0", 1)] {
        let config = good(&[("TERMINATION_GRACE_PERIOD_SECONDS", grace)]);
        assert_eq!(config.drain_deadline.as_secs(), expected, "{grace}");
    }
    let both = good(&[
        ("TERMINATION_GRACE_PERIOD_SECONDS", "30"),
        ("CONNECTION_TERMINATION_DEADLINE", "2s"),
    ]);
    assert_eq!(both.drain_deadline, Duration::from_secs(2));
}

#[test]
fn worker_threads_follow_the_first_setting_that_is_given() {
    let cores = ("ZTUNNEL_CPU_LIMIT", "10");
    for (settings, expected) in [
        (&[cores, ("ZTUNNEL_WORKER_THREADS", "3")][..], 3),
        (&[cores, ("ZTUNNEL_WORKER_THREADS", "0")], 10),
        (&[cores, ("ZTUNNEL_WORKER_THREADS", "25%")], 3),
        (&[cores, ("ZTUNNEL_WORKER_THREADS", "0.5%")], 1),
        (&[cores, ("ZTUNNEL_WORKER_THREADS", "32.5%")], 4),
        (&[cores, ("PROXY_CONFIG", "concurrency: 4")], 4),
        (&[cores, ("PROXY_CONFIG", "concurrency: 0")], 10),
        (
            &[
                cores,
                ("ZTUNNEL_RESOURCE_CPU_LIMIT", "1500m"),
                ("ZTUNNEL_RESOURCE_CPU_REQUEST", "3"),
            ],
            3,
        ),
        (&[cores], 3),
        (&[("ZTUNNEL_CPU_LIMIT", "1")], 2),
    ] {
        assert_eq!(good(settings).worker_threads, expected, "{settings:?}");
    }
}

#[test]
fn dns_capture_is_on_unless_metadata_says_otherwise() {
    let dns = |settings: &[(&str, &str)]| good(settings).dns;
    assert!(dns(&[("ISTIO_META_DNS_CAPTURE", "true")]).enabled);
    assert!(!dns(&[("ISTIO_META_DNS_CAPTURE", "false")]).enabled);
    assert_eq!(
        dns(&[("ISTIO_META_DNS_PROXY_ADDR", "localhost:53")]).port,
        53
    );
}

#[test]
fn a_token_does_not_show_in_dumps() {
    let config = good(&[("AUTH_TOKEN", "hunter2")]);
    assert!(!format!("{config:?}").contains("hunter2"));
    let dump = serde_json::to_value(&config).expect("the settings can be dumped");
    assert!(!dump.to_string().contains("hunter2"));
    assert_eq!(dump["xds"]["token"]["inline"], "withheld");
}

#[test]
fn a_bound_for_what_is_not_acknowledged_needs_no_probes() {
    let keepalive = |settings: &[(&str, &str)]| good(settings).keepalive();
    let off = ("KEEPALIVE_ENABLED", "false");
    assert_eq!(keepalive(&[off]), None);
    let bounded = keepalive(&[off, ("USER_TIMEOUT_ENABLED", "true")]).expect("a bound");
    assert!(bounded.user_timeout && !bounded.probes);
    assert!(keepalive(&[]).expect("on").probes);
}

#[test]
fn our_own_workload_needs_all_three_names() {
    let named = &[
        ("POD_NAME", "zt-1"),
        ("POD_NAMESPACE", "istio-system"),
        ("SERVICE_ACCOUNT", "ztunnel"),
    ];
    assert!(good(named).node.own_workload().is_some());
    assert!(good(&named[..2]).node.own_workload().is_none());
}

/// Every variable that the chart's DaemonSet sets, with what becomes of it.
#[test]
fn the_chart_runs_it_unchanged() {
    let chart = &[
        ("KUBERNETES_SERVICE_HOST", "10.96.0.1"),
        ("CA_ADDRESS", "istiod-canary.mesh.svc:15012"),
        ("XDS_ADDRESS", "istiod-canary.mesh.svc:15012"),
        ("NETWORK", "net-1"),
        ("RUST_LOG", "warn"),
        ("RUST_BACKTRACE", "1"),
        ("LOG_FORMAT", "json"),
        ("ISTIO_META_CLUSTER_ID", "c-1"),
        ("INPOD_ENABLED", "true"),
        ("TERMINATION_GRACE_PERIOD_SECONDS", "30"),
        ("POD_NAME", "ztunnel-x"),
        ("POD_NAMESPACE", "mesh"),
        ("NODE_NAME", "node-1"),
        ("INSTANCE_IP", "10.0.0.9"),
        ("SERVICE_ACCOUNT", "ztunnel"),
        ("ZTUNNEL_CPU_LIMIT", "4"),
        ("ZTUNNEL_RESOURCE_CPU_LIMIT", "3"),
        ("ZTUNNEL_RESOURCE_CPU_REQUEST", "200m"),
        ("ISTIO_META_ENABLE_HBONE", "true"),
    ];
    let config = good(chart);
    let address = Some("https://istiod-canary.mesh.svc:15012");
    for remote in [&config.xds, &config.ca] {
        let remote = remote.as_ref();
        assert_eq!(remote.map(|it| it.address.as_str()), address);
        // Also before the volume is there: each use reads it.
        let token = Token::File("./var/run/secrets/tokens/istio-token".into());
        assert_eq!(remote.map(|it| &it.token), Some(&token));
        let root = RootCert::File("./var/run/secrets/istio/root-cert.pem".into());
        assert_eq!(remote.map(|it| &it.root), Some(&root));
    }
    let node = &config.node;
    let texts = [
        &node.network,
        &node.cluster_id,
        &node.instance_ip,
        &node.pod_name,
    ];
    assert_eq!(
        texts.map(|it| &**it),
        ["net-1", "c-1", "10.0.0.9", "ztunnel-x"]
    );
    assert_eq!(node.name.as_deref(), Some("node-1"));
    assert!(node.own_workload().is_some());
    assert_eq!(
        (config.log.filter.as_str(), config.log.json),
        ("warn", true)
    );
    assert_eq!(config.drain_deadline, Duration::from_secs(25));
    assert_eq!(config.worker_threads, 3);
    assert!(config.inpod.await_successor && config.inpod.port_reuse);
    assert_eq!(config.inpod.uds, Path::new("/var/run/ztunnel/ztunnel.sock"));
    assert_eq!(config.listen.readiness.port(), 15021);
    assert_eq!(config.listen.stats.port(), 15020);
}

#[test]
fn a_successor_is_expected_where_something_would_start_one() {
    let kubernetes = ("KUBERNETES_SERVICE_HOST", "10.96.0.1");
    let no = ("LEYLINE_AWAIT_SUCCESSOR", "false");
    let yes = ("LEYLINE_AWAIT_SUCCESSOR", "true");
    for (settings, expected) in [
        (&[][..], false),
        (&[kubernetes], true),
        (&[kubernetes, no], false),
        (&[yes], true),
    ] {
        assert_eq!(
            good(settings).inpod.await_successor,
            expected,
            "{settings:?}"
        );
    }
    let error = read(&[("LEYLINE_MAX_POD_CONNECTIONS", "0")]).expect_err("none at all");
    assert!(error.to_string().contains("at least 1"), "{error}");
}

/// As `istioctl` writes the names of fields, in whatever mode.
#[test]
fn the_dump_of_the_settings_has_no_underscores() {
    fn keys(value: &serde_json::Value) -> Vec<&str> {
        let Some(fields) = value.as_object() else {
            return Vec::new();
        };
        let below = fields.values().flat_map(keys);
        fields.keys().map(String::as_str).chain(below).collect()
    }
    let dedicated = [
        ("PROXY_MODE", "dedicated"),
        ("PROXY_WORKLOAD_INFO", "shop/web-1/web"),
        ("LOCAL_XDS_PATH", "state.yaml"),
    ];
    for settings in [&[][..], &dedicated] {
        let mut config = serde_json::to_value(good(settings)).expect("JSON");
        // Its keys are Istio's metadata, as it is told to the control plane.
        config["node"]["metadata"].take();
        let keys = keys(&config);
        assert!(keys.len() > 70, "{keys:?}");
        let odd: Vec<_> = keys.into_iter().filter(|key| key.contains('_')).collect();
        assert_eq!(odd, [""; 0]);
    }
}

#[test]
fn a_tunnel_of_one_workload_knows_which_and_marks_nothing() {
    let config = good(&[
        ("PROXY_MODE", "dedicated"),
        ("PROXY_WORKLOAD_INFO", "shop/web-1/web"),
    ]);
    let Mode::Dedicated(workload) = &config.mode else {
        panic!("dedicated mode");
    };
    let told = (
        &*workload.namespace,
        &*workload.name,
        &*workload.service_account,
    );
    assert_eq!(told, ("shop", "web-1", "web"));
    assert_eq!(config.inpod.mark, None);
    for (mode, of) in [
        ("dedicated", ""),
        ("dedicated", "shop/web-1"),
        ("dedicated", "shop//web"),
        ("alone", "shop/web-1/web"),
    ] {
        let settings = [("PROXY_MODE", mode), ("PROXY_WORKLOAD_INFO", of)];
        assert!(read(&settings).is_err(), "{mode} {of}");
    }
}

#[test]
fn socks5_is_off_unless_it_is_asked_for() {
    assert!(!good(&[]).socks5);
    assert!(good(&[("UNSTABLE_ENABLE_SOCKS5", "true")]).socks5);
}

#[test]
fn a_trust_domain_has_other_names_only_where_that_is_said() {
    let names = |settings: &[(&str, &str)]| -> Vec<String> {
        let names = good(settings).tls.domain_names;
        names.iter().map(ToString::to_string).collect()
    };
    assert_eq!(names(&[("TRUST_DOMAIN", "new.example")]), [""; 0]);
    let aliases = ("LEYLINE_TRUST_DOMAIN_ALIASES", "old.example, older.example");
    assert_eq!(
        names(&[aliases, ("TRUST_DOMAIN", "new.example")]),
        ["old.example", "older.example", "new.example"]
    );
    assert!(read(&[("LEYLINE_TRUST_DOMAIN_ALIASES", "Not_One")]).is_err());
}

#[test]
fn addresses_on_demand_go_with_dns() {
    let config = good(&[("XDS_ON_DEMAND", "true")]);
    assert!(config.xds_on_demand && config.dns.enabled);
}
