//! Bytes both ways where an end is no socket and no tunnel, but TLS in one of them.

use std::{future::Future, io, pin::pin, sync::atomic::Ordering};

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, split};

use super::{Counters, End, Fault, Side};

/// What is read at one time; TLS records are no longer.
const PIECE: usize = 16 * 1024;

/// Copies until both directions have ended, one side fails, or `cancel` is ready. An end is passed on as an end; in the
/// other cases both are dropped, which resets a tunnel and tells a TLS peer that its data may be cut short.
pub async fn through<D, U>(
    downstream: D,
    upstream: U,
    counters: &Counters,
    cancel: impl Future<Output = ()>,
) -> End
where
    D: AsyncRead + AsyncWrite + Unpin,
    U: AsyncRead + AsyncWrite + Unpin,
{
    let (mut down_read, mut down_write) = split(downstream);
    let (mut up_read, mut up_write) = split(upstream);
    let count = |counter: &std::sync::atomic::AtomicU64, bytes: usize| {
        counter.fetch_add(u64::try_from(bytes).unwrap_or(0), Ordering::Relaxed);
    };
    let mut request = pin!(one_way(&mut down_read, &mut up_write, |bytes| {
        count(&counters.received, bytes);
    }));
    let mut response = pin!(one_way(&mut up_read, &mut down_write, |bytes| {
        count(&counters.sent, bytes);
    }));
    let mut cancel = pin!(cancel);
    let (mut request_done, mut response_done) = (false, false);
    let mut first = None;
    loop {
        let (side, result) = tokio::select! {
            biased;
            () = &mut cancel => return End::Cancelled,
            result = &mut request, if !request_done => (Side::Downstream, result),
            result = &mut response, if !response_done => (Side::Upstream, result),
        };
        match result {
            Err(fault) => return fault.end(side),
            Ok(()) if side == Side::Downstream => request_done = true,
            Ok(()) => response_done = true,
        }
        let first = *first.get_or_insert(side);
        if request_done && response_done {
            return End::Finished(first);
        }
    }
}

async fn one_way(
    source: &mut (impl AsyncRead + Unpin),
    sink: &mut (impl AsyncWrite + Unpin),
    moved: impl Fn(usize),
) -> Result<(), Fault> {
    let mut buffer = vec![0; PIECE];
    loop {
        let read = source.read(&mut buffer).await.map_err(Fault::Source)?;
        if read == 0 {
            return end(sink.shutdown().await);
        }
        sink.write_all(&buffer[..read]).await.map_err(Fault::Sink)?;
        sink.flush().await.map_err(Fault::Sink)?;
        moved(read);
    }
}

/// A side that has ended both its halves already cannot be told of the end, and need not.
fn end(told: io::Result<()>) -> Result<(), Fault> {
    match told {
        Err(error) if error.kind() != io::ErrorKind::NotConnected => Err(Fault::Sink(error)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::duplex;

    use super::*;

    #[tokio::test]
    async fn bytes_and_ends_pass_both_ways_and_are_counted() {
        let (mut client, downstream) = duplex(64);
        let (upstream, mut server) = duplex(64);
        let counters = Counters::default();
        let copy = through(downstream, upstream, &counters, std::future::pending());
        let talk = async {
            client.write_all(b"question").await.unwrap();
            client.shutdown().await.unwrap();
            let mut asked = String::new();
            server.read_to_string(&mut asked).await.unwrap();
            server.write_all(b"answer!").await.unwrap();
            server.shutdown().await.unwrap();
            let mut answer = String::new();
            client.read_to_string(&mut answer).await.unwrap();
            (asked, answer)
        };
        let (end, (asked, answer)) = tokio::join!(copy, talk);
        assert!(matches!(end, End::Finished(Side::Downstream)), "{end:?}");
        assert_eq!((asked.as_str(), answer.as_str()), ("question", "answer!"));
        assert_eq!((counters.received(), counters.sent()), (8, 7));
    }

    #[tokio::test]
    async fn a_side_that_breaks_ends_the_other() {
        let (mut client, downstream) = duplex(64);
        let (upstream, server) = duplex(64);
        let counters = Counters::default();
        drop(server);
        let copy = through(downstream, upstream, &counters, std::future::pending());
        client.write_all(b"question").await.unwrap();
        let end = copy.await;
        assert!(matches!(end, End::Reset(Side::Upstream)), "{end:?}");
        assert_eq!(client.read(&mut [0]).await.unwrap(), 0);
    }
}
