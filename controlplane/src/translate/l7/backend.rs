//! How a service's endpoints are reached: one policy per service, of what the Istio API and the Gateway API say.

use std::collections::BTreeMap;

use mesh::{
    l7::{
        backend::{BackendPolicy, BackendTls, RetryBudget, TrafficPolicy},
        name::ObjectRef,
        route::SessionPersistence,
    },
    names::NamespacedHostname,
};

/// What the Gateway API's policies say of a service.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Overlay {
    /// The objects it came from.
    pub sources: Vec<ObjectRef>,
    /// For ports without an own entry.
    pub tls: Option<BackendTls>,
    /// By service port.
    pub tls_of_ports: BTreeMap<u16, BackendTls>,
    /// Retries.
    pub retry_budget: Option<RetryBudget>,
    /// Sessions.
    pub session: Option<SessionPersistence>,
}

/// Lays the Gateway API's policies over the Istio API's, block by block: where both speak of the same, the Gateway API's
/// counts. `None`: nobody says anything.
pub fn merge(
    service: &NamespacedHostname,
    istio: Option<&BackendPolicy>,
    overlay: Option<&Overlay>,
) -> Option<BackendPolicy> {
    let Some(overlay) = overlay else {
        return istio.cloned();
    };
    let mut policy = istio.cloned().unwrap_or_else(|| BackendPolicy {
        service: service.clone(),
        sources: Vec::new(),
        policy: TrafficPolicy::default(),
        ports: BTreeMap::new(),
        subsets: BTreeMap::new(),
    });
    policy.sources.splice(0..0, overlay.sources.iter().cloned());
    overlay.over(&mut policy.policy, &mut policy.ports);
    for subset in policy.subsets.values_mut() {
        if let Some(own) = &mut subset.policy {
            overlay.over(own, &mut subset.ports);
        }
    }
    Some(policy)
}

impl Overlay {
    fn over(&self, whole: &mut TrafficPolicy, ports: &mut BTreeMap<u16, TrafficPolicy>) {
        for policy in std::iter::once(&mut *whole).chain(ports.values_mut()) {
            if let Some(tls) = &self.tls {
                policy.tls = Some(tls.clone());
            }
            policy.retry_budget = self.retry_budget.or(policy.retry_budget);
            policy.session = self.session.clone().or_else(|| policy.session.take());
        }
        for (port, tls) in &self.tls_of_ports {
            let policy = ports.entry(*port).or_insert_with(|| whole.clone());
            policy.tls = Some(tls.clone());
        }
    }
}
