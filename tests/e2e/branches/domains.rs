//! A client of another trust domain: the mesh's certificate authority signs under another name for a while, and then under
//! its own again, with the same root.

use anyhow::{Context, Result};

use super::{
    Bed, Ends,
    rows::{COMPLETE, Fate, INBOUND, Row},
    state,
};

/// The mesh's trust domain.
pub(super) const OWN: &str = "cluster.local";
const OTHER: &str = "elsewhere.test";

/// What a tunnel is told so that both are names of one trust domain.
const ALIASES: &str = "export LEYLINE_TRUST_DOMAIN_ALIASES=elsewhere.test";

/// The root of both is the same one, so that the domain alone is what is refused.
const REFUSED: Row = Row {
    branch: "a client of another trust domain",
    from: "client",
    to: "@server:9001",
    fate: Fate::Ended,
    client: &["dst.hbone_addr=@server:9001", "alert || alert"],
    server: &[
        INBOUND,
        "src.addr=@client:",
        "trust domain || SanTrustDomainError",
    ],
};

const TAKEN: Row = Row {
    branch: "a client of a trust domain by its other name",
    from: "client",
    to: "@server:9001",
    fate: Fate::Echoed,
    client: &["dst.hbone_addr=@server:9001", COMPLETE],
    server: &[
        INBOUND,
        "spiffe://elsewhere.test/ns/shop/sa/client",
        COMPLETE,
    ],
};

/// The mesh's configuration with a trust domain.
pub(super) fn config(domain: &str) -> String {
    format!("trustDomain: {domain}\n")
}

impl Bed {
    /// The client's certificate is of another trust domain. Our tunnel there knows that its own domain has two names; that
    /// of the server learns it later, where it is ours.
    pub(super) fn another_trust_domain(&self, ends: Ends) -> Result<()> {
        self.sign_for(OTHER)?;
        let told = |node| state::told(node, &self.addresses, OTHER);
        self.tell("node1", &told("node1"), ALIASES)?;
        self.meet_row(&REFUSED, ends);
        if ends.server_is_ours {
            self.sign_for(OWN)?;
            self.tell("node2", &told("node2"), ALIASES)?;
            self.meet_row(&TAKEN, ends);
        }
        Ok(())
    }

    /// Whose certificates are signed from now on.
    fn sign_for(&self, domain: &str) -> Result<()> {
        self.mesh.stop("controlplane")?;
        self.mesh.configure(&config(domain))?;
        self.mesh.resume("controlplane")
    }

    fn meet_row(&self, row: &Row, ends: Ends) {
        self.mesh.eventually(row.branch, || {
            let fates = self.fates(row.from, &[row])?;
            let fate = fates.first().context("a fate")?;
            self.judge(row, ends, fate, &self.logs())
        });
    }
}
