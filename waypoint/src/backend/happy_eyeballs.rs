//! Several addresses of one name: tried one after the other, soon side by side; the first that answers is taken
//! (RFC 8305, with one list of answers).

use std::{
    future::Future,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use futures_util::{StreamExt, stream::FuturesUnordered};
use tokio::time::sleep;

/// RFC 8305 8.
const ATTEMPT_DELAY: Duration = Duration::from_millis(250);
/// A name with more addresses is tried at these many.
const MAX_ATTEMPTS: usize = 6;

/// Families take turns, beginning with the one that is preferred; otherwise the order of the answers.
pub(super) fn order(addresses: &[IpAddr], prefer_ipv6: bool) -> Vec<IpAddr> {
    let (preferred, others): (Vec<IpAddr>, Vec<IpAddr>) = addresses
        .iter()
        .partition(|address| address.is_ipv6() == prefer_ipv6);
    let longest = preferred.len().max(others.len());
    let turns = (0..longest).flat_map(|at| [preferred.get(at), others.get(at)]);
    turns.flatten().copied().take(MAX_ATTEMPTS).collect()
}

/// The first connection that stands, or the last error; `None` where there is no address.
pub(super) async fn first<T, E, F>(
    addresses: Vec<SocketAddr>,
    connect: impl Fn(SocketAddr) -> F,
) -> Option<Result<T, E>>
where
    F: Future<Output = Result<T, E>>,
{
    let mut waiting = addresses.into_iter();
    let mut attempts = FuturesUnordered::new();
    attempts.push(connect(waiting.next()?));
    let mut last = None;
    loop {
        let ended = tokio::select! {
            biased;
            Some(ended) = attempts.next(), if !attempts.is_empty() => ended,
            () = sleep(ATTEMPT_DELAY), if waiting.len() > 0 => {
                attempts.extend(waiting.next().map(&connect));
                continue;
            }
            else => return last,
        };
        match ended {
            Ok(connected) => return Some(Ok(connected)),
            Err(error) => last = Some(Err(error)),
        }
        attempts.extend(waiting.next().map(&connect));
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn families_take_turns() {
        let addresses = [ip("10.0.0.1"), ip("10.0.0.2"), ip("fd00::1")];
        let v4_first = order(&addresses, false);
        assert_eq!(v4_first, [ip("10.0.0.1"), ip("fd00::1"), ip("10.0.0.2")]);
        assert_eq!(order(&addresses, true)[0], ip("fd00::1"));
        assert!(order(&[], true).is_empty());
    }

    /// Port 1 refuses, 2 never answers, others answer after a second.
    async fn dial(tried: &RefCell<Vec<u16>>, address: SocketAddr) -> Result<u16, ()> {
        tried.borrow_mut().push(address.port());
        match address.port() {
            1 => Err(()),
            2 => std::future::pending().await,
            port => {
                sleep(Duration::from_secs(1)).await;
                Ok(port)
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_address_does_not_hold_up_the_next() {
        let tried = RefCell::new(Vec::new());
        let ask = |ports: &[u16]| {
            let addresses = ports.iter().map(|port| ([10, 0, 0, 1], *port).into());
            first(addresses.collect(), |address| dial(&tried, address))
        };
        let start = tokio::time::Instant::now();
        assert_eq!(ask(&[2, 1, 7, 8]).await, Some(Ok(7)));
        assert_eq!(start.elapsed(), Duration::from_millis(1250));
        assert_eq!(*tried.borrow(), [2, 1, 7, 8]);
        assert_eq!(ask(&[1, 1]).await, Some(Err(())));
        assert_eq!(ask(&[]).await, None);
    }
}
