//! From text to pieces.

use http::HeaderName;

use super::{
    Environment, InvalidFormat, Piece,
    metadata::Metadata,
    operator::{Header, Operator, Plain, plain},
};
use crate::l7::expression::{Attribute, Expression};

pub(super) fn parse(
    text: &str,
    environment: &dyn Environment,
) -> Result<Vec<Piece>, InvalidFormat> {
    let mut pieces = Vec::new();
    let mut literal = String::new();
    let mut rest = text;
    while let Some(start) = rest.find('%') {
        literal.push_str(&rest[..start]);
        let after = &rest[start + 1..];
        if let Some(after) = after.strip_prefix('%') {
            literal.push('%');
            rest = after;
            continue;
        }
        let at = text.len() - after.len() - 1;
        let end = end(after).ok_or(InvalidFormat::Open(at))?;
        rest = &after[end + 1..];
        match command(&after[..end], environment)? {
            Piece::Literal(text) => literal.push_str(&text),
            operator => {
                flush(&mut literal, &mut pieces);
                pieces.push(operator);
            }
        }
    }
    literal.push_str(rest);
    flush(&mut literal, &mut pieces);
    Ok(pieces)
}

fn flush(literal: &mut String, pieces: &mut Vec<Piece>) {
    if !literal.is_empty() {
        pieces.push(Piece::Literal(std::mem::take(literal).into()));
    }
}

/// The closing `%`: arguments may hold others (`START_TIME(%Y)`), and parentheses may be nested.
fn end(text: &str) -> Option<usize> {
    let mut depth = 0_usize;
    for (at, byte) in text.bytes().enumerate() {
        match byte {
            b'(' => depth += 1,
            b')' => depth = depth.saturating_sub(1),
            b'%' if depth == 0 => return Some(at),
            _ => {}
        }
    }
    None
}

/// `NAME`, `NAME(arguments)`, `NAME(arguments):length`.
fn command(text: &str, environment: &dyn Environment) -> Result<Piece, InvalidFormat> {
    let refused = || InvalidFormat::Arguments(text.to_owned());
    let (name, arguments, after) = match text.split_once('(') {
        Some((name, rest)) => {
            let (arguments, after) = rest.rsplit_once(')').ok_or_else(refused)?;
            (name, Some(arguments), after)
        }
        None => match text.split_once(':') {
            Some((name, _)) => (name, None, &text[name.len()..]),
            None => (text, None, ""),
        },
    };
    let longest = match after.strip_prefix(':') {
        Some(length) => Some(length.parse().map_err(|_| refused())?),
        None if after.is_empty() => None,
        None => return Err(refused()),
    };
    let operator = match fixed(name, arguments, environment) {
        Some(text) => return Ok(Piece::Literal(text.into())),
        None => operator(name, arguments, text)?,
    };
    Ok(Piece::Operator(operator, longest))
}

/// What does not change while the process runs.
fn fixed(name: &str, arguments: Option<&str>, environment: &dyn Environment) -> Option<String> {
    let value = match (name, arguments) {
        ("HOSTNAME", None) => environment.hostname(),
        ("ENVIRONMENT", Some(variable)) => environment.variable(variable),
        _ => return None,
    };
    Some(value.unwrap_or_else(|| "-".to_owned()))
}

fn operator(name: &str, arguments: Option<&str>, text: &str) -> Result<Operator, InvalidFormat> {
    let refused = || InvalidFormat::Arguments(text.to_owned());
    if let Some(plain) = plain(name) {
        return match arguments {
            None => Ok(Operator::Plain(plain)),
            Some(_) => Err(refused()),
        };
    }
    let header = |arguments: Option<&str>| {
        let (first, second) = match arguments.ok_or_else(refused)?.split_once('?') {
            Some((first, second)) => (first, Some(second)),
            None => (arguments.unwrap_or_default(), None),
        };
        let parse = |name: &str| header(name).ok_or_else(refused);
        Ok((parse(first)?, second.map(parse).transpose()?))
    };
    match (name, arguments) {
        ("REQ", arguments) => header(arguments).map(|(a, b)| Operator::Request(a, b)),
        ("RESP", arguments) => header(arguments).map(|(a, b)| Operator::Response(a, b)),
        ("TRAILER", arguments) => header(arguments).map(|(a, b)| Operator::Trailer(a, b)),
        ("REQ_WITHOUT_QUERY", arguments) => {
            header(arguments).map(|(a, b)| Operator::WithoutQuery(a, b))
        }
        ("PATH", arguments) => path(arguments).ok_or_else(refused),
        ("QUERY_PARAM", Some(name)) if !name.is_empty() => {
            Ok(Operator::QueryParameter(name.into()))
        }
        ("QUERY_PARAM", _) => Err(refused()),
        ("EMIT_TIME", format) => Ok(Operator::EmitTime(format.map(Into::into))),
        ("START_TIME", format) => Ok(Operator::StartTime(format.map(Into::into))),
        ("GRPC_STATUS", None | Some("CAMEL_STRING")) => Ok(Operator::Plain(Plain::GrpcName)),
        ("GRPC_STATUS", Some("NUMBER")) => Ok(Operator::Plain(Plain::GrpcNumber)),
        ("CEL", Some(source)) => Expression::parse(source)
            .map(|parsed| Operator::Expression(Box::new(parsed)))
            .map_err(|error| InvalidFormat::Expression(source.to_owned(), error)),
        ("FILTER_STATE", Some(arguments)) => {
            let known = filter_state(arguments).map(Operator::Attribute);
            Ok(known.unwrap_or_else(|| Operator::Nothing(text.into())))
        }
        (
            "METADATA" | "DYNAMIC_METADATA" | "UPSTREAM_METADATA" | "CLUSTER_METADATA",
            Some(arguments),
        ) => {
            let known = Metadata::of(name, arguments).map(Operator::Metadata);
            Ok(known.unwrap_or_else(|| Operator::Nothing(text.into())))
        }
        ("GRPC_STATUS", Some(_)) => Err(refused()),
        (name, _) => Err(InvalidFormat::Command(name.to_owned())),
    }
}

/// `PATH(WQ|NQ:ORIG|PATH|ORIG_OR_PATH)`: with the query or without; as it came, as it goes on, or the first that there is.
fn path(arguments: Option<&str>) -> Option<Operator> {
    let split = |text| str::split_once(text, ':').unwrap_or((text, ""));
    let (query, which) = arguments.map(split).unwrap_or_default();
    let (first, other) = match which {
        "ORIG" => (Header::OriginalPath, None),
        "PATH" => (Header::Path, None),
        "" | "ORIG_OR_PATH" => (Header::OriginalPath, Some(Header::Path)),
        _ => return None,
    };
    match query {
        "" | "WQ" => Some(Operator::Request(first, other)),
        "NQ" => Some(Operator::WithoutQuery(first, other)),
        _ => None,
    }
}

/// What Envoy's filter state holds is known here of peers alone.
fn filter_state(arguments: &str) -> Option<Attribute> {
    let mut parts = arguments.split(':');
    match (parts.next(), parts.next(), parts.next()) {
        (Some(key), Some("FIELD"), Some(field)) => Attribute::of_filter_state(key, field),
        _ => None,
    }
}

fn header(name: &str) -> Option<Header> {
    let lower = name.to_ascii_lowercase();
    Some(match lower.as_str() {
        ":method" => Header::Method,
        ":path" => Header::Path,
        ":authority" | "host" => Header::Authority,
        ":scheme" => Header::Scheme,
        ":status" => Header::Status,
        "x-envoy-original-path" => Header::OriginalPath,
        "x-envoy-upstream-service-time" => Header::ServiceTime,
        other => Header::Named(other.parse::<HeaderName>().ok()?),
    })
}
