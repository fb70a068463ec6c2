//! What values of `security.istio.io` and `networking.istio.io` may be. Source: Istio's published definitions.

use super::*;

pub(super) fn definitions() -> Vec<Definition> {
    vec![
        security(Definition {
            kind: "AuthorizationPolicy",
            plural: "authorizationpolicies",
            short_names: &["ap"],
            columns: &[("Action", ".spec.action", "string")],
            spec: shape::of::<AuthorizationPolicySpec>(),
            spec_rules: authorization_policy(),
            ..common()
        }),
        security(Definition {
            kind: "PeerAuthentication",
            plural: "peerauthentications",
            short_names: &["pa"],
            columns: &[("Mode", ".spec.mtls.mode", "string")],
            spec: shape::of::<PeerAuthenticationSpec>(),
            spec_rules: peer_authentication(),
            ..common()
        }),
        networking(Definition {
            kind: "ServiceEntry",
            plural: "serviceentries",
            short_names: &["se"],
            columns: &[
                ("Hosts", ".spec.hosts", "string"),
                ("Location", ".spec.location", "string"),
                ("Resolution", ".spec.resolution", "string"),
            ],
            spec_required: true,
            spec: shape::of::<ServiceEntrySpec>(),
            status: Some(shape::of::<ServiceEntryStatus>()),
            spec_rules: service_entry(),
            status_rules: vec![("conditions", conditions())],
            ..common()
        }),
        networking(Definition {
            kind: "WorkloadEntry",
            plural: "workloadentries",
            short_names: &["we"],
            columns: &[("Address", ".spec.address", "string")],
            spec_required: true,
            spec: shape::of::<WorkloadEntrySpec>(),
            spec_rules: workload_entry(""),
            ..common()
        }),
        security(Definition {
            kind: "RequestAuthentication",
            plural: "requestauthentications",
            short_names: &["ra"],
            spec: shape::of::<RequestAuthenticationSpec>(),
            spec_rules: request_authentication(),
            ..common()
        }),
        networking(Definition {
            kind: "DestinationRule",
            plural: "destinationrules",
            short_names: &["dr"],
            columns: &[("Host", ".spec.host", "string")],
            spec: shape::of::<DestinationRuleSpec>(),
            spec_rules: destination_rule(),
            ..common()
        }),
        networking(Definition {
            kind: "VirtualService",
            plural: "virtualservices",
            short_names: &["vs"],
            columns: &[
                ("Gateways", ".spec.gateways", "string"),
                ("Hosts", ".spec.hosts", "string"),
            ],
            spec: shape::of::<VirtualServiceSpec>(),
            spec_rules: virtual_service(),
            ..common()
        }),
        Definition {
            group: "telemetry.istio.io",
            kind: "Telemetry",
            plural: "telemetries",
            short_names: &["telemetry"],
            categories: &["istio-io", "telemetry-istio-io"],
            versions: &["v1", "v1alpha1"],
            spec: shape::of::<TelemetrySpec>(),
            spec_rules: telemetry(),
            ..common()
        },
    ]
}

fn security(definition: Definition) -> Definition {
    Definition {
        group: "security.istio.io",
        categories: &["istio-io", "security-istio-io"],
        versions: &["v1", "v1beta1"],
        ..definition
    }
}

fn networking(definition: Definition) -> Definition {
    Definition {
        group: "networking.istio.io",
        categories: &["istio-io", "networking-istio-io"],
        versions: &["v1", "v1beta1", "v1alpha3"],
        ..definition
    }
}

fn common() -> Definition {
    Definition {
        group: "",
        kind: "",
        plural: "",
        short_names: &[],
        categories: &[],
        scope: "Namespaced",
        versions: &[],
        columns: &[],
        spec_required: false,
        spec: Shape::Any,
        status: None,
        spec_rules: Vec::new(),
        status_rules: vec![
            ("conditions", conditions()),
            (
                "observedGeneration",
                json!({"x-kubernetes-int-or-string": true}),
            ),
            ("validationMessages", validation_messages()),
        ],
        annotations: Value::Null,
    }
}

/// `istio.meta.v1alpha1` `IstioCondition`. Several writers share the list, each owning its types: a map, and not as
/// upstream's one value.
fn conditions() -> Value {
    json!({
        "type": "array",
        "x-kubernetes-list-type": "map",
        "x-kubernetes-list-map-keys": ["type"],
        "items": {
            "type": "object",
            "required": ["type"],
            "properties": {
                "type": {"type": "string"},
                "status": {"type": "string"},
                "reason": {"type": "string"},
                "message": {"type": "string"},
                "observedGeneration": {"x-kubernetes-int-or-string": true},
                "lastProbeTime": {"type": "string", "format": "date-time"},
                "lastTransitionTime": {"type": "string", "format": "date-time"},
            },
        },
    })
}

fn validation_messages() -> Value {
    json!({
        "type": "array",
        "items": {"type": "object", "x-kubernetes-preserve-unknown-fields": true},
    })
}

fn described(description: &str) -> Value {
    json!({ "description": description })
}

fn request_authentication() -> Vec<(&'static str, Value)> {
    let mut rules = vec![
        (
            "",
            described(
                "Which tokens are accepted. A request without a token passes, unauthenticated.",
            ),
        ),
        ("jwtRules", json!({"maxItems": 4096})),
    ];
    rules.extend(selector());
    rules.extend(target_refs());
    rules
}

fn telemetry() -> Vec<(&'static str, Value)> {
    let mut rules = vec![("", described("What waypoints tell of requests."))];
    rules.extend(selector());
    rules.extend(target_refs());
    rules
}

fn destination_rule() -> Vec<(&'static str, Value)> {
    vec![
        (
            "",
            json!({"description": "How a host's endpoints are chosen and connected to.", "required": ["host"]}),
        ),
        ("subsets[]", json!({"required": ["name"]})),
        (
            "trafficPolicy.loadBalancer.zoneAwareLbSetting",
            any_object(),
        ),
        (
            "trafficPolicy.portLevelSettings[].loadBalancer.zoneAwareLbSetting",
            any_object(),
        ),
        (
            "subsets[].trafficPolicy.loadBalancer.zoneAwareLbSetting",
            any_object(),
        ),
        (
            "subsets[].trafficPolicy.portLevelSettings[].loadBalancer.zoneAwareLbSetting",
            any_object(),
        ),
    ]
}

fn virtual_service() -> Vec<(&'static str, Value)> {
    vec![("", described("What becomes of requests to hosts."))]
}

fn any_object() -> Value {
    json!({"type": "object", "x-kubernetes-preserve-unknown-fields": true})
}

/// `selector` of a policy.
fn selector() -> [(&'static str, Value); 2] {
    [
        (
            "selector",
            described(
                "Labels of the workloads that this applies to, in this namespace; in the root namespace, in any.",
            ),
        ),
        (
            "selector.matchLabels",
            json!({
                "maxProperties": 4096,
                "additionalProperties": {
                    "type": "string",
                    "maxLength": 63,
                    "x-kubernetes-validations": [
                        {"rule": "!self.contains('*')", "message": "a label's value cannot hold a wildcard"},
                    ],
                },
                "x-kubernetes-validations": [
                    {"rule": "self.all(key, !key.contains('*'))", "message": "a label's key cannot hold a wildcard"},
                    {"rule": "self.all(key, key.size() != 0)", "message": "a label's key cannot be empty"},
                ],
            }),
        ),
    ]
}

/// `istio.type` `PolicyTargetReference` at both of its places.
fn target_refs() -> Vec<(&'static str, Value)> {
    let group = json!({"maxLength": 253, "pattern": r"^$|^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$"});
    let kind = json!({"minLength": 1, "maxLength": 63, "pattern": "^[a-zA-Z]([-a-zA-Z0-9]*[a-zA-Z0-9])?$"});
    let name = json!({"minLength": 1, "maxLength": 253});
    let namespace = json!({"x-kubernetes-validations": [
        {"rule": "self.size() == 0", "message": "a target is in the policy's own namespace"},
    ]});
    let required = json!({"required": ["kind", "name"]});
    vec![
        ("targetRef", required.clone()),
        ("targetRef.group", group.clone()),
        ("targetRef.kind", kind.clone()),
        ("targetRef.name", name.clone()),
        ("targetRef.namespace", namespace.clone()),
        (
            "targetRefs",
            json!({"maxItems": 16, "description": "Gateways, GatewayClasses, Services or ServiceEntries that this applies to, at their waypoint."}),
        ),
        ("targetRefs[]", required),
        ("targetRefs[].group", group),
        ("targetRefs[].kind", kind),
        ("targetRefs[].name", name),
        ("targetRefs[].namespace", namespace),
    ]
}

fn authorization_policy() -> Vec<(&'static str, Value)> {
    let list = || json!({"maxItems": 512});
    let mut rules = vec![
        (
            "",
            json!({
                "description": "Who may talk to the selected workloads. Where any ALLOW policy selects a workload, one of its rules must match.",
                "x-kubernetes-validations": [{
                    "rule": "[has(self.selector), has(self.targetRef), has(self.targetRefs)].filter(given, given).size() <= 1",
                    "message": "give one of selector, targetRef and targetRefs",
                }],
            }),
        ),
        (
            "action",
            described(
                "What a match means: ALLOW (default), DENY, AUDIT or CUSTOM. DENY is decided first.",
            ),
        ),
        (
            "rules",
            json!({"maxItems": 512, "description": "A request matches where it matches any. No rules: nothing matches; one empty rule: everything does."}),
        ),
        ("rules[].from", list()),
        ("rules[].to", list()),
        ("rules[].when", list()),
        (
            "rules[].from[].source",
            json!({
                "x-kubernetes-validations": [{
                    "rule": "has(self.serviceAccounts) || has(self.notServiceAccounts) ? !has(self.principals) && !has(self.notPrincipals) && !has(self.namespaces) && !has(self.notNamespaces) : true",
                    "message": "serviceAccounts stand alone: not beside principals or namespaces",
                }],
            }),
        ),
        ("rules[].when[]", json!({"required": ["key"]})),
        (
            "rules[].when[].key",
            described("The attribute, such as source.namespace or destination.port."),
        ),
        ("provider", described("For CUSTOM: who decides.")),
    ];
    for accounts in [
        "rules[].from[].source.serviceAccounts",
        "rules[].from[].source.notServiceAccounts",
    ] {
        rules.push((
            accounts,
            json!({"maxItems": 16, "items": {"type": "string", "maxLength": 320}, "description": "ACCOUNT, in the policy's namespace, or NAMESPACE/ACCOUNT."}),
        ));
    }
    rules.extend(selector());
    rules.extend(target_refs());
    rules
}

fn peer_authentication() -> Vec<(&'static str, Value)> {
    let mut rules = vec![
        (
            "",
            json!({
                "description": "Whether the selected workloads take plaintext.",
                "x-kubernetes-validations": [{
                    "rule": "has(self.portLevelMtls) ? has(self.selector) && has(self.selector.matchLabels) && self.selector.matchLabels.size() > 0 : true",
                    "message": "portLevelMtls needs a selector",
                }],
            }),
        ),
        (
            "mtls.mode",
            described(
                "STRICT: mutual TLS only. PERMISSIVE and DISABLE: plaintext too. UNSET: as the namespace or the mesh.",
            ),
        ),
        (
            "portLevelMtls",
            json!({
                "minProperties": 1,
                "description": "Exceptions, by the workload's port.",
                "x-kubernetes-validations": [{
                    "rule": "self.all(port, 0 < int(port) && int(port) <= 65535)",
                    "message": "a port is 1 to 65535",
                }],
            }),
        ),
    ];
    rules.extend(selector());
    rules
}

fn service_entry() -> Vec<(&'static str, Value)> {
    let mut rules = vec![
        (
            "",
            json!({
                "description": "A service that no Kubernetes Service describes.",
                "required": ["hosts"],
                "x-kubernetes-validations": [
                    {
                        "rule": "!(has(self.workloadSelector) && has(self.endpoints))",
                        "message": "give one of workloadSelector and endpoints",
                    },
                    {
                        "rule": "!(has(self.addresses) && self.addresses.exists(a, a.contains('/')) && has(self.resolution) && !(self.resolution in ['NONE', 'STATIC']))",
                        "message": "an address range needs the resolution NONE or STATIC",
                    },
                    {
                        "rule": "has(self.resolution) && self.resolution != 'NONE' || !has(self.endpoints)",
                        "message": "the resolution NONE takes no endpoints",
                    },
                    {
                        "rule": "!(has(self.resolution) && self.resolution == 'DNS_ROUND_ROBIN' && has(self.endpoints)) || self.endpoints.size() <= 1",
                        "message": "the resolution DNS_ROUND_ROBIN takes one endpoint",
                    },
                ],
            }),
        ),
        (
            "hosts",
            json!({
                "minItems": 1,
                "maxItems": 256,
                "items": {
                    "type": "string",
                    "maxLength": 253,
                    "x-kubernetes-validations": [{"rule": "self != '*'", "message": "a host cannot be any host"}],
                },
                "description": "DNS names.",
            }),
        ),
        (
            "addresses",
            json!({"maxItems": 256, "items": {"type": "string", "maxLength": 64}, "description": "Virtual addresses; where there are none, one is allocated."}),
        ),
        (
            "ports",
            json!({
                "maxItems": 256,
                "x-kubernetes-list-type": "map",
                "x-kubernetes-list-map-keys": ["name"],
                "x-kubernetes-validations": [{
                    "rule": "self.all(a, self.exists_one(b, a.number == b.number))",
                    "message": "each port's number is its own",
                }],
            }),
        ),
        ("ports[]", json!({"required": ["number", "name"]})),
        ("ports[].number", port()),
        ("ports[].targetPort", port()),
        ("ports[].name", json!({"maxLength": 256, "minLength": 1})),
        ("ports[].protocol", json!({"maxLength": 256})),
        (
            "location",
            described("MESH_EXTERNAL (default) or MESH_INTERNAL."),
        ),
        ("resolution", described("How endpoints are found.")),
        ("endpoints", json!({"maxItems": 4096})),
        (
            "exportTo",
            described("Namespaces that see it; `.` is its own, `*` all."),
        ),
        (
            "workloadSelector.labels",
            json!({"maxProperties": 256, "additionalProperties": {"type": "string", "maxLength": 63}}),
        ),
    ];
    rules.extend(workload_entry("endpoints[]"));
    rules
}

fn port() -> Value {
    json!({
        "minimum": 0,
        "maximum": 4_294_967_295_u32,
        "x-kubernetes-validations": [{"rule": "0 < self && self <= 65535", "message": "a port is 1 to 65535"}],
    })
}

/// An endpoint, here (`""`) or as one of a ServiceEntry.
fn workload_entry(place: &'static str) -> Vec<(&'static str, Value)> {
    let names: [&'static str; 6] = match place {
        "" => ["", "address", "ports", "labels", "weight", "locality"],
        _ => [
            "endpoints[]",
            "endpoints[].address",
            "endpoints[].ports",
            "endpoints[].labels",
            "endpoints[].weight",
            "endpoints[].locality",
        ],
    };
    let rules = json!({
        "x-kubernetes-validations": [
            {"rule": "has(self.address) || has(self.network)", "message": "give an address, or a network"},
            {
                "rule": "has(self.address) && self.address.startsWith('unix://') ? !has(self.ports) : true",
                "message": "the path of a socket takes no ports",
            },
        ],
    });
    let values = [
        rules,
        json!({"maxLength": 256, "description": "An IP address, a DNS name or unix:///PATH."}),
        json!({
            "maxProperties": 128,
            "description": "The port behind each of the service's, by its name.",
            "additionalProperties": {"type": "integer", "minimum": 0, "maximum": 4_294_967_295_u32},
            "x-kubernetes-validations": [{
                "rule": "self.all(name, size(name) < 63 && 0 < self[name] && self[name] <= 65535)",
                "message": "a port has a name shorter than 63 letters and is 1 to 65535",
            }],
        }),
        json!({"maxProperties": 256}),
        json!({"minimum": 0, "maximum": 4_294_967_295_u32}),
        json!({"maxLength": 2048, "description": "REGION/ZONE/SUBZONE."}),
    ];
    names.into_iter().zip(values).collect()
}
