//! What is told of requests: the hooks that the life of a request calls.

use http::{request, response};

use super::{download::Ending, exchange::Exchange};

/// The head is understood. Must not block.
pub(super) fn start(_exchange: &mut Exchange, _parts: &mut request::Parts) {}

/// The head of the response is known. Must not block.
pub(super) fn responded(_exchange: &mut Exchange, _parts: &mut response::Parts) {}

/// The request is over. Must not block.
pub(super) fn finished(exchange: &Exchange, ending: &Ending) {
    tracing::debug!(
        client = %exchange.connection.client,
        status = exchange.status,
        flags = %exchange.flags,
        details = %exchange.details,
        attempts = exchange.attempts,
        duration = ?ending.duration,
        "a request is over"
    );
}
