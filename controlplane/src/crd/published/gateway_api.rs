//! What values of `gateway.networking.k8s.io` may be: the kinds that a waypoint is asked for by. A cluster that has the
//! Gateway API's own definitions keeps them. Source: Gateway API v1.

use super::*;

pub(super) fn definitions() -> Vec<Definition> {
    vec![
        Definition {
            kind: "Gateway",
            plural: "gateways",
            short_names: &["gtw"],
            scope: "Namespaced",
            columns: &[
                ("Class", ".spec.gatewayClassName", "string"),
                ("Address", ".status.addresses[*].value", "string"),
                (
                    "Programmed",
                    ".status.conditions[?(@.type==\"Programmed\")].status",
                    "string",
                ),
            ],
            spec: shape::of::<GatewaySpec>(),
            status: Some(shape::of::<GatewayStatus>()),
            spec_rules: gateway(),
            status_rules: gateway_status(),
            ..common()
        },
        Definition {
            kind: "GatewayClass",
            plural: "gatewayclasses",
            short_names: &["gc"],
            scope: "Cluster",
            columns: &[
                ("Controller", ".spec.controllerName", "string"),
                (
                    "Accepted",
                    ".status.conditions[?(@.type==\"Accepted\")].status",
                    "string",
                ),
            ],
            spec: shape::of::<GatewayClassSpec>(),
            spec_rules: gateway_class(),
            status_rules: gateway_class_status(),
            ..common()
        },
    ]
}

pub(super) fn common() -> Definition {
    Definition {
        group: "gateway.networking.k8s.io",
        kind: "",
        plural: "",
        short_names: &[],
        categories: &["gateway-api"],
        scope: "",
        versions: &["v1", "v1beta1"],
        columns: &[],
        spec_required: true,
        spec: Shape::Any,
        status: None,
        spec_rules: Vec::new(),
        status_rules: Vec::new(),
        // The group is Kubernetes' own, where a definition must say who approved it.
        annotations: json!({"api-approved.kubernetes.io": "unapproved: the kinds that waypoints need, for clusters without the Gateway API"}),
    }
}

/// Names of DNS, such as `example.com`; with `wildcard`, also `*.example.com`.
pub(super) fn hostname(wildcard: bool) -> Value {
    let first = if wildcard { r"(\*\.)?" } else { "" };
    json!({
        "type": "string",
        "minLength": 1,
        "maxLength": 253,
        "pattern": format!(r"^{first}[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$"),
    })
}

pub(super) fn group() -> Value {
    json!({
        "type": "string",
        "maxLength": 253,
        "pattern": r"^$|^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$",
    })
}

pub(super) fn kind() -> Value {
    json!({"type": "string", "minLength": 1, "maxLength": 63, "pattern": "^[a-zA-Z]([-a-zA-Z0-9]*[a-zA-Z0-9])?$"})
}

pub(super) fn name(longest: u32) -> Value {
    json!({"type": "string", "minLength": 1, "maxLength": longest})
}

pub(super) fn namespace() -> Value {
    json!({"type": "string", "minLength": 1, "maxLength": 63, "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"})
}

/// A map of labels or annotations.
fn labels() -> Value {
    json!({
        "type": "object",
        "maxProperties": 8,
        "additionalProperties": {"type": "string", "maxLength": 4096},
    })
}

/// `Gateway.listeners[].tls`.
fn listener_tls() -> Value {
    json!({
        "type": "object",
        "properties": {
            "mode": {"type": "string", "enum": ["Terminate", "Passthrough"], "default": "Terminate"},
            "certificateRefs": {
                "type": "array",
                "maxItems": 64,
                "items": {
                    "type": "object",
                    "required": ["name"],
                    "properties": {
                        "group": defaulted(group(), ""),
                        "kind": defaulted(kind(), "Secret"),
                        "name": name(253),
                        "namespace": namespace(),
                    },
                },
            },
            "options": {
                "type": "object",
                "maxProperties": 16,
                "additionalProperties": {"type": "string", "maxLength": 4096},
            },
        },
    })
}

fn defaulted(mut schema: Value, value: &str) -> Value {
    schema["default"] = json!(value);
    schema
}

/// What later versions of the API say there is kept as it is.
fn open() -> Value {
    json!({"type": "object", "x-kubernetes-preserve-unknown-fields": true})
}

fn route_kinds() -> Value {
    json!({
        "type": "array",
        "maxItems": 8,
        "items": {
            "type": "object",
            "required": ["kind"],
            "properties": {
                "group": defaulted(group(), "gateway.networking.k8s.io"),
                "kind": kind(),
            },
        },
    })
}

fn addresses(value_required: bool) -> Value {
    let mut item = json!({
        "type": "object",
        "properties": {
            "type": {"type": "string", "minLength": 1, "maxLength": 253, "default": "IPAddress"},
            "value": {"type": "string", "maxLength": 253},
        },
    });
    if value_required {
        item["required"] = json!(["value"]);
    }
    json!({"type": "array", "maxItems": 16, "items": item})
}

fn gateway() -> Vec<(&'static str, Value)> {
    let mut rules = vec![
        (
            "",
            json!({
                "description": "A place where traffic comes in: here, a waypoint.",
                "required": ["gatewayClassName", "listeners"],
            }),
        ),
        ("gatewayClassName", name(253)),
        ("addresses", addresses(false)),
        (
            "infrastructure",
            json!({
                "type": "object",
                "description": "What is made for this Gateway.",
                "properties": {
                    "labels": labels(),
                    "annotations": labels(),
                    "parametersRef": {
                        "type": "object",
                        "required": ["group", "kind", "name"],
                        "properties": {"group": group(), "kind": kind(), "name": name(253)},
                    },
                },
            }),
        ),
        ("allowedListeners", open()),
        ("backendTLS", open()),
        ("tls", open()),
        (
            "defaultScope",
            json!({"type": "string", "enum": ["All", "None"]}),
        ),
    ];
    rules.extend(listeners());
    rules
}

fn listeners() -> Vec<(&'static str, Value)> {
    vec![
        (
            "listeners",
            json!({
                "minItems": 1,
                "maxItems": 64,
                "x-kubernetes-list-type": "map",
                "x-kubernetes-list-map-keys": ["name"],
                "x-kubernetes-validations": [
                    {
                        "rule": "self.all(l, l.protocol in ['HTTP', 'TCP', 'UDP'] ? !has(l.tls) : true)",
                        "message": "tls must not be specified for protocols ['HTTP', 'TCP', 'UDP']",
                    },
                    {
                        "rule": "self.all(l, l.protocol in ['TCP', 'UDP'] ? !has(l.hostname) || l.hostname == '' : true)",
                        "message": "hostname must not be specified for protocols ['TCP', 'UDP']",
                    },
                    {
                        "rule": "self.all(a, self.exists_one(b, a.port == b.port && a.protocol == b.protocol && (has(a.hostname) && has(b.hostname) ? a.hostname == b.hostname : !has(a.hostname) && !has(b.hostname))))",
                        "message": "Combination of port, protocol and hostname must be unique for each listener",
                    },
                ],
            }),
        ),
        (
            "listeners[]",
            json!({"required": ["name", "port", "protocol"]}),
        ),
        ("listeners[].name", hostname(false)),
        ("listeners[].hostname", hostname(true)),
        (
            "listeners[].port",
            json!({"format": "int32", "minimum": 1, "maximum": 65535}),
        ),
        (
            "listeners[].protocol",
            json!({
                "minLength": 1,
                "maxLength": 255,
                "pattern": r"^[a-zA-Z0-9]([-a-zA-Z0-9]*[a-zA-Z0-9])?$|[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*\/[A-Za-z0-9]+$",
                "description": "HBONE for a waypoint.",
            }),
        ),
        ("listeners[].tls", listener_tls()),
        (
            "listeners[].allowedRoutes",
            json!({"default": {"namespaces": {"from": "Same"}}}),
        ),
        ("listeners[].allowedRoutes.kinds", route_kinds()),
        (
            "listeners[].allowedRoutes.namespaces",
            json!({"default": {"from": "Same"}}),
        ),
        (
            "listeners[].allowedRoutes.namespaces.from",
            json!({"default": "Same"}),
        ),
        (
            "listeners[].allowedRoutes.namespaces.selector",
            json!({"x-kubernetes-map-type": "atomic"}),
        ),
        (
            "listeners[].allowedRoutes.namespaces.selector.matchExpressions[]",
            json!({"required": ["key", "operator"]}),
        ),
    ]
}

/// `metav1.Condition`, a map by type.
pub(super) fn conditions(default: &[(&str, &str)]) -> Value {
    let default: Vec<_> = default
        .iter()
        .map(|(kind, reason)| {
            json!({
                "type": kind,
                "status": "Unknown",
                "reason": reason,
                "message": "Waiting for controller",
                "lastTransitionTime": "1970-01-01T00:00:00Z",
            })
        })
        .collect();
    let mut schema = json!({
        "type": "array",
        "maxItems": 8,
        "x-kubernetes-list-type": "map",
        "x-kubernetes-list-map-keys": ["type"],
        "items": {
            "type": "object",
            "required": ["type", "status", "reason", "message", "lastTransitionTime"],
            "properties": {
                "type": {"type": "string", "maxLength": 316},
                "status": {"type": "string", "enum": ["True", "False", "Unknown"]},
                "reason": {"type": "string", "minLength": 1, "maxLength": 1024},
                "message": {"type": "string", "maxLength": 32768},
                "lastTransitionTime": {"type": "string", "format": "date-time"},
                "observedGeneration": {"type": "integer", "format": "int64", "minimum": 0},
            },
        },
    });
    if !default.is_empty() {
        schema["default"] = json!(default);
    }
    schema
}

fn gateway_status() -> Vec<(&'static str, Value)> {
    vec![
        (
            "",
            json!({"default": {"conditions": conditions(&[("Accepted", "Pending"), ("Programmed", "Pending")])["default"].clone()}}),
        ),
        ("addresses", addresses(true)),
        (
            "conditions",
            conditions(&[("Accepted", "Pending"), ("Programmed", "Pending")]),
        ),
        (
            "listeners",
            json!({
                "type": "array",
                "maxItems": 64,
                "x-kubernetes-list-type": "map",
                "x-kubernetes-list-map-keys": ["name"],
                "items": {
                    "type": "object",
                    "required": ["name", "attachedRoutes", "conditions"],
                    "properties": {
                        "name": hostname(false),
                        "attachedRoutes": {"type": "integer", "format": "int32"},
                        "supportedKinds": route_kinds(),
                        "conditions": conditions(&[]),
                    },
                },
            }),
        ),
    ]
}

fn gateway_class() -> Vec<(&'static str, Value)> {
    vec![
        (
            "",
            json!({"description": "Who serves the Gateways that name it.", "required": ["controllerName"]}),
        ),
        (
            "controllerName",
            json!({
                "minLength": 1,
                "maxLength": 253,
                "pattern": r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*\/[A-Za-z0-9\/\-._~%!$&'()*+,;=:]+$",
                "x-kubernetes-validations": [{"rule": "self == oldSelf", "message": "Value is immutable"}],
            }),
        ),
        ("description", json!({"type": "string", "maxLength": 64})),
        (
            "parametersRef",
            json!({
                "type": "object",
                "required": ["group", "kind", "name"],
                "properties": {"group": group(), "kind": kind(), "name": name(253), "namespace": namespace()},
            }),
        ),
    ]
}

fn gateway_class_status() -> Vec<(&'static str, Value)> {
    vec![
        ("conditions", conditions(&[("Accepted", "Waiting")])),
        (
            "supportedFeatures",
            json!({
                "type": "array",
                "maxItems": 64,
                "x-kubernetes-list-type": "map",
                "x-kubernetes-list-map-keys": ["name"],
                "items": {"type": "object", "required": ["name"], "properties": {"name": {"type": "string"}}},
            }),
        ),
    ]
}
