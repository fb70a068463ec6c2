//! Asking a part of the mesh over its plain admin endpoints: one request, one answer, nothing kept open.

use std::{io, net::SocketAddr, time::Duration};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    runtime::Handle,
};

/// An answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Answer {
    /// The status.
    pub status: u16,
    /// The body, as text.
    pub body: String,
}

/// The longest answer that is read.
const LIMIT_BYTES: u64 = 64 << 20;

/// Sends a request from the namespace in which `from` lives. HTTP/1.0, so that the answer comes in one piece.
pub(super) async fn request(
    from: &Handle,
    method: &str,
    address: SocketAddr,
    path: &str,
    limit: Duration,
) -> io::Result<Answer> {
    let request =
        format!("{method} {path} HTTP/1.0\r\nHost: {address}\r\nContent-Length: 0\r\n\r\n");
    let asked = from.spawn(async move {
        tokio::time::timeout(limit, ask(address, request))
            .await
            .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
    });
    asked.await.map_err(io::Error::other)?
}

async fn ask(address: SocketAddr, request: String) -> io::Result<Answer> {
    let mut stream = TcpStream::connect(address).await?;
    stream.write_all(request.as_bytes()).await?;
    let mut bytes = Vec::new();
    stream.take(LIMIT_BYTES).read_to_end(&mut bytes).await?;
    parse(&String::from_utf8_lossy(&bytes))
        .ok_or_else(|| io::Error::other("the answer is not HTTP"))
}

fn parse(text: &str) -> Option<Answer> {
    let (head, body) = text.split_once("\r\n\r\n")?;
    let status = head
        .strip_prefix("HTTP/1.")?
        .split(' ')
        .nth(1)?
        .parse()
        .ok()?;
    Some(Answer {
        status,
        body: body.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_has_a_status_and_a_body() {
        let answer = parse("HTTP/1.1 200 OK\r\nx: y\r\n\r\nready\n").unwrap();
        assert_eq!((answer.status, answer.body.as_str()), (200, "ready\n"));
        assert_eq!(parse("nonsense"), None);
    }
}
