//! The proxies, each in a process of its own, on one core's worth of threads: ours, and Envoy as Istio configures it for a
//! waypoint (tunnel in, routes, tunnel out), without what would only cost it (metrics by label, policies, logs).

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use mesh::{
    l7::{
        name::ObjectRef,
        route::{
            Action, Attachment, Backend, Callers, HttpMatch, HttpRule, Order, PathMatch, Route,
            Rules, WeightedBackend,
        },
        view,
    },
    outbound::HBONE_PORT,
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use rig::process::Process;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::sleep,
};

use crate::{
    authority::{Authority, account},
    load::{BACKEND, BACKEND_PORT, VIP},
    plane::{Plane, service},
};

/// A process that ends with this.
pub(crate) struct Proxy {
    pub(crate) name: &'static str,
    pub(crate) address: SocketAddr,
    pub(crate) process: Process,
    /// From its certificate to its readiness.
    pub(crate) ready_after: Option<Duration>,
    routes: Table,
    child: Child,
    _folder: Option<TempDir>,
}

/// Where its routes come from.
enum Table {
    Told(Plane),
    File(PathBuf),
}

impl Drop for Proxy {
    fn drop(&mut self) {
        // In good order first: one that counts for deploy/profile writes at its end.
        if let Ok(id) = i32::try_from(self.child.id()) {
            let _ = kill(Pid::from_raw(id), Signal::SIGTERM);
        }
        let deadline = Instant::now() + Duration::from_secs(10);
        while matches!(self.child.try_wait(), Ok(None)) && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(10));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn free_port() -> Result<u16> {
    let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
    Ok(listener.local_addr()?.port())
}

fn start(command: &mut Command) -> Result<Child> {
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .with_context(|| format!("start {command:?}"))
}

/// When a waypoint says that it is ready, asked every millisecond.
async fn until_ready(address: SocketAddr) -> Result<Instant> {
    let began = Instant::now();
    while began.elapsed() < Duration::from_secs(10) {
        if let Ok(mut stream) = TcpStream::connect(address).await {
            let request =
                b"GET /healthz/ready HTTP/1.1\r\nhost: ready\r\nconnection: close\r\n\r\n";
            stream.write_all(request).await?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer).await?;
            if answer.starts_with("HTTP/1.1 200") {
                return Ok(Instant::now());
            }
        }
        sleep(Duration::from_millis(1)).await;
    }
    bail!("the waypoint is not ready")
}

impl Proxy {
    /// Ours, told by a control plane of a few lines.
    pub(crate) async fn ours(program: &Path, authority: &Arc<Authority>) -> Result<Self> {
        let (plane, control) = Plane::start(Arc::clone(authority)).await?;
        let address = SocketAddr::from(([127, 0, 0, 1], free_port()?));
        let readiness = SocketAddr::from(([127, 0, 0, 1], free_port()?));
        let mut command = Command::new(program);
        command.env_clear().envs([
            ("POD_NAME", "waypoint-1"),
            ("POD_NAMESPACE", "shop"),
            ("SERVICE_ACCOUNT", "waypoint"),
            ("INSTANCE_IP", "127.0.0.1"),
            ("LEYLINE_WORKER_THREADS", "1"),
            ("RUST_LOG", "error"),
            ("XDS_ADDRESS", control.as_str()),
            ("CA_ADDRESS", control.as_str()),
            ("LEYLINE_ADMIN_ADDRESS", "127.0.0.1:0"),
            ("LEYLINE_STATS_ADDRESS", "127.0.0.1:0"),
            ("LEYLINE_READINESS_ADDRESS", readiness.to_string().as_str()),
            ("LEYLINE_HBONE_ADDRESS", address.to_string().as_str()),
        ]);
        let child = start(&mut command)?;
        let ready = until_ready(readiness).await?;
        let certified = plane.certified().context("it was given a certificate")?;
        Ok(Self {
            name: "leyline",
            address,
            process: Process(child.id().try_into()?),
            ready_after: Some(ready.duration_since(certified)),
            routes: Table::Told(plane),
            child,
            _folder: None,
        })
    }

    /// Envoy.
    pub(crate) fn envoy(program: &Path, authority: &Authority) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        authority.write(&account("waypoint"), folder.path())?;
        let address = SocketAddr::from(([127, 0, 0, 1], free_port()?));
        let routes = folder.path().join("routes.json");
        write_routes(&routes, 0, 0)?;
        let bootstrap = bootstrap(folder.path(), address);
        let config = folder.path().join("envoy.json");
        std::fs::write(&config, serde_json::to_string(&bootstrap)?)?;
        let mut command = Command::new(program);
        command
            .args([
                "--concurrency",
                "1",
                "--disable-hot-restart",
                "-l",
                "error",
                "-c",
            ])
            .arg(&config);
        let child = start(&mut command)?;
        Ok(Self {
            name: "envoy",
            address,
            process: Process(child.id().try_into()?),
            ready_after: None,
            routes: Table::File(routes),
            child,
            _folder: Some(folder),
        })
    }

    /// Gives it `count` routes by path, and the one for all else. Answers of that one say `version`.
    pub(crate) fn route(&self, count: usize, version: u64) -> Result<()> {
        match &self.routes {
            Table::Told(plane) => {
                let mut all: Vec<_> = (0..count).map(by_path).collect();
                all.push(last(version));
                plane.tell(&all);
                Ok(())
            }
            Table::File(path) => write_routes(path, count, version),
        }
    }

    /// Changes the one for all else, of `count` and it. Each side is told as little as its protocol allows.
    pub(crate) fn change(&self, count: usize, version: u64) -> Result<()> {
        match &self.routes {
            Table::Told(plane) => {
                plane.tell(&[last(version)]);
                Ok(())
            }
            Table::File(path) => write_routes(path, count, version),
        }
    }
}

/// The path of a route.
pub(crate) fn path(number: usize) -> String {
    format!("/team-{}/service-{number}", number % 97)
}

fn by_path(number: usize) -> view::Resource {
    let path = PathMatch::Segments(path(number).as_str().into());
    route(&format!("route-{number}"), Some(path), 0)
}

fn last(version: u64) -> view::Resource {
    route("last", None, version)
}

fn route(name: &str, path: Option<PathMatch>, version: u64) -> view::Resource {
    let backend = Backend::Service {
        service: service().key(),
        port: VIP.1,
        subset: None,
    };
    let matches = path.map(|path| HttpMatch {
        path: Some(path),
        ..HttpMatch::default()
    });
    let action = Action::Forward(vec![WeightedBackend::new(1, backend)]);
    let mut rule = HttpRule::new(matches.into_iter().collect(), action);
    let told = (http::HeaderName::from_static("x-version"), version.into());
    rule.response_headers.set.push(told);
    view::Resource::Route(Route {
        key: ObjectRef {
            kind: "HTTPRoute".into(),
            namespace: "shop".into(),
            name: name.into(),
        },
        created: 0,
        attachments: vec![Attachment {
            service: service().key(),
            port: None,
            callers: Callers::All,
        }],
        rules: Rules::Http {
            order: Order::Precedence,
            rules: vec![rule],
        },
    })
}

/// By a rename, which is what Envoy watches for.
fn write_routes(path: &Path, count: usize, version: u64) -> Result<()> {
    let told = |version: u64| {
        json!([{"header": {"key": "x-version", "value": version.to_string()},
            "append_action": "OVERWRITE_IF_EXISTS_OR_ADD"}])
    };
    let entry = |matches: Value, version: u64| json!({"match": matches, "route": {"cluster": "web", "timeout": "0s"}, "response_headers_to_add": told(version)});
    let mut routes: Vec<Value> = (0..count)
        .map(|number| entry(json!({"path_separated_prefix": self::path(number)}), 0))
        .collect();
    routes.push(entry(json!({"prefix": "/"}), version));
    let document = json!({"version_info": version.to_string(), "resources": [{
        "@type": "type.googleapis.com/envoy.config.route.v3.RouteConfiguration",
        "name": "routes",
        "virtual_hosts": [{"name": "web", "domains": ["*"], "routes": routes}],
    }]});
    let next = path.with_extension("next");
    std::fs::write(&next, serde_json::to_string(&document)?)?;
    std::fs::rename(next, path)?;
    Ok(())
}

const TYPES: &str = "type.googleapis.com/envoy.extensions";

fn bootstrap(folder: &Path, address: SocketAddr) -> Value {
    let (terminate, originate) = (terminate(folder, address), originate());
    json!({
        "node": {"id": "envoy", "cluster": "envoy"},
        "bootstrap_extensions": [{
            "name": "envoy.bootstrap.internal_listener",
            "typed_config": {"@type": format!("{TYPES}.bootstrap.internal_listener.v3.InternalListener")},
        }],
        "static_resources": {
            "listeners": [terminate, requests(folder), originate],
            "clusters": [
                internal("requests", "requests"),
                internal("web", "originate"),
                tunnels(folder),
            ],
        },
    })
}

fn tls(folder: &Path, side: &str) -> Value {
    let file = |name: &str| json!({"filename": folder.join(name)});
    let mut config = json!({
        "@type": format!("{TYPES}.transport_sockets.tls.v3.{side}TlsContext"),
        "common_tls_context": {
            "alpn_protocols": ["h2"],
            "tls_params": {"tls_minimum_protocol_version": "TLSv1_3", "tls_maximum_protocol_version": "TLSv1_3"},
            "tls_certificates": [{"certificate_chain": file("cert.pem"), "private_key": file("key.pem")}],
            "validation_context": {"trusted_ca": file("root.pem")},
        },
    });
    if side == "Downstream" {
        config["require_client_certificate"] = json!(true);
    }
    json!({"name": "envoy.transport_sockets.tls", "typed_config": config})
}

fn http(name: &str, more: &Value) -> Value {
    let mut config = json!({
        "@type": format!("{TYPES}.filters.network.http_connection_manager.v3.HttpConnectionManager"),
        "stat_prefix": name,
        "http_filters": [{"name": "envoy.filters.http.router", "typed_config": {
            "@type": format!("{TYPES}.filters.http.router.v3.Router"),
        }}],
    });
    for (key, value) in more.as_object().into_iter().flatten() {
        config[key] = value.clone();
    }
    json!({"name": "envoy.filters.network.http_connection_manager", "typed_config": config})
}

/// Tunnels in.
fn terminate(folder: &Path, address: SocketAddr) -> Value {
    let route = json!({
        "match": {"connect_matcher": {}},
        "route": {"cluster": "requests", "timeout": "0s",
            "upgrade_configs": [{"upgrade_type": "CONNECT", "connect_config": {}}]},
    });
    let manager = http(
        "terminate",
        &json!({
            "codec_type": "HTTP2",
            "http2_protocol_options": {"allow_connect": true},
            "upgrade_configs": [{"upgrade_type": "CONNECT"}],
            "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [route]}]},
        }),
    );
    json!({
        "name": "terminate",
        "address": {"socket_address": {"address": address.ip().to_string(), "port_value": address.port()}},
        "filter_chains": [{"transport_socket": tls(folder, "Downstream"), "filters": [manager]}],
    })
}

/// Requests in them.
fn requests(folder: &Path) -> Value {
    let source = json!({"resource_api_version": "V3", "path_config_source": {
        "path": folder.join("routes.json"), "watched_directory": {"path": folder},
    }});
    let manager = http(
        "requests",
        &json!({"rds": {"route_config_name": "routes", "config_source": source}}),
    );
    json!({"name": "requests", "internal_listener": {}, "filter_chains": [{"filters": [manager]}]})
}

/// Tunnels out.
fn originate() -> Value {
    let proxy = json!({"name": "envoy.filters.network.tcp_proxy", "typed_config": {
        "@type": format!("{TYPES}.filters.network.tcp_proxy.v3.TcpProxy"),
        "stat_prefix": "originate",
        "cluster": "tunnels",
        "tunneling_config": {"hostname": format!("{BACKEND}:{BACKEND_PORT}")},
    }});
    json!({"name": "originate", "internal_listener": {}, "filter_chains": [{"filters": [proxy]}]})
}

fn endpoints(cluster: &str, address: &Value) -> Value {
    json!({"cluster_name": cluster, "endpoints": [{"lb_endpoints": [{"endpoint": {"address": address}}]}]})
}

fn internal(name: &str, listener: &str) -> Value {
    let address =
        json!({"envoy_internal_address": {"server_listener_name": listener, "endpoint_id": name}});
    json!({
        "name": name,
        "type": "STATIC",
        "load_assignment": endpoints(name, &address),
        "transport_socket": {"name": "envoy.transport_sockets.internal_upstream", "typed_config": {
            "@type": format!("{TYPES}.transport_sockets.internal_upstream.v3.InternalUpstreamTransport"),
            "transport_socket": {"name": "envoy.transport_sockets.raw_buffer", "typed_config": {
                "@type": format!("{TYPES}.transport_sockets.raw_buffer.v3.RawBuffer"),
            }},
        }},
    })
}

fn tunnels(folder: &Path) -> Value {
    let address =
        json!({"socket_address": {"address": BACKEND.to_string(), "port_value": HBONE_PORT}});
    json!({
        "name": "tunnels",
        "type": "STATIC",
        "load_assignment": endpoints("tunnels", &address),
        "transport_socket": tls(folder, "Upstream"),
        "typed_extension_protocol_options": {
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                "@type": format!("{TYPES}.upstreams.http.v3.HttpProtocolOptions"),
                "explicit_http_config": {"http2_protocol_options": {"allow_connect": true}},
            },
        },
    })
}
