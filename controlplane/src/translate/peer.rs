//! PeerAuthentication to policies that node tunnels enforce.
//!
//! The outcome follows from two facts: the mode in force for all ports, after inheritance (mesh, namespace, workload), and
//! the ports whose mode differs from it. Upstream derives it piecemeal and leaves ports open in several combinations; here
//! both facts are known before anything is derived.

use std::{borrow::Cow, sync::Arc};

use mesh::names::Str;
use proto::security::{
    self as wire, Authorization, Clause, Match, Rule, StringMatch, string_match,
};

use super::{Settings, condition};
use crate::{
    crd::MutualTlsMode,
    object::{Labels, Meta, Name, PeerAuthentication, Sourced, labels_of, selects},
    output::{Condition, Truth},
};

/// The policy behind a mode of STRICT without exceptions.
pub const STATIC_STRICT: &str = "istio_converted_static_strict";

/// The mode in force for a whole namespace or mesh.
#[derive(Clone, Debug, PartialEq)]
pub struct Level {
    /// Its mode; UNSET inherits.
    pub mode: MutualTlsMode,
    /// The object it comes from.
    pub name: Name,
}

/// What a PeerAuthentication comes to.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    /// Names and age.
    pub meta: Meta,
    /// Labels that select workloads; `None`: the whole namespace or mesh.
    pub selector: Option<Labels>,
    /// The policy that workloads it selects must name.
    pub key: Option<Str>,
    /// The policy it needs for itself.
    pub authorization: Option<Authorization>,
    /// What to say of it.
    pub conditions: Vec<Condition>,
}

/// Whether TLS is demanded, once nothing is inherited any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Strict,
    Permissive,
}

/// The selector; an empty one selects by nothing and is none.
pub fn selector(policy: &PeerAuthentication) -> Option<Labels> {
    let labels = &policy.spec.selector.as_ref()?.match_labels;
    (!labels.is_empty()).then(|| labels_of(labels))
}

/// The level that the policies without selector of one namespace make: the oldest counts.
pub fn level(policies: &[Arc<Sourced<PeerAuthentication>>]) -> Option<Level> {
    let whole = policies
        .iter()
        .filter(|policy| selector(&policy.object).is_none());
    let oldest = whole.min_by_key(|policy| policy.object.meta.age())?;
    Some(Level {
        mode: mode_of(oldest),
        name: oldest.object.meta.name.clone(),
    })
}

fn mode_of(policy: &Sourced<PeerAuthentication>) -> MutualTlsMode {
    match policy.faults.is_empty() {
        true => policy.object.spec.mtls.unwrap_or_default().mode,
        // What cannot be read might demand it.
        false => MutualTlsMode::Strict,
    }
}

/// The first mode that is set; none: plaintext is accepted.
fn inherited(modes: impl IntoIterator<Item = MutualTlsMode>) -> Mode {
    match modes.into_iter().find(|mode| *mode != MutualTlsMode::Unset) {
        Some(MutualTlsMode::Strict) => Mode::Strict,
        _ => Mode::Permissive,
    }
}

/// What a workload that no selector policy chooses must name, given the levels from the nearest to the farthest.
pub fn level_key(settings: &Settings, levels: &[Option<Arc<Level>>]) -> Option<Str> {
    let modes = levels.iter().flatten().map(|level| level.mode);
    (inherited(modes) == Mode::Strict).then(|| static_strict_key(settings))
}

/// The policy of those that select a workload in its namespace that counts: the oldest.
pub fn oldest<'o>(outcomes: &'o [Arc<Outcome>], labels: &Labels) -> Option<&'o Arc<Outcome>> {
    let selecting = outcomes.iter().filter(|outcome| {
        outcome
            .selector
            .as_ref()
            .is_some_and(|selector| selects(selector, labels))
    });
    selecting.min_by_key(|outcome| outcome.meta.age())
}

/// What a policy comes to, given the levels above it from the nearest to the farthest, and the level of its own namespace.
pub fn outcome(
    settings: &Settings,
    policy: &Sourced<PeerAuthentication>,
    levels: &[Option<Arc<Level>>],
) -> Outcome {
    let meta = policy.object.meta.clone();
    let mut outcome = Outcome {
        selector: selector(&policy.object),
        key: None,
        authorization: None,
        conditions: Vec::new(),
        meta,
    };
    let in_root = outcome.meta.name.namespace == settings.root_namespace;
    outcome.conditions = vec![match (&outcome.selector, in_root) {
        (Some(_), true) => {
            outcome.selector = None;
            let message =
                "a policy of the root namespace is for the whole mesh: its selector makes it void";
            accepted(Truth::False, "SelectorInRootNamespace", message)
        }
        (None, _) => whole(&outcome.meta.name, mode_of(policy), levels),
        (Some(_), false) => selected(
            settings,
            policy,
            levels,
            &mut outcome.key,
            &mut outcome.authorization,
        ),
    }];
    outcome
}

fn whole(name: &Name, mode: MutualTlsMode, levels: &[Option<Arc<Level>>]) -> Condition {
    let own = levels
        .iter()
        .flatten()
        .find(|level| level.name.namespace == name.namespace);
    match own {
        Some(level) if level.name != *name => {
            let message = format!("the older {} counts for this namespace", level.name);
            accepted(Truth::False, "Conflicted", message)
        }
        _ => {
            let message = match mode {
                MutualTlsMode::Unset => "no mode set: the level above counts",
                MutualTlsMode::Strict => "plaintext is refused",
                MutualTlsMode::Permissive | MutualTlsMode::Disable => "plaintext is accepted",
            };
            accepted(Truth::True, "Accepted", message)
        }
    }
}

fn selected(
    settings: &Settings,
    policy: &Sourced<PeerAuthentication>,
    levels: &[Option<Arc<Level>>],
    key: &mut Option<Str>,
    authorization: &mut Option<Authorization>,
) -> Condition {
    let above = levels.iter().flatten().map(|level| level.mode);
    let mode = inherited(std::iter::once(mode_of(policy)).chain(above));
    let exceptions = exceptions(policy, mode);
    let name = &policy.object.meta.name;
    if exceptions.is_empty() {
        *key = (mode == Mode::Strict).then(|| static_strict_key(settings));
    } else {
        let converted = port_policy(name, mode, &exceptions);
        *key = Some(format!("{}/{}", converted.namespace, converted.name).into());
        *authorization = Some(converted);
    }
    let ports = exceptions
        .iter()
        .map(u16::to_string)
        .collect::<Vec<_>>()
        .join(", ");
    let message = match (mode, exceptions.is_empty()) {
        (Mode::Strict, true) => "plaintext is refused".to_owned(),
        (Mode::Permissive, true) => "plaintext is accepted".to_owned(),
        (Mode::Strict, false) => format!("plaintext is refused but for ports {ports}"),
        (Mode::Permissive, false) => format!("plaintext is accepted but for ports {ports}"),
    };
    accepted(
        Truth::True,
        "Accepted",
        message + "; where several select a workload, the oldest counts",
    )
}

/// The ports whose mode is not the workload's.
fn exceptions(policy: &Sourced<PeerAuthentication>, mode: Mode) -> Vec<u16> {
    if !policy.faults.is_empty() {
        return Vec::new();
    }
    let ports = policy.object.spec.port_level_mtls.iter().flatten();
    let differs = |(port, tls): (&String, &crate::crd::MutualTls)| {
        let own = match tls.mode {
            MutualTlsMode::Unset => return None,
            MutualTlsMode::Strict => Mode::Strict,
            MutualTlsMode::Permissive | MutualTlsMode::Disable => Mode::Permissive,
        };
        (own != mode).then(|| port.parse::<u16>().ok()).flatten()
    };
    let mut ports: Vec<u16> = ports.filter_map(differs).collect();
    ports.sort_unstable();
    ports
}

fn port_policy(name: &Name, mode: Mode, ports: &[u16]) -> Authorization {
    let rules = match mode {
        // Any rule that matches refuses: one per port that wants TLS.
        Mode::Permissive => ports
            .iter()
            .map(|port| {
                rule([Match {
                    destination_ports: vec![(*port).into()],
                    ..nobody()
                }])
            })
            .collect(),
        // Refuse whoever has no identity, unless the port is one of these.
        Mode::Strict => {
            let others = ports.iter().map(|port| Match {
                not_destination_ports: vec![(*port).into()],
                ..Match::default()
            });
            vec![rule(std::iter::once(nobody()).chain(others))]
        }
    };
    deny(
        format!("converted_peer_authentication_{}", name.name),
        &name.namespace,
        rules,
    )
}

/// The policy behind [`STATIC_STRICT`].
pub fn static_strict(settings: &Settings) -> Authorization {
    deny(
        STATIC_STRICT.to_owned(),
        &settings.root_namespace,
        vec![rule([nobody()])],
    )
}

fn static_strict_key(settings: &Settings) -> Str {
    format!("{}/{STATIC_STRICT}", settings.root_namespace).into()
}

/// One clause for each match: all must hold.
fn rule(matches: impl IntoIterator<Item = Match>) -> Rule {
    let clause = |one| Clause { matches: vec![one] };
    Rule {
        clauses: matches.into_iter().map(clause).collect(),
    }
}

/// Matches a peer without an identity.
fn nobody() -> Match {
    Match {
        not_principals: vec![StringMatch {
            match_type: Some(string_match::MatchType::Presence(())),
        }],
        ..Match::default()
    }
}

fn deny(name: String, namespace: &str, rules: Vec<Rule>) -> Authorization {
    Authorization {
        name,
        namespace: namespace.to_owned(),
        scope: wire::Scope::WorkloadSelector.into(),
        action: wire::Action::Deny.into(),
        rules,
        ..Authorization::default()
    }
}

fn accepted(
    status: Truth,
    reason: &'static str,
    message: impl Into<Cow<'static, str>>,
) -> Condition {
    condition("ZtunnelAccepted", status, reason, message)
}
