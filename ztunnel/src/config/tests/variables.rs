//! Every variable: its default, a text that it takes, and one that it does not.

use std::io::Write;

use serde_json::Value;

use super::*;

/// Name, where the dump tells it, its default, a text, and what becomes of that.
const VARIABLES: &str = r#"
NETWORK                          /node/network                       ""                    net-1           "net-1"
NODE_NAME                        /node/name                          null                  node-1          "node-1"
CLUSTER_ID                       /node/clusterId                     "Kubernetes"          c-1             "c-1"
CLUSTER_DOMAIN                   /node/clusterDomain                 "cluster.local"       example.org     "example.org"
TRUST_DOMAIN                     /node/trustDomain                   "cluster.local"       td.example      "td.example"
INSTANCE_IP                      /node/instanceIp                    "1.1.1.1"             10.0.0.9        "10.0.0.9"
POD_NAME                         /node/podName                       ""                    zt-1            "zt-1"
POD_NAMESPACE                    /node/podNamespace                  ""                    mesh            "mesh"
SERVICE_ACCOUNT                  /node/serviceAccount                null                  zt              "zt"
ISTIO_META_CLUSTER_ID            /node/clusterId                     "Kubernetes"          c-2             "c-2"
ISTIO_META_ISTIO_VERSION         /node/istioVersion                  "unknown"             1.30.0          "1.30.0"
PROXY_MODE                       /mode                               "shared"              shared          "shared"
XDS_ADDRESS                      /xds/address                        "https://localhost:15012"  cp:1       "https://cp:1"
CA_ADDRESS                       /ca/address                         "https://localhost:15012"  ca:1       "https://ca:1"
XDS_ADDRESS                      /xds/alternativeHostname            null                  cp:1            null
ALT_XDS_HOSTNAME                 /xds/alternativeHostname            null                  cp.mesh         "cp.mesh"
ALT_CA_HOSTNAME                  /ca/alternativeHostname             null                  ca.mesh         "ca.mesh"
XDS_ROOT_CA                      /xds/root    {"file":"./var/run/secrets/istio/root-cert.pem"}  SYSTEM     "system"
CA_ROOT_CA                       /ca/root     {"file":"./var/run/secrets/istio/root-cert.pem"}  /a/b.pem   {"file":"/a/b.pem"}
CA_ROOT_CA                       /xds/root    {"file":"./var/run/secrets/istio/root-cert.pem"}  SYSTEM     {"file":"./var/run/secrets/istio/root-cert.pem"}
AUTH_TOKEN                       /xds/token                          "none"                hunter2         {"inline":"withheld"}
AUTH_TOKEN                       /ca/token                           "none"                /dev/null       {"file":"/dev/null"}
FAKE_CA                          /ca/alternativeHostname             null                  false           null
SECRET_TTL                       /secretTtl/secs                     86400                 1h30m           5400
XDS_ON_DEMAND                    /xdsOnDemand                        false                 true            true
LOCAL_XDS_PATH                   /localState                         null                  a.yaml          {"file":"a.yaml"}
LOCAL_XDS                        /localState                         null                  {}              {"inline":"{}"}
INPOD_UDS                        /inpod/uds                          "/var/run/ztunnel/ztunnel.sock"  /a   "/a"
INPOD_PORT_REUSE                 /inpod/portReuse                    true                  false           false
PACKET_MARK                      /inpod/mark                         1337                  7               7
PACKET_MARK                      /inpod/mark                         1337                  0               null
ENABLE_ORIG_SRC                  /inpod/originalSource               "bestEffort"          true            "required"
ENABLE_ORIG_SRC                  /inpod/originalSource               "bestEffort"          false           "never"
IPV6_ENABLED                     /inpod/ipv6                         true                  false           false
IPV6_ENABLED                     /listen/stats                       "[::]:15020"          false           "0.0.0.0:15020"
IPV6_ENABLED                     /listen/readiness                   "[::]:15021"          false           "0.0.0.0:15021"
IPV6_ENABLED                     /listen/admin  ["127.0.0.1:15000","[::1]:15000"]          false           ["127.0.0.1:15000"]
ENABLE_PROXY                     /proxyEnabled                       true                  false           false
UNSTABLE_ENABLE_SOCKS5           /socks5                             false                 true            true
PREFERED_SERVICE_NAMESPACE       /dns/preferredServiceNamespace      null                  shop            "shop"
POOL_MAX_STREAMS_PER_CONNECTION  /http2/maxStreamsPerConnection      100                   7               7
POOL_UNUSED_RELEASE_TIMEOUT      /http2/unusedReleaseTimeout/secs    300                   7s              7
HTTP2_STREAM_WINDOW_SIZE         /http2/streamWindowSize             4194304               65536           65536
HTTP2_CONNECTION_WINDOW_SIZE     /http2/connectionWindowSize         16777216              4194304         4194304
HTTP2_FRAME_SIZE                 /http2/frameSize                    1048576               16384           16384
KEEPALIVE_ENABLED                /keepalive/enabled                  true                  false           false
KEEPALIVE_TIME                   /keepalive/time/secs                180                   1m              60
KEEPALIVE_INTERVAL               /keepalive/interval/secs            180                   1m              60
KEEPALIVE_RETRIES                /keepalive/retries                  9                     3               3
USER_TIMEOUT_ENABLED             /keepalive/userTimeout              false                 true            true
CONNECTION_TERMINATION_DEADLINE  /drainDeadline/secs                 5                     7s              7
TERMINATION_GRACE_PERIOD_SECONDS /drainDeadline/secs                 5                     30              25
LOCALHOST_APP_TUNNEL             /localhostAppTunnel                 true                  false           false
ENABLE_RESPONSE_BAGGAGE          /responseBaggage                    true                  false           false
CRL_PATH                         /tls/revocations                    null                  a.pem           "a.pem"
COMPLIANCE_POLICY                /tls/postQuantumOnly                false                 pqc             true
TLS12_ENABLED                    /tls/tls12                          false                 true            true
AUTHZ_POLICY_INFO_LOGGING        /log/authorizationAtInfo            false                 true            true
RUST_LOG                         /log/filter                         "info"                warn,xds=debug  "warn,xds=debug"
LOG_FORMAT                       /log/json                           false                 json            true
LOG_FORMAT                       /log/json                           false                 plain           false
INPOD_ENABLED                    /mode                               "shared"              true            "shared"
LEYLINE_SAME_NODE                /sameNode                           false                 true            true
LEYLINE_DATA_WITH_CONNECT        /dataWithConnect                    true                  false           false
LEYLINE_MAX_POD_CONNECTIONS      /maxPodConnections                  null                  7               7
LEYLINE_AWAIT_SUCCESSOR          /inpod/awaitSuccessor               false                 true            true
LEYLINE_RESOLV_CONF              /dns/resolvConf                     "/etc/resolv.conf"    /a              "/a"
LEYLINE_ADMIN_ADDRESS            /listen/admin  ["127.0.0.1:15000","[::1]:15000"]  127.0.0.9:1             ["127.0.0.9:1"]
LEYLINE_STATS_ADDRESS            /listen/stats                       "[::]:15020"          10.0.0.9:1      "10.0.0.9:1"
LEYLINE_READINESS_ADDRESS        /listen/readiness                   "[::]:15021"          10.0.0.9:1      "10.0.0.9:1"
"#;

/// Name, and a text that ends the start.
const BAD: &str = r#"
XDS_ADDRESS                      ftp://cp
XDS_ADDRESS                      ::::
CA_ADDRESS                       https://
ALT_XDS_HOSTNAME                 cp..example
ALT_CA_HOSTNAME                  cp..example
TRUST_DOMAIN                     Cluster.Local
RUST_LOG                         loud
RUST_LOG                         xds=loud
XDS_ON_DEMAND                    yes
PROXY_MODE                       alone
INPOD_PORT_REUSE                 1
PACKET_MARK                      -1
ENABLE_ORIG_SRC                  auto
IPV6_ENABLED                     no
ENABLE_PROXY                     on
FAKE_CA                          True
SECRET_TTL                       24
POOL_MAX_STREAMS_PER_CONNECTION  0
POOL_MAX_STREAMS_PER_CONNECTION  65536
POOL_UNUSED_RELEASE_TIMEOUT      soon
HTTP2_STREAM_WINDOW_SIZE         65534
HTTP2_CONNECTION_WINDOW_SIZE     2147483648
HTTP2_CONNECTION_WINDOW_SIZE     4194303
HTTP2_FRAME_SIZE                 16777216
KEEPALIVE_ENABLED                x
KEEPALIVE_TIME                   500ms
KEEPALIVE_TIME                   10h
KEEPALIVE_INTERVAL               0s
KEEPALIVE_RETRIES                0
KEEPALIVE_RETRIES                128
USER_TIMEOUT_ENABLED             x
CONNECTION_TERMINATION_DEADLINE  5
TERMINATION_GRACE_PERIOD_SECONDS 5s
LOCALHOST_APP_TUNNEL             x
ENABLE_RESPONSE_BAGGAGE          x
COMPLIANCE_POLICY                fips
TLS12_ENABLED                    1
AUTHZ_POLICY_INFO_LOGGING        x
LOG_FORMAT                       text
PROXY_CONFIG                     concurrency:[
PROXY_CONFIG                     {"statsPort":65536}
ZTUNNEL_WORKER_THREADS           0%
ZTUNNEL_CPU_LIMIT                two
ZTUNNEL_RESOURCE_CPU_LIMIT       -1
ZTUNNEL_RESOURCE_CPU_REQUEST     1c
UNSTABLE_ENABLE_SOCKS5           x
LEYLINE_SAME_NODE                x
LEYLINE_DATA_WITH_CONNECT        x
LEYLINE_AWAIT_SUCCESSOR          x
LEYLINE_STATS_ADDRESS            15020
LEYLINE_READINESS_ADDRESS        15021
"#;

fn rows<const N: usize>(table: &str) -> impl Iterator<Item = [&str; N]> {
    let lines = table.lines().filter(|line| !line.is_empty());
    lines.map(|line| {
        let row: Vec<_> = line.split_whitespace().collect();
        row.try_into().expect("a whole row")
    })
}

#[track_caller]
fn told(settings: &[(&str, &str)], place: &str) -> Value {
    let dump = serde_json::to_value(good(settings)).expect("the settings can be dumped");
    let told = dump.pointer(place).cloned();
    told.unwrap_or_else(|| panic!("no {place} in {dump}"))
}

#[test]
fn every_variable_has_its_default_and_is_taken() {
    for [name, place, default, text, taken] in rows(VARIABLES) {
        let parse = |json: &str| serde_json::from_str::<Value>(json).expect(name);
        assert_eq!(told(&[], place), parse(default), "without {name}");
        assert_eq!(told(&[(name, text)], place), parse(taken), "{name}={text}");
    }
}

#[test]
fn every_text_that_makes_no_sense_ends_the_start_by_name() {
    for [name, text] in rows(BAD) {
        match read(&[(name, text)]) {
            Ok(_) => panic!("{name}={text} is taken"),
            Err(ConfigError(bad)) => {
                let named: Vec<_> = bad.iter().map(|it| it.name.as_str()).collect();
                assert_eq!(named, [name], "{name}={text}");
            }
        }
    }
}

#[test]
fn the_form_of_a_variable_that_istio_names_twice_is_the_prefixed_one() {
    let both = [("CLUSTER_ID", "plain"), ("ISTIO_META_CLUSTER_ID", "meta")];
    assert_eq!(told(&both, "/node/clusterId"), "meta");
}

#[test]
fn nothing_to_do_is_no_setting() {
    let off = [
        ("ENABLE_PROXY", "false"),
        ("ISTIO_META_DNS_CAPTURE", "false"),
    ];
    assert!(read(&off).is_err());
    assert!(read(&off[..1]).is_ok() && read(&off[1..]).is_ok());
}

/// As the process reads them: with the names of all that is set.
fn from_env(settings: &[(&str, &str)]) -> Result<Config, ConfigError> {
    let names: Vec<_> = settings
        .iter()
        .map(|(name, _)| (*name).to_owned())
        .collect();
    let map: HashMap<_, _> = settings.iter().copied().collect();
    let lookup = |name: &str| map.get(name).map(|text| (*text).to_owned());
    Config::from_reader(Reader::new(&lookup, &names))
}

#[test]
fn headers_are_told_to_their_own_service_alone() {
    let config = from_env(&[
        ("XDS_HEADER_x-tenant", "one"),
        ("XDS_HEADER_x-zone", "z"),
        ("CA_HEADER_x-tenant", "two"),
    ]);
    let config = config.expect("good");
    let of = |remote: Option<Remote>| {
        let mut headers = remote.expect("on").headers;
        headers.sort();
        headers
    };
    let header = |name: &str, text: &str| (name.to_owned(), text.to_owned());
    let xds = [header("x-tenant", "one"), header("x-zone", "z")];
    assert_eq!(of(config.xds), xds);
    assert_eq!(of(config.ca), [header("x-tenant", "two")]);
}

#[test]
fn metadata_is_that_of_the_file_under_the_overlay_under_the_variables() {
    let mut file = tempfile::NamedTempFile::new().expect("a file");
    let text = "
rootNamespace: passed over
defaultConfig:
  discoveryAddress: file.example:15012
  proxyAdminPort: 1
  statsPort: 2
  concurrency: 3
  proxyMetadata: {ISTIO_META_A: file, B: file, C: file, DNS_CAPTURE: 'false', DNS_PROXY_ADDR: 'localhost:5353'}
";
    file.write_all(text.as_bytes()).expect("written");
    let path = file.path().to_str().expect("text");
    let config = from_env(&[
        ("LEYLINE_MESH_CONFIG_FILE", path),
        (
            "PROXY_CONFIG",
            "{statsPort: 20, proxyMetadata: {ISTIO_META_B: overlay, C: overlay}}",
        ),
        ("ISTIO_META_C", "variable"),
        ("ISTIO_META_DNS_CAPTURE", "true"),
        ("ISTIO_METAJSON_LABELS", r#"{"app": "zt"}"#),
        ("NODE_NAME", "node-1"),
        ("POD_NAME", "zt-1"),
    ]);
    let config = config.expect("good");
    let address = config.xds.map(|xds| xds.address);
    assert_eq!(address.as_deref(), Some("https://file.example:15012"));
    assert_eq!(config.listen.admin[0].port(), 1);
    assert_eq!(config.listen.stats.port(), 20);
    assert_eq!(config.worker_threads, 3);
    assert_eq!((config.dns.enabled, config.dns.port), (true, 5353));
    let expected = serde_json::json!({
        "A": "file", "B": "overlay", "C": "variable",
        "DNS_CAPTURE": "true", "DNS_PROXY_ADDR": "localhost:5353", "LABELS": {"app": "zt"},
        "NAME": "zt-1", "NAMESPACE": "", "INSTANCE_IPS": "1.1.1.1", "NODE_NAME": "node-1",
        "CLUSTER_ID": "Kubernetes",
    });
    let metadata = serde_json::to_value(&config.node.metadata).expect("JSON");
    assert_eq!(metadata, expected);
}

#[test]
fn a_file_or_metadata_that_cannot_be_read_ends_the_start_by_name() {
    let mut file = tempfile::NamedTempFile::new().expect("a file");
    file.write_all(b"defaultConfig: [").expect("written");
    let path = file.path().to_str().expect("text");
    for (name, text, named) in [
        ("LEYLINE_MESH_CONFIG_FILE", path, path),
        ("ISTIO_METAJSON_LABELS", "{", "ISTIO_METAJSON_LABELS"),
        ("ISTIO_META_DNS_PROXY_ADDR", "localhost", "DNS_PROXY_ADDR"),
        ("ISTIO_META_DNS_PROXY_ADDR", "localhost:0", "DNS_PROXY_ADDR"),
        ("XDS_HEADER_x-tenant", "line\nbreak", "XDS_HEADER_x-tenant"),
        ("XDS_HEADER_a b", "one", "XDS_HEADER_a b"),
        ("CA_HEADER_", "one", "CA_HEADER_"),
        ("AUTH_TOKEN", "line\nbreak", "AUTH_TOKEN"),
    ] {
        let ConfigError(bad) = from_env(&[(name, text)]).expect_err("bad");
        assert_eq!(bad.len(), 1, "{bad:?}");
        assert_eq!(bad[0].name, named);
    }
}
