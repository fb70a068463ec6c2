//! The upstream name servers, as `resolv.conf` names them.

use std::{
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use parking_lot::Mutex;

/// glibc reads no more than this many servers (resolv.conf(5)).
const MAX_SERVERS: usize = 3;
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(2);
const DEFAULT_ATTEMPTS: u32 = 2;
/// How often the file is looked at again.
const RECHECK: Duration = Duration::from_secs(2);

/// Whom to ask, and how patiently.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Upstreams {
    /// In order of preference; port 53.
    pub servers: Vec<SocketAddr>,
    /// For one server, one attempt.
    pub timeout: Duration,
    /// Rounds over all servers.
    pub attempts: u32,
    /// Domains that a client of this file appends: lower case, no dot at either end.
    pub search: Vec<String>,
}

impl Upstreams {
    /// Reads `resolv.conf` text. Lines that make no sense are passed over, as glibc does; of several lists of search
    /// domains the last counts. Source: resolv.conf(5).
    pub fn parse(text: &str, ipv6: bool) -> Self {
        let mut upstreams = Self {
            servers: Vec::new(),
            timeout: DEFAULT_TIMEOUT,
            attempts: DEFAULT_ATTEMPTS,
            search: Vec::new(),
        };
        for line in text.lines() {
            let mut words = line.split_ascii_whitespace();
            match words.next() {
                Some("nameserver") => upstreams.add_server(words.next(), ipv6),
                Some("search" | "domain") => upstreams.search = words.filter_map(domain).collect(),
                Some("options") => words.for_each(|word| upstreams.set_option(word)),
                _ => {}
            }
        }
        upstreams
    }

    /// These, and when they do not answer, others.
    pub fn followed_by(&self, others: impl IntoIterator<Item = SocketAddr>) -> Self {
        let mut all = self.clone();
        all.servers.extend(others);
        all
    }

    /// Others in place of these, asked as patiently.
    pub fn replaced_by(&self, others: impl IntoIterator<Item = SocketAddr>) -> Self {
        Self {
            servers: others.into_iter().collect(),
            ..self.clone()
        }
    }

    fn add_server(&mut self, word: Option<&str>, ipv6: bool) {
        let address: Option<IpAddr> = word.and_then(|word| word.parse().ok());
        let Some(address) = address.filter(|a| ipv6 || a.is_ipv4()) else {
            return;
        };
        if self.servers.len() < MAX_SERVERS {
            self.servers.push((address, 53).into());
        }
    }

    fn set_option(&mut self, word: &str) {
        let Some((name, value)) = word.split_once(':') else {
            return;
        };
        match (name, value.parse::<u32>()) {
            ("timeout", Ok(seconds)) => {
                self.timeout = Duration::from_secs(seconds.clamp(1, 5).into());
            }
            ("attempts", Ok(attempts)) => self.attempts = attempts.clamp(1, 5),
            _ => {}
        }
    }
}

fn domain(word: &str) -> Option<String> {
    let domain = word.trim_matches('.').to_ascii_lowercase();
    (!domain.is_empty()).then_some(domain)
}

/// The servers of a `resolv.conf` that may change while we run.
pub struct ResolvConf {
    path: PathBuf,
    ipv6: bool,
    read: Mutex<Read>,
}

struct Read {
    upstreams: Arc<Upstreams>,
    modified: Option<SystemTime>,
    checked: Instant,
}

impl ResolvConf {
    /// Reads the file; an unreadable one names no server, until it can be read.
    pub fn new(path: PathBuf, ipv6: bool) -> Self {
        let modified = modified(&path);
        let read = Mutex::new(Read {
            upstreams: Arc::new(load(&path, ipv6)),
            modified,
            checked: Instant::now(),
        });
        Self { path, ipv6, read }
    }

    /// The file's, with other servers.
    #[cfg(any(test, feature = "testing"))]
    pub fn with_servers(path: PathBuf, servers: impl IntoIterator<Item = SocketAddr>) -> Self {
        let this = Self::new(path, true);
        let mut upstreams = Upstreams::clone(&this.read.lock().upstreams);
        upstreams.servers = servers.into_iter().collect();
        this.read.lock().upstreams = Arc::new(upstreams);
        this
    }

    /// The servers of now: the file is looked at again every 2 s at most.
    pub fn current(&self) -> Arc<Upstreams> {
        let mut read = self.read.lock();
        if read.checked.elapsed() >= RECHECK {
            read.checked = Instant::now();
            let modified = modified(&self.path);
            if modified != read.modified {
                read.modified = modified;
                read.upstreams = Arc::new(load(&self.path, self.ipv6));
            }
        }
        read.upstreams.clone()
    }
}

fn modified(path: &std::path::Path) -> Option<SystemTime> {
    std::fs::metadata(path).ok()?.modified().ok()
}

fn load(path: &std::path::Path, ipv6: bool) -> Upstreams {
    let text = std::fs::read_to_string(path).unwrap_or_else(|error| {
        tracing::warn!(path = %path.display(), %error, "no name servers: cannot read");
        String::new()
    });
    Upstreams::parse(&text, ipv6)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn servers_and_options_are_read_and_the_rest_is_passed_over() {
        let text = "# comment\nsearch lost\nsearch a.B. c\nnameserver 10.96.0.10\nnameserver fd00::a\nnameserver nonsense\n\
                    options ndots:5 timeout:1 attempts:3 rotate\n";
        let upstreams = Upstreams::parse(text, true);
        assert_eq!(
            upstreams.servers,
            [
                "10.96.0.10:53".parse().unwrap(),
                "[fd00::a]:53".parse().unwrap()
            ]
        );
        assert_eq!(upstreams.timeout, Duration::from_secs(1));
        assert_eq!(upstreams.attempts, 3);
        assert_eq!(upstreams.search, ["a.b", "c"]);
        assert_eq!(Upstreams::parse(text, false).servers.len(), 1);
    }

    #[test]
    fn nothing_useful_means_no_servers() {
        assert!(
            Upstreams::parse("nameserver\noptions timeout\n", true)
                .servers
                .is_empty()
        );
    }
}
