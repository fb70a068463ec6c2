//! The labels of a request's metrics: Istio's names, in Istio's order (waypoint 2.13).

use std::{borrow::Cow, sync::Arc};

use mesh::{
    flow::{PartyLabels, Security, ServiceName},
    l7::{record::RequestRecord, response_flags::Flags},
    names::Str,
};

const UNKNOWN: &str = "unknown";

/// What tells series of request metrics apart. Made, hashed and compared without building text.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Labels {
    source: Arc<PartyLabels>,
    destination: Arc<PartyLabels>,
    service: Option<ServiceName>,
    grpc: bool,
    status: u16,
    grpc_status: Option<u32>,
    flags: Flags,
    security: Security,
    /// Labels that a Telemetry has changed: none takes one away.
    changed: Arc<[(Str, Option<Str>)]>,
}

impl Labels {
    pub(crate) fn new(record: &RequestRecord, changed: Arc<[(Str, Option<Str>)]>) -> Self {
        Self {
            source: Arc::clone(&record.source.labels),
            destination: Arc::clone(&record.destination.labels),
            service: record.service.clone(),
            grpc: record.grpc,
            status: record.status.unwrap_or(0),
            grpc_status: record.grpc_status.filter(|_| record.grpc),
            flags: record.flags,
            security: record.security,
            changed,
        }
    }

    pub(crate) fn is_grpc(&self) -> bool {
        self.grpc
    }

    /// Name and value of each label.
    pub(crate) fn pairs(&self) -> Vec<(Cow<'_, str>, Cow<'_, str>)> {
        let own = self.own().into_iter();
        let own = own.map(|(name, value)| (Cow::Borrowed(name), value));
        if self.changed.is_empty() {
            return own.collect();
        }
        let change = |name: &str| self.changed.iter().find(|(changed, _)| &**changed == name);
        let mut pairs: Vec<_> = own
            .filter_map(|(name, value)| match change(&name) {
                None => Some((name, value)),
                Some((_, None)) => None,
                Some((_, Some(value))) => Some((name, Cow::Borrowed(&**value))),
            })
            .collect();
        for (name, value) in self.changed.iter() {
            let there = pairs.iter().any(|(own, _)| **own == **name);
            if let (false, Some(value)) = (there, value) {
                pairs.push((Cow::Borrowed(name), Cow::Borrowed(value)));
            }
        }
        pairs
    }

    fn own(&self) -> Vec<(&'static str, Cow<'_, str>)> {
        let (from, to, service) = (&*self.source, &*self.destination, self.service.as_ref());
        let part = |part: fn(&ServiceName) -> &Str| known(service.map(part));
        let mut pairs = vec![("reporter", Cow::Borrowed("waypoint"))];
        let mut push = |name: &'static str, value| pairs.push((name, value));
        push("source_workload", known(from.workload.as_ref()));
        push(
            "source_canonical_service",
            known(from.canonical_service.as_ref()),
        );
        push(
            "source_canonical_revision",
            known(from.canonical_revision.as_ref()),
        );
        push("source_workload_namespace", known(from.namespace.as_ref()));
        push("source_principal", known(from.principal.as_ref()));
        push("source_app", known(from.canonical_service.as_ref()));
        push("source_version", known(from.canonical_revision.as_ref()));
        push("source_cluster", known(from.cluster.as_ref()));
        push("destination_workload", known(to.workload.as_ref()));
        push(
            "destination_workload_namespace",
            known(to.namespace.as_ref()),
        );
        push("destination_principal", known(to.principal.as_ref()));
        push("destination_app", known(to.canonical_service.as_ref()));
        push("destination_version", known(to.canonical_revision.as_ref()));
        push("destination_service", part(|it| &it.hostname));
        push("destination_service_name", part(|it| &it.name));
        push("destination_service_namespace", part(|it| &it.namespace));
        push(
            "destination_canonical_service",
            known(to.canonical_service.as_ref()),
        );
        push(
            "destination_canonical_revision",
            known(to.canonical_revision.as_ref()),
        );
        push("destination_cluster", known(to.cluster.as_ref()));
        let protocol = if self.grpc { "grpc" } else { "http" };
        push("request_protocol", Cow::Borrowed(protocol));
        push("response_code", Cow::Owned(self.status.to_string()));
        if let Some(status) = self.grpc_status {
            push("grpc_response_status", Cow::Owned(status.to_string()));
        }
        push("response_flags", Cow::Owned(self.flags.to_string()));
        let security = Cow::Borrowed(self.security.as_str());
        push("connection_security_policy", security);
        pairs
    }
}

fn known(text: Option<&Str>) -> Cow<'_, str> {
    Cow::Borrowed(text.map_or(UNKNOWN, |it| it))
}
