//! Who may read the mesh: node tunnels' service accounts and waypoints. Every other pod, whatever it calls itself, would
//! learn all addresses, accounts and policies (control-plane.md 8.1, weak upstream).

use std::{fmt, sync::Arc};

use proto::xds_core::Node;
use tonic::Status;

use super::registry::Peer;
use crate::{auth::Caller, config::ServiceAccount, output::GatewayProxy};

/// The rule, as data.
#[derive(Clone)]
pub struct Access {
    nodes: Arc<[ServiceAccount]>,
    gateway_of: Arc<GatewayOf>,
}

/// The Gateway whose waypoint an account is, by the account and by the name of the pod that says to be one of it.
type GatewayOf = dyn Fn(&ServiceAccount, Option<&str>) -> Option<GatewayProxy> + Send + Sync;

impl fmt::Debug for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Access")
            .field("nodes", &self.nodes)
            .finish_non_exhaustive()
    }
}

impl Access {
    /// Accounts of node tunnels, and how to tell whose Gateway's waypoint an account is. Where one account is several
    /// Gateways', the pod decides; it must be one of that account.
    pub fn new(
        nodes: &[ServiceAccount],
        gateway_of: impl Fn(&ServiceAccount, Option<&str>) -> Option<GatewayProxy>
        + Send
        + Sync
        + 'static,
    ) -> Self {
        Self {
            nodes: nodes.into(),
            gateway_of: Arc::new(gateway_of),
        }
    }

    /// Whether this account is a node tunnel's.
    pub fn is_node(&self, account: &ServiceAccount) -> bool {
        self.nodes.contains(account)
    }

    pub(super) fn may_read(&self, account: &ServiceAccount) -> bool {
        self.is_node(account) || (self.gateway_of)(account, None).is_some()
    }

    /// The Gateway whose proxy this caller is. A pod that the proof names counts more than one that it says.
    pub(super) fn gateway(&self, caller: &Caller, proxy: &str) -> Option<GatewayProxy> {
        let proven = caller.pod.as_ref().map(|pod| pod.name.as_str());
        let said = proxy.rsplit_once('.').map(|(pod, _)| pod);
        (self.gateway_of)(&caller.account, proven.or(said))
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
        cluster_id: metadata("CLUSTER_ID"),
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
