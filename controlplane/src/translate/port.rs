//! Ports: what protocol they speak, and which port of an endpoint stands behind which port of a service.

use std::collections::BTreeMap;

use mesh::names::Str;
use proto::workload::{AppProtocol, Port};

use crate::object::TargetPort;

/// One port of a service, as endpoints are joined with it.
#[derive(Clone, Debug, PartialEq)]
pub struct PortSpec {
    /// Its name; empty where there is only one.
    pub name: Str,
    /// Its number.
    pub port: u16,
    /// What it is at the endpoint.
    pub target: TargetPort,
    /// What it speaks.
    pub protocol: AppProtocol,
    /// Of gRPC: the variant for browsers, which the wire of node tunnels does not know.
    pub grpc_web: bool,
}

impl PortSpec {
    /// As it stands in a service: target 0 when each endpoint names its own.
    pub fn of_service(&self) -> Port {
        match self.target {
            TargetPort::Same => self.at(self.port),
            TargetPort::Number(number) => self.at(number),
            TargetPort::Name(_) => self.at(0),
        }
    }

    /// As it stands in an endpoint that serves it on `target`.
    pub fn at(&self, target: u16) -> Port {
        Port {
            service_port: self.port.into(),
            target_port: target.into(),
            app_protocol: self.protocol.into(),
        }
    }

    /// At an endpoint whose named ports are `named`. `None`: it does not serve this port.
    pub fn resolve(&self, named: &BTreeMap<Str, u16>) -> Option<Port> {
        let target = match &self.target {
            TargetPort::Same => self.port,
            TargetPort::Number(number) => *number,
            TargetPort::Name(name) => *named.get(name)?,
        };
        Some(self.at(target))
    }

    /// At an endpoint of a ServiceEntry, whose own port of the same name goes first.
    pub fn resolve_by_port_name(&self, named: &BTreeMap<Str, u16>) -> Port {
        match (named.get(&self.name), &self.target) {
            (Some(number), _) | (None, TargetPort::Number(number)) => self.at(*number),
            (None, TargetPort::Same | TargetPort::Name(_)) => self.at(self.port),
        }
    }
}

/// The protocol of a Kubernetes service port: `appProtocol`, else what its name starts with.
pub fn protocol_of(app_protocol: Option<&str>, name: &str) -> AppProtocol {
    match app_protocol {
        Some("kubernetes.io/h2c") => return AppProtocol::Http2,
        Some("kubernetes.io/ws") => return AppProtocol::Http11,
        Some("kubernetes.io/wss") => return AppProtocol::Tls,
        Some(given) => return protocol(given),
        None => {}
    }
    match name.to_ascii_lowercase() {
        web if web == "grpc-web" || web.starts_with("grpc-web-") => AppProtocol::Grpc,
        other => protocol(other.split('-').next().unwrap_or_default()),
    }
}

/// Whether a port speaks gRPC-Web.
pub fn is_grpc_web(app_protocol: Option<&str>, name: &str) -> bool {
    let text = app_protocol.unwrap_or(name).to_ascii_lowercase();
    text == "grpc-web" || (app_protocol.is_none() && text.starts_with("grpc-web-"))
}

/// A protocol by its name, in any case.
pub fn protocol(name: &str) -> AppProtocol {
    match name.to_ascii_lowercase().as_str() {
        "http" => AppProtocol::Http11,
        "http2" => AppProtocol::Http2,
        "grpc" | "grpc-web" => AppProtocol::Grpc,
        "tls" | "https" => AppProtocol::Tls,
        "tcp" => AppProtocol::Tcp,
        _ => AppProtocol::Unknown,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn protocols_come_from_app_protocol_and_then_from_the_name() {
        let table = [
            (None, "http", AppProtocol::Http11),
            (None, "http-admin", AppProtocol::Http11),
            (None, "HTTP2", AppProtocol::Http2),
            (None, "grpc-web", AppProtocol::Grpc),
            (None, "https-x", AppProtocol::Tls),
            (None, "httpx", AppProtocol::Unknown),
            (None, "", AppProtocol::Unknown),
            (Some("tcp"), "http", AppProtocol::Tcp),
            (Some("kubernetes.io/h2c"), "x", AppProtocol::Http2),
            (Some("kubernetes.io/wss"), "x", AppProtocol::Tls),
            (Some("mysql"), "http", AppProtocol::Unknown),
        ];
        for (app_protocol, name, expected) in table {
            assert_eq!(
                protocol_of(app_protocol, name),
                expected,
                "{app_protocol:?} {name:?}"
            );
        }
    }
}
