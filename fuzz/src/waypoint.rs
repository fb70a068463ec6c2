//! What a waypoint is told and asked: routes, formats, expressions, paths, first bytes.

use std::{
    borrow::Cow,
    time::{Duration, SystemTime},
};

use http::{HeaderMap, HeaderValue, Method, header};
use mesh::{
    identity::Identity,
    l7::{
        config::{LogFormat, Normalization},
        dump,
        expression::Expression,
        log_format::{Format, Nowhere},
        path::normalize,
        record::RequestRecord,
        request::{ConnectionFacts, RequestFacts},
        sniff::{self, Sniffed},
        view::{Resource, Update, View},
    },
};
use prost::Message;
use proto::{waypoint as wire, xds::DeltaDiscoveryResponse};

use crate::text_of;

/// A delta response of a waypoint's resources. Each survives being written and read, every table decides on requests,
/// and names remove what they name.
pub fn routes(bytes: &[u8]) {
    let Ok(response) = DeltaDiscoveryResponse::decode(bytes) else {
        return;
    };
    let bodies = response
        .resources
        .iter()
        .filter_map(|it| it.resource.as_ref());
    let upserts: Vec<Resource> = bodies.filter_map(|any| resource(&any.value)).collect();
    let names: Vec<_> = upserts.iter().map(Resource::name).collect();
    let mut view = View::default();
    view.apply(Update {
        upserts,
        removals: Vec::new(),
    });
    let dumped = dump::dump(&view);
    let read = dump::read(&dumped).expect("what is dumped can be read");
    assert_eq!(dump::dump(&read).len(), dumped.len());
    decide(&view);
    view.apply(Update {
        upserts: Vec::new(),
        removals: names.into_iter().map(Into::into).collect(),
    });
    let left = dump::dump(&view);
    assert!(left.is_empty(), "{:?}", left[0].name);
}

fn resource(bytes: &[u8]) -> Option<Resource> {
    let wire = wire::Resource::decode(bytes).ok()?;
    let resource = Resource::try_from(wire).ok()?;
    let again = Resource::try_from(wire::Resource::from(&resource));
    assert_eq!(again.as_ref(), Ok(&resource));
    Some(resource)
}

fn decide(view: &View) {
    let identity: Identity = "spiffe://cluster.local/ns/a/sa/b"
        .parse()
        .expect("an identity");
    let headers = HeaderMap::from_iter([(
        header::CONTENT_TYPE,
        HeaderValue::from_static("application/grpc"),
    )]);
    let attached = view.routes().flat_map(|route| &route.attachments);
    for attachment in attached {
        let connection = ConnectionFacts {
            service: Some(&attachment.service),
            port: attachment.port.unwrap_or(80),
            destination: [10, 0, 0, 1].into(),
            source: ([10, 0, 0, 2], 4000).into(),
            identity: Some(&identity),
            source_labels: None,
            sni: Some("a.example"),
        };
        let table = view.routes_of(&attachment.service);
        assert!(table.is_some(), "{} has a route", attachment.service);
        for (method, path, query) in [
            (Method::GET, "/", None),
            (Method::POST, "/a/b", Some("x=1&y")),
        ] {
            let _ = view.select(&RequestFacts {
                connection,
                method: &method,
                scheme: "http",
                authority: "a.example:80",
                path,
                query,
                headers: &headers,
                remote: [10, 0, 0, 2].into(),
                claims: None,
                http2: true,
            });
        }
        let _ = view.select_tls(&connection);
        let _ = view.select_tcp(&connection);
        let _ = view.treats_as_tcp(&connection);
    }
}

/// A format of the access log. JSON lines are JSON, whatever the request held.
pub fn log_format(bytes: &[u8]) {
    let Some(text) = text_of(bytes) else { return };
    let records = [RequestRecord::default(), record(text)];
    let (key, template) = text.split_once('\n').unwrap_or(("key", text));
    let json = LogFormat::Json(vec![(key.into(), template.into())]);
    for format in [LogFormat::Text(text.into()), json] {
        let Ok(format) = Format::new(&format, &Nowhere) else {
            continue;
        };
        for record in &records {
            let mut line = String::new();
            format.render(record, &mut line);
            if let Format::Json(_) = format {
                let read = serde_json::from_str::<serde_json::Value>(&line);
                assert!(read.is_ok(), "{line:?}");
            }
            let _ = format.fields(record);
        }
    }
}

/// A request that holds `text` wherever a client can put one.
fn record(text: &str) -> RequestRecord {
    let value = HeaderValue::from_bytes(text.as_bytes());
    let value = value.unwrap_or_else(|_| HeaderValue::from_static("probe/1"));
    RequestRecord {
        path: text.to_owned(),
        original_path: Some(format!("/{text}")),
        authority: text.to_owned(),
        scheme: Cow::Owned(text.to_owned()),
        start: SystemTime::UNIX_EPOCH + Duration::from_millis(1_767_323_045_678),
        client: Some(([10, 0, 0, 9], 40_000).into()),
        request_headers: HeaderMap::from_iter([(header::USER_AGENT, value)]),
        status: Some(503),
        duration: Some(Duration::from_millis(1500)),
        ..RequestRecord::default()
    }
}

/// An expression of a telemetry filter or a tag. What parses is evaluated, and means the same when parsed again.
pub fn expression(bytes: &[u8]) {
    let Some(text) = text_of(bytes) else { return };
    let Ok(expression) = Expression::parse(text) else {
        return;
    };
    let again = Expression::parse(expression.source()).expect("what parsed parses");
    for record in [RequestRecord::default(), record("/api/v1")] {
        let value = expression.evaluate(&record).map(|it| it.to_string());
        let same = again.evaluate(&record).map(|it| it.to_string());
        assert_eq!(value, same, "{text:?}");
        let _ = expression.holds(&record);
    }
}

/// A path of a request. What is normal stays as it is when normalised again.
pub fn path(bytes: &[u8]) {
    let Some(text) = text_of(bytes) else { return };
    for how in [
        Normalization::None,
        Normalization::Base,
        Normalization::MergeSlashes,
        Normalization::DecodeAndMergeSlashes,
    ] {
        let Ok(normal) = normalize(text, how) else {
            continue;
        };
        assert!(normal == "*" || normal.starts_with('/'), "{normal:?}");
        let again = normalize(&normal, how);
        assert_eq!(again.as_deref(), Ok(&*normal), "{text:?} {how:?}");
    }
}

/// The first bytes of a connection. A decision that was taken early stands when more is seen, and none waits forever.
pub fn sniff(bytes: &[u8]) {
    for sniff in [sniff::sniff, sniff::sniff_http, sniff::sniff_tls] {
        let whole = sniff(bytes);
        for end in 0..bytes.len().min(256) {
            let early = sniff(&bytes[..end]);
            assert!(
                early == Sniffed::More || early == whole,
                "{end}: {early:?}, then {whole:?}"
            );
        }
        if bytes.len() >= sniff::MAX_BYTES {
            assert_ne!(whole, Sniffed::More);
        }
    }
}
