//! Values of policies on values of requests.

use std::{borrow::Cow, net::IpAddr};

use super::super::authorization::{Either, PathTemplate, TemplatePart, ValueMatch};

/// A value of a request.
pub(super) enum Value<'a> {
    Text(Cow<'a, str>),
    /// Without regard to case.
    Host(&'a str),
    Address(IpAddr),
    Port(u16),
}

impl<'a> Value<'a> {
    pub(super) fn text(text: &'a str) -> Self {
        Self::Text(text.into())
    }

    pub(super) fn owned(text: String) -> Self {
        Self::Text(text.into())
    }

    fn fits(&self, wanted: &ValueMatch) -> bool {
        match (self, wanted) {
            (Self::Text(it), _) => text(wanted, it),
            (Self::Host(it), _) => host(wanted, it),
            (Self::Address(it), ValueMatch::Cidr(range)) => range.contains(it),
            (Self::Address(it), ValueMatch::Exact(text)) => text.parse() == Ok(*it),
            (Self::Port(it), ValueMatch::Port(port)) => it == port,
            (Self::Port(it), ValueMatch::Exact(text)) => text.parse() == Ok(*it),
            (Self::Address(_) | Self::Port(_), ValueMatch::Present) => true,
            (Self::Address(_) | Self::Port(_), _) => false,
        }
    }
}

fn text(wanted: &ValueMatch, text: &str) -> bool {
    match wanted {
        ValueMatch::Exact(it) => **it == *text,
        ValueMatch::Prefix(it) => text.starts_with(&**it),
        ValueMatch::Suffix(it) => text.ends_with(&**it),
        ValueMatch::Present => !text.is_empty(),
        ValueMatch::Cidr(it) => text
            .parse()
            .is_ok_and(|address: IpAddr| it.contains(&address)),
        ValueMatch::Port(it) => text.parse() == Ok(*it),
    }
}

fn host(wanted: &ValueMatch, host: &str) -> bool {
    let bytes = host.as_bytes();
    let same = |part: Option<&[u8]>, it: &str| {
        part.is_some_and(|part| part.eq_ignore_ascii_case(it.as_bytes()))
    };
    match wanted {
        ValueMatch::Exact(it) => host.eq_ignore_ascii_case(it),
        ValueMatch::Prefix(it) => same(bytes.get(..it.len()), it),
        ValueMatch::Suffix(it) => {
            let start = bytes.len().checked_sub(it.len());
            same(start.and_then(|start| bytes.get(start..)), it)
        }
        other => text(other, host),
    }
}

/// Whether any value of the request is one that is wanted, and none is one that is not. Without conditions the
/// request's values are not asked for.
pub(super) fn any<'a>(
    either: &Either<ValueMatch>,
    values: impl FnOnce() -> Vec<Value<'a>>,
) -> bool {
    if either.values.is_empty() && either.not_values.is_empty() {
        return true;
    }
    let values = values();
    let has = |wanted: &ValueMatch| values.iter().any(|it| it.fits(wanted));
    (either.values.is_empty() || either.values.iter().any(has))
        && !either.not_values.iter().any(has)
}

/// Whether a normalised path fits.
pub(super) fn path(wanted: &PathTemplate, path: &str) -> bool {
    match wanted {
        PathTemplate::Value(it) => text(it, path),
        PathTemplate::Template(parts) => path
            .strip_prefix('/')
            .is_some_and(|rest| template(parts, rest)),
    }
}

/// Segments against parts, with one way back: to the last `{**}`, which then takes one segment more.
fn template(parts: &[TemplatePart], path: &str) -> bool {
    let segments: Vec<&str> = path.split('/').collect();
    let (mut segment, mut part) = (0, 0);
    let mut back: Option<(usize, usize)> = None;
    while segment < segments.len() {
        let fits = match parts.get(part) {
            Some(TemplatePart::Literal(it)) => **it == *segments[segment],
            Some(TemplatePart::One) => !segments[segment].is_empty(),
            Some(TemplatePart::Any) => {
                back = Some((segment + 1, part + 1));
                true
            }
            None => false,
        };
        match back {
            _ if fits => (segment, part) = (segment + 1, part + 1),
            Some((taken, after)) => {
                (segment, part) = (taken + 1, after);
                back = Some((taken + 1, after));
            }
            None => return false,
        }
    }
    part == parts.len()
}
