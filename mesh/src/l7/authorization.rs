//! Authorization of requests (Istio AuthorizationPolicy with `targetRefs`): the model.

use ipnet::IpNet;

use super::name::Target;
use crate::names::{PolicyKey, Str};

/// One policy. Rules are ORed; none: never matches.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RequestPolicy {
    /// Key.
    pub key: PolicyKey,
    /// At least one.
    pub targets: Vec<Target>,
    /// What a match means.
    pub action: PolicyAction,
    /// Evaluated and told, never enforced.
    pub dry_run: bool,
    /// ORed.
    pub rules: Vec<PolicyRule>,
    /// What of the object could not be understood; each made the policy narrower (ALLOW) or wider (DENY), never more
    /// open.
    pub faults: Vec<Str>,
}

/// What a match means. Order of evaluation: CUSTOM, DENY, ALLOW; AUDIT changes nothing.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum PolicyAction {
    /// Where any applies, one must match.
    Allow,
    /// A match refuses.
    Deny,
    /// A match is told.
    Audit,
    /// A match asks the [`ExternalAuthorizer`](super::config::ExternalAuthorizer) of this name; one that is not known
    /// refuses.
    Custom(Str),
}

/// `from`, `to` and `when` are ANDed. All empty: matches everything.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PolicyRule {
    /// ORed; none: any.
    pub from: Vec<SourceMatch>,
    /// ORed; none: any.
    pub to: Vec<OperationMatch>,
    /// ANDed.
    pub when: Vec<Condition>,
}

/// Values and their negation: any of `values` (none: holds), and none of `not_values`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Either<T> {
    /// ORed; empty: holds.
    pub values: Vec<T>,
    /// None may match.
    pub not_values: Vec<T>,
}

impl<T> Default for Either<T> {
    fn default() -> Self {
        Self {
            values: Vec::new(),
            not_values: Vec::new(),
        }
    }
}

/// ANDed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SourceMatch {
    /// SPIFFE ID without `spiffe://`.
    pub principals: Either<ValueMatch>,
    /// `issuer/subject` of a verified token.
    pub request_principals: Either<ValueMatch>,
    /// Of the peer's identity.
    pub namespaces: Either<ValueMatch>,
    /// `namespace/name`, resolved by the control plane.
    pub service_accounts: Either<(Str, Str)>,
    /// Of the peer's identity.
    pub trust_domains: Either<ValueMatch>,
    /// The peer's address.
    pub ip_blocks: Either<IpNet>,
    /// The client's address by `x-forwarded-for`.
    pub remote_ip_blocks: Either<IpNet>,
}

/// ANDed. On TCP the parts of HTTP are not known: see [`PolicyAction`]'s evaluation.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OperationMatch {
    /// Without regard to case; with and without port.
    pub hosts: Either<ValueMatch>,
    /// Of the service or workload that is addressed.
    pub ports: Either<u16>,
    /// Upper case.
    pub methods: Either<ValueMatch>,
    /// Normalised, without query.
    pub paths: Either<PathTemplate>,
}

/// A key of `when`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Condition {
    /// What is looked at.
    pub key: ConditionKey,
    /// Values; see [`Either`].
    pub values: Either<ValueMatch>,
}

/// What a condition looks at. Addresses are matched by [`ValueMatch::Cidr`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ConditionKey {
    /// `request.headers[name]`.
    Header(http::HeaderName),
    /// `source.ip`.
    SourceIp,
    /// `remote.ip`.
    RemoteIp,
    /// `source.namespace`.
    SourceNamespace,
    /// `source.principal`.
    SourcePrincipal,
    /// `source.serviceAccount`, as `namespace/name`.
    SourceServiceAccount,
    /// `source.trustDomain`.
    SourceTrustDomain,
    /// `request.auth.principal`.
    RequestPrincipal,
    /// `request.auth.audiences`.
    Audiences,
    /// `request.auth.presenter`.
    Presenter,
    /// `request.auth.claims[a][b]`.
    Claim(Vec<Str>),
    /// `destination.ip`.
    DestinationIp,
    /// `destination.port`.
    DestinationPort,
    /// `connection.sni`.
    Sni,
}

/// A value of a policy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ValueMatch {
    /// The whole text.
    Exact(Str),
    /// Its start.
    Prefix(Str),
    /// Its end.
    Suffix(Str),
    /// Any that is not empty.
    Present,
    /// An address within a range.
    Cidr(IpNet),
    /// A port.
    Port(u16),
}

/// A path of a policy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PathTemplate {
    /// Exact, prefix, suffix, or any.
    Value(ValueMatch),
    /// With `{*}` for one segment and `{**}` for one or more: its parts.
    Template(Vec<TemplatePart>),
}

/// A part of a path template, between slashes.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum TemplatePart {
    /// This segment.
    Literal(Str),
    /// `{*}`: one segment that is not empty.
    One,
    /// `{**}`: one segment or more, which may be empty (as Envoy has it: `/a/{**}` is not `/a`).
    Any,
}
