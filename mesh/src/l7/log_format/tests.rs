use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use http::Version;

use super::*;
use crate::{
    flow::{Party, PartyLabels},
    l7::{fixture::route, record::cluster_name, request::Claims, response_flags::Flag},
};

struct Here;

impl Environment for Here {
    fn hostname(&self) -> Option<String> {
        Some("waypoint-1".to_owned())
    }

    fn variable(&self, name: &str) -> Option<String> {
        (name == "REGION").then(|| "north".to_owned())
    }
}

fn record() -> RequestRecord {
    RequestRecord {
        connection: 7,
        client: Some("10.0.0.9:40000".parse().unwrap()),
        local: Some("10.96.0.1:80".parse().unwrap()),
        source: Party {
            pod: Some("client-1".into()),
            labels: Arc::new(PartyLabels {
                principal: Some("spiffe://cluster.local/ns/a/sa/client".into()),
                ..PartyLabels::default()
            }),
        },
        start: SystemTime::UNIX_EPOCH + Duration::from_millis(1_767_323_045_678),
        path: "/new?q=1".to_owned(),
        original_path: Some("/old?q=1".to_owned()),
        authority: "web.default".to_owned(),
        version: Version::HTTP_2,
        request_headers: [
            (http::header::USER_AGENT, "curl/8".parse().unwrap()),
            ("x-request-id".parse().unwrap(), "id-1".parse().unwrap()),
        ]
        .into_iter()
        .collect(),
        bytes_received: 3,
        status: Some(200),
        details: Some("via_upstream".into()),
        bytes_sent: 42,
        duration: Some(Duration::from_millis(12)),
        request_duration: Some(Duration::from_millis(1)),
        response_duration: Some(Duration::from_millis(10)),
        upstream: Some("10.0.0.2:8080".parse().unwrap()),
        upstream_cluster: Some(
            cluster_name("web.default.svc.cluster.local", 80, Some("v1")).into(),
        ),
        upstream_local: Some("10.0.0.5:33000".parse().unwrap()),
        attempts: 1,
        route: Some("default".into()),
        ..RequestRecord::default()
    }
}

fn line(format: &LogFormat, record: &RequestRecord) -> String {
    let mut line = String::new();
    Format::new(format, &Here)
        .unwrap()
        .render(record, &mut line);
    line
}

#[test]
fn the_default_text_is_istios() {
    assert_eq!(
        line(&LogFormat::DefaultText, &record()),
        "[2026-01-02T03:04:05.678Z] \"GET /old?q=1 HTTP/2\" 200 - via_upstream - \"-\" 3 42 12 9 \"-\" \"curl/8\" \
         \"id-1\" \"web.default\" \"10.0.0.2:8080\" inbound-vip|80|http/v1|web.default.svc.cluster.local \
         10.0.0.5:33000 10.96.0.1:80 10.0.0.9:40000 - default"
    );
    let refused = RequestRecord {
        status: None,
        flags: Flag::DownstreamConnectionTermination.into(),
        start: SystemTime::UNIX_EPOCH,
        ..RequestRecord::default()
    };
    assert_eq!(
        line(&LogFormat::DefaultText, &refused),
        "[1970-01-01T00:00:00.000Z] \"GET - HTTP/1.1\" 0 DC - - \"-\" 0 0 - - \"-\" \"-\" \"-\" \"-\" \"-\" - - - - - -"
    );
}

#[test]
fn the_default_json_is_istios() {
    assert_eq!(
        line(&LogFormat::DefaultJson, &record()),
        "{\"start_time\":\"2026-01-02T03:04:05.678Z\",\"route_name\":\"default\",\"method\":\"GET\",\
         \"path\":\"/old?q=1\",\"protocol\":\"HTTP/2\",\"response_code\":200,\"response_flags\":\"-\",\
         \"response_code_details\":\"via_upstream\",\"connection_termination_details\":null,\"bytes_received\":3,\
         \"bytes_sent\":42,\"duration\":12,\"upstream_service_time\":\"9\",\"x_forwarded_for\":null,\
         \"user_agent\":\"curl/8\",\"request_id\":\"id-1\",\"authority\":\"web.default\",\
         \"upstream_host\":\"10.0.0.2:8080\",\
         \"upstream_cluster\":\"inbound-vip|80|http/v1|web.default.svc.cluster.local\",\
         \"upstream_local_address\":\"10.0.0.5:33000\",\"downstream_local_address\":\"10.96.0.1:80\",\
         \"downstream_remote_address\":\"10.0.0.9:40000\",\"requested_server_name\":null,\
         \"upstream_transport_failure_reason\":null}"
    );
    let parsed: serde_json::Value =
        serde_json::from_str(&line(&LogFormat::DefaultJson, &record())).unwrap();
    assert_eq!(parsed["duration"], 12);
}

#[test]
fn operators_tell_what_envoys_do() {
    let record = RequestRecord {
        grpc_status: Some(7),
        flags: Flag::RateLimited.into(),
        ..record()
    };
    for (format, expected) in [
        ("%%", "%"),
        ("%REQ(X-NONE?USER-AGENT):4%", "curl"),
        ("%REQ(x-none)%", "-"),
        ("%RESP(:status)%", "200"),
        (
            "%START_TIME(%Y/%m/%dT%H:%M:%S.%6f %s%3f)%",
            "2026/01/02T03:04:05.678000 1767323045678",
        ),
        ("%START_TIME(%b %d %T%z)%", "Jan 02 03:04:05+0000"),
        (
            "%GRPC_STATUS% %GRPC_STATUS(NUMBER)% %GRPC_STATUS_NUMBER%",
            "PermissionDenied 7 7",
        ),
        (
            "%REQUEST_DURATION% %RESPONSE_DURATION% %RESPONSE_TX_DURATION%",
            "1 10 2",
        ),
        (
            "%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT%:%DOWNSTREAM_REMOTE_PORT%",
            "10.0.0.9:40000",
        ),
        (
            "%UPSTREAM_REMOTE_PORT% %UPSTREAM_LOCAL_PORT% %DOWNSTREAM_LOCAL_PORT%",
            "8080 33000 80",
        ),
        (
            "%DOWNSTREAM_PEER_URI_SAN% %DOWNSTREAM_TLS_VERSION%",
            "spiffe://cluster.local/ns/a/sa/client TLSv1.3",
        ),
        (
            "%HOSTNAME% %ENVIRONMENT(REGION)% %ENVIRONMENT(NONE)%",
            "waypoint-1 north -",
        ),
        (
            "%CEL(request.method + '(' + request.headers['user-agent'] + ')')%",
            "GET(curl/8)",
        ),
        ("%TRACE_ID% %STREAM_ID% %CONNECTION_ID%", "- id-1 7"),
        ("%UPSTREAM_REQUEST_ATTEMPT_COUNT% %RESPONSE_FLAGS%", "1 RL"),
        ("%FILTER_STATE(wasm.x:TYPED)% %METADATA(ROUTE:x)%", "- -"),
        (
            "%FILTER_STATE(downstream_peer:FIELD:name)% %FILTER_STATE(wasm.downstream_peer:FIELD:name):3%",
            "client-1 cli",
        ),
        (
            "%FILTER_STATE(upstream_peer:FIELD:name)% %FILTER_STATE(downstream_peer:PLAIN)% \
             %FILTER_STATE(downstream_peer:FIELD:type)%",
            "- - -",
        ),
        (
            "%REQ_WITHOUT_QUERY(:PATH)% %REQ_WITHOUT_QUERY(X-ENVOY-ORIGINAL-PATH?:PATH):3%",
            "/new /ol",
        ),
        (
            "%PATH% %PATH(NQ)% %PATH(WQ:PATH)% %PATH(NQ:ORIG)%",
            "/old?q=1 /old /new?q=1 /old",
        ),
        ("%QUERY_PARAM(q)% %QUERY_PARAM(r)%", "1 -"),
        ("%EMIT_TIME%", "2026-01-02T03:04:05.690Z"),
        ("%UPSTREAM_HOST_NAME_WITHOUT_PORT%", "10.0.0.2"),
    ] {
        assert_eq!(
            line(&LogFormat::Text(format.into()), &record),
            expected,
            "{format}"
        );
    }
}

#[test]
fn json_values_keep_the_type_of_a_single_operator() {
    let pairs = [
        ("a", "%BYTES_SENT%"),
        ("b", "%BYTES_SENT% bytes"),
        ("c", "%CEL(connection.mtls)%"),
        ("d", "%ROUTE_NAME%"),
    ];
    let format = LogFormat::Json(pairs.map(|(key, text)| (key.into(), text.into())).into());
    let none = RequestRecord {
        route: None,
        ..record()
    };
    assert_eq!(
        line(&format, &none),
        r#"{"a":42,"b":"42 bytes","c":true,"d":null}"#
    );
    assert_eq!(line(&LogFormat::Json(Vec::new()), &none), "{}");
}

#[test]
fn no_client_writes_lines_or_keys_of_its_own() {
    let mut evil = record();
    let value = http::HeaderValue::from_bytes(b"\"\\\t\xff").unwrap();
    evil.request_headers.insert(http::header::USER_AGENT, value);
    evil.path = "/\n".to_owned();
    let text = line(
        &LogFormat::Text("%REQ(:PATH)% %REQ(USER-AGENT)%".into()),
        &evil,
    );
    assert_eq!(text, "/\\x0a \"\\\\x09\u{fffd}");
    let json = LogFormat::Json(vec![("a".into(), "%REQ(USER-AGENT)%".into())]);
    let json: serde_json::Value = serde_json::from_str(&line(&json, &evil)).unwrap();
    assert_eq!(json["a"], "\"\\\\x09\u{fffd}");
}

#[test]
fn formats_that_nobody_can_render_are_refused() {
    let parse = |text: &str| Template::parse(text, &Nowhere).map(|_| ());
    assert_eq!(parse("50% off"), Err(InvalidFormat::Open(2)));
    assert_eq!(
        parse("%NOTHING%"),
        Err(InvalidFormat::Command("NOTHING".to_owned()))
    );
    assert_eq!(
        parse("%REQ(a b)%"),
        Err(InvalidFormat::Arguments("REQ(a b)".to_owned()))
    );
    assert_eq!(
        parse("%REQ%"),
        Err(InvalidFormat::Arguments("REQ".to_owned()))
    );
    assert_eq!(
        parse("%REQ(a):x%"),
        Err(InvalidFormat::Arguments("REQ(a):x".to_owned()))
    );
    for wrong in ["PATH(XQ)", "PATH(WQ:ELSE)", "QUERY_PARAM", "QUERY_PARAM()"] {
        let refused = Err(InvalidFormat::Arguments(wrong.to_owned()));
        assert_eq!(parse(&format!("%{wrong}%")), refused);
    }
    assert_eq!(
        parse("%PROTOCOL(x)%"),
        Err(InvalidFormat::Arguments("PROTOCOL(x)".to_owned()))
    );
    assert!(matches!(
        parse("%CEL(x)%"),
        Err(InvalidFormat::Expression(..))
    ));
}

#[test]
fn a_format_tells_which_headers_it_needs() {
    let mut wanted = Wanted::default();
    Format::new(&LogFormat::DefaultText, &Here)
        .unwrap()
        .wanted(&mut wanted);
    assert_eq!(
        wanted.request,
        ["x-forwarded-for", "user-agent", "x-request-id"]
    );
    assert!(wanted.response.is_empty());
}

#[test]
fn metadata_is_what_a_waypoint_knows_of_token_route_and_endpoint() {
    let claims = Claims {
        principal: "i/s".into(),
        audiences: Vec::new(),
        presenter: None,
        all: serde_json::json!({"sub": "s", "realm": {"roles": ["a", "b"], "none": null}}),
    };
    let mut record = record();
    record.claims = Some(claims.into());
    record.rule_of = Some(route("VirtualService/a/v", Vec::new()).into());
    let labels = PartyLabels {
        workload: Some("web".into()),
        namespace: Some("a".into()),
        canonical_service: Some("web".into()),
        ..PartyLabels::default()
    };
    record.destination.labels = labels.into();
    const JWT: &str = "envoy.filters.http.jwt_authn:payload";
    for (format, expected) in [
        (format!("%DYNAMIC_METADATA({JWT}:sub)%"), "s"),
        (
            format!("%METADATA(DYNAMIC:{JWT}:realm:roles)%"),
            "[\"a\",\"b\"]",
        ),
        (
            format!("%METADATA(DYNAMIC:{JWT}:realm:none)% %METADATA(DYNAMIC:{JWT}:x)%"),
            "- -",
        ),
        (
            "%METADATA(ROUTE:istio:config)%".into(),
            "/apis/networking.istio.io/v1/namespaces/a/virtual-service/v",
        ),
        ("%UPSTREAM_METADATA(istio:workload)%".into(), "web;a;web;;"),
    ] {
        assert_eq!(
            line(&LogFormat::Text(format.as_str().into()), &record),
            expected,
            "{format}"
        );
    }
    let nothing = RequestRecord::default();
    let all = "%METADATA(UPSTREAM_HOST:istio:workload)%%METADATA(ROUTE:istio:config)%%DYNAMIC_METADATA(a:b)%";
    let all = LogFormat::Text(all.into());
    assert_eq!(line(&all, &nothing), "---");
    let parsed = Format::new(&all, &Here).unwrap();
    assert_eq!(
        parsed.silent().collect::<Vec<_>>(),
        ["DYNAMIC_METADATA(a:b)"]
    );
}
