//! Refusing truthfully.

use std::time::Duration;

use tokio::net::TcpStream;

/// Ends a connection with RST, so that its peer sees a failure and not an orderly end.
pub(crate) fn reset(stream: TcpStream) {
    // With no time to linger, close sends RST in place of FIN. It fails only on a socket that is closed.
    let _ = socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO));
}
