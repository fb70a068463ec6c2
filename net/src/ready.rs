//! Readiness: named gates, all of which must be open, and the endpoint that tells which are not, and why.

use std::{collections::BTreeMap, sync::Arc};

use axum::{
    Router,
    extract::State,
    http::{Method, StatusCode},
    response::{IntoResponse, Response},
    routing::any,
};
use tokio::{net::TcpListener, sync::watch};

use crate::{drain, http1};

/// Path of the readiness endpoint.
pub const PATH: &str = "/healthz/ready";
/// Its port in the proxy's own namespace.
pub const PORT: u16 = 15021;

/// All gates of a process. Ready when none is closed; a process that registers no gate is ready.
#[derive(Clone, Debug)]
pub struct Ready(Arc<watch::Sender<BTreeMap<&'static str, Standing>>>);

/// Where a gate stands.
#[derive(Clone, Debug, Default)]
struct Standing {
    open: bool,
    /// What a closed one waits for; may be empty.
    why: String,
}

/// One condition of readiness; begins closed. Dropping it changes nothing: a task that dies does not make us ready.
#[derive(Debug)]
pub struct Gate {
    ready: Ready,
    name: &'static str,
}

impl Default for Ready {
    fn default() -> Self {
        Self::new()
    }
}

impl Ready {
    /// No gates yet.
    pub fn new() -> Self {
        Self(Arc::new(watch::channel(BTreeMap::new()).0))
    }

    /// Adds a closed gate. The name shows in the endpoint's answer: one of node-tunnel.md 1.4.
    pub fn gate(&self, name: &'static str) -> Gate {
        self.0.send_modify(|gates| {
            gates.insert(name, Standing::default());
        });
        Gate {
            ready: self.clone(),
            name,
        }
    }

    /// The closed gates, sorted.
    pub fn pending(&self) -> Vec<&'static str> {
        let gates = self.0.borrow();
        let closed = gates.iter().filter(|(_, state)| !state.open);
        closed.map(|(name, _)| *name).collect()
    }

    /// One line for each closed gate that says what it waits for, sorted by the gates' names.
    pub fn reasons(&self) -> Vec<String> {
        let gates = self.0.borrow();
        let told = |state: &Standing| !state.open && !state.why.is_empty();
        let told = gates.iter().filter(|(_, state)| told(state));
        told.map(|(name, state)| format!("{name}: {}", state.why))
            .collect()
    }

    /// Whether every gate is open.
    pub fn is_ready(&self) -> bool {
        self.0.borrow().values().all(|state| state.open)
    }

    /// Waits until every gate is open. Cancel-safe.
    pub async fn wait(&self) {
        let mut gates = self.0.subscribe();
        // The sender is `self`, so the channel cannot close while we wait.
        let _ = gates
            .wait_for(|gates| gates.values().all(|state| state.open))
            .await;
    }
}

impl Gate {
    /// The condition holds.
    pub fn open(&self) {
        self.set(true);
    }

    /// The condition holds no longer.
    pub fn close(&self) {
        self.set(false);
    }

    /// Removes the gate: the condition does not apply to this process.
    pub fn dismiss(self) {
        self.ready.0.send_modify(|gates| {
            gates.remove(self.name);
        });
    }

    /// Says what the condition waits for, for whoever asks while it does not hold. Neither opens nor closes it.
    pub fn explain(&self, why: impl Into<String>) {
        let why = why.into();
        self.ready.0.send_if_modified(|gates| {
            if let Some(state) = gates.get_mut(self.name) {
                state.why = why;
            }
            false
        });
    }

    fn set(&self, to: bool) {
        self.ready
            .0
            .send_if_modified(|gates| match gates.get_mut(self.name) {
                Some(state) if state.open != to => {
                    state.open = to;
                    true
                }
                _ => false,
            });
    }
}

/// Serves the readiness endpoint until the drain ends it. It goes on answering during a graceful drain.
pub async fn serve(listener: TcpListener, ready: Ready, drain: drain::Watch) {
    http1::serve(listener, router(ready), drain).await;
}

/// `200 ready`, `500 not ready, pending: ...` with the reasons on further lines; other methods 405, other paths 404
/// (node-tunnel.md 1.4).
pub fn router(ready: Ready) -> Router {
    Router::new().route(PATH, any(answer)).with_state(ready)
}

async fn answer(method: Method, State(ready): State<Ready>) -> Response {
    if method != Method::GET {
        return StatusCode::METHOD_NOT_ALLOWED.into_response();
    }
    let pending = ready.pending();
    if pending.is_empty() {
        return "ready\n".into_response();
    }
    let mut text = format!("not ready, pending: {}\n", pending.join(", "));
    for reason in ready.reasons() {
        text.push_str(&reason);
        text.push('\n');
    }
    (StatusCode::INTERNAL_SERVER_ERROR, text).into_response()
}

#[cfg(test)]
mod tests;
