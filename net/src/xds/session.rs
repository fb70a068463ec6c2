//! The protocol: what to ask, what to remember, what to answer. Pure.

use std::collections::{BTreeSet, HashMap};

use mesh::names::Str;
use proto::google::rpc::Status;

use super::{Handler, Mode, Node, Rejection, Resource, Response, Subscription, wire};

/// What is known of each followed type, across connections.
#[derive(Debug)]
pub(super) struct Session {
    types: Vec<TypeState>,
}

#[derive(Debug)]
struct TypeState {
    subscription: Subscription,
    /// Name to version of what the handler took.
    retained: HashMap<Str, Box<str>>,
    /// Demanded names without a resource of that name.
    demanded: BTreeSet<String>,
    /// A response has been taken.
    answered: bool,
    /// Retained names that a server which was not told our versions has not sent again.
    unconfirmed: BTreeSet<String>,
}

/// Whether the server is told what we have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Versions {
    /// Only what changed comes.
    Told,
    /// The message would be too long for it: everything comes, and what does not come is gone.
    Withheld,
}

/// What a response led to.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Taken {
    /// To be sent.
    pub(super) replies: Vec<wire::DeltaDiscoveryRequest>,
    /// Names and aliases that arrived.
    pub(super) arrived: Vec<String>,
    /// Names that the server does not have.
    pub(super) absent: Vec<String>,
    /// How many resources were refused, of which type.
    pub(super) rejected: Option<(&'static str, usize)>,
}

impl Session {
    pub(super) fn new(subscriptions: &[Subscription]) -> Self {
        let state = |subscription: &Subscription| TypeState {
            subscription: *subscription,
            retained: HashMap::new(),
            demanded: BTreeSet::new(),
            answered: false,
            unconfirmed: BTreeSet::new(),
        };
        Self {
            types: subscriptions.iter().map(state).collect(),
        }
    }

    /// Whether each wildcard type has been answered.
    pub(super) fn synced(&self) -> bool {
        self.types
            .iter()
            .all(|t| t.answered || t.subscription.mode == Mode::OnDemand)
    }

    /// The first requests of a connection, one per type, in order.
    pub(super) fn first_requests(
        &mut self,
        node: &Node,
        versions: Versions,
        waited: &[String],
    ) -> Vec<wire::DeltaDiscoveryRequest> {
        let first = |state: &mut TypeState| state.first_request(node, versions, waited);
        self.types.iter_mut().map(first).collect()
    }

    /// The request for names that are newly demanded, if there is an on-demand type.
    pub(super) fn demand(&mut self, names: Vec<String>) -> Option<wire::DeltaDiscoveryRequest> {
        let state = self
            .types
            .iter_mut()
            .find(|t| t.subscription.mode == Mode::OnDemand)?;
        state.demanded.extend(names.iter().cloned());
        Some(wire::DeltaDiscoveryRequest {
            type_url: state.subscription.type_url.to_owned(),
            resource_names_subscribe: names,
            ..Default::default()
        })
    }

    /// The response as the handler sees it; `None` for a type that is not followed.
    pub(super) fn read(&self, response: wire::DeltaDiscoveryResponse) -> Option<Incoming> {
        let state = self.state(&response.type_url)?;
        let type_url = state.subscription.type_url;
        let mut rejected = Vec::new();
        let mut resources = Vec::with_capacity(response.resources.len());
        for resource in response.resources {
            match body(type_url, resource) {
                Ok(resource) => resources.push(resource),
                Err(rejection) => rejected.push(rejection),
            }
        }
        Some(Incoming {
            response: Response {
                type_url,
                resources,
                removed: response.removed_resources,
            },
            nonce: response.nonce,
            rejected,
        })
    }

    /// Has the handler apply a response, remembers what it took, and answers.
    pub(super) fn take(&mut self, incoming: Incoming, handler: &mut impl Handler) -> Taken {
        let Incoming {
            response,
            nonce,
            mut rejected,
        } = incoming;
        let type_url = response.type_url;
        let names: Vec<Names> = response.resources.iter().map(Names::of).collect();
        let removed = response.removed.clone();
        rejected.extend(handler.apply(response));
        let mut taken = Taken::default();
        if let Some(state) = self.state_mut(type_url) {
            state.remember(names, &removed, &rejected, &mut taken);
        }
        taken.replies.insert(0, answer(type_url, nonce, &rejected));
        if !rejected.is_empty() {
            taken.rejected = Some((type_url, rejected.len()));
        }
        taken
    }

    /// What a server that was not told our versions has not confirmed by now: gone. One response per type.
    pub(super) fn unconfirmed(&mut self) -> Vec<Response> {
        let stale = |state: &mut TypeState| {
            let removed: Vec<_> = std::mem::take(&mut state.unconfirmed).into_iter().collect();
            for name in &removed {
                state.retained.remove(name.as_str());
            }
            Response {
                type_url: state.subscription.type_url,
                resources: Vec::new(),
                removed,
            }
        };
        let all = self.types.iter_mut().map(stale);
        all.filter(|r| !r.removed.is_empty()).collect()
    }

    fn state(&self, type_url: &str) -> Option<&TypeState> {
        self.types
            .iter()
            .find(|t| t.subscription.type_url == type_url)
    }

    fn state_mut(&mut self, type_url: &str) -> Option<&mut TypeState> {
        self.types
            .iter_mut()
            .find(|t| t.subscription.type_url == type_url)
    }
}

/// A response that has been read and not yet applied.
#[derive(Debug)]
pub(super) struct Incoming {
    pub(super) response: Response,
    nonce: String,
    rejected: Vec<Rejection>,
}

struct Names {
    name: Str,
    aliases: Vec<String>,
    version: String,
}

impl Names {
    fn of(resource: &Resource) -> Self {
        Self {
            name: resource.name.clone(),
            aliases: resource.aliases.clone(),
            version: resource.version.clone(),
        }
    }
}

impl TypeState {
    fn versions(&self) -> impl Iterator<Item = (String, String)> {
        let all = self.retained.iter();
        all.map(|(name, version)| (name.to_string(), version.to_string()))
    }

    fn first_request(
        &mut self,
        node: &Node,
        versions: Versions,
        waited: &[String],
    ) -> wire::DeltaDiscoveryRequest {
        let mut request = wire::DeltaDiscoveryRequest {
            node: Some(node.to_wire()),
            type_url: self.subscription.type_url.to_owned(),
            ..Default::default()
        };
        self.unconfirmed.clear();
        match versions {
            Versions::Told => request.initial_resource_versions = self.versions().collect(),
            Versions::Withheld => {
                self.unconfirmed = self.versions().map(|(name, _)| name).collect()
            }
        }
        if self.subscription.mode == Mode::OnDemand {
            // "Subscribe to nothing": an empty list would mean everything.
            request.resource_names_subscribe = vec!["*".to_owned()];
            request.resource_names_unsubscribe = vec!["*".to_owned()];
            self.demanded.extend(waited.iter().cloned());
            for name in &self.demanded {
                let versions = &mut request.initial_resource_versions;
                versions.entry(name.clone()).or_default();
            }
            if versions == Versions::Withheld {
                let names = self.unconfirmed.iter().cloned();
                request.resource_names_subscribe.extend(names);
            }
        }
        request
    }

    fn remember(
        &mut self,
        names: Vec<Names>,
        removed: &[String],
        rejected: &[Rejection],
        taken: &mut Taken,
    ) {
        let bad: BTreeSet<&str> = rejected.iter().map(|r| r.name.as_str()).collect();
        let useless = !names.is_empty() && names.iter().all(|n| bad.contains(&*n.name));
        self.answered |= bad.is_empty() || !(names.is_empty() || useless);
        for resource in names {
            self.unconfirmed.remove(&*resource.name);
            self.demanded.remove(&*resource.name);
            for alias in &resource.aliases {
                self.demanded.remove(alias);
            }
            taken.arrived.push(resource.name.to_string());
            if !bad.contains(&*resource.name) {
                self.retained.insert(resource.name, resource.version.into());
            }
            taken.arrived.extend(resource.aliases);
        }
        let mut forgotten = Vec::new();
        for name in removed {
            self.retained.remove(name.as_str());
            self.unconfirmed.remove(name);
            if self.demanded.remove(name) {
                forgotten.push(name.clone());
            }
            taken.absent.push(name.clone());
        }
        if !forgotten.is_empty() {
            // Else whoever scans addresses makes both sides remember each of them for good.
            taken.replies.push(wire::DeltaDiscoveryRequest {
                type_url: self.subscription.type_url.to_owned(),
                resource_names_unsubscribe: forgotten,
                ..Default::default()
            });
        }
    }
}

fn body(type_url: &'static str, resource: wire::Resource) -> Result<Resource, Rejection> {
    let reason = match resource.resource {
        Some(any) if any.type_url == type_url => {
            return Ok(Resource {
                name: resource.name.into(),
                aliases: resource.aliases,
                version: resource.version,
                body: any.value.into(),
            });
        }
        Some(any) => format!("resource: is a {:?}", any.type_url),
        None => "resource: missing".to_owned(),
    };
    Err(Rejection {
        name: resource.name,
        reason,
    })
}

/// ACK: type and nonce, nothing else. NACK: the reasons too (node-tunnel.md 3.3).
pub(super) fn answer(
    type_url: &str,
    nonce: String,
    rejected: &[Rejection],
) -> wire::DeltaDiscoveryRequest {
    let reasons = rejected.iter().map(|r| format!("{}: {}", r.name, r.reason));
    let message = reasons.collect::<Vec<_>>().join("; ");
    wire::DeltaDiscoveryRequest {
        type_url: type_url.to_owned(),
        response_nonce: nonce,
        error_detail: (!rejected.is_empty()).then(|| Status {
            message,
            ..Default::default()
        }),
        ..Default::default()
    }
}
