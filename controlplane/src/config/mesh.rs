//! The mesh's own configuration: the part of upstream's MeshConfig that means something here.

use std::{io, path::Path};

use ::mesh::identity::TrustDomain;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use serde::Deserialize;

use crate::{
    source::{
        read::read,
        tree::{ParseError, parse},
    },
    translate::{l7::istio::mesh::FIELDS, scope::ScopeRule, visibility::EntryVisibility},
};

/// What is read of it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct MeshConfig {
    /// `trustDomain`.
    pub trust_domain: Option<TrustDomain>,
    /// `trustDomainAliases`: other names of the trust domain in policies.
    pub trust_domain_aliases: Vec<TrustDomain>,
    /// `rootNamespace`.
    pub root_namespace: Option<String>,
    /// `discoverySelectors`: ORed; none selects every namespace.
    pub discovery_selectors: Vec<LabelSelector>,
    /// `serviceEntryVisibility`.
    pub entry_visibility: Option<EntryVisibility>,
    /// `serviceScopeConfigs`: which services are global.
    pub service_scopes: Option<Vec<ScopeRule>>,
    /// The whole, of which [`MeshSettings`](crate::translate::l7::istio::mesh::MeshSettings) reads more.
    pub document: serde_json::Value,
    /// Fields that are there and have no effect here, by name.
    pub without_effect: Vec<String>,
}

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum MeshConfigError {
    /// Reading the file.
    #[error("read the mesh's configuration")]
    Read(#[source] io::Error),
    /// It is not YAML.
    #[error("parse the mesh's configuration")]
    Parse(#[from] ParseError),
    /// A field that matters has a value that cannot be meant.
    #[error("the mesh's configuration has mistakes: {0}")]
    Invalid(String),
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Wire {
    trust_domain: Option<String>,
    trust_domain_aliases: Vec<String>,
    root_namespace: Option<String>,
    discovery_selectors: Vec<LabelSelector>,
    service_entry_visibility: Option<EntryVisibility>,
    service_scope_configs: Option<Vec<ScopeRule>>,
}

impl MeshConfig {
    /// Reads the file; one that is not there is an empty one.
    pub fn load(path: &Path) -> Result<Self, MeshConfigError> {
        match std::fs::read_to_string(path) {
            Ok(text) => Self::parse(&text),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Self::default()),
            Err(error) => Err(MeshConfigError::Read(error)),
        }
    }

    /// The fields that are read once, at the start, and say something else in `now`: who proxies are, and whom they trust.
    pub fn needs_restart(&self, now: &Self) -> Vec<&'static str> {
        let fields = [
            ("trustDomain", self.trust_domain != now.trust_domain),
            ("rootNamespace", self.root_namespace != now.root_namespace),
        ];
        let changed = fields.into_iter().filter(|(_, changed)| *changed);
        changed.map(|(field, _)| field).collect()
    }

    /// Reads the YAML. Fields that are unknown are named and tolerated: most of upstream's are for sidecars.
    pub fn parse(text: &str) -> Result<Self, MeshConfigError> {
        let Some(document) = parse(text)?.into_iter().next() else {
            return Ok(Self::default());
        };
        let (wire, faults) = read::<Wire>(&document);
        let (unknown, wrong): (Vec<_>, Vec<_>) = faults.into_iter().partition(|fault| {
            fault.problem.starts_with("unknown field") && !fault.path.contains('.')
        });
        let wrong: Vec<String> = wrong.iter().map(ToString::to_string).collect();
        let invalid = |problem: String| MeshConfigError::Invalid(problem);
        let Some(wire) = wire.filter(|_| wrong.is_empty()) else {
            return Err(invalid(wrong.join("; ")));
        };
        let given = |text: Option<String>| text.filter(|text| !text.is_empty());
        let domain = |field: &str, text: String| {
            let parsed: Result<TrustDomain, _> = text.parse();
            parsed.map_err(|error| invalid(format!("{field}: {text:?}: {error}")))
        };
        let trust_domain = given(wire.trust_domain).map(|text| domain("trustDomain", text));
        let aliases = wire.trust_domain_aliases.into_iter();
        let aliases = aliases.map(|text| domain("trustDomainAliases", text));
        Ok(Self {
            trust_domain: trust_domain.transpose()?,
            trust_domain_aliases: aliases.collect::<Result<_, _>>()?,
            root_namespace: given(wire.root_namespace),
            discovery_selectors: wire.discovery_selectors,
            entry_visibility: wire.service_entry_visibility,
            service_scopes: wire.service_scope_configs,
            document: read(&document).0.unwrap_or_default(),
            without_effect: unknown
                .into_iter()
                .map(|fault| fault.path)
                .filter(|field| !FIELDS.contains(&field.as_str()))
                .collect(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_matters_is_read_and_what_does_not_is_named() {
        let config = MeshConfig::parse(
            "trustDomain: example.org
trustDomainAliases: [old.example]
rootNamespace: mesh
accessLogFile: /dev/stdout
enableAutoMtls: true
discoverySelectors:
- matchLabels: {mesh: 'yes'}
- matchExpressions: [{key: team, operator: In, values: [a, b]}]
serviceEntryVisibility:
  defaultVisibility: NAMESPACE
  policies: [{visibility: NONE, matchingRules: [{namespaceSelector: {matchLabels: {a: b}}}]}]
serviceScopeConfigs:
- {servicesSelector: {matchLabels: {istio.io/global: 'true'}}, scope: GLOBAL}
",
        )
        .unwrap();
        assert_eq!(config.trust_domain.unwrap().as_str(), "example.org");
        assert_eq!(config.trust_domain_aliases[0].as_str(), "old.example");
        assert_eq!(config.root_namespace.as_deref(), Some("mesh"));
        assert_eq!(config.discovery_selectors.len(), 2);
        assert_eq!(config.entry_visibility.unwrap().policies.len(), 1);
        assert_eq!(config.service_scopes.unwrap().len(), 1);
        assert_eq!(config.document["accessLogFile"], "/dev/stdout");
        assert_eq!(config.without_effect, ["enableAutoMtls"]);
    }

    #[test]
    fn what_takes_effect_at_the_next_start_only_is_named() {
        let before = MeshConfig::parse("rootNamespace: mesh").unwrap();
        let now = "trustDomain: example.org
trustDomainAliases: [old.example]
rootNamespace: mesh
discoverySelectors: [{matchLabels: {a: b}}]
serviceEntryVisibility: {defaultVisibility: NONE}";
        let now = MeshConfig::parse(now).unwrap();
        assert_eq!(before.needs_restart(&now), ["trustDomain"]);
        assert!(now.needs_restart(&now).is_empty());
    }

    #[test]
    fn mistakes_in_what_matters_are_refused() {
        for text in [
            "trustDomain: [a]",
            "trustDomain: Not_One",
            "trustDomainAliases: [ok.example, Not_One]",
            "discoverySelectors: {matchLabels: {a: b}}",
            "discoverySelectors: [{matchLables: {a: b}}]",
            "serviceEntryVisibility: {defaultVisibility: SOME}",
            "serviceScopeConfigs: [{scope: EVERYWHERE}]",
            "serviceScopeConfigs: [{serviceSelector: {}, scope: GLOBAL}]",
            "a: [",
        ] {
            assert!(MeshConfig::parse(text).is_err(), "{text}");
        }
        assert_eq!(MeshConfig::parse("").unwrap(), MeshConfig::default());
    }
}
