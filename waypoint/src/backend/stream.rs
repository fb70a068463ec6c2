//! A connection to an endpoint, whatever it is made of.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
};

use net::{copy, hbone, tls::ClientStream};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
};
use tokio_util::task::AbortOnDropHandle;

/// A connection to an endpoint.
pub(crate) enum Stream {
    /// In a tunnel.
    Tunnel {
        stream: hbone::Stream,
        /// Keeps the inner connection of a double tunnel moving.
        inner: Option<InnerTunnel>,
    },
    /// As it is.
    Tcp(TcpStream),
    /// TLS with the application, in one of the others.
    Tls(Box<ClientStream<Self>>),
}

/// The inner connection of a double tunnel.
pub(crate) struct InnerTunnel {
    pub(super) _driver: AbortOnDropHandle<()>,
}

impl Stream {
    /// For a copy that passes resets on; TLS has to be read and written here.
    pub(crate) fn into_endpoint(self) -> Result<(copy::Endpoint, Option<InnerTunnel>), Self> {
        match self {
            Self::Tunnel { stream, inner } => Ok((stream.into(), inner)),
            Self::Tcp(tcp) => Ok((tcp.into(), None)),
            Self::Tls(_) => Err(self),
        }
    }
}

impl AsyncRead for Stream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tunnel { stream, .. } => Pin::new(stream).poll_read(cx, buf),
            Self::Tcp(tcp) => Pin::new(tcp).poll_read(cx, buf),
            Self::Tls(tls) => Pin::new(tls).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Tunnel { stream, .. } => Pin::new(stream).poll_write(cx, buf),
            Self::Tcp(tcp) => Pin::new(tcp).poll_write(cx, buf),
            Self::Tls(tls) => Pin::new(tls).poll_write(cx, buf),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Tunnel { stream, .. } => Pin::new(stream).poll_write_vectored(cx, bufs),
            Self::Tcp(tcp) => Pin::new(tcp).poll_write_vectored(cx, bufs),
            Self::Tls(tls) => Pin::new(tls).poll_write_vectored(cx, bufs),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match self {
            Self::Tunnel { stream, .. } => stream.is_write_vectored(),
            Self::Tcp(tcp) => tcp.is_write_vectored(),
            Self::Tls(tls) => tls.is_write_vectored(),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tunnel { stream, .. } => Pin::new(stream).poll_flush(cx),
            Self::Tcp(tcp) => Pin::new(tcp).poll_flush(cx),
            Self::Tls(tls) => Pin::new(tls).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tunnel { stream, .. } => Pin::new(stream).poll_shutdown(cx),
            Self::Tcp(tcp) => Pin::new(tcp).poll_shutdown(cx),
            Self::Tls(tls) => Pin::new(tls).poll_shutdown(cx),
        }
    }
}
