//! What the control plane says of objects, as messages with istioctl's codes. Pure.

use std::fmt;

use controlplane::output::{Condition, ObjectStatus, Truth};
use serde::Serialize;

/// How bad a finding is; ordered from good to bad.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, clap::ValueEnum)]
pub(super) enum Level {
    Info,
    Warning,
    Error,
}

/// A kind of finding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Analyzer {
    pub code: &'static str,
    pub level: Level,
    /// istioctl's name, where the code is its.
    pub name: &'static str,
}

const fn analyzer(code: &'static str, level: Level, name: &'static str) -> Analyzer {
    Analyzer { code, level, name }
}

/// Every kind of finding. Codes `IST` are istioctl's, `LEY` our own.
pub(super) const ANALYZERS: [Analyzer; 15] = [
    analyzer("IST0101", Level::Error, "ReferencedResourceNotFound"),
    analyzer("IST0106", Level::Error, "SchemaValidationError"),
    analyzer("IST0127", Level::Warning, "NoMatchingWorkloadsFound"),
    analyzer("IST0133", Level::Warning, "SchemaWarning"),
    analyzer("IST0166", Level::Warning, "IneffectiveSelector"),
    analyzer("IST0171", Level::Warning, "NegativeConditionStatus"),
    analyzer("LEY-A01", Level::Warning, "DuplicateObject"),
    analyzer("LEY-A02", Level::Warning, "PolicyNotWhollyEnforced"),
    analyzer("LEY-A03", Level::Warning, "HostClaimedByAnother"),
    analyzer("LEY-A04", Level::Error, "WaypointRefused"),
    analyzer("LEY-A05", Level::Warning, "RefusedByProxies"),
    analyzer("LEY-A06", Level::Warning, "NetworkPolicyBlocksMesh"),
    analyzer("LEY-A07", Level::Info, "CannotBeInMesh"),
    analyzer("LEY-A08", Level::Warning, "NotInMesh"),
    analyzer("LEY-A09", Level::Warning, "MeshConfigNotWhollyKept"),
];

/// One that is named by its code or its name.
pub(super) fn known(text: &str) -> Result<Analyzer, String> {
    let is_it = |it: &Analyzer| {
        [it.code, it.name]
            .iter()
            .any(|own| own.eq_ignore_ascii_case(text))
    };
    let found = ANALYZERS.into_iter().find(is_it);
    found.ok_or_else(|| "nothing is called so; leyline analyze -L tells what is".to_owned())
}

pub(super) fn of(code: &str) -> Option<Analyzer> {
    ANALYZERS.into_iter().find(|it| it.code == code)
}

/// A message.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Finding {
    pub level: Level,
    pub code: &'static str,
    pub message: String,
    /// `Kind name.namespace`, as istioctl has it.
    pub origin: String,
    /// `file:line`, where it stands in a file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reference: Option<String>,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} [{}] ({}", self.level, self.code, self.origin)?;
        if let Some(reference) = &self.reference {
            write!(f, " {reference}")?;
        }
        write!(f, ") {}", self.message)
    }
}

/// The findings of one object, in the order of its conditions.
pub(super) fn of_object(status: &ObjectStatus, from_file: bool) -> Vec<Finding> {
    let finding = |code, message| {
        let analyzer = of(code)?;
        Some(Finding {
            level: analyzer.level,
            code: analyzer.code,
            message,
            origin: origin(status),
            reference: (from_file && !status.file.is_empty())
                .then(|| format!("{}:{}", status.file, status.line)),
        })
    };
    let own = status.conditions.iter();
    let own = own.filter_map(|condition| finding(code(condition)?, message(condition)));
    let at_parents = status.parents.iter().flat_map(|parent| {
        let wrong = parent.conditions.iter().filter_map(|condition| {
            let code = code_at_parent(condition)?;
            Some((
                code,
                format!(
                    "{}: {}",
                    called(&parent.reference),
                    message_at_parent(condition)
                ),
            ))
        });
        wrong.collect::<Vec<_>>()
    });
    let at_parents = at_parents.filter_map(|(code, message)| finding(code, message));
    own.chain(at_parents).collect()
}

/// Which finding a condition of a route or policy at one of its parents is. Rules that cannot be kept are told of the
/// object itself.
fn code_at_parent(condition: &Condition) -> Option<&'static str> {
    let fails = condition.status == Truth::False;
    Some(match (condition.type_, fails, condition.reason) {
        ("Accepted", true, "NoMatchingParent" | "TargetNotFound") => "IST0101",
        ("ResolvedRefs", true, _) => "IST0101",
        ("Accepted", true, _) => "IST0171",
        _ => return None,
    })
}

fn message_at_parent(condition: &Condition) -> String {
    format!(
        "{}: {}: {}",
        condition.type_, condition.reason, condition.message
    )
}

/// A parent by its kind and name.
fn called(reference: &serde_json::Value) -> String {
    let text = |field: &str| reference[field].as_str().unwrap_or_default();
    match reference["port"].as_u64() {
        Some(port) => format!("{} {} port {port}", text("kind"), text("name")),
        None => format!("{} {}", text("kind"), text("name")),
    }
}

/// Which finding a condition is; none where it is as it should be, or only tells.
fn code(condition: &Condition) -> Option<&'static str> {
    let holds = condition.status == Truth::True;
    Some(match (condition.type_, holds, condition.reason) {
        ("Accepted" | "Parsed", false, _) => "IST0106",
        ("Warned", true, _) => "IST0133",
        ("Unique", false, _) => "LEY-A01",
        ("HostsClaimed", false, _) => "LEY-A03",
        ("ProxiesAccepted", false, _) => "LEY-A05",
        ("istio.io/WaypointBound", false, "WaypointIsNotReady") => "IST0101",
        ("istio.io/WaypointBound", false, _) => "LEY-A04",
        ("WaypointAccepted", false, "TargetNotFound") => "IST0101",
        ("WaypointAccepted" | "ZtunnelAccepted", false, _) => "IST0171",
        ("ZtunnelAccepted" | "WaypointAccepted", true, reason) if reason != "Accepted" => "LEY-A02",
        // What a pod or a service is to the mesh, and not whether it is right.
        ("leyline.dev/InMesh" | "leyline.dev/Served", ..) => return None,
        (_, false, _) => "IST0171",
        _ => return None,
    })
}

fn message(condition: &Condition) -> String {
    match condition.type_ {
        "Accepted" | "Parsed" | "Warned" | "Unique" => condition.message.to_string(),
        other => format!("{other}: {}: {}", condition.reason, condition.message),
    }
}

fn origin(status: &ObjectStatus) -> String {
    match &status.namespace {
        Some(namespace) => format!("{} {}.{namespace}", status.kind, status.name),
        None => format!("{} {}", status.kind, status.name),
    }
}

/// A wish to hear nothing of an object: `CODE=Kind name.namespace`, with `*` for any run of letters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Suppression {
    code: String,
    origin: String,
}

impl std::str::FromStr for Suppression {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (code, origin) = text
            .split_once('=')
            .ok_or_else(|| format!("{text:?} is not of the form CODE=Kind name.namespace"))?;
        match ANALYZERS.iter().any(|it| it.code == code) {
            true => Ok(Self {
                code: code.to_owned(),
                origin: origin.to_owned(),
            }),
            false => Err(format!(
                "{code} is no code that is found: see --list-analyzers"
            )),
        }
    }
}

impl Suppression {
    /// Whether the finding is one that nobody wants to hear of.
    pub(super) fn covers(&self, finding: &Finding) -> bool {
        self.code == finding.code && matches(&self.origin, &finding.origin)
    }
}

/// Whether `text` is `pattern`, in which `*` is any run of letters.
fn matches(pattern: &str, text: &str) -> bool {
    let Some((before, rest)) = pattern.split_once('*') else {
        return pattern == text;
    };
    let Some(text) = text.strip_prefix(before) else {
        return false;
    };
    let starts = text.char_indices().map(|(at, _)| at).chain([text.len()]);
    starts.into_iter().any(|at| matches(rest, &text[at..]))
}

/// Whether an object's annotation suppresses the finding: a list of codes, or `*`.
pub(super) fn annotated(annotation: &str, code: &str) -> bool {
    annotation
        .split(',')
        .any(|it| matches!(it.trim(), "*") || it.trim() == code)
}
