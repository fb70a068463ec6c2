//! The embedded mesh's wires: a bridge that joins the nodes, a pair of interfaces for every pod, addresses and routes,
//! all by rtnetlink and all inside the mesh's own namespaces.

use std::{
    fs::{self, File},
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::AsRawFd,
};

use futures_util::TryStreamExt;
use rtnetlink::{
    Handle, LinkBridge, LinkMessageBuilder, LinkUnspec, LinkVeth, RouteMessageBuilder,
    packet_route::{
        link::{InfoData, InfoKind, InfoVeth},
        route::RouteScope,
    },
};

use super::{
    address::{self, Dual, LINK_PREFIX, POD_PREFIX},
    netns::Netns,
    parts::PORTS,
};

const BRIDGE: &str = "mesh";
/// Every pod's gateway for IPv6: the same link-local address on the node's end of each pair.
const POD_GATEWAY_V6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);

/// A namespace that stands on the bridge: a node, or the control plane's.
#[derive(Debug)]
pub(super) struct Station<'a> {
    /// Its namespace.
    pub netns: &'a Netns,
    /// Its address on the link.
    pub address: Dual,
    /// Its number, when it has pods.
    pub node: Option<u8>,
}

/// Lays the bridge in the calling process's own namespace and joins `stations` to it. Call it once.
pub(super) async fn lay(stations: &[Station<'_>]) -> io::Result<()> {
    let netlink = Netlink::connect()?;
    settings(&["net/ipv4/ip_forward=0"]);
    netlink.up("lo").await?;
    netlink.add(LinkBridge::new(BRIDGE).build()).await?;
    netlink.up(BRIDGE).await?;
    netlink.address(BRIDGE, address::HOST, LINK_PREFIX).await?;
    for (index, station) in stations.iter().enumerate() {
        let near = format!("link{index}");
        netlink.pair(&near, "eth0", station.netns).await?;
        netlink.enslave(&near, BRIDGE).await?;
        netlink.up(&near).await?;
    }
    let nodes: Vec<u8> = stations.iter().filter_map(|station| station.node).collect();
    netlink.routes_to_pods(&nodes, None, BRIDGE).await?;
    for station in stations {
        let (own, address, nodes) = (station.node, station.address, nodes.clone());
        station
            .netns
            .run(move |runtime| runtime.block_on(furnish(own, address, &nodes)))?;
    }
    Ok(())
}

/// Inside a station: addresses and the routes to the other nodes' pods.
async fn furnish(own: Option<u8>, address: Dual, nodes: &[u8]) -> io::Result<()> {
    node_settings();
    let netlink = Netlink::connect()?;
    netlink.up("lo").await?;
    netlink.address("eth0", address, LINK_PREFIX).await?;
    netlink.up("eth0").await?;
    // Rules rewrite such an address before it leaves; but first it must lead somewhere.
    let (network, (v4, v6)) = (address::SERVICE_NETWORK, address::SERVICE_PREFIX);
    netlink.route(network.v4.into(), v4, None, "eth0").await?;
    netlink.route(network.v6.into(), v6, None, "eth0").await?;
    netlink.routes_to_pods(nodes, own, "eth0").await
}

/// Joins a pod's namespace to its node's: a pair of interfaces, the pod's addresses, a route at each end.
///
/// `near` names the node's end; at most 15 bytes.
pub(super) fn join_pod(
    node: &Netns,
    number: u8,
    pod: &Netns,
    near: &str,
    address: Dual,
) -> io::Result<()> {
    let (far, name) = (pod.clone(), near.to_owned());
    node.run(move |runtime| {
        runtime.block_on(async {
            let netlink = Netlink::connect()?;
            netlink.pair(&name, "eth0", &far).await?;
            let _ = fs::write(format!("/proc/sys/net/ipv6/conf/{name}/accept_dad"), "0");
            netlink.up(&name).await?;
            netlink
                .one_address(&name, address::pod_gateway(number).v4.into(), 32)
                .await?;
            netlink
                .one_address(&name, POD_GATEWAY_V6.into(), 64)
                .await?;
            netlink.route(address.v4.into(), 32, None, &name).await?;
            netlink.route(address.v6.into(), 128, None, &name).await
        })
    })?;
    pod.run(move |runtime| runtime.block_on(furnish_pod(number, address)))
}

async fn furnish_pod(number: u8, address: Dual) -> io::Result<()> {
    pod_settings();
    let gateway = address::pod_gateway(number).v4;
    let netlink = Netlink::connect()?;
    netlink.up("lo").await?;
    netlink.one_address("eth0", address.v4.into(), 32).await?;
    netlink.one_address("eth0", address.v6.into(), 128).await?;
    netlink.up("eth0").await?;
    netlink.route(gateway.into(), 32, None, "eth0").await?;
    netlink
        .route(
            Ipv4Addr::UNSPECIFIED.into(),
            0,
            Some(gateway.into()),
            "eth0",
        )
        .await?;
    netlink
        .route(
            Ipv6Addr::UNSPECIFIED.into(),
            0,
            Some(POD_GATEWAY_V6.into()),
            "eth0",
        )
        .await
}

/// Takes a pod's wire away. Nothing is left at the node's end.
pub(super) fn part_pod(node: &Netns, near: &str) -> io::Result<()> {
    let name = near.to_owned();
    node.run(move |runtime| {
        runtime.block_on(async {
            let netlink = Netlink::connect()?;
            let index = netlink.index(&name).await?;
            netlink
                .handle
                .link()
                .del(index)
                .execute()
                .await
                .map_err(io::Error::other)
        })
    })
}

fn node_settings() {
    settings(&[
        "net/ipv4/ip_forward=1",
        "net/ipv6/conf/all/disable_ipv6=0",
        "net/ipv6/conf/all/forwarding=1",
        "net/ipv4/conf/all/rp_filter=0",
        "net/ipv4/conf/default/rp_filter=0",
        "net/ipv6/conf/all/accept_dad=0",
        "net/ipv6/conf/default/accept_dad=0",
        "net/ipv6/conf/eth0/accept_dad=0",
        "net/ipv4/ip_local_port_range=1024 65535",
        &format!("net/ipv4/ip_local_reserved_ports={}", reserved()),
    ]);
}

/// The ports of the parts, as the kernel reads them.
fn reserved() -> String {
    let ranges = PORTS.map(|it| format!("{}-{}", it.start(), it.end()));
    ranges.join(",")
}

fn pod_settings() {
    settings(&[
        "net/ipv4/ip_unprivileged_port_start=0",
        "net/ipv4/ping_group_range=0 2147483647",
        "net/ipv6/conf/all/disable_ipv6=0",
        "net/ipv4/conf/all/rp_filter=0",
        "net/ipv4/conf/default/rp_filter=0",
        "net/ipv4/conf/eth0/rp_filter=0",
        "net/ipv6/conf/all/accept_dad=0",
        "net/ipv6/conf/default/accept_dad=0",
        "net/ipv6/conf/eth0/accept_dad=0",
        "net/ipv6/conf/all/accept_ra=0",
    ]);
}

/// Sets what the kernel offers; a kernel without a setting (IPv6 compiled out, say) goes without.
fn settings(assignments: &[&str]) {
    for assignment in assignments {
        let (name, value) = assignment
            .split_once('=')
            .expect("assignments are written name=value");
        if let Err(error) = fs::write(format!("/proc/sys/{name}"), value) {
            tracing::debug!(name, value, %error, "a kernel setting was refused");
        }
    }
}

/// Netlink in the namespace in which it was opened.
struct Netlink {
    handle: Handle,
}

impl Netlink {
    fn connect() -> io::Result<Self> {
        let (connection, handle, _) = rtnetlink::new_connection()?;
        tokio::spawn(connection);
        Ok(Self { handle })
    }

    async fn add(&self, message: rtnetlink::packet_route::link::LinkMessage) -> io::Result<()> {
        self.handle
            .link()
            .add(message)
            .execute()
            .await
            .map_err(io::Error::other)
    }

    async fn index(&self, name: &str) -> io::Result<u32> {
        let mut links = self
            .handle
            .link()
            .get()
            .match_name(name.to_owned())
            .execute();
        let link = links.try_next().await.map_err(io::Error::other)?;
        Ok(link
            .ok_or_else(|| io::Error::other(format!("interface {name} is missing")))?
            .header
            .index)
    }

    async fn up(&self, name: &str) -> io::Result<()> {
        self.set(LinkUnspec::new_with_name(name).up()).await
    }

    async fn enslave(&self, name: &str, bridge: &str) -> io::Result<()> {
        let controller = self.index(bridge).await?;
        self.set(LinkUnspec::new_with_index(self.index(name).await?).controller(controller))
            .await
    }

    async fn set(&self, message: LinkMessageBuilder<LinkUnspec>) -> io::Result<()> {
        self.handle
            .link()
            .set(message.build())
            .execute()
            .await
            .map_err(io::Error::other)
    }

    /// A pair of interfaces: `near` here, `far` in `other`.
    async fn pair(&self, near: &str, far: &str, other: &Netns) -> io::Result<()> {
        let namespace = File::open(other.path())?;
        let peer = LinkUnspec::new_with_name(far)
            .setns_by_fd(namespace.as_raw_fd())
            .build();
        let message = LinkMessageBuilder::<LinkVeth>::new_with_info_kind(InfoKind::Veth)
            .name(near)
            .set_info_data(InfoData::Veth(InfoVeth::Peer(peer)))
            .build();
        self.add(message).await
    }

    async fn address(&self, name: &str, address: Dual, prefix: (u8, u8)) -> io::Result<()> {
        self.one_address(name, address.v4.into(), prefix.0).await?;
        self.one_address(name, address.v6.into(), prefix.1).await
    }

    async fn one_address(&self, name: &str, address: IpAddr, prefix: u8) -> io::Result<()> {
        let index = self.index(name).await?;
        let added = self
            .handle
            .address()
            .add(index, address, prefix)
            .execute()
            .await;
        unless_no_ipv6(added, address)
    }

    async fn route(
        &self,
        to: IpAddr,
        prefix: u8,
        via: Option<IpAddr>,
        name: &str,
    ) -> io::Result<()> {
        let mut builder =
            RouteMessageBuilder::<IpAddr>::new().output_interface(self.index(name).await?);
        if via.is_none() {
            // Or the kernel would not take it for the way to a gateway.
            builder = builder.scope(RouteScope::Link);
        }
        let mut builder = builder
            .destination_prefix(to, prefix)
            .map_err(io::Error::other)?;
        if let Some(via) = via {
            builder = builder.gateway(via).map_err(io::Error::other)?;
        }
        let added = self.handle.route().add(builder.build()).execute().await;
        unless_no_ipv6(added, to)
    }

    async fn routes_to_pods(
        &self,
        nodes: &[u8],
        own: Option<u8>,
        interface: &str,
    ) -> io::Result<()> {
        for node in nodes.iter().filter(|node| Some(**node) != own) {
            let (network, gateway) = (address::pod_network(*node), address::node(*node));
            self.route(
                network.v4.into(),
                POD_PREFIX.0,
                Some(gateway.v4.into()),
                interface,
            )
            .await?;
            self.route(
                network.v6.into(),
                POD_PREFIX.1,
                Some(gateway.v6.into()),
                interface,
            )
            .await?;
        }
        Ok(())
    }
}

/// A machine without IPv6 runs the mesh on IPv4 alone.
fn unless_no_ipv6(result: Result<(), rtnetlink::Error>, address: IpAddr) -> io::Result<()> {
    match result {
        Err(error) if address.is_ipv6() && !std::path::Path::new("/proc/sys/net/ipv6").exists() => {
            tracing::debug!(%address, %error, "no IPv6 on this machine");
            Ok(())
        }
        other => other.map_err(io::Error::other),
    }
}
