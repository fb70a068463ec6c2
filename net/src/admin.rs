//! The admin endpoint: what this process knows, and the few orders an operator may give. On loopback only.
//!
//! Texts and paths: node-tunnel.md 1.6, which `istioctl` reads. Sections of the dump and further paths come from the
//! binary; nothing here knows what a workload is.

mod profile;

use std::{collections::BTreeMap, fmt::Write as _, sync::Arc};

use axum::{
    Router,
    extract::{RawQuery, State},
    http::{StatusCode, header},
    response::{Html, IntoResponse, Response},
    routing::{MethodFilter, any, on},
};
use serde_json::Value;
use tokio::{net::TcpListener, task::JoinSet};

use crate::{
    drain, http1,
    log::{self, Base},
};

/// The admin port in the proxy's own namespace.
pub const PORT: u16 = 15000;

/// Makes one top-level value of `/config_dump`. Called off the runtime; may take long.
pub type Section = Arc<dyn Fn() -> Value + Send + Sync>;

/// Begins the end of the process.
pub type Quit = Arc<dyn Fn() + Send + Sync>;

/// What the endpoint serves.
pub struct Admin {
    name: &'static str,
    sections: BTreeMap<&'static str, Section>,
    log: Option<log::Handle>,
    quit: Quit,
    index: Vec<(&'static str, &'static str)>,
    more: Router,
}

impl Admin {
    /// For the component `name`. `quit` is called by `POST /quitquitquit` and should start a graceful drain.
    pub fn new(name: &'static str, log: Option<log::Handle>, quit: Quit) -> Self {
        Self {
            name,
            sections: BTreeMap::new(),
            log,
            quit,
            index: vec![
                ("/config_dump", "what this process knows, as JSON"),
                (
                    "/logging",
                    "show (POST) or change (POST ?level=) what is logged",
                ),
                ("/quitquitquit", "drain and end (POST)"),
            ],
            more: Router::new(),
        }
    }

    /// Adds a key of `/config_dump`; the last of a name counts.
    pub fn section(
        mut self,
        key: &'static str,
        make: impl Fn() -> Value + Send + Sync + 'static,
    ) -> Self {
        self.sections.insert(key, Arc::new(make));
        self
    }

    /// Adds a path, shown in the index with its meaning.
    pub fn route(
        mut self,
        path: &'static str,
        meaning: &'static str,
        route: axum::routing::MethodRouter,
    ) -> Self {
        self.index.push((path, meaning));
        self.more = self.more.route(path, route);
        self
    }

    /// The whole endpoint.
    pub fn router(self) -> Router {
        let paths: Vec<_> = self.index.iter().chain(&profile::INDEX).copied().collect();
        let index = Html(index(self.name, &paths));
        let dump = Arc::new(self.sections);
        let quit = self.quit;
        let quitting = move || async move {
            quit();
            "shutdown now\n"
        };
        let refused = || async { StatusCode::METHOD_NOT_ALLOWED };
        Router::new()
            .route("/", any(move || async move { index }))
            .route("/config_dump", any(config_dump).with_state(dump))
            .route(
                "/logging",
                on(MethodFilter::POST, logging)
                    .fallback(logging_help)
                    .with_state(self.log),
            )
            .route(
                "/quitquitquit",
                on(MethodFilter::POST, quitting).fallback(refused),
            )
            .merge(profile::routes())
            .merge(self.more)
    }
}

/// Serves the endpoint on `listeners`, which should be loopback's, until the drain is forced.
pub async fn serve(listeners: Vec<TcpListener>, admin: Admin, drain: drain::Watch) {
    let router = admin.router();
    let mut serving = JoinSet::new();
    for listener in listeners {
        serving.spawn(http1::serve(listener, router.clone(), drain.clone()));
    }
    drop(drain);
    while serving.join_next().await.is_some() {}
}

fn index(name: &str, paths: &[(&str, &str)]) -> String {
    let mut html = format!("<!doctype html>\n<title>{name}</title>\n<h1>{name}</h1>\n<table>\n");
    for (path, meaning) in paths {
        let _ = writeln!(
            html,
            "<tr><td><a href=\"{path}\">{path}</a></td><td>{meaning}</td></tr>"
        );
    }
    html.push_str("</table>\n");
    html
}

async fn config_dump(State(sections): State<Arc<BTreeMap<&'static str, Section>>>) -> Response {
    let made = tokio::task::spawn_blocking(move || {
        let made = sections.iter();
        let made = made.map(|(key, make)| ((*key).to_owned(), make()));
        serde_json::to_string_pretty(&Value::Object(made.collect()))
    });
    match made.await {
        Ok(Ok(text)) => ([(header::CONTENT_TYPE, "application/json")], text).into_response(),
        Ok(Err(error)) => failed(&error),
        Err(error) => failed(&error),
    }
}

fn failed(error: &dyn std::error::Error) -> Response {
    let text = format!("cannot make the dump: {error}\n");
    (StatusCode::INTERNAL_SERVER_ERROR, text).into_response()
}

const LOGGING_HELP: &str = "usage:
  POST /logging                             show what is logged
  POST /logging?level=LEVEL                 for everything
  POST /logging?level=TARGET=LEVEL[,...]    for these targets; add &reset to forget earlier changes
  POST /logging?reset                       as at the start
LEVEL is one of error, warn, info, debug, trace, off
";

async fn logging_help() -> Response {
    (StatusCode::METHOD_NOT_ALLOWED, LOGGING_HELP).into_response()
}

async fn logging(State(log): State<Option<log::Handle>>, RawQuery(query): RawQuery) -> Response {
    let Some(log) = log else {
        return (StatusCode::NOT_FOUND, "this process does not log\n").into_response();
    };
    let (level, base) = logging_query(query.as_deref().unwrap_or_default());
    if (level.is_some() || base == Base::Default)
        && let Err(error) = log.add(level.as_deref().unwrap_or_default(), base)
    {
        let text = format!("{error}\n{LOGGING_HELP}");
        return (StatusCode::BAD_REQUEST, text).into_response();
    }
    format!("current log level is {}\n", log.filter()).into_response()
}

/// `level` and whether `reset` is there; other keys are ignored.
fn logging_query(query: &str) -> (Option<String>, Base) {
    let mut level = None;
    let mut base = Base::Current;
    for pair in query.split('&') {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        match key {
            "level" => level = Some(unescape(value)),
            "reset" => base = Base::Default,
            _ => {}
        }
    }
    (level, base)
}

/// Percent-decoding of the few characters that a directive may have escaped.
fn unescape(text: &str) -> String {
    let mut plain = text.to_owned();
    for (escaped, c) in [
        ("%3D", "="),
        ("%3d", "="),
        ("%2C", ","),
        ("%2c", ","),
        ("%3A", ":"),
        ("%3a", ":"),
    ] {
        plain = plain.replace(escaped, c);
    }
    plain
}

#[cfg(test)]
mod tests;
