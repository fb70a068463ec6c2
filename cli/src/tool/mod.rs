//! Small programs for the demo and for tests, so that neither needs anything that may be missing on a machine: a server that
//! echoes and one that speaks HTTP, clients that talk to them, and an eye on a link.

mod capture;
mod echo;
mod talk;
mod web;

pub(crate) use capture::Seen;

use std::{process::ExitCode, time::Duration};

use anyhow::Result;
use clap::Subcommand;

/// Which program.
#[derive(Debug, Subcommand)]
pub(crate) enum Tool {
    /// Send back what comes in, on every port given
    Echo {
        /// Port to listen on
        #[arg(required = true)]
        ports: Vec<u16>,
    },
    /// Connect to an echo server, send, compare what comes back
    Send {
        /// HOST:PORT
        address: String,
        /// What to send
        #[arg(long, default_value = "hello")]
        text: String,
        /// Repeat the text until it has so many bytes
        #[arg(long)]
        bytes: Option<usize>,
        /// The longest any step may take, in milliseconds
        #[arg(long, default_value_t = 5000)]
        timeout_ms: u64,
    },
    /// Hold one connection to an echo server and say a word every few milliseconds; one line for each word that came back
    Hold {
        /// HOST:PORT
        address: String,
        /// Pause between words, in milliseconds
        #[arg(long, default_value_t = 20)]
        every_ms: u64,
    },
    /// Serve HTTP: every answer tells this server's name and what was asked
    Web {
        /// Port to listen on
        port: u16,
        /// Who it says it is
        #[arg(long, default_value = "web")]
        name: String,
        /// Answer each so manyth request with 503
        #[arg(long, value_parser = clap::value_parser!(u64).range(1..))]
        fail_every: Option<u64>,
    },
    /// Ask an HTTP server; a line for each answer: status, milliseconds, body
    Get {
        /// `http://HOST`, with a port and a path where they are needed
        url: http::Uri,
        /// How many requests, one after the other
        #[arg(long, default_value_t = 1)]
        count: u32,
        /// NAME:VALUE to send along; may be given several times
        #[arg(long = "header", value_parser = web::header)]
        headers: Vec<(http::HeaderName, http::HeaderValue)>,
        /// The longest one answer may take, in milliseconds
        #[arg(long, default_value_t = 5000)]
        timeout_ms: u64,
    },
    /// Watch an interface until standard input ends, then say as JSON what was seen between addresses of a network
    Capture {
        /// The interface
        #[arg(long, default_value = "eth0")]
        interface: String,
        /// A text to look for in the packets
        #[arg(long)]
        marker: String,
        /// Only packets whose both ends are in one of these networks count
        #[arg(long = "within", default_values = ["10.244.0.0/16", "fd00:10:244::/48"])]
        within: Vec<ipnet::IpNet>,
    },
}

/// Runs a program.
pub(crate) fn run(tool: Tool) -> Result<ExitCode> {
    match tool {
        Tool::Echo { ports } => echo::serve(&ports),
        Tool::Send {
            address,
            text,
            bytes,
            timeout_ms,
        } => talk::send(&address, &text, bytes, Duration::from_millis(timeout_ms)),
        Tool::Hold { address, every_ms } => talk::hold(&address, Duration::from_millis(every_ms)),
        Tool::Web {
            port,
            name,
            fail_every,
        } => web::serve(port, name, fail_every),
        Tool::Get {
            url,
            count,
            headers,
            timeout_ms,
        } => web::get(&web::Question {
            url,
            count,
            headers,
            timeout: Duration::from_millis(timeout_ms),
        }),
        Tool::Capture {
            interface,
            marker,
            within,
        } => capture::watch(&interface, marker.as_bytes(), &within),
    }
}
