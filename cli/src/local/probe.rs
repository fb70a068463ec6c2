//! Probes of containers: what a kubelet sends, from the node's namespace and with the mark by which the agent's rules
//! know them.

use std::{
    collections::BTreeMap,
    io,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use k8s_openapi::api::core::v1::{HTTPGetAction, Probe};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpSocket, TcpStream},
    runtime::Handle,
};

use super::plan;

/// The mark on every probe, which the agent is told.
pub(super) const MARK: u32 = 0x2000;

/// Why a probe did not succeed.
#[derive(Debug, thiserror::Error)]
pub(super) enum ProbeError {
    /// No connection.
    #[error("connect to {0}")]
    Connect(SocketAddr, #[source] io::Error),
    /// A connection, but no HTTP answer.
    #[error("no HTTP answer from {0}")]
    Http(SocketAddr, #[source] io::Error),
    /// An answer that says no.
    #[error("status {0}")]
    Status(u16),
    /// Too slow.
    #[error("no answer within {0:?}")]
    TimedOut(Duration),
    /// The command ended with another code than 0.
    #[error("the command ended with {0}")]
    Exit(i32),
    /// It could not be tried.
    #[error("{0}")]
    Invalid(String),
}

/// What a probe calls.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Call {
    /// Connecting is enough.
    Tcp(SocketAddr),
    /// A status from 200 to 399.
    Http(SocketAddr, Box<HTTPGetAction>),
    /// A command inside the container that ends with 0.
    Exec(Vec<String>),
}

/// Works out what to call.
pub(super) fn call(
    probe: &Probe,
    pod: IpAddr,
    ports: &BTreeMap<String, i32>,
) -> Result<Call, ProbeError> {
    let invalid = |text: &str| ProbeError::Invalid(text.to_owned());
    if let Some(exec) = &probe.exec {
        return Ok(Call::Exec(exec.command.clone().unwrap_or_default()));
    }
    if let Some(tcp) = &probe.tcp_socket {
        let host = host(tcp.host.as_deref(), pod)?;
        let port =
            plan::port(&tcp.port, ports).ok_or_else(|| invalid("the probe's port is unknown"))?;
        return Ok(Call::Tcp(SocketAddr::new(host, port)));
    }
    if let Some(http) = &probe.http_get {
        if http.scheme.as_deref() == Some("HTTPS") {
            return Err(invalid("probes over HTTPS are not supported here"));
        }
        let host = host(http.host.as_deref(), pod)?;
        let port =
            plan::port(&http.port, ports).ok_or_else(|| invalid("the probe's port is unknown"))?;
        return Ok(Call::Http(
            SocketAddr::new(host, port),
            Box::new(http.clone()),
        ));
    }
    Err(invalid(
        "only exec, httpGet and tcpSocket probes are supported here",
    ))
}

fn host(host: Option<&str>, pod: IpAddr) -> Result<IpAddr, ProbeError> {
    match host.filter(|host| !host.is_empty()) {
        None => Ok(pod),
        Some(host) => host
            .parse()
            .map_err(|_| ProbeError::Invalid(format!("the probe's host {host} is no address"))),
    }
}

/// The TCP port that a probe calls, which the agent's rules let through.
pub(super) fn port(probe: &Probe, ports: &BTreeMap<String, i32>) -> Option<u16> {
    match call(probe, IpAddr::from([0, 0, 0, 0]), ports).ok()? {
        Call::Tcp(address) | Call::Http(address, _) => Some(address.port()),
        Call::Exec(_) => None,
    }
}

/// Sends one TCP or HTTP probe from `node`, the runtime that lives in the node's namespace.
pub(super) async fn send(node: &Handle, call: Call, limit: Duration) -> Result<(), ProbeError> {
    let sent = node.spawn(async move {
        let sent = tokio::time::timeout(limit, send_here(call));
        sent.await.unwrap_or(Err(ProbeError::TimedOut(limit)))
    });
    sent.await
        .unwrap_or_else(|error| Err(ProbeError::Invalid(error.to_string())))
}

async fn send_here(call: Call) -> Result<(), ProbeError> {
    match call {
        Call::Tcp(address) => connect(address)
            .await
            .map(drop)
            .map_err(|error| ProbeError::Connect(address, error)),
        Call::Http(address, action) => {
            let stream = connect(address)
                .await
                .map_err(|error| ProbeError::Connect(address, error))?;
            match status(stream, address, &action)
                .await
                .map_err(|error| ProbeError::Http(address, error))?
            {
                200..400 => Ok(()),
                status => Err(ProbeError::Status(status)),
            }
        }
        Call::Exec(_) => Err(ProbeError::Invalid(
            "commands are run by the container".to_owned(),
        )),
    }
}

async fn connect(address: SocketAddr) -> io::Result<TcpStream> {
    let socket = if address.is_ipv4() {
        TcpSocket::new_v4()
    } else {
        TcpSocket::new_v6()
    }?;
    socket2::SockRef::from(&socket).set_mark(MARK)?;
    socket.connect(address).await
}

/// RFC 9112 4: only the status line matters, so a client library would be too much.
async fn status(
    mut stream: TcpStream,
    address: SocketAddr,
    action: &HTTPGetAction,
) -> io::Result<u16> {
    let path = action.path.as_deref().unwrap_or("/");
    let headers = action.http_headers.iter().flatten();
    let named = |name: &str| {
        headers
            .clone()
            .find(|header| header.name.eq_ignore_ascii_case(name))
    };
    let host = named("host").map_or_else(|| address.to_string(), |header| header.value.clone());
    let others = headers
        .clone()
        .filter(|header| !header.name.eq_ignore_ascii_case("host"));
    let others: String = others
        .map(|header| format!("{}: {}\r\n", header.name, header.value))
        .collect();
    let request = format!(
        "GET {path} HTTP/1.1\r\nHost: {host}\r\nUser-Agent: kube-probe/leyline\r\nConnection: close\r\n{others}\r\n"
    );
    stream.write_all(request.as_bytes()).await?;
    let mut line = Vec::new();
    while line.len() < 512 && !line.contains(&b'\n') && stream.read_buf(&mut line).await? > 0 {}
    parse_status(&line).ok_or_else(|| io::Error::other("the answer is not HTTP"))
}

fn parse_status(line: &[u8]) -> Option<u16> {
    let line = std::str::from_utf8(line.split(|byte| *byte == b'\r').next()?).ok()?;
    let mut words = line.split(' ');
    words.next()?.strip_prefix("HTTP/1.")?;
    words.next()?.parse().ok()
}

/// The rhythm of a probe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Rhythm {
    /// Wait before the first.
    pub initial_delay: Duration,
    /// From one to the next.
    pub period: Duration,
    /// The longest an answer may take.
    pub timeout: Duration,
    /// So many in a row make it ready.
    pub successes: u32,
    /// So many in a row make it unready (or restart it).
    pub failures: u32,
}

impl Rhythm {
    /// Kubernetes' defaults where the probe is silent.
    pub(super) fn of(probe: &Probe) -> Self {
        let seconds = |value: Option<i32>, default: u64, least: u64| {
            let chosen = value
                .and_then(|value| u64::try_from(value).ok())
                .unwrap_or(default);
            Duration::from_secs(chosen.max(least))
        };
        let count = |value: Option<i32>, default| {
            value
                .and_then(|value| u32::try_from(value).ok())
                .unwrap_or(default)
                .max(1)
        };
        Self {
            initial_delay: seconds(probe.initial_delay_seconds, 0, 0),
            period: seconds(probe.period_seconds, 10, 1),
            timeout: seconds(probe.timeout_seconds, 1, 1),
            successes: count(probe.success_threshold, 1),
            failures: count(probe.failure_threshold, 3),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn probes_find_their_port_by_name_or_number() {
        let ports = BTreeMap::from([("web".to_owned(), 8080)]);
        let parse = |value| serde_json::from_value::<Probe>(value).unwrap();
        assert_eq!(
            port(
                &parse(json!({"httpGet": {"port": "web", "path": "/"}})),
                &ports
            ),
            Some(8080)
        );
        assert_eq!(
            port(&parse(json!({"tcpSocket": {"port": 5432}})), &ports),
            Some(5432)
        );
        assert_eq!(
            port(&parse(json!({"exec": {"command": ["true"]}})), &ports),
            None
        );
        assert_eq!(
            port(&parse(json!({"tcpSocket": {"port": "other"}})), &ports),
            None
        );
    }

    #[test]
    fn only_a_status_line_is_an_answer() {
        assert_eq!(parse_status(b"HTTP/1.1 204 No Content\r\n"), Some(204));
        assert_eq!(parse_status(b"SSH-2.0-x\r\n"), None);
        assert_eq!(parse_status(b""), None);
    }

    #[test]
    fn a_silent_probe_has_the_usual_rhythm() {
        let rhythm = Rhythm::of(&Probe::default());
        let seconds = Duration::from_secs;
        assert_eq!(
            (
                rhythm.period,
                rhythm.timeout,
                rhythm.successes,
                rhythm.failures
            ),
            (seconds(10), seconds(1), 1, 3)
        );
    }
}
