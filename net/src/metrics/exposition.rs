//! What scrapers read: OpenMetrics text for one that asks for it, with exemplars; for all others Prometheus's own text, which
//! has none.

use std::{
    borrow::Cow,
    fmt::{self, Write},
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use axum::http::{HeaderMap, HeaderValue, header};
use prometheus_client::{encoding::text, registry::Registry};

/// A text format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Prometheus's text, version 0.0.4.
    Classic,
    /// OpenMetrics text, version 1.0.0.
    OpenMetrics,
}

impl Format {
    /// The one for a scraper: RFC 9110, 12.5.1. OpenMetrics only where it is named, and plain text is not preferred.
    pub fn accepted(headers: &HeaderMap) -> Self {
        let values = headers.get_all(header::ACCEPT).iter();
        let values = values.filter_map(|value| value.to_str().ok());
        let (mut open, mut plain) = (0.0_f32, 0.0_f32);
        for range in values.flat_map(|value| value.split(',')) {
            let mut parts = range.split(';').map(str::trim);
            let kind = parts.next().unwrap_or_default();
            let parameters: Vec<_> = parts.filter_map(|part| part.split_once('=')).collect();
            let of = |name: &str| {
                let mut all = parameters.iter();
                all.find(|(key, _)| key.trim().eq_ignore_ascii_case(name))
                    .map(|(_, value)| value.trim().trim_matches('"'))
            };
            let weight = of("q").map_or(1.0, |it| it.parse().unwrap_or(0.0));
            let known = of("version").is_none_or(|it| it == "1.0.0" || it == "0.0.1");
            if kind.eq_ignore_ascii_case("application/openmetrics-text") && known {
                open = open.max(weight);
            } else if kind.eq_ignore_ascii_case("text/plain") {
                plain = plain.max(weight);
            }
        }
        match open > 0.0 && open >= plain {
            true => Self::OpenMetrics,
            false => Self::Classic,
        }
    }

    /// Its `Content-Type`.
    pub fn content_type(self) -> HeaderValue {
        HeaderValue::from_static(match self {
            Self::Classic => "text/plain; version=0.0.4; charset=utf-8",
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
        })
    }
}

/// Families that write themselves, as what a [`Registry`] writes has no exemplars of others.
pub trait Families: Send + Sync {
    /// Writes all of them as they are now.
    fn write(&self, text: &mut Text<'_>);
}

/// All that a process exposes.
#[derive(Clone)]
pub struct Exposition {
    registry: Arc<Registry>,
    families: Vec<Arc<dyn Families>>,
}

impl From<Arc<Registry>> for Exposition {
    fn from(registry: Arc<Registry>) -> Self {
        Self {
            registry,
            families: Vec::new(),
        }
    }
}

impl Exposition {
    /// With families that write themselves.
    pub fn with(mut self, families: Arc<dyn Families>) -> Self {
        self.families.push(families);
        self
    }

    /// All of it.
    ///
    /// # Errors
    /// If a metric cannot be encoded.
    pub fn text(&self, format: Format) -> Result<String, fmt::Error> {
        let mut all = String::new();
        match format {
            Format::OpenMetrics => text::encode_registry(&mut all, &self.registry)?,
            Format::Classic => text::encode_registry(&mut Classic::new(&mut all), &self.registry)?,
        }
        for families in &self.families {
            families.write(&mut Text::new(&mut all, format));
        }
        if format == Format::OpenMetrics {
            text::encode_eof(&mut all)?;
        }
        Ok(all)
    }
}

/// Names and values of labels, in their order.
pub type Pairs<'a> = [(Cow<'a, str>, Cow<'a, str>)];

/// A measurement that stands for others in its bucket.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Exemplar {
    /// Its trace, not 0.
    pub trace_id: u128,
    /// Its span, not 0.
    pub span_id: u64,
    /// What was measured.
    pub value: f64,
    /// When.
    pub at: SystemTime,
}

/// One upper bound of a histogram.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Bucket {
    /// The last is infinite.
    pub bound: f64,
    /// Of this bucket alone.
    pub count: u64,
    /// Shown in OpenMetrics.
    pub exemplar: Option<Exemplar>,
}

/// Text that families are written to, one after the other.
#[derive(Debug)]
pub struct Text<'a> {
    out: &'a mut String,
    format: Format,
    name: &'static str,
}

impl<'a> Text<'a> {
    /// Appends to `out`.
    pub fn new(out: &'a mut String, format: Format) -> Self {
        Self {
            out,
            format,
            name: "",
        }
    }

    /// Begins a family of counters; its name without `_total`.
    pub fn counters(&mut self, name: &'static str, help: &str) {
        let shown: Cow<'_, str> = match self.format {
            Format::Classic => format!("{name}_total").into(),
            Format::OpenMetrics => name.into(),
        };
        self.begin(&shown, name, help, "counter");
    }

    /// Begins a family of histograms.
    pub fn histograms(&mut self, name: &'static str, help: &str) {
        self.begin(name, name, help, "histogram");
    }

    fn begin(&mut self, shown: &str, name: &'static str, help: &str, kind: &str) {
        self.name = name;
        self.add(format_args!(
            "# HELP {shown} {help}.\n# TYPE {shown} {kind}\n"
        ));
    }

    /// A counter of the family.
    pub fn counter(&mut self, labels: &Pairs<'_>, value: u64) {
        self.series("_total", None, labels);
        self.add(format_args!("{value}\n"));
    }

    /// A histogram of the family.
    pub fn histogram(&mut self, labels: &Pairs<'_>, sum: f64, buckets: &[Bucket]) {
        let count: u64 = buckets.iter().map(|it| it.count).sum();
        self.series("_sum", None, labels);
        self.add(format_args!("{sum:?}\n"));
        self.series("_count", None, labels);
        self.add(format_args!("{count}\n"));
        let mut below = 0;
        for bucket in buckets {
            below += bucket.count;
            self.series("_bucket", Some(bucket.bound), labels);
            self.add(format_args!("{below}"));
            let shown = bucket
                .exemplar
                .filter(|_| self.format == Format::OpenMetrics);
            if let Some(it) = shown {
                let at = it.at.duration_since(UNIX_EPOCH).unwrap_or_default();
                self.add(format_args!(
                    " # {{trace_id=\"{:032x}\",span_id=\"{:016x}\"}} {:?} {}.{:03}",
                    it.trace_id,
                    it.span_id,
                    it.value,
                    at.as_secs(),
                    at.subsec_millis()
                ));
            }
            self.out.push('\n');
        }
    }

    /// `name_suffix{le="bound",labels} `.
    fn series(&mut self, suffix: &str, bound: Option<f64>, labels: &Pairs<'_>) {
        self.out.push_str(self.name);
        self.out.push_str(suffix);
        let mut before = '{';
        if let Some(bound) = bound {
            let bound = match bound.is_finite() {
                true => format!("{bound:?}"),
                false => "+Inf".to_owned(),
            };
            self.label(before, "le", &bound);
            before = ',';
        }
        for (name, value) in labels {
            self.label(before, name, value);
            before = ',';
        }
        self.out.push_str(if before == '{' { " " } else { "} " });
    }

    fn label(&mut self, before: char, name: &str, value: &str) {
        self.out.push(before);
        self.out.push_str(name);
        self.out.push_str("=\"");
        for char in value.chars() {
            match char {
                '"' => self.out.push_str("\\\""),
                '\\' => self.out.push_str("\\\\"),
                '\n' => self.out.push_str("\\n"),
                other => self.out.push(other),
            }
        }
        self.out.push('"');
    }

    fn add(&mut self, text: fmt::Arguments<'_>) {
        // To a string: it cannot fail.
        let _ = self.out.write_fmt(text);
    }
}

/// Makes Prometheus's text of OpenMetrics as it is written: what is told of families differs, their samples do not.
struct Classic<'a> {
    out: &'a mut String,
    /// A comment that has not ended yet.
    comment: String,
    within_sample: bool,
    /// Waits for the type, which decides the name.
    help: Option<String>,
}

impl<'a> Classic<'a> {
    fn new(out: &'a mut String) -> Self {
        Self {
            out,
            comment: String::new(),
            within_sample: false,
            help: None,
        }
    }

    fn finish_comment(&mut self) {
        let comment = std::mem::take(&mut self.comment);
        let mut words = comment.trim_end().splitn(4, ' ').skip(1);
        let (keyword, name, rest) = (words.next(), words.next(), words.next());
        match (keyword, name, rest) {
            (Some("HELP"), Some(_), Some(help)) => self.help = Some(help.to_owned()),
            (Some("TYPE"), Some(name), Some(kind)) => {
                let (suffix, kind) = match kind {
                    "counter" => ("_total", "counter"),
                    "info" => ("_info", "gauge"),
                    "unknown" => ("", "untyped"),
                    other => ("", other),
                };
                if let Some(help) = self.help.take() {
                    let _ = writeln!(self.out, "# HELP {name}{suffix} {help}");
                }
                let _ = writeln!(self.out, "# TYPE {name}{suffix} {kind}");
            }
            // Units and the end are OpenMetrics' own.
            _ => {}
        }
    }
}

impl Write for Classic<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for piece in text.split_inclusive('\n') {
            let ends = piece.ends_with('\n');
            let begins_comment = !self.within_sample && piece.starts_with('#');
            if begins_comment || !self.comment.is_empty() {
                self.comment.push_str(piece);
                if ends {
                    self.finish_comment();
                }
            } else {
                self.out.push_str(piece);
                self.within_sample = !ends;
            }
        }
        Ok(())
    }
}
