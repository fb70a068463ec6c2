//! An endless answer of a part's own port, one line after the other.

use std::time::Duration;

use anyhow::{Result, anyhow, bail};
use http_body_util::{BodyExt, Empty};
use hyper::{Request, body::Bytes, client::conn::http1};
use hyper_util::rt::TokioIo;
use tokio_util::task::AbortOnDropHandle;

use super::cluster::PATIENCE;

/// A stream that says nothing for this long is dead: the parts show that they live more often.
const SILENCE: Duration = Duration::from_secs(45);
/// The longest line of a stream that is read.
const MAX_LINE_BYTES: usize = 1 << 20;

/// Asks for a path and reads the answer until it ends, nothing is heard for [`SILENCE`], or `each` fails.
pub(super) async fn lines(
    stream: impl tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
    port: u16,
    path: &str,
    mut each: impl FnMut(&str) -> Result<()>,
) -> Result<()> {
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    let _driver = AbortOnDropHandle::new(tokio::spawn(connection));
    let request = Request::builder()
        .uri(path)
        .header(http::header::HOST, format!("localhost:{port}"))
        .body(Empty::<Bytes>::new())?;
    let answered = tokio::time::timeout(PATIENCE, sender.send_request(request)).await;
    let response = answered.map_err(|_| anyhow!("no answer for {} s", PATIENCE.as_secs()))??;
    if response.status() != 200 {
        bail!("answers {}", response.status());
    }
    let mut body = response.into_body();
    let mut partial = Vec::new();
    loop {
        let frame = tokio::time::timeout(SILENCE, body.frame()).await;
        let frame = frame.map_err(|_| anyhow!("nothing heard for {} s", SILENCE.as_secs()))?;
        let Some(frame) = frame else { return Ok(()) };
        let Ok(data) = frame?.into_data() else {
            continue;
        };
        partial.extend_from_slice(&data);
        while let Some(end) = partial.iter().position(|it| *it == b'\n') {
            let line: Vec<u8> = partial.drain(..=end).collect();
            each(String::from_utf8_lossy(&line).trim_end())?;
        }
        if partial.len() > MAX_LINE_BYTES {
            bail!("a line of more than {MAX_LINE_BYTES} bytes");
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, duplex};

    use super::*;

    /// What is read of a pod that answers so, in pieces, and then hangs up.
    async fn read(pieces: &[&str]) -> (Vec<String>, Result<()>) {
        let (ours, theirs) = duplex(64);
        let mut theirs = BufReader::new(theirs);
        let served = async {
            theirs.read_line(&mut String::new()).await.unwrap();
            for piece in pieces {
                theirs.write_all(piece.as_bytes()).await.unwrap();
            }
            drop(theirs);
        };
        let mut seen = Vec::new();
        let reading = lines(ours, 15000, "/flows", |line| {
            seen.push(line.to_owned());
            Ok(())
        });
        let ((), ended) = tokio::join!(served, reading);
        (seen, ended)
    }

    #[tokio::test]
    async fn a_stream_is_read_by_lines_however_it_is_cut() {
        let head = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n";
        let pieces = [
            head,
            "3\r\n{}\n\r\n",
            "3\r\n{\"a\r\n",
            "6\r\n\":1}\n{\r\n2\r\n}\n\r\n",
            "0\r\n\r\n",
        ];
        let (seen, ended) = read(&pieces).await;
        ended.unwrap();
        assert_eq!(seen, ["{}", "{\"a\":1}", "{}"]);
    }

    #[tokio::test]
    async fn a_tunnel_that_does_not_know_the_path_is_told_apart() {
        let (seen, ended) = read(&["HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n"]).await;
        assert!(seen.is_empty());
        assert!(ended.unwrap_err().to_string().contains("404"));
    }
}
