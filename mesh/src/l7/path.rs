//! Paths of requests, normalised before anything is decided on them; what is matched is what is forwarded.

use std::borrow::Cow;

use super::{condition::escaped, config::Normalization};

/// Why a path is refused; the request is answered 400.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum InvalidPath {
    /// It does not start with a slash.
    #[error("a path that does not start with a slash")]
    Relative,
    /// NUL, another control character, a space or a fragment.
    #[error("a character that a path must not hold")]
    Character,
    /// An escaped NUL.
    #[error("an escaped NUL")]
    Nul,
    /// More `..` than there are segments.
    #[error("a path that leaves the root")]
    AboveRoot,
}

/// Normalises a path without its query (`meshConfig.pathNormalization`). `*`, as OPTIONS has it, stays.
///
/// # Errors
/// If the path is one that no request may have, whatever the normalisation.
pub fn normalize(path: &str, how: Normalization) -> Result<Cow<'_, str>, InvalidPath> {
    if path == "*" {
        return Ok(path.into());
    }
    if !path.starts_with('/') {
        return Err(InvalidPath::Relative);
    }
    if path
        .bytes()
        .any(|it| it <= b' ' || it == 0x7f || it == b'#')
    {
        return Err(InvalidPath::Character);
    }
    if contains_nul(path) {
        return Err(InvalidPath::Nul);
    }
    if how == Normalization::None || is_normal(path, how) {
        return Ok(path.into());
    }
    let merge = how != Normalization::Base;
    let decoded = decode(path, how == Normalization::DecodeAndMergeSlashes);
    resolve(&decoded, merge).map(Into::into)
}

fn contains_nul(path: &str) -> bool {
    path.as_bytes().windows(3).any(|it| it == b"%00")
}

/// Whether normalising certainly changes nothing: the usual case, which allocates nothing.
fn is_normal(path: &str, how: Normalization) -> bool {
    let plain = !path.bytes().any(|it| matches!(it, b'%' | b'\\'));
    let slashes = how == Normalization::Base || !path.contains("//");
    plain && slashes && !path.split('/').any(|it| it == "." || it == "..")
}

/// Decodes what need not be escaped, writes other escapes in upper case, turns backslashes to slashes.
fn decode(path: &str, slashes: bool) -> String {
    let mut out = Vec::with_capacity(path.len());
    let mut rest = path.as_bytes();
    while let Some((&first, after)) = rest.split_first() {
        let Some(byte) = escaped(rest) else {
            out.push(if first == b'\\' { b'/' } else { first });
            rest = after;
            continue;
        };
        match byte {
            b'/' | b'\\' if slashes => out.push(b'/'),
            byte if unreserved(byte) && !completes_escape(&out, byte) => out.push(byte),
            _ => out.extend(rest[..3].iter().map(u8::to_ascii_uppercase)),
        }
        rest = &rest[3..];
    }
    // Only ASCII was put in the place of ASCII.
    String::from_utf8(out).unwrap_or_else(|error| String::from_utf8_lossy(error.as_bytes()).into())
}

/// Whether `byte`, written next, would make an escape of a `%` that is none as it was sent. The server would decode what
/// nothing here has seen: `%4%41dmin` would pass as `%4Admin` and be served as `Jdmin`.
fn completes_escape(out: &[u8], byte: u8) -> bool {
    match out {
        [.., b'%'] => byte.is_ascii_hexdigit(),
        [.., b'%', digit] => digit.is_ascii_hexdigit() && byte.is_ascii_hexdigit(),
        _ => false,
    }
}

/// RFC 3986, 2.3.
fn unreserved(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"-._~".contains(&byte)
}

/// Takes out `.` and `..` (RFC 3986, 5.2.4), and empty segments if they are merged.
fn resolve(path: &str, merge: bool) -> Result<String, InvalidPath> {
    let mut kept: Vec<&str> = Vec::new();
    let mut segments = path.split('/').skip(1).peekable();
    let mut directory = false;
    while let Some(segment) = segments.next() {
        let last = segments.peek().is_none();
        directory = false;
        match segment {
            "." => directory = last,
            ".." => {
                kept.pop().ok_or(InvalidPath::AboveRoot)?;
                directory = last;
            }
            "" if last => directory = true,
            "" if merge => {}
            other => kept.push(other),
        }
    }
    let mut out = String::with_capacity(path.len());
    for segment in &kept {
        out.push('/');
        out.push_str(segment);
    }
    if directory || out.is_empty() {
        out.push('/');
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(path: &str, expected: [&str; 4]) {
        let ways = [
            Normalization::None,
            Normalization::Base,
            Normalization::MergeSlashes,
            Normalization::DecodeAndMergeSlashes,
        ];
        for (how, expected) in ways.into_iter().zip(expected) {
            let normal = normalize(path, how).unwrap();
            assert_eq!(normal, expected, "{path} {how:?}");
            assert_eq!(normalize(&normal, how).unwrap(), expected, "again: {path}");
        }
    }

    #[track_caller]
    fn same(path: &str, expected: &str) {
        check(path, [path, expected, expected, expected]);
    }

    #[test]
    fn paths_are_normalised_as_configured_and_once_is_enough() {
        same("/", "/");
        same("/a/b", "/a/b");
        same("/a/b/", "/a/b/");
        same("/a/./b", "/a/b");
        same("/a/../b", "/b");
        same("/a/b/..", "/a/");
        same("/a/b/.", "/a/b/");
        same("/a/..", "/");
        same("/.", "/");
        same("/%61%2d%2E%7e", "/a-.~");
        same("/%c3%bc%2c", "/%C3%BC%2C");
        same("/a/%2e%2e/b", "/b");
        same("/a\\b", "/a/b");
        same("/a/..\\b", "/b");
        same("/%zz%", "/%zz%");
        same("/\u{fc}", "/\u{fc}");
        same("*", "*");
        check("/a//b", ["/a//b", "/a//b", "/a/b", "/a/b"]);
        check("//", ["//", "//", "/", "/"]);
        check("/a//", ["/a//", "/a//", "/a/", "/a/"]);
        check("/a%2fb", ["/a%2fb", "/a%2Fb", "/a%2Fb", "/a/b"]);
        check("/a%5cb", ["/a%5cb", "/a%5Cb", "/a%5Cb", "/a/b"]);
        let dots = "/a%2f..%2fb";
        check(dots, [dots, "/a%2F..%2Fb", "/a%2F..%2Fb", "/b"]);
    }

    #[test]
    fn an_escape_that_a_decoded_one_forms_is_not_decoded_again() {
        same("/%2561", "/%2561");
        same("/%4%41", "/%4%41");
        same("/%%341", "/%%341");
        same("/%%34%31", "/%%341");
        same("/%2%65%2%65/a", "/%2%65%2%65/a");
    }

    #[test]
    fn paths_that_no_request_may_have_are_refused() {
        use InvalidPath::{AboveRoot, Character, Nul, Relative};
        for (path, expected) in [
            ("", Relative),
            ("a", Relative),
            ("/a\0", Character),
            ("/a b", Character),
            ("/a\r\nx: y", Character),
            ("/a#b", Character),
            ("/\u{7f}", Character),
            ("/a%00b", Nul),
            ("/..", AboveRoot),
            ("/a/../..", AboveRoot),
            ("/%2e%2e/", AboveRoot),
            ("/a\\..\\..\\b", AboveRoot),
        ] {
            let found = normalize(path, Normalization::Base);
            assert_eq!(found, Err(expected), "{path:?}");
        }
        assert!(normalize("/a%00", Normalization::None).is_err());
    }

    #[test]
    fn a_normal_path_is_not_copied() {
        let path = normalize("/a/b.c/~d", Normalization::DecodeAndMergeSlashes);
        assert!(matches!(path, Ok(Cow::Borrowed(_))));
    }
}
