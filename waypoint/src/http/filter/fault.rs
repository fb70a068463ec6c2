//! Faults on purpose: a delay, an answer that no backend gave.

use http::StatusCode;
use mesh::l7::{choose, response_flags::Flag, route::Abort};

use super::super::{exchange::Exchange, reply::Reply};

/// Waits and answers as the rule's fault says, for its share of the requests.
///
/// # Errors
/// The answer of an abort.
pub(crate) async fn apply(exchange: &mut Exchange) -> Result<(), Box<Reply>> {
    let Some(fault) = exchange.rule().and_then(|it| it.fault.clone()) else {
        return Ok(());
    };
    let draw = exchange.draw();
    let (delay, abort) = choose::fault(&fault, draw);
    if let Some(delay) = delay {
        exchange.flag(Flag::DelayInjected);
        tokio::time::sleep(delay).await;
    }
    match abort {
        None => Ok(()),
        Some(abort) => {
            let reply = answer(abort).flag(Flag::FaultInjected);
            Err(Box::new(reply.body("fault filter abort")))
        }
    }
}

fn answer(abort: Abort) -> Reply {
    const DETAILS: &str = "fault_filter_abort";
    match abort {
        Abort::Http(status) => Reply::new(status, DETAILS),
        Abort::Grpc(status) => Reply::new(http_status(status), DETAILS).grpc_status(status),
    }
}

/// The HTTP status that stands for a gRPC status (google.rpc.Code's own mapping).
fn http_status(grpc: u16) -> StatusCode {
    match grpc {
        0 => StatusCode::OK,
        3 | 9 | 11 => StatusCode::BAD_REQUEST,
        4 => StatusCode::GATEWAY_TIMEOUT,
        5 => StatusCode::NOT_FOUND,
        6 | 10 => StatusCode::CONFLICT,
        7 => StatusCode::FORBIDDEN,
        8 => StatusCode::TOO_MANY_REQUESTS,
        12 => StatusCode::NOT_IMPLEMENTED,
        14 => StatusCode::SERVICE_UNAVAILABLE,
        16 => StatusCode::UNAUTHORIZED,
        _ => StatusCode::INTERNAL_SERVER_ERROR,
    }
}
