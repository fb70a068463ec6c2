//! A part of the Gateway API's conformance suite (`make conformance` runs the whole).

use anyhow::Result;
use rig::cluster::{bed::shared, conformance};

#[test]
fn requests_are_routed_as_the_gateway_api_says() -> Result<()> {
    let (_turn, bed) = shared()?;
    if bed
        .rig("requests_are_routed_as_the_gateway_api_says")
        .is_none()
    {
        return Ok(());
    }
    let part = [
        "MeshHTTPRouteMatching",
        "MeshHTTPRouteWeight",
        "MeshGRPCRouteWeight",
        "MeshConsumerRoute",
        "MeshHTTPRouteRewritePath",
    ];
    conformance::run(bed, &part, None).map(drop)
}
