//! Which endpoint of a service.

use super::{
    COMPLETE,
    Fate::{Echoed, Ended},
    INBOUND, NO_UPSTREAM, Row, row,
};

pub(super) const ROWS: &[Row] = &[
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
];
