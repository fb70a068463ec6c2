//! The routes of one service, compiled: which rule a request or a connection gets.
//!
//! Of the kinds of the Gateway API that are attached to one port, only the most specific takes effect (GRPCRoute,
//! HTTPRoute, TLSRoute, TCPRoute); VirtualServices take effect where there is none. Routes for the callers of one
//! namespace (consumer routes) shadow those for all.
//!
//! A copy shares what a change does not touch, and a route of the Gateway API that comes, goes or changes costs in
//! proportion to itself. Changes of anything else (ports, callers, kinds, VirtualServices) compile the service anew.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, LazyLock},
};

use super::{
    condition::Matched,
    name::ObjectRef,
    request::{ConnectionFacts, RequestFacts},
    route::{Action, Attachment, Backend, Callers, HttpRule, Order, Route, Rules},
    view::View,
};
use crate::names::{NamespacedHostname, Str};

mod connection;
mod index;
mod rank;
mod sorted;
#[cfg(test)]
mod tests;

use connection::{TcpTable, TlsTable};
use index::HttpTable;
use rank::Ranking;
use sorted::Sorted;

/// The kind of Istio's routes, whose three protocols do not shadow each other.
pub const VIRTUAL_SERVICE: &str = "VirtualService";
const GRPC_ROUTE: &str = "GRPCRoute";

/// Which rule a request gets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Selection {
    /// There are no HTTP routes: the request goes to the service's endpoints.
    NoRoutes,
    /// There are routes and none matches: 404, gRPC UNIMPLEMENTED.
    NoMatch,
    /// This one.
    Rule(Selected),
}

/// A rule that a request matched.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Selected {
    /// The route.
    pub route: Arc<Route>,
    /// The position of the rule in it.
    pub rule: usize,
    /// What of the path was matched.
    pub matched: Matched,
}

impl Selected {
    /// The rule.
    pub fn rule(&self) -> &HttpRule {
        let rule = match &self.route.rules {
            Rules::Http { rules, .. } => rules.get(self.rule),
            Rules::Tls(_) | Rules::Tcp(_) => None,
        };
        rule.unwrap_or(&NO_RULE)
    }

    /// The rule's name.
    pub fn name(&self) -> Option<&str> {
        self.rule().name.as_deref()
    }
}

/// What a selection is that no table made: answered 500.
static NO_RULE: LazyLock<HttpRule> =
    LazyLock::new(|| HttpRule::new(Vec::new(), Action::Invalid("there is no such rule".into())));

/// Which rule a connection that is not HTTP gets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ConnectionSelection {
    /// There are no routes for it: it goes to the service's endpoints.
    NoRoutes,
    /// There are routes and none matches: it is closed.
    NoMatch,
    /// This one.
    Rule(ConnectionSelected),
}

/// A rule that a connection matched.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConnectionSelected {
    /// The route.
    pub route: Arc<Route>,
    /// The position of the rule in it.
    pub rule: usize,
}

impl ConnectionSelected {
    /// One is drawn by weight.
    pub fn backends(&self) -> &[(u32, Backend)] {
        let backends = match &self.route.rules {
            Rules::Tls(rules) => rules.get(self.rule).map(|it| &it.backends),
            Rules::Tcp(rules) => rules.get(self.rule).map(|it| &it.backends),
            Rules::Http { .. } => None,
        };
        backends.map(Vec::as_slice).unwrap_or_default()
    }

    /// The rule's name.
    pub fn name(&self) -> Option<&str> {
        let name = match &self.route.rules {
            Rules::Tls(rules) => rules.get(self.rule).map(|it| &it.name),
            Rules::Tcp(rules) => rules.get(self.rule).map(|it| &it.name),
            Rules::Http { .. } => None,
        };
        name?.as_deref()
    }
}

/// The compiled routes of one service.
#[derive(Clone, Debug, Default)]
pub struct ServiceRoutes {
    routes: Sorted<ObjectRef, Arc<Route>>,
    /// Of ports that an attachment names.
    ports: BTreeMap<u16, PortRoutes>,
    /// Of every other port.
    other: PortRoutes,
}

/// A route of a service that comes, goes or changes.
#[derive(Clone, Debug)]
pub(super) struct Move {
    pub(super) old: Option<Arc<Route>>,
    pub(super) new: Option<Arc<Route>>,
}

/// More moves at once than this, and one compilation of all costs less.
const FEW: usize = 16;

#[derive(Clone, Debug, Default)]
struct PortRoutes {
    all: Table,
    by_namespace: BTreeMap<Str, Table>,
}

/// The routes of one port, for one group of callers.
#[derive(Clone, Debug, Default)]
struct Table {
    /// What takes effect; none: there are no routes.
    class: Option<Class>,
    http: Option<HttpTable>,
    tls: Option<TlsTable>,
    tcp: Option<TcpTable>,
}

impl ServiceRoutes {
    /// Whether there are no routes.
    pub(super) fn is_empty(&self) -> bool {
        self.routes.is_empty()
    }

    /// Brings the routes of `service` up to date.
    pub(super) fn apply(&mut self, service: &NamespacedHostname, moves: &[Move]) {
        for Move { old, new } in moves {
            if let Some(route) = new.as_ref().or(old.as_ref()) {
                self.routes.update(route.key.clone(), |_| new.clone());
            }
        }
        let few = moves.len() <= FEW;
        // Where one cannot be done alone all is made anew, those that were done with it.
        if !few || !moves.iter().all(|it| self.replace(service, it)) {
            self.compile(service);
        }
    }

    fn compile(&mut self, service: &NamespacedHostname) {
        let attachments = |route: &'_ Arc<Route>| own(route, service).cloned().collect::<Vec<_>>();
        let routes = self.routes.iter().map(|(_, it)| it);
        let all = routes.map(|it| (attachments(it), Arc::clone(it)));
        let all: Vec<(Vec<Attachment>, Arc<Route>)> = all.collect();
        let named = all.iter().flat_map(|(its, _)| its).filter_map(|it| it.port);
        let named: BTreeSet<u16> = named.collect();
        self.ports = named
            .into_iter()
            .map(|port| (port, PortRoutes::new(Some(port), &all)))
            .collect();
        self.other = PortRoutes::new(None, &all);
    }

    /// Answers whether it could be done without looking at the other routes.
    fn replace(&mut self, service: &NamespacedHostname, Move { old, new }: &Move) -> bool {
        let of = |route: &Option<Arc<Route>>| {
            let own = route.iter().flat_map(|it| own(it, service));
            own.cloned().collect::<BTreeSet<_>>()
        };
        let (before, after) = (of(old), of(new));
        let plain = |it: &Attachment| it.port.is_none() && it.callers == Callers::All;
        let same_places = match (old, new) {
            (Some(_), Some(_)) => before == after,
            // The first or the last of a port or a namespace adds or takes a table.
            _ => before.iter().chain(&after).all(plain),
        };
        let attachments = if after.is_empty() { before } else { after };
        let replace = |port: Option<u16>, routes: &mut PortRoutes| {
            routes.replace(port, &attachments, old.as_ref(), new.as_ref())
        };
        let mut ports = self.ports.iter_mut();
        same_places
            && ports.all(|(port, routes)| replace(Some(*port), routes))
            && replace(None, &mut self.other)
    }

    fn table(&self, port: u16, namespace: Option<&str>) -> &Table {
        let port = self.ports.get(&port).unwrap_or(&self.other);
        namespace
            .and_then(|it| port.by_namespace.get(it))
            .unwrap_or(&port.all)
    }
}

/// What of a route is attached to a service.
pub(super) fn own<'a>(
    route: &'a Route,
    service: &'a NamespacedHostname,
) -> impl Iterator<Item = &'a Attachment> {
    route
        .attachments
        .iter()
        .filter(move |it| it.service == *service)
}

/// Whether an attachment is of a port's table of some callers.
fn fits(it: &Attachment, port: Option<u16>, callers: &Callers) -> bool {
    it.callers == *callers && (it.port.is_none() || it.port == port)
}

impl PortRoutes {
    fn new(port: Option<u16>, routes: &[(Vec<Attachment>, Arc<Route>)]) -> Self {
        let of = |callers: &Callers| {
            let fits = |it: &Attachment| fits(it, port, callers);
            let chosen = routes.iter().filter(|(its, _)| its.iter().any(fits));
            chosen.map(|(_, it)| it).collect::<Vec<_>>()
        };
        let attachments = routes.iter().flat_map(|(its, _)| its);
        let namespaces: BTreeSet<&Callers> = attachments.map(|it| &it.callers).collect();
        let mut by_namespace = BTreeMap::new();
        for callers in namespaces {
            let chosen = of(callers);
            if let Callers::Namespace(it) = callers
                && !chosen.is_empty()
            {
                by_namespace.insert(it.clone(), Table::new(&chosen));
            }
        }
        Self {
            all: Table::new(&of(&Callers::All)),
            by_namespace,
        }
    }

    /// Answers whether it could be done.
    fn replace(
        &mut self,
        port: Option<u16>,
        attachments: &BTreeSet<Attachment>,
        old: Option<&Arc<Route>>,
        new: Option<&Arc<Route>>,
    ) -> bool {
        let concerns = |callers: &Callers| attachments.iter().any(|it| fits(it, port, callers));
        let mut namespaces = self.by_namespace.iter_mut();
        let done = namespaces.all(|(namespace, table)| {
            !concerns(&Callers::Namespace(namespace.clone())) || table.replace(old, new)
        });
        done && (!concerns(&Callers::All) || self.all.replace(old, new))
    }
}

/// What a route takes effect with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Class {
    Grpc,
    Http,
    Tls,
    Tcp,
    Istio,
}

fn class(route: &Route) -> Class {
    match &route.rules {
        _ if *route.key.kind == *VIRTUAL_SERVICE => Class::Istio,
        Rules::Http {
            order: Order::Written,
            ..
        } => Class::Istio,
        Rules::Http { .. } if *route.key.kind == *GRPC_ROUTE => Class::Grpc,
        Rules::Http { .. } => Class::Http,
        Rules::Tls(_) => Class::Tls,
        Rules::Tcp(_) => Class::Tcp,
    }
}

impl Table {
    fn new(routes: &[&Arc<Route>]) -> Self {
        let Some(best) = routes.iter().map(|it| class(it)).min() else {
            return Self::default();
        };
        let of = |wanted: fn(&Rules) -> bool| {
            let chosen = routes
                .iter()
                .filter(|it| class(it) == best && wanted(&it.rules));
            chosen.map(|it| Arc::clone(it)).collect::<Vec<_>>()
        };
        let http = of(|it| matches!(it, Rules::Http { .. }));
        let tls = of(|it| matches!(it, Rules::Tls(_)));
        let tcp = of(|it| matches!(it, Rules::Tcp(_)));
        let ranking = match (best, http.len()) {
            (Class::Istio, ..=1) => Ranking::Written,
            (Class::Istio, _) => Ranking::Merged,
            _ => Ranking::Precedence,
        };
        Self {
            class: Some(best),
            http: (!http.is_empty()).then(|| HttpTable::new(&http, ranking)),
            tls: (!tls.is_empty()).then(|| TlsTable::new(tls)),
            tcp: (!tcp.is_empty()).then(|| TcpTable::new(tcp)),
        }
    }

    /// Takes a route out, and another in. Answers whether it could be done without looking at the others.
    fn replace(&mut self, old: Option<&Arc<Route>>, new: Option<&Arc<Route>>) -> bool {
        let (Some(best @ (Class::Grpc | Class::Http)), Some(table)) = (self.class, &mut self.http)
        else {
            return false;
        };
        if old.into_iter().chain(new).any(|it| class(it) < best) {
            return false;
        }
        // What is of a class that something else shadows changes nothing.
        let effective = |it: &&Arc<Route>| class(it) == best;
        table.replace(old.filter(effective), new.filter(effective));
        // After the last of a class another takes effect.
        !table.is_empty()
    }

    /// Only TCPRoutes: what would be HTTP is not looked into.
    fn is_opaque(&self) -> bool {
        self.class == Some(Class::Tcp)
    }
}

impl View {
    /// Which rule a request gets. Pure: same view and facts, same rule.
    pub fn select(&self, facts: &RequestFacts<'_>) -> Selection {
        match self
            .table(&facts.connection)
            .and_then(|it| it.http.as_ref())
        {
            Some(table) => table
                .select(facts)
                .map_or(Selection::NoMatch, Selection::Rule),
            None => Selection::NoRoutes,
        }
    }

    /// Whether any rule that a request on this connection may get looks at claims: then it is selected again once
    /// tokens are verified.
    pub fn routes_ask_claims(&self, facts: &ConnectionFacts<'_>) -> bool {
        let table = self.table(facts).and_then(|it| it.http.as_ref());
        table.is_some_and(HttpTable::asks_claims)
    }

    /// Which rule a TLS connection gets by its SNI. VirtualServices without a fitting `tls` rule are asked for `tcp`
    /// ones.
    pub fn select_tls(&self, facts: &ConnectionFacts<'_>) -> ConnectionSelection {
        let table = self.table(facts);
        let Some(tls) = table.and_then(|it| it.tls.as_ref()) else {
            return self.select_tcp(facts);
        };
        match (tls.select(facts), self.select_tcp(facts)) {
            (Some(selected), _) => ConnectionSelection::Rule(selected),
            (None, ConnectionSelection::Rule(selected)) => ConnectionSelection::Rule(selected),
            (None, _) => ConnectionSelection::NoMatch,
        }
    }

    /// Which rule any other connection gets.
    pub fn select_tcp(&self, facts: &ConnectionFacts<'_>) -> ConnectionSelection {
        match self.table(facts).and_then(|it| it.tcp.as_ref()) {
            Some(table) => table
                .select(facts)
                .map_or(ConnectionSelection::NoMatch, ConnectionSelection::Rule),
            None => ConnectionSelection::NoRoutes,
        }
    }

    /// Whether connections to this port are TCP whatever they hold: a TCPRoute alone takes effect.
    pub fn treats_as_tcp(&self, facts: &ConnectionFacts<'_>) -> bool {
        self.table(facts).is_some_and(Table::is_opaque)
    }

    fn table(&self, facts: &ConnectionFacts<'_>) -> Option<&Table> {
        let routes = self.routes_of(facts.service?)?;
        Some(routes.table(facts.port, facts.namespace()))
    }
}
