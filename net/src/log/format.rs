//! The layer that turns events into lines.

use std::{
    cell::Cell,
    error::Error,
    fmt::{self, Write},
    str::FromStr,
};

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

/// Bytes of a line whose room is kept for the next one.
const KEPT_LINE: usize = 4096;

thread_local! {
    /// Room for a line, empty between lines.
    static LINE: Cell<String> = const { Cell::new(String::new()) };
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
}

impl<S> Layer<S> for Lines
where
    S: Subscriber + for<'a> LookupSpan<'a>,
{
    fn on_new_span(&self, attributes: &span::Attributes<'_>, id: &span::Id, cx: Context<'_, S>) {
        let Some(span) = cx.span(id) else { return };
        let fields = match self.format {
            Format::Plain => {
                let mut fields = String::new();
                attributes.record(&mut PlainVisitor::of_span(&mut fields));
                SpanFields::Plain(fields)
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
            Some(SpanFields::Plain(fields)) => values.record(&mut PlainVisitor::of_span(fields)),
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
        let now = OffsetDateTime::now_utc();
        match self.format {
            Format::Plain => {
                // Taken, and not borrowed: what is logged may log.
                let mut line = LINE.take();
                plain(&mut line, now, event, &context);
                self.writer.line(line.as_bytes());
                line.clear();
                line.shrink_to(KEPT_LINE);
                LINE.set(line);
            }
            Format::Json => self.writer.line(json(now, event, &context).as_bytes()),
        }
    }
}

/// `2026-01-02T03:04:05.000006Z`.
pub(super) fn push_time(to: &mut String, now: OffsetDateTime) {
    let year = u32::try_from(now.year()).unwrap_or_default();
    let parts = [
        (year, 4, '-'),
        (u8::from(now.month()).into(), 2, '-'),
        (now.day().into(), 2, 'T'),
        (now.hour().into(), 2, ':'),
        (now.minute().into(), 2, ':'),
        (now.second().into(), 2, '.'),
        (now.microsecond(), 6, 'Z'),
    ];
    for (number, digits, end) in parts {
        for place in (0..digits).rev() {
            let digit = number / 10_u32.pow(place) % 10;
            to.extend(char::from_digit(digit, 10));
        }
        to.push(end);
    }
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

fn plain<S>(line: &mut String, now: OffsetDateTime, event: &Event<'_>, context: &Context<'_, S>)
where
    S: Subscriber + for<'a> LookupSpan<'a>,
{
    let metadata = event.metadata();
    push_time(line, now);
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
    event.record(&mut PlainVisitor::of_event(line));
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
    let mut time = String::new();
    push_time(&mut time, now);
    object.add("time", time);
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

/// Appends with control characters escaped: what comes from peers must not be able to forge a line.
struct Printable<'a>(&'a mut String);

impl Write for Printable<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        if text.bytes().all(is_plain) {
            self.0.push_str(text);
            return Ok(());
        }
        for c in text.chars() {
            match c.is_control() {
                true => self.0.extend(c.escape_default()),
                false => self.0.push(c),
            }
        }
        Ok(())
    }
}

/// Whether it stands for itself wherever it is.
fn is_plain(byte: u8) -> bool {
    matches!(byte, b' '..=b'~')
}

/// Writes the message, and the fields after it, at the end of a text.
struct PlainVisitor<'a> {
    text: &'a mut String,
    /// Where the message goes, of an event.
    message: Option<usize>,
    /// What stands before the first field; before the others, a space.
    separator: &'static str,
}

impl<'a> PlainVisitor<'a> {
    /// A column for the message, and one for its fields.
    fn of_event(text: &'a mut String) -> Self {
        Self {
            message: Some(text.len()),
            separator: "\t",
            text,
        }
    }

    /// Fields after those that are there.
    fn of_span(text: &'a mut String) -> Self {
        Self {
            message: None,
            separator: if text.is_empty() { "" } else { " " },
            text,
        }
    }

    fn push(&mut self, field: &Field, value: fmt::Arguments<'_>) {
        if field.name() == "message" {
            return self.push_message(value);
        }
        self.text.push_str(self.separator);
        self.separator = " ";
        self.text.push_str(field.name());
        self.text.push('=');
        self.push_value(value);
    }

    fn push_value(&mut self, value: fmt::Arguments<'_>) {
        // A value that cannot be shown is cut short; the text itself takes everything.
        let _ = Printable(self.text).write_fmt(value);
    }

    /// Stands before the fields, also before those that were told first.
    fn push_message(&mut self, value: fmt::Arguments<'_>) {
        if let Some(place) = self.message {
            let fields = self.text.split_off(place);
            self.push_value(value);
            self.text.push_str(&fields);
        }
    }
}

impl Visit for PlainVisitor<'_> {
    fn record_str(&mut self, field: &Field, value: &str) {
        match field.name() {
            "message" => self.push(field, format_args!("{value}")),
            _ if value.bytes().all(|b| is_plain(b) && !b"\"\\".contains(&b)) => {
                self.push(field, format_args!("\"{value}\""));
            }
            _ => self.push(field, format_args!("{value:?}")),
        }
    }

    fn record_error(&mut self, field: &Field, value: &(dyn Error + 'static)) {
        self.push(field, format_args!("{:?}", Chain(value).to_string()));
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.push(field, format_args!("{value:?}"));
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
