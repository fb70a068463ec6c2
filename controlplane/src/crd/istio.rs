//! The Istio API at L7, as users write it. Every field of the published schemas is here.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{Custom, MatchLabels, TargetRef};

macro_rules! messages {
    ($($(#[$meta:meta])* $name:ident { $($(#[$field:meta])* $member:ident: $type:ty),* $(,)? })*) => {$(
        $(#[$meta])*
        #[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
        #[serde(rename_all = "camelCase", default)]
        #[allow(missing_docs, reason = "the schema's own names")]
        pub struct $name {
            $($(#[$field])* pub $member: $type,)*
        }
    )*};
}

macro_rules! words {
    ($($(#[$meta:meta])* $name:ident { $first:ident $(, $more:ident)* $(,)? })*) => {$(
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
        #[serde(rename_all = "SCREAMING_SNAKE_CASE")]
        #[allow(missing_docs, reason = "the schema's own names")]
        pub enum $name { #[default] $first, $($more,)* }
    )*};
}

/// `networking.istio.io` `VirtualService`.
pub type VirtualService = Custom<VirtualServiceSpec, Value>;
/// `networking.istio.io` `DestinationRule`.
pub type DestinationRule = Custom<DestinationRuleSpec, Value>;
/// `security.istio.io` `RequestAuthentication`.
pub type RequestAuthentication = Custom<RequestAuthenticationSpec, Value>;
/// `telemetry.istio.io` `Telemetry`.
pub type Telemetry = Custom<TelemetrySpec, Value>;

messages! {
    /// `VirtualService`.
    VirtualServiceSpec {
        hosts: Vec<String>,
        gateways: Vec<String>,
        http: Vec<HttpRoute>,
        tls: Vec<TlsRoute>,
        tcp: Vec<TcpRoute>,
        export_to: Vec<String>,
    }
    /// `http[]`.
    HttpRoute {
        name: String,
        #[serde(rename = "match")]
        matches: Vec<HttpMatchRequest>,
        route: Vec<HttpRouteDestination>,
        redirect: Option<HttpRedirect>,
        direct_response: Option<HttpDirectResponse>,
        delegate: Option<Delegate>,
        rewrite: Option<HttpRewrite>,
        timeout: Option<String>,
        retries: Option<HttpRetry>,
        fault: Option<HttpFaultInjection>,
        mirror: Option<Destination>,
        mirrors: Vec<HttpMirrorPolicy>,
        mirror_percent: Option<u32>,
        mirror_percentage: Option<Percent>,
        cors_policy: Option<CorsPolicy>,
        headers: Option<Headers>,
    }
    /// `http[].match[]`.
    HttpMatchRequest {
        name: String,
        uri: Option<StringMatch>,
        scheme: Option<StringMatch>,
        method: Option<StringMatch>,
        authority: Option<StringMatch>,
        headers: BTreeMap<String, StringMatch>,
        port: Option<u32>,
        source_labels: BTreeMap<String, String>,
        gateways: Vec<String>,
        query_params: BTreeMap<String, StringMatch>,
        ignore_uri_case: bool,
        without_headers: BTreeMap<String, StringMatch>,
        source_namespace: String,
        stat_prefix: String,
    }
    /// One of three; none: presence.
    StringMatch {
        exact: Option<String>,
        prefix: Option<String>,
        regex: Option<String>,
    }
    /// `http[].route[]`.
    HttpRouteDestination {
        destination: Option<Destination>,
        weight: Option<i32>,
        headers: Option<Headers>,
    }
    /// Where to.
    Destination {
        host: String,
        subset: String,
        port: Option<PortSelector>,
    }
    /// A port.
    PortSelector {
        number: u32,
    }
    /// `headers`.
    Headers {
        request: Option<HeaderOperations>,
        response: Option<HeaderOperations>,
    }
    /// Changes of headers.
    HeaderOperations {
        set: BTreeMap<String, String>,
        add: BTreeMap<String, String>,
        remove: Vec<String>,
    }
    /// `http[].redirect`.
    HttpRedirect {
        uri: String,
        prefix_rewrite: String,
        authority: String,
        port: Option<u32>,
        derive_port: Option<RedirectPortSelection>,
        scheme: String,
        redirect_code: Option<u32>,
    }
    /// `http[].directResponse`.
    HttpDirectResponse {
        status: u32,
        body: Option<HttpBody>,
    }
    /// A body: text, or bytes in base64.
    HttpBody {
        string: Option<String>,
        bytes: Option<String>,
    }
    /// `http[].delegate`.
    Delegate {
        name: String,
        namespace: String,
    }
    /// `http[].rewrite`.
    HttpRewrite {
        uri: String,
        authority: String,
        uri_regex_rewrite: Option<RegexRewrite>,
    }
    /// RE2 and its replacement.
    RegexRewrite {
        #[serde(rename = "match")]
        pattern: String,
        rewrite: String,
    }
    /// `http[].retries`.
    HttpRetry {
        attempts: i32,
        per_try_timeout: Option<String>,
        retry_on: String,
        retry_remote_localities: Option<bool>,
        retry_ignore_previous_hosts: Option<bool>,
        backoff: Option<String>,
    }
    /// `http[].fault`.
    HttpFaultInjection {
        delay: Option<FaultDelay>,
        abort: Option<FaultAbort>,
    }
    /// `fault.delay`.
    FaultDelay {
        percent: Option<i32>,
        percentage: Option<Percent>,
        fixed_delay: Option<String>,
        exponential_delay: Option<String>,
    }
    /// `fault.abort`.
    FaultAbort {
        http_status: Option<i32>,
        grpc_status: Option<String>,
        http2_error: Option<String>,
        percentage: Option<Percent>,
    }
    /// A share.
    Percent {
        value: f64,
    }
    /// `http[].mirrors[]`.
    HttpMirrorPolicy {
        destination: Option<Destination>,
        percentage: Option<Percent>,
    }
    /// `http[].corsPolicy`.
    CorsPolicy {
        allow_origin: Vec<String>,
        allow_origins: Vec<StringMatch>,
        allow_methods: Vec<String>,
        allow_headers: Vec<String>,
        expose_headers: Vec<String>,
        max_age: Option<String>,
        allow_credentials: Option<bool>,
        unmatched_preflights: UnmatchedPreflights,
    }
    /// `tls[]`.
    TlsRoute {
        #[serde(rename = "match")]
        matches: Vec<TlsMatchAttributes>,
        route: Vec<RouteDestination>,
    }
    /// `tls[].match[]`.
    TlsMatchAttributes {
        sni_hosts: Vec<String>,
        destination_subnets: Vec<String>,
        port: Option<u32>,
        source_labels: BTreeMap<String, String>,
        gateways: Vec<String>,
        source_namespace: String,
    }
    /// `tcp[]`.
    TcpRoute {
        #[serde(rename = "match")]
        matches: Vec<L4MatchAttributes>,
        route: Vec<RouteDestination>,
    }
    /// `tcp[].match[]`.
    L4MatchAttributes {
        destination_subnets: Vec<String>,
        port: Option<u32>,
        source_subnet: String,
        source_labels: BTreeMap<String, String>,
        gateways: Vec<String>,
        source_namespace: String,
    }
    /// `tls[].route[]`, `tcp[].route[]`.
    RouteDestination {
        destination: Option<Destination>,
        weight: Option<i32>,
    }
    /// `DestinationRule`.
    DestinationRuleSpec {
        host: String,
        traffic_policy: Option<Box<TrafficPolicy>>,
        subsets: Vec<Subset>,
        export_to: Vec<String>,
        workload_selector: Option<MatchLabels>,
    }
    /// `subsets[]`.
    Subset {
        name: String,
        labels: BTreeMap<String, String>,
        traffic_policy: Option<TrafficPolicy>,
    }
    /// `trafficPolicy`.
    TrafficPolicy {
        load_balancer: Option<LoadBalancerSettings>,
        connection_pool: Option<ConnectionPoolSettings>,
        outlier_detection: Option<OutlierDetection>,
        tls: Option<ClientTlsSettings>,
        port_level_settings: Vec<PortTrafficPolicy>,
        tunnel: Option<TunnelSettings>,
        proxy_protocol: Option<ProxyProtocol>,
        retry_budget: Option<RetryBudget>,
    }
    /// `trafficPolicy.portLevelSettings[]`.
    PortTrafficPolicy {
        port: Option<PortSelector>,
        load_balancer: Option<LoadBalancerSettings>,
        connection_pool: Option<ConnectionPoolSettings>,
        outlier_detection: Option<OutlierDetection>,
        tls: Option<ClientTlsSettings>,
    }
    /// `loadBalancer`.
    LoadBalancerSettings {
        simple: Option<SimpleLb>,
        consistent_hash: Option<ConsistentHashLb>,
        locality_lb_setting: Option<LocalityLbSetting>,
        zone_aware_lb_setting: Value,
        warmup_duration_secs: Option<String>,
        warmup: Option<WarmupConfiguration>,
    }
    /// `consistentHash`.
    ConsistentHashLb {
        http_header_name: Option<String>,
        http_cookie: Option<HttpCookie>,
        use_source_ip: Option<bool>,
        http_query_parameter_name: Option<String>,
        ring_hash: Option<RingHash>,
        maglev: Option<MagLev>,
        minimum_ring_size: Option<u64>,
    }
    /// `httpCookie`.
    HttpCookie {
        name: String,
        path: String,
        ttl: Option<String>,
        attributes: Vec<CookieAttribute>,
    }
    /// `httpCookie.attributes[]`.
    CookieAttribute {
        name: String,
        value: String,
    }
    /// `ringHash`.
    RingHash {
        minimum_ring_size: Option<u64>,
    }
    /// `maglev`.
    MagLev {
        table_size: Option<u64>,
    }
    /// `localityLbSetting`.
    LocalityLbSetting {
        distribute: Vec<Distribute>,
        failover: Vec<Failover>,
        failover_priority: Vec<String>,
        enabled: Option<bool>,
    }
    /// `distribute[]`.
    Distribute {
        from: String,
        to: BTreeMap<String, u32>,
    }
    /// `failover[]`.
    Failover {
        from: String,
        to: String,
    }
    /// `warmup`.
    WarmupConfiguration {
        duration: Option<String>,
        minimum_percent: Option<f64>,
        aggression: Option<f64>,
    }
    /// `connectionPool`.
    ConnectionPoolSettings {
        tcp: Option<TcpSettings>,
        http: Option<HttpSettings>,
    }
    /// `connectionPool.tcp`.
    TcpSettings {
        max_connections: i32,
        connect_timeout: Option<String>,
        tcp_keepalive: Option<TcpKeepalive>,
        max_connection_duration: Option<String>,
        idle_timeout: Option<String>,
    }
    /// `tcpKeepalive`.
    TcpKeepalive {
        probes: u32,
        time: Option<String>,
        interval: Option<String>,
    }
    /// `connectionPool.http`.
    HttpSettings {
        http1_max_pending_requests: i32,
        http2_max_requests: i32,
        max_requests_per_connection: i32,
        max_retries: i32,
        idle_timeout: Option<String>,
        h2_upgrade_policy: H2UpgradePolicy,
        use_client_protocol: bool,
        max_concurrent_streams: i32,
        http2_keep_alive: Option<Http2KeepAlive>,
    }
    /// `http2KeepAlive`.
    Http2KeepAlive {
        interval: Option<String>,
        timeout: Option<String>,
    }
    /// `outlierDetection`.
    OutlierDetection {
        consecutive_errors: i32,
        split_external_local_origin_errors: bool,
        consecutive_local_origin_failures: Option<u32>,
        consecutive_gateway_errors: Option<u32>,
        #[serde(rename = "consecutive5xxErrors")]
        consecutive_5xx_errors: Option<u32>,
        interval: Option<String>,
        base_ejection_time: Option<String>,
        max_ejection_percent: i32,
        min_health_percent: i32,
        outlier_detection_http_error_codes: Vec<u32>,
    }
    /// `tls`.
    ClientTlsSettings {
        mode: TlsMode,
        client_certificate: String,
        private_key: String,
        ca_certificates: String,
        ca_crl: String,
        credential_name: String,
        subject_alt_names: Vec<String>,
        sni: String,
        insecure_skip_verify: Option<bool>,
    }
    /// `tunnel`.
    TunnelSettings {
        protocol: String,
        target_host: String,
        target_port: u32,
    }
    /// `proxyProtocol`.
    ProxyProtocol {
        version: ProxyProtocolVersion,
    }
    /// `retryBudget`.
    RetryBudget {
        percent: Option<f64>,
        min_retry_concurrency: Option<u32>,
        budget_interval: Option<String>,
    }
    /// `RequestAuthentication`.
    RequestAuthenticationSpec {
        selector: Option<MatchLabels>,
        target_ref: Option<TargetRef>,
        target_refs: Vec<TargetRef>,
        jwt_rules: Vec<JwtRule>,
    }
    /// `jwtRules[]`.
    JwtRule {
        issuer: String,
        audiences: Vec<String>,
        jwks_uri: String,
        jwks: String,
        from_headers: Vec<JwtHeader>,
        from_params: Vec<String>,
        from_cookies: Vec<String>,
        output_payload_to_header: String,
        forward_original_token: bool,
        output_claim_to_headers: Vec<ClaimToHeader>,
        timeout: Option<String>,
        space_delimited_claims: Vec<String>,
    }
    /// `fromHeaders[]`.
    JwtHeader {
        name: String,
        prefix: String,
    }
    /// `outputClaimToHeaders[]`.
    ClaimToHeader {
        header: String,
        claim: String,
    }
    /// `Telemetry`.
    TelemetrySpec {
        selector: Option<MatchLabels>,
        target_ref: Option<TargetRef>,
        target_refs: Vec<TargetRef>,
        tracing: Vec<Tracing>,
        metrics: Vec<Metrics>,
        access_logging: Vec<AccessLogging>,
    }
    /// `tracing[]`.
    Tracing {
        #[serde(rename = "match")]
        matches: Option<ModeSelector>,
        providers: Vec<ProviderRef>,
        random_sampling_percentage: Option<f64>,
        disable_span_reporting: Option<bool>,
        custom_tags: BTreeMap<String, CustomTag>,
        use_request_id_for_trace_sampling: Option<bool>,
        enable_istio_tags: Option<bool>,
        disable_context_propagation: Option<bool>,
    }
    /// `match` of tracing and access logging.
    ModeSelector {
        mode: WorkloadMode,
    }
    /// `providers[]`.
    ProviderRef {
        name: String,
    }
    /// `customTags{}`: one of them.
    CustomTag {
        literal: Option<LiteralTag>,
        environment: Option<NamedTag>,
        header: Option<NamedTag>,
        formatter: Option<LiteralTag>,
    }
    /// A text.
    LiteralTag {
        value: String,
    }
    /// A name, and what stands for it where it is absent.
    NamedTag {
        name: String,
        default_value: String,
    }
    /// `metrics[]`.
    Metrics {
        providers: Vec<ProviderRef>,
        overrides: Vec<MetricsOverrides>,
        reporting_interval: Option<String>,
    }
    /// `metrics[].overrides[]`.
    MetricsOverrides {
        #[serde(rename = "match")]
        matches: Option<MetricSelector>,
        disabled: Option<bool>,
        tag_overrides: BTreeMap<String, TagOverride>,
    }
    /// `overrides[].match`.
    MetricSelector {
        metric: Option<IstioMetric>,
        custom_metric: Option<String>,
        mode: WorkloadMode,
    }
    /// `tagOverrides{}`.
    TagOverride {
        operation: TagOperation,
        value: String,
    }
    /// `accessLogging[]`.
    AccessLogging {
        #[serde(rename = "match")]
        matches: Option<ModeSelector>,
        providers: Vec<ProviderRef>,
        disabled: Option<bool>,
        filter: Option<LogFilter>,
    }
    /// `accessLogging[].filter`.
    LogFilter {
        expression: String,
    }
}

words! {
    /// `redirect.derivePort`.
    RedirectPortSelection { FromProtocolDefault, FromRequestPort }
    /// `corsPolicy.unmatchedPreflights`.
    UnmatchedPreflights { Unspecified, Forward, Ignore }
    /// `loadBalancer.simple`.
    SimpleLb { Unspecified, LeastConn, Random, Passthrough, RoundRobin, LeastRequest }
    /// `connectionPool.http.h2UpgradePolicy`.
    H2UpgradePolicy { Default, DoNotUpgrade, Upgrade }
    /// `tls.mode`.
    TlsMode { Disable, Simple, Mutual, IstioMutual }
    /// `proxyProtocol.version`.
    ProxyProtocolVersion { V1, V2 }
    /// `mode`: a waypoint is a server.
    WorkloadMode { ClientAndServer, Client, Server }
    /// `match.metric`.
    IstioMetric {
        AllMetrics, RequestCount, RequestDuration, RequestSize, ResponseSize, TcpOpenedConnections,
        TcpClosedConnections, TcpSentBytes, TcpReceivedBytes, GrpcRequestMessages, GrpcResponseMessages,
    }
    /// `tagOverrides{}.operation`.
    TagOperation { Upsert, Remove }
}
