//! Who may read the mesh: node tunnels' service accounts and waypoints. Every other pod, whatever it calls itself, would
//! learn all addresses, accounts and policies (control-plane.md 8.1, weak upstream).

use std::{fmt, sync::Arc};

use mesh::names::Str;
use proto::xds_core::Node;
use tonic::Status;

use super::registry::Peer;
use crate::{auth::Caller, clusters::Clusters, config::ServiceAccount, output::GatewayProxy};

/// Why a caller may not read.
#[derive(Debug, thiserror::Error)]
pub(super) enum Denied {
    /// Nobody who would need to.
    #[error("{0} is neither a node tunnel nor a waypoint")]
    Neither(ServiceAccount),
    /// Its own control plane knows what it needs.
    #[error(
        "{account} of cluster {cluster:?} has to read from a control plane of that cluster: what is not global there, and its policies, are not known here"
    )]
    Elsewhere {
        /// Who.
        account: ServiceAccount,
        /// Of which cluster.
        cluster: Str,
    },
}

/// The rule, as data.
#[derive(Clone)]
pub struct Access {
    nodes: Arc<[ServiceAccount]>,
    gateway_of: Arc<GatewayOf>,
    clusters: Clusters,
}

/// The Gateway whose waypoint an account is, by the account and by the name of the pod that says to be one of it.
pub type GatewayOf = dyn Fn(&ServiceAccount, Option<&str>) -> Option<GatewayProxy> + Send + Sync;

impl fmt::Debug for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Access")
            .field("nodes", &self.nodes)
            .finish_non_exhaustive()
    }
}

impl Access {
    /// Accounts of node tunnels, and how to tell whose Gateway's waypoint an account is. Where one account is several
    /// Gateways', the pod decides; it must be one of that account. Of other clusters, `clusters` knows.
    pub fn new(
        nodes: &[ServiceAccount],
        clusters: Clusters,
        gateway_of: impl Fn(&ServiceAccount, Option<&str>) -> Option<GatewayProxy>
        + Send
        + Sync
        + 'static,
    ) -> Self {
        Self {
            nodes: nodes.into(),
            gateway_of: Arc::new(gateway_of),
            clusters,
        }
    }

    /// Whether this account is a node tunnel's.
    pub fn is_node(&self, account: &ServiceAccount) -> bool {
        self.nodes.contains(account)
    }

    /// Whether this caller may read the mesh as it is known here.
    ///
    /// Another cluster's waypoint may, as the waypoint of the Gateway of that name. Its node tunnels and gateways between
    /// networks may not: of that cluster only what is global is known here, without the policies of its pods, and a tunnel
    /// that was told so little would let in what they forbid.
    pub(super) fn admit(&self, caller: &Caller) -> Result<(), Denied> {
        let account = &caller.account;
        let gateway = self.gateway_of(caller, None);
        match &caller.cluster {
            None if self.is_node(account) || gateway.is_some() => Ok(()),
            Some(_) if gateway.as_ref().is_some_and(|it| !it.confined) => Ok(()),
            Some(cluster) if self.is_node(account) || gateway.is_some() => Err(Denied::Elsewhere {
                account: account.clone(),
                cluster: cluster.clone(),
            }),
            _ => Err(Denied::Neither(account.clone())),
        }
    }

    /// The Gateway whose proxy this caller is. A pod that the proof names counts more than one that it says.
    pub(super) fn gateway(&self, caller: &Caller, proxy: &str) -> Option<GatewayProxy> {
        let said = proxy.rsplit_once('.').map(|(pod, _)| pod);
        self.gateway_of(caller, said)
    }

    fn gateway_of(&self, caller: &Caller, said: Option<&str>) -> Option<GatewayProxy> {
        let proven = caller.pod.as_ref().map(|pod| pod.name.as_str());
        let pod = proven.or(said);
        match &caller.cluster {
            None => (self.gateway_of)(&caller.account, pod),
            Some(cluster) => (self.clusters.member(cluster)?.gateway_of)(&caller.account, pod),
        }
    }
}

/// Who a subscriber is by its first request; what it says must agree with what it has proven.
pub(super) fn identify(caller: &Caller, node: Option<&Node>) -> Result<Peer, Status> {
    let id = node.map_or("", |node| node.id.as_str());
    let parts: Vec<&str> = id.split('~').collect();
    let [proxy_type, _ip, proxy, _domain] = parts[..] else {
        return Err(Status::invalid_argument(
            "the first request needs a node id of the form TYPE~IP~POD.NAMESPACE~DOMAIN",
        ));
    };
    // Pod names may hold dots, namespaces may not.
    let namespace = proxy.rsplit_once('.').map(|(_, namespace)| namespace);
    if namespace != Some(caller.account.namespace.as_str()) {
        return Err(Status::permission_denied(format!(
            "node id {id:?} is not of the caller's namespace"
        )));
    }
    let metadata = |key| node.and_then(|node| text(node, key)).unwrap_or_default();
    let cluster = metadata("CLUSTER_ID");
    if let Some(proven) = caller.cluster.as_ref().filter(|it| ***it != *cluster) {
        return Err(Status::permission_denied(format!(
            "the node's CLUSTER_ID {cluster:?} is not {proven:?}, the caller's cluster"
        )));
    }
    let account = metadata("SERVICE_ACCOUNT");
    if !account.is_empty() && account != caller.account.name {
        return Err(Status::permission_denied(
            "the node's SERVICE_ACCOUNT is not the caller's",
        ));
    }
    Ok(Peer {
        proxy: proxy.to_owned(),
        proxy_type: proxy_type.to_owned(),
        node_id: id.to_owned(),
        node: metadata("NODE_NAME"),
        cluster_id: cluster,
        version: metadata("ISTIO_VERSION").chars().take(64).collect(),
        account: caller.account.to_string(),
        address: None,
    })
}

fn text(node: &Node, key: &str) -> Option<String> {
    use prost_types::value::Kind::StringValue;
    match node.metadata.as_ref()?.fields.get(key)?.kind.as_ref()? {
        StringValue(text) => Some(text.clone()),
        _ => None,
    }
}
