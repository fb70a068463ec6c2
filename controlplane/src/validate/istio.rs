//! The Istio API at L7: what translation finds wrong with it.

use super::{Findings, selection};
use crate::{
    crd::istio::{
        DestinationRuleSpec, RequestAuthenticationSpec, TelemetrySpec, VirtualServiceSpec,
    },
    translate::l7::istio::{
        destination_rule as rule, request_authentication as authentication, telemetry as told,
        virtual_service as routes,
    },
};

pub(super) fn destination_rule(spec: &DestinationRuleSpec, found: &mut Findings) {
    let around = rule::Around {
        base: &rule::Defaults::default(),
        credentials: &rule::unread,
    };
    rule::read(spec, around, found);
}

pub(super) fn request_authentication(spec: &RequestAuthenticationSpec, found: &mut Findings) {
    selection(
        spec.selector.as_ref(),
        spec.target_ref.as_ref(),
        &spec.target_refs,
        found,
    );
    authentication::rules(spec, found);
}

pub(super) fn telemetry(spec: &TelemetrySpec, found: &mut Findings) {
    selection(
        spec.selector.as_ref(),
        spec.target_ref.as_ref(),
        &spec.target_refs,
        found,
    );
    told::check(spec, found);
}

pub(super) fn virtual_service(spec: &VirtualServiceSpec, found: &mut Findings) {
    routes::check(spec, found);
}
