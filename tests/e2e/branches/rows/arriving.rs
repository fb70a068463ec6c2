//! Arriving at a pod, in plain (15006) and by HBONE (15008).

use super::{
    COMPLETE,
    Fate::{ByServer, Echoed, Ended},
    INBOUND, OUTBOUND, RECURSION, Row, row,
};

pub(super) const ROWS: &[Row] = &[
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
    // Nothing says that it is so: only time does.
    Row {
        branch: "HBONE to a port that the network blocks",
        from: "backend",
        to: "@walled:9001",
        fate: Ended,
        client: &[
            OUTBOUND,
            "dst.addr=@walled:15008",
            "dst.hbone_addr=@walled:9001",
            "maybe a NetworkPolicy is blocking HBONE port 15008",
        ],
        server: &[],
    },
];
