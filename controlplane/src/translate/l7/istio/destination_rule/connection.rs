//! Connections to endpoints: pools, outliers, retry budgets.

use std::time::Duration;

use http::StatusCode;
use mesh::l7::backend::{
    ConnectionPool, Http2Keepalive, OutlierDetection, RetryBudget, UpstreamVersion,
};

use super::whole;
use crate::{
    crd::istio::{self as crd, H2UpgradePolicy},
    translate::l7::istio::read::{duration, interval, limit},
    validate::Findings,
};

/// Envoy's and Istio's defaults.
const INTERVAL: Duration = Duration::from_secs(10);
const EJECTION: Duration = Duration::from_secs(30);
/// Between PINGs, and until one is answered.
const PINGS: Duration = Duration::from_secs(30);
const PING_TIMEOUT: Duration = Duration::from_secs(20);
const BUDGET_INTERVAL: Duration = Duration::from_secs(10);

/// Probes, time to the first, interval.
pub(super) type Keepalive = (Option<u32>, Option<Duration>, Option<Duration>);

/// `connectionPool`.
pub(super) fn pool(
    it: &crd::ConnectionPoolSettings,
    path: &str,
    found: &mut Findings,
) -> ConnectionPool {
    let none = crd::TcpSettings::default();
    let tcp = it.tcp.as_ref().unwrap_or(&none);
    let none = crd::HttpSettings::default();
    let http = it.http.as_ref().unwrap_or(&none);
    let (tcp_path, http_path) = (format!("{path}.tcp"), format!("{path}.http"));
    let keepalive = tcp.tcp_keepalive.as_ref();
    let keepalive =
        keepalive.map(|it| keepalive_of(it, &format!("{tcp_path}.tcpKeepalive"), found));
    ConnectionPool {
        max_connections: limit(
            tcp.max_connections,
            &format!("{tcp_path}.maxConnections"),
            found,
        ),
        connect_timeout: interval(
            tcp.connect_timeout.as_ref(),
            &format!("{tcp_path}.connectTimeout"),
            found,
        ),
        keepalive,
        max_connection_duration: interval(
            tcp.max_connection_duration.as_ref(),
            &format!("{tcp_path}.maxConnectionDuration"),
            found,
        ),
        tcp_idle_timeout: duration(
            tcp.idle_timeout.as_ref(),
            &format!("{tcp_path}.idleTimeout"),
            found,
        ),
        max_pending_requests: limit(
            http.http1_max_pending_requests,
            &format!("{http_path}.http1MaxPendingRequests"),
            found,
        ),
        max_requests: limit(
            http.http2_max_requests,
            &format!("{http_path}.http2MaxRequests"),
            found,
        ),
        max_requests_per_connection: limit(
            http.max_requests_per_connection,
            &format!("{http_path}.maxRequestsPerConnection"),
            found,
        ),
        max_retries: limit(http.max_retries, &format!("{http_path}.maxRetries"), found),
        http_idle_timeout: duration(
            http.idle_timeout.as_ref(),
            &format!("{http_path}.idleTimeout"),
            found,
        ),
        http_version: match (http.use_client_protocol, http.h2_upgrade_policy) {
            (true, _) => UpstreamVersion::Client,
            (false, H2UpgradePolicy::Upgrade) => UpstreamVersion::Http2,
            (false, _) => UpstreamVersion::Declared,
        },
        max_concurrent_streams: limit(
            http.max_concurrent_streams,
            &format!("{http_path}.maxConcurrentStreams"),
            found,
        ),
        http2_keepalive: http
            .http2_keep_alive
            .as_ref()
            .map(|it| pings(it, &format!("{http_path}.http2KeepAlive"), found)),
    }
}

/// `http2KeepAlive`; an interval of 0 sends none.
fn pings(it: &crd::Http2KeepAlive, path: &str, found: &mut Findings) -> Http2Keepalive {
    let time = duration(it.interval.as_ref(), &format!("{path}.interval"), found);
    let timeout = interval(it.timeout.as_ref(), &format!("{path}.timeout"), found);
    Http2Keepalive {
        interval: time.unwrap_or(PINGS),
        timeout: timeout.unwrap_or(PING_TIMEOUT),
    }
}

/// `tcpKeepalive`.
pub(super) fn keepalive_of(it: &crd::TcpKeepalive, path: &str, found: &mut Findings) -> Keepalive {
    let time = interval(it.time.as_ref(), &format!("{path}.time"), found);
    let between = interval(it.interval.as_ref(), &format!("{path}.interval"), found);
    ((it.probes != 0).then_some(it.probes), time, between)
}

/// `outlierDetection`.
pub(super) fn outlier(
    it: &crd::OutlierDetection,
    path: &str,
    found: &mut Findings,
) -> OutlierDetection {
    let percent = |number: i32, field: &str, found: &mut Findings| match u32::try_from(number) {
        Ok(number) if number <= 100 => number,
        _ => {
            found.error(format!("{path}.{field}"), "is no percentage from 0 to 100");
            0
        }
    };
    if it.consecutive_errors != 0 {
        found.error(
            format!("{path}.consecutiveErrors"),
            "is gone; use consecutive5xxErrors or consecutiveGatewayErrors",
        );
    }
    let mut codes = Vec::new();
    for (index, code) in it.outlier_detection_http_error_codes.iter().enumerate() {
        let read = u16::try_from(*code)
            .ok()
            .and_then(|code| StatusCode::from_u16(code).ok());
        if read.is_none() {
            found.error(
                format!("{path}.outlierDetectionHttpErrorCodes[{index}]"),
                "is no status",
            );
        }
        codes.extend(read);
    }
    let ejected = percent(it.max_ejection_percent, "maxEjectionPercent", found);
    OutlierDetection {
        consecutive_5xx: it.consecutive_5xx_errors.unwrap_or(5),
        consecutive_gateway_errors: it.consecutive_gateway_errors.unwrap_or(0),
        consecutive_local_failures: it
            .split_external_local_origin_errors
            .then(|| it.consecutive_local_origin_failures.unwrap_or(5)),
        interval: interval(it.interval.as_ref(), &format!("{path}.interval"), found)
            .unwrap_or(INTERVAL),
        base_ejection_time: interval(
            it.base_ejection_time.as_ref(),
            &format!("{path}.baseEjectionTime"),
            found,
        )
        .unwrap_or(EJECTION),
        max_ejection_percent: if ejected == 0 { 10 } else { ejected },
        min_health_percent: percent(it.min_health_percent, "minHealthPercent", found),
        error_codes: codes,
    }
}

/// `retryBudget`.
pub(super) fn retry_budget(it: &crd::RetryBudget, path: &str, found: &mut Findings) -> RetryBudget {
    let percent = it.percent.unwrap_or(20.0);
    if !(0.0..=100.0).contains(&percent) {
        found.error(format!("{path}.percent"), "is no percentage from 0 to 100");
    }
    RetryBudget {
        percent: whole(percent.clamp(0.0, 100.0)),
        interval: interval(
            it.budget_interval.as_ref(),
            &format!("{path}.budgetInterval"),
            found,
        )
        .unwrap_or(BUDGET_INTERVAL),
        min_retries: it.min_retry_concurrency.unwrap_or(3),
    }
}
