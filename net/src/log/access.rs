//! The access log: one line per connection, and a short one for what was refused early.

use std::{fmt, net::SocketAddr, time::Duration};

/// Toward or away from the pod being served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// Toward it.
    Inbound,
    /// Away from it.
    Outbound,
}

impl Direction {
    /// As in the log.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Inbound => "inbound",
            Self::Outbound => "outbound",
        }
    }
}

/// The fields of an access line, named as they print; what is `None` is left out. Source: node-tunnel.md 1.8.
#[derive(Clone, Copy, Debug)]
pub struct Access<'a> {
    /// Toward or away from the pod.
    pub direction: Direction,
    /// `src.addr`: the client's end of the accepted connection.
    pub source_address: SocketAddr,
    /// `src.workload`: pod name, else canonical service.
    pub source_workload: Option<&'a str>,
    /// `src.namespace`.
    pub source_namespace: Option<&'a str>,
    /// `src.cluster`.
    pub source_cluster: Option<&'a str>,
    /// `src.identity`: a SPIFFE ID, only where mutual TLS proved it.
    pub source_identity: Option<&'a str>,
    /// `dst.addr`: the TCP next hop; inbound over HBONE, the tunnel's port.
    pub destination_address: SocketAddr,
    /// `dst.hbone_addr`: the CONNECT authority.
    pub hbone_authority: Option<&'a str>,
    /// `dst.service`: host name.
    pub destination_service: Option<&'a str>,
    /// `dst.workload`.
    pub destination_workload: Option<&'a str>,
    /// `dst.namespace`.
    pub destination_namespace: Option<&'a str>,
    /// `dst.cluster`.
    pub destination_cluster: Option<&'a str>,
    /// `dst.identity`: a SPIFFE ID, only where mutual TLS proved it.
    pub destination_identity: Option<&'a str>,
    /// `policy`: the policy, and its rule, that decided.
    pub policy: Option<&'a str>,
    /// `end`: how it ended, where that is neither the usual end nor a failure: a reset, a drain, a pod that left.
    pub end: Option<&'a str>,
}

impl<'a> Access<'a> {
    /// A line about which only the ends are known.
    pub fn new(direction: Direction, source: SocketAddr, destination: SocketAddr) -> Self {
        Self {
            direction,
            source_address: source,
            source_workload: None,
            source_namespace: None,
            source_cluster: None,
            source_identity: None,
            destination_address: destination,
            hbone_authority: None,
            destination_service: None,
            destination_workload: None,
            destination_namespace: None,
            destination_cluster: None,
            destination_identity: None,
            policy: None,
            end: None,
        }
    }
}

/// What a finished connection carried, from the local workload's point of view.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Carried {
    /// Payload bytes that the local workload sent.
    pub bytes_sent: u64,
    /// Payload bytes that it received.
    pub bytes_received: u64,
    /// From accept to end.
    pub duration: Duration,
}

/// The one event shape of the access log; tracing fixes an event's level and message where it is written, hence a
/// macro and not a function.
macro_rules! line {
    ($level:ident, $access:expr, { $($extra:tt)* }, $message:literal) => {{
        let access: &Access<'_> = $access;
        tracing::event!(
            target: "access",
            tracing::Level::$level,
            src.addr = %access.source_address,
            src.workload = access.source_workload,
            src.namespace = access.source_namespace,
            src.cluster = access.source_cluster,
            src.identity = access.source_identity,
            dst.addr = %access.destination_address,
            dst.hbone_addr = access.hbone_authority.map(tracing::field::display),
            dst.service = access.destination_service,
            dst.workload = access.destination_workload,
            dst.namespace = access.destination_namespace,
            dst.cluster = access.destination_cluster,
            dst.identity = access.destination_identity,
            policy = access.policy,
            end = access.end,
            direction = access.direction.as_str(),
            $($extra)*
            $message
        );
    }};
}

impl Access<'_> {
    /// At DEBUG: traffic begins.
    pub fn opened(&self) {
        line!(DEBUG, self, {}, "connection opened");
    }

    /// INFO, or ERROR with `error` when the connection did not end well.
    pub fn complete(&self, carried: &Carried, error: Option<&dyn fmt::Display>) {
        let duration = format!("{}ms", carried.duration.as_millis());
        let duration = duration.as_str();
        match error {
            None => line!(INFO, self, {
                bytes_sent = carried.bytes_sent,
                bytes_recv = carried.bytes_received,
                duration,
            }, "connection complete"),
            Some(error) => line!(ERROR, self, {
                bytes_sent = carried.bytes_sent,
                bytes_recv = carried.bytes_received,
                duration,
                error = error.to_string(),
            }, "connection complete"),
        }
    }

    /// WARN: refused before anything was known but the two ends.
    pub fn failed(&self, error: &dyn fmt::Display) {
        tracing::event!(
            target: "access",
            tracing::Level::WARN,
            src.addr = %self.source_address,
            dst.addr = %self.destination_address,
            direction = self.direction.as_str(),
            error = error.to_string(),
            "connection failed"
        );
    }
}
