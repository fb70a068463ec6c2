//! ServiceEntry and WorkloadEntry.

use std::net::IpAddr;

use super::{
    Findings, is_address_or_range, is_hostname, is_label, is_label_key, is_label_value, repeated,
};
use crate::{
    crd::{Location, Resolution, ServiceEntryPort, ServiceEntrySpec, WorkloadEntrySpec},
    object::ServiceEntry,
    translate::port::protocol,
};

pub(super) fn service_entry(entry: &ServiceEntry, found: &mut Findings) {
    let spec = &entry.spec;
    hosts(spec, found);
    addresses(spec, found);
    ports(spec, found);
    endpoints(spec, found);
    export_to(&spec.export_to, found);
    if spec.resolution == Resolution::DynamicDns {
        dynamic(entry, found);
    }
    doubts(entry, found);
}

fn is_name(text: &str) -> bool {
    text.parse::<IpAddr>().is_err() && is_hostname(text, false)
}

fn by_name(resolution: Resolution) -> bool {
    matches!(resolution, Resolution::Dns | Resolution::DnsRoundRobin)
}

fn hosts(spec: &ServiceEntrySpec, found: &mut Findings) {
    if spec.hosts.is_empty() {
        found.error("spec.hosts", "needs at least one host");
    }
    for (index, host) in spec.hosts.iter().enumerate() {
        let path = format!("spec.hosts[{index}]");
        if host == "*" {
            found.error(path, "\"*\" alone is no host");
        } else if !is_hostname(host, true) {
            found.error(path, format!("{host:?} is no host name"));
        } else if host.starts_with("*.") && spec.resolution != Resolution::DynamicDns {
            found.warning(
                path,
                "a wildcard host has an effect with resolution DYNAMIC_DNS only",
            );
        }
    }
    if let Some(host) = repeated(spec.hosts.iter().map(String::as_str)) {
        found.error("spec.hosts", format!("{host:?} occurs twice"));
    }
}

fn addresses(spec: &ServiceEntrySpec, found: &mut Findings) {
    for (index, address) in spec.addresses.iter().enumerate() {
        let path = format!("spec.addresses[{index}]");
        if !is_address_or_range(address) {
            found.error(path, format!("{address:?} is no address or range"));
        } else if address.contains('/')
            && !matches!(spec.resolution, Resolution::None | Resolution::Static)
        {
            found.error(path, "a range needs resolution NONE or STATIC");
        }
    }
}

fn ports(spec: &ServiceEntrySpec, found: &mut Findings) {
    for (index, port) in spec.ports.iter().enumerate() {
        service_port(port, &format!("spec.ports[{index}]"), found);
    }
    if let Some(name) = repeated(spec.ports.iter().map(|port| port.name.as_str())) {
        found.error("spec.ports", format!("the name {name:?} occurs twice"));
    }
    let numbers: Vec<String> = spec
        .ports
        .iter()
        .map(|port| port.number.to_string())
        .collect();
    if let Some(number) = repeated(numbers.iter().map(String::as_str)) {
        found.error("spec.ports", format!("the number {number} occurs twice"));
    }
    let told_apart = |port: &ServiceEntryPort| {
        use proto::workload::AppProtocol;
        matches!(
            protocol(&port.protocol),
            AppProtocol::Http11 | AppProtocol::Http2 | AppProtocol::Grpc | AppProtocol::Tls
        )
    };
    if spec.hosts.len() > 1
        && spec.resolution != Resolution::None
        && !spec.ports.iter().all(told_apart)
    {
        let message =
            "several hosts can be told apart by HTTP and TLS only: give the others an entry each";
        match spec.addresses.is_empty() {
            true => found.error("spec.hosts", message),
            false => found.warning("spec.hosts", message),
        }
    }
}

fn service_port(port: &ServiceEntryPort, path: &str, found: &mut Findings) {
    if !is_port(port.number) {
        found.error(
            format!("{path}.number"),
            format!("{} is no port from 1 to 65535", port.number),
        );
    }
    if port.target_port != 0 && !is_port(port.target_port) {
        found.error(
            format!("{path}.targetPort"),
            format!("{} is no port from 1 to 65535", port.target_port),
        );
    }
    if !is_label(&port.name) {
        found.error(
            format!("{path}.name"),
            format!("{:?} is no port name", port.name),
        );
    }
}

fn is_port(number: u32) -> bool {
    u16::try_from(number).is_ok_and(|port| port != 0)
}

fn endpoints(spec: &ServiceEntrySpec, found: &mut Findings) {
    const PATH: &str = "spec.endpoints";
    if spec.workload_selector.is_some() && !spec.endpoints.is_empty() {
        found.error(PATH, "cannot be combined with workloadSelector");
    }
    match spec.resolution {
        Resolution::None if !spec.endpoints.is_empty() => {
            found.error(PATH, "cannot be combined with resolution NONE")
        }
        Resolution::DnsRoundRobin if spec.endpoints.len() > 1 => {
            found.error(PATH, "DNS_ROUND_ROBIN has one endpoint at most");
        }
        _ => {}
    }
    if by_name(spec.resolution) && spec.endpoints.is_empty() && spec.workload_selector.is_none() {
        for (index, _) in spec
            .hosts
            .iter()
            .enumerate()
            .filter(|(_, host)| !is_name(host))
        {
            found.error(
                format!("spec.hosts[{index}]"),
                "DNS without endpoints needs a full host name",
            );
        }
    }
    for (index, endpoint) in spec.endpoints.iter().enumerate() {
        let path = format!("{PATH}[{index}]");
        workload_entry(endpoint, &path, found);
        let address = &endpoint.address;
        let fixed = address.parse::<IpAddr>().is_ok() || address.starts_with("unix://");
        if spec.resolution == Resolution::Static && !fixed && !address.is_empty() {
            found.error(
                format!("{path}.address"),
                format!("{address:?}: resolution STATIC needs an address"),
            );
        }
        for name in endpoint.ports.keys() {
            if !spec.ports.iter().any(|port| port.name == *name) {
                found.error(
                    format!("{path}.ports.{name}"),
                    "no port of this entry has this name",
                );
            }
        }
    }
}

fn export_to(namespaces: &[String], found: &mut Findings) {
    const PATH: &str = "spec.exportTo";
    if let Some(namespace) = repeated(namespaces.iter().map(String::as_str)) {
        found.error(PATH, format!("{namespace:?} occurs twice"));
    }
    let alone = namespaces
        .iter()
        .any(|namespace| namespace == "*" || namespace == "~");
    if alone && namespaces.len() > 1 {
        found.error(PATH, "\"*\" and \"~\" stand alone");
    }
}

/// DYNAMIC_DNS: the name is resolved at each request, behind a waypoint.
fn dynamic(entry: &ServiceEntry, found: &mut Findings) {
    let spec = &entry.spec;
    for (index, _) in spec
        .hosts
        .iter()
        .enumerate()
        .filter(|(_, host)| !host.starts_with("*."))
    {
        found.error(
            format!("spec.hosts[{index}]"),
            "DYNAMIC_DNS is for wildcard hosts",
        );
    }
    if !spec.addresses.is_empty() {
        found.error(
            "spec.addresses",
            "cannot be combined with resolution DYNAMIC_DNS",
        );
    }
    if !spec.endpoints.is_empty() {
        found.error(
            "spec.endpoints",
            "cannot be combined with resolution DYNAMIC_DNS",
        );
    }
    for (index, port) in spec.ports.iter().enumerate() {
        if !["HTTP", "TLS", "GRPC", "HTTP2"].contains(&port.protocol.to_ascii_uppercase().as_str())
        {
            found.error(
                format!("spec.ports[{index}].protocol"),
                "DYNAMIC_DNS needs HTTP, HTTP2, GRPC or TLS",
            );
        }
    }
    if spec.location == Location::MeshInternal
        && entry.meta.label("istio.io/use-waypoint").is_some()
    {
        found.error(
            "spec.location",
            "MESH_INTERNAL cannot be resolved by a waypoint",
        );
    }
}

fn doubts(entry: &ServiceEntry, found: &mut Findings) {
    let spec = &entry.spec;
    if spec.workload_selector.is_some() && spec.resolution == Resolution::None {
        found.warning(
            "spec.workloadSelector",
            "has no effect with resolution NONE",
        );
    }
    let unnamed =
        |port: &ServiceEntryPort| matches!(port.protocol.to_ascii_uppercase().as_str(), "" | "TCP");
    let opted_out = entry
        .meta
        .label("networking.istio.io/enable-autoallocate-ip")
        .is_some_and(|text| &**text == "false");
    let has_addresses =
        !spec.addresses.is_empty() || (spec.resolution != Resolution::None && !opted_out);
    if !has_addresses && spec.ports.iter().any(unnamed) {
        found.warning(
            "spec.addresses",
            "TCP without addresses: every connection to these ports would match",
        );
    }
}

pub(super) fn workload_entry(spec: &WorkloadEntrySpec, path: &str, found: &mut Findings) {
    let address = spec.address.as_str();
    let field = format!("{path}.address");
    match address.strip_prefix("unix://") {
        Some(socket) => {
            if !socket.starts_with('/') && !socket.starts_with('@') {
                found.error(field, "a unix socket needs an absolute path");
            }
            if !spec.ports.is_empty() {
                found.error(format!("{path}.ports"), "a unix socket has no ports");
            }
        }
        None if address.is_empty() && spec.network.is_empty() => found.error(field, "is missing"),
        None if address.is_empty() => {
            found.warning(field, "is missing: reached through its network's gateway")
        }
        None if address.parse::<IpAddr>().is_ok() || is_hostname(address, false) => {}
        None => found.error(
            field,
            format!("{address:?} is no address, host name or unix:// path"),
        ),
    }
    for (name, number) in &spec.ports {
        if !is_port(*number) {
            found.error(
                format!("{path}.ports.{name}"),
                format!("{number} is no port from 1 to 65535"),
            );
        }
    }
    for (key, value) in &spec.labels {
        if !is_label_key(key) || !is_label_value(value) {
            found.error(
                format!("{path}.labels"),
                format!("{key:?}: {value:?} is no label"),
            );
        }
    }
}
