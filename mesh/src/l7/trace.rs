//! Trace contexts of requests: W3C and B3, read and written; and which requests are traced.

use http::{HeaderMap, HeaderName, HeaderValue};

use crate::draw::Draw;

#[cfg(test)]
mod tests;

const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
const TRACESTATE: HeaderName = HeaderName::from_static("tracestate");
const B3: HeaderName = HeaderName::from_static("b3");
const B3_TRACE: HeaderName = HeaderName::from_static("x-b3-traceid");
const B3_SPAN: HeaderName = HeaderName::from_static("x-b3-spanid");
const B3_PARENT: HeaderName = HeaderName::from_static("x-b3-parentspanid");
const B3_SAMPLED: HeaderName = HeaderName::from_static("x-b3-sampled");
const B3_FLAGS: HeaderName = HeaderName::from_static("x-b3-flags");

/// The longest `tracestate` that is kept (W3C Trace Context 3.3.1.5: at least 512 bytes).
const MAX_STATE: usize = 512;

/// The headers that carry a trace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Propagation {
    /// `traceparent`, `tracestate`.
    W3c,
    /// `x-b3-*`, and `b3` where the client used it.
    B3,
    /// Both; B3 wins where both came.
    Both,
}

/// What a client said of its trace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parent {
    /// Not 0.
    pub trace_id: u128,
    /// Not 0.
    pub span_id: u64,
    /// Its decision; none: it left it to us (B3 only).
    pub sampled: Option<bool>,
    /// `tracestate`, as it came.
    pub state: Option<HeaderValue>,
    /// Whether it came in the single header `b3`.
    single: bool,
}

/// The span of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Span {
    /// Not 0.
    pub trace_id: u128,
    /// Not 0.
    pub span_id: u64,
    /// The client's span.
    pub parent_id: Option<u64>,
    /// Whether it is sent to the provider.
    pub sampled: bool,
    /// `tracestate`, passed on.
    pub state: Option<HeaderValue>,
    /// Whether `b3` is written in the place of `x-b3-*`.
    single: bool,
}

impl Span {
    /// A span of this randomness below `parent`, or the first of a trace. `sampled`: what is decided where the parent
    /// has not.
    pub fn new(parent: Option<Parent>, sampled: bool, draw: Draw) -> Self {
        let (span, trace) = draw.split();
        let span_id = number(span).max(1);
        match parent {
            Some(parent) => Self {
                trace_id: parent.trace_id,
                span_id,
                parent_id: Some(parent.span_id),
                sampled: parent.sampled.unwrap_or(sampled),
                state: parent.state,
                single: parent.single,
            },
            None => {
                let (high, low) = trace.split();
                let trace_id = u128::from(number(high)) << 64 | u128::from(number(low));
                Self {
                    trace_id: trace_id.max(1),
                    span_id,
                    parent_id: None,
                    sampled,
                    state: None,
                    single: false,
                }
            }
        }
    }

    /// Writes it as the parent of what the backend does, in the place of what was there.
    pub fn inject(&self, how: Propagation, headers: &mut HeaderMap) {
        if how != Propagation::B3 {
            self.inject_w3c(headers);
        }
        if how != Propagation::W3c {
            self.inject_b3(headers);
        }
    }

    fn inject_w3c(&self, headers: &mut HeaderMap) {
        let flags = u8::from(self.sampled);
        let text = format!(
            "00-{:032x}-{:016x}-{flags:02x}",
            self.trace_id, self.span_id
        );
        set(headers, TRACEPARENT, Some(text));
        headers.remove(TRACESTATE);
        if let Some(state) = &self.state {
            headers.insert(TRACESTATE, state.clone());
        }
    }

    fn inject_b3(&self, headers: &mut HeaderMap) {
        let sampled = if self.sampled { "1" } else { "0" };
        let parent = self.parent_id.map(|id| format!("{id:016x}"));
        if self.single {
            let tail = parent.map(|id| format!("-{id}")).unwrap_or_default();
            let text = format!(
                "{:032x}-{:016x}-{sampled}{tail}",
                self.trace_id, self.span_id
            );
            return set(headers, B3, Some(text));
        }
        headers.remove(B3);
        set(headers, B3_TRACE, Some(format!("{:032x}", self.trace_id)));
        set(headers, B3_SPAN, Some(format!("{:016x}", self.span_id)));
        set(headers, B3_PARENT, parent);
        set(headers, B3_SAMPLED, Some(sampled.to_owned()));
    }
}

fn number(draw: Draw) -> u64 {
    draw.below(u64::MAX).unwrap_or_default()
}

fn set(headers: &mut HeaderMap, name: HeaderName, value: Option<String>) {
    match value.map(HeaderValue::try_from) {
        Some(Ok(value)) => drop(headers.insert(name, value)),
        _ => drop(headers.remove(name)),
    }
}

/// What the client said of its trace, in the headers of `how`; none if there is nothing that can be read.
pub fn extract(how: Propagation, headers: &HeaderMap) -> Option<Parent> {
    match how {
        Propagation::W3c => w3c(headers),
        Propagation::B3 => b3(headers),
        Propagation::Both => b3(headers).or_else(|| w3c(headers)),
    }
}

/// What a client that names no span says of sampling: B3 can refuse, or ask, without a trace.
pub fn decision_alone(how: Propagation, headers: &HeaderMap) -> Option<bool> {
    if how == Propagation::W3c {
        return None;
    }
    let told = text(headers, &B3).or_else(|| text(headers, &B3_SAMPLED));
    told.and_then(decision)
}

fn text<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Option<&'a str> {
    headers.get(name)?.to_str().ok()
}

fn w3c(headers: &HeaderMap) -> Option<Parent> {
    let header = text(headers, &TRACEPARENT)?;
    let mut pieces = header.split('-');
    let (version, trace) = (pieces.next()?, pieces.next()?);
    let (span, flags) = (pieces.next()?, pieces.next()?);
    let more = pieces.next().is_some();
    // Later versions may have more; version 255 is not allowed (W3C Trace Context 3.2.2).
    if version.len() != 2 || hex64(version)? == 255 || (version == "00" && more) {
        return None;
    }
    if trace.len() != 32 || span.len() != 16 || flags.len() != 2 {
        return None;
    }
    let state = headers.get(TRACESTATE).filter(|it| it.len() <= MAX_STATE);
    Some(Parent {
        trace_id: hex128(trace).filter(|id| *id > 0)?,
        span_id: hex64(span).filter(|id| *id > 0)?,
        sampled: Some(hex64(flags)? & 1 == 1),
        state: state.cloned(),
        single: false,
    })
}

fn b3(headers: &HeaderMap) -> Option<Parent> {
    if let Some(single) = text(headers, &B3) {
        return b3_single(single);
    }
    let trace = text(headers, &B3_TRACE)?;
    let debug = text(headers, &B3_FLAGS) == Some("1");
    let sampled = text(headers, &B3_SAMPLED).and_then(decision);
    b3_parent(
        trace,
        text(headers, &B3_SPAN)?,
        sampled.or(debug.then_some(true)),
        false,
    )
}

fn b3_single(header: &str) -> Option<Parent> {
    let mut pieces = header.split('-');
    let (trace, span) = (pieces.next()?, pieces.next()?);
    b3_parent(trace, span, pieces.next().and_then(decision), true)
}

fn b3_parent(trace: &str, span: &str, sampled: Option<bool>, single: bool) -> Option<Parent> {
    if !matches!(trace.len(), 16 | 32) || span.len() != 16 {
        return None;
    }
    Some(Parent {
        trace_id: hex128(trace).filter(|id| *id > 0)?,
        span_id: hex64(span).filter(|id| *id > 0)?,
        sampled,
        state: None,
        single,
    })
}

fn decision(text: &str) -> Option<bool> {
    match text {
        "1" | "true" | "d" => Some(true),
        "0" | "false" => Some(false),
        _ => None,
    }
}

fn hex128(text: &str) -> Option<u128> {
    let hex = text.bytes().all(|b| b.is_ascii_hexdigit());
    hex.then(|| u128::from_str_radix(text, 16).ok())?
}

fn hex64(text: &str) -> Option<u64> {
    hex128(text).and_then(|value| u64::try_from(value).ok())
}

/// Whether a request without a decision of its own is traced: the same for all requests of one id, so that each proxy
/// on its way decides alike.
pub fn sampled(request_id: Option<&str>, per_million: u32, draw: Draw) -> bool {
    let draw = request_id.map_or(draw, |id| Draw(fnv(id.as_bytes())));
    let hit = draw.below(1_000_000);
    hit.is_some_and(|it| it < u64::from(per_million))
}

/// FNV-1a.
fn fnv(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    })
}
