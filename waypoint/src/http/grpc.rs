//! What of gRPC over HTTP/2 a proxy reads: statuses, time-outs, the boundaries of messages.

use std::time::Duration;

use http::{HeaderMap, HeaderName};

/// `grpc-timeout`.
pub(super) const TIMEOUT: HeaderName = HeaderName::from_static("grpc-timeout");

/// The status that headers or trailers tell.
pub(super) fn status(headers: &HeaderMap) -> Option<u16> {
    let value = headers.get(super::reply::GRPC_STATUS)?;
    value.to_str().ok()?.parse().ok()
}

/// How long the client gives the call: up to 8 digits and a unit.
pub(super) fn timeout(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get(TIMEOUT)?.to_str().ok()?;
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.is_empty() || digits.len() > 8 || !digits.bytes().all(|it| it.is_ascii_digit()) {
        return None;
    }
    let amount: u64 = digits.parse().ok()?;
    match unit {
        "H" => Some(Duration::from_secs(amount * 3600)),
        "M" => Some(Duration::from_secs(amount * 60)),
        "S" => Some(Duration::from_secs(amount)),
        "m" => Some(Duration::from_millis(amount)),
        "u" => Some(Duration::from_micros(amount)),
        "n" => Some(Duration::from_nanos(amount)),
        _ => None,
    }
}

/// Counts messages in a stream of data by their five-byte prefixes, without looking into them.
#[derive(Clone, Debug, Default)]
pub(crate) struct MessageCounter {
    /// Of the prefix that is being read.
    prefix: [u8; 5],
    read: usize,
    /// Bytes of the message that are still to come.
    rest: u64,
}

impl MessageCounter {
    /// How many messages begin in `data`, which follows what was counted before.
    pub(crate) fn count(&mut self, mut data: &[u8]) -> u64 {
        let mut messages = 0;
        while !data.is_empty() {
            if self.rest > 0 {
                let skipped = usize::try_from(self.rest)
                    .unwrap_or(usize::MAX)
                    .min(data.len());
                self.rest -= skipped as u64;
                data = &data[skipped..];
                continue;
            }
            let taken = (5 - self.read).min(data.len());
            self.prefix[self.read..self.read + taken].copy_from_slice(&data[..taken]);
            self.read += taken;
            data = &data[taken..];
            if self.read == 5 {
                let [_, a, b, c, d] = self.prefix;
                self.rest = u64::from(u32::from_be_bytes([a, b, c, d]));
                self.read = 0;
                messages += 1;
            }
        }
        messages
    }
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    #[test]
    fn messages_are_counted_however_they_are_cut() {
        let stream = [
            &[0, 0, 0, 0, 3][..],
            b"abc",
            &[0, 0, 0, 0, 0],
            &[1, 0, 0, 0, 1],
            b"x",
        ]
        .concat();
        for size in 1..=stream.len() {
            let mut counter = MessageCounter::default();
            let messages: u64 = stream.chunks(size).map(|it| counter.count(it)).sum();
            assert_eq!(messages, 3, "in pieces of {size}");
        }
    }

    #[test]
    fn timeouts_are_read_by_their_unit() {
        let rows = [
            ("1S", Some(Duration::from_secs(1))),
            ("250m", Some(Duration::from_millis(250))),
            ("2H", Some(Duration::from_secs(7200))),
            ("99999999n", Some(Duration::from_nanos(99_999_999))),
            ("100000000S", None),
            ("S", None),
            ("-1S", None),
            ("1x", None),
            ("", None),
        ];
        for (text, expected) in rows {
            let mut headers = HeaderMap::new();
            headers.insert(TIMEOUT, HeaderValue::from_static(text));
            assert_eq!(timeout(&headers), expected, "{text:?}");
        }
    }
}
