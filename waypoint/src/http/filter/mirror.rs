//! Copies of requests, whose responses nobody sees. A copy never slows the request that it is of.

use std::{sync::Arc, time::Duration};

use http::{Request, Version, uri::Authority};
use http_body_util::BodyExt;
use mesh::l7::{
    choose,
    route::{Mirror, WeightedBackend},
    served::AppProtocol,
    table::Selected,
};
use tokio::{sync::Semaphore, time::timeout};

use super::super::{
    action,
    body::Upload,
    exchange::Exchange,
    forward::{Outgoing, build},
    upstream::ask,
};

/// Copies at once, in the whole process; more are left out.
pub(crate) const MAX_MIRRORS: usize = 1024;
/// How long a copy may take.
const DEADLINE: Duration = Duration::from_secs(60);

/// Starts the copies that the rule and the backend ask for.
pub(crate) fn start(
    exchange: &mut Exchange,
    selected: &Selected,
    backend: &WeightedBackend,
    outgoing: &Outgoing,
) {
    let rule = selected.rule();
    for mirrors in [&rule.mirrors, &backend.mirrors] {
        if mirrors.is_empty() {
            continue;
        }
        let draw = exchange.draw();
        for mirror in choose::mirrors(mirrors, draw) {
            copy(exchange, mirror, outgoing);
        }
    }
}

fn copy(exchange: &Exchange, mirror: &Mirror, outgoing: &Outgoing) {
    let connection = Arc::clone(&exchange.connection);
    let waypoint = Arc::clone(&connection.waypoint);
    let room = Arc::clone(&waypoint.http.mirrors).try_acquire_owned();
    let (Ok(room), Ok(key)) = (room, action::cluster(&connection, &mirror.backend)) else {
        return;
    };
    let snapshot = Arc::clone(&exchange.snapshot);
    let cluster = waypoint.http.upstreams.cluster(&key);
    let members = cluster.members(&snapshot);
    let version = match members.protocol {
        AppProtocol::Http => Version::HTTP_11,
        AppProtocol::Http2 | AppProtocol::Grpc | AppProtocol::GrpcWeb => Version::HTTP_2,
        _ if exchange.is_grpc() => Version::HTTP_2,
        _ => Version::HTTP_11,
    };
    let authority = match mirror.shadow_host {
        true => shadow(&outgoing.authority),
        false => outgoing.authority.clone(),
    };
    let request: Request<Upload> = build(outgoing, &authority, version, outgoing.body.tee());
    tokio::spawn(async move {
        let _room = room;
        let copied = timeout(DEADLINE, async {
            let call = ask::Call {
                waypoint: &waypoint,
                cluster,
                members,
                version,
                destination: connection.destination,
                via: Some(&connection.via),
            };
            let response = call
                .send(request)
                .await
                .map_err(|error| error.to_string())?;
            drain(response.into_body()).await
        });
        if let Ok(Err(error)) | Err(error) = copied.await.map_err(|it| it.to_string()) {
            tracing::debug!(error, "a copy of a request failed");
        }
    });
}

/// Reads a response away, so that its connection can be used again.
async fn drain(mut body: ask::Tracked) -> Result<(), String> {
    while let Some(frame) = body.frame().await {
        frame.map_err(|error| error.to_string())?;
    }
    Ok(())
}

/// `-shadow` after the host, before the port (Istio).
fn shadow(authority: &Authority) -> Authority {
    let shadowed = match authority.port() {
        Some(port) => format!("{}-shadow:{port}", authority.host()),
        None => format!("{}-shadow", authority.host()),
    };
    Authority::try_from(shadowed).unwrap_or_else(|_| authority.clone())
}

/// What bounds copies.
pub(crate) fn room() -> Arc<Semaphore> {
    Arc::new(Semaphore::new(MAX_MIRRORS))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shadow_keeps_its_port() {
        let rows = [("a.b", "a.b-shadow"), ("a.b:80", "a.b-shadow:80")];
        for (host, expected) in rows {
            assert_eq!(shadow(&Authority::from_static(host)), expected);
        }
    }
}
