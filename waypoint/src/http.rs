//! HTTP inside a stream.

use std::sync::Arc;

use net::{
    drain,
    hbone::{ResetCode, Stream},
};

use crate::{connection::Connection, detect::HttpVersion};

/// Serves requests until the client ends or the drain does. Until requests can be judged, none is let through.
pub(crate) async fn serve(
    stream: Stream,
    version: HttpVersion,
    connection: Arc<Connection>,
    _drain: drain::Watch,
) {
    tracing::debug!(client = %connection.client, ?version, "HTTP is not served yet");
    stream.reset(ResetCode::CONNECT_ERROR);
}
