//! The layer that turns events into lines.

use std::{error::Error, fmt, str::FromStr};

use serde_json::Value;
use time::OffsetDateTime;
use tracing::{
    Event, Level, Metadata, Subscriber,
    field::{Field, Visit},
    span,
};
use tracing_subscriber::{Layer, layer::Context, registry::LookupSpan};

use super::{OUR_CRATES, writer::Writer};
use crate::report::Chain;

/// The form of a line.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Format {
    /// Tab-separated columns.
    #[default]
    Plain,
    /// One JSON object.
    Json,
}

/// A text that names no format.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no log format: plain or json")]
pub struct ParseFormatError(pub String);

impl FromStr for Format {
    type Err = ParseFormatError;
    fn from_str(text: &str) -> Result<Self, ParseFormatError> {
        match text {
            "plain" => Ok(Self::Plain),
            "json" => Ok(Self::Json),
            other => Err(ParseFormatError(other.to_owned())),
        }
    }
}

pub(super) struct Lines {
    format: Format,
    writer: Writer,
}

/// A span's fields, kept with the span.
enum SpanFields {
    Plain(String),
    Json(Ordered),
}

impl Lines {
    pub(super) fn new(format: Format, writer: Writer) -> Self {
        Self { format, writer }
    }

    fn line<S>(&self, now: OffsetDateTime, event: &Event<'_>, context: &Context<'_, S>) -> String
    where
        S: Subscriber + for<'a> LookupSpan<'a>,
    {
        match self.format {
            Format::Plain => plain(now, event, context),
            Format::Json => json(now, event, context),
        }
    }
}

impl<S> Layer<S> for Lines
where
    S: Subscriber + for<'a> LookupSpan<'a>,
{
    fn on_new_span(&self, attributes: &span::Attributes<'_>, id: &span::Id, cx: Context<'_, S>) {
        let Some(span) = cx.span(id) else { return };
        let fields = match self.format {
            Format::Plain => {
                let mut visitor = PlainVisitor::default();
                attributes.record(&mut visitor);
                SpanFields::Plain(visitor.fields)
            }
            Format::Json => {
                let mut visitor = JsonVisitor::default();
                attributes.record(&mut visitor);
                SpanFields::Json(visitor.fields)
            }
        };
        span.extensions_mut().insert(fields);
    }

    fn on_record(&self, id: &span::Id, values: &span::Record<'_>, cx: Context<'_, S>) {
        let Some(span) = cx.span(id) else { return };
        match span.extensions_mut().get_mut::<SpanFields>() {
            Some(SpanFields::Plain(fields)) => {
                let mut visitor = PlainVisitor {
                    fields: std::mem::take(fields),
                    ..PlainVisitor::default()
                };
                values.record(&mut visitor);
                *fields = visitor.fields;
            }
            Some(SpanFields::Json(fields)) => {
                let mut visitor = JsonVisitor {
                    fields: std::mem::take(fields),
                    ..JsonVisitor::default()
                };
                values.record(&mut visitor);
                *fields = visitor.fields;
            }
            None => {}
        }
    }

    fn on_event(&self, event: &Event<'_>, context: Context<'_, S>) {
        let line = self.line(OffsetDateTime::now_utc(), event, &context);
        self.writer.line(line.as_bytes());
    }
}

/// `2026-01-02T03:04:05.000006Z`.
fn timestamp(now: OffsetDateTime) -> String {
    format!(
        "{:04}-{:02}-{:02}T{:02}:{:02}:{:02}.{:06}Z",
        now.year(),
        u8::from(now.month()),
        now.day(),
        now.hour(),
        now.minute(),
        now.second(),
        now.microsecond()
    )
}

fn level(metadata: &Metadata<'_>) -> &'static str {
    match *metadata.level() {
        Level::ERROR => "error",
        Level::WARN => "warn",
        Level::INFO => "info",
        Level::DEBUG => "debug",
        Level::TRACE => "trace",
    }
}

/// The target without our crate's name: `net::xds::client` is `xds::client`.
fn scope<'a>(metadata: &'a Metadata<'_>) -> &'a str {
    let target = metadata.target();
    match target.split_once("::") {
        Some((first, rest)) if OUR_CRATES.contains(&first) => rest,
        _ => target,
    }
}

fn plain<S>(now: OffsetDateTime, event: &Event<'_>, context: &Context<'_, S>) -> String
where
    S: Subscriber + for<'a> LookupSpan<'a>,
{
    let metadata = event.metadata();
    let mut visitor = PlainVisitor::default();
    event.record(&mut visitor);
    let mut line = String::with_capacity(256);
    line.push_str(&timestamp(now));
    for column in [level(metadata), scope(metadata)] {
        line.push('\t');
        line.push_str(column);
    }
    for span in context
        .event_scope(event)
        .into_iter()
        .flat_map(|s| s.from_root())
    {
        line.push(':');
        line.push_str(span.name());
        if let Some(SpanFields::Plain(fields)) = span.extensions().get::<SpanFields>()
            && !fields.is_empty()
        {
            line.push('{');
            line.push_str(fields);
            line.push('}');
        }
    }
    line.push('\t');
    line.push_str(&visitor.message);
    if !visitor.fields.is_empty() {
        line.push('\t');
        line.push_str(&visitor.fields);
    }
    line
}

fn json<S>(now: OffsetDateTime, event: &Event<'_>, context: &Context<'_, S>) -> String
where
    S: Subscriber + for<'a> LookupSpan<'a>,
{
    let metadata = event.metadata();
    let mut visitor = JsonVisitor::default();
    event.record(&mut visitor);
    let mut object = Ordered::default();
    object.add("level", level(metadata));
    object.add("time", timestamp(now));
    object.add("scope", scope(metadata));
    object.add("message", visitor.message);
    for (key, value) in visitor.fields.0 {
        object.add(key, value);
    }
    for span in context
        .event_scope(event)
        .into_iter()
        .flat_map(|s| s.from_root())
    {
        if let Some(SpanFields::Json(fields)) = span.extensions().get::<SpanFields>() {
            object.add(span.name(), fields.to_value());
        }
    }
    object.to_string()
}

/// An object whose keys stand in the order in which they were added, so that a line begins with what every line has.
#[derive(Clone, Default)]
struct Ordered(Vec<(&'static str, Value)>);

impl Ordered {
    /// Adds a key that is not there yet.
    fn add(&mut self, key: &'static str, value: impl Into<Value>) {
        if self.0.iter().all(|(known, _)| *known != key) {
            self.0.push((key, value.into()));
        }
    }

    /// The same; a key that is there gets the new value.
    fn set(&mut self, key: &'static str, value: Value) {
        match self.0.iter_mut().find(|(known, _)| *known == key) {
            Some((_, old)) => *old = value,
            None => self.0.push((key, value)),
        }
    }

    fn to_value(&self) -> Value {
        let pairs = self.0.iter();
        let pairs = pairs.map(|(key, value)| ((*key).to_owned(), value.clone()));
        Value::Object(pairs.collect())
    }
}

impl fmt::Display for Ordered {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("{")?;
        for (place, (key, value)) in self.0.iter().enumerate() {
            let separator = if place == 0 { "" } else { "," };
            write!(f, "{separator}{}:{value}", Value::from(*key))?;
        }
        f.write_str("}")
    }
}

/// Appends `text` with control characters escaped: what comes from peers must not be able to forge a line.
fn push_printable(to: &mut String, text: &str) {
    for c in text.chars() {
        match c.is_control() {
            true => to.extend(c.escape_default()),
            false => to.push(c),
        }
    }
}

#[derive(Default)]
struct PlainVisitor {
    message: String,
    fields: String,
}

impl PlainVisitor {
    fn push(&mut self, field: &Field, value: &str) {
        if field.name() == "message" {
            push_printable(&mut self.message, value);
            return;
        }
        if !self.fields.is_empty() {
            self.fields.push(' ');
        }
        self.fields.push_str(field.name());
        self.fields.push('=');
        push_printable(&mut self.fields, value);
    }
}

impl Visit for PlainVisitor {
    fn record_str(&mut self, field: &Field, value: &str) {
        match field.name() {
            "message" => self.push(field, value),
            _ => self.push(field, &format!("{value:?}")),
        }
    }

    fn record_error(&mut self, field: &Field, value: &(dyn Error + 'static)) {
        self.push(field, &format!("{:?}", Chain(value).to_string()));
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.push(field, &format!("{value:?}"));
    }
}

#[derive(Default)]
struct JsonVisitor {
    message: String,
    fields: Ordered,
}

impl JsonVisitor {
    fn push(&mut self, field: &Field, value: Value) {
        self.fields.set(field.name(), value);
    }
}

impl Visit for JsonVisitor {
    fn record_f64(&mut self, field: &Field, value: f64) {
        self.push(field, value.into());
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.push(field, value.into());
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.push(field, value.into());
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.push(field, value.into());
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        match field.name() {
            "message" => value.clone_into(&mut self.message),
            _ => self.push(field, value.into()),
        }
    }

    fn record_error(&mut self, field: &Field, value: &(dyn Error + 'static)) {
        self.push(field, Chain(value).to_string().into());
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        let text = format!("{value:?}");
        match field.name() {
            "message" => self.message = text,
            _ => self.push(field, text.into()),
        }
    }
}
