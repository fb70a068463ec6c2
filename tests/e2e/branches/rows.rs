//! The tables: where from, where to, what becomes of it, and what each tunnel says.

mod arriving;
mod endpoints;
mod leaving;

/// One branch. In texts `@name` is the IPv4 address of a pod or service, `@name6` the IPv6 address of a pod; `a || b` is what
/// ours says and what upstream's does.
pub(super) struct Row {
    /// As docs/interop.md calls it.
    pub(super) branch: &'static str,
    pub(super) from: &'static str,
    pub(super) to: &'static str,
    pub(super) fate: Fate,
    /// Of one line of the client's tunnel.
    pub(super) client: &'static [&'static str],
    /// Of one line of the server's tunnel; none where it is not asked.
    pub(super) server: &'static [&'static str],
}

/// What the client sees.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Fate {
    /// Its bytes come back.
    Echoed,
    /// The connection ends before a byte does.
    Ended,
    /// Upstream's tunnel at the server does otherwise than ours.
    ByServer {
        ours: &'static Fate,
        peers: &'static Fate,
    },
}

const NO_UPSTREAM: &str = "no healthy upstream";
const NO_WAYPOINT: &str = "required waypoint not found || unknown waypoint";
const RECURSION: &str = "attempted recursive call to ourselves";
pub(super) const INBOUND: &str = "direction=\"inbound\"";
const OUTBOUND: &str = "direction=\"outbound\"";
pub(super) const COMPLETE: &str = "connection complete";

const fn row(
    branch: &'static str,
    to: &'static str,
    fate: Fate,
    client: &'static [&'static str],
    server: &'static [&'static str],
) -> Row {
    Row {
        branch,
        from: "client",
        to,
        fate,
        client,
        server,
    }
}

/// Every branch.
pub(super) fn all() -> impl Iterator<Item = &'static Row> {
    let tables = [leaving::ROWS, endpoints::ROWS, arriving::ROWS];
    tables.into_iter().flatten()
}
