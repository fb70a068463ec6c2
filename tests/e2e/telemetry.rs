//! What a waypoint tells, as OpenTelemetry's own collector hears it (tests/cluster/go/collector).

use std::{fs, os::unix::fs::PermissionsExt, path::Path};

use anyhow::{Context, Result, ensure};
use rig::{Options, cluster, yaml::pod};
use serde_json::Value;

use crate::waypoint::Shop;

/// The port of each way in, and the file that the collector writes what it hears there into.
const WAYS: [(&str, u16); 3] = [("grpc", 4317), ("http", 4318), ("zipkin", 9411)];

/// Every request is told, in every way that the collector knows.
const MESH_CONFIG: &str = "
extensionProviders:
- name: grpc
  opentelemetry: { service: collector.shop.svc.cluster.local, port: 4317 }
- name: http
  opentelemetry: { service: collector.shop.svc.cluster.local, port: 4318, http: { path: /v1/traces } }
- name: zipkin
  zipkin: { service: collector.shop.svc.cluster.local, port: 9411 }
- name: lines
  envoyOtelAls: { service: collector.shop.svc.cluster.local, port: 4317 }
defaultProviders: { tracing: [grpc, http, zipkin], accessLogging: [lines] }
defaultConfig: { tracing: { sampling: 100 } }
";

/// The collector's own configuration.
fn pipelines(folder: &Path) -> String {
    let file = |name: &str| folder.join(name).display().to_string();
    format!(
        "
receivers:
  otlp/grpc: {{ protocols: {{ grpc: {{ endpoint: '[::]:4317' }} }} }}
  otlp/http: {{ protocols: {{ http: {{ endpoint: '[::]:4318' }} }} }}
  zipkin: {{ endpoint: '[::]:9411' }}
exporters:
  file/grpc: {{ path: {} }}
  file/http: {{ path: {} }}
  file/zipkin: {{ path: {} }}
  file/lines: {{ path: {} }}
service:
  pipelines:
    traces/grpc: {{ receivers: [otlp/grpc], exporters: [file/grpc] }}
    traces/http: {{ receivers: [otlp/http], exporters: [file/http] }}
    traces/zipkin: {{ receivers: [zipkin], exporters: [file/zipkin] }}
    logs: {{ receivers: [otlp/grpc], exporters: [file/lines] }}
",
        file("grpc"),
        file("http"),
        file("zipkin"),
        file("lines"),
    )
}

fn service() -> String {
    let port = |(name, port): (&str, u16)| {
        let protocol = if name == "grpc" { "grpc" } else { "http" };
        format!("{{ name: {name}, port: {port}, appProtocol: {protocol} }}")
    };
    format!(
        "---
apiVersion: v1
kind: Service
metadata: {{ name: collector, namespace: shop, labels: {{ istio.io/use-waypoint: none }} }}
spec:
  selector: {{ app: collector }}
  ports: [{}]
",
        WAYS.map(port).join(", ")
    )
}

/// Every list called `name` at the end of `path`, in each line that the collector wrote into a file.
fn told(file: &Path, path: [&str; 3]) -> Vec<Value> {
    // It is there once something has been heard.
    let text = fs::read_to_string(file).unwrap_or_default();
    let documents = text.lines().filter_map(|it| serde_json::from_str(it).ok());
    path.iter()
        .fold(documents.collect(), |values: Vec<Value>, name| {
            let lists = values.iter().filter_map(|it| it[*name].as_array());
            lists.flatten().cloned().collect()
        })
}

fn attribute<'a>(of: &'a Value, name: &str) -> Option<&'a str> {
    let attributes = of["attributes"].as_array()?;
    let found = attributes.iter().find(|it| it["key"] == name)?;
    found["value"]["stringValue"].as_str()
}

#[test]
fn opentelemetrys_collector_hears_the_span_and_the_line_of_a_request() -> Result<()> {
    let collector = cluster::machine::made("collector")?;
    let options = Options {
        mesh_config: Some(MESH_CONFIG.to_owned()),
        ..Options::default()
    };
    let shop = Shop::open_with(&options, "")?;
    let program = shop.mesh.install(&collector.display().to_string())?;
    let folder = Path::new(&program).with_file_name("heard");
    fs::create_dir(&folder)?;
    // The pods' user writes there.
    fs::set_permissions(&folder, fs::Permissions::from_mode(0o777))?;
    let config = Path::new(&program).with_file_name("pipelines.yaml");
    fs::write(&config, pipelines(&folder))?;
    fs::set_permissions(&config, fs::Permissions::from_mode(0o644))?;
    let command = format!("[{program}, --config, {}]", config.display());
    let yaml = [pod("shop", "collector", "node2", &command), service()];
    shop.mesh.write("collector.yaml", &yaml.concat())?;
    for (way, _) in WAYS {
        let span = shop.mesh.eventually(&format!("a span comes by {way}"), || {
            // Those before the collector ran were told to nobody.
            shop.get(
                "shop/client",
                "v1",
                "/traced",
                &["--header", "x-request-id: traced"],
            )?;
            let spans = told(&folder.join(way), ["resourceSpans", "scopeSpans", "spans"]);
            let ours =
                |it: &&Value| attribute(it, "http.url").is_some_and(|it| it.ends_with("/traced"));
            spans
                .iter()
                .find(ours)
                .cloned()
                .with_context(|| shop.mesh.logs("shop/collector").unwrap_or_default())
        });
        let name = span["name"].as_str().unwrap_or_default();
        ensure!(
            name.starts_with("v1.shop.svc.cluster.local:80"),
            "{way}: {span}"
        );
        ensure!(span["kind"] == 2, "{way}: of a server: {span}");
        for (key, value) in [("http.status_code", "200"), ("istio.namespace", "shop")] {
            ensure!(attribute(&span, key) == Some(value), "{way}: {key}: {span}");
        }
        for id in [&span["traceId"], &span["spanId"]] {
            ensure!(
                id.as_str().is_some_and(|it| !it.is_empty()),
                "{way}: {span}"
            );
        }
    }
    shop.mesh.eventually("a line of the access log comes", || {
        let path = ["resourceLogs", "scopeLogs", "logRecords"];
        let lines = told(&folder.join("lines"), path);
        let body = |it: &Value| it["body"]["stringValue"].as_str().map(str::to_owned);
        let mut bodies = lines.iter().filter_map(body);
        let found = bodies.find(|it| it.contains("\"GET /traced HTTP/1.1\" 200"));
        found.context("none yet")
    });
    Ok(())
}
