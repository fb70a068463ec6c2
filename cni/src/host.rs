//! The node's own rules: writes them, and keeps the sets of probed addresses in step with the enrolled pods.
//!
//! One task owns the sets. Changes that arrive together go into one transaction, so enrolling a hundred pods at once
//! costs a few runs of `nft` and not a hundred.

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
};

use net::netns::Netns;
use serde_json::Value;
use tokio::sync::{mpsc, oneshot};

use crate::{
    apply::{ApplyError, Nft},
    rules::{
        Family, ProbeAddresses, Table,
        host::{self, ProbeEntries, ProbeSource},
    },
};

const QUEUE: usize = 256;
/// Istio's sets of whole pods; left behind by its agent, no rule of ours reads them.
const UPSTREAM_SETS: [&str; 2] = ["istio-inpod-probes-v4", "istio-inpod-probes-v6"];

/// The host set could not be changed.
#[derive(Clone, Debug, thiserror::Error)]
#[error("change the node's probe set: {0}")]
pub struct HostSetError(String);

/// Changes the sets. Clones are the same.
#[derive(Clone, Debug)]
pub struct ProbeSets(mpsc::Sender<Change>);

#[derive(Debug)]
enum Change {
    Set {
        uid: String,
        entries: ProbeEntries,
        done: oneshot::Sender<Result<(), HostSetError>>,
    },
    Keep {
        uids: BTreeSet<String>,
    },
}

/// Owns the sets of one node.
#[derive(Debug)]
pub struct Keeper {
    nft: Nft,
    netns: Option<Netns>,
    /// What the kernel holds.
    now: ProbeEntries,
    wanted: ProbeEntries,
    changes: mpsc::Receiver<Change>,
}

/// Writes the node's rules and reads what its sets hold. Entries of an earlier agent stay: probes of its pods must not
/// fail while this one starts.
///
/// # Errors
/// [`ApplyError`].
pub async fn install(
    nft: Nft,
    netns: Option<Netns>,
    source: &ProbeSource,
    addresses: &ProbeAddresses,
) -> Result<(ProbeSets, Keeper), ApplyError> {
    nft.run_text(netns.as_ref(), &host::install(source, addresses))
        .await?;
    let listing = nft.list_ruleset(netns.as_ref()).await?;
    let leftovers = upstream_sets(&listing);
    if !leftovers.is_empty() {
        nft.run_text(netns.as_ref(), &leftovers).await?;
    }
    let now = read_sets(&listing);
    let (sender, changes) = mpsc::channel(QUEUE);
    Ok((
        ProbeSets(sender),
        Keeper {
            nft,
            netns,
            wanted: now.clone(),
            now,
            changes,
        },
    ))
}

/// Removes the node's rules and sets: for when the mesh leaves the node. An agent that merely stops leaves them.
///
/// # Errors
/// [`ApplyError`].
pub async fn uninstall(nft: &Nft, netns: Option<&Netns>) -> Result<(), ApplyError> {
    nft.run_text(netns, &host::remove()).await
}

impl ProbeSets {
    /// Makes `entries` all that the sets hold for the pod. An address that another pod has taken over meanwhile stays
    /// that pod's.
    ///
    /// # Errors
    /// [`HostSetError`]; setting again is harmless.
    pub async fn set(&self, uid: &str, entries: ProbeEntries) -> Result<(), HostSetError> {
        let (done, result) = oneshot::channel();
        let gone = || HostSetError("the agent is stopping".to_owned());
        let change = Change::Set {
            uid: host::comment(uid),
            entries,
            done,
        };
        self.0.send(change).await.map_err(|_| gone())?;
        result.await.map_err(|_| gone())?
    }

    /// Drops the entries of every other pod: those that went while no agent ran.
    pub async fn keep_only(&self, uids: impl IntoIterator<Item = &str>) {
        let uids = uids.into_iter().map(host::comment).collect();
        let _ = self.0.send(Change::Keep { uids }).await;
    }
}

impl Keeper {
    /// Carries out changes until every [`ProbeSets`] is gone.
    pub async fn run(mut self) {
        let mut batch = Vec::new();
        while self.changes.recv_many(&mut batch, QUEUE).await > 0 {
            let mut waiting = Vec::new();
            for change in batch.drain(..) {
                match change {
                    Change::Set { uid, entries, done } => {
                        self.want(&uid, entries);
                        waiting.push(done);
                    }
                    Change::Keep { uids } => self.wanted.retain(|_, owner| uids.contains(owner)),
                }
            }
            let result = self.write().await;
            if let Err(error) = &result {
                tracing::warn!(%error, "host set");
            }
            for done in waiting {
                let _ = done.send(result.clone());
            }
        }
    }

    fn want(&mut self, uid: &str, entries: ProbeEntries) {
        self.wanted
            .retain(|probed, owner| owner != uid || entries.contains_key(probed));
        let named = entries.into_keys().map(|probed| (probed, uid.to_owned()));
        self.wanted.extend(named);
    }

    async fn write(&mut self) -> Result<(), HostSetError> {
        let failed = |error: ApplyError| HostSetError(crate::zds_server::chain(&error));
        let Some(text) = host::change(&self.now, &self.wanted) else {
            return Ok(());
        };
        let written = self
            .nft
            .run_text(self.netns.as_ref(), &text)
            .await
            .map_err(failed);
        if written.is_err() {
            // Someone else may have changed the sets: look again, so that the next try can succeed.
            let listing = self
                .nft
                .list_ruleset(self.netns.as_ref())
                .await
                .map_err(failed)?;
            self.now = read_sets(&listing);
        } else {
            self.now = self.wanted.clone();
        }
        written
    }
}

fn ours<'a>(listing: &'a Value, names: &'a [&'a str]) -> impl Iterator<Item = &'a Value> {
    let objects = listing["nftables"].as_array().into_iter().flatten();
    objects
        .filter_map(|object| object.get("set"))
        .filter(move |set| {
            let name = set["name"].as_str().unwrap_or_default();
            set["family"] == "inet"
                && set["table"] == Table::Nat.nft_name()
                && names.contains(&name)
        })
}

fn upstream_sets(listing: &Value) -> String {
    let table = Table::Nat.nft_name();
    let names = ours(listing, &UPSTREAM_SETS).filter_map(|set| set["name"].as_str());
    names
        .map(|name| format!("delete set inet {table} {name}\n"))
        .collect()
}

fn read_sets(listing: &Value) -> ProbeEntries {
    let names = [Family::V4, Family::V6].map(host::set_name);
    let elements =
        ours(listing, &names).flat_map(|set| set["elem"].as_array().into_iter().flatten());
    elements.filter_map(read_element).collect()
}

/// `{"elem": {"val": {"concat": ["10.0.0.1", 80]}, "comment": "uid"}}`; without a comment the value stands alone.
fn read_element(element: &Value) -> Option<(SocketAddr, String)> {
    let body = element.get("elem");
    let value = body.map_or(element, |body| &body["val"]);
    let concat = value["concat"].as_array()?;
    let address: IpAddr = concat.first()?.as_str()?.parse().ok()?;
    let port = u16::try_from(concat.get(1)?.as_u64()?).ok()?;
    let owner = body
        .and_then(|body| body["comment"].as_str())
        .unwrap_or_default();
    Some((SocketAddr::new(address, port), owner.to_owned()))
}
