//! The supervisor's picture of the mesh, and the work of making the machine look like it: pods started and stopped, their
//! facts told to the agents, names and addresses kept current, everything written down for the control plane.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::IpAddr,
    path::PathBuf,
    sync::Arc,
    time::SystemTime,
};

use anyhow::{Context, Result};
use tokio::{runtime::Handle, sync::mpsc};

use super::{
    address::{self, PodPool, ServicePool},
    dns::Zone,
    fabric,
    netns::Netns,
    objects::{Folder, Key, LabelEdits, Labels, Objects, Problem},
    observe,
    plan::{self, ContainerPlan, Place, PodPlan},
    pod::{Containers, Phase, PodHandle, PodNews, PodState, Sandbox},
    probe,
    runtime::{Runtime, StateFolder, write_atomically},
    services::{self, Member, ServiceView},
    shim,
    tokens::Minter,
    vip, waypoints,
};

/// A node.
#[derive(Debug)]
pub(super) struct Node {
    /// Its name.
    pub name: String,
    /// Its number, from 1.
    pub number: u8,
    /// Its namespace.
    pub netns: Netns,
    /// A runtime inside.
    pub handle: Handle,
    pool: PodPool,
    rules: String,
}

impl Node {
    /// A node in its namespace.
    pub(super) fn new(number: u8, netns: Netns, handle: Handle) -> Self {
        Self {
            name: name(number),
            number,
            netns,
            handle,
            pool: PodPool::new(number),
            rules: String::new(),
        }
    }
}

/// The name of node `number`.
pub(super) fn name(number: u8) -> String {
    format!("node{number}")
}

/// A pod that exists, running or on its way in or out.
#[derive(Debug)]
pub(super) struct LivePod {
    /// What it is.
    pub plan: Arc<PodPlan>,
    /// Where it is.
    pub place: Place,
    /// Its namespace.
    pub netns: Netns,
    /// Its processes, once they may run.
    pub handle: Option<PodHandle>,
    /// When it was made.
    pub created: SystemTime,
    /// It was told to stop.
    pub terminating: bool,
    /// What the agent says of it: `enabled` or `pending`, and why.
    pub enrolment: Option<(String, Option<String>)>,
    /// Its containers by name, the main ones first.
    pub containers: Vec<ContainerPlan>,
    near: String,
    startable: Containers,
    files: Vec<(PathBuf, PathBuf)>,
}

impl LivePod {
    /// How far its processes are.
    pub(super) fn state(&self) -> PodState {
        match &self.handle {
            Some(handle) => handle.state(),
            None => PodState {
                message: Some("waiting for the mesh to take it in".to_owned()),
                ..PodState::default()
            },
        }
    }

    /// Whether there is nothing more to wait for.
    pub(super) fn settled(&self) -> bool {
        let state = self.state();
        self.handle.is_some() && (state.settled() || state.message.is_some())
    }

    fn ended(&self) -> bool {
        matches!(self.state().phase, Phase::Succeeded | Phase::Failed)
    }
}

/// Everything.
#[derive(Debug)]
pub(super) struct World {
    /// The mesh's folder.
    pub runtime: Runtime,
    /// The user's folder as last read.
    pub folder: Folder,
    /// Label edits from the command line.
    pub edits: LabelEdits,
    /// What is in force.
    pub objects: Objects,
    /// What cannot be used.
    pub problems: Vec<Problem>,
    /// Pods that cannot be placed, and why.
    pub unplaced: BTreeMap<Key, String>,
    /// By name.
    pub nodes: BTreeMap<String, Node>,
    /// By unique id.
    pub pods: BTreeMap<String, LivePod>,
    /// Services as they are now.
    pub services: BTreeMap<Key, ServiceView>,
    service_pool: ServicePool,
    zone: Zone,
    state: StateFolder,
    facts: BTreeMap<String, Vec<u8>>,
    news: mpsc::UnboundedSender<PodNews>,
    rootless: bool,
    counter: u64,
    told_of_images: bool,
    minter: Arc<Minter>,
}

impl World {
    /// A world of nodes without pods.
    pub(super) fn new(
        runtime: Runtime,
        nodes: Vec<Node>,
        zone: Zone,
        news: mpsc::UnboundedSender<PodNews>,
        rootless: bool,
        minter: Arc<Minter>,
    ) -> Self {
        let state = StateFolder::new(runtime.state());
        Self {
            runtime,
            folder: Folder::default(),
            edits: LabelEdits::default(),
            objects: Objects::default(),
            problems: Vec::new(),
            unplaced: BTreeMap::new(),
            nodes: nodes
                .into_iter()
                .map(|node| (node.name.clone(), node))
                .collect(),
            pods: BTreeMap::new(),
            services: BTreeMap::new(),
            service_pool: ServicePool::default(),
            zone,
            state,
            facts: BTreeMap::new(),
            news,
            rootless,
            counter: 0,
            told_of_images: false,
            minter,
        }
    }

    /// Takes the objects in force from the folder and the label edits. Answers with what is new to tell the user.
    pub(super) fn read(&mut self) -> Vec<String> {
        let (mut objects, problems) = self.folder.objects();
        for (namespace, labels) in &mut objects.namespaces {
            self.edits.namespace(namespace, labels);
        }
        waypoints::deploy(&mut objects);
        let mut notes: Vec<String> = problems
            .iter()
            .filter(|problem| !self.problems.contains(problem))
            .map(ToString::to_string)
            .collect();
        self.objects = objects;
        self.problems = problems;
        notes.extend(self.note_of_images());
        notes
    }

    fn note_of_images(&mut self) -> Option<String> {
        let images = plan::images(&plan::pods(&self.objects));
        if self.told_of_images || images.is_empty() {
            return None;
        }
        self.told_of_images = true;
        Some("images are not run here: containers are processes of this machine, started from command and args".to_owned())
    }

    /// Starts what should run and is not there, stops what should not, and writes everything down.
    pub(super) fn reconcile(&mut self) -> Vec<String> {
        let mut wanted = plan::pods(&self.objects);
        for plan in wanted.values_mut() {
            let mut labels = plan.labels();
            self.edits.pod(&plan.key, &mut labels);
            plan.pod.metadata.labels = Some(labels);
        }
        self.stop_unwanted(&wanted);
        self.unplaced.retain(|key, _| wanted.contains_key(key));
        let mut notes = Vec::new();
        for (key, plan) in wanted {
            if let Some(pod) = self.pods.values_mut().find(|pod| pod.plan.key == key) {
                if !pod.terminating {
                    pod.plan = Arc::new(plan);
                }
            } else if let Err(error) = self.create(plan) {
                let message = format!("{error:#}");
                let before = self.unplaced.insert(key.clone(), message.clone());
                if before.as_ref() != Some(&message) {
                    notes.push(format!("pod {key} cannot start: {message}"));
                }
            } else {
                self.unplaced.remove(&key);
            }
        }
        self.release_pods();
        notes.extend(self.publish().err().map(|error| format!("{error:#}")));
        notes
    }

    /// A pod that is no longer wanted stops, but one that a new version of its deployment replaces goes on until all of
    /// the new ones are ready.
    fn stop_unwanted(&mut self, wanted: &BTreeMap<Key, PodPlan>) {
        let ready: BTreeSet<&Key> = self
            .pods
            .values()
            .filter(|pod| !pod.terminating && pod.state().ready)
            .map(|pod| &pod.plan.key)
            .collect();
        let awaited: BTreeSet<Key> = wanted
            .values()
            .filter(|plan| !ready.contains(&plan.key))
            .filter_map(|plan| plan.deployment.clone())
            .collect();
        for pod in self.pods.values_mut().filter(|pod| !pod.terminating) {
            let stays = match wanted.get(&pod.plan.key) {
                Some(plan) => plan.fingerprint() == pod.plan.fingerprint(),
                None => pod
                    .plan
                    .deployment
                    .as_ref()
                    .is_some_and(|deployment| awaited.contains(deployment)),
            };
            if !stays {
                pod.terminating = true;
                pod.handle.iter().for_each(PodHandle::stop);
            }
        }
    }

    fn create(&mut self, plan: PodPlan) -> Result<()> {
        let load = self.nodes.keys().map(|node| {
            let count = self
                .pods
                .values()
                .filter(|pod| &pod.place.node == node)
                .count();
            (node.clone(), count)
        });
        let node = plan::schedule(&plan.spec(), &load.collect())?;
        let node = self.nodes.get_mut(&node).context("the mesh has no nodes")?;
        let address = node
            .pool
            .take()
            .with_context(|| format!("{} has no free address (253 pods fit)", node.name))?;
        self.counter += 1;
        let place = Place {
            node: node.name.clone(),
            node_address: address::node(node.number),
            address,
            uid: plan::uuid(rand::random(), rand::random()),
        };
        let near = format!("pod{}", self.counter);
        let files = pod_files(&self.runtime, &plan, &place)
            .inspect_err(|_| node.pool.release(address))
            .context("write the pod's resolv.conf and hosts")?;
        let netns = wire(node, &near, &place)
            .inspect_err(|_| node.pool.release(address))
            .context("wire the pod")?;
        let startable = containers(&plan, &place);
        let pod = LivePod {
            containers: startable
                .iter()
                .flat_map(|(init, main)| main.iter().chain(init))
                .cloned()
                .collect(),
            plan: Arc::new(plan),
            netns,
            handle: None,
            created: SystemTime::now(),
            terminating: false,
            enrolment: None,
            near,
            startable,
            files,
            place: place.clone(),
        };
        self.pods.insert(place.uid, pod);
        Ok(())
    }

    /// Lets those pods' processes start that need not wait for the mesh, or need not wait any more: a pod of the mesh
    /// never runs uncaptured.
    fn release_pods(&mut self) {
        let policy = cni::facts::Policy::default();
        for pod in self
            .pods
            .values_mut()
            .filter(|pod| pod.handle.is_none() && !pod.terminating)
        {
            let labels = self.objects.namespace_labels(&pod.plan.key.namespace);
            let facts = observe::facts(pod, &labels, Vec::new());
            let enrolled = pod
                .enrolment
                .as_ref()
                .is_some_and(|(redirection, _)| redirection == "enabled");
            if policy.wanted(&facts) != cni::facts::Wanted::In || enrolled {
                if waypoints::is_instance(&self.objects, &pod.plan) {
                    let (runtime, minter) = (&self.runtime, &self.minter);
                    match waypoints::introduce(runtime, minter, &pod.plan, &pod.place) {
                        Ok(true) => {
                            let folder = waypoints::folder(runtime, &pod.place.uid);
                            pod.files.push(folder);
                        }
                        // The control plane has yet to make its authority: this is asked again once it has.
                        Ok(false) => continue,
                        Err(error) => {
                            tracing::warn!(pod = %pod.plan.key, error = format!("{error:#}"), "not started");
                            continue;
                        }
                    }
                }
                let sandbox = Sandbox {
                    plan: pod.plan.clone(),
                    place: pod.place.clone(),
                    netns: pod.netns.path().to_owned(),
                    node: self.nodes[&pod.place.node].handle.clone(),
                    runtime: self.runtime.clone(),
                    files: pod.files.clone(),
                    rootless: self.rootless,
                };
                pod.handle = Some(PodHandle::start(
                    sandbox,
                    pod.startable.clone(),
                    self.news.clone(),
                ));
            }
        }
        // A pod that was told to stop before it was let start has nothing to wait for.
        let unborn = self
            .pods
            .iter()
            .filter(|(_, pod)| pod.terminating && pod.handle.is_none());
        for uid in unborn.map(|(uid, _)| uid.clone()).collect::<Vec<_>>() {
            self.remove(&uid);
        }
    }

    /// Gives the waypoints new tokens, well before theirs run out.
    pub(super) fn renew_tokens(&self) -> Result<()> {
        let instance = |pod: &&LivePod| waypoints::is_instance(&self.objects, &pod.plan);
        let running = self.pods.values().filter(|pod| pod.handle.is_some());
        for pod in running.filter(instance) {
            waypoints::introduce(&self.runtime, &self.minter, &pod.plan, &pod.place)?;
        }
        Ok(())
    }

    /// Tells every pod to stop, for good.
    pub(super) fn stop_pods(&mut self) {
        self.pods.retain(|_, pod| pod.handle.is_some());
        self.pods
            .values()
            .filter_map(|pod| pod.handle.as_ref())
            .for_each(PodHandle::stop);
    }

    /// Removes a pod of which nothing runs any more.
    pub(super) fn remove(&mut self, uid: &str) {
        let Some(pod) = self.pods.remove(uid) else {
            return;
        };
        if let Some(node) = self.nodes.get_mut(&pod.place.node) {
            if let Err(error) = fabric::part_pod(&node.netns, &pod.near) {
                tracing::warn!(pod = %pod.plan.key, %error, "take the pod's wire away");
            }
            node.pool.release(pod.place.address);
        }
        pod.netns.remove();
        for (file, _) in pod
            .files
            .iter()
            .filter(|(file, _)| file.starts_with(self.runtime.etc()))
        {
            let _ = match file.is_dir() {
                true => std::fs::remove_dir_all(file),
                false => std::fs::remove_file(file),
            };
        }
    }

    /// Reads what a node's agent says of its pods. Whether anything changed.
    pub(super) fn read_enrolments(&mut self, node: &str) -> bool {
        let folder = cni::local::enrolments_folder(&self.runtime.node(node));
        let mut changed = false;
        for (uid, pod) in self
            .pods
            .iter_mut()
            .filter(|(_, pod)| pod.place.node == node)
        {
            let text = std::fs::read(folder.join(format!("{uid}.json"))).ok();
            let file = text
                .and_then(|text| serde_json::from_slice::<cni::local::EnrolmentFile>(&text).ok());
            let enrolment = file.map(|file| (file.redirection, file.reason));
            changed |= pod.enrolment != enrolment;
            pod.enrolment = enrolment;
        }
        changed
    }

    /// Writes everything down: facts for the agents, objects for the control plane, names, and rules for virtual addresses.
    fn publish(&mut self) -> Result<()> {
        self.publish_facts().context("tell the agents about pods")?;
        let members = self.members();
        self.services = services::view(&self.objects, &members, &mut self.service_pool);
        *self.zone.write() = Arc::new(self.services.clone());
        let objects = observe::state(self, &members);
        self.state
            .replace(&objects)
            .context("write the state folder")?;
        for node in self.nodes.values_mut() {
            let own = members.iter().filter(|member| member.node == node.name);
            let own: BTreeSet<IpAddr> = own.flat_map(|member| member.address.both()).collect();
            let rules = vip::render(&self.services, &own);
            if rules != node.rules {
                vip::apply(&node.netns, rules.clone())
                    .with_context(|| format!("rules of {}", node.name))?;
                node.rules = rules;
            }
        }
        Ok(())
    }

    fn publish_facts(&mut self) -> io::Result<()> {
        let mut facts = BTreeMap::new();
        for (uid, pod) in &self.pods {
            let labels = self.objects.namespace_labels(&pod.plan.key.namespace);
            let folder = cni::local::pods_folder(&self.runtime.node(&pod.place.node));
            let path = folder
                .join(format!("{uid}.json"))
                .to_string_lossy()
                .into_owned();
            let bytes =
                serde_json::to_vec(&observe::facts(pod, &labels, probe_ports(&pod.containers)))?;
            facts.insert(path, bytes);
        }
        for (path, bytes) in &facts {
            if self.facts.get(path) != Some(bytes) {
                write_atomically(path.as_ref(), bytes)?;
            }
        }
        for path in self.facts.keys().filter(|path| !facts.contains_key(*path)) {
            let _ = std::fs::remove_file(path);
        }
        self.facts = facts;
        Ok(())
    }

    fn members(&self) -> Vec<Member> {
        let living = self.pods.values().filter(|pod| !pod.ended());
        living
            .map(|pod| {
                let spec = pod.plan.spec();
                let ports = pod
                    .containers
                    .iter()
                    .flat_map(|container| container.ports.clone());
                Member {
                    key: pod.plan.key.clone(),
                    uid: pod.place.uid.clone(),
                    labels: pod.plan.labels(),
                    address: pod.place.address,
                    node: pod.place.node.clone(),
                    hostname: spec.hostname,
                    subdomain: spec.subdomain,
                    ready: pod.state().ready,
                    terminating: pod.terminating,
                    ports: ports.collect(),
                }
            })
            .collect()
    }

    /// The labels of a node: those of Kubernetes, and the user's over them.
    pub(super) fn node_labels(&self, node: &str) -> Labels {
        let mut labels = Labels::from([
            ("kubernetes.io/hostname".to_owned(), node.to_owned()),
            ("kubernetes.io/os".to_owned(), "linux".to_owned()),
        ]);
        labels.extend(self.objects.nodes.get(node).cloned().unwrap_or_default());
        labels
    }

    /// The pod that `target` (`NAMESPACE/POD`) names: by its name, or by the start of it when only one pod has it (so that
    /// a deployment's name is enough).
    pub(super) fn find_pod(&self, target: &str) -> Result<&LivePod, String> {
        let Some((namespace, name)) = target.split_once('/') else {
            return Err(format!("{target:?} is not of the form NAMESPACE/POD"));
        };
        let in_namespace = || {
            self.pods
                .values()
                .filter(|pod| pod.plan.key.namespace == namespace && !pod.terminating)
        };
        if let Some(pod) = in_namespace().find(|pod| pod.plan.key.name == name) {
            return Ok(pod);
        }
        let of_deployment = |pod: &&LivePod| {
            pod.plan
                .deployment
                .as_ref()
                .is_some_and(|key| key.name == name)
        };
        in_namespace().find(of_deployment).ok_or_else(|| {
            let known: Vec<_> = self
                .pods
                .values()
                .map(|pod| pod.plan.key.to_string())
                .collect();
            format!("there is no pod {target} (there are: {})", known.join(", "))
        })
    }
}

/// The pod's own files in the machine's places, `(from, to)`.
fn pod_files(
    runtime: &Runtime,
    plan: &PodPlan,
    place: &Place,
) -> io::Result<Vec<(PathBuf, PathBuf)>> {
    let write = |ending: &str, text: String| {
        let path = runtime.etc().join(format!("{}.{ending}", place.uid));
        std::fs::write(&path, text)?;
        std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o644))?;
        Ok::<_, io::Error>(path)
    };
    let resolver = write("resolv.conf", observe::resolv_conf(plan))?;
    let hosts = write("hosts", observe::hosts(plan, place))?;
    let own = PathBuf::from(shim::SHARED_PROGRAM);
    Ok(vec![
        (resolver, "/etc/resolv.conf".into()),
        (hosts, "/etc/hosts".into()),
        (own.clone(), own),
    ])
}

fn wire(node: &Node, near: &str, place: &Place) -> io::Result<Netns> {
    let netns = Netns::create(near)?;
    let joined = fabric::join_pod(&node.netns, node.number, &netns, near, place.address);
    joined.inspect_err(|_| netns.remove())?;
    Ok(netns)
}

fn containers(plan: &PodPlan, place: &Place) -> Containers {
    let spec = plan.spec();
    let list = |containers: &[k8s_openapi::api::core::v1::Container], init| {
        let worked_out = containers
            .iter()
            .map(|container| plan::container(plan, container, init, place));
        worked_out
            .collect::<Result<Vec<_>, _>>()
            .map_err(|error| error.to_string())
    };
    if spec.host_network == Some(true) {
        return Err("hostNetwork is not supported here".to_owned());
    }
    Ok((
        list(spec.init_containers.as_deref().unwrap_or_default(), true)?,
        list(&spec.containers, false)?,
    ))
}

fn probe_ports(containers: &[ContainerPlan]) -> Vec<u16> {
    let probes = containers.iter().flat_map(|container| {
        let probes = [
            &container.readiness,
            &container.liveness,
            &container.startup,
        ];
        probes
            .into_iter()
            .flatten()
            .filter_map(|probe| probe::port(probe, &container.ports))
    });
    probes.collect::<BTreeSet<_>>().into_iter().collect()
}
