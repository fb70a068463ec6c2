//! The routes of one service, compiled: which rule a request or a connection gets.
//!
//! Of the kinds of the Gateway API that are attached to one port, only the most specific takes effect (GRPCRoute,
//! HTTPRoute, TLSRoute, TCPRoute); VirtualServices take effect where there is none. Routes for the callers of one
//! namespace (consumer routes) shadow those for all.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, LazyLock},
};

use super::{
    condition::Matched,
    request::{ConnectionFacts, RequestFacts},
    route::{Action, Attachment, Backend, Callers, HttpRule, Order, Route, Rules},
    view::View,
};
use crate::names::{NamespacedHostname, Str};

mod connection;
mod index;
mod rank;
#[cfg(test)]
mod tests;

use connection::{TcpTable, TlsTable};
use index::HttpTable;

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
#[derive(Debug)]
pub struct ServiceRoutes {
    /// Of ports that an attachment names.
    ports: BTreeMap<u16, PortRoutes>,
    /// Of every other port.
    other: PortRoutes,
}

#[derive(Debug)]
struct PortRoutes {
    all: Table,
    by_namespace: BTreeMap<Str, Table>,
}

/// The routes of one port, for one group of callers.
#[derive(Debug, Default)]
struct Table {
    http: Option<HttpTable>,
    tls: Option<TlsTable>,
    tcp: Option<TcpTable>,
    /// Only TCPRoutes: what would be HTTP is not looked into.
    opaque: bool,
}

impl ServiceRoutes {
    pub(super) fn new(service: &NamespacedHostname, routes: &[&Arc<Route>]) -> Self {
        let attachments = |route: &'_ Arc<Route>| own(route, service).cloned().collect::<Vec<_>>();
        let all = routes.iter().map(|it| (attachments(it), Arc::clone(it)));
        let all: Vec<(Vec<Attachment>, Arc<Route>)> = all.collect();
        let named = all.iter().flat_map(|(its, _)| its).filter_map(|it| it.port);
        let named: BTreeSet<u16> = named.collect();
        Self {
            ports: named
                .into_iter()
                .map(|port| (port, PortRoutes::new(Some(port), &all)))
                .collect(),
            other: PortRoutes::new(None, &all),
        }
    }

    fn table(&self, port: u16, namespace: Option<&str>) -> &Table {
        let port = self.ports.get(&port).unwrap_or(&self.other);
        namespace
            .and_then(|it| port.by_namespace.get(it))
            .unwrap_or(&port.all)
    }
}

fn own<'a>(
    route: &'a Route,
    service: &'a NamespacedHostname,
) -> impl Iterator<Item = &'a Attachment> {
    route
        .attachments
        .iter()
        .filter(move |it| it.service == *service)
}

impl PortRoutes {
    fn new(port: Option<u16>, routes: &[(Vec<Attachment>, Arc<Route>)]) -> Self {
        let of = |callers: &Callers| {
            let fits =
                |it: &Attachment| it.callers == *callers && (it.port.is_none() || it.port == port);
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
}

/// What a route takes effect with.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
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
        Self {
            http: (!http.is_empty()).then(|| HttpTable::new(http)),
            tls: (!tls.is_empty()).then(|| TlsTable::new(tls)),
            tcp: (!tcp.is_empty()).then(|| TcpTable::new(tcp)),
            opaque: best == Class::Tcp,
        }
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
        self.table(facts).is_some_and(|it| it.opaque)
    }

    fn table(&self, facts: &ConnectionFacts<'_>) -> Option<&Table> {
        let routes = self.routes_of(facts.service?)?;
        Some(routes.table(facts.port, facts.namespace()))
    }
}
