//! The table: where from, where to, what becomes of it, and what each tunnel says.

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

use Fate::{ByServer, Echoed, Ended};

const NO_UPSTREAM: &str = "no healthy upstream";
const NO_WAYPOINT: &str = "required waypoint not found || unknown waypoint";
const RECURSION: &str = "attempted recursive call to ourselves";
const INBOUND: &str = "direction=\"inbound\"";
const OUTBOUND: &str = "direction=\"outbound\"";
const COMPLETE: &str = "connection complete";

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

pub(super) const ROWS: &[Row] = &[
    row(
        "loopback recursion",
        "127.0.0.1:15001",
        Ended,
        &["127.0.0.1:15001", RECURSION],
        &[],
    ),
    row(
        "service waypoint missing",
        "@unwaypointed:9000",
        Ended,
        &["dst.addr=@unwaypointed:9000", NO_WAYPOINT],
        &[],
    ),
    row(
        "service waypoint in another network",
        "@far-guarded:9000",
        Echoed,
        &[
            "dst.addr=@gateway:15008",
            "far-guarded.shop.svc.cluster.local",
            COMPLETE,
        ],
        &[
            INBOUND,
            "dst.hbone_addr=far-guarded.shop.svc.cluster.local:9000",
            "sa/server",
            COMPLETE,
        ],
    ),
    row(
        "service waypoint by name",
        "@waypointed:9001",
        Echoed,
        &[
            "dst.addr=@server:15008",
            "dst.hbone_addr=@waypointed:9001",
            COMPLETE,
        ],
        &[INBOUND, "dst.hbone_addr=@waypointed:9001", COMPLETE],
    ),
    row(
        "service waypoint by address",
        "@by-address:9001",
        Echoed,
        &["dst.hbone_addr=@by-address:9001", COMPLETE],
        &[INBOUND, "dst.hbone_addr=@by-address:9001", COMPLETE],
    ),
    // Upstream's server does not look at weighted waypoints when it asks itself whether it stands in for a service.
    row(
        "service waypoint by weight",
        "@weighted:9001",
        ByServer {
            ours: &Echoed,
            peers: &Ended,
        },
        &["dst.addr=@server:15008", "dst.hbone_addr=@weighted:9001"],
        &[
            INBOUND,
            "dst.hbone_addr=@weighted:9001 || ip mismatch: @server != @weighted",
        ],
    ),
    row(
        "waypoints without weight",
        "@weightless-waypoints:9001",
        Echoed,
        &["dst.hbone_addr=@weightless-waypoints:9001", COMPLETE],
        &[INBOUND, "dst.hbone_addr=@weightless-waypoints:9001"],
    ),
    row(
        "passthrough service with a waypoint",
        "@passing-waypointed:9001",
        Echoed,
        &["dst.hbone_addr=@passing-waypointed:9001", COMPLETE],
        &[INBOUND, "dst.hbone_addr=@passing-waypointed:9001"],
    ),
    row(
        "passthrough service",
        "@plain:9001",
        Echoed,
        &["dst.addr=@plain:9001", OUTBOUND, COMPLETE],
        &[],
    ),
    row(
        "unknown port of a service",
        "@direct:9999",
        Ended,
        &["dst.addr=@direct:9999", NO_UPSTREAM],
        &[],
    ),
    row(
        "service without endpoints",
        "@empty:9000",
        Ended,
        &["dst.addr=@empty:9000", NO_UPSTREAM],
        &[],
    ),
    row(
        "unknown destination",
        "[@plain6]:9001",
        Echoed,
        &["dst.addr=[@plain6]:9001", OUTBOUND, COMPLETE],
        &[],
    ),
    row(
        "another network by a gateway's name",
        "@far:9000",
        Echoed,
        &[
            "dst.addr=@gateway:15008",
            "far.shop.svc.cluster.local",
            COMPLETE,
        ],
        &[
            INBOUND,
            "dst.hbone_addr=far.shop.svc.cluster.local:9000",
            "sa/server",
            COMPLETE,
        ],
    ),
    row(
        "another network by a gateway's address",
        "@near-gateway:9000",
        Echoed,
        &[
            "dst.addr=@gateway:15008",
            "near-gateway.shop.svc.cluster.local",
            COMPLETE,
        ],
        &[
            INBOUND,
            "dst.hbone_addr=near-gateway.shop.svc.cluster.local:9000",
            "sa/gateway",
        ],
    ),
    row(
        "another network without a gateway",
        "@gatewayless:9000",
        Ended,
        &["dst.addr=@gatewayless:9000", NO_UPSTREAM],
        &[],
    ),
    row(
        "another network, nobody expected there",
        "@untrusted:9000",
        Ended,
        &[
            "untrusted.shop.svc.cluster.local",
            "refused: the peer is || identity verification error",
        ],
        &[
            INBOUND,
            "dst.hbone_addr=untrusted.shop.svc.cluster.local:9000",
            "sa/gateway",
        ],
    ),
    row(
        "workload waypoint",
        "240.1.1.1:9001",
        Echoed,
        &[
            "dst.addr=@server:15008",
            "dst.hbone_addr=240.1.1.1:9001",
            COMPLETE,
        ],
        &[INBOUND, "dst.hbone_addr=240.1.1.1:9001"],
    ),
    row(
        "workload waypoint missing",
        "240.1.1.2:9001",
        Ended,
        &["dst.addr=240.1.1.2:9001", NO_WAYPOINT],
        &[],
    ),
    row(
        "workload waypoint before a pod",
        "@backend:9001",
        Echoed,
        &[
            "dst.addr=@server:15008",
            "dst.hbone_addr=@backend:9001",
            COMPLETE,
        ],
        &[INBOUND, "dst.hbone_addr=@backend:9001"],
    ),
    Row {
        branch: "the waypoint itself",
        from: "server",
        to: "@backend:9001",
        fate: Echoed,
        client: &[
            "dst.addr=@backend:15008",
            "dst.hbone_addr=@backend:9001",
            COMPLETE,
        ],
        server: &[
            INBOUND,
            "sa/server",
            "dst.hbone_addr=@backend:9001",
            COMPLETE,
        ],
    },
    row(
        "HBONE by service",
        "@direct:9000",
        Echoed,
        &[
            "dst.addr=@server:15008",
            "dst.hbone_addr=@server:9001",
            "dst.service=\"direct.shop.svc.cluster.local\"",
            COMPLETE,
        ],
        &[
            INBOUND,
            "src.addr=@client:",
            "dst.hbone_addr=@server:9001",
            "sa/client",
            "sa/server",
            COMPLETE,
        ],
    ),
    row(
        "HBONE by name",
        "direct.shop.svc.cluster.local:9000",
        Echoed,
        &["dst.service=\"direct.shop.svc.cluster.local\"", COMPLETE],
        &[INBOUND, "sa/client", COMPLETE],
    ),
    row(
        "HBONE by a pod's IPv4 address",
        "@server:9001",
        Echoed,
        &[
            "dst.addr=@server:15008",
            "dst.hbone_addr=@server:9001",
            COMPLETE,
        ],
        &[INBOUND, "dst.hbone_addr=@server:9001"],
    ),
    row(
        "HBONE by a pod's IPv6 address",
        "[@server6]:9001",
        Echoed,
        &[
            "dst.addr=[@server6]:15008",
            "dst.hbone_addr=[@server6]:9001",
            COMPLETE,
        ],
        &[
            INBOUND,
            "src.addr=[@client6]:",
            "dst.hbone_addr=[@server6]:9001",
            COMPLETE,
        ],
    ),
    row(
        "plain TCP to a pod whose tunnel listens",
        "@late:9001",
        Echoed,
        &["dst.addr=@late:9001", COMPLETE],
        &[
            INBOUND,
            "src.addr=@client:",
            "dst.addr=@late:9001",
            COMPLETE,
        ],
    ),
    row(
        "named port",
        "@named:9000",
        Echoed,
        &[
            "named.shop.svc.cluster.local",
            "dst.hbone_addr=@server:9001",
        ],
        &[],
    ),
    row(
        "named port that no endpoint maps",
        "@unmapped:9000",
        Ended,
        &["dst.addr=@unmapped:9000", NO_UPSTREAM],
        &[],
    ),
    row(
        "IPv6 only service by an IPv4 address",
        "@v6:9000",
        Echoed,
        &[
            "v6.shop.svc.cluster.local",
            "dst.addr=[@server6]:15008",
            "dst.hbone_addr=[@server6]:9001",
        ],
        &[INBOUND, "dst.hbone_addr=[@server6]:9001"],
    ),
    row(
        "unhealthy endpoint",
        "@unhealthy:9000",
        Ended,
        &["dst.addr=@unhealthy:9000", NO_UPSTREAM],
        &[],
    ),
    row(
        "unhealthy endpoint of a service that allows all",
        "@tolerant:9000",
        Echoed,
        &["tolerant.shop.svc.cluster.local", COMPLETE],
        &[],
    ),
    row(
        "endpoint without weight",
        "@weightless:9000",
        Ended,
        &["dst.addr=@weightless:9000", NO_UPSTREAM],
        &[],
    ),
    row(
        "strict preference that nobody meets",
        "@strict:9000",
        Ended,
        &["dst.addr=@strict:9000", NO_UPSTREAM],
        &[],
    ),
    row(
        "failover to another node",
        "@failover:9000",
        Echoed,
        &["failover.shop.svc.cluster.local", COMPLETE],
        &[],
    ),
    row(
        "another identity at the address",
        "@impostor:9000",
        Ended,
        &[
            "impostor.shop.svc.cluster.local",
            "refused: the peer is || identity verification error",
            "sa/somebody",
        ],
        &[
            INBOUND,
            "alert CertificateUnknown || AlertReceived(CertificateUnknown)",
        ],
    ),
    row(
        "another identity that the service vouches for",
        "@vouched:9000",
        Echoed,
        &["vouched.shop.svc.cluster.local", COMPLETE],
        &[],
    ),
    row(
        "plain TCP to a port of the tunnel",
        "@late:15001",
        Ended,
        &["dst.addr=@late:15001"],
        &[INBOUND, "dst.addr=@late:15001", RECURSION],
    ),
    row(
        "plain TCP that policy denies",
        "@late:9003",
        Ended,
        &["dst.addr=@late:9003"],
        &[
            INBOUND,
            "dst.addr=@late:9003",
            "explicitly denied by: shop/no-plaintext-9003",
        ],
    ),
    row(
        "plain TCP to a closed port",
        "@late:9999",
        Ended,
        &["dst.addr=@late:9999"],
        &[INBOUND, "dst.addr=@late:9999", "Connection refused"],
    ),
    row(
        "application tunnel with PROXY",
        "@proxied:9001",
        Echoed,
        &["dst.hbone_addr=@proxied:9001", COMPLETE],
        &[INBOUND, "dst.hbone_addr=@proxied:9001", COMPLETE],
    ),
    row(
        "application tunnel without a protocol",
        "@tunnelled:9001",
        Echoed,
        &["dst.hbone_addr=@tunnelled:9001", COMPLETE],
        &[INBOUND, "dst.hbone_addr=@tunnelled:9001", COMPLETE],
    ),
    row(
        "address of somebody else",
        "@other-waypoint:9000",
        Ended,
        &["other-waypoint.shop.svc.cluster.local", "400 Bad Request"],
        &[
            INBOUND,
            "ip mismatch (address /@other-waypoint) || ip mismatch: @server != @other-waypoint",
        ],
    ),
    row(
        "host name that the server's tunnel does not know",
        "@far-unheard:9000",
        Ended,
        &[
            "far-unheard.shop.svc.cluster.local",
            "503 Service Unavailable",
        ],
        &[
            INBOUND,
            "dst.addr=@gateway:15008",
            "no such service or port here || no service or workload for hostname",
        ],
    ),
    row(
        "HBONE to a port of the tunnel",
        "@server:15008",
        Ended,
        &["dst.hbone_addr=@server:15008", "503 Service Unavailable"],
        &[INBOUND, "dst.addr=@server:15008", RECURSION],
    ),
    row(
        "HBONE that policy denies",
        "@server:9003",
        Ended,
        &["dst.hbone_addr=@server:9003", "401 Unauthorized"],
        &[
            INBOUND,
            "dst.hbone_addr=@server:9003",
            "explicitly denied by: shop/not-9003",
        ],
    ),
    row(
        "HBONE that no policy allows",
        "@closed:9001",
        Ended,
        &["dst.hbone_addr=@closed:9001", "401 Unauthorized"],
        &[
            INBOUND,
            "dst.hbone_addr=@closed:9001",
            "allow policies exist, but none allowed",
        ],
    ),
    // Upstream goes on without a policy that it has not heard of; ours is closed.
    row(
        "policy that is not known",
        "@unsure:9001",
        ByServer {
            ours: &Ended,
            peers: &Echoed,
        },
        &["dst.hbone_addr=@unsure:9001"],
        &[
            INBOUND,
            "dst.hbone_addr=@unsure:9001",
            "policy not known || connection complete",
        ],
    ),
    row(
        "HBONE to a closed port",
        "@server:9999",
        Ended,
        &["dst.hbone_addr=@server:9999", "503 Service Unavailable"],
        &[INBOUND, "dst.hbone_addr=@server:9999", "Connection refused"],
    ),
    Row {
        branch: "a pod to itself",
        from: "server",
        to: "@direct:9000",
        fate: Echoed,
        client: &[
            OUTBOUND,
            "sa/server",
            "dst.service=\"direct.shop.svc.cluster.local\"",
            COMPLETE,
        ],
        server: &[],
    },
];
