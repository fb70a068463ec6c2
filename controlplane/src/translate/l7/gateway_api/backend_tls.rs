//! BackendTLSPolicy and XBackendTrafficPolicy: what one policy asks for, and which of several counts.

use std::{collections::BTreeSet, time::Duration};

use mesh::{
    l7::{
        backend::{BackendTls, Pem, RetryBudget, SubjectAltName},
        name::ObjectRef,
        route::SessionPersistence,
    },
    names::Str,
};
use rustls_pki_types::{CertificateDer, pem::PemObject as _};

use super::{duration, session};
use crate::{
    crd::gateway_api::{
        BackendTlsPolicySpec, BackendTrafficPolicySpec, PolicyTargetRef, RetryConstraint,
        SubjectAltName as WrittenName,
    },
    object::{BackendTlsPolicy, BackendTrafficPolicy, Kind, Meta, Name, Sourced},
    output::{Condition, Truth},
    translate::condition,
};

/// Opts a policy out of this control plane (Istio's).
const IGNORE: &str = "istio.io/ignore-policy-attachment";

/// What a policy is attached to: the kind of a service's object, its name, and a port's name.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Target {
    /// Service or ServiceEntry.
    pub kind: Kind,
    /// Its name.
    pub name: Name,
    /// One of its ports; none: all.
    pub section: Option<Str>,
}

/// What one policy asks for.
#[derive(Clone, Debug, PartialEq)]
pub struct Wish<T> {
    /// Names and age.
    pub meta: Meta,
    /// Which object it is.
    pub source: ObjectRef,
    /// As written, and what they are; `None`: nothing that a policy can be attached to here.
    pub targets: Vec<(PolicyTargetRef, Option<Target>)>,
    /// What it asks for.
    pub asks: T,
    /// `Accepted`, where nothing else is in its way.
    pub accepted: Condition,
    /// `ResolvedRefs`, where it has references.
    pub resolved: Option<Condition>,
}

/// What an XBackendTrafficPolicy asks for.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Traffic {
    /// Retries.
    pub retry_budget: Option<RetryBudget>,
    /// Sessions.
    pub session: Option<SessionPersistence>,
}

impl<T> Wish<T> {
    /// Whether this one counts and not `other`, where both are for the same: the older does.
    pub fn goes_before(&self, other: &Self) -> bool {
        self.meta.age() < other.meta.age()
    }

    /// The targets it has here.
    pub fn attached(&self) -> impl Iterator<Item = &Target> {
        self.targets
            .iter()
            .filter_map(|(_, target)| target.as_ref())
    }
}

fn targets(meta: &Meta, written: &[PolicyTargetRef]) -> Vec<(PolicyTargetRef, Option<Target>)> {
    let ignored = meta
        .label(IGNORE)
        .or_else(|| meta.annotation(IGNORE))
        .is_some();
    let of = |target: &PolicyTargetRef| {
        let kind = match (target.group.as_str(), target.kind.as_str()) {
            ("" | "core", "Service") => Kind::Service,
            ("networking.istio.io", "ServiceEntry") => Kind::ServiceEntry,
            _ => return None,
        };
        Some(Target {
            kind,
            name: Name {
                namespace: meta.name.namespace.clone(),
                name: target.name.as_str().into(),
            },
            section: target.section_name.as_deref().map(Into::into),
        })
    };
    let all = written.iter().map(|target| (target.clone(), of(target)));
    all.filter(|_| !ignored).collect()
}

fn source(kind: Kind, meta: &Meta) -> ObjectRef {
    ObjectRef {
        kind: kind.as_str().into(),
        namespace: meta.name.namespace.clone(),
        name: meta.name.name.clone(),
    }
}

fn accepted() -> Condition {
    condition("Accepted", Truth::True, "Accepted", "kept by waypoints")
}

/// What a BackendTLSPolicy asks for. `roots` gives the PEM of a ConfigMap of its namespace. One that cannot be kept lets
/// nothing through: the user asked for verified TLS.
pub fn tls(
    policy: &Sourced<BackendTlsPolicy>,
    roots: impl Fn(&Name) -> Option<std::sync::Arc<str>>,
) -> Wish<BackendTls> {
    let Sourced { object, faults } = policy;
    let (asks, resolved) = match faults.first() {
        Some(fault) => (Err(("Invalid", fault.clone())), None),
        None => verified(&object.spec, &object.meta, roots),
    };
    let (asks, accepted) = match asks {
        Ok(tls) => (tls, accepted()),
        Err((reason, problem)) => {
            let message = format!("{problem}; requests are answered 503");
            let tls = BackendTls::Invalid(problem.into());
            (tls, condition("Accepted", Truth::False, reason, message))
        }
    };
    Wish {
        source: source(Kind::BackendTlsPolicy, &object.meta),
        targets: targets(&object.meta, &object.spec.target_refs),
        meta: object.meta.clone(),
        asks,
        accepted,
        resolved,
    }
}

type Refused = (&'static str, String);

fn verified(
    spec: &BackendTlsPolicySpec,
    meta: &Meta,
    roots: impl Fn(&Name) -> Option<std::sync::Arc<str>>,
) -> (Result<BackendTls, Refused>, Option<Condition>) {
    let validation = &spec.validation;
    let (found, resolved) = match &validation.well_known_ca_certificates {
        Some(_) if !validation.ca_certificate_refs.is_empty() => {
            let problem = "wellKnownCACertificates and caCertificateRefs exclude each other";
            (Err(("Invalid", problem.to_owned())), None)
        }
        Some(known) if known == "System" => (Ok(None), None),
        Some(other) => (
            Err((
                "Invalid",
                format!("wellKnownCACertificates: {other:?} is not known"),
            )),
            None,
        ),
        None => authorities(spec, meta, roots),
    };
    let names: Result<Vec<_>, _> = validation.subject_alt_names.iter().map(name).collect();
    let tls = found.and_then(|roots| {
        if validation.hostname.is_empty() {
            return Err(("Invalid", "validation.hostname is missing".to_owned()));
        }
        Ok(BackendTls::Verify {
            sni: Some(validation.hostname.as_str().into()),
            roots: roots.map(Pem::Inline),
            revoked: None,
            subject_alt_names: names.map_err(|problem| ("Invalid", problem))?,
            client: None,
        })
    });
    (tls, resolved)
}

fn name(written: &WrittenName) -> Result<SubjectAltName, String> {
    match (written.type_.as_str(), &written.hostname, &written.uri) {
        ("Hostname", Some(name), None) => Ok(SubjectAltName::Hostname(name.as_str().into())),
        ("URI", None, Some(uri)) => Ok(SubjectAltName::Uri(uri.as_str().into())),
        (type_, ..) => Err(format!(
            "subjectAltNames: {type_:?} and its field do not go together"
        )),
    }
}

/// The roots that can be read, together.
fn authorities(
    spec: &BackendTlsPolicySpec,
    meta: &Meta,
    roots: impl Fn(&Name) -> Option<std::sync::Arc<str>>,
) -> (Result<Option<Vec<u8>>, Refused>, Option<Condition>) {
    let mut pem = Vec::new();
    let mut problems: Vec<Refused> = Vec::new();
    for reference in &spec.validation.ca_certificate_refs {
        let name = Name::new(meta.name.namespace.clone(), reference.name.as_str());
        if !matches!(
            (reference.group.as_str(), reference.kind.as_str()),
            ("" | "core", "ConfigMap")
        ) {
            let problem = format!("{} {name} is no ConfigMap", reference.kind);
            problems.push(("InvalidKind", problem));
            continue;
        }
        match roots(&name).filter(|text| holds_certificates(text)) {
            Some(text) => {
                pem.extend_from_slice(text.as_bytes());
                pem.push(b'\n');
            }
            None => {
                let problem = format!("ConfigMap {name} has no certificate under ca.crt");
                problems.push(("InvalidCACertificateRef", problem));
            }
        }
    }
    let texts: Vec<&str> = problems
        .iter()
        .map(|(_, problem)| problem.as_str())
        .collect();
    let resolved = match problems.first() {
        Some((reason, _)) => condition("ResolvedRefs", Truth::False, reason, texts.join("; ")),
        None => condition(
            "ResolvedRefs",
            Truth::True,
            "ResolvedRefs",
            "every reference is resolved",
        ),
    };
    let found = match pem.is_empty() {
        false => Ok(Some(pem)),
        true if texts.is_empty() => Err(("Invalid", "there is no root to verify with".to_owned())),
        true => Err(("NoValidCACertificate", texts.join("; "))),
    };
    (found, Some(resolved))
}

fn holds_certificates(pem: &str) -> bool {
    let mut found = CertificateDer::pem_slice_iter(pem.as_bytes()).peekable();
    found.peek().is_some() && found.all(|certificate| certificate.is_ok())
}

/// What an XBackendTrafficPolicy asks for. One that cannot be read asks for nothing.
pub fn traffic(policy: &BackendTrafficPolicy) -> Wish<Traffic> {
    let of_port = policy
        .spec
        .target_refs
        .iter()
        .any(|target| target.section_name.is_some());
    let asked = match of_port {
        true => {
            Err("targetRefs[].sectionName is not supported: it is for whole services".to_owned())
        }
        false => asked(&policy.spec),
    };
    let (asks, accepted) = match asked {
        Ok(asks) => (asks, accepted()),
        Err(problem) => {
            let message = format!("{problem}; it has no effect");
            let refused = condition("Accepted", Truth::False, "Invalid", message);
            (Traffic::default(), refused)
        }
    };
    Wish {
        source: source(Kind::BackendTrafficPolicy, &policy.meta),
        targets: targets(&policy.meta, &policy.spec.target_refs),
        meta: policy.meta.clone(),
        asks,
        accepted,
        resolved: None,
    }
}

/// What a spec asks for; the error is the first problem.
pub fn asked(spec: &BackendTrafficPolicySpec) -> Result<Traffic, String> {
    let session = spec.session_persistence.as_ref().map(session::session);
    Ok(Traffic {
        retry_budget: spec.retry_constraint.as_ref().map(budget).transpose()?,
        session: session
            .transpose()
            .map_err(|(field, problem)| format!("sessionPersistence.{field}: {problem}"))?,
    })
}

fn budget(wanted: &RetryConstraint) -> Result<RetryBudget, String> {
    let time = |text: Option<&String>, usual| match text.map(|text| duration(text)).transpose()? {
        Some(time) if time.is_zero() => Err("an interval of nothing".to_owned()),
        time => Ok(time.unwrap_or(usual)),
    };
    let given = wanted.budget.clone().unwrap_or_default();
    let interval = time(given.interval.as_ref(), Duration::from_secs(10))?;
    let percent = u32::try_from(given.percent.unwrap_or(20)).ok();
    let percent = percent
        .filter(|percent| *percent <= 100)
        .ok_or("budget.percent is none of 0 to 100")?;
    let rate = wanted.min_retry_rate.clone().unwrap_or_default();
    let per = time(rate.interval.as_ref(), Duration::from_secs(1))?;
    let count =
        u32::try_from(rate.count.unwrap_or(10)).map_err(|_| "minRetryRate.count is less than 0")?;
    // As many as come together in the budget's window.
    let in_window = u128::from(count) * interval.as_millis() / per.as_millis().max(1);
    Ok(RetryBudget {
        percent,
        interval,
        min_retries: u32::try_from(in_window).unwrap_or(u32::MAX),
    })
}

/// Everything wrong with a BackendTLSPolicy, whatever its references come to.
pub fn problems(spec: &BackendTlsPolicySpec) -> Vec<String> {
    let meta = Meta::default();
    let some = |_: &Name| None;
    match verified(spec, &meta, some).0 {
        Err((reason, problem)) if reason != "NoValidCACertificate" => vec![problem],
        _ => Vec::new(),
    }
}

/// The conditions of a policy at one of its targets. `older`: a policy for the same that goes before; `waypoints`: who
/// serves the target, `None` if there is no such service or port.
pub fn conditions<T>(
    wish: &Wish<T>,
    older: Option<&Name>,
    waypoints: Option<&BTreeSet<Name>>,
) -> Vec<Condition> {
    let no = |reason, message: String| condition("Accepted", Truth::False, reason, message);
    let accepted = match (older, waypoints) {
        (_, None) => no(
            "TargetNotFound",
            "there is no such service or port".to_owned(),
        ),
        (Some(older), _) => no("Conflicted", format!("{older} is older and counts")),
        (None, Some(waypoints)) if waypoints.is_empty() => no(
            "NoWaypoint",
            "not enforced: no waypoint serves it (label istio.io/use-waypoint)".to_owned(),
        ),
        (None, Some(_)) => wish.accepted.clone(),
    };
    std::iter::once(accepted)
        .chain(wish.resolved.clone())
        .collect()
}
