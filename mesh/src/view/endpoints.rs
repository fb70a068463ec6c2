//! The endpoints of one service, kept so that a choice and a change are not O(endpoints): grouped by health and
//! place, ordered by node within a group, in chunks that know their weight.

use std::sync::Arc;

use litemap::LiteMap;

use crate::{
    names::{NamespacedHostname, Str, WorkloadUid},
    workload::{Health, Locality, PortMap, Workload},
};

/// One workload serving one service.
#[derive(Clone, Debug)]
pub struct Endpoint {
    /// The workload.
    pub workload: Arc<Workload>,
    service: Arc<NamespacedHostname>,
}

impl Endpoint {
    /// The ports that the workload maps for the service; may be empty.
    pub fn ports(&self) -> &PortMap {
        static NONE: PortMap = PortMap::new();
        self.workload.services.get(&*self.service).unwrap_or(&NONE)
    }

    fn order(&self) -> (&Str, &WorkloadUid) {
        (&self.workload.node, &self.workload.uid)
    }
}

/// What the endpoints of a group share.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Place {
    pub(crate) unhealthy: bool,
    pub(crate) network: Str,
    pub(crate) cluster: Str,
    pub(crate) locality: Arc<Locality>,
}

impl From<&Workload> for Place {
    fn from(workload: &Workload) -> Self {
        Self {
            unhealthy: workload.status == Health::Unhealthy,
            network: workload.network.clone(),
            cluster: workload.cluster_id.clone(),
            locality: workload.locality.clone(),
        }
    }
}

/// A run of endpoints of one group, with the sum of their weights.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Run<'a> {
    pub(crate) endpoints: &'a [Endpoint],
    pub(crate) weight: u64,
}

impl<'a> Run<'a> {
    fn of(endpoints: &'a [Endpoint]) -> Self {
        Self {
            endpoints,
            weight: weight(endpoints),
        }
    }
}

fn weight(endpoints: &[Endpoint]) -> u64 {
    let weights = endpoints.iter().map(|it| u64::from(it.workload.capacity));
    weights.sum()
}

/// The endpoints of one service, healthy or not: the health policy is applied when one is chosen, so that a change
/// of it needs nothing to be sent again.
#[derive(Clone, Debug, Default)]
pub struct Endpoints {
    groups: LiteMap<Place, Vec<Arc<Chunk>>>,
    len: usize,
    /// One for all of them.
    service: Option<Arc<NamespacedHostname>>,
}

#[derive(Clone, Debug, Default)]
struct Chunk {
    endpoints: Vec<Endpoint>,
    weight: u64,
}

/// Bounds both what a choice scans and what a change copies.
const CHUNK: usize = 128;

impl Endpoints {
    /// How many there are, unhealthy ones included.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// All of them, in no order that means anything.
    pub fn iter(&self) -> impl Iterator<Item = &Endpoint> {
        let chunks = self.groups.values().flatten();
        chunks.flat_map(|chunk| &chunk.endpoints)
    }

    pub(crate) fn groups(&self) -> impl Iterator<Item = (&Place, Group<'_>)> {
        self.groups
            .iter()
            .map(|(place, chunks)| (place, Group(chunks)))
    }

    pub(crate) fn insert(&mut self, service: &NamespacedHostname, workload: Arc<Workload>) {
        let service = self
            .service
            .get_or_insert_with(|| Arc::new(service.clone()));
        let service = Arc::clone(service);
        if self.groups.is_empty() {
            // Most services have one group, and a vector that grows by itself starts with room for four.
            self.groups = LiteMap::with_capacity(1);
        }
        let chunks = self.groups.entry(Place::from(&*workload)).or_default();
        let endpoint = Endpoint { workload, service };
        if chunks.is_empty() {
            chunks.reserve_exact(1);
            chunks.push(Arc::default());
        }
        let at = home(chunks, endpoint.order());
        let chunk = Arc::make_mut(&mut chunks[at]);
        if chunk.insert(endpoint) {
            self.len += 1;
        }
        if chunk.endpoints.len() > CHUNK {
            let upper = chunk.split();
            chunks.insert(at + 1, Arc::new(upper));
        }
    }

    /// Takes out the endpoint that `workload`, as it was inserted, makes.
    pub(crate) fn remove(&mut self, workload: &Workload) {
        let place = Place::from(workload);
        let Some(chunks) = self.groups.get_mut(&place) else {
            return;
        };
        let at = home(chunks, (&workload.node, &workload.uid));
        let chunk = Arc::make_mut(&mut chunks[at]);
        if chunk.remove((&workload.node, &workload.uid)) {
            self.len -= 1;
        }
        if chunk.endpoints.is_empty() {
            chunks.remove(at);
        }
        if chunks.is_empty() {
            self.groups.remove(&place);
        }
    }
}

/// The chunk whose range holds `order`: the last that does not start behind it.
fn home(chunks: &[Arc<Chunk>], order: (&Str, &WorkloadUid)) -> usize {
    let starts_before = |chunk: &Arc<Chunk>| {
        let first = chunk.endpoints.first();
        first.is_none_or(|first| first.order() <= order)
    };
    chunks.partition_point(starts_before).saturating_sub(1)
}

impl Chunk {
    /// Whether it is a new one.
    fn insert(&mut self, endpoint: Endpoint) -> bool {
        let found = self.find(endpoint.order());
        match found {
            Ok(at) => self.endpoints[at] = endpoint,
            Err(at) => self.endpoints.insert(at, endpoint),
        }
        self.weight = weight(&self.endpoints);
        found.is_err()
    }

    fn remove(&mut self, order: (&Str, &WorkloadUid)) -> bool {
        let found = self.find(order);
        if let Ok(at) = found {
            self.endpoints.remove(at);
            self.weight = weight(&self.endpoints);
        }
        found.is_ok()
    }

    fn find(&self, order: (&Str, &WorkloadUid)) -> Result<usize, usize> {
        self.endpoints.binary_search_by(|it| it.order().cmp(&order))
    }

    fn split(&mut self) -> Self {
        let endpoints = self.endpoints.split_off(self.endpoints.len() / 2);
        self.weight = weight(&self.endpoints);
        Self {
            weight: weight(&endpoints),
            endpoints,
        }
    }
}

/// The endpoints of one place.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Group<'a>(&'a [Arc<Chunk>]);

impl<'a> Group<'a> {
    pub(crate) fn all(self) -> impl Iterator<Item = Run<'a>> {
        self.0.iter().map(|chunk| Run {
            endpoints: &chunk.endpoints,
            weight: chunk.weight,
        })
    }

    /// The runs on `node` and the runs elsewhere.
    pub(crate) fn by_node(self, node: &str) -> (Vec<Run<'a>>, Vec<Run<'a>>) {
        let (mut here, mut elsewhere) = (Vec::new(), Vec::new());
        for chunk in self.0 {
            let all: &[Endpoint] = &chunk.endpoints;
            let start = all.partition_point(|it| *it.workload.node < *node);
            let end = all.partition_point(|it| *it.workload.node <= *node);
            if start < end {
                here.push(Run::of(&all[start..end]));
                elsewhere.extend([Run::of(&all[..start]), Run::of(&all[end..])]);
            } else {
                elsewhere.push(Run {
                    endpoints: all,
                    weight: chunk.weight,
                });
            }
        }
        elsewhere.retain(|run| !run.endpoints.is_empty());
        (here, elsewhere)
    }
}
