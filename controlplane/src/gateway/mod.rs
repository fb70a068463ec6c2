//! Gateways: the classes that this control plane serves, what is deployed for a Gateway, and what is said of it.
//!
//! [`class`] knows the classes, [`template`] and [`merge`] make the objects of a Gateway, [`plan`] decides whether and
//! with which names they are made, [`status`] says what came of it: all pure. [`run`] watches, applies and writes, on the
//! leader only. Nothing here is needed to carry traffic: with the controller gone, deployed waypoints go on.

use serde::Deserialize;
use serde_json::Value;

pub mod class;
pub mod merge;
pub mod plan;
mod queue;
pub mod run;
pub mod status;
pub mod template;

#[cfg(test)]
mod tests;

/// Labels and annotations that the parts share.
pub mod names {
    #![allow(missing_docs, reason = "Istio's and the Gateway API's own names")]
    pub const GATEWAY_NAME: &str = "gateway.networking.k8s.io/gateway-name";
    pub const CLASS_NAME: &str = "gateway.networking.k8s.io/gateway-class-name";
    pub const MANAGED: &str = "gateway.istio.io/managed";
    pub const DEFAULTS_FOR_CLASS: &str = "gateway.istio.io/defaults-for-class";
    pub const NAME_OVERRIDE: &str = "gateway.istio.io/name-override";
    pub const SERVICE_ACCOUNT: &str = "gateway.istio.io/service-account";
    pub const CONTROLLER_VERSION: &str = "gateway.istio.io/controller-version";
    pub const SERVICE_TYPE: &str = "networking.istio.io/service-type";
    pub const ADDRESS_TYPE: &str = "networking.istio.io/address-type";
    pub const NETWORK: &str = "topology.istio.io/network";
    pub const REVISION: &str = "istio.io/rev";

    /// What belongs to a control plane, as the chart names it: by itself for the default revision, else with the revision.
    pub fn of_revision(name: &str, revision: &str) -> String {
        match revision {
            "" | "default" => name.to_owned(),
            revision => format!("{name}-{revision}"),
        }
    }
}

/// Flags of the Gateway controllers, each with its environment variable.
#[derive(Clone, Debug, Default, PartialEq, clap::Args)]
#[command(next_help_heading = "Gateways, on Kubernetes")]
#[group(skip)]
pub struct Args {
    /// Image of waypoints; empty: the images' hub and tag
    #[arg(long, env = "LEYLINE_WAYPOINT_IMAGE", default_value = "")]
    pub waypoint_image: String,

    /// Where images come from
    #[arg(long, env = "LEYLINE_IMAGE_HUB", default_value = "leyline.dev")]
    pub image_hub: String,

    /// Tag of images
    #[arg(long, env = "LEYLINE_IMAGE_TAG", default_value = env!("CARGO_PKG_VERSION"))]
    pub image_tag: String,

    /// When a waypoint's image is pulled; empty: as Kubernetes decides
    #[arg(long, env = "LEYLINE_IMAGE_PULL_POLICY", default_value = "")]
    pub image_pull_policy: String,

    /// Names of Secrets with which images are pulled
    #[arg(long, env = "LEYLINE_IMAGE_PULL_SECRETS", value_delimiter = ',')]
    pub image_pull_secrets: Vec<String>,

    /// JSON of what waypoint pods get: resources, affinity, topologySpreadConstraints, nodeSelector, tolerations
    #[arg(long, env = "LEYLINE_WAYPOINT", default_value = "{}")]
    pub waypoint: String,

    /// Serve the classes `istio-waypoint` and `istio-east-west` too, where istiod does not run
    #[arg(long, env = "LEYLINE_ISTIO_CLASSES", default_value_t = false, action = clap::ArgAction::Set)]
    pub istio_classes: bool,

    /// Several networks: classes for east-west and remote gateways
    #[arg(long, env = "AMBIENT_ENABLE_MULTI_NETWORK", default_value_t = false, action = clap::ArgAction::Set)]
    pub multi_network: bool,

    /// Deploy what Gateways ask for
    #[arg(long, env = "PILOT_ENABLE_GATEWAY_API_DEPLOYMENT_CONTROLLER", default_value_t = true, action = clap::ArgAction::Set)]
    pub deploy_gateways: bool,

    /// Make the GatewayClasses
    #[arg(long, env = "PILOT_ENABLE_GATEWAY_API_GATEWAYCLASS_CONTROLLER", default_value_t = true, action = clap::ArgAction::Set)]
    pub make_gateway_classes: bool,

    /// Give a Gateway's own labels and annotations to what is deployed for it
    #[arg(long, env = "PILOT_ENABLE_GATEWAY_API_COPY_LABELS_ANNOTATIONS", default_value_t = true, action = clap::ArgAction::Set)]
    pub copy_gateway_metadata: bool,

    /// Where deployed proxies find this control plane; empty: its Service in the system namespace
    #[arg(long, env = "LEYLINE_PROXY_XDS_ADDRESS", default_value = "")]
    pub proxy_xds_address: String,
}

/// Settings of what is deployed.
#[derive(Clone, Debug, PartialEq)]
pub struct Deployed {
    /// Image of waypoints.
    pub image: String,
    /// `imagePullPolicy`; empty: as Kubernetes decides.
    pub pull_policy: String,
    /// Names of Secrets.
    pub pull_secrets: Vec<String>,
    /// What pods get.
    pub pods: PodSettings,
    /// The classes of Istio are ours too.
    pub istio_classes: bool,
    /// Classes for east-west and remote gateways.
    pub multi_network: bool,
    /// Deploy what Gateways ask for.
    pub deploy: bool,
    /// Make the GatewayClasses.
    pub make_classes: bool,
    /// Give a Gateway's own labels and annotations to what is deployed for it.
    pub copy_metadata: bool,
    /// Where proxies find the control plane, `host:port`.
    pub xds_address: String,
    /// The mesh.
    pub mesh: Mesh,
}

/// What deployed proxies must know of the mesh.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mesh {
    /// Revision of this control plane.
    pub revision: String,
    /// Its namespace.
    pub system_namespace: String,
    /// DNS suffix of services.
    pub cluster_domain: String,
    /// This cluster's id.
    pub cluster_id: String,
    /// The mesh's trust domain.
    pub trust_domain: String,
    /// Network of this cluster's pods; empty: as the system namespace's label says.
    pub network: String,
}

/// Upstream's value `global.waypoint`: parts of a pod's spec, passed on as they are.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct PodSettings {
    /// `resources` of the container.
    pub resources: Option<Value>,
    /// `affinity`.
    pub affinity: Option<Value>,
    /// `topologySpreadConstraints`.
    pub topology_spread_constraints: Option<Value>,
    /// `nodeSelector`.
    pub node_selector: Option<Value>,
    /// `tolerations`.
    pub tolerations: Option<Value>,
}

/// Flags whose texts are read.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Checked {
    args: Args,
    pods: PodSettings,
}

impl Checked {
    /// Reads the flags; the error is a problem of the flag `waypoint`.
    pub fn new(args: &Args) -> Result<Self, String> {
        let pods = match args.waypoint.as_str() {
            "" => None,
            text => serde_json::from_str::<Option<PodSettings>>(text)
                .map_err(|error| error.to_string())?,
        };
        Ok(Self {
            args: args.clone(),
            pods: pods.unwrap_or_default(),
        })
    }

    /// There are several networks.
    pub fn is_multi_network(&self) -> bool {
        self.args.multi_network
    }

    /// The settings of a mesh.
    pub fn of(&self, mesh: Mesh) -> Deployed {
        let args = &self.args;
        let image = match args.waypoint_image.as_str() {
            "" => format!("{}/waypoint:{}", args.image_hub, args.image_tag),
            image => image.to_owned(),
        };
        let xds_address = match args.proxy_xds_address.as_str() {
            "" => format!(
                "{}.{}.svc:15012",
                names::of_revision("istiod", &mesh.revision),
                mesh.system_namespace
            ),
            address => address.to_owned(),
        };
        let secrets = args.image_pull_secrets.iter();
        Deployed {
            image,
            pull_policy: args.image_pull_policy.clone(),
            pull_secrets: secrets.filter(|name| !name.is_empty()).cloned().collect(),
            pods: self.pods.clone(),
            istio_classes: args.istio_classes,
            multi_network: args.multi_network,
            deploy: args.deploy_gateways,
            make_classes: args.make_gateway_classes,
            copy_metadata: args.copy_gateway_metadata,
            xds_address,
            mesh,
        }
    }
}
