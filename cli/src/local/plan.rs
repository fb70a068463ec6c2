//! From objects to pods: deployments expanded, nodes chosen, commands and variables worked out. Pure.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::{
    api::core::v1::{Container, EnvVar, Pod, PodSpec, Probe},
    apimachinery::pkg::{
        apis::meta::v1::{ObjectMeta, OwnerReference},
        util::intstr::IntOrString,
    },
};

use super::{
    address::{Dual, stable_hash},
    objects::{Key, Labels, Objects},
};

/// A pod that should run.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct PodPlan {
    /// Its namespace and name.
    pub key: Key,
    /// Its object, with labels, annotations and owner as they should be.
    pub pod: Pod,
    /// The deployment it belongs to.
    pub deployment: Option<Key>,
}

impl PodPlan {
    /// Two pods of one name with different fingerprints are different pods: the old one is replaced.
    pub(super) fn fingerprint(&self) -> u64 {
        fingerprint(&self.pod.spec)
    }

    /// Its specification.
    pub(super) fn spec(&self) -> PodSpec {
        self.pod.spec.clone().unwrap_or_default()
    }

    /// Its labels.
    pub(super) fn labels(&self) -> Labels {
        self.pod.metadata.labels.clone().unwrap_or_default()
    }

    /// Its annotations.
    pub(super) fn annotations(&self) -> Labels {
        self.pod.metadata.annotations.clone().unwrap_or_default()
    }

    /// The service account it runs as.
    pub(super) fn service_account(&self) -> String {
        let spec = self.pod.spec.as_ref();
        spec.and_then(|spec| spec.service_account_name.clone())
            .unwrap_or_else(|| "default".to_owned())
    }
}

fn fingerprint(spec: &impl serde::Serialize) -> u64 {
    stable_hash(&serde_json::to_vec(spec).unwrap_or_default())
}

/// Every pod that should run, by name. A pod written out wins over a deployment's of the same name.
pub(super) fn pods(objects: &Objects) -> BTreeMap<Key, PodPlan> {
    let expanded = objects.deployments.iter().flat_map(|(key, deployment)| {
        let spec = &deployment.spec;
        let replicas = spec.replicas.unwrap_or(1).max(0);
        let set = format!("{}-{}", key.name, letters(fingerprint(&spec.template), 10));
        (0..replicas)
            .map(move |index| replica(key, &set, index, &spec.template))
            .collect::<Vec<_>>()
    });
    let mut plans: BTreeMap<Key, PodPlan> = expanded.map(|plan| (plan.key.clone(), plan)).collect();
    for (key, pod) in &objects.pods {
        plans.insert(
            key.clone(),
            PodPlan {
                key: key.clone(),
                pod: pod.clone(),
                deployment: None,
            },
        );
    }
    plans
}

fn replica(
    deployment: &Key,
    set: &str,
    index: i32,
    template: &k8s_openapi::api::core::v1::PodTemplateSpec,
) -> PodPlan {
    let suffix = letters(stable_hash(format!("{set}/{index}").as_bytes()), 5);
    let key = Key::new(&deployment.namespace, format!("{set}-{suffix}"));
    let metadata = template.metadata.clone().unwrap_or_default();
    let mut labels = metadata.labels.unwrap_or_default();
    if let Some((_, hash)) = set.rsplit_once('-') {
        labels.insert("pod-template-hash".to_owned(), hash.to_owned());
    }
    let owner = OwnerReference {
        api_version: "apps/v1".to_owned(),
        kind: "ReplicaSet".to_owned(),
        name: set.to_owned(),
        uid: uid_of(&format!("ReplicaSet/{}/{set}", deployment.namespace)),
        controller: Some(true),
        block_owner_deletion: Some(true),
    };
    let metadata = ObjectMeta {
        name: Some(key.name.clone()),
        namespace: Some(key.namespace.clone()),
        generate_name: Some(format!("{set}-")),
        labels: Some(labels),
        annotations: metadata.annotations,
        owner_references: Some(vec![owner]),
        ..ObjectMeta::default()
    };
    let pod = Pod {
        metadata,
        spec: template.spec.clone(),
        status: None,
    };
    PodPlan {
        key,
        pod,
        deployment: Some(deployment.clone()),
    }
}

/// `count` characters of the alphabet that Kubernetes uses for generated names: no vowels, so no words.
pub(super) fn letters(mut hash: u64, count: usize) -> String {
    const ALPHABET: &[u8; 27] = b"bcdfghjklmnpqrstvwxz2456789";
    let mut name = String::with_capacity(count);
    for _ in 0..count {
        let index = usize::try_from(hash % 27).expect("a remainder of 27 fits");
        name.push(char::from(ALPHABET[index]));
        hash = (hash / 27).wrapping_add(hash.rotate_left(17));
    }
    name
}

/// A UUID that is always the same for the same text.
pub(super) fn uid_of(text: &str) -> String {
    let (high, low) = (
        stable_hash(text.as_bytes()),
        stable_hash(format!("{text}/").as_bytes()),
    );
    uuid(high, low)
}

/// 128 bits as a UUID of version 4.
pub(super) fn uuid(high: u64, low: u64) -> String {
    let high = (high & 0xffff_ffff_ffff_0fff) | 0x4000;
    let low = (low & 0x3fff_ffff_ffff_ffff) | 0x8000_0000_0000_0000;
    format!(
        "{:08x}-{:04x}-{:04x}-{:04x}-{:012x}",
        high >> 32,
        (high >> 16) & 0xffff,
        high & 0xffff,
        low >> 48,
        low & 0xffff_ffff_ffff
    )
}

/// Why a pod cannot be placed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum ScheduleError {
    /// `spec.nodeName` or the host name label of `spec.nodeSelector` names no node of this mesh.
    #[error("no node is called {0} (there are: {1})")]
    NoSuchNode(String, String),
}

/// The node for a pod: the one it names, else the one with the fewest pods, the first of equals.
pub(super) fn schedule(
    spec: &PodSpec,
    load: &BTreeMap<String, usize>,
) -> Result<String, ScheduleError> {
    let selector = spec.node_selector.as_ref();
    let wanted = spec
        .node_name
        .as_ref()
        .or_else(|| selector?.get("kubernetes.io/hostname"));
    match wanted {
        Some(name) if load.contains_key(name) => Ok(name.clone()),
        Some(name) => {
            let nodes: Vec<_> = load.keys().map(String::as_str).collect();
            Err(ScheduleError::NoSuchNode(name.clone(), nodes.join(", ")))
        }
        None => {
            let least = load
                .iter()
                .min_by_key(|(name, count)| (**count, name.len(), (*name).clone()));
            Ok(least.map(|(name, _)| name.clone()).unwrap_or_default())
        }
    }
}

/// One container of a pod, ready to be started.
#[derive(Clone, Debug)]
pub(super) struct ContainerPlan {
    /// Its name.
    pub name: String,
    /// Program and arguments.
    pub command: Vec<String>,
    /// Its whole environment.
    pub environment: BTreeMap<String, String>,
    /// Its working directory.
    pub directory: String,
    /// The user it runs as.
    pub uid: u32,
    /// The group it runs as.
    pub gid: u32,
    /// Traffic is sent while this succeeds.
    pub readiness: Option<Probe>,
    /// It is restarted when this fails.
    pub liveness: Option<Probe>,
    /// Until this succeeds once, the other two are not asked.
    pub startup: Option<Probe>,
    /// Its named ports.
    pub ports: BTreeMap<String, i32>,
    /// Whether it is an init container that keeps running (`restartPolicy: Always`).
    pub sidecar: bool,
}

/// Where a pod runs: what `fieldRef` may ask for.
#[derive(Clone, Debug)]
pub(super) struct Place {
    /// Name of its node.
    pub node: String,
    /// Address of its node.
    pub node_address: Dual,
    /// Its own address.
    pub address: Dual,
    /// Its unique id.
    pub uid: String,
}

/// Why a container cannot be started as written.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum ContainerError {
    /// Images are not run, so there is no entry point to fall back to.
    #[error(
        "container {0} has no command: images are not run here, so say what to execute in command"
    )]
    NoCommand(String),
    /// Processes share the machine's files, so root in a pod would be root.
    #[error(
        "container {0} asks to run as root, which is refused: it would be root on this machine's files"
    )]
    Root(String),
    /// A variable that nothing here can supply.
    #[error("container {0}: cannot resolve variable {1}: {2}")]
    Variable(String, String, String),
}

/// Default `PATH`; the first entry holds this program as `leyline`.
const PATH: &str = "/run/leyline/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
const DEFAULT_USER: i64 = 1000;

/// Works out a container. `init` says which list of the pod it stands in.
pub(super) fn container(
    plan: &PodPlan,
    container: &Container,
    init: bool,
    place: &Place,
) -> Result<ContainerPlan, ContainerError> {
    let name = container.name.clone();
    let spec = plan.pod.spec.as_ref();
    let pod_context = spec.and_then(|spec| spec.security_context.as_ref());
    let own_context = container.security_context.as_ref();
    let uid = own_context
        .and_then(|context| context.run_as_user)
        .or(pod_context.and_then(|context| context.run_as_user));
    let gid = own_context
        .and_then(|context| context.run_as_group)
        .or(pod_context.and_then(|context| context.run_as_group));
    let uid = uid.unwrap_or(DEFAULT_USER);
    let uid = u32::try_from(uid)
        .ok()
        .filter(|uid| *uid != 0)
        .ok_or_else(|| ContainerError::Root(name.clone()))?;
    let environment = environment(plan, container, place)?;
    let mut command: Vec<String> = container.command.clone().unwrap_or_default();
    if command.is_empty() {
        return Err(ContainerError::NoCommand(name));
    }
    command.extend(container.args.clone().unwrap_or_default());
    let command = command
        .iter()
        .map(|word| substitute(word, &environment))
        .collect();
    let ports = container.ports.iter().flatten();
    Ok(ContainerPlan {
        command,
        directory: container
            .working_dir
            .clone()
            .unwrap_or_else(|| "/".to_owned()),
        uid,
        gid: gid.and_then(|gid| u32::try_from(gid).ok()).unwrap_or(uid),
        readiness: container.readiness_probe.clone(),
        liveness: container.liveness_probe.clone(),
        startup: container.startup_probe.clone(),
        ports: ports
            .filter_map(|port| Some((port.name.clone()?, port.container_port)))
            .collect(),
        sidecar: init && container.restart_policy.as_deref() == Some("Always"),
        environment,
        name,
    })
}

fn environment(
    plan: &PodPlan,
    container: &Container,
    place: &Place,
) -> Result<BTreeMap<String, String>, ContainerError> {
    let mut environment = BTreeMap::from([
        ("PATH".to_owned(), PATH.to_owned()),
        ("HOSTNAME".to_owned(), hostname(plan)),
        ("HOME".to_owned(), "/".to_owned()),
    ]);
    for variable in container.env.iter().flatten() {
        let value = variable_value(plan, variable, place).map_err(|why| {
            ContainerError::Variable(container.name.clone(), variable.name.clone(), why)
        })?;
        if let Some(value) = value {
            let value = substitute(&value, &environment);
            environment.insert(variable.name.clone(), value);
        }
    }
    Ok(environment)
}

fn variable_value(
    plan: &PodPlan,
    variable: &EnvVar,
    place: &Place,
) -> Result<Option<String>, String> {
    let Some(source) = &variable.value_from else {
        return Ok(Some(variable.value.clone().unwrap_or_default()));
    };
    if let Some(field) = &source.field_ref {
        return downward(plan, &field.field_path, place).map(Some);
    }
    let references = [
        source.config_map_key_ref.as_ref().map(|key| key.optional),
        source.secret_key_ref.as_ref().map(|key| key.optional),
    ];
    match references.into_iter().flatten().next() {
        Some(Some(true)) => Ok(None),
        _ => Err("only value and valueFrom.fieldRef are supported here".to_owned()),
    }
}

fn downward(plan: &PodPlan, path: &str, place: &Place) -> Result<String, String> {
    let keyed = |prefix: &str, labels: Labels| {
        let key = path
            .strip_prefix(prefix)?
            .strip_prefix("['")?
            .strip_suffix("']")?;
        Some(labels.get(key).cloned().unwrap_or_default())
    };
    let text = match path {
        "metadata.name" => plan.key.name.clone(),
        "metadata.namespace" => plan.key.namespace.clone(),
        "metadata.uid" => place.uid.clone(),
        "spec.nodeName" => place.node.clone(),
        "spec.serviceAccountName" => plan.service_account(),
        "status.podIP" => place.address.v4.to_string(),
        "status.podIPs" => place.address.texts().join(","),
        "status.hostIP" => place.node_address.v4.to_string(),
        "status.hostIPs" => place.node_address.texts().join(","),
        _ => keyed("metadata.labels", plan.labels())
            .or_else(|| keyed("metadata.annotations", plan.annotations()))
            .ok_or_else(|| format!("the field {path} is not available"))?,
    };
    Ok(text)
}

/// The pod's host name.
pub(super) fn hostname(plan: &PodPlan) -> String {
    let chosen = plan
        .pod
        .spec
        .as_ref()
        .and_then(|spec| spec.hostname.clone());
    let mut name = chosen.unwrap_or_else(|| plan.key.name.clone());
    name.truncate(63);
    name
}

/// Kubernetes' `$(NAME)`: a known variable is put in, `$$` is a dollar sign, anything else stays.
fn substitute(text: &str, environment: &BTreeMap<String, String>) -> String {
    let mut result = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(start) = rest.find('$') {
        result.push_str(&rest[..start]);
        rest = &rest[start..];
        let reference = rest
            .strip_prefix("$(")
            .and_then(|inner| inner.split_once(')'));
        if let Some(after) = rest.strip_prefix("$$") {
            result.push('$');
            rest = after;
        } else if let Some((name, after)) = reference
            && let Some(value) = environment.get(name)
        {
            result.push_str(value);
            rest = after;
        } else {
            result.push('$');
            rest = &rest[1..];
        }
    }
    result + rest
}

/// A port by number, or by its name among a pod's named ports.
pub(super) fn port(port: &IntOrString, named: &BTreeMap<String, i32>) -> Option<u16> {
    let number = match port {
        IntOrString::Int(number) => *number,
        IntOrString::String(name) => named.get(name).copied().or_else(|| name.parse().ok())?,
    };
    u16::try_from(number).ok()
}

/// Images named by the pods of `plans`, for the one notice that they are ignored.
pub(super) fn images(plans: &BTreeMap<Key, PodPlan>) -> BTreeSet<String> {
    let specs = plans.values().filter_map(|plan| plan.pod.spec.as_ref());
    specs
        .flat_map(|spec| &spec.containers)
        .filter_map(|container| container.image.clone())
        .collect()
}

#[cfg(test)]
mod tests;
