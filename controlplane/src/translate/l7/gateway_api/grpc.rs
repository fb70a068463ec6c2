//! GRPCRoute.

use mesh::l7::route::{Order, Rules};

use super::{Notes, filter, http, matching};
use crate::crd::gateway_api::{GrpcRouteSpec, HttpBackendRef, HttpRouteFilter};

pub(super) fn rules(spec: &GrpcRouteSpec, notes: &mut Notes<'_>) -> Rules {
    let mut rules = Vec::new();
    for (index, wanted) in spec.rules.iter().enumerate() {
        let filters: Vec<HttpRouteFilter> =
            wanted.filters.iter().map(HttpRouteFilter::from).collect();
        let backends: Vec<HttpBackendRef> = wanted
            .backend_refs
            .iter()
            .map(HttpBackendRef::from)
            .collect();
        let matches = matching::grpc(index, &wanted.matches, notes);
        let filters = filter::of_rule(index, &filters, &[], notes);
        let session = wanted.session_persistence.as_ref();
        let mut rule = http::rule(index, &backends, filters, session, notes);
        rule.name = wanted.name.as_deref().map(Into::into);
        rule.matches = matches;
        rules.push(http::closed(index, rule, notes));
    }
    Rules::Http {
        order: Order::Precedence,
        rules,
    }
}
