//! What becomes of one Gateway: whether it is ours, under which names, and which objects it comes to. Pure.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::ConfigMap;
use serde::Deserialize;
use serde_json::Value;

use super::{
    Deployed,
    class::Role,
    merge::{MergeError, merge},
    names, status,
    template::{Names, Objects, Part, Template},
};
use crate::{
    crd,
    source::{read::read, tree::parse},
};

/// The version of what is made here. A Gateway that a newer controller has taken over is left to it.
pub const VERSION: u32 = 5;

/// A control plane's revision, and the others it must know of.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Revisions {
    /// Its own.
    pub own: String,
    /// Objects without a revision are its own.
    pub default: bool,
    /// Tags and the revisions that they stand for.
    pub tags: BTreeMap<String, String>,
}

/// `spec.infrastructure`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Infrastructure {
    /// For everything that is made.
    pub labels: BTreeMap<String, String>,
    /// For everything that is made.
    pub annotations: BTreeMap<String, String>,
    /// Overlays.
    pub parameters_ref: Option<ParametersRef>,
}

/// `spec.infrastructure.parametersRef`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct ParametersRef {
    /// Empty: core.
    pub group: String,
    /// Only `ConfigMap`.
    pub kind: String,
    /// In the Gateway's namespace.
    pub name: String,
}

/// What is known of a Gateway's surroundings.
#[derive(Clone, Debug, Default)]
pub struct Surroundings {
    /// Labels of its namespace.
    pub namespace_labels: BTreeMap<String, String>,
    /// The class's overlays: the oldest ConfigMap labelled for it.
    pub defaults: Option<ConfigMap>,
    /// What `parametersRef` names, where there is one and it exists.
    pub parameters: Option<ConfigMap>,
    /// This cluster's network.
    pub network: String,
}

/// Whether a Gateway is deployed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// By this controller.
    Deployed,
    /// By its user, who says in `spec.addresses` where it is.
    Manual,
    /// Not this controller's business: told nothing.
    Foreign,
}

/// Why a Gateway cannot be deployed as asked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// A reference that is no ConfigMap of the core group.
    #[error("parametersRef: {0} is not supported, only ConfigMap")]
    ParametersKind(String),
    /// The reference leads nowhere.
    #[error("parametersRef: there is no ConfigMap {0}")]
    NoParameters(String),
    /// An overlay is no YAML.
    #[error("ConfigMap {of}, {part}: {problem}")]
    Yaml {
        /// The ConfigMap.
        of: String,
        /// Its key.
        part: &'static str,
        /// What is wrong.
        problem: String,
    },
    /// An overlay cannot be merged.
    #[error("ConfigMap {of}, {part}")]
    Merge {
        /// The ConfigMap.
        of: String,
        /// Its key.
        part: &'static str,
        /// What is wrong.
        source: MergeError,
    },
    /// An overlay changes what tells whose an object is.
    #[error("ConfigMap {of}, {part}: {field} may not be changed")]
    Identity {
        /// The ConfigMap.
        of: String,
        /// Its key.
        part: &'static str,
        /// What it changes.
        field: String,
    },
    /// An annotation has a value that it cannot have.
    #[error("annotation {annotation}: {value:?} is not one of {expected}")]
    Annotation {
        /// Its key.
        annotation: &'static str,
        /// Its value.
        value: String,
        /// What it may be.
        expected: &'static str,
    },
}

impl Revisions {
    /// Whether an object with these labels, in a namespace with those, is this control plane's.
    pub fn owns(
        &self,
        labels: &BTreeMap<String, String>,
        namespace: &BTreeMap<String, String>,
    ) -> bool {
        let asked = labels
            .get(names::REVISION)
            .or_else(|| namespace.get(names::REVISION));
        match asked {
            None => self.default,
            Some(name) => self.tags.get(name).unwrap_or(name) == &self.own,
        }
    }
}

/// What this controller has to do with a Gateway of one of its classes.
pub fn mode(
    revisions: &Revisions,
    gateway: &crd::Gateway,
    role: Role,
    namespace: &BTreeMap<String, String>,
) -> Mode {
    let meta = &gateway.metadata;
    let labels = meta.labels.clone().unwrap_or_default();
    let newer = annotation(gateway, names::CONTROLLER_VERSION)
        .and_then(|version| version.parse::<u32>().ok())
        .is_some_and(|version| version > VERSION);
    if newer || !revisions.owns(&labels, namespace) {
        return Mode::Foreign;
    }
    match role == Role::Remote || !is_managed(gateway) {
        true => Mode::Manual,
        false => Mode::Deployed,
    }
}

/// Gateway API: a Gateway that says where it is was deployed by its user; an IP address alone is a wish.
fn is_managed(gateway: &crd::Gateway) -> bool {
    match gateway.spec.addresses.as_array().map(Vec::as_slice) {
        None | Some([]) => true,
        Some([one]) => matches!(
            one.get("type").and_then(Value::as_str),
            None | Some("IPAddress")
        ),
        Some(_) => false,
    }
}

/// An annotation.
pub fn annotation<'g>(gateway: &'g crd::Gateway, key: &str) -> Option<&'g str> {
    let annotations = gateway.metadata.annotations.as_ref()?;
    annotations.get(key).map(String::as_str)
}

/// The `spec.infrastructure` of a Gateway. What cannot be read of it is nothing.
pub fn infrastructure(gateway: &crd::Gateway) -> Infrastructure {
    serde_json::from_value(gateway.spec.infrastructure.clone()).unwrap_or_default()
}

/// The ConfigMap that a Gateway names for its overlays, where it can be one.
pub fn parameters_name(gateway: &crd::Gateway) -> Option<String> {
    let reference = infrastructure(gateway).parameters_ref?;
    is_config_map(&reference).then_some(reference.name)
}

fn is_config_map(reference: &ParametersRef) -> bool {
    matches!(reference.group.as_str(), "" | "core") && reference.kind == "ConfigMap"
}

/// The objects of a Gateway that is deployed: template, then the class's overlays, then its own. None while no listener can
/// be served.
pub fn objects(
    settings: &Deployed,
    gateway: &crd::Gateway,
    role: Role,
    around: &Surroundings,
) -> Result<Objects, PlanError> {
    let infrastructure = infrastructure(gateway);
    let parameters = match &infrastructure.parameters_ref {
        None => None,
        Some(reference) if !is_config_map(reference) => {
            let kind = format!("{}/{}", reference.group, reference.kind);
            return Err(PlanError::ParametersKind(kind));
        }
        Some(reference) => match &around.parameters {
            None => return Err(PlanError::NoParameters(reference.name.clone())),
            found => found.as_ref(),
        },
    };
    let template = Template {
        settings,
        gateway,
        role,
        names: Names::new(gateway),
        infrastructure: &infrastructure,
        network: &around.network,
        service_type: service_type(gateway, role)?,
    };
    if status::usable_listeners(gateway, role).is_empty() {
        return Ok(Objects::default());
    }
    let overlays: Vec<&ConfigMap> = around.defaults.iter().chain(parameters).collect();
    let mut objects = Objects::default();
    for part in Part::ALL {
        if let Some(object) = overlaid(&template, part, &overlays)? {
            objects.0.insert(part, object);
        }
    }
    Ok(objects)
}

fn service_type(gateway: &crd::Gateway, role: Role) -> Result<String, PlanError> {
    let default = match role {
        Role::EastWest => "LoadBalancer",
        Role::Waypoint | Role::Remote => "ClusterIP",
    };
    match annotation(gateway, names::SERVICE_TYPE) {
        None => Ok(default.to_owned()),
        Some(known @ ("ClusterIP" | "NodePort" | "LoadBalancer")) => Ok(known.to_owned()),
        Some(other) => Err(PlanError::Annotation {
            annotation: names::SERVICE_TYPE,
            value: other.to_owned(),
            expected: "ClusterIP, NodePort, LoadBalancer",
        }),
    }
}

fn overlaid(
    template: &Template<'_>,
    part: Part,
    overlays: &[&ConfigMap],
) -> Result<Option<Value>, PlanError> {
    let texts: Vec<(&ConfigMap, &String)> = overlays
        .iter()
        .filter_map(|map| Some((*map, map.data.as_ref()?.get(part.key())?)))
        .collect();
    if part.only_when_asked() && texts.is_empty() {
        return Ok(None);
    }
    let base = template.object(part);
    let mut object = base.clone();
    for (map, text) in texts {
        apply(&mut object, &base, part, map, text)?;
    }
    Ok(Some(object))
}

fn apply(
    object: &mut Value,
    base: &Value,
    part: Part,
    map: &ConfigMap,
    text: &str,
) -> Result<(), PlanError> {
    let of = || map.metadata.name.clone().unwrap_or_default();
    let part_name = part.key();
    let yaml = |problem: String| PlanError::Yaml {
        of: of(),
        part: part_name,
        problem,
    };
    for node in parse(text).map_err(|error| yaml(error.to_string()))? {
        let (patch, faults) = read::<Value>(&node);
        if let Some(fault) = faults.first() {
            return Err(yaml(fault.to_string()));
        }
        let patch = patch.unwrap_or_default();
        if patch.is_null() {
            continue;
        }
        if !patch.is_object() {
            return Err(yaml("is no mapping".to_owned()));
        }
        merge(object, &patch).map_err(|source| PlanError::Merge {
            of: of(),
            part: part_name,
            source,
        })?;
    }
    match part
        .identity()
        .find(|field| object.pointer(field) != base.pointer(field))
    {
        None => Ok(()),
        Some(field) => Err(PlanError::Identity {
            of: of(),
            part: part_name,
            field: field.replace("~1", "/").trim_start_matches('/').to_owned(),
        }),
    }
}
