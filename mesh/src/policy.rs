//! Authorization policies as the node tunnel gets them (Istio authorization.proto), checked.

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::{
    dump::{PolicyShape, StringMatchShape},
    names::{PolicyKey, Str},
};

/// One policy. Rules are ORed; none: never matches, so that an ALLOW without rules denies all.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "PolicyShape", into = "PolicyShape")]
pub struct AuthorizationPolicy {
    /// Primary key.
    pub key: PolicyKey,
    /// What it applies to.
    pub scope: PolicyScope,
    /// What a match means.
    pub action: Action,
    /// ORed.
    pub rules: Vec<Rule>,
    /// Evaluated and told, never enforced.
    pub dry_run: bool,
    /// What of the wire's message could not be understood; each made the policy narrower (ALLOW) or wider (DENY),
    /// never more open. Empty for a sound policy. For the log and the answer to the control plane.
    pub faults: Vec<String>,
}

/// Istio authorization.proto `Scope`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum PolicyScope {
    /// Every workload.
    Global,
    /// The workloads of the policy's namespace.
    Namespace,
    /// The workloads that name the policy.
    WorkloadSelector,
}

/// Istio authorization.proto `Action`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Action {
    /// Where any ALLOW applies, one must match.
    Allow,
    /// A match refuses.
    Deny,
}

/// Clauses are ANDed; none: matches everything.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Rule {
    /// ANDed.
    pub clauses: Vec<Clause>,
}

/// Matches are ORed; none: true.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Clause {
    /// ORed.
    pub matches: Vec<Match>,
}

/// Kinds are ANDed; a positive list holds if any value matches, a negative one if none does; an empty list holds.
/// A match whose lists are all empty never matches.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Match {
    /// Namespace of the peer's identity.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub namespaces: Vec<StringMatch>,
    /// The same, negated.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub not_namespaces: Vec<StringMatch>,
    /// SPIFFE ID of the peer without `spiffe://`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub principals: Vec<StringMatch>,
    /// The same, negated.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub not_principals: Vec<StringMatch>,
    /// TCP peer address.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub source_ips: Vec<IpNet>,
    /// The same, negated.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub not_source_ips: Vec<IpNet>,
    /// Address of the pod.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub destination_ips: Vec<IpNet>,
    /// The same, negated.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub not_destination_ips: Vec<IpNet>,
    /// Port of the pod (not of the service).
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub destination_ports: Vec<u16>,
    /// The same, negated.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub not_destination_ports: Vec<u16>,
    /// Service account of the peer, in any trust domain.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub service_accounts: Vec<ServiceAccountMatch>,
    /// The same, negated.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub not_service_accounts: Vec<ServiceAccountMatch>,
}

/// Istio authorization.proto `StringMatch`. Case-sensitive.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "StringMatchShape", into = "StringMatchShape")]
pub enum StringMatch {
    /// The whole text.
    Exact(Str),
    /// Its start.
    Prefix(Str),
    /// Its end.
    Suffix(Str),
    /// Any text that is not empty.
    Presence,
}

/// Istio authorization.proto `ServiceAccountMatch`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ServiceAccountMatch {
    /// Namespace of the service account.
    pub namespace: Str,
    /// Its name.
    pub service_account: Str,
}
