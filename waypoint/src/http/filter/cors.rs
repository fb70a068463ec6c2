//! Cross-origin requests: preflights are answered here, other answers are marked for the browser.

use http::{StatusCode, request::Parts};
use mesh::l7::cors::{self, CorsDecision};

use super::super::{exchange::Exchange, reply::Reply, route};

/// Decides by the rule's policy, if it has one.
///
/// # Errors
/// The answer to a preflight.
pub(crate) fn apply(exchange: &mut Exchange, parts: &Parts) -> Result<(), Box<Reply>> {
    let Some(selected) = exchange.route.clone() else {
        return Ok(());
    };
    let Some(policy) = &selected.rule().cors else {
        return Ok(());
    };
    match cors::decide(policy, &route::facts(exchange, parts)) {
        CorsDecision::Forward(headers) => {
            exchange.cors = headers;
            Ok(())
        }
        CorsDecision::Preflight(headers) => {
            let mut reply = Reply::new(StatusCode::OK, "cors_preflight");
            reply.headers = headers;
            Err(Box::new(reply))
        }
    }
}
