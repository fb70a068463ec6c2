//! Telemetry: which of it concerns which waypoint, and what is said of it.

use std::sync::Arc;

use mesh::{
    l7::{name::Target, view::Resource},
    names::Str,
};

use super::Targets;
use crate::{
    graph::{Collection, Context, Graph, Index},
    object::{Kind, Name, ObjectRef, Telemetry},
    output::{Condition, Truth},
    translate::{
        Settings, condition,
        l7::{
            self,
            istio::telemetry::{self, Level},
            target::Aim,
        },
        policy::target_kind,
    },
    wiring::{Conditions, reference},
};

/// What comes of Telemetries.
pub(super) struct Told {
    pub(super) resources: Collection<l7::Key, Arc<Resource>>,
    pub(super) conditions: Collection<ObjectRef, Conditions>,
}

/// A Telemetry with targets.
#[derive(Clone, Debug, PartialEq)]
struct Aimed {
    object: Arc<Telemetry>,
    aim: Aim,
}

/// Whether it is for a whole namespace, or for the mesh.
fn is_whole(telemetry: &Telemetry) -> bool {
    let spec = &telemetry.spec;
    spec.selector.is_none() && spec.target_ref.is_none() && spec.target_refs.is_empty()
}

pub(super) fn told(graph: &mut Graph, inputs: &crate::wiring::Inputs, targets: &Targets) -> Told {
    let objects = &inputs.istio.telemetries;
    let whole = objects.index(|name, telemetry| {
        is_whole(telemetry)
            .then(|| name.namespace.clone())
            .into_iter()
            .collect()
    });
    let looked = targets.clone();
    let (aimed, _) = graph.derive(objects, move |cx, name, telemetry| {
        let refs = telemetry
            .spec
            .target_refs
            .iter()
            .chain(&telemetry.spec.target_ref);
        let aim = looked.aim(cx, &name.namespace, refs);
        let aimed = Aimed {
            object: telemetry.clone(),
            aim,
        };
        aimed
            .aim
            .is_aimed()
            .then(|| (name.clone(), aimed))
            .into_iter()
            .collect()
    });
    let of_waypoint = aimed.index(|_, aimed| aimed.aim.waypoints.keys().cloned().collect());
    let (known, homes) = (targets.clone(), whole.clone());
    let (resources, _) = graph.derive(&inputs.gateways, move |cx, name, gateway| {
        match known.is_waypoint(cx, &gateway.spec.gateway_class_name) {
            true => telemetry::resources(name, &levels(cx, &known, &homes, &of_waypoint, name)),
            false => Vec::new(),
        }
    });
    let settings = targets.facts.settings.clone();
    let (conditions, _) = graph.derive(objects, move |cx, name, telemetry| {
        let aimed = cx.get(&aimed, name);
        let said = said(&settings, telemetry, aimed.as_ref().map(|aimed| &aimed.aim));
        crate::wiring::outputs::told(reference(Kind::Telemetry, name), vec![said])
    });
    Told {
        resources,
        conditions,
    }
}

/// What concerns a waypoint as a whole, the least specific first, and then what concerns services behind it.
fn levels(
    cx: &Context<'_>,
    targets: &Targets,
    whole: &Index<Str, Name, Telemetry>,
    aimed: &Index<Name, Name, Aimed>,
    waypoint: &Name,
) -> Vec<Level> {
    let root = &targets.facts.settings.root_namespace;
    let mut levels = Vec::new();
    let homes = [
        Some(root),
        Some(&waypoint.namespace).filter(|home| *home != root),
    ];
    for home in homes.into_iter().flatten() {
        let found = cx.find(whole, home);
        let oldest = found
            .into_iter()
            .map(|(_, object)| object)
            .min_by_key(|object| object.meta.age());
        levels.extend(oldest.map(|object| Level {
            object,
            services: Vec::new(),
        }));
    }
    let mut found: Vec<_> = cx
        .find(aimed, waypoint)
        .into_iter()
        .map(|(_, aimed)| aimed)
        .collect();
    // Those for Gateways come after those for classes; of the same kind the oldest comes last, and so counts.
    found.sort_by_key(|aimed| {
        (
            !is_for_class(&aimed.object),
            std::cmp::Reverse(aimed.object.meta.age()),
        )
    });
    for aimed in &found {
        let at = aimed
            .aim
            .waypoints
            .get(waypoint)
            .map_or(&[][..], Vec::as_slice);
        if at.contains(&Target::Waypoint) {
            levels.push(Level {
                object: aimed.object.clone(),
                services: Vec::new(),
            });
        }
    }
    for aimed in found.iter().rev() {
        let at = aimed
            .aim
            .waypoints
            .get(waypoint)
            .map_or(&[][..], Vec::as_slice);
        let services: Vec<Target> = at
            .iter()
            .filter(|target| **target != Target::Waypoint)
            .cloned()
            .collect();
        if !services.is_empty() {
            levels.push(Level {
                object: aimed.object.clone(),
                services,
            });
        }
    }
    levels
}

fn is_for_class(telemetry: &Telemetry) -> bool {
    let mut refs = telemetry
        .spec
        .target_refs
        .iter()
        .chain(&telemetry.spec.target_ref);
    refs.any(|target| target_kind(target) == Some(Kind::GatewayClass))
}

fn said(settings: &Settings, telemetry: &Telemetry, aim: Option<&Aim>) -> Condition {
    let mesh = settings.mesh.as_deref();
    let is_known = |name: &str| {
        name == "prometheus"
            || mesh.is_some_and(|mesh| {
                mesh.log_providers.contains_key(name) || mesh.trace_providers.contains_key(name)
            })
    };
    let named = telemetry::providers(&telemetry.spec);
    let mut unknown: Vec<&str> = named.into_iter().filter(|name| !is_known(name)).collect();
    unknown.sort_unstable();
    unknown.dedup();
    let mut remarks = Vec::new();
    if !unknown.is_empty() {
        remarks.push(format!(
            "meshConfig.extensionProviders has no {}: nothing is sent there",
            unknown.join(", ")
        ));
    }
    if let Some(condition) = aim.and_then(|aim| aim.condition(&remarks)) {
        return condition;
    }
    if telemetry.spec.selector.is_some() {
        let message = "nothing is told by it: waypoints take Telemetry with targetRefs, or of a whole namespace";
        return condition(
            "WaypointAccepted",
            Truth::False,
            "UnsupportedValue",
            message,
        );
    }
    let in_root = *telemetry.meta.name.namespace == *settings.root_namespace;
    let scope = if in_root {
        "all waypoints"
    } else {
        "the waypoints of this namespace"
    };
    let mut said = vec![format!("taken by {scope}")];
    said.extend(remarks);
    condition("WaypointAccepted", Truth::True, "Accepted", said.join("; "))
}
