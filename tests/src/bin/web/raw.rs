//! A client that sends whatever bytes it is given.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde_json::json;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::{sleep, timeout},
};

use crate::Words;

/// How long the other side may say nothing before that is its answer.
const SILENCE: Duration = Duration::from_secs(2);

/// The longest time for a slow client.
const PATIENCE: Duration = Duration::from_secs(90);

/// `web raw`.
pub(crate) async fn send(address: &str, text: &str, words: &Words) -> Result<()> {
    let bytes = unescape(text)?;
    let every = Duration::from_millis(words.number("--every", 0)?);
    let stream = TcpStream::connect(address).await?;
    let (mut reader, mut writer) = stream.into_split();
    let began = Instant::now();
    let slow = !every.is_zero();
    let write = async {
        if !slow {
            return writer.write_all(&bytes).await;
        }
        for byte in bytes {
            writer.write_all(&[byte]).await?;
            sleep(every).await;
        }
        Ok(())
    };
    let read = async {
        let mut answer = Vec::new();
        let silence = if slow { PATIENCE } else { SILENCE };
        loop {
            match timeout(silence, reader.read_buf(&mut answer)).await {
                Err(_) => return (false, answer),
                // A reset is an end, too.
                Ok(Ok(0) | Err(_)) => return (true, answer),
                Ok(Ok(_)) => {}
            }
        }
    };
    // The end of the answer is the end, whatever is left to be sent.
    tokio::pin!(read);
    let (closed, answer) = tokio::select! {
        end = &mut read => end,
        _ = write => read.await,
    };
    println!(
        "{}",
        json!({
            "answer": String::from_utf8_lossy(&answer),
            "closed": closed,
            "seconds": began.elapsed().as_secs_f64(),
        })
    );
    Ok(())
}

fn unescape(text: &str) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let mut rest = text;
    while let Some((plain, escape)) = rest.split_once('\\') {
        bytes.extend(plain.as_bytes());
        let mut characters = escape.chars();
        match characters.next() {
            Some('r') => bytes.push(b'\r'),
            Some('n') => bytes.push(b'\n'),
            Some('\\') => bytes.push(b'\\'),
            Some('x') => {
                let digits = escape.get(1..3).context("\\xHH")?;
                bytes.push(u8::from_str_radix(digits, 16)?);
                characters = escape[3..].chars();
            }
            other => anyhow::bail!("no escape is \\{other:?}"),
        }
        rest = characters.as_str();
    }
    bytes.extend(rest.as_bytes());
    Ok(bytes)
}
