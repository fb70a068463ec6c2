//! HTTP for the rigs: a server that tells what reached it, servers that break off, and clients that print a line of JSON.

mod client;
mod raw;
mod server;

use anyhow::{Context, Result, bail};

const USAGE: &str = "usage: web serve ADDR NAME
  a server of HTTP/1.1 and HTTP/2; it answers what it got, as JSON, except for paths of its own:
    /status/CODE  /slow/MS  /fail/N/KEY (503 for the first N)  /stream/N (N blocks of 64 KiB)  /echo  /upgrade  /seen
    /keys/X (a JWK set of one Ed25519 key)
web reset ADDR STAGE        a server that resets a connection at `accept`, `request`, `head` or `body`
web get URL [--method M] [--header 'NAME: VALUE']... [--body BYTES] [--count N] [--rate PER_SECOND] [--parallel K] [--h2]
            [--until-input-ends] [--abort-after BYTES]
web upgrade ADDR            a WebSocket handshake, and an echo through it
web raw ADDR TEXT [--every MS]
  sends TEXT (with \\r, \\n, \\\\ and \\xHH), at once or byte for byte, and prints all that comes back";

/// What follows a command: its words, and flags with their values.
pub(crate) struct Words(Vec<String>);

impl Words {
    fn word(&self, at: usize) -> Result<&str> {
        let word = self.0.get(at).with_context(|| USAGE.to_owned())?;
        Ok(word)
    }

    pub(crate) fn has(&self, flag: &str) -> bool {
        self.0.iter().any(|word| word == flag)
    }

    pub(crate) fn values(&self, flag: &str) -> impl Iterator<Item = &str> {
        let pairs = self.0.iter().zip(self.0.iter().skip(1));
        pairs
            .filter(move |(word, _)| *word == flag)
            .map(|(_, value)| value.as_str())
    }

    pub(crate) fn number(&self, flag: &str, default: u64) -> Result<u64> {
        match self.values(flag).next() {
            Some(value) => value.parse().with_context(|| format!("{flag} {value}")),
            None => Ok(default),
        }
    }
}

#[tokio::main]
async fn main() -> Result<()> {
    let mut words = std::env::args().skip(1);
    let command = words.next().unwrap_or_default();
    let words = Words(words.collect());
    match command.as_str() {
        "serve" => server::serve(words.word(0)?, words.word(1)?).await,
        "reset" => server::reset(words.word(0)?, words.word(1)?).await,
        "get" => client::get(words.word(0)?, &words).await,
        "upgrade" => client::upgrade(words.word(0)?).await,
        "raw" => raw::send(words.word(0)?, words.word(1)?, &words).await,
        _ => bail!("{USAGE}"),
    }
}
