//! Logs: one line per event, plain or JSON, in the forms of node-tunnel.md 1.8.
//!
//! Lines are handed to one thread through a bounded, lossless queue: when the reader of our output stalls, whoever
//! logs waits, and nothing is lost or piled up. The line of a connection is written by [`access`].

pub mod access;
mod format;
mod writer;

use std::{fmt, io, sync::Arc};

use parking_lot::Mutex;
use tracing::{Level, Subscriber};
use tracing_subscriber::{
    EnvFilter, Registry, layer::SubscriberExt, registry::LookupSpan, reload,
    util::SubscriberInitExt,
};

pub use format::{Format, ParseFormatError};
pub use writer::QUEUE_LINES;

/// The crates whose name is left out of a line's target, and of a filter's.
const OUR_CRATES: [&str; 8] = [
    "ztunnel",
    "waypoint",
    "controlplane",
    "cni",
    "cli",
    "net",
    "mesh",
    "proto",
];

/// What to log and how.
#[derive(Clone, Debug)]
pub struct Options {
    /// The line's form (`LOG_FORMAT`).
    pub format: Format,
    /// Directives as of `RUST_LOG`: `info`, `xds=debug,info`.
    pub filter: String,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            format: Format::Plain,
            filter: "info".to_owned(),
        }
    }
}

/// Logging that could not be set up or changed.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// A directive that is neither a level nor `target=level`.
    #[error("{directive:?} is neither a level nor TARGET=LEVEL")]
    Directive {
        /// The directive.
        directive: String,
    },
    /// The process logs already.
    #[error("logging is set up already")]
    AlreadySet,
    /// The process is ending.
    #[error("logging is gone")]
    Gone,
    /// The writer's thread did not start.
    #[error("start the log writer")]
    Thread(#[source] io::Error),
}

/// Changes what is logged while the process runs. Cheap to clone.
#[derive(Clone)]
pub struct Handle {
    reload: reload::Handle<EnvFilter, Registry>,
    filters: Arc<Mutex<Filters>>,
    writer: writer::Writer,
}

struct Filters {
    default: String,
    current: String,
}

/// Whether these directives could be logged by.
///
/// # Errors
/// [`LogError::Directive`].
pub fn check(filter: &str) -> Result<(), LogError> {
    parse(filter).map(drop)
}

/// Logs to standard output from now on, for the whole process.
///
/// # Errors
/// [`LogError::Directive`], [`LogError::AlreadySet`], [`LogError::Thread`].
pub fn init(options: &Options) -> Result<Handle, LogError> {
    let (subscriber, handle) = subscriber(options, io::stdout())?;
    subscriber.try_init().map_err(|_| LogError::AlreadySet)?;
    Ok(handle)
}

/// The same without taking over the process: for tests, and for tools that log elsewhere.
///
/// # Errors
/// [`LogError::Directive`], [`LogError::Thread`].
pub fn subscriber(
    options: &Options,
    output: impl io::Write + Send + 'static,
) -> Result<
    (
        impl Subscriber + for<'a> LookupSpan<'a> + Send + Sync,
        Handle,
    ),
    LogError,
> {
    let filter = parse(&options.filter)?;
    let writer = writer::Writer::start(output).map_err(LogError::Thread)?;
    let (filter, reload) = reload::Layer::new(filter);
    let lines = format::Lines::new(options.format, writer.clone());
    let handle = Handle {
        reload,
        filters: Arc::new(Mutex::new(Filters {
            default: options.filter.clone(),
            current: options.filter.clone(),
        })),
        writer,
    };
    Ok((Registry::default().with(filter).with(lines), handle))
}

impl Handle {
    /// The directives in force.
    pub fn filter(&self) -> String {
        self.filters.lock().current.clone()
    }

    /// Adds directives; a later one replaces an earlier one for the same target. `from_default` forgets earlier
    /// additions first.
    ///
    /// # Errors
    /// [`LogError::Directive`]; nothing has changed then.
    pub fn add(&self, directives: &str, from_default: Base) -> Result<(), LogError> {
        parse(directives)?;
        let mut filters = self.filters.lock();
        let base = match from_default {
            Base::Default => &filters.default,
            Base::Current => &filters.current,
        };
        let merged = merge(base, directives);
        self.reload
            .reload(parse(&merged)?)
            .map_err(|_| LogError::Gone)?;
        filters.current = merged;
        Ok(())
    }

    /// Adds a line of somebody else's form, without its end, unless the queue is full; tells whether it was added.
    /// Never waits.
    pub fn line(&self, line: &[u8]) -> bool {
        self.writer.try_line(line)
    }

    /// Waits until every line logged before is written.
    pub fn flush(&self) {
        self.writer.flush();
    }
}

impl fmt::Debug for Handle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Handle")
            .field("filter", &self.filter())
            .finish_non_exhaustive()
    }
}

/// What new directives are added to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Base {
    /// The directives in force.
    Current,
    /// Those the process started with.
    Default,
}

/// Directives of `text`, trimmed; empty ones are left out.
fn directives(text: &str) -> impl Iterator<Item = &str> {
    text.split(',').map(str::trim).filter(|d| !d.is_empty())
}

/// What a directive is about; empty: everything.
fn target(directive: &str) -> &str {
    directive.split_once('=').map_or("", |(target, _)| target)
}

fn merge(base: &str, added: &str) -> String {
    let mut merged: Vec<&str> = Vec::new();
    for directive in directives(base).chain(directives(added)) {
        merged.retain(|earlier| target(earlier) != target(directive));
        merged.push(directive);
    }
    merged.join(",")
}

fn is_level(text: &str) -> bool {
    text.eq_ignore_ascii_case("off") || text.parse::<Level>().is_ok()
}

/// Reads directives. A target is taken as it shows in our lines, without the crate: it stands for that module of each
/// of our crates, and for itself.
fn parse(text: &str) -> Result<EnvFilter, LogError> {
    let mut expanded = Vec::new();
    for directive in directives(text) {
        let refused = || LogError::Directive {
            directive: directive.to_owned(),
        };
        let Some((target, level)) = directive.split_once('=') else {
            if !is_level(directive) {
                return Err(refused());
            }
            expanded.push(directive.to_owned());
            continue;
        };
        let named = target
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"_:-.".contains(&b));
        if target.is_empty() || !named || !is_level(level) {
            return Err(refused());
        }
        expanded.push(directive.to_owned());
        expanded.extend(OUR_CRATES.map(|ours| format!("{ours}::{target}={level}")));
    }
    let joined = expanded.join(",");
    EnvFilter::builder()
        .parse(&joined)
        .map_err(|_| LogError::Directive {
            directive: text.to_owned(),
        })
}

#[cfg(test)]
mod tests;
