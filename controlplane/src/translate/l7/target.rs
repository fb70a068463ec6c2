//! What a policy with `targetRefs` is for, waypoint by waypoint.

use std::collections::BTreeMap;

use mesh::{l7::name::Target, names::NamespacedHostname};

use crate::{
    crd::TargetRef,
    object::{Kind, Name},
    output::{Condition, Truth},
    translate::{Settings, condition, policy::target_kind},
};

/// What there is behind a target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Found {
    /// There is no such object.
    Absent,
    /// A Gateway or GatewayClass that is not a waypoint's.
    NoWaypoint,
    /// These waypoints as a whole.
    Waypoints(Vec<Name>),
    /// These services, and the waypoints that their traffic goes through.
    Services(Vec<NamespacedHostname>, Vec<Name>),
}

/// What a policy's targets come to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Aim {
    /// Per waypoint, sorted and unique.
    pub waypoints: BTreeMap<Name, Vec<Target>>,
    /// Targets that are not there.
    absent: Vec<String>,
    /// Targets that are there and behind no waypoint.
    unbound: Vec<String>,
    /// Targets that cannot be one.
    unfit: Vec<String>,
    /// Whether there were any.
    any: bool,
}

/// Looks up the targets of a policy in `namespace`. A GatewayClass is one in the root namespace only.
pub fn aim<'t>(
    settings: &Settings,
    namespace: &str,
    targets: impl IntoIterator<Item = &'t TargetRef>,
    look: impl Fn(Kind, &Name) -> Found,
) -> Aim {
    let mut aim = Aim::default();
    for target in targets {
        aim.any = true;
        let name = Name::new(namespace, target.name.as_str());
        let told = told(target, &name);
        let elsewhere = !target.namespace.is_empty() && target.namespace != namespace;
        match target_kind(target) {
            _ if elsewhere => aim.unfit.push(format!(
                "{told} (a target is in the policy's own namespace)"
            )),
            None => aim
                .unfit
                .push(format!("{told} (no kind that can be a target)")),
            Some(Kind::GatewayClass) if *namespace != *settings.root_namespace => {
                let root = &settings.root_namespace;
                aim.unfit.push(format!(
                    "{told} (a GatewayClass is a target in the root namespace {root} only)"
                ));
            }
            Some(kind) => aim.add(told, look(kind, &name)),
        }
    }
    for targets in aim.waypoints.values_mut() {
        targets.sort();
        targets.dedup();
    }
    aim
}

impl Aim {
    fn add(&mut self, told: String, found: Found) {
        match found {
            Found::Absent => self.absent.push(told),
            Found::NoWaypoint => self.unbound.push(format!("{told} (no waypoint)")),
            Found::Waypoints(waypoints) if waypoints.is_empty() => self.unbound.push(told),
            Found::Waypoints(waypoints) => {
                for waypoint in waypoints {
                    let targets = self.waypoints.entry(waypoint).or_default();
                    targets.push(Target::Waypoint);
                }
            }
            Found::Services(services, waypoints) if services.is_empty() || waypoints.is_empty() => {
                self.unbound.push(told);
            }
            Found::Services(services, waypoints) => {
                for waypoint in waypoints {
                    let targets = self.waypoints.entry(waypoint).or_default();
                    targets.extend(services.iter().cloned().map(Target::Service));
                }
            }
        }
    }

    /// Whether the policy has targets at all.
    pub fn is_aimed(&self) -> bool {
        self.any
    }

    /// `WaypointAccepted`, as upstream has it: where the policy is enforced and where not. `remarks`: what else there is
    /// to say of what is enforced. `None`: it has no targets.
    pub fn condition(&self, remarks: &[String]) -> Option<Condition> {
        if !self.any {
            return None;
        }
        let mut said = Vec::new();
        let names: Vec<String> = self.waypoints.keys().map(Name::to_string).collect();
        match names.is_empty() {
            true => said.push("nothing is enforced".to_owned()),
            false => said.push(format!("bound to {}", names.join(", "))),
        }
        let missed = [
            ("not found", &self.absent),
            ("its traffic goes through no waypoint", &self.unbound),
            ("no target", &self.unfit),
        ];
        for (what, targets) in missed {
            if !targets.is_empty() {
                said.push(format!("{what}: {}", targets.join(", ")));
            }
        }
        said.extend_from_slice(remarks);
        let (status, reason) = match self {
            _ if !self.unfit.is_empty() => (Truth::False, "Invalid"),
            _ if !self.absent.is_empty() => (Truth::False, "TargetNotFound"),
            _ if !self.unbound.is_empty() => (Truth::False, "AncestorNotBound"),
            _ => (Truth::True, "Accepted"),
        };
        Some(condition(
            "WaypointAccepted",
            status,
            reason,
            said.join("; "),
        ))
    }
}

/// `Kind.group:namespace/name`, as upstream has it.
fn told(target: &TargetRef, name: &Name) -> String {
    match target.group.as_str() {
        "" | "core" => format!("{}:{name}", target.kind),
        group => format!("{}.{group}:{name}", target.kind),
    }
}
