//! Goldens: `testdata/<case>.in.yaml` holds objects, `testdata/<case>.out.json` the resources and conditions they come to.
//!
//! `LEYLINE_REGENERATE=1 cargo test -p leyline-controlplane goldens` writes the outputs anew; the difference is what to
//! review. A first line `# settings: as-istio, dry-run, network=net-1, trust-domain=td` changes the settings.

use std::{collections::BTreeMap, env, fs, path::Path};

use mesh::{l7::view::Resource as Told, view::Resource as Checked};
use prost::Message;
use proto::{
    security::{Authorization, Clause, Match, Rule, StringMatch, string_match::MatchType},
    workload as wire,
};
use serde_json::{Map, Value, json};

use crate::{
    object::{Gateway, ObjectRef},
    output::{Condition, ObjectStatus, Resource},
    source::files::{Content, FileId, Files},
    translate::{
        FailurePolicy, Settings,
        l7::{config, istio::mesh::MeshSettings},
    },
    wiring::{OfPods, Wiring},
};

fn settings(text: &str) -> Settings {
    let mut settings = Settings::default();
    let line = text
        .lines()
        .next()
        .and_then(|line| line.strip_prefix("# settings:"));
    for setting in line.into_iter().flat_map(|line| line.split(',')) {
        match setting
            .trim()
            .split_once('=')
            .unwrap_or((setting.trim(), ""))
        {
            ("several-networks", _) => settings.has_others = true,
            ("as-istio", _) => settings.failure = FailurePolicy::AsIstio,
            ("dry-run", _) => settings.send_dry_run = true,
            ("network", network) => settings.network = network.into(),
            ("alias", domain) => settings.trust_domain_aliases.push(domain.parse().unwrap()),
            ("trust-domain", domain) => settings.trust_domain = domain.parse().unwrap(),
            ("visibility", rules) => {
                let rules = crate::source::tree::parse(&rules.replace(';', ","))
                    .unwrap()
                    .remove(0);
                settings.entry_visibility = crate::source::read::read(&rules).0;
            }
            ("mesh", config) => {
                let config = crate::source::tree::parse(&config.replace(';', ","))
                    .unwrap()
                    .remove(0);
                let config = crate::source::read::read(&config).0.unwrap_or_default();
                let mesh = MeshSettings::read(&settings, &config, &mut Vec::new());
                settings.mesh = Some(mesh.into());
            }
            (other, _) => panic!("unknown setting {other}"),
        }
    }
    settings
}

fn outcome(text: &str) -> Value {
    let mut files = Files::default();
    let mut wiring = Wiring::new(settings(text), OfPods::Speak);
    let file = FileId {
        folder: 0,
        path: "in.yaml".into(),
    };
    let mut reports: BTreeMap<ObjectRef, ObjectStatus> = BTreeMap::new();
    for object in files.update(&file, Content::Text(text.to_owned())) {
        let resolved = files.resolve(&object);
        wiring.set(&object, resolved.object);
        reports.extend(resolved.report.map(|report| (object, report)));
    }
    wiring.settle();
    for (object, conditions) in wiring.conditions.take() {
        let report = reports.get_mut(&object).expect("conditions are of objects");
        report
            .conditions
            .extend(conditions.iter().flat_map(|list| list.iter().cloned()));
    }
    for (object, parents) in wiring.parents.take() {
        let report = reports.get_mut(&object).expect("parents are of objects");
        report.parents = parents.map(|list| (*list).clone()).unwrap_or_default();
    }
    let resources = wiring.resources.take();
    let (of_waypoints, resources): (Vec<_>, Vec<_>) = resources
        .into_iter()
        .partition(|(key, _)| key.scope.is_some());
    let rendered = resources.iter().filter_map(|(key, resource)| {
        let resource = resource.as_ref()?;
        Some((key.name.to_string(), render(resource)))
    });
    let mut waypoints: Map<String, Value> = Map::new();
    let usual = config::config(&settings(text), &Gateway::default());
    for (key, resource) in of_waypoints {
        let (Some(waypoint), Some(resource)) = (key.scope, resource) else {
            continue;
        };
        let shown = match resource.type_url {
            proto::WAYPOINT_TYPE_URL => {
                let message = proto::waypoint::Resource::decode(&*resource.body).unwrap();
                let told = Told::try_from(message).expect("waypoints take what is sent");
                assert_eq!(told.name(), *key.name);
                if told == Told::Config(usual.clone()) {
                    continue;
                }
                json!(lines(&told))
            }
            _ => render(&resource),
        };
        let of_waypoint = waypoints
            .entry(waypoint.to_string())
            .or_insert_with(|| json!({}));
        of_waypoint[key.name.to_string()] = shown;
    }
    let statuses = reports.into_values().chain(files.reports());
    Value::Object(sparse_top(json!({
        "resources": rendered.collect::<Map<_, _>>(),
        "status": statuses.filter_map(told).collect::<Map<_, _>>(),
        "waypoints": waypoints,
    })))
}

/// Without the part of waypoints where there is nothing of it.
fn sparse_top(fields: Value) -> Map<String, Value> {
    let Value::Object(mut fields) = fields else {
        unreachable!("made of fields");
    };
    fields.retain(|key, value| key != "waypoints" || *value != json!({}));
    fields
}

/// A resource of a waypoint: what Rust prints of it, without fields that say nothing, and short parts on one line.
fn lines(resource: &impl std::fmt::Debug) -> Vec<String> {
    let text = format!("{resource:#?}");
    let mut lines = text.lines().peekable();
    parts(&mut lines)
}

/// The parts up to the end of the one around them.
fn parts<'t>(lines: &mut std::iter::Peekable<impl Iterator<Item = &'t str>>) -> Vec<String> {
    const EMPTY: [&str; 6] = [": None,", ": [],", ": {},", ": false,", ": \"\",", ": 0ns,"];
    const SHORT: usize = 120;
    let mut found = Vec::new();
    while let Some(line) = lines.next_if(|line| !line.trim_start().starts_with([')', ']', '}'])) {
        if !line.ends_with(['(', '[', '{']) {
            let says = EMPTY.iter().all(|end| !line.ends_with(end));
            found.extend(says.then(|| line.to_owned()));
            continue;
        }
        let inner = parts(lines);
        let close = lines.next().unwrap_or_default();
        let is_field = line.contains(": ") && close.trim() != ")," && close.trim() != "],";
        if inner.is_empty() && is_field {
            continue;
        }
        let inline: Vec<&str> = inner.iter().map(|line| line.trim()).collect();
        let inline = format!("{line} {} {}", inline.join(" "), close.trim());
        if inline.len() <= SHORT {
            found.push(
                inline
                    .replace("( ", "(")
                    .replace(", )", ")")
                    .replace(", }", " }")
                    .replace(", ]", " ]"),
            );
        } else {
            found.push(line.to_owned());
            found.extend(inner);
            found.push(close.to_owned());
        }
    }
    found
}

/// What is told of every object without a mistake is left out.
fn told(status: ObjectStatus) -> Option<(String, Value)> {
    let plain =
        |condition: &&Condition| condition.reason != "Accepted" || condition.type_ != "Accepted";
    let conditions = status.conditions.iter().filter(plain);
    let line = |c: &Condition| format!("{}={:?} {}: {}", c.type_, c.status, c.reason, c.message);
    let mut lines: Vec<String> = conditions.map(line).collect();
    for parent in status.parents.iter() {
        let at = |c: &Condition| format!("{} {}", parent.reference, line(c));
        lines.extend(parent.conditions.iter().map(at));
    }
    let namespace = status
        .namespace
        .map(|namespace| format!("{namespace}/"))
        .unwrap_or_default();
    (!lines.is_empty()).then(|| {
        (
            format!("{} {namespace}{}", status.kind, status.name),
            json!(lines),
        )
    })
}

fn render(resource: &Resource) -> Value {
    let mut shown = match resource.type_url {
        proto::ADDRESS_TYPE_URL => {
            let address = wire::Address::decode(&*resource.body).unwrap();
            Checked::try_from(address.clone()).expect("node tunnels take what is sent");
            match address.r#type.unwrap() {
                wire::address::Type::Workload(workload) => render_workload(&workload),
                wire::address::Type::Service(service) => render_service(&service),
            }
        }
        _ => {
            let policy = Authorization::decode(&*resource.body).unwrap();
            mesh::policy::AuthorizationPolicy::try_from(policy.clone())
                .expect("node tunnels take what is sent");
            render_policy(&policy)
        }
    };
    if !resource.aliases.is_empty() {
        shown.insert("aliases".into(), json!(resource.aliases));
    }
    Value::Object(shown)
}

/// An object without what has its default value.
fn sparse(fields: Value) -> Map<String, Value> {
    let Value::Object(fields) = fields else {
        unreachable!("made of fields");
    };
    let is_default = |value: &Value| match value {
        Value::Null | Value::Bool(false) => true,
        Value::String(text) => text.is_empty(),
        Value::Array(items) => items.is_empty(),
        Value::Object(fields) => fields.is_empty(),
        Value::Number(number) => number.as_u64() == Some(0),
        Value::Bool(true) => false,
    };
    fields
        .into_iter()
        .filter(|(_, value)| !is_default(value))
        .collect()
}

fn address(bytes: &[u8]) -> String {
    match bytes.len() {
        4 => std::net::IpAddr::from(<[u8; 4]>::try_from(bytes).unwrap()).to_string(),
        _ => std::net::IpAddr::from(<[u8; 16]>::try_from(bytes).unwrap()).to_string(),
    }
}

fn network_address(found: &wire::NetworkAddress) -> String {
    let length = found
        .length
        .map(|length| format!("/{length}"))
        .unwrap_or_default();
    format!("{}/{}{length}", found.network, address(&found.address))
}

fn gateway(found: Option<&wire::GatewayAddress>) -> Value {
    let Some(found) = found else {
        return Value::Null;
    };
    let destination = match found.destination.as_ref().unwrap() {
        wire::gateway_address::Destination::Hostname(name) => {
            format!("{}/{}", name.namespace, name.hostname)
        }
        wire::gateway_address::Destination::Address(address) => network_address(address),
    };
    json!(format!("{destination}:{}", found.hbone_mtls_port))
}

fn ports(ports: &[wire::Port]) -> Value {
    let line = |port: &wire::Port| {
        format!(
            "{}->{} {}",
            port.service_port,
            port.target_port,
            port.app_protocol().as_str_name()
        )
    };
    json!(ports.iter().map(line).collect::<Vec<_>>())
}

/// The name of an enumeration's value, unless it is the first.
fn word<T: Default + PartialEq>(value: T, name: &'static str) -> Value {
    match value == T::default() {
        true => Value::Null,
        false => json!(name),
    }
}

fn render_workload(found: &wire::Workload) -> Map<String, Value> {
    let locality = found.locality.as_ref();
    let tunnel = found.application_tunnel.as_ref();
    let services = found
        .services
        .iter()
        .map(|(key, list)| (key.clone(), ports(&list.ports)));
    let mut shown = sparse(json!({
        "name": found.name,
        "namespace": found.namespace,
        "addresses": found.addresses.iter().map(|bytes| address(bytes)).collect::<Vec<_>>(),
        "hostname": found.hostname,
        "network": found.network,
        "tunnel_protocol": word(found.tunnel_protocol(), found.tunnel_protocol().as_str_name()),
        "trust_domain": found.trust_domain,
        "service_account": found.service_account,
        "waypoint": gateway(found.waypoint.as_ref()),
        "network_gateway": gateway(found.network_gateway.as_ref()),
        "node": found.node,
        "canonical": format!("{} {}", found.canonical_name, found.canonical_revision),
        "workload": format!("{} {}", found.workload_type().as_str_name(), found.workload_name),
        "native_tunnel": found.native_tunnel,
        "application_tunnel": tunnel.map(|t| format!("{} {}", t.protocol().as_str_name(), t.port)),
        "authorization_policies": found.authorization_policies,
        "status": word(found.status(), found.status().as_str_name()),
        "cluster_id": found.cluster_id,
        "locality": locality.map(|l| format!("{}/{}/{}", l.region, l.zone, l.subzone)),
        "network_mode": word(found.network_mode(), found.network_mode().as_str_name()),
        "services": services.collect::<Map<_, _>>(),
    }));
    if let Some(capacity) = found.capacity {
        shown.insert("capacity".into(), json!(capacity));
    }
    let checked = mesh::workload::Workload::try_from(found.clone());
    if let Some(dns) = checked.ok().and_then(|it| it.dns.clone()) {
        shown.insert("dns".into(), json!(dns));
    }
    shown
}

fn render_service(found: &wire::Service) -> Map<String, Value> {
    let balancing = found.load_balancing.as_ref().map(|balancing| {
        let scopes: Vec<_> = balancing
            .routing_preference()
            .map(|scope| scope.as_str_name())
            .collect();
        let (mode, health) = (
            balancing.mode().as_str_name(),
            balancing.health_policy().as_str_name(),
        );
        format!("{mode} {scopes:?} {health}")
    });
    let weighted = found.weighted_waypoints.iter();
    let weighted =
        weighted.map(|w| json!({"to": gateway(w.destination.as_ref()), "weight": w.weight}));
    let port_names = found.port_names.iter();
    let port_names = port_names.map(|it| format!("{} {}", it.service_port, it.name));
    sparse(json!({
        "name": found.name,
        "namespace": found.namespace,
        "hostname": found.hostname,
        "addresses": found.addresses.iter().map(network_address).collect::<Vec<_>>(),
        "ports": ports(&found.ports),
        "port_names": port_names.collect::<Vec<_>>(),
        "subject_alt_names": found.subject_alt_names,
        "waypoint": gateway(found.waypoint.as_ref()),
        "weighted_waypoints": weighted.collect::<Vec<_>>(),
        "ingress_use_waypoint": found.ingress_use_waypoint,
        "load_balancing": balancing,
        "ip_families": word(found.ip_families(), found.ip_families().as_str_name()),
        "canonical": found.canonical,
        "visibility": word(found.visibility(), found.visibility().as_str_name()),
    }))
}

fn render_policy(found: &Authorization) -> Map<String, Value> {
    sparse(json!({
        "scope": found.scope().as_str_name(),
        "action": found.action().as_str_name(),
        "dry_run": found.dry_run,
        "rules": found.rules.iter().map(render_rule).collect::<Vec<_>>(),
    }))
}

fn render_rule(rule: &Rule) -> Value {
    let clause = |clause: &Clause| json!({"any_of": clause.matches.iter().map(render_match).collect::<Vec<_>>()});
    json!({"all_of": rule.clauses.iter().map(clause).collect::<Vec<_>>()})
}

fn render_match(found: &Match) -> Value {
    let strings = |list: &[StringMatch]| list.iter().map(string).collect::<Vec<_>>();
    let blocks = |list: &[proto::security::Address]| {
        let block = |b: &proto::security::Address| format!("{}/{}", address(&b.address), b.length);
        list.iter().map(block).collect::<Vec<_>>()
    };
    let accounts = |list: &[proto::security::ServiceAccountMatch]| {
        let account = |a: &proto::security::ServiceAccountMatch| {
            format!("{}/{}", a.namespace, a.service_account)
        };
        list.iter().map(account).collect::<Vec<_>>()
    };
    Value::Object(sparse(json!({
        "namespaces": strings(&found.namespaces),
        "not_namespaces": strings(&found.not_namespaces),
        "principals": strings(&found.principals),
        "not_principals": strings(&found.not_principals),
        "source_ips": blocks(&found.source_ips),
        "not_source_ips": blocks(&found.not_source_ips),
        "destination_ips": blocks(&found.destination_ips),
        "not_destination_ips": blocks(&found.not_destination_ips),
        "destination_ports": found.destination_ports,
        "not_destination_ports": found.not_destination_ports,
        "service_accounts": accounts(&found.service_accounts),
        "not_service_accounts": accounts(&found.not_service_accounts),
    })))
}

fn string(found: &StringMatch) -> String {
    match found.match_type.as_ref().unwrap() {
        MatchType::Exact(text) => format!("exact {text}"),
        MatchType::Prefix(text) => format!("prefix {text}"),
        MatchType::Suffix(text) => format!("suffix {text}"),
        MatchType::Presence(()) => "presence".to_owned(),
    }
}

#[test]
fn objects_come_to_what_the_goldens_say() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata");
    let regenerate = env::var_os("LEYLINE_REGENERATE").is_some();
    let mut wrong = Vec::new();
    let mut count = 0;
    for entry in fs::read_dir(&folder).unwrap() {
        let input = entry.unwrap().path();
        let Some(case) = input
            .file_name()
            .unwrap()
            .to_str()
            .unwrap()
            .strip_suffix(".in.yaml")
        else {
            continue;
        };
        count += 1;
        let output = folder.join(format!("{case}.out.json"));
        let found = serde_json::to_string_pretty(&outcome(&fs::read_to_string(&input).unwrap()))
            .unwrap()
            + "\n";
        if regenerate {
            fs::write(&output, &found).unwrap();
        } else if fs::read_to_string(&output).unwrap_or_default() != found {
            wrong.push(format!("{case}, now:\n{found}"));
        }
    }
    assert!(count >= 25, "the goldens are missing: {count} cases");
    assert!(wrong.is_empty(), "not as in testdata: {}", wrong.join("\n"));
}
