//! Compression of what scrapers get: a node's metrics are text of many megabytes that says the same over and over.

use std::io::{self, Write};

use axum::{
    http::{HeaderMap, HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use flate2::{Compression, write::GzEncoder};

/// Whether a client takes gzip: RFC 9110, 12.5.3. A weight of 0 says that it does not.
pub(super) fn accepts_gzip(headers: &HeaderMap) -> bool {
    let values = headers.get_all(header::ACCEPT_ENCODING).iter();
    let values = values.filter_map(|value| value.to_str().ok());
    let codings = values.flat_map(|value| value.split(','));
    // What is named counts more than the rest.
    let mut rest = false;
    for (name, accepted) in codings.map(coding) {
        match name.as_str() {
            "gzip" | "x-gzip" => return accepted,
            "*" => rest = accepted,
            _ => {}
        }
    }
    rest
}

/// The name of a coding in lower case, and whether its weight is above 0.
fn coding(text: &str) -> (String, bool) {
    let mut parts = text.split(';').map(str::trim);
    let name = parts.next().unwrap_or_default().to_ascii_lowercase();
    let weight = parts.find_map(|part| part.strip_prefix("q=")?.parse::<f32>().ok());
    (name, weight.is_none_or(|weight| weight > 0.0))
}

/// The body in gzip, made off the runtime.
pub(super) async fn gzipped(body: String) -> Response {
    match tokio::task::spawn_blocking(move || gzip(body.as_bytes())).await {
        Ok(Ok(bytes)) => {
            let encoding = (header::CONTENT_ENCODING, HeaderValue::from_static("gzip"));
            ([encoding], bytes).into_response()
        }
        Ok(Err(error)) => failed(&error),
        Err(error) => failed(&error),
    }
}

/// The fastest level: this text is a tenth of its size with any.
fn gzip(body: &[u8]) -> io::Result<Vec<u8>> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(body)?;
    encoder.finish()
}

fn failed(error: &dyn std::error::Error) -> Response {
    let text = format!("cannot compress metrics: {error}\n");
    (StatusCode::INTERNAL_SERVER_ERROR, text).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn accepts(value: &'static str) -> bool {
        let value = HeaderValue::from_static(value);
        accepts_gzip(&HeaderMap::from_iter([(header::ACCEPT_ENCODING, value)]))
    }

    #[test]
    fn gzip_is_taken_where_it_is_named_or_all_is() {
        for value in ["gzip", "deflate, GZIP;q=0.5", "*", "br, *;q=0.1"] {
            assert!(accepts(value), "{value}");
        }
        assert!(!accepts_gzip(&HeaderMap::new()));
        for value in ["", "identity", "gzip;q=0", "gzip; q=0.0, *", "*;q=0", "br"] {
            assert!(!accepts(value), "{value}");
        }
    }
}
