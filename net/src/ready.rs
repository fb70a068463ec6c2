//! Readiness: named gates, all of which must be open, and the endpoint that tells which are not.

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
pub struct Ready(Arc<watch::Sender<BTreeMap<&'static str, bool>>>);

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
            gates.insert(name, false);
        });
        Gate {
            ready: self.clone(),
            name,
        }
    }

    /// The closed gates, sorted.
    pub fn pending(&self) -> Vec<&'static str> {
        let gates = self.0.borrow();
        let closed = gates.iter().filter(|(_, open)| !**open);
        closed.map(|(name, _)| *name).collect()
    }

    /// Whether every gate is open.
    pub fn is_ready(&self) -> bool {
        self.0.borrow().values().all(|open| *open)
    }

    /// Waits until every gate is open. Cancel-safe.
    pub async fn wait(&self) {
        let mut gates = self.0.subscribe();
        // The sender is `self`, so the channel cannot close while we wait.
        let _ = gates
            .wait_for(|gates| gates.values().all(|open| *open))
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

    fn set(&self, to: bool) {
        self.ready
            .0
            .send_if_modified(|gates| match gates.get_mut(self.name) {
                Some(open) if *open != to => {
                    *open = to;
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

/// `200 ready`, `500 not ready, pending: ...`; other methods 405, other paths 404 (node-tunnel.md 1.4).
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
    let text = format!("not ready, pending: {}\n", pending.join(", "));
    (StatusCode::INTERNAL_SERVER_ERROR, text).into_response()
}

#[cfg(test)]
mod tests;
