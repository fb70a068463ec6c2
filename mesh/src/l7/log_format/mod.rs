//! Lines of access logs: formats of `%COMMAND(arguments):length%` (Envoy's, as Istio's users write them), parsed once
//! and rendered per request.

mod date;
mod metadata;
mod operator;
mod parse;
#[cfg(test)]
mod tests;

use std::{fmt::Write, time::SystemTime};

use super::{
    config::LogFormat,
    expression::{InvalidExpression, Value, Wanted},
    record::RequestRecord,
};
use crate::names::Str;
use operator::Operator;

/// Istio's default text, without the line's end.
pub const DEFAULT_TEXT: &str = "[%START_TIME%] \"%REQ(:METHOD)% %REQ(X-ENVOY-ORIGINAL-PATH?:PATH)% %PROTOCOL%\" \
%RESPONSE_CODE% %RESPONSE_FLAGS% %RESPONSE_CODE_DETAILS% %CONNECTION_TERMINATION_DETAILS% \
\"%UPSTREAM_TRANSPORT_FAILURE_REASON%\" %BYTES_RECEIVED% %BYTES_SENT% %DURATION% \
%RESP(X-ENVOY-UPSTREAM-SERVICE-TIME)% \"%REQ(X-FORWARDED-FOR)%\" \"%REQ(USER-AGENT)%\" \"%REQ(X-REQUEST-ID)%\" \
\"%REQ(:AUTHORITY)%\" \"%UPSTREAM_HOST%\" %UPSTREAM_CLUSTER_RAW% %UPSTREAM_LOCAL_ADDRESS% \
%DOWNSTREAM_LOCAL_ADDRESS% %DOWNSTREAM_REMOTE_ADDRESS% %REQUESTED_SERVER_NAME% %ROUTE_NAME%";

/// Istio's default JSON: keys and formats of their values.
pub const DEFAULT_JSON: [(&str, &str); 24] = [
    ("start_time", "%START_TIME%"),
    ("route_name", "%ROUTE_NAME%"),
    ("method", "%REQ(:METHOD)%"),
    ("path", "%REQ(X-ENVOY-ORIGINAL-PATH?:PATH)%"),
    ("protocol", "%PROTOCOL%"),
    ("response_code", "%RESPONSE_CODE%"),
    ("response_flags", "%RESPONSE_FLAGS%"),
    ("response_code_details", "%RESPONSE_CODE_DETAILS%"),
    (
        "connection_termination_details",
        "%CONNECTION_TERMINATION_DETAILS%",
    ),
    ("bytes_received", "%BYTES_RECEIVED%"),
    ("bytes_sent", "%BYTES_SENT%"),
    ("duration", "%DURATION%"),
    (
        "upstream_service_time",
        "%RESP(X-ENVOY-UPSTREAM-SERVICE-TIME)%",
    ),
    ("x_forwarded_for", "%REQ(X-FORWARDED-FOR)%"),
    ("user_agent", "%REQ(USER-AGENT)%"),
    ("request_id", "%REQ(X-REQUEST-ID)%"),
    ("authority", "%REQ(:AUTHORITY)%"),
    ("upstream_host", "%UPSTREAM_HOST%"),
    ("upstream_cluster", "%UPSTREAM_CLUSTER_RAW%"),
    ("upstream_local_address", "%UPSTREAM_LOCAL_ADDRESS%"),
    ("downstream_local_address", "%DOWNSTREAM_LOCAL_ADDRESS%"),
    ("downstream_remote_address", "%DOWNSTREAM_REMOTE_ADDRESS%"),
    ("requested_server_name", "%REQUESTED_SERVER_NAME%"),
    (
        "upstream_transport_failure_reason",
        "%UPSTREAM_TRANSPORT_FAILURE_REASON%",
    ),
];

/// Why a format is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidFormat {
    /// A `%` that nothing ends.
    #[error("at {0}: a % without its end; a single % is written %%")]
    Open(usize),
    /// A command that is not known here.
    #[error("command {0:?} is not supported")]
    Command(String),
    /// Arguments that the command does not take.
    #[error("arguments of {0:?} are not supported")]
    Arguments(String),
    /// `%CEL(...)%`.
    #[error("expression {0:?}: {1}")]
    Expression(String, #[source] InvalidExpression),
}

/// What formats say of the process that writes them, fixed when they are parsed.
pub trait Environment {
    /// `%HOSTNAME%`.
    fn hostname(&self) -> Option<String>;
    /// `%ENVIRONMENT(NAME)%`.
    fn variable(&self, name: &str) -> Option<String>;
}

/// No environment: for checks of a format.
#[derive(Clone, Copy, Debug)]
pub struct Nowhere;

impl Environment for Nowhere {
    fn hostname(&self) -> Option<String> {
        None
    }

    fn variable(&self, _: &str) -> Option<String> {
        None
    }
}

/// A piece of a format.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Piece {
    Literal(Str),
    /// With the longest text that it may give, in bytes.
    Operator(Operator, Option<usize>),
}

/// One text format, parsed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Template(Vec<Piece>);

/// A format, parsed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Format {
    /// A line.
    Text(Template),
    /// Keys in order.
    Json(Vec<(Str, Template)>),
}

impl Format {
    /// Parses a format of the model.
    ///
    /// # Errors
    /// See [`InvalidFormat`].
    pub fn new(format: &LogFormat, environment: &dyn Environment) -> Result<Self, InvalidFormat> {
        let template = |text: &str| Template::parse(text, environment);
        let json = |pairs: &mut dyn Iterator<Item = (&str, &str)>| {
            let pairs = pairs.map(|(key, text)| Ok((key.into(), template(text)?)));
            pairs.collect::<Result<_, InvalidFormat>>().map(Self::Json)
        };
        match format {
            LogFormat::DefaultText => template(DEFAULT_TEXT).map(Self::Text),
            LogFormat::DefaultJson => json(&mut DEFAULT_JSON.into_iter()),
            LogFormat::Text(text) => template(text.trim_end_matches('\n')).map(Self::Text),
            LogFormat::Json(pairs) => json(&mut pairs.iter().map(|(key, text)| (&**key, &**text))),
        }
    }

    /// Adds the line of a request to `line`, without its end.
    pub fn render(&self, record: &RequestRecord, line: &mut String) {
        match self {
            Self::Text(template) => template.render(record, line),
            Self::Json(pairs) => {
                let mut separator = '{';
                for (key, template) in pairs {
                    line.push(separator);
                    json_text(key, line);
                    line.push(':');
                    template.render_json(record, line);
                    separator = ',';
                }
                line.push_str(if pairs.is_empty() { "{}" } else { "}" });
            }
        }
    }

    /// Keys and values, for sinks that keep them apart.
    pub fn fields(&self, record: &RequestRecord) -> Vec<(Str, String)> {
        let Self::Json(pairs) = self else {
            return Vec::new();
        };
        let pairs = pairs.iter().map(|(key, template)| {
            let mut value = String::new();
            template.render(record, &mut value);
            (key.clone(), value)
        });
        pairs.collect()
    }

    /// Adds the headers that it looks at.
    pub fn wanted(&self, wanted: &mut Wanted) {
        self.operators().for_each(|it| it.wanted(wanted));
    }

    /// Operators for state that only Envoy has, as they are written: they are `-` in every line.
    pub fn silent(&self) -> impl Iterator<Item = &str> {
        self.operators().filter_map(|it| match it {
            Operator::Nothing(text) => Some(&**text),
            _ => None,
        })
    }

    fn operators(&self) -> impl Iterator<Item = &Operator> {
        let (text, pairs) = match self {
            Self::Text(template) => (Some(template), &[][..]),
            Self::Json(pairs) => (None, &pairs[..]),
        };
        let templates = text.into_iter().chain(pairs.iter().map(|(_, it)| it));
        let pieces = templates.flat_map(|it| &it.0);
        pieces.filter_map(|piece| match piece {
            Piece::Operator(operator, _) => Some(operator),
            Piece::Literal(_) => None,
        })
    }
}

impl Template {
    /// Parses a text.
    ///
    /// # Errors
    /// See [`InvalidFormat`].
    pub fn parse(text: &str, environment: &dyn Environment) -> Result<Self, InvalidFormat> {
        parse::parse(text, environment).map(Self)
    }

    fn render(&self, record: &RequestRecord, line: &mut String) {
        for piece in &self.0 {
            match piece {
                Piece::Literal(text) => line.push_str(text),
                Piece::Operator(operator, longest) => {
                    match operator.value(record) {
                        Some(value) => plain(&value, *longest, line),
                        None => line.push('-'),
                    };
                }
            }
        }
    }

    /// A single operator keeps its type; what is not known is `null`.
    fn render_json(&self, record: &RequestRecord, line: &mut String) {
        let [Piece::Operator(operator, longest)] = &*self.0 else {
            let mut text = String::new();
            self.render(record, &mut text);
            return json_text(&text, line);
        };
        match operator.value(record) {
            None => line.push_str("null"),
            Some(value @ (Value::Int(_) | Value::Bool(_))) => plain(&value, None, line),
            Some(Value::Double(value)) if value.is_finite() => {
                plain(&Value::Double(value), None, line);
            }
            Some(value) => {
                let mut text = String::new();
                plain(&value, *longest, &mut text);
                json_text(&text, line);
            }
        }
    }
}

/// As text; what would end a line or hide something is escaped, so that no client writes lines of its own.
fn plain(value: &Value<'_>, longest: Option<usize>, line: &mut String) {
    let mut push = |text: &str| {
        let text = match longest {
            Some(longest) => &text[..text.floor_char_boundary(longest)],
            None => text,
        };
        for char in text.chars() {
            match char {
                char if char.is_control() => drop(write!(line, "\\x{:02x}", u32::from(char))),
                char => line.push(char),
            }
        }
    };
    match value {
        Value::Text(text) => push(text),
        other => push(&other.to_string()),
    }
}

/// A JSON string (RFC 8259, section 7).
fn json_text(text: &str, line: &mut String) {
    line.push('"');
    for char in text.chars() {
        match char {
            '"' => line.push_str("\\\""),
            '\\' => line.push_str("\\\\"),
            char if char.is_control() => drop(write!(line, "\\u{:04x}", u32::from(char))),
            char => line.push(char),
        }
    }
    line.push('"');
}

/// `2026-01-02T03:04:05.678Z`.
pub fn rfc3339(time: SystemTime) -> String {
    date::Date::of(time).rfc3339()
}
