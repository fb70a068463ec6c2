//! What MeshConfig says of the connections to every service.

use std::time::Duration;

use mesh::l7::backend::{BackendPolicy, ConnectionPool, Locality, OutlierDetection, TrafficPolicy};
use serde_json::Value;

use super::{
    balancer,
    connection::{Keepalive, keepalive_of, outlier, pool},
};
use crate::{crd::istio as crd, translate::l7::istio::read::interval, validate::Findings};

/// The lowest layer of all policies: `defaultTrafficPolicy`, `localityLbSetting`, and below these `connectTimeout` and
/// `tcpKeepalive`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Defaults {
    pool: Option<ConnectionPool>,
    outlier: Option<OutlierDetection>,
    connect_timeout: Option<Duration>,
    keepalive: Option<Keepalive>,
    locality: Option<Locality>,
}

impl Defaults {
    /// The fields of MeshConfig that are read here.
    pub const FIELDS: [&str; 4] = [
        "defaultTrafficPolicy",
        "connectTimeout",
        "tcpKeepalive",
        "localityLbSetting",
    ];

    /// Reads a whole MeshConfig. What cannot be read is left out, and told.
    pub fn read(config: &Value, found: &mut Findings) -> Self {
        let path = "defaultTrafficPolicy";
        let given = |field: &str| !config[field].is_null();
        let policy = given(path).then(|| read::<crd::TrafficPolicy>(&config[path], path, found));
        let policy = policy.flatten().unwrap_or_default();
        let ignored = policy.load_balancer.is_some() || policy.tls.is_some();
        if ignored || !policy.port_level_settings.is_empty() {
            found.warning(
                path,
                "only connectionPool and outlierDetection of it are read",
            );
        }
        let keepalive = given("tcpKeepalive")
            .then(|| read::<crd::TcpKeepalive>(&config["tcpKeepalive"], "tcpKeepalive", found));
        let near = given("localityLbSetting").then(|| {
            let path = "localityLbSetting";
            let read = read::<crd::LocalityLbSetting>(&config[path], path, found);
            read.and_then(|it| balancer::locality(&it, "meshConfig", found))
        });
        let pools = policy.connection_pool.as_ref();
        let outliers = policy.outlier_detection.as_ref();
        let connect = config["connectTimeout"].as_str().map(str::to_owned);
        let mut new = Self {
            pool: pools.map(|it| pool(it, &format!("{path}.connectionPool"), found)),
            outlier: outliers.map(|it| outlier(it, &format!("{path}.outlierDetection"), found)),
            connect_timeout: interval(connect.as_ref(), "connectTimeout", found),
            keepalive: keepalive
                .flatten()
                .map(|it| keepalive_of(&it, "tcpKeepalive", found)),
            locality: near.flatten(),
        };
        let mut pool = new.pool.take();
        if let Some(pool) = &mut pool {
            new.complete(pool);
        }
        Self { pool, ..new }
    }

    /// Whether nothing is said.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// The policy of a service of which nobody says anything.
    pub fn policy(&self) -> TrafficPolicy {
        let mut pool = self.pool.unwrap_or_default();
        self.complete(&mut pool);
        TrafficPolicy {
            pool,
            outlier: self.outlier.clone(),
            ..TrafficPolicy::default()
        }
    }

    /// Says which localities come first where nobody else does; `prefers`: the service does itself. As upstream, failover
    /// needs endpoints that can fail, and is then on unless somebody switches it off; a rule that asks for it without has
    /// endpoints that are all alike.
    pub(super) fn localize(&self, policy: &mut BackendPolicy, prefers: bool) {
        let usual = Locality::Failover(Vec::new());
        let locality = self.locality.as_ref().unwrap_or(&usual);
        let subsets = policy.subsets.values_mut();
        let of_subsets = subsets.flat_map(|it| it.policy.iter_mut().chain(it.ports.values_mut()));
        let own = std::iter::once(&mut policy.policy).chain(policy.ports.values_mut());
        for policy in own.chain(of_subsets) {
            let has_outliers = policy.outlier.is_some();
            let applies = |it: &Locality| has_outliers || !fails_over(it);
            match &policy.locality {
                Some(own) if !applies(own) => policy.locality = Some(Locality::Off),
                None if !prefers && *locality != Locality::Off && applies(locality) => {
                    policy.locality = Some(locality.clone());
                }
                Some(_) | None => {}
            }
        }
    }

    /// Adds to a pool what it does not say itself.
    pub(super) fn complete(&self, pool: &mut ConnectionPool) {
        pool.connect_timeout = pool.connect_timeout.or(self.connect_timeout);
        pool.keepalive = pool.keepalive.or(self.keepalive);
    }
}

/// Whether it needs to know which endpoints fail.
pub(super) fn fails_over(locality: &Locality) -> bool {
    match locality {
        Locality::Failover(_) | Locality::Priority(_) => true,
        Locality::Distribute(_) | Locality::Off => false,
    }
}

fn read<T: serde::de::DeserializeOwned>(it: &Value, path: &str, found: &mut Findings) -> Option<T> {
    serde_json::from_value(it.clone())
        .map_err(|error| found.error(path, error.to_string()))
        .ok()
}

#[cfg(test)]
mod tests {
    use mesh::l7::backend::Distribution;

    use super::*;

    /// What becomes of a rule's locality, with outliers or without, where the service has no preferences.
    fn localized(mesh: &str, own: Option<Locality>, outliers: bool) -> Option<Locality> {
        let mut found = Findings::default();
        let config: Value = serde_json::from_str(mesh).unwrap();
        let outlier = outliers.then(|| outlier(&crd::OutlierDetection::default(), "", &mut found));
        let mut policy = BackendPolicy {
            service: "a/web.a.svc".parse().unwrap(),
            sources: Vec::new(),
            policy: TrafficPolicy {
                locality: own,
                outlier,
                ..TrafficPolicy::default()
            },
            ports: Default::default(),
            subsets: Default::default(),
        };
        Defaults::read(&config, &mut found).localize(&mut policy, false);
        policy.policy.locality
    }

    #[test]
    fn failover_is_on_where_endpoints_can_fail_and_off_where_they_cannot() {
        let usual = || Some(Locality::Failover(Vec::new()));
        let by_label = || Some(Locality::Priority(vec![("a".into(), None)]));
        let shares = || Some(Locality::Distribute(Vec::<Distribution>::new()));
        let off = r#"{"localityLbSetting": {"enabled": false}}"#;
        for (mesh, own, outliers, expected) in [
            ("{}", None, true, usual()),
            ("{}", None, false, None),
            ("{}", by_label(), true, by_label()),
            ("{}", by_label(), false, Some(Locality::Off)),
            ("{}", usual(), false, Some(Locality::Off)),
            ("{}", shares(), false, shares()),
            ("{}", Some(Locality::Off), true, Some(Locality::Off)),
            (off, None, true, None),
            (off, by_label(), true, by_label()),
        ] {
            let found = localized(mesh, own.clone(), outliers);
            assert_eq!(found, expected, "{mesh} {own:?} {outliers}");
        }
    }
}
