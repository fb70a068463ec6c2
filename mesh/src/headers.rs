//! The metadata of a CONNECT request, written and read (node-tunnel 2.4): baggage, Forwarded, traceparent.
//!
//! None of it proves anything: identity comes from TLS alone. Readers take what they understand and ignore the rest.

use std::{
    fmt::{self, Write as _},
    net::SocketAddr,
};

use serde::Serialize;

use crate::{
    names::Str,
    workload::{Workload, WorkloadType},
};

/// Header name (W3C Baggage).
pub const BAGGAGE: &str = "baggage";
/// Header name (RFC 7239).
pub const FORWARDED: &str = "forwarded";
/// Header name (W3C Trace Context).
pub const TRACEPARENT: &str = "traceparent";
/// Header name: the sender's network, on the inner request of double HBONE.
pub const FORWARDED_NETWORK: &str = "x-forwarded-network";
/// Header name: what kind of proxy sent the outer request.
pub const ISTIO_SOURCE: &str = "x-istio-source";

/// The longest name in Kubernetes (RFC 1123 subdomain).
const MAX_VALUE: usize = 253;

/// The longest address with a port, and what is around it in a Forwarded header.
const MAX_CLIENT: usize = r#"for="[ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff]:65535""#.len();

/// Characters of a traceparent header.
const TRACEPARENT_LENGTH: usize = 55;

/// What one end tells of itself, for the other's telemetry. `None`: not told.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize)]
pub struct Baggage {
    /// `k8s.cluster.name`.
    pub cluster: Option<Str>,
    /// `k8s.namespace.name`.
    pub namespace: Option<Str>,
    /// What `workload_name` names.
    pub workload_type: WorkloadType,
    /// `k8s.deployment.name` or another type's.
    pub workload_name: Option<Str>,
    /// `service.name`: the canonical service.
    pub service_name: Option<Str>,
    /// `service.version`: the canonical revision.
    pub service_version: Option<Str>,
    /// `cloud.region`.
    pub region: Option<Str>,
    /// `cloud.availability_zone`.
    pub zone: Option<Str>,
}

impl From<&Workload> for Baggage {
    fn from(workload: &Workload) -> Self {
        Self {
            cluster: told(&workload.cluster_id),
            namespace: told(&workload.namespace),
            workload_type: workload.workload_type,
            workload_name: told(workload.workload_name()),
            service_name: told(&workload.canonical_name),
            service_version: told(&workload.canonical_revision),
            region: told(&workload.locality.region),
            zone: told(&workload.locality.zone),
        }
    }
}

fn told(text: &Str) -> Option<Str> {
    (!text.is_empty()).then(|| text.clone())
}

fn type_key(kind: WorkloadType) -> &'static str {
    match kind {
        WorkloadType::Deployment => "k8s.deployment.name",
        WorkloadType::CronJob => "k8s.cronjob.name",
        WorkloadType::Pod => "k8s.pod.name",
        WorkloadType::Job => "k8s.job.name",
    }
}

impl fmt::Display for Baggage {
    /// Without escapes, as peers read it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let members = [
            ("k8s.cluster.name", &self.cluster),
            ("k8s.namespace.name", &self.namespace),
            (type_key(self.workload_type), &self.workload_name),
            ("service.name", &self.service_name),
            ("service.version", &self.service_version),
            ("cloud.region", &self.region),
            ("cloud.availability_zone", &self.zone),
        ];
        let mut separator = "";
        for (key, value) in members {
            if let Some(value) = value {
                write!(f, "{separator}{key}={value}")?;
                separator = ",";
            }
        }
        Ok(())
    }
}

impl Baggage {
    /// Reads all baggage headers of a request. Unknown members are ignored, and so are values longer than any
    /// Kubernetes name, since these texts become metric labels; the last of a kind counts.
    pub fn parse<'a>(headers: impl IntoIterator<Item = &'a str>) -> Self {
        let members = headers.into_iter().flat_map(|header| header.split(','));
        let mut baggage = Self::default();
        let members = members.filter_map(|member| member.split_once('='));
        for (key, value) in members.filter(|(_, value)| value.len() <= MAX_VALUE) {
            baggage.take(key.trim(), value.trim());
        }
        baggage
    }

    fn take(&mut self, key: &str, value: &str) {
        let field = match key {
            "k8s.cluster.name" => &mut self.cluster,
            "k8s.namespace.name" => &mut self.namespace,
            "service.name" => &mut self.service_name,
            "service.version" => &mut self.service_version,
            "cloud.region" => &mut self.region,
            "cloud.availability_zone" => &mut self.zone,
            other => return self.take_workload(other, value),
        };
        *field = (!value.is_empty()).then(|| value.into());
    }

    fn take_workload(&mut self, key: &str, value: &str) {
        use WorkloadType::{CronJob, Deployment, Job, Pod};
        let kinds = [Deployment, CronJob, Pod, Job];
        if let Some(kind) = kinds.into_iter().find(|kind| type_key(*kind) == key) {
            self.workload_type = kind;
            self.workload_name = (!value.is_empty()).then(|| value.into());
        }
    }
}

/// Writes a Forwarded header: the client, and the service that it addressed.
pub fn forwarded(client: SocketAddr, service: Option<&str>) -> String {
    let room = MAX_CLIENT + service.map_or(0, |host| ";host=".len() + host.len());
    let (text, host) = (String::with_capacity(room), service.unwrap_or_default());
    let separator = if service.is_some() { ";host=" } else { "" };
    written(text, format_args!("for=\"{client}\"{separator}{host}"))
}

fn written(mut text: String, what: fmt::Arguments<'_>) -> String {
    text.write_fmt(what).expect("a text takes everything");
    text
}

/// Reads the service's host name of a Forwarded header: the first `host=`, with quotes or without; visible
/// ASCII only.
pub fn forwarded_host(header: &str) -> Option<Str> {
    let pairs = header.split([';', ',']).filter_map(|it| it.split_once('='));
    let mut hosts = pairs.filter(|(key, _)| key.trim().eq_ignore_ascii_case("host"));
    let value = hosts.next()?.1.trim();
    let quoted = value.strip_prefix('"').and_then(|it| it.strip_suffix('"'));
    let host = quoted.unwrap_or(value);
    let visible = host.bytes().all(|b| b.is_ascii_graphic() && b != b'"');
    (!host.is_empty() && visible).then(|| host.into())
}

/// A W3C trace context, unsampled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Traceparent {
    trace: u128,
    span: u64,
    flags: u8,
}

impl Traceparent {
    /// A context of this randomness, which the effects layer draws. All zeros are not allowed and become ones.
    pub fn new(trace: u128, span: u64) -> Self {
        Self {
            trace: trace.max(1),
            span: span.max(1),
            flags: 0,
        }
    }

    /// Reads a header of version 00, which has exactly 55 characters.
    pub fn parse(header: &str) -> Option<Self> {
        let rest = header
            .strip_prefix("00-")
            .filter(|_| header.len() == TRACEPARENT_LENGTH)?;
        let mut pieces = rest.split('-');
        let (trace, span, flags) = (pieces.next()?, pieces.next()?, pieces.next()?);
        let sizes = (trace.len(), span.len(), flags.len()) == (32, 16, 2);
        let hex = |text: &str| text.bytes().all(|b| b.is_ascii_hexdigit());
        if !sizes || pieces.next().is_some() || ![trace, span, flags].into_iter().all(hex) {
            return None;
        }
        let parsed = Self {
            trace: u128::from_str_radix(trace, 16).ok()?,
            span: u64::from_str_radix(span, 16).ok()?,
            flags: u8::from_str_radix(flags, 16).ok()?,
        };
        (parsed.trace > 0 && parsed.span > 0).then_some(parsed)
    }

    /// The header.
    pub fn header(&self) -> String {
        let text = String::with_capacity(TRACEPARENT_LENGTH);
        written(text, format_args!("{self}"))
    }

    /// The trace.
    pub fn trace_id(&self) -> TraceId {
        TraceId(self.trace.to_be_bytes())
    }
}

/// A trace, written as it stands in logs: 32 hexadecimal digits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct TraceId([u8; 16]);

impl fmt::Display for TraceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", u128::from_be_bytes(self.0))
    }
}

impl fmt::Display for Traceparent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "00-{:032x}-{:016x}-{:02x}",
            self.trace, self.span, self.flags
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn web() -> Baggage {
        Baggage {
            cluster: Some("Kubernetes".into()),
            namespace: Some("default".into()),
            workload_type: WorkloadType::Deployment,
            workload_name: Some("web-v1".into()),
            service_name: Some("web".into()),
            service_version: Some("v1".into()),
            region: Some("r".into()),
            zone: Some("z".into()),
        }
    }

    const WEB: &str = "k8s.cluster.name=Kubernetes,k8s.namespace.name=default,k8s.deployment.name=web-v1,\
        service.name=web,service.version=v1,cloud.region=r,cloud.availability_zone=z";

    #[test]
    fn baggage_is_written_and_read_as_peers_do() {
        assert_eq!(web().to_string(), WEB);
        assert_eq!(Baggage::parse([WEB]), web());
        assert_eq!(Baggage::default().to_string(), "");
    }

    #[test]
    fn baggage_may_be_spread_over_headers_and_hold_what_we_do_not_know() {
        let parsed = Baggage::parse([
            "x=y,k8s.pod.name=p",
            "junk",
            "service.name=,cloud.region= r",
        ]);
        let expected = Baggage {
            workload_type: WorkloadType::Pod,
            workload_name: Some("p".into()),
            region: Some("r".into()),
            ..Baggage::default()
        };
        assert_eq!(parsed, expected);
    }

    #[test]
    fn baggage_that_no_object_could_have_is_ignored() {
        let long = format!("service.name={}", "x".repeat(254));
        assert_eq!(Baggage::parse([long.as_str()]), Baggage::default());
    }

    /// Texts made of the characters that the parsers look for.
    #[test]
    fn no_text_of_a_peer_breaks_a_parser() {
        let alphabet: Vec<_> = "=,;:-.\"[]0a19 +\u{fc}\u{0}host".chars().collect();
        let mut draw = crate::draw::Draw(1);
        for _ in 0..20_000 {
            let text: String = (0..24)
                .map(|_| {
                    let (now, later) = draw.split();
                    draw = later;
                    let at = now.below(alphabet.len().try_into().unwrap()).unwrap();
                    alphabet[usize::try_from(at).unwrap()]
                })
                .collect();
            let _ = Baggage::parse([text.as_str()]);
            let _ = forwarded_host(&text);
            let _ = Traceparent::parse(&text);
            if let Ok(authority) = text.parse::<crate::authority::Authority>() {
                assert_eq!(authority.to_string().parse(), Ok(authority));
            }
        }
    }

    #[test]
    fn forwarded_names_the_client_and_the_service() {
        let v4 = "127.0.0.1:80".parse().unwrap();
        let v6 = "[::1]:80".parse().unwrap();
        assert_eq!(forwarded(v4, None), r#"for="127.0.0.1:80""#);
        let written = forwarded(v6, Some("example.com"));
        assert_eq!(written, r#"for="[::1]:80";host=example.com"#);
        assert_eq!(forwarded_host(&written).as_deref(), Some("example.com"));
    }

    #[test]
    fn the_first_host_of_a_forwarded_header_counts() {
        #[track_caller]
        fn check(header: &str, expected: Option<&str>) {
            assert_eq!(forwarded_host(header).as_deref(), expected, "{header}");
        }
        check("host=a", Some("a"));
        check(r#"for=x; Host="a.b" ;host=c"#, Some("a.b"));
        check("for=x", None);
        check("host=", None);
        check(r#"host="""#, None);
        check("host=b\u{fc}cher", None);
        check("host=\"a.b \"", None);
        check("host=\"a", None);
        check("", None);
    }

    #[test]
    fn a_trace_context_round_trips() {
        let text = Traceparent::new(0xabc, 0x12).header();
        assert_eq!(
            text,
            "00-00000000000000000000000000000abc-0000000000000012-00"
        );
        assert_eq!(
            Traceparent::parse(&text),
            Some(Traceparent::new(0xabc, 0x12))
        );
    }

    #[test]
    fn a_trace_context_of_another_form_is_none() {
        for text in [
            "",
            "00-00000000000000000000000000000abc-0000000000000012-0",
            "01-00000000000000000000000000000abc-0000000000000012-00",
            "00-00000000000000000000000000000000-0000000000000012-00",
            "00-0000000000000000000000000000+abc-0000000000000012-00",
            "00-00000000000000000000000000000abc-000000000000001200-",
        ] {
            assert_eq!(Traceparent::parse(text), None, "{text:?}");
        }
    }
}
