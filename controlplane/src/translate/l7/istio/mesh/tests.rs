use serde_json::json;

use super::*;

fn read(config: &Value) -> (MeshSettings, Vec<String>) {
    let mut problems = Vec::new();
    let settings = MeshSettings::read(&Settings::default(), config, &mut problems);
    (settings, problems)
}

#[test]
fn services_of_providers_are_found_by_name_alone() {
    let table = [
        ("a/host.example", "a/host.example"),
        (
            "Authz.Sec.svc.cluster.local",
            "Sec/authz.sec.svc.cluster.local",
        ),
        ("otel.example.com", "istio-system/otel.example.com"),
    ];
    for (written, expected) in table {
        let provider = json!({"name": "p", "zipkin": {"service": written, "port": 9411}});
        let (settings, problems) = read(&json!({"extensionProviders": [provider]}));
        assert_eq!(problems, Vec::<String>::new());
        assert_eq!(settings.trace_providers["p"].service.to_string(), expected);
    }
}

#[test]
fn what_cannot_be_read_is_left_out_and_told() {
    let (settings, problems) = read(&json!({
        "pathNormalization": {"normalization": "SOME"},
        "trustDomainAliases": ["good.example", "Not_One"],
        "accessLogEncoding": "JSON",
        "accessLogFormat": "[",
        "defaultProviders": {"tracing": ["gone"]},
        "defaultHttpRetryPolicy": {"attempts": 3, "retryOn": "sometimes"},
        "extensionProviders": [
            {"name": "no-port", "envoyExtAuthzGrpc": {"service": "a.b.svc.cluster.local"}},
            {"name": "other", "datadog": {"service": "x", "port": 1}},
            {"zipkin": {}},
        ],
    }));
    assert_eq!(settings.normalization, Normalization::DecodeAndMergeSlashes);
    assert_eq!(settings.trust_domain_aliases.len(), 1);
    assert!(settings.authorizers.is_empty() && settings.trace_providers.is_empty());
    assert!(settings.tracing.is_empty());
    assert_eq!(
        problems,
        [
            "extensionProviders[0]: needs service, and port from 1 to 65535",
            "extensionProviders[1]: \"other\": waypoints have no provider of kind datadog",
            "extensionProviders[2]: has no name",
            "accessLogFormat: is no JSON object; the default one is used",
            "defaultProviders.tracing: there is no provider \"gone\"",
            "trustDomainAliases: \"Not_One\" is not a trust domain: lower-case letters, digits, '.', '-' and '_', 1 to 255 of them",
            "pathNormalization.normalization: \"SOME\" is unknown; the strictest is used",
            "defaultHttpRetryPolicy.retryOn: \"sometimes\" is no condition",
        ]
    );
}

#[test]
fn an_authorizer_has_a_short_timeout_and_refuses_by_default() {
    let (settings, _) = read(&json!({"extensionProviders": [
        {"name": "a", "envoyExtAuthzHttp": {"service": "authz.sec.svc.cluster.local", "port": 8000, "pathPrefix": "/check",
            "includeRequestHeadersInCheck": ["X-Ext"], "includeAdditionalHeadersInCheck": {"x-a": "b"},
            "headersToUpstreamOnAllow": ["x-user"], "includeRequestBodyInCheck": {"maxRequestBytes": 1000, "allowPartialMessage": true}}},
    ]}));
    let it = &settings.authorizers["a"];
    assert_eq!(
        (it.timeout, it.fail_open, it.status_on_error),
        (Duration::from_secs(2), false, 403)
    );
    assert_eq!(
        it.body,
        Some(AuthorizerBody {
            max_bytes: 1000,
            allow_partial: true,
            as_bytes: false
        })
    );
    let AuthorizerProtocol::Http {
        path_prefix,
        allowed_headers,
        add_headers,
        to_upstream,
        ..
    } = &it.protocol
    else {
        panic!("{it:?}");
    };
    assert_eq!(
        (&**path_prefix, &*allowed_headers[0], &*to_upstream[0]),
        ("/check", "x-ext", "x-user")
    );
    assert_eq!(add_headers.len(), 1);
}

#[test]
fn a_format_that_no_waypoint_can_write_is_told_and_the_default_is_written() {
    let custom = |format: &str| {
        let config = json!({"accessLogFile": "/dev/stdout", "accessLogFormat": format});
        let (settings, problems) = read(&config);
        let LogProvider::File { format, .. } = settings.log_providers[FILE_LOG].clone() else {
            panic!("a file");
        };
        (format, problems.join("\n"))
    };
    let written = |text: &str| LogFormat::Text(text.into());
    for (format, kept, problem) in [
        (
            "%METHOD_OF_MINE%",
            LogFormat::DefaultText,
            "\"METHOD_OF_MINE\" is not supported; the default format is used",
        ),
        ("%START_TIME", LogFormat::DefaultText, "a % without its end"),
        (
            "%METADATA(CLUSTER:x:y)%",
            written("%METADATA(CLUSTER:x:y)%"),
            "%METADATA(CLUSTER:x:y)% is always -",
        ),
        (
            "%METADATA(ROUTE:istio:config)%",
            written("%METADATA(ROUTE:istio:config)%"),
            "",
        ),
    ] {
        let (found, told) = custom(format);
        assert_eq!(found, kept, "{format}");
        assert!(
            told.contains(problem) && told.is_empty() == problem.is_empty(),
            "{told}"
        );
    }
    let labels = json!({"extensionProviders": [
        {"name": "a", "envoyOtelAls": {"service": "o.x.svc.cluster.local", "port": 4317, "logFormat": {"labels": {"k": "%NONE%"}}}},
    ]});
    let (settings, problems) = read(&labels);
    assert!(
        problems[0].contains("extensionProviders[0]"),
        "{problems:?}"
    );
    let LogProvider::OpenTelemetry { format, .. } = &settings.log_providers["a"] else {
        panic!("a collector");
    };
    assert_eq!(*format, LogFormat::DefaultJson);
}
