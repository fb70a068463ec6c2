//! The effects of the Gateway controllers: watches, applies, writes status. Runs on the leader only.
//!
//! Level-triggered: every event of a Gateway, of what was made for it, of its class, its namespace or its class's overlays
//! leads to one look at everything, so a change by others is undone, and an event that is missed costs nothing but time. A
//! Gateway that fails is tried again with a growing delay of its own. ConfigMaps named by `parametersRef` are not watched,
//! which would mean to watch all of the cluster's: they are read again every [`PARAMETERS_INTERVAL`].

use std::{collections::BTreeMap, error::Error, fmt::Debug, sync::Arc, time::Duration};

use futures_util::{Stream, StreamExt as _, future::BoxFuture, stream::FuturesUnordered};
use k8s_openapi::{
    api::{
        admissionregistration::v1::MutatingWebhookConfiguration,
        apps::v1 as apps,
        autoscaling::v2::HorizontalPodAutoscaler,
        core::v1::{ConfigMap, Namespace, Service, ServiceAccount},
        policy::v1::PodDisruptionBudget,
    },
    jiff::Timestamp,
};
use kube::{
    Api, Client, Resource, ResourceExt as _,
    api::{DeleteParams, ListParams, Patch, PatchParams, PostParams, Preconditions},
    core::{ApiResource, DynamicObject, GroupVersionKind, PartialObjectMeta},
    runtime::{
        WatchStreamExt as _,
        reflector::{ObjectRef, Store, store::Writer},
        watcher,
    },
};
use net::report::Chain;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::{
    Deployed,
    class::{self, Role},
    names,
    plan::{self, Mode, Revisions, Surroundings, VERSION},
    queue::{Outcome, Queue},
    status::{self, Applied, Deployment, Status},
    template::{Names, Objects, Part},
};
use crate::{cluster::is_absent, crd, object::Name};

/// Field manager of what is deployed: upstream's, so that what istiod made can be taken over whole.
pub const MANAGER: &str = "istio.io/gateway-controller";
/// Field manager of the status of Gateways and classes.
pub const STATUS_MANAGER: &str = "leyline.dev/gateway-status";
/// How often a ConfigMap that a Gateway names is read again.
pub const PARAMETERS_INTERVAL: Duration = Duration::from_secs(15);

/// How often classes that could not be made or accepted are tried again.
const CLASSES_INTERVAL: Duration = Duration::from_secs(30);
const TAG: &str = "istio.io/tag";
/// Gateways looked at at a time.
const CONCURRENCY: usize = 8;

/// Why something could not be done for now.
#[derive(Debug, thiserror::Error)]
pub enum ReconcileError {
    /// The API server did not do it.
    #[error("{doing}")]
    Api {
        /// What was tried.
        doing: String,
        /// The cause.
        source: kube::Error,
    },
    /// An object is not of the form that its schema asks for.
    #[error("read {0}")]
    Read(Name, #[source] serde_json::Error),
}

/// Why a Gateway's objects are not all there.
enum DeployError {
    /// For now.
    Failed(ReconcileError),
    /// For a reason that its user must know.
    Refused(String),
}

impl From<ReconcileError> for DeployError {
    fn from(error: ReconcileError) -> Self {
        Self::Failed(error)
    }
}

type Webhooks = PartialObjectMeta<MutatingWebhookConfiguration>;

/// What all looks share.
struct Controller {
    client: Client,
    settings: Arc<Deployed>,
    gateways: Store<DynamicObject>,
    classes: Store<DynamicObject>,
    tags: Store<Webhooks>,
    queue: Queue,
}

/// What the controller's watches write to.
struct Writers {
    gateways: Writer<DynamicObject>,
    classes: Writer<DynamicObject>,
    tags: Writer<Webhooks>,
}

fn gateway_api(kind: &str, plural: &str) -> ApiResource {
    let kind = GroupVersionKind::gvk("gateway.networking.k8s.io", "v1", kind);
    ApiResource::from_gvk_with_plural(&kind, plural)
}

fn gateways() -> ApiResource {
    gateway_api("Gateway", "gateways")
}

fn classes() -> ApiResource {
    gateway_api("GatewayClass", "gatewayclasses")
}

fn resource_of(part: Part) -> ApiResource {
    let (api_version, kind) = part.kind();
    let (group, version) = api_version.split_once('/').unwrap_or(("", api_version));
    let plural = format!("{}s", kind.to_ascii_lowercase());
    ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk(group, version, kind), &plural)
}

fn failed(doing: impl Into<String>) -> impl FnOnce(kube::Error) -> ReconcileError {
    let doing = doing.into();
    |source| ReconcileError::Api { doing, source }
}

/// Makes and serves the classes and deploys Gateways, until it is dropped.
pub async fn run(client: Client, settings: Arc<Deployed>) {
    let writers = Writers {
        gateways: Writer::new(gateways()),
        classes: Writer::new(classes()),
        tags: Writer::default(),
    };
    let controller = Arc::new(Controller {
        client,
        settings,
        gateways: writers.gateways.as_reader(),
        classes: writers.classes.as_reader(),
        tags: writers.tags.as_reader(),
        queue: Queue::default(),
    });
    let watches: FuturesUnordered<BoxFuture<'_, ()>> = FuturesUnordered::new();
    watches.push(Box::pin(controller.watch_classes(writers.classes)));
    if controller.settings.deploy {
        controller.watch(&watches, writers.gateways, writers.tags);
        watches.push(Box::pin(controller.work()));
    }
    // None of them ends.
    watches.collect::<()>().await;
}

impl Controller {
    fn watch<'c>(
        &'c self,
        watches: &FuturesUnordered<BoxFuture<'c, ()>>,
        gateways: Writer<DynamicObject>,
        tags: Writer<Webhooks>,
    ) {
        let all = Api::all_with(self.client.clone(), &self::gateways());
        let own = watcher(all, watcher::Config::default()).reflect(gateways);
        watches.push(Box::pin(self.follow("gateways", own, |gateway| {
            self.queue.add(name_of(&gateway))
        })));
        let labelled = watcher::Config::default().labels(TAG);
        let tagged = watcher(Api::<Webhooks>::all(self.client.clone()), labelled).reflect(tags);
        watches.push(Box::pin(
            self.follow("tags", tagged, |_| self.every(|_| true)),
        ));
        let namespaces = Api::<PartialObjectMeta<Namespace>>::all(self.client.clone());
        let namespaces = watcher(namespaces, watcher::Config::default());
        watches.push(Box::pin(self.follow(
            "namespaces",
            namespaces,
            |namespace| {
                let in_it = namespace.name_any();
                self.every(|gateway| gateway.namespace().as_deref() == Some(&in_it));
            },
        )));
        let system = &self.settings.mesh.system_namespace;
        let maps = Api::<PartialObjectMeta<ConfigMap>>::namespaced(self.client.clone(), system);
        let maps = watcher(
            maps,
            watcher::Config::default().labels(names::DEFAULTS_FOR_CLASS),
        );
        // A label that is gone or another one now concerned some class before.
        watches.push(Box::pin(
            self.follow("overlays", maps, |_| self.every(|_| true)),
        ));
        watches.push(self.watch_made::<ServiceAccount>("serviceaccounts"));
        watches.push(self.watch_made::<apps::Deployment>("deployments"));
        watches.push(self.watch_made::<Service>("services"));
        watches.push(self.watch_made::<HorizontalPodAutoscaler>("horizontalpodautoscalers"));
        watches.push(self.watch_made::<PodDisruptionBudget>("poddisruptionbudgets"));
    }

    /// Objects of a kind that were made for Gateways.
    fn watch_made<K>(&self, what: &'static str) -> BoxFuture<'_, ()>
    where
        K: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + Sync + 'static,
    {
        let api = Api::<PartialObjectMeta<K>>::all(self.client.clone());
        let made = watcher(api, watcher::Config::default().labels(names::MANAGED));
        Box::pin(self.follow(what, made, |object| {
            let gateway = object.labels().get(names::GATEWAY_NAME);
            let namespace = object.namespace().unwrap_or_default();
            if let Some(gateway) = gateway {
                self.queue.add(Name::new(namespace, gateway.as_str()));
            }
        }))
    }

    /// Calls `each` for every object that comes, changes or goes, forever, and looks at every Gateway when a list is whole
    /// again: what went while the watch was down is told by no event. Failed watches start again with a growing delay.
    async fn follow<K: Clone + Send + Debug + 'static>(
        &self,
        what: &'static str,
        events: impl Stream<Item = watcher::Result<watcher::Event<K>>> + Send,
        mut each: impl FnMut(K),
    ) {
        let mut events = std::pin::pin!(events.default_backoff());
        while let Some(event) = events.next().await {
            match event {
                Ok(watcher::Event::Apply(object) | watcher::Event::Delete(object)) => each(object),
                Ok(watcher::Event::InitDone) => self.every(|_| true),
                Ok(watcher::Event::Init | watcher::Event::InitApply(_)) => {}
                Err(error) => {
                    tracing::warn!(what, error = &error as &dyn Error, "cannot be watched")
                }
            }
        }
    }

    fn every(&self, concerned: impl Fn(&DynamicObject) -> bool) {
        let all = self.gateways.state();
        let names = all
            .iter()
            .filter(|gateway| concerned(gateway))
            .map(|gateway| name_of(gateway));
        names.for_each(|name| self.queue.add(name));
    }

    async fn work(&self) {
        // Before the classes are known, every Gateway would look foreign.
        if self.classes.wait_until_ready().await.is_err() {
            return;
        }
        let mut running = FuturesUnordered::new();
        loop {
            tokio::select! {
                name = self.queue.next(), if running.len() < CONCURRENCY => running.push(self.look(name)),
                Some(()) = running.next() => {}
            }
        }
    }

    async fn look(&self, name: Name) {
        let outcome = match self.reconcile(&name).await {
            Ok(outcome) => outcome,
            Err(error) => {
                tracing::warn!(gateway = %name, error = &error as &dyn Error, "a Gateway could not be dealt with");
                Outcome::Failed
            }
        };
        self.queue.done(name, outcome);
    }

    async fn reconcile(&self, name: &Name) -> Result<Outcome, ReconcileError> {
        let key = ObjectRef::new_with(&name.name, gateways()).within(&name.namespace);
        let Some(found) = self.gateways.get(&key) else {
            return Ok(Outcome::Settled);
        };
        let read = |error| ReconcileError::Read(name.clone(), error);
        let raw = serde_json::to_value(&*found).map_err(read)?;
        let gateway: crd::Gateway = serde_json::from_value(raw.clone()).map_err(read)?;
        let Some(role) = self.role(&gateway) else {
            return Ok(Outcome::Settled);
        };
        let around = self.surroundings(&gateway).await?;
        let mode = plan::mode(&self.revisions(), &gateway, role, &around.namespace_labels);
        if mode == Mode::Foreign || gateway.metadata.deletion_timestamp.is_some() {
            return Ok(Outcome::Settled);
        }
        let deployment = self.deploy(&gateway, role, mode, &around).await;
        let (deployment, outcome) = match deployment {
            Ok(deployment) => (deployment, next_look(&gateway)),
            Err(DeployError::Refused(problem)) => {
                let again = match next_look(&gateway) {
                    Outcome::Settled => Outcome::Failed,
                    // Its user may correct the parameters at any moment.
                    again => again,
                };
                (Deployment::Refused(problem), again)
            }
            Err(DeployError::Failed(error)) => return Err(error),
        };
        let told = status::told_addresses(&gateway);
        let status = Status::new(&self.settings, &gateway, role, &deployment, &told);
        self.write_status(name, &raw, &status).await?;
        Ok(outcome)
    }

    fn role(&self, gateway: &crd::Gateway) -> Option<Role> {
        let key = ObjectRef::new_with(&gateway.spec.gateway_class_name, classes());
        let class = self.classes.get(&key)?;
        class::role(
            &self.settings,
            class.data.pointer("/spec/controllerName")?.as_str()?,
        )
    }

    fn revisions(&self) -> Revisions {
        let own = self.settings.mesh.revision.clone();
        let tags: BTreeMap<String, String> = self
            .tags
            .state()
            .iter()
            .filter_map(|webhook| {
                let labels = webhook.labels();
                Some((
                    labels.get(TAG)?.clone(),
                    labels.get(names::REVISION)?.clone(),
                ))
            })
            .collect();
        Revisions {
            default: match tags.get("default") {
                Some(revision) => *revision == own,
                None => own == "default",
            },
            own,
            tags,
        }
    }

    async fn surroundings(&self, gateway: &crd::Gateway) -> Result<Surroundings, ReconcileError> {
        let namespace = gateway.metadata.namespace.clone().unwrap_or_default();
        let system = &self.settings.mesh.system_namespace;
        let parameters = match plan::parameters_name(gateway) {
            None => None,
            Some(name) => {
                let maps = Api::<ConfigMap>::namespaced(self.client.clone(), &namespace);
                let doing = || format!("read ConfigMap {namespace}/{name}");
                maps.get_opt(&name).await.map_err(failed(doing()))?
            }
        };
        let network = match self.settings.mesh.network.as_str() {
            "" => self
                .namespace_labels(system)
                .await?
                .remove(names::NETWORK)
                .unwrap_or_default(),
            network => network.to_owned(),
        };
        Ok(Surroundings {
            namespace_labels: self.namespace_labels(&namespace).await?,
            defaults: self.defaults(&gateway.spec.gateway_class_name).await?,
            parameters,
            network,
        })
    }

    async fn namespace_labels(
        &self,
        name: &str,
    ) -> Result<BTreeMap<String, String>, ReconcileError> {
        let namespaces = Api::<Namespace>::all(self.client.clone());
        let found = namespaces.get_metadata_opt(name).await;
        let found = found.map_err(failed(format!("read Namespace {name}")))?;
        Ok(found
            .and_then(|namespace| namespace.metadata.labels)
            .unwrap_or_default())
    }

    /// The class's overlays: the oldest ConfigMap counts, of those that are not another revision's.
    async fn defaults(&self, class: &str) -> Result<Option<ConfigMap>, ReconcileError> {
        let system = &self.settings.mesh.system_namespace;
        let maps = Api::<ConfigMap>::namespaced(self.client.clone(), system);
        let of_class =
            ListParams::default().labels(&format!("{}={class}", names::DEFAULTS_FOR_CLASS));
        let found = maps.list(&of_class).await;
        let found = found.map_err(failed(format!("list the overlays of class {class}")))?;
        let age = |map: &ConfigMap| {
            let created = map.metadata.creation_timestamp.as_ref().map(|time| time.0);
            (created.unwrap_or(Timestamp::MAX), map.metadata.name.clone())
        };
        let own = &self.settings.mesh.revision;
        let revision = |map: &ConfigMap| map.labels().get(names::REVISION).cloned();
        let found = found.items.into_iter();
        let found = found.filter(|map| revision(map).is_none_or(|revision| revision == *own));
        Ok(found.min_by_key(age))
    }

    async fn deploy(
        &self,
        gateway: &crd::Gateway,
        role: Role,
        mode: Mode,
        around: &Surroundings,
    ) -> Result<Deployment, DeployError> {
        if mode == Mode::Manual {
            return Ok(Deployment::Manual);
        }
        let objects = match plan::objects(&self.settings, gateway, role, around) {
            Ok(objects) => objects,
            Err(error) => return Ok(Deployment::BadParameters(Chain(&error).to_string())),
        };
        let mut applied = Applied {
            service: Names::new(gateway).objects,
            ..Applied::default()
        };
        if objects.0.is_empty() {
            return Ok(Deployment::Applied(applied));
        }
        for (part, object) in &objects.0 {
            let found = self.apply(*part, object).await?;
            applied.note(*part, &found.data);
        }
        self.prune(gateway, &objects).await?;
        self.claim(gateway).await?;
        Ok(Deployment::Applied(applied))
    }

    /// Applies an object, unless one of that name belongs to somebody else.
    async fn apply(&self, part: Part, object: &Value) -> Result<DynamicObject, DeployError> {
        let resource = resource_of(part);
        let text = |pointer: &str| {
            object
                .pointer(pointer)
                .and_then(Value::as_str)
                .unwrap_or_default()
        };
        let (namespace, name) = (text("/metadata/namespace"), text("/metadata/name"));
        let api = Api::<DynamicObject>::namespaced_with(self.client.clone(), namespace, &resource);
        let what = format!("{} {namespace}/{name}", resource.kind);
        let before = api.get_metadata_opt(name).await;
        let before = before.map_err(failed(format!("read {what}")))?;
        if let Some(before) = before {
            let of = |key: &str| before.labels().get(key).cloned();
            let gateway = object["metadata"]["labels"][names::GATEWAY_NAME]
                .as_str()
                .map(str::to_owned);
            if of(names::MANAGED).is_none() || of(names::GATEWAY_NAME) != gateway {
                let problem = format!("{what} is there already and was not made for this Gateway");
                return Err(DeployError::Refused(problem));
            }
        }
        let params = PatchParams::apply(MANAGER).force();
        match api.patch(name, &params, &Patch::Apply(object)).await {
            Ok(applied) => Ok(applied),
            Err(kube::Error::Api(answer)) if is_refusal(answer.code, &answer.message) => {
                Err(DeployError::Refused(format!("{what}: {}", answer.message)))
            }
            Err(source) => Err(failed(format!("apply {what}"))(source).into()),
        }
    }

    /// Takes away what overlays asked for earlier.
    async fn prune(&self, gateway: &crd::Gateway, objects: &Objects) -> Result<(), ReconcileError> {
        let names = Names::new(gateway);
        for part in Part::ALL {
            if part.only_when_asked() && !objects.0.contains_key(&part) {
                self.remove(part, gateway, &names).await?;
            }
        }
        Ok(())
    }

    async fn remove(
        &self,
        part: Part,
        gateway: &crd::Gateway,
        names: &Names,
    ) -> Result<(), ReconcileError> {
        let resource = resource_of(part);
        let api =
            Api::<DynamicObject>::namespaced_with(self.client.clone(), &names.namespace, &resource);
        let what = format!("{} {}/{}", resource.kind, names.namespace, names.objects);
        let found = api.get_metadata_opt(&names.objects).await;
        let Some(found) = found.map_err(failed(format!("read {what}")))? else {
            return Ok(());
        };
        let owned = found
            .owner_references()
            .iter()
            .any(|owner| Some(&owner.uid) == gateway.metadata.uid.as_ref());
        if !owned || !found.labels().contains_key(names::MANAGED) {
            return Ok(());
        }
        let only_this = DeleteParams {
            preconditions: Some(Preconditions {
                uid: found.uid(),
                ..Preconditions::default()
            }),
            ..DeleteParams::default()
        };
        match api.delete(&names.objects, &only_this).await {
            Ok(_) => Ok(()),
            Err(kube::Error::Api(answer)) if is_absent(&answer) => Ok(()),
            Err(source) => Err(failed(format!("delete {what}"))(source)),
        }
    }

    /// Says on the Gateway which version of controller made its objects, so that an older one leaves them alone.
    async fn claim(&self, gateway: &crd::Gateway) -> Result<(), ReconcileError> {
        if plan::annotation(gateway, names::CONTROLLER_VERSION) == Some(&VERSION.to_string()) {
            return Ok(());
        }
        let names = Names::new(gateway);
        let api = self.gateway_api(&names.namespace);
        let said = json!({
            "apiVersion": "gateway.networking.k8s.io/v1", "kind": "Gateway",
            "metadata": {"annotations": {names::CONTROLLER_VERSION: VERSION.to_string()}},
        });
        let params = PatchParams::apply(MANAGER).force();
        let written = api
            .patch_metadata(&names.gateway, &params, &Patch::Apply(said))
            .await;
        let doing = format!("annotate Gateway {}/{}", names.namespace, names.gateway);
        written.map(drop).map_err(failed(doing))
    }

    fn gateway_api(&self, namespace: &str) -> Api<DynamicObject> {
        Api::namespaced_with(self.client.clone(), namespace, &gateways())
    }

    async fn write_status(
        &self,
        name: &Name,
        raw: &Value,
        status: &Status,
    ) -> Result<(), ReconcileError> {
        let generation = raw["metadata"]["generation"].as_i64().unwrap_or_default();
        let Some(status) = status::written(status, &raw["status"], generation, &now()) else {
            return Ok(());
        };
        let object = json!({
            "apiVersion": "gateway.networking.k8s.io/v1", "kind": "Gateway",
            "metadata": {"name": &*name.name, "namespace": &*name.namespace, "uid": raw["metadata"]["uid"]},
            "status": status,
        });
        let api = self.gateway_api(&name.namespace);
        let params = PatchParams::apply(STATUS_MANAGER).force();
        let written = api
            .patch_status(&name.name, &params, &Patch::Apply(object))
            .await;
        written
            .map(drop)
            .map_err(failed(format!("write the status of Gateway {name}")))
    }

    /// Makes the classes and keeps saying that they are served.
    async fn watch_classes(&self, writer: Writer<DynamicObject>) {
        let api = Api::<DynamicObject>::all_with(self.client.clone(), &classes());
        let events = watcher(api.clone(), watcher::Config::default())
            .reflect(writer)
            .default_backoff();
        let mut events = std::pin::pin!(events);
        let mut listed = false;
        loop {
            // What failed is tried again without an event, too.
            match tokio::time::timeout(CLASSES_INTERVAL, events.next()).await {
                Ok(None) => return,
                Ok(Some(Err(error))) => {
                    tracing::warn!(
                        error = &error as &dyn Error,
                        "GatewayClasses cannot be watched"
                    );
                    continue;
                }
                // Until the list is whole, absent classes might only not have come yet.
                Ok(Some(Ok(watcher::Event::Init | watcher::Event::InitApply(_)))) => continue,
                Ok(Some(Ok(_))) => {
                    listed = true;
                    self.every(|_| true);
                }
                Err(_) if !listed => continue,
                Err(_) => {}
            }
            self.tend_classes(&api).await;
        }
    }

    async fn tend_classes(&self, api: &Api<DynamicObject>) {
        let known = |name: &str| {
            self.classes
                .get(&ObjectRef::new_with(name, classes()))
                .is_some()
        };
        let made = class::made(&self.settings).into_iter();
        let absent = made.filter(|class| self.settings.make_classes && !known(class.name));
        for class in absent {
            tell(make_class(api, &class).await);
        }
        for class in self.classes.state() {
            let controller = class
                .data
                .pointer("/spec/controllerName")
                .and_then(Value::as_str);
            let role = controller.and_then(|name| class::role(&self.settings, name));
            if let Some(role) = role {
                tell(accept_class(api, &class, role).await);
            }
        }
    }
}

/// A class that fails must not keep the next one from being tended.
fn tell(result: Result<(), ReconcileError>) {
    if let Err(error) = result {
        tracing::warn!(
            error = &error as &dyn Error,
            "a GatewayClass cannot be kept"
        );
    }
}

async fn make_class(api: &Api<DynamicObject>, class: &class::Made) -> Result<(), ReconcileError> {
    let doing = format!("make GatewayClass {}", class.name);
    let object = serde_json::from_value(class.object())
        .map_err(|error| ReconcileError::Read(Name::new("", class.name), error))?;
    let params = PostParams {
        field_manager: Some(MANAGER.to_owned()),
        ..PostParams::default()
    };
    match api.create(&params, &object).await {
        Ok(_) => tracing::info!(class = class.name, "GatewayClass made"),
        // Somebody was faster, and what is there is never changed.
        Err(kube::Error::Api(answer)) if answer.code == 409 => {}
        Err(source) => return Err(failed(doing)(source)),
    }
    Ok(())
}

async fn accept_class(
    api: &Api<DynamicObject>,
    class: &DynamicObject,
    role: Role,
) -> Result<(), ReconcileError> {
    let name = class.name_any();
    let before = &class.data["status"];
    let generation = class.metadata.generation.unwrap_or_default();
    let conditions = status::stamped(
        &[status::of_class()],
        &before["conditions"],
        generation,
        &now(),
    );
    let mut after = json!({"conditions": conditions});
    if role == Role::Waypoint {
        let features = class::WAYPOINT_FEATURES.map(|name| json!({"name": name}));
        after["supportedFeatures"] = features.into_iter().collect();
    }
    let same = status::says(before, &after, "conditions", "type")
        && before["supportedFeatures"] == after["supportedFeatures"];
    if same {
        return Ok(());
    }
    let object = json!({
        "apiVersion": "gateway.networking.k8s.io/v1", "kind": "GatewayClass",
        "metadata": {"name": name}, "status": after,
    });
    let params = PatchParams::apply(STATUS_MANAGER).force();
    let written = api
        .patch_status(&name, &params, &Patch::Apply(object))
        .await;
    written
        .map(drop)
        .map_err(failed(format!("write the status of GatewayClass {name}")))
}

impl Applied {
    /// Takes in what the API server answered.
    fn note(&mut self, part: Part, found: &Value) {
        match part {
            Part::Deployment => {
                let ready = found
                    .pointer("/status/readyReplicas")
                    .and_then(Value::as_i64);
                self.ready = ready.unwrap_or_default() > 0;
            }
            Part::Service => self.addresses = service_addresses(found),
            _ => {}
        }
    }
}

fn service_addresses(service: &Value) -> Vec<String> {
    let texts = |pointer: &str, of: fn(&Value) -> Option<&str>| -> Vec<String> {
        let items = service
            .pointer(pointer)
            .and_then(Value::as_array)
            .into_iter()
            .flatten();
        items.filter_map(of).map(str::to_owned).collect()
    };
    match service.pointer("/spec/type").and_then(Value::as_str) {
        Some("LoadBalancer") => texts("/status/loadBalancer/ingress", |ingress| {
            ingress["ip"]
                .as_str()
                .or_else(|| ingress["hostname"].as_str())
        }),
        _ => texts("/spec/clusterIPs", |ip| {
            ip.as_str().filter(|ip| *ip != "None")
        }),
    }
}

fn next_look(gateway: &crd::Gateway) -> Outcome {
    match plan::parameters_name(gateway) {
        Some(_) => Outcome::Again(PARAMETERS_INTERVAL),
        None => Outcome::Settled,
    }
}

/// Whether the API server will say the same until somebody changes something. A field that is not in the schema of a
/// built-in kind it answers with 500.
fn is_refusal(code: u16, message: &str) -> bool {
    matches!(code, 400 | 403 | 422) || message.contains("field not declared in schema")
}

fn name_of(object: &DynamicObject) -> Name {
    Name::new(object.namespace().unwrap_or_default(), object.name_any())
}

fn now() -> String {
    Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

#[cfg(test)]
mod tests;
