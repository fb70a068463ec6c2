//! The way on through a forward proxy: HTTP CONNECT (RFC 9110, 9.3.6), over HTTP/1.1.

use std::io;

use http::StatusCode;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// Longest answer that is read, in bytes.
const MOST: usize = 16 * 1024;
const END: &[u8] = b"\r\n\r\n";

/// Why the proxy is no way on.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ProxyError {
    /// The connection to it broke.
    #[error("speak with the forward proxy")]
    Io(#[from] io::Error),
    /// It does not let us.
    #[error("the forward proxy answered {0}")]
    Refused(StatusCode),
    /// Its answer is none.
    #[error("the forward proxy's answer is not HTTP/1")]
    Malformed,
}

/// Asks for a way on to `authority`. After this every byte is the other end's.
pub(super) async fn connect<S: AsyncRead + AsyncWrite + Unpin>(
    stream: &mut S,
    authority: &str,
) -> Result<(), ProxyError> {
    let question = format!("CONNECT {authority} HTTP/1.1\r\nHost: {authority}\r\n\r\n");
    stream.write_all(question.as_bytes()).await?;
    stream.flush().await?;
    let mut left = MOST;
    loop {
        let head = head(stream, &mut left).await?;
        let status = status(&head).ok_or(ProxyError::Malformed)?;
        match status {
            StatusCode::SWITCHING_PROTOCOLS => return Err(ProxyError::Malformed),
            status if status.is_success() => return Ok(()),
            status if status.is_informational() => {}
            status => return Err(ProxyError::Refused(status)),
        }
    }
}

/// Reads a head and nothing behind it. By the byte, which such a short text costs once in a connection's life: what comes
/// after it may be the other end's already, and is to be copied like all the rest.
async fn head<S: AsyncRead + Unpin>(
    stream: &mut S,
    left: &mut usize,
) -> Result<Vec<u8>, ProxyError> {
    let mut head = Vec::with_capacity(128);
    while !head.ends_with(END) {
        *left = left.checked_sub(1).ok_or(ProxyError::Malformed)?;
        head.push(stream.read_u8().await?);
    }
    Ok(head)
}

/// `HTTP/1.x NNN ...`.
fn status(head: &[u8]) -> Option<StatusCode> {
    let rest = head.strip_prefix(b"HTTP/1.")?;
    let (b'0' | b'1', b' ') = (*rest.first()?, *rest.get(1)?) else {
        return None;
    };
    let ends = matches!(rest.get(5)?, b' ' | b'\r');
    StatusCode::from_bytes(rest.get(2..5)?)
        .ok()
        .filter(|_| ends)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What comes of a proxy's answer, and what is left of it.
    async fn answered(answer: &str) -> (Result<(), String>, String) {
        let (mut own, mut proxy) = tokio::io::duplex(64 * 1024);
        proxy.write_all(answer.as_bytes()).await.unwrap();
        proxy.shutdown().await.unwrap();
        let connected = connect(&mut own, "api.example.com:443").await;
        let mut left = String::new();
        own.read_to_string(&mut left).await.unwrap();
        drop(own);
        let mut asked = String::new();
        proxy.read_to_string(&mut asked).await.unwrap();
        let expected = "CONNECT api.example.com:443 HTTP/1.1\r\nHost: api.example.com:443\r\n\r\n";
        assert_eq!(asked, expected);
        (connected.map_err(|error| error.to_string()), left)
    }

    #[tokio::test]
    async fn all_behind_the_head_is_the_other_ends() {
        for answer in [
            "HTTP/1.1 200 Connection established\r\n\r\n220 hello",
            "HTTP/1.0 200\r\nVia: x\r\n\r\n220 hello",
            "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 204 \r\n\r\n220 hello",
        ] {
            assert_eq!(answered(answer).await, (Ok(()), "220 hello".to_owned()));
        }
    }

    #[tokio::test]
    async fn what_is_no_way_on_is_told() {
        let long = format!("HTTP/1.1 200 OK\r\nx: {}\r\n\r\n", "y".repeat(MOST));
        for (answer, expected) in [
            (
                "HTTP/1.1 407 Proxy Authentication Required\r\n\r\n",
                "answered 407",
            ),
            ("HTTP/1.1 101 Switching\r\n\r\n", "not HTTP/1"),
            ("HTTP/2 200\r\n\r\n", "not HTTP/1"),
            ("SSH-2.0-x\r\n\r\n", "not HTTP/1"),
            ("HTTP/1.1 2000\r\n\r\n", "not HTTP/1"),
            ("HTTP/1.1 200 OK\r\n", "speak with"),
            (&long, "not HTTP/1"),
        ] {
            let error = answered(answer).await.0.unwrap_err();
            assert!(error.contains(expected), "{answer}: {error}");
        }
    }
}
