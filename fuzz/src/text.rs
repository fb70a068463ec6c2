//! Texts of peers: the head of a CONNECT, its metadata, and the names in certificates.

use http::{HeaderMap, HeaderName, HeaderValue};
use mesh::{
    authority::Authority,
    headers::{self, Baggage, Traceparent},
    identity::Identity,
};

use crate::text_of;

/// The longest value that may become a metric's label.
const MAX_LABEL: usize = 253;

/// One baggage header. What is taken can be written and is read as the same again, and no label is too long.
pub fn baggage(bytes: &[u8]) {
    let Some(text) = text_of(bytes) else { return };
    check_baggage(&Baggage::parse([text]));
}

fn check_baggage(read: &Baggage) {
    let texts = [
        &read.cluster,
        &read.namespace,
        &read.workload_name,
        &read.service_name,
        &read.service_version,
        &read.region,
        &read.zone,
    ];
    for text in texts.into_iter().flatten() {
        assert!(!text.is_empty() && text.len() <= MAX_LABEL, "{text:?}");
    }
    let again = Baggage::parse([read.to_string().as_str()]);
    // The type is written with the name alone.
    let expected = match read.workload_name {
        Some(_) => read.clone(),
        None => Baggage {
            workload_type: again.workload_type,
            ..read.clone()
        },
    };
    assert_eq!(again, expected);
}

/// One Forwarded header. A host that is taken is what we would write for it.
pub fn forwarded(bytes: &[u8]) {
    let Some(text) = text_of(bytes) else { return };
    let Some(host) = headers::forwarded_host(text) else {
        return;
    };
    assert!(!host.is_empty() && host.is_ascii(), "{host:?}");
    let client = ([127, 0, 0, 1], 1).into();
    let written = headers::forwarded(client, Some(&host));
    assert_eq!(headers::forwarded_host(&written), Some(host), "{written:?}");
}

/// The head of a CONNECT: its authority in the first line, then a header in each.
pub fn hbone_request(bytes: &[u8]) {
    let mut lines = bytes.split(|byte| *byte == b'\n');
    if let Some(text) = lines.next().and_then(text_of)
        && let Ok(authority) = text.parse::<Authority>()
    {
        check_authority(&authority);
    }
    let mut map = HeaderMap::new();
    for line in lines.take(32) {
        let at = line.iter().position(|byte| *byte == b':');
        let Some((name, value)) = at.map(|at| (&line[..at], &line[at + 1..])) else {
            continue;
        };
        if let (Ok(name), Ok(value)) =
            (HeaderName::from_bytes(name), HeaderValue::from_bytes(value))
        {
            map.append(name, value);
        }
    }
    check_metadata(&map);
}

fn check_authority(authority: &Authority) {
    assert!(authority.port() > 0, "{authority}");
    assert_eq!(authority.to_string().parse().as_ref(), Ok(authority));
    let written = http::uri::Authority::try_from(authority.to_string());
    assert!(written.is_ok(), "{authority} cannot stand in a request");
}

/// What a server reads of the headers of a CONNECT.
pub(crate) fn check_metadata(map: &HeaderMap) {
    let texts = |name| map.get_all(name).iter().filter_map(|it| it.to_str().ok());
    check_baggage(&Baggage::parse(texts(headers::BAGGAGE)));
    for text in texts(headers::FORWARDED) {
        forwarded(text.as_bytes());
    }
    for context in texts(headers::TRACEPARENT).filter_map(Traceparent::parse) {
        let written = context.to_string();
        assert_eq!(Traceparent::parse(&written), Some(context));
    }
}

/// The URI of a certificate. What is taken has one spelling, and no two texts mean the same identity.
pub fn spiffe(bytes: &[u8]) {
    let Some(text) = text_of(bytes) else { return };
    let Ok(identity) = text.parse::<Identity>() else {
        return;
    };
    assert_eq!(identity.to_string(), text);
    assert_eq!(format!("spiffe://{}", identity.principal()), text);
    assert_eq!(text.parse().as_ref(), Ok(&identity));
    assert!(text.len() <= 2048 && text.is_ascii(), "{text:?}");
}
