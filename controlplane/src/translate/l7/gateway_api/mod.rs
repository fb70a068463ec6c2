//! Routes and policies of the Gateway API (GAMMA: attached to services) to the L7 model.
//!
//! One mistake costs one rule: a rule that cannot be kept answers 500, a backend that is not there its share, and the
//! status says which and why. What a broken condition would have asked for is left out of its match, so that a rule that
//! cannot be kept answers for more requests and not for fewer.

use std::collections::BTreeMap;

use mesh::{
    l7::{
        config::ExternalAuthorizer,
        name::ObjectRef,
        route::{Backend, Rules},
    },
    names::{NamespacedHostname, Str},
};

use crate::{
    crd::gateway_api::{BackendObjectRef, HttpBackendRef, ParentRef},
    object::{GrpcRoute, HttpRoute, Kind, Meta, Object, Sourced, TcpRoute, TlsRoute},
    translate::l7::rate_limit,
};

pub mod attach;
pub mod backend_tls;
mod filter;
mod grpc;
mod http;
mod matching;
pub mod session;
pub mod status;
mod stream;
mod time;

pub use time::duration;

/// A route of any kind.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs, reason = "the kinds")]
pub enum RouteObject {
    Grpc(GrpcRoute),
    Http(HttpRoute),
    Tls(TlsRoute),
    Tcp(TcpRoute),
}

/// Why a rule cannot be kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// The field: `spec.rules[0].filters[1]`.
    pub path: String,
    /// What is wrong with it.
    pub message: String,
    /// Of conditions.
    pub reason: &'static str,
}

/// A reference that leads nowhere.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unresolved {
    /// Of the condition `ResolvedRefs`.
    pub reason: &'static str,
    /// Why.
    pub message: String,
}

/// A reference that was looked up.
pub type Resolved = Result<(NamespacedHostname, u16), Unresolved>;

/// Looks up what a route refers to.
pub type Resolver<'a> = &'a dyn Fn(&BackendObjectRef) -> Resolved;

/// What a route's rules come to.
#[derive(Clone, Debug, PartialEq)]
pub struct Translated {
    /// As many as in the object.
    pub rules: Rules,
    /// What cannot be kept, by rule.
    pub problems: BTreeMap<usize, Vec<Problem>>,
    /// References that lead nowhere.
    pub unresolved: Vec<Unresolved>,
    /// External authorizers that its rules name.
    pub authorizers: BTreeMap<Str, ExternalAuthorizer>,
}

/// What is noted while rules are read.
struct Notes<'a> {
    route: &'a ObjectRef,
    resolver: Resolver<'a>,
    problems: BTreeMap<usize, Vec<Problem>>,
    unresolved: Vec<Unresolved>,
    authorizers: BTreeMap<Str, ExternalAuthorizer>,
}

impl<'a> Notes<'a> {
    fn new(route: &'a ObjectRef, resolver: Resolver<'a>) -> Self {
        Self {
            route,
            resolver,
            problems: BTreeMap::new(),
            unresolved: Vec::new(),
            authorizers: BTreeMap::new(),
        }
    }

    fn with(self, rules: Rules) -> Translated {
        Translated {
            rules,
            problems: self.problems,
            unresolved: self.unresolved,
            authorizers: self.authorizers,
        }
    }

    /// Notes what is wrong with a field of a rule.
    fn wrong(&mut self, rule: usize, field: &str, message: impl Into<String>) {
        self.wrong_with(rule, field, "UnsupportedValue", message);
    }

    fn wrong_with(
        &mut self,
        rule: usize,
        field: &str,
        reason: &'static str,
        message: impl Into<String>,
    ) {
        let dot = if field.is_empty() { "" } else { "." };
        self.problems.entry(rule).or_default().push(Problem {
            path: format!("spec.rules[{rule}]{dot}{field}"),
            message: message.into(),
            reason,
        });
    }

    /// The reason why a rule is answered 500, if it is.
    fn invalid(&self, rule: usize) -> Option<Str> {
        let problem = self.problems.get(&rule)?.first()?;
        Some(format!("{}: {}", problem.path, problem.message).into())
    }

    fn resolve(&mut self, reference: &BackendObjectRef) -> Resolved {
        let resolved = (self.resolver)(reference);
        if let Err(unresolved) = &resolved {
            self.unresolved.push(unresolved.clone());
        }
        resolved
    }

    fn backend(&mut self, reference: &BackendObjectRef) -> Backend {
        match self.resolve(reference) {
            Ok((service, port)) => Backend::Service {
                service,
                port,
                subset: None,
            },
            Err(unresolved) => Backend::Invalid(unresolved.message.into()),
        }
    }

    /// The weight of a backend; 1 when absent.
    fn weight(&mut self, rule: usize, index: usize, backend: &HttpBackendRef) -> u32 {
        let weight = backend.weight.unwrap_or(1);
        u32::try_from(weight).unwrap_or_else(|_| {
            let field = format!("backendRefs[{index}].weight");
            self.wrong(rule, &field, format!("{weight} is less than 0"));
            0
        })
    }
}

impl RouteObject {
    /// The route that an object is.
    pub fn of(object: Object) -> Option<Self> {
        match object {
            Object::GrpcRoute(route) => Some(Self::Grpc(route)),
            Object::HttpRoute(route) => Some(Self::Http(route)),
            Object::TcpRoute(route) => Some(Self::Tcp(route)),
            Object::TlsRoute(route) => Some(Self::Tls(route)),
            _ => None,
        }
    }

    /// As an object.
    pub fn into_object(self) -> Object {
        match self {
            Self::Grpc(route) => Object::GrpcRoute(route),
            Self::Http(route) => Object::HttpRoute(route),
            Self::Tcp(route) => Object::TcpRoute(route),
            Self::Tls(route) => Object::TlsRoute(route),
        }
    }

    /// Its kind.
    pub fn kind(&self) -> Kind {
        match self {
            Self::Grpc(_) => Kind::GrpcRoute,
            Self::Http(_) => Kind::HttpRoute,
            Self::Tls(_) => Kind::TlsRoute,
            Self::Tcp(_) => Kind::TcpRoute,
        }
    }

    /// Its names and labels.
    pub fn meta(&self) -> &Meta {
        match self {
            Self::Grpc(route) => &route.meta,
            Self::Http(route) => &route.meta,
            Self::Tls(route) => &route.meta,
            Self::Tcp(route) => &route.meta,
        }
    }

    /// What it is attached to.
    pub fn parents(&self) -> &[ParentRef] {
        match self {
            Self::Grpc(route) => &route.spec.parent_refs,
            Self::Http(route) => &route.spec.parent_refs,
            Self::Tls(route) => &route.spec.parent_refs,
            Self::Tcp(route) => &route.spec.parent_refs,
        }
    }

    /// Its key in the model.
    pub fn key(&self) -> ObjectRef {
        let name = &self.meta().name;
        ObjectRef {
            kind: self.kind().as_str().into(),
            namespace: name.namespace.clone(),
            name: name.name.clone(),
        }
    }

    fn rule_count(&self) -> usize {
        match self {
            Self::Grpc(route) => route.spec.rules.len(),
            Self::Http(route) => route.spec.rules.len(),
            Self::Tls(route) => route.spec.rules.len(),
            Self::Tcp(route) => route.spec.rules.len(),
        }
    }
}

/// What the rules of a route come to.
pub fn translate(route: &Sourced<RouteObject>, resolver: Resolver<'_>) -> Translated {
    let key = route.object.key();
    let mut notes = Notes::new(&key, resolver);
    misread(route, &mut notes);
    let limit = rate_limit::of(route.object.meta());
    if let Err(problem) = &limit {
        unlimited(&route.object, problem, &mut notes);
    }
    let mut rules = match &route.object {
        RouteObject::Http(http) => http::rules(&http.spec, &mut notes),
        RouteObject::Grpc(grpc) => grpc::rules(&grpc.spec, &mut notes),
        RouteObject::Tls(tls) => stream::tls(&tls.spec, &mut notes),
        RouteObject::Tcp(tcp) => stream::tcp(&tcp.spec, &mut notes),
    };
    rate_limit::apply(&mut rules, &limit);
    notes.with(rules)
}

/// Notes a limit that cannot be kept.
fn unlimited(route: &RouteObject, problem: &str, notes: &mut Notes<'_>) {
    for rule in 0..route.rule_count() {
        notes.problems.entry(rule).or_default().push(Problem {
            path: rate_limit::path(),
            message: problem.to_owned(),
            reason: "UnsupportedValue",
        });
    }
}

/// Everything that is wrong with a route's rules, whatever its references come to.
pub fn problems(object: RouteObject) -> Vec<Problem> {
    let key = NamespacedHostname {
        namespace: "".into(),
        hostname: "".into(),
    };
    let resolver = |_: &BackendObjectRef| Ok((key.clone(), 1));
    let route = Sourced {
        object,
        faults: Vec::new(),
    };
    let translated = translate(&route, &resolver);
    translated.problems.into_values().flatten().collect()
}

/// Fields that could not be read spoil their rule; those outside of rules spoil all.
fn misread(route: &Sourced<RouteObject>, notes: &mut Notes<'_>) {
    for fault in &route.faults {
        // From a folder, file and object stand before it.
        let (path, message) = match fault.find("spec.").map(|start| &fault[start..]) {
            Some(fault) => fault.split_once(": ").unwrap_or((fault, "cannot be read")),
            None => ("spec", fault.as_str()),
        };
        let rules = match rule_of(path) {
            Some(rule) => rule..rule + 1,
            None => 0..route.object.rule_count(),
        };
        for rule in rules {
            notes.problems.entry(rule).or_default().push(Problem {
                path: path.to_owned(),
                message: message.to_owned(),
                reason: "UnsupportedValue",
            });
        }
    }
}

/// The rule that a path is in: `spec.rules[3].filters`.
fn rule_of(path: &str) -> Option<usize> {
    let rest = path.strip_prefix("spec.rules[")?;
    rest.split_once(']')?.0.parse().ok()
}

#[cfg(test)]
mod tests;
