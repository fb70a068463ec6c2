//! What values of the Gateway API's routes and policies may be. Source: Gateway API v1.6, experimental channel.

use super::{
    gateway_api::{common, conditions, group, hostname, kind, name, namespace},
    *,
};
use crate::crd::gateway_api as types;

fn definition(kind: &'static str, plural: &'static str) -> Definition {
    Definition {
        kind,
        plural,
        scope: "Namespaced",
        ..common()
    }
}

pub(super) fn definitions() -> Vec<Definition> {
    vec![
        Definition {
            versions: &["v1", "v1beta1"],
            columns: &[("Hostnames", ".spec.hostnames", "string")],
            spec: shape::of::<types::HttpRouteSpec>(),
            status: Some(shape::of::<types::RouteStatus>()),
            spec_rules: http(),
            status_rules: parents(),
            ..definition("HTTPRoute", "httproutes")
        },
        Definition {
            versions: &["v1"],
            columns: &[("Hostnames", ".spec.hostnames", "string")],
            spec: shape::of::<types::GrpcRouteSpec>(),
            status: Some(shape::of::<types::RouteStatus>()),
            spec_rules: grpc(),
            status_rules: parents(),
            ..definition("GRPCRoute", "grpcroutes")
        },
        Definition {
            versions: &["v1"],
            spec: shape::of::<types::TlsRouteSpec>(),
            status: Some(shape::of::<types::RouteStatus>()),
            spec_rules: tls(),
            status_rules: parents(),
            ..definition("TLSRoute", "tlsroutes")
        },
        Definition {
            versions: &["v1"],
            spec: shape::of::<types::TcpRouteSpec>(),
            status: Some(shape::of::<types::RouteStatus>()),
            spec_rules: tcp(),
            status_rules: parents(),
            ..definition("TCPRoute", "tcproutes")
        },
        Definition {
            versions: &["v1", "v1beta1"],
            short_names: &["refgrant"],
            spec: shape::of::<types::ReferenceGrantSpec>(),
            spec_rules: grant(),
            ..definition("ReferenceGrant", "referencegrants")
        },
        Definition {
            versions: &["v1"],
            short_names: &["btlspolicy"],
            spec: shape::of::<types::BackendTlsPolicySpec>(),
            status: Some(shape::of::<types::PolicyStatus>()),
            spec_rules: backend_tls(),
            status_rules: ancestors(),
            ..definition("BackendTLSPolicy", "backendtlspolicies")
        },
        Definition {
            group: "gateway.networking.x-k8s.io",
            versions: &["v1alpha1"],
            short_names: &["xbtrafficpolicy"],
            spec: shape::of::<types::BackendTrafficPolicySpec>(),
            status: Some(shape::of::<types::PolicyStatus>()),
            spec_rules: backend_traffic(),
            status_rules: ancestors(),
            ..definition("XBackendTrafficPolicy", "xbackendtrafficpolicies")
        },
    ]
}

fn port() -> Value {
    json!({"format": "int32", "minimum": 1, "maximum": 65535})
}

fn defaulted(mut schema: Value, value: impl Into<Value>) -> Value {
    schema["default"] = value.into();
    schema
}

fn most(items: u32) -> Value {
    json!({"maxItems": items})
}

fn words(words: &[&str]) -> Value {
    json!({"enum": words})
}

fn duration() -> Value {
    json!({"pattern": "^([0-9]{1,5}(h|m|s|ms)){1,4}$"})
}

type Rules = Vec<(&'static str, Value)>;

fn common_route() -> Rules {
    vec![
        ("parentRefs", most(32)),
        ("parentRefs[]", json!({"required": ["name"]})),
        (
            "parentRefs[].group",
            defaulted(group(), "gateway.networking.k8s.io"),
        ),
        ("parentRefs[].kind", defaulted(kind(), "Gateway")),
        ("parentRefs[].namespace", namespace()),
        ("parentRefs[].name", name(253)),
        ("parentRefs[].sectionName", hostname(false)),
        ("parentRefs[].port", port()),
        ("useDefaultGateways", words(&["All", "None"])),
        ("rules[].name", hostname(false)),
        ("rules[].backendRefs", most(16)),
        ("rules[].backendRefs[]", json!({"required": ["name"]})),
        ("rules[].backendRefs[].group", defaulted(group(), "")),
        ("rules[].backendRefs[].kind", defaulted(kind(), "Service")),
        ("rules[].backendRefs[].name", name(253)),
        ("rules[].backendRefs[].namespace", namespace()),
        ("rules[].backendRefs[].port", port()),
        (
            "rules[].backendRefs[].weight",
            json!({"format": "int32", "minimum": 0, "maximum": 1_000_000, "default": 1}),
        ),
    ]
}

macro_rules! prefixed {
    ($rules:ident, $prefix:literal, $($path:literal => $rule:expr),+ $(,)?) => {
        $($rules.push((concat!($prefix, $path), $rule));)+
    };
}

macro_rules! session {
    ($rules:ident, $prefix:literal) => {
        prefixed! { $rules, $prefix,
            ".type" => defaulted(words(&["Cookie", "Header"]), "Cookie"),
            ".absoluteTimeout" => duration(),
            ".idleTimeout" => duration(),
            ".sessionName" => json!({"maxLength": 128}),
            ".cookie.lifetimeType" => defaulted(words(&["Permanent", "Session"]), "Session"),
            ".cookieConfig.lifetimeType" => words(&["Permanent", "Session"]),
        }
    };
}

macro_rules! mirror_and_headers {
    ($rules:ident, $prefix:literal) => {
        prefixed! { $rules, $prefix,
            "" => most(16),
            "[]" => json!({"required": ["type"]}),
            "[].requestMirror" => json!({"required": ["backendRef"]}),
            "[].requestMirror.backendRef" => json!({"required": ["name"]}),
            "[].requestMirror.backendRef.group" => defaulted(group(), ""),
            "[].requestMirror.backendRef.kind" => defaulted(kind(), "Service"),
            "[].requestMirror.backendRef.port" => port(),
            "[].requestMirror.percent" => json!({"format": "int32", "minimum": 0, "maximum": 100}),
            "[].requestMirror.fraction" => json!({"required": ["numerator"]}),
            "[].requestMirror.fraction.numerator" => json!({"format": "int32", "minimum": 0}),
            "[].requestMirror.fraction.denominator" => json!({"format": "int32", "minimum": 1, "default": 100}),
            "[].requestHeaderModifier.set" => most(16),
            "[].requestHeaderModifier.set[]" => json!({"required": ["name", "value"]}),
            "[].requestHeaderModifier.add" => most(16),
            "[].requestHeaderModifier.add[]" => json!({"required": ["name", "value"]}),
            "[].requestHeaderModifier.remove" => most(16),
            "[].responseHeaderModifier.set" => most(16),
            "[].responseHeaderModifier.set[]" => json!({"required": ["name", "value"]}),
            "[].responseHeaderModifier.add" => most(16),
            "[].responseHeaderModifier.add[]" => json!({"required": ["name", "value"]}),
            "[].responseHeaderModifier.remove" => most(16),
            "[].extensionRef" => json!({"required": ["group", "kind", "name"]}),
        }
    };
}

macro_rules! http_filters {
    ($rules:ident, $prefix:literal) => {
        mirror_and_headers!($rules, $prefix);
        prefixed! { $rules, $prefix,
            "[].type" => words(&["RequestHeaderModifier", "ResponseHeaderModifier", "RequestMirror", "RequestRedirect", "URLRewrite", "ExtensionRef", "CORS", "ExternalAuth"]),
            "[].requestRedirect.scheme" => words(&["http", "https"]),
            "[].requestRedirect.hostname" => hostname(false),
            "[].requestRedirect.port" => port(),
            "[].requestRedirect.statusCode" => json!({"enum": [301, 302, 303, 307, 308], "default": 302}),
            "[].requestRedirect.path" => json!({"required": ["type"]}),
            "[].requestRedirect.path.type" => words(&["ReplaceFullPath", "ReplacePrefixMatch"]),
            "[].requestRedirect.path.replaceFullPath" => json!({"maxLength": 1024}),
            "[].requestRedirect.path.replacePrefixMatch" => json!({"maxLength": 1024}),
            "[].urlRewrite.hostname" => hostname(false),
            "[].urlRewrite.path" => json!({"required": ["type"]}),
            "[].urlRewrite.path.type" => words(&["ReplaceFullPath", "ReplacePrefixMatch"]),
            "[].urlRewrite.path.replaceFullPath" => json!({"maxLength": 1024}),
            "[].urlRewrite.path.replacePrefixMatch" => json!({"maxLength": 1024}),
            "[].cors.allowOrigins" => most(64),
            "[].cors.allowMethods" => most(9),
            "[].cors.allowHeaders" => most(64),
            "[].cors.exposeHeaders" => most(64),
            "[].cors.maxAge" => json!({"format": "int32", "minimum": 1, "default": 5}),
            "[].externalAuth" => json!({"required": ["protocol", "backendRef"]}),
            "[].externalAuth.protocol" => words(&["GRPC", "HTTP"]),
            "[].externalAuth.backendRef" => json!({"required": ["name"]}),
            "[].externalAuth.backendRef.group" => defaulted(group(), ""),
            "[].externalAuth.backendRef.kind" => defaulted(kind(), "Service"),
            "[].externalAuth.backendRef.port" => port(),
            "[].externalAuth.forwardBody.maxSize" => json!({"minimum": 0, "maximum": 65535}),
        }
    };
}

fn http() -> Rules {
    let mut rules = common_route();
    rules.extend([
        (
            "",
            json!({"description": "What becomes of HTTP requests to services."}),
        ),
        ("hostnames", most(16)),
        ("hostnames[]", hostname(true)),
        (
            "rules",
            json!({
                "minItems": 1,
                "maxItems": 16,
                "default": [{"matches": [{"path": {"type": "PathPrefix", "value": "/"}}]}],
            }),
        ),
        (
            "rules[].matches",
            json!({"maxItems": 64, "default": [{"path": {"type": "PathPrefix", "value": "/"}}]}),
        ),
        (
            "rules[].matches[].path",
            json!({"default": {"type": "PathPrefix", "value": "/"}}),
        ),
        (
            "rules[].matches[].path.type",
            defaulted(
                words(&["Exact", "PathPrefix", "RegularExpression"]),
                "PathPrefix",
            ),
        ),
        (
            "rules[].matches[].path.value",
            json!({"maxLength": 1024, "default": "/"}),
        ),
        ("rules[].matches[].headers", most(16)),
        (
            "rules[].matches[].headers[]",
            json!({"required": ["name", "value"]}),
        ),
        (
            "rules[].matches[].headers[].type",
            defaulted(words(&["Exact", "RegularExpression"]), "Exact"),
        ),
        ("rules[].matches[].queryParams", most(16)),
        (
            "rules[].matches[].queryParams[]",
            json!({"required": ["name", "value"]}),
        ),
        (
            "rules[].matches[].queryParams[].type",
            defaulted(words(&["Exact", "RegularExpression"]), "Exact"),
        ),
        (
            "rules[].matches[].method",
            words(&[
                "GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH",
            ]),
        ),
        ("rules[].timeouts.request", duration()),
        ("rules[].timeouts.backendRequest", duration()),
        (
            "rules[].retry.codes[]",
            json!({"minimum": 400, "maximum": 599}),
        ),
        ("rules[].retry.backoff", duration()),
    ]);
    http_filters!(rules, "rules[].filters");
    http_filters!(rules, "rules[].backendRefs[].filters");
    session!(rules, "rules[].sessionPersistence");
    rules
}

fn grpc() -> Rules {
    let mut rules = common_route();
    let filters = [
        "RequestHeaderModifier",
        "ResponseHeaderModifier",
        "RequestMirror",
        "ExtensionRef",
    ];
    rules.extend([
        (
            "",
            json!({"description": "What becomes of gRPC requests to services."}),
        ),
        ("hostnames", most(16)),
        ("hostnames[]", hostname(true)),
        ("rules", most(16)),
        ("rules[].matches", most(64)),
        (
            "rules[].matches[].method.type",
            defaulted(words(&["Exact", "RegularExpression"]), "Exact"),
        ),
        (
            "rules[].matches[].method.service",
            json!({"maxLength": 1024}),
        ),
        (
            "rules[].matches[].method.method",
            json!({"maxLength": 1024}),
        ),
        ("rules[].matches[].headers", most(16)),
        (
            "rules[].matches[].headers[]",
            json!({"required": ["name", "value"]}),
        ),
        (
            "rules[].matches[].headers[].type",
            defaulted(words(&["Exact", "RegularExpression"]), "Exact"),
        ),
        ("rules[].filters[].type", words(&filters)),
        ("rules[].backendRefs[].filters[].type", words(&filters)),
    ]);
    mirror_and_headers!(rules, "rules[].filters");
    mirror_and_headers!(rules, "rules[].backendRefs[].filters");
    session!(rules, "rules[].sessionPersistence");
    rules
}

fn tls() -> Rules {
    let mut rules = common_route();
    rules.extend([
        (
            "",
            json!({"description": "What becomes of TLS connections to services, by SNI.", "required": ["hostnames", "rules"]}),
        ),
        ("hostnames", json!({"minItems": 1, "maxItems": 16})),
        ("hostnames[]", hostname(true)),
        ("rules", json!({"minItems": 1, "maxItems": 16})),
    ]);
    rules
}

fn tcp() -> Rules {
    let mut rules = common_route();
    rules.extend([
        (
            "",
            json!({"description": "What becomes of TCP connections to services.", "required": ["rules"]}),
        ),
        ("rules", json!({"minItems": 1, "maxItems": 16})),
    ]);
    rules
}

fn grant() -> Rules {
    vec![
        (
            "",
            json!({"description": "Who of other namespaces may refer to objects of this one.", "required": ["from", "to"]}),
        ),
        ("from", json!({"minItems": 1, "maxItems": 16})),
        (
            "from[]",
            json!({"required": ["group", "kind", "namespace"]}),
        ),
        ("to", json!({"minItems": 1, "maxItems": 16})),
        ("to[]", json!({"required": ["group", "kind"]})),
    ]
}

fn targets() -> Rules {
    vec![
        ("targetRefs", json!({"minItems": 1, "maxItems": 16})),
        (
            "targetRefs[]",
            json!({"required": ["group", "kind", "name"]}),
        ),
    ]
}

fn backend_tls() -> Rules {
    let mut rules = targets();
    rules.extend([
        (
            "",
            json!({"description": "TLS from waypoints to the endpoints of services.", "required": ["targetRefs", "validation"]}),
        ),
        ("validation", json!({"required": ["hostname"]})),
        ("validation.hostname", hostname(false)),
        ("validation.caCertificateRefs", most(8)),
        ("validation.caCertificateRefs[]", json!({"required": ["group", "kind", "name"]})),
        ("validation.wellKnownCACertificates", json!({"maxLength": 253})),
        ("validation.subjectAltNames", most(5)),
        ("validation.subjectAltNames[]", json!({"required": ["type"]})),
        ("validation.subjectAltNames[].type", words(&["Hostname", "URI"])),
        (
            "options",
            json!({"type": "object", "maxProperties": 16, "additionalProperties": {"type": "string", "maxLength": 4096}}),
        ),
    ]);
    rules
}

fn backend_traffic() -> Rules {
    let mut rules = targets();
    rules.extend([
        (
            "",
            json!({"description": "Retries and sessions of services.", "required": ["targetRefs"]}),
        ),
        (
            "retryConstraint.budget.percent",
            json!({"minimum": 0, "maximum": 100, "default": 20}),
        ),
        (
            "retryConstraint.budget.interval",
            defaulted(duration(), "10s"),
        ),
        (
            "retryConstraint.minRetryRate.count",
            json!({"minimum": 1, "maximum": 1_000_000, "default": 10}),
        ),
        (
            "retryConstraint.minRetryRate.interval",
            defaulted(duration(), "1s"),
        ),
    ]);
    session!(rules, "sessionPersistence");
    rules
}

/// A list with entries of several controllers, as a whole: the API server merges none of it.
fn entries(reference: &'static str, most: u32) -> Value {
    let mut properties = json!({
        "controllerName": {"type": "string", "minLength": 1, "maxLength": 253},
        "conditions": conditions(&[]),
    });
    properties[reference] = json!({
        "type": "object",
        "required": ["name"],
        "properties": {
            "group": group(),
            "kind": kind(),
            "namespace": namespace(),
            "name": name(253),
            "sectionName": hostname(false),
            "port": {"type": "integer", "format": "int32", "minimum": 1, "maximum": 65535},
        },
    });
    json!({
        "type": "array",
        "maxItems": most,
        "x-kubernetes-list-type": "atomic",
        "items": {
            "type": "object",
            "required": [reference, "controllerName"],
            "properties": properties,
        },
    })
}

fn parents() -> Rules {
    vec![
        ("", json!({"required": ["parents"]})),
        ("parents", entries("parentRef", 32)),
    ]
}

fn ancestors() -> Rules {
    vec![
        ("", json!({"required": ["ancestors"]})),
        ("ancestors", entries("ancestorRef", 16)),
    ]
}
