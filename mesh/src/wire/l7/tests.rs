use std::time::Duration;

use http::{HeaderValue, StatusCode};
use proto::waypoint as wire;

use super::*;
use crate::{
    l7::{
        authorization::*, backend::*, config::*, name::Target, pattern::Pattern,
        request_authentication::*, route::*, telemetry::*,
    },
    names::PolicyKey,
};

#[track_caller]
fn round_trips(resource: Resource) {
    let wire = wire::Resource::from(&resource);
    assert_eq!(Resource::try_from(wire), Ok(resource));
}

fn header(name: &'static str) -> HeaderName {
    HeaderName::from_static(name)
}

fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

fn service(name: &str) -> NamespacedHostname {
    name.parse().unwrap()
}

fn every_text() -> Vec<TextMatch> {
    vec![
        TextMatch::Exact("a".into()),
        TextMatch::Prefix("b".into()),
        TextMatch::Regex(Pattern::new("c.*").unwrap()),
        TextMatch::Present,
    ]
}

fn every_path() -> Vec<PathMatch> {
    vec![
        PathMatch::Exact("/a".into()),
        PathMatch::Segments("/b".into()),
        PathMatch::Prefix("/c".into()),
        PathMatch::Regex(Pattern::new("/d.*").unwrap()),
        PathMatch::Grpc {
            service: Some(TextMatch::Exact("s".into())),
            method: None,
        },
    ]
}

fn full_match(path: PathMatch) -> HttpMatch {
    let headers = every_text().into_iter().map(|value| HeaderMatch {
        name: header("x-a"),
        value,
    });
    HttpMatch {
        path: Some(path),
        ignore_path_case: true,
        method: Some(TextMatch::Exact("GET".into())),
        scheme: Some(TextMatch::Exact("http".into())),
        authority: Some(TextMatch::Prefix("web".into())),
        headers: headers.clone().collect(),
        without_headers: headers.collect(),
        query: vec![QueryMatch {
            name: "q".into(),
            value: TextMatch::Present,
        }],
        port: Some(80),
        source: source(),
        claims: vec![(vec!["a".into(), "b".into()], TextMatch::Exact("c".into()))],
        grpc: true,
    }
}

fn source() -> Option<Box<CallerMatch>> {
    let labels = [("app".into(), "web".into())];
    CallerMatch::new(Some("b".into()), labels.into())
}

fn edit() -> HeaderEdit {
    HeaderEdit {
        set: vec![(header("x-set"), HeaderValue::from_bytes(b"\xff").unwrap())],
        add: vec![(header("x-add"), HeaderValue::from_static("1"))],
        remove: vec![header("x-remove")],
    }
}

fn backend() -> Backend {
    Backend::Service {
        service: service("a/web.a.svc"),
        port: 80,
        subset: Some("v2".into()),
    }
}

fn redirect(port: RedirectPort) -> Redirect {
    Redirect {
        scheme: Some("https".into()),
        hostname: Some("x".into()),
        path: Some(PathRewrite::Full("/f".into())),
        port,
        status: StatusCode::PERMANENT_REDIRECT,
    }
}

fn mirror(backend: Backend) -> Mirror {
    Mirror {
        backend,
        per_million: 500_000,
        shadow_host: true,
    }
}

fn retry() -> RetryPolicy {
    RetryPolicy {
        attempts: 3,
        on: RetryOn {
            connect_failure: true,
            refused_stream: true,
            reset: true,
            reset_before_request: true,
            per_try_timeout: true,
            any_5xx: true,
            gateway_error: true,
            retriable_4xx: true,
            status_codes: vec![StatusCode::BAD_GATEWAY],
            grpc_statuses: vec![14],
            non_idempotent: true,
        },
        backoff: Duration::from_millis(25),
        per_try_timeout: Some(seconds(1)),
        ignore_previous: true,
        remote_localities: true,
    }
}

fn session(carrier: SessionCarrier) -> SessionPersistence {
    SessionPersistence {
        carrier,
        absolute_timeout: Some(seconds(60)),
    }
}

fn full_rule() -> HttpRule {
    let cors = Cors {
        allow_origins: vec![
            OriginMatch::Any,
            OriginMatch::Wildcard("https://*.x".into()),
            OriginMatch::Text(TextMatch::Exact("y".into())),
        ],
        allow_credentials: true,
        allow_methods: vec!["GET".into()],
        allow_headers: vec!["x-a".into()],
        expose_headers: vec!["x-b".into()],
        max_age: Some(5),
        forward_unmatched_preflights: true,
    };
    HttpRule {
        name: Some("rule".into()),
        matches: every_path().into_iter().map(full_match).collect(),
        request_headers: edit(),
        response_headers: edit(),
        rewrite: Some(Rewrite {
            authority: Some("h".into()),
            path: Some(PathRewrite::Regex {
                pattern: Pattern::new("a(.)").unwrap(),
                replacement: r"\1".into(),
            }),
        }),
        mirrors: vec![mirror(backend()), mirror(Backend::Invalid("none".into()))],
        cors: Some(cors),
        fault: Some(Fault {
            delay: Some((10, seconds(2))),
            abort: Some((20, Abort::Http(StatusCode::IM_A_TEAPOT))),
        }),
        rate_limit: Some(RateLimit {
            max_tokens: 10,
            tokens_per_fill: 1,
            fill_interval: Duration::from_millis(100),
        }),
        external_authorizer: Some("ext".into()),
        timeouts: Timeouts {
            request: Some(seconds(3)),
            per_try: Some(seconds(1)),
        },
        retry: Some(retry()),
        session: Some(session(SessionCarrier::Header(header("x-session")))),
        action: Action::Forward(vec![WeightedBackend {
            weight: 7,
            backend: backend(),
            request_headers: edit(),
            response_headers: edit(),
            rewrite: Some(Rewrite {
                authority: None,
                path: Some(PathRewrite::Prefix("/p".into())),
            }),
            redirect: Some(redirect(RedirectPort::Derived)),
            mirrors: vec![mirror(backend())],
        }]),
    }
}

fn route(rules: Rules) -> Resource {
    Resource::Route(Route {
        key: "HTTPRoute/a/web".parse().unwrap(),
        created: 1_700_000_000,
        attachments: vec![
            Attachment {
                service: service("a/web.a.svc"),
                port: Some(80),
                callers: Callers::Namespace("b".into()),
            },
            Attachment {
                service: service("a/api.a.svc"),
                port: None,
                callers: Callers::All,
            },
        ],
        rules,
    })
}

#[test]
fn routes_of_requests_round_trip() {
    let mut rules = vec![full_rule()];
    let ports = [
        RedirectPort::Port(8080),
        RedirectPort::FromRequest,
        RedirectPort::ProtocolDefault,
    ];
    rules.extend(ports.map(|port| HttpRule::new(vec![], Action::Redirect(redirect(port)))));
    rules.push(HttpRule {
        fault: Some(Fault {
            delay: None,
            abort: Some((1, Abort::Grpc(14))),
        }),
        session: Some(session(SessionCarrier::Cookie {
            name: "s".into(),
            path: Some("/".into()),
            permanent: true,
        })),
        ..HttpRule::new(
            vec![HttpMatch::default()],
            Action::Respond(DirectResponse {
                status: StatusCode::OK,
                body: b"hello".to_vec(),
            }),
        )
    });
    rules.push(HttpRule::new(vec![], Action::Invalid("because".into())));
    for order in [Order::Precedence, Order::Written] {
        round_trips(route(Rules::Http {
            order,
            rules: rules.clone(),
        }));
    }
}

#[test]
fn routes_of_connections_round_trip() {
    round_trips(route(Rules::Tls(vec![TlsRule {
        name: Some("t".into()),
        sni: vec!["*.example.com".into()],
        port: Some(443),
        source: source(),
        destinations: vec!["10.0.0.0/8".parse().unwrap()],
        backends: vec![(1, backend()), (0, Backend::Invalid("x".into()))],
    }])));
    round_trips(route(Rules::Tcp(vec![TcpRule {
        name: None,
        port: None,
        source: source(),
        destinations: vec!["10.0.0.0/8".parse().unwrap(), "fd00::/64".parse().unwrap()],
        backends: vec![(3, backend())],
    }])));
}

fn traffic(
    balancer: Balancer,
    locality: Option<Locality>,
    tls: Option<BackendTls>,
) -> TrafficPolicy {
    TrafficPolicy {
        balancer,
        locality,
        warmup: Some(Warmup {
            duration: seconds(30),
            minimum_percent: 10,
            aggression_milli: 1500,
        }),
        pool: ConnectionPool {
            max_connections: Some(1),
            connect_timeout: Some(seconds(2)),
            keepalive: Some((Some(3), Some(seconds(4)), None)),
            max_connection_duration: Some(seconds(5)),
            tcp_idle_timeout: Some(seconds(6)),
            max_pending_requests: Some(7),
            max_requests: Some(8),
            max_requests_per_connection: Some(9),
            max_retries: Some(10),
            http_idle_timeout: Some(seconds(11)),
            http_version: UpstreamVersion::Http2,
            max_concurrent_streams: Some(12),
            http2_keepalive: Some(Http2Keepalive {
                interval: seconds(13),
                timeout: seconds(14),
            }),
        },
        outlier: Some(OutlierDetection {
            consecutive_5xx: 5,
            consecutive_gateway_errors: 0,
            consecutive_local_failures: Some(4),
            interval: seconds(10),
            base_ejection_time: seconds(30),
            max_ejection_percent: 10,
            min_health_percent: 50,
            error_codes: vec![StatusCode::TOO_MANY_REQUESTS],
        }),
        tls,
        proxy_protocol: Some(2),
        forward_to: Some("[2001:db8::1]:443".into()),
        retry_budget: Some(RetryBudget {
            percent: 20,
            interval: seconds(10),
            min_retries: 3,
        }),
        session: None,
    }
}

fn balancers() -> Vec<Balancer> {
    let hash = |key, table| Balancer::ConsistentHash { key, table };
    let cookie = HashKey::Cookie {
        name: "c".into(),
        path: None,
        ttl: Some(Duration::ZERO),
        attributes: vec![
            ("SameSite".into(), Some("Lax".into())),
            ("Secure".into(), None),
        ],
    };
    vec![
        Balancer::LeastRequest,
        Balancer::RoundRobin,
        Balancer::Random,
        Balancer::Passthrough,
        hash(HashKey::Header(header("x-user")), HashTable::Ring(1024)),
        hash(cookie, HashTable::Maglev(65537)),
        hash(HashKey::SourceIp, HashTable::Ring(1)),
        hash(HashKey::Query("q".into()), HashTable::Ring(1)),
    ]
}

#[test]
fn policies_of_backends_round_trip() {
    let certificate = || {
        Some(ClientCertificate {
            chain: Pem::Inline(b"chain".to_vec()),
            key: Pem::Inline(b"key".to_vec()),
        })
    };
    let localities = [
        Locality::Off,
        Locality::Failover(vec![("a".into(), "b".into())]),
        Locality::Priority(vec![("k".into(), Some("v".into())), ("l".into(), None)]),
        Locality::Distribute(vec![Distribution {
            from: "a/b/*".into(),
            to: vec![("c".into(), 70), ("d".into(), 30)],
        }]),
    ];
    let tls = [
        BackendTls::Verify {
            sni: Some("x".into()),
            roots: Some(Pem::Inline(b"roots".to_vec())),
            revoked: Some(Pem::File("/etc/crl".into())),
            subject_alt_names: vec![
                SubjectAltName::Hostname("x".into()),
                SubjectAltName::Uri("spiffe://x".into()),
            ],
            client: certificate(),
        },
        BackendTls::Verify {
            sni: None,
            roots: Some(Pem::File("/etc/roots".into())),
            revoked: Some(Pem::Inline(b"revoked".to_vec())),
            subject_alt_names: vec![],
            client: Some(ClientCertificate {
                chain: Pem::File("/etc/chain".into()),
                key: Pem::File("/etc/key".into()),
            }),
        },
        BackendTls::Insecure {
            sni: None,
            client: certificate(),
        },
        BackendTls::Invalid("no roots".into()),
    ];
    let ports = localities.into_iter().zip(1..);
    let subset = Subset {
        labels: BTreeMap::from([("version".into(), "v2".into())]),
        policy: Some(TrafficPolicy::default()),
        ports: tls
            .into_iter()
            .zip(1..)
            .map(|(tls, port)| (port, traffic(Balancer::Random, None, Some(tls))))
            .collect(),
    };
    for balancer in balancers() {
        round_trips(Resource::Backend(Box::new(BackendPolicy {
            service: service("a/web.a.svc"),
            sources: vec!["DestinationRule/a/web".parse().unwrap()],
            policy: traffic(balancer, None, None),
            ports: ports
                .clone()
                .map(|(it, port)| (port, traffic(Balancer::Random, Some(it), None)))
                .collect(),
            subsets: BTreeMap::from([("v2".into(), subset.clone())]),
        })));
    }
}

fn key() -> PolicyKey {
    "a/p".parse().unwrap()
}

fn targets() -> Vec<Target> {
    vec![Target::Waypoint, Target::Service(service("a/web.a.svc"))]
}

fn either<T>(values: Vec<T>) -> Either<T>
where
    T: Clone,
{
    Either {
        not_values: values.clone(),
        values,
    }
}

fn every_value() -> Either<ValueMatch> {
    either(vec![
        ValueMatch::Exact("a".into()),
        ValueMatch::Prefix("b".into()),
        ValueMatch::Suffix("c".into()),
        ValueMatch::Present,
        ValueMatch::Cidr("10.0.0.0/8".parse().unwrap()),
        ValueMatch::Port(80),
    ])
}

fn every_condition() -> Vec<Condition> {
    let keys = [
        ConditionKey::Header(header("x-a")),
        ConditionKey::SourceIp,
        ConditionKey::RemoteIp,
        ConditionKey::SourceNamespace,
        ConditionKey::SourcePrincipal,
        ConditionKey::SourceServiceAccount,
        ConditionKey::SourceTrustDomain,
        ConditionKey::RequestPrincipal,
        ConditionKey::Audiences,
        ConditionKey::Presenter,
        ConditionKey::Claim(vec!["a".into(), "b".into()]),
        ConditionKey::DestinationIp,
        ConditionKey::DestinationPort,
        ConditionKey::Sni,
    ];
    let conditions = keys.map(|key| Condition {
        key,
        values: every_value(),
    });
    conditions.to_vec()
}

fn policy(action: PolicyAction) -> RequestPolicy {
    let ranges: Either<IpNet> = either(vec!["10.0.0.0/8".parse().unwrap()]);
    RequestPolicy {
        key: key(),
        targets: targets(),
        action,
        dry_run: true,
        rules: vec![PolicyRule {
            from: vec![SourceMatch {
                principals: every_value(),
                request_principals: every_value(),
                namespaces: every_value(),
                service_accounts: either(vec![("a".into(), "b".into())]),
                trust_domains: every_value(),
                ip_blocks: ranges.clone(),
                remote_ip_blocks: ranges,
            }],
            to: vec![OperationMatch {
                hosts: every_value(),
                ports: either(vec![80, 443]),
                methods: every_value(),
                paths: either(vec![
                    PathTemplate::Value(ValueMatch::Exact("/a".into())),
                    PathTemplate::Template(vec![
                        TemplatePart::Literal("a".into()),
                        TemplatePart::One,
                        TemplatePart::Any,
                    ]),
                ]),
            }],
            when: every_condition(),
        }],
        faults: vec!["told".into()],
    }
}

#[test]
fn policies_of_requests_round_trip() {
    for action in [
        PolicyAction::Allow,
        PolicyAction::Deny,
        PolicyAction::Audit,
        PolicyAction::Custom("ext".into()),
    ] {
        round_trips(Resource::Policy(policy(action)));
    }
}

#[test]
fn authentications_round_trip() {
    let rule = |keys, from: Option<&str>| JwtRule {
        issuer: "https://issuer".into(),
        audiences: vec!["aud".into()],
        keys,
        keys_from: from.map(Into::into),
        from: vec![
            TokenPlace::Header {
                name: header("x-token"),
                prefix: "Bearer ".into(),
            },
            TokenPlace::Query("t".into()),
            TokenPlace::Cookie("c".into()),
        ],
        payload_header: Some(header("x-payload")),
        claim_headers: vec![(header("x-sub"), vec!["a".into(), "sub".into()])],
        forward_token: true,
        space_delimited_claims: vec!["roles".into()],
        timeout: seconds(5),
    };
    round_trips(Resource::Authentication(RequestAuthentication {
        key: key(),
        targets: targets(),
        rules: vec![
            rule(Jwks::Keys("{}".into()), None),
            rule(
                Jwks::Unavailable("never fetched".into()),
                Some("https://keys"),
            ),
        ],
    }));
}

#[test]
fn telemetry_round_trips() {
    let tracing = Tracing {
        providers: vec!["otel".into()],
        sampling_per_million: Some(10_000),
        disabled: true,
        tags: vec![
            ("a".into(), TagSource::Literal("x".into())),
            ("b".into(), TagSource::Environment("E".into(), None)),
            ("c".into(), TagSource::Header("h".into(), Some("d".into()))),
        ],
        propagation_disabled: true,
        sampling_by_chance: true,
        istio_tags_disabled: true,
    };
    let telemetry = Telemetry {
        key: key(),
        targets: targets(),
        metrics: MetricOptions {
            overrides: vec![MetricOverride {
                metric: Some("istio_requests_total".into()),
                disabled: true,
                tags: vec![
                    ("a".into(), None),
                    ("b".into(), Some("request.path".into())),
                ],
            }],
        },
        access_logs: Some(vec![AccessLogging {
            providers: vec!["file".into()],
            disabled: true,
            filter: Some("response.code >= 400".into()),
        }]),
        tracing: Some(tracing),
    };
    round_trips(Resource::Telemetry(telemetry.clone()));
    round_trips(Resource::Telemetry(Telemetry {
        access_logs: None,
        tracing: None,
        ..telemetry
    }));
}

fn authorizer(protocol: AuthorizerProtocol) -> ExternalAuthorizer {
    ExternalAuthorizer {
        service: service("a/ext.a.svc"),
        port: 9000,
        protocol,
        timeout: seconds(2),
        fail_open: true,
        status_on_error: 503,
        body: Some(AuthorizerBody {
            max_bytes: 1024,
            allow_partial: true,
            as_bytes: true,
        }),
    }
}

fn authorizers() -> BTreeMap<Str, ExternalAuthorizer> {
    let grpc = AuthorizerProtocol::Grpc {
        allowed_headers: vec!["x-*".into()],
    };
    let http = AuthorizerProtocol::Http {
        path_prefix: "/check".into(),
        allowed_headers: vec!["cookie".into()],
        add_headers: vec![(header("x-from"), "waypoint".into())],
        to_upstream: vec!["x-user".into()],
        to_client_on_deny: vec!["location".into()],
        to_client_on_allow: vec!["set-cookie".into()],
    };
    BTreeMap::from([
        ("grpc".into(), authorizer(grpc)),
        ("http".into(), authorizer(http)),
    ])
}

fn log_providers() -> BTreeMap<Str, LogProvider> {
    let formats = [
        LogFormat::DefaultText,
        LogFormat::DefaultJson,
        LogFormat::Text("%PROTOCOL%".into()),
        LogFormat::Json(vec![("p".into(), "%PROTOCOL%".into())]),
    ];
    let mut providers = BTreeMap::new();
    for (at, format) in formats.into_iter().enumerate() {
        let path = "/dev/stdout".into();
        providers.insert(
            format!("file-{at}").into(),
            LogProvider::File { path, format },
        );
    }
    let otel = LogProvider::OpenTelemetry {
        service: service("o/otel.o.svc"),
        port: 4317,
        log_name: "mesh".into(),
        format: LogFormat::DefaultText,
    };
    providers.insert("otel".into(), otel);
    providers
}

fn trace_providers() -> BTreeMap<Str, TraceProvider> {
    let protocols = [
        TraceProtocol::OtlpGrpc,
        TraceProtocol::OtlpHttp("/v1/traces".into()),
        TraceProtocol::Zipkin {
            path: "/api/v2/spans".into(),
            with_w3c: true,
        },
    ];
    let provider = |protocol| TraceProvider {
        service: service("o/otel.o.svc"),
        port: 4317,
        protocol,
        max_tag_length: 256,
        timeout: Some(seconds(10)),
        headers: vec![(header("authorization"), "x".into())],
    };
    let names = 0..;
    names
        .zip(protocols)
        .map(|(at, it)| (format!("p{at}").into(), provider(it)))
        .collect()
}

#[test]
fn settings_round_trip() {
    for normalization in [
        Normalization::None,
        Normalization::Base,
        Normalization::MergeSlashes,
        Normalization::DecodeAndMergeSlashes,
    ] {
        round_trips(Resource::Config(WaypointConfig {
            trust_domain_aliases: vec!["old.example".parse().unwrap()],
            normalization,
            authorizers: authorizers(),
            log_providers: log_providers(),
            trace_providers: trace_providers(),
            access_logs: vec!["file-0".into()],
            tracing: vec!["p0".into()],
            sampling_per_million: 10_000,
            forward_client_identity: true,
            default_retry: Some(retry()),
            headers: ProxyHeaders {
                request_id_disabled: true,
                server: Some("leyline".into()),
                attempt_count: true,
                debug_headers: true,
                forwarded_host: true,
                forwarded_port: true,
            },
            histogram_buckets: vec![HistogramBuckets {
                prefix: "istio".into(),
                bounds: vec![0.5, 10.0],
            }],
        }));
    }
}

#[test]
fn what_is_served_round_trips() {
    let protocols = [
        AppProtocol::Unknown,
        AppProtocol::Http,
        AppProtocol::Http2,
        AppProtocol::Grpc,
        AppProtocol::GrpcWeb,
        AppProtocol::Tls,
        AppProtocol::Tcp,
    ];
    for resolution in [
        Resolution::Static,
        Resolution::None,
        Resolution::Dns,
        Resolution::DnsRoundRobin,
        Resolution::DynamicDns,
    ] {
        round_trips(Resource::Service(ServedService {
            service: service("a/web.a.svc"),
            bound: true,
            ports: (80..).zip(protocols).collect(),
            resolution,
            external: true,
        }));
    }
    let uid = WorkloadUid("c//Pod/a/web".into());
    round_trips(Resource::Workload(ServedWorkload { uid: uid.clone() }));
    round_trips(Resource::Labels(WorkloadLabels {
        uid,
        labels: BTreeMap::from([("app".into(), "web".into())]),
    }));
}

fn wire_route(change: impl FnOnce(&mut wire::HttpRule)) -> HttpRule {
    let resource = route(Rules::Http {
        order: Order::Precedence,
        rules: vec![full_rule(), HttpRule::new(vec![], Action::Forward(vec![]))],
    });
    let mut wire = wire::Resource::from(&resource);
    let Some(wire::resource::Kind::Route(it)) = &mut wire.kind else {
        panic!("a route");
    };
    let Some(wire::route::Rules::Http(it)) = &mut it.rules else {
        panic!("HTTP");
    };
    change(&mut it.rules[0]);
    let Ok(Resource::Route(route)) = Resource::try_from(wire) else {
        panic!("the route was rejected");
    };
    let Rules::Http { rules, .. } = route.rules else {
        panic!("HTTP");
    };
    assert_eq!(rules[1].action, Action::Forward(vec![]), "the other rule");
    rules.into_iter().next().unwrap()
}

#[test]
fn a_rule_that_is_not_understood_answers_500_and_keeps_its_conditions() {
    #[track_caller]
    fn check(change: impl FnOnce(&mut wire::HttpRule), fault: &str) {
        let rule = wire_route(change);
        let expected = Action::Invalid(fault.into());
        assert_eq!(rule.action, expected);
        assert_eq!(rule.matches.len(), full_rule().matches.len());
        assert_eq!(rule.matches[0].method, full_rule().matches[0].method);
        assert_eq!(rule.name, full_rule().name);
        assert_eq!(rule.mirrors, []);
    }
    check(|it| it.action = None, "action: missing");
    check(
        |it| it.matches[0].headers[1].value = None,
        "matches[0].headers.value: missing",
    );
    check(
        |it| it.matches[1].path = Some(wire::PathMatch { kind: None }),
        "matches[1].path.kind: missing",
    );
    check(
        |it| it.request_headers.as_mut().unwrap().set[0].name = "a b".into(),
        r#"request_headers.name: "a b" is not a header's name"#,
    );
}

#[test]
fn a_backend_that_is_not_understood_is_invalid_alone() {
    let rule = wire_route(|it| {
        if let Some(wire::http_rule::Action::Forward(it)) = &mut it.action {
            it.backends[0].rewrite = Some(wire::Rewrite {
                authority: None,
                path: Some(wire::PathRewrite { kind: None }),
            });
        }
    });
    let fault = "rewrite.path.kind: missing";
    let backend = WeightedBackend::new(7, Backend::Invalid(fault.into()));
    assert_eq!(rule.action, Action::Forward(vec![backend]));
}

fn wire_policy(
    action: PolicyAction,
    change: impl FnOnce(&mut wire::RequestPolicy),
) -> RequestPolicy {
    let mut wire = wire::RequestPolicy::from(&RequestPolicy {
        faults: vec![],
        ..policy(action)
    });
    change(&mut wire);
    RequestPolicy::try_from(&wire).unwrap()
}

#[test]
fn a_policy_that_is_not_understood_takes_the_closed_side() {
    let spoil = |it: &mut wire::RequestPolicy| it.rules[0].when[0].key = None;
    let fault: Str = "rules[0].when[0].key: missing".into();
    for (action, rules) in [
        (PolicyAction::Allow, vec![]),
        (PolicyAction::Audit, vec![]),
        (PolicyAction::Deny, vec![PolicyRule::default()]),
        (
            PolicyAction::Custom("x".into()),
            vec![PolicyRule::default()],
        ),
    ] {
        let policy = wire_policy(action.clone(), spoil);
        assert_eq!(policy.rules, rules, "{action:?}");
        assert_eq!(policy.faults, vec![fault.clone()]);
    }
    let unknown = wire_policy(PolicyAction::Allow, |it| it.action = None);
    assert_eq!(unknown.action, PolicyAction::Deny);
    assert_eq!(unknown.rules, [PolicyRule::default()]);
}

#[test]
fn an_issuer_whose_rule_is_not_understood_is_refused() {
    let wire = wire::JwtRule {
        issuer: "i".into(),
        ..wire::JwtRule::default()
    };
    let rule = JwtRule::try_from(&wire).unwrap();
    assert_eq!(rule.keys, Jwks::Unavailable("jwks: missing".into()));
}

#[test]
fn tls_that_is_not_understood_is_never_plain_text() {
    let wire = wire::TrafficPolicy {
        tls: Some(wire::BackendTls { kind: None }),
        ..wire::TrafficPolicy::default()
    };
    let policy = TrafficPolicy::try_from(&wire).unwrap();
    let expected = BackendTls::Invalid("tls.kind: missing".into());
    assert_eq!(policy.tls, Some(expected));
}

#[test]
fn a_resource_without_a_place_is_rejected_by_its_field() {
    #[track_caller]
    fn check(kind: Option<wire::resource::Kind>, expected: &str) {
        let error = Resource::try_from(wire::Resource { kind }).unwrap_err();
        assert_eq!(error.to_string(), expected);
    }
    use wire::resource::Kind;
    check(None, "kind: missing");
    check(
        Some(Kind::Workload(wire::Workload::default())),
        "workload.uid: missing",
    );
    check(
        Some(Kind::Route(wire::Route::default())),
        r#"route.key: "" is not of the form kind/namespace/name"#,
    );
    let policy = wire::RequestPolicy {
        key: "a/p".into(),
        ..wire::RequestPolicy::default()
    };
    check(Some(Kind::Policy(policy)), "policy.targets: missing");
    let config = wire::Config {
        normalization: 99,
        ..wire::Config::default()
    };
    check(
        Some(Kind::Config(config)),
        "config.normalization: unknown value 99",
    );
}

#[test]
fn a_private_key_is_not_in_the_text_of_a_message() {
    let wire = wire::ClientCertificate {
        chain: b"chain".to_vec(),
        key: b"secret".to_vec(),
        ..wire::ClientCertificate::default()
    };
    assert_eq!(format!("{wire:?}"), "ClientCertificate { .. }");
}
