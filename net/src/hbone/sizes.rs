//! The sizes of HTTP/2 that operators set, the same variables for every proxy.

use serde::Serialize;

use super::Config;
use crate::settings::Reader;

/// What RFC 9113 6.9.1 lets a window be; the first is what it is before anyone says anything.
const WINDOW: std::ops::RangeInclusive<u32> = 65_535..=0x7fff_ffff;
/// RFC 9113 6.5.2, of SETTINGS_MAX_FRAME_SIZE.
const FRAME: std::ops::RangeInclusive<u32> = 16_384..=16_777_215;

const STREAM_WINDOW: &str = "HTTP2_STREAM_WINDOW_SIZE";
const CONNECTION_WINDOW: &str = "HTTP2_CONNECTION_WINDOW_SIZE";
const FRAME_SIZE: &str = "HTTP2_FRAME_SIZE";

/// Bytes in flight toward us.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Sizes {
    /// On one stream (`HTTP2_STREAM_WINDOW_SIZE`).
    pub stream_window_size: u32,
    /// On one connection (`HTTP2_CONNECTION_WINDOW_SIZE`); at least one stream's.
    pub connection_window_size: u32,
    /// Whether the connection's window grows with its streams: where nobody has said how large it is to be.
    pub connection_window_grows: bool,
    /// In one frame (`HTTP2_FRAME_SIZE`).
    pub frame_size: u32,
}

impl Sizes {
    /// As the variables say; what cannot be is rejected by name.
    pub fn read(read: &mut Reader<'_>) -> Self {
        let default = Config::default();
        let stream_window_size = read.parse_or(STREAM_WINDOW, default.stream_window_bytes);
        let asked: Option<u32> = read.parse(CONNECTION_WINDOW);
        let unasked = default.connection_window_bytes.max(stream_window_size);
        let sizes = Self {
            stream_window_size,
            connection_window_size: asked.unwrap_or(unasked),
            connection_window_grows: asked.is_none(),
            frame_size: read.parse_or(FRAME_SIZE, default.frame_bytes),
        };
        sizes.check(read);
        sizes
    }

    fn check(&self, read: &mut Reader<'_>) {
        if !FRAME.contains(&self.frame_size) {
            let expected = format!("{} to {} bytes expected", FRAME.start(), FRAME.end());
            read.reject(FRAME_SIZE, expected);
        }
        let (stream, connection) = (self.stream_window_size, self.connection_window_size);
        let windows = [(STREAM_WINDOW, stream), (CONNECTION_WINDOW, connection)];
        let bad = windows.into_iter().filter(|(_, it)| !WINDOW.contains(it));
        let bad: Vec<_> = bad.map(|(name, _)| name).collect();
        for name in &bad {
            let expected = format!("{} to {} bytes expected", WINDOW.start(), WINDOW.end());
            read.reject(name, expected);
        }
        // One stream could then never have what it is told that it has.
        if bad.is_empty() && connection < stream {
            let problem =
                format!("{connection} bytes are less than {STREAM_WINDOW}, which is {stream}");
            read.reject(CONNECTION_WINDOW, problem);
        }
    }
}

impl Config {
    /// With the sizes that operators set.
    pub fn sized(sizes: &Sizes) -> Self {
        let default = Self::default();
        Self {
            stream_window_bytes: sizes.stream_window_size,
            connection_window_bytes: sizes.connection_window_size,
            max_connection_window_bytes: match sizes.connection_window_grows {
                true => default.max_connection_window_bytes,
                false => sizes.connection_window_size,
            },
            frame_bytes: sizes.frame_size,
            ..default
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{hbone::connection::window_for, settings::ConfigError};

    fn read(settings: &[(&str, &str)]) -> Result<Config, ConfigError> {
        let find = |name: &str| {
            let found = settings.iter().find(|(key, _)| *key == name);
            found.map(|(_, text)| (*text).to_owned())
        };
        let mut read = Reader::new(&find, &[]);
        let config = Config::sized(&Sizes::read(&mut read));
        read.finish(config)
    }

    #[test]
    fn sizes_that_nobody_sets_are_the_usual_ones() {
        assert_eq!(read(&[]), Ok(Config::default()));
    }

    #[test]
    fn the_connections_window_is_what_was_asked_for_however_many_its_streams() {
        for asked in ["4194304", "5000000", "16777216", "2147483647"] {
            let config = read(&[(CONNECTION_WINDOW, asked)]).unwrap();
            for streams in [0, 1, 8, 200, usize::MAX] {
                let window = window_for(&config, streams).to_string();
                assert_eq!(window, asked, "{streams} streams");
            }
        }
    }

    #[test]
    fn a_connections_window_that_nobody_asked_for_grows_with_its_streams() {
        const MIB: u32 = 1 << 20;
        let config = read(&[]).unwrap();
        let grown = [(0, 32), (7, 32), (8, 64), (24, 128), (200, 128)];
        for (streams, expected) in grown {
            assert_eq!(window_for(&config, streams), expected * MIB, "{streams}");
        }
        let large = read(&[(STREAM_WINDOW, "300000000")]).unwrap();
        assert_eq!(window_for(&large, 1), 300_000_000, "one stream at least");
    }

    #[test]
    fn a_connections_window_below_a_streams_is_an_error_that_names_both() {
        for (settings, problem) in [
            (
                &[(CONNECTION_WINDOW, "4194303")][..],
                "4194303 bytes are less than HTTP2_STREAM_WINDOW_SIZE, which is 4194304",
            ),
            (
                &[(CONNECTION_WINDOW, "65535"), (STREAM_WINDOW, "65536")],
                "65535 bytes are less than HTTP2_STREAM_WINDOW_SIZE, which is 65536",
            ),
        ] {
            let ConfigError(bad) = read(settings).unwrap_err();
            let [bad] = &bad[..] else { panic!("{bad:?}") };
            assert_eq!((&*bad.name, &*bad.problem), (CONNECTION_WINDOW, problem));
        }
    }

    #[test]
    fn sizes_that_http2_does_not_have_are_refused_by_name() {
        for (name, text) in [
            (STREAM_WINDOW, "65534"),
            (CONNECTION_WINDOW, "2147483648"),
            (FRAME_SIZE, "16383"),
            (FRAME_SIZE, "16777216"),
        ] {
            let ConfigError(bad) = read(&[(name, text)]).unwrap_err();
            let names: Vec<_> = bad.iter().map(|it| &*it.name).collect();
            assert_eq!(names, [name], "{text}");
        }
    }
}
