//! One question to the node's agent: HTTP/1.1 over its UNIX socket, Istio's message.

use std::{
    io::{self, Read, Write},
    os::unix::net::UnixStream,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use serde_json::json;

use crate::{
    config::{PodArguments, PodIp},
    protocol::{Code, Failure},
};

/// The agent's socket in its run folder. Source: `spec/cni.md` 1.
const SOCKET: &str = "pluginevent.sock";
/// How long an agent that is not there is waited for: as long as an agent's restart takes. Failing at once would cost
/// the sandbox, and kubelet makes the next one after ten seconds or more.
const CONNECT_FOR: Duration = Duration::from_secs(4);
const CONNECT_PAUSE: Duration = Duration::from_millis(100);
/// How long the whole question may take. The runtime holds a lock while plugins run, so never minutes.
const ANSWER_WITHIN: Duration = Duration::from_secs(10);
/// What is read of an answer.
const ANSWER_LIMIT: u64 = 16 * 1024;

/// A sandbox that is about to be used.
#[derive(Debug)]
pub(crate) struct Request {
    pub(crate) netns: String,
    pub(crate) pod: PodArguments,
    pub(crate) ips: Vec<PodIp>,
}

/// Waits for the agent's yes.
pub(crate) fn ask(run_folder: &Path, request: &Request) -> Result<(), Failure> {
    let deadline = Instant::now() + ANSWER_WITHIN;
    let socket = run_folder.join(SOCKET);
    let again = |what: &str, error: &io::Error| {
        let path = socket.display();
        let message = format!("failed to contact node agent: {what} {path}: {error}");
        Failure::new(Code::TryAgain, message)
    };
    let stream = connect(&socket).map_err(|error| again("connect to", &error))?;
    let answer = exchange(stream, &request.message(), deadline);
    let answer = answer.map_err(|error| again("ask", &error))?;
    judge(&answer, &request.pod)
}

fn connect(socket: &Path) -> io::Result<UnixStream> {
    let give_up = Instant::now() + CONNECT_FOR;
    loop {
        match UnixStream::connect(socket) {
            Ok(stream) => return Ok(stream),
            Err(error) if Instant::now() >= give_up => return Err(error),
            Err(_) => thread::sleep(CONNECT_PAUSE),
        }
    }
}

fn exchange(mut stream: UnixStream, message: &str, deadline: Instant) -> io::Result<String> {
    let mut answer = Vec::new();
    stream.set_write_timeout(Some(left(deadline)?))?;
    stream.write_all(message.as_bytes())?;
    let mut buffer = [0; 4096];
    loop {
        stream.set_read_timeout(Some(left(deadline)?))?;
        let read = match stream.read(&mut buffer) {
            Ok(0) => break,
            Ok(read) => read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                return Err(io::ErrorKind::TimedOut.into());
            }
            Err(error) => return Err(error),
        };
        answer.extend_from_slice(&buffer[..read]);
        if answer.len() as u64 > ANSWER_LIMIT {
            break;
        }
    }
    Ok(String::from_utf8_lossy(&answer).into_owned())
}

/// Time to the deadline; an error when there is none, because a socket takes zero for forever.
fn left(deadline: Instant) -> io::Result<Duration> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() {
        return Err(io::ErrorKind::TimedOut.into());
    }
    Ok(left)
}

fn judge(answer: &str, pod: &PodArguments) -> Result<(), Failure> {
    let status = answer
        .split_once(' ')
        .filter(|(version, _)| version.starts_with("HTTP/1."))
        .and_then(|(_, rest)| rest.get(..3))
        .and_then(|code| code.parse::<u16>().ok());
    let why = answer
        .split_once("\r\n\r\n")
        .map_or("", |(_, body)| body.trim());
    let PodArguments {
        name, namespace, ..
    } = pod;
    match status {
        Some(200) => Ok(()),
        Some(status @ (400..=499)) => {
            let message = format!("node agent refused pod {namespace}/{name} ({status}): {why}");
            Err(Failure::new(Code::Refused, message))
        }
        Some(status) => {
            let message =
                format!("node agent cannot enrol pod {namespace}/{name} yet ({status}): {why}");
            Err(Failure::new(Code::TryAgain, message))
        }
        None => {
            let message = "failed to contact node agent: its answer is no HTTP".to_owned();
            Err(Failure::new(Code::TryAgain, message))
        }
    }
}

impl Request {
    fn message(&self) -> String {
        let body = self.json();
        let length = body.len();
        format!(
            "POST /cmdadd HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{body}"
        )
    }

    /// Istio's message (Go's field names and encodings), and the uid, where the runtime tells it.
    fn json(&self) -> String {
        let ip = |ip: &PodIp| {
            json!({
                "Interface": ip.interface,
                "Address": { "IP": ip.address, "Mask": base64(&ip.mask()) },
                "Gateway": ip.gateway,
            })
        };
        let ips: Vec<_> = self.ips.iter().map(ip).collect();
        json!({
            "Netns": self.netns,
            "PodName": self.pod.name,
            "PodNamespace": self.pod.namespace,
            "PodUID": self.pod.uid,
            "IPs": ips,
        })
        .to_string()
    }
}

/// RFC 4648 section 4.
fn base64(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for group in bytes.chunks(3) {
        let byte = |at: usize| u32::from(group.get(at).copied().unwrap_or(0));
        let bits = byte(0) << 16 | byte(1) << 8 | byte(2);
        for place in 0..4 {
            let index = bits >> (18 - 6 * place) & 0x3f;
            let letter = ALPHABET[index as usize] as char;
            text.push(if place <= group.len() { letter } else { '=' });
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod() -> PodArguments {
        PodArguments {
            name: "web-0".into(),
            namespace: "shop".into(),
            uid: Some("1-2".into()),
        }
    }

    #[test]
    fn base64_is_rfc_4648s() {
        for (bytes, text) in [
            ("", ""),
            ("f", "Zg=="),
            ("fo", "Zm8="),
            ("foo", "Zm9v"),
            ("foob", "Zm9vYg=="),
            ("foobar", "Zm9vYmFy"),
        ] {
            assert_eq!(base64(bytes.as_bytes()), text);
        }
    }

    #[test]
    fn the_message_is_istios() {
        let request = Request {
            netns: "/var/run/netns/cni-1".into(),
            pod: pod(),
            ips: vec![PodIp {
                address: "10.1.0.5".parse().expect("an address"),
                prefix: 24,
                gateway: None,
                interface: Some(2),
            }],
        };
        let message = request.message();
        let (head, body) = message.split_once("\r\n\r\n").expect("a body");
        assert!(head.contains(&format!("Content-Length: {}", body.len())));
        let body: serde_json::Value = serde_json::from_str(body).expect("JSON");
        let expected = json!({ "Netns": "/var/run/netns/cni-1", "PodName": "web-0", "PodNamespace": "shop", "PodUID": "1-2",
            "IPs": [{ "Interface": 2, "Address": { "IP": "10.1.0.5", "Mask": "////AA==" }, "Gateway": null }] });
        assert_eq!(body, expected);
    }

    #[test]
    fn only_a_plain_yes_is_one() {
        let table = [
            ("HTTP/1.1 200 OK\r\n\r\n", None),
            ("HTTP/1.1 400 Bad Request\r\n\r\nno", Some(Code::Refused)),
            ("HTTP/1.1 500 Oops\r\n\r\nno", Some(Code::TryAgain)),
            ("HTTP/1.1 503 Busy\r\n\r\nno", Some(Code::TryAgain)),
            ("HTTP/1.1 302 Found\r\n\r\n", Some(Code::TryAgain)),
            ("", Some(Code::TryAgain)),
            ("200", Some(Code::TryAgain)),
            ("SSH-2.0 200 x", Some(Code::TryAgain)),
        ];
        for (answer, expected) in table {
            let code = judge(answer, &pod()).err().map(|failure| failure.code);
            assert_eq!(code, expected, "{answer}");
        }
    }
}
