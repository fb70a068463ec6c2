//! What workloads are joined with: services, policies, waypoints.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use mesh::names::Str;
use proto::security;

use super::{Facts, Inputs, Joins};
use crate::{
    graph::{Collection, Context, Graph, Runs},
    object::{Labels, Name},
    translate::{
        Settings, peer, policy,
        service::Claim,
        waypoint::{self, Bound},
    },
};

pub(super) fn joins(
    graph: &mut Graph,
    inputs: &Inputs,
    facts: &Facts,
    winners: &Collection<Str, Arc<Claim>>,
    runs: &mut BTreeMap<&'static str, Runs>,
) -> Joins {
    let settings = facts.settings.clone();
    let (policies, counted) = graph.derive(&inputs.policies, move |_, name, policy| {
        vec![(name.clone(), policy::translate(&settings, policy))]
    });
    runs.insert("policies", counted);
    let whole = inputs.peers.index(|name, policy| {
        let is_whole = peer::selector(&policy.object).is_none();
        is_whole
            .then(|| name.namespace.clone())
            .into_iter()
            .collect()
    });
    let whole = graph.group(&whole);
    let (levels, _) = graph.derive(&whole, |_, namespace, policies| {
        let level = peer::level(policies);
        level
            .map(|level| (namespace.clone(), level))
            .into_iter()
            .collect()
    });
    let (settings, known) = (facts.settings.clone(), levels.clone());
    let (peers, _) = graph.derive(&inputs.peers, move |cx, name, policy| {
        let levels = levels_above(cx, &settings, &known, &name.namespace);
        vec![(name.clone(), peer::outcome(&settings, policy, &levels))]
    });
    let instances = inputs
        .pods
        .index(|_, pod| waypoint::instance_of(&pod.meta).into_iter().collect());
    let instances = graph.group(&instances);
    let waypoints = facts.waypoints.clone();
    let (accounts, _) = graph.derive(&instances, move |cx, gateway, pods| {
        if cx.get(&waypoints, gateway).is_none() {
            return Vec::new();
        }
        let accounts: BTreeSet<Str> = pods.iter().map(|pod| pod.service_account.clone()).collect();
        vec![(gateway.clone(), accounts)]
    });
    Joins {
        facts: facts.clone(),
        winners: winners.clone(),
        winners_of_namespace: winners.index(|_, claim| vec![claim.meta.name.namespace.clone()]),
        policies_of_namespace: policies.index(|name, _| vec![name.namespace.clone()]),
        peers_of_namespace: peers.index(|name, _| vec![name.namespace.clone()]),
        levels,
        accounts,
    }
}

pub(super) type Levels = Vec<Option<Arc<peer::Level>>>;

/// The levels over a namespace's workloads, the nearest first.
fn levels_above(
    cx: &Context<'_>,
    settings: &Settings,
    levels: &Collection<Str, peer::Level>,
    namespace: &Str,
) -> Levels {
    let mut above = vec![cx.get(levels, namespace)];
    if *namespace != settings.root_namespace {
        above.push(cx.get(levels, &settings.root_namespace));
    }
    above
}

impl Joins {
    /// The services that select what has these labels.
    pub(super) fn selecting(
        &self,
        cx: &Context<'_>,
        namespace: &Str,
        labels: &Arc<Labels>,
    ) -> Vec<Arc<Claim>> {
        let labels = labels.clone();
        let filter = move |claim: &Arc<Claim>| claim.selects(&labels);
        let found = cx.find_where(&self.winners_of_namespace, namespace, filter);
        found
            .into_iter()
            .map(|(_, claim)| (*claim).clone())
            .collect()
    }

    /// The policies that a workload must name, sorted.
    pub(super) fn policies(
        &self,
        cx: &Context<'_>,
        namespace: &Str,
        labels: &Arc<Labels>,
        through: &[Name],
    ) -> Vec<Str> {
        let mut keys: BTreeSet<Str> = BTreeSet::new();
        let mut allowed = false;
        for policy in self.applying(cx, namespace, labels) {
            let authorization = policy.authorization.as_ref();
            allowed |= authorization.is_some_and(|a| a.action() == security::Action::Allow);
            if policy.selector.is_some() {
                keys.insert(policy.meta.name.to_string().into());
            }
        }
        keys.extend(self.peer_key(cx, namespace, labels));
        // Where only some may enter, the waypoint in front must be one of them (design 8.2).
        let known = |name: &&Name| cx.get(&self.accounts, name).is_some();
        for name in through.iter().filter(|_| allowed).filter(known) {
            keys.insert(format!("{}/{}", name.namespace, waypoint_policy_name(name)).into());
        }
        keys.into_iter().collect()
    }

    /// The policies in force that apply to what has these labels, by whichever scope.
    fn applying(
        &self,
        cx: &Context<'_>,
        namespace: &Str,
        labels: &Arc<Labels>,
    ) -> Vec<Arc<policy::Outcome>> {
        let root = &self.facts.settings.root_namespace;
        let labels = labels.clone();
        let filter = move |policy: &policy::Outcome| {
            let selector = policy.selector.as_ref();
            policy.authorization.is_some()
                && selector.is_none_or(|s| crate::object::selects(s, &labels))
        };
        let homes = [namespace, root].into();
        let found = cx.find_where_any(&self.policies_of_namespace, &homes, filter);
        found.into_iter().map(|(_, policy)| policy).collect()
    }

    fn peer_key(&self, cx: &Context<'_>, namespace: &Str, labels: &Arc<Labels>) -> Option<Str> {
        let wanted = labels.clone();
        let filter = move |outcome: &peer::Outcome| {
            outcome
                .selector
                .as_ref()
                .is_some_and(|s| crate::object::selects(s, &wanted))
        };
        let found = cx.find_where(&self.peers_of_namespace, namespace, filter);
        let outcomes: Vec<_> = found.into_iter().map(|(_, outcome)| outcome).collect();
        match peer::oldest(&outcomes, labels) {
            Some(outcome) => outcome.key.clone(),
            None => {
                let settings = &self.facts.settings;
                peer::level_key(
                    settings,
                    &levels_above(cx, settings, &self.levels, namespace),
                )
            }
        }
    }
}

/// The waypoints that traffic to a workload may come through.
pub(super) fn through(bound: &Bound, claims: &[Arc<Claim>]) -> Vec<Name> {
    let of_services = claims.iter().flat_map(|claim| &claim.waypoints);
    let all: BTreeSet<&Name> = bound.names.iter().chain(of_services).collect();
    all.into_iter().cloned().collect()
}

pub(super) fn waypoint_policy_name(gateway: &Name) -> String {
    format!(
        "istio_allow_waypoint_{}_{}",
        gateway.namespace, gateway.name
    )
}
