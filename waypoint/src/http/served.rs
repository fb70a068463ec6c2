//! One connection of a client while it is served, and how it ends when the waypoint does.

use std::sync::Arc;
use std::time::Duration;

use http::{HeaderValue, Response, StatusCode, Version, header::CONNECTION};
use net::drain;
use parking_lot::Mutex;
use tokio::time::{Instant, sleep_until};

use super::interim::Interim;
use crate::{connection::Connection, inbound::age_limit};

/// For how long a connection of HTTP/1.1 must have been idle before a drain closes it.
///
/// HTTP/1.1 has no way to tell a client that is idle: what it sends while the connection is being closed is lost, and it
/// may not know whether it was processed. So one that is in use is told with its next response, and only one that has
/// been quiet for long is closed without a word.
const QUIET: Duration = Duration::from_secs(5);

/// One connection that is served.
pub(super) struct Served {
    pub(super) connection: Arc<Connection>,
    pub(super) drain: drain::Watch,
    /// Of a connection of HTTP/1.1.
    pub(super) interim: Interim,
    /// At this age it is told to come again, so that new replicas get their share; zero: never.
    pub(super) age: Duration,
    began: Instant,
    usage: Mutex<Usage>,
}

#[derive(Debug)]
struct Usage {
    requests: u32,
    /// When the last one ended.
    since: Instant,
}

/// A request of a connection, until its response is over.
pub(super) struct Busy(Arc<Served>);

impl Drop for Busy {
    fn drop(&mut self) {
        let mut usage = self.0.usage.lock();
        usage.requests -= 1;
        usage.since = Instant::now();
    }
}

impl Served {
    pub(super) fn new(connection: Arc<Connection>, drain: drain::Watch) -> Arc<Self> {
        let limit = connection.waypoint.config.max_connection_age;
        Arc::new(Self {
            connection,
            drain,
            interim: Interim::default(),
            age: age_limit(limit, rand::random()),
            began: Instant::now(),
            usage: Mutex::new(Usage {
                requests: 0,
                since: Instant::now(),
            }),
        })
    }

    /// A request has come.
    pub(super) fn begin(self: &Arc<Self>) -> Busy {
        self.usage.lock().requests += 1;
        Busy(Arc::clone(self))
    }

    /// Tells a client of HTTP/1.1 with its response that no other one will come. HTTP/2 has GOAWAY.
    pub(super) fn say_goodbye<B>(&self, version: Version, response: &mut Response<B>) {
        let switched = response.status() == StatusCode::SWITCHING_PROTOCOLS;
        let ends = self.drain.mode().is_some() || self.is_old();
        if version < Version::HTTP_2 && !switched && ends {
            let close = HeaderValue::from_static("close");
            response.headers_mut().insert(CONNECTION, close);
        }
    }

    fn is_old(&self) -> bool {
        !self.age.is_zero() && self.began.elapsed() >= self.age
    }

    /// Resolves once we drain and the client has asked for nothing for [`QUIET`].
    pub(super) async fn abandoned(&self) {
        self.drain.clone().started().await;
        let began = Instant::now();
        loop {
            let (idle, since) = {
                let usage = self.usage.lock();
                (usage.requests == 0, usage.since)
            };
            let since = match idle {
                true => since.max(began),
                false => Instant::now(),
            };
            if since.elapsed() >= QUIET {
                return;
            }
            sleep_until(since + QUIET).await;
        }
    }
}
