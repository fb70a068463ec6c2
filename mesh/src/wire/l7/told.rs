//! Tokens, and what is told of requests. A rule on tokens that cannot be understood refuses its issuer's tokens; a
//! detail of telemetry that cannot be understood is left out.

use std::time::Duration;

use proto::waypoint as wire;

use super::{
    InvalidResource, Result, header_name, list, missing, optional_duration, pair, pairs, parsed,
    text, texts, wire_duration, wire_list, wire_optional, wire_pairs, wire_text, wire_texts,
};
use crate::l7::{
    request_authentication::{Jwks, JwtRule, RequestAuthentication, TokenPlace},
    telemetry::{AccessLogging, MetricOptions, MetricOverride, TagSource, Telemetry, Tracing},
};

impl TryFrom<&wire::RequestAuthentication> for RequestAuthentication {
    type Error = InvalidResource;

    fn try_from(wire: &wire::RequestAuthentication) -> Result<Self> {
        Ok(Self {
            key: parsed("key", &wire.key)?,
            targets: list("targets", &wire.targets)?,
            rules: list("rules", &wire.rules)?,
        })
    }
}

impl From<&RequestAuthentication> for wire::RequestAuthentication {
    fn from(it: &RequestAuthentication) -> Self {
        Self {
            key: it.key.to_string(),
            targets: wire_list(&it.targets),
            rules: wire_list(&it.rules),
        }
    }
}

impl TryFrom<&wire::JwtRule> for JwtRule {
    type Error = InvalidResource;

    fn try_from(wire: &wire::JwtRule) -> Result<Self> {
        if wire.issuer.is_empty() {
            return Err(missing("issuer"));
        }
        Ok(understood_rule(wire).unwrap_or_else(|fault| closed_rule(wire, &fault)))
    }
}

/// Refuses what the issuer's tokens in the default places ask for.
fn closed_rule(wire: &wire::JwtRule, fault: &InvalidResource) -> JwtRule {
    JwtRule {
        issuer: wire.issuer.as_str().into(),
        audiences: Vec::new(),
        keys: Jwks::Unavailable(fault.to_string().into()),
        keys_from: None,
        from: Vec::new(),
        payload_header: None,
        claim_headers: Vec::new(),
        forward_token: false,
        space_delimited_claims: Vec::new(),
        timeout: Duration::ZERO,
    }
}

fn understood_rule(wire: &wire::JwtRule) -> Result<JwtRule> {
    use wire::jwt_rule::Jwks as Wire;
    let keys = match &wire.jwks {
        Some(Wire::Keys(it)) => Jwks::Keys(it.as_str().into()),
        Some(Wire::Unavailable(it)) => Jwks::Unavailable(it.as_str().into()),
        None => return Err(missing("jwks")),
    };
    let payload = wire.payload_header.as_ref();
    let claim = |it: &wire::ClaimHeader| {
        let header = header_name("claim_headers", &it.header)?;
        Ok((header, texts(&it.claim)))
    };
    Ok(JwtRule {
        issuer: wire.issuer.as_str().into(),
        audiences: texts(&wire.audiences),
        keys,
        keys_from: wire.keys_from.as_deref().map(Into::into),
        from: list("from", &wire.from)?,
        payload_header: payload
            .map(|it| header_name("payload_header", it))
            .transpose()?,
        claim_headers: wire
            .claim_headers
            .iter()
            .map(claim)
            .collect::<Result<_>>()?,
        forward_token: wire.forward_token,
        space_delimited_claims: texts(&wire.space_delimited_claims),
        timeout: optional_duration("timeout", wire.timeout)?.unwrap_or_default(),
    })
}

impl From<&JwtRule> for wire::JwtRule {
    fn from(it: &JwtRule) -> Self {
        use wire::jwt_rule::Jwks as Wire;
        let keys = match &it.keys {
            Jwks::Keys(it) => Wire::Keys(it.to_string()),
            Jwks::Unavailable(it) => Wire::Unavailable(it.to_string()),
        };
        let claims = it.claim_headers.iter();
        let claims = claims.map(|(header, claim)| wire::ClaimHeader {
            header: header.to_string(),
            claim: wire_texts(claim),
        });
        Self {
            issuer: it.issuer.to_string(),
            audiences: wire_texts(&it.audiences),
            jwks: Some(keys),
            keys_from: it.keys_from.as_ref().map(ToString::to_string),
            from: wire_list(&it.from),
            payload_header: it.payload_header.as_ref().map(ToString::to_string),
            claim_headers: claims.collect(),
            forward_token: it.forward_token,
            space_delimited_claims: wire_texts(&it.space_delimited_claims),
            timeout: Some(wire_duration(it.timeout)),
        }
    }
}

impl TryFrom<&wire::TokenPlace> for TokenPlace {
    type Error = InvalidResource;

    fn try_from(wire: &wire::TokenPlace) -> Result<Self> {
        use wire::token_place::Kind;
        match &wire.kind {
            Some(Kind::Header(it)) => Ok(Self::Header {
                name: header_name("header.name", &it.name)?,
                prefix: it.prefix.as_str().into(),
            }),
            Some(Kind::Query(it)) => Ok(Self::Query(it.as_str().into())),
            Some(Kind::Cookie(it)) => Ok(Self::Cookie(it.as_str().into())),
            None => Err(missing("kind")),
        }
    }
}

impl From<&TokenPlace> for wire::TokenPlace {
    fn from(it: &TokenPlace) -> Self {
        use wire::token_place::Kind;
        let kind = match it {
            TokenPlace::Header { name, prefix } => Kind::Header(wire::TokenHeader {
                name: name.to_string(),
                prefix: prefix.to_string(),
            }),
            TokenPlace::Query(it) => Kind::Query(it.to_string()),
            TokenPlace::Cookie(it) => Kind::Cookie(it.to_string()),
        };
        Self { kind: Some(kind) }
    }
}

impl TryFrom<&wire::Telemetry> for Telemetry {
    type Error = InvalidResource;

    fn try_from(wire: &wire::Telemetry) -> Result<Self> {
        let overrides = wire.metrics.iter().map(|it| MetricOverride {
            metric: text(it.metric.as_ref()),
            disabled: it.disabled,
            tags: pairs(&it.tags),
        });
        let logs = wire.access_logs.as_ref();
        Ok(Self {
            key: parsed("key", &wire.key)?,
            targets: list("targets", &wire.targets)?,
            metrics: MetricOptions {
                overrides: overrides.collect(),
            },
            access_logs: logs.map(|it| it.logs.iter().map(access_logging).collect()),
            tracing: wire.tracing.as_ref().map(tracing),
        })
    }
}

fn access_logging(wire: &wire::AccessLogging) -> AccessLogging {
    AccessLogging {
        providers: texts(&wire.providers),
        disabled: wire.disabled,
        filter: text(wire.filter.as_ref()),
    }
}

fn tracing(wire: &wire::Tracing) -> Tracing {
    let tag = |it: &wire::Tag| Some((it.name.as_str().into(), tag_source(it.source.as_ref()?)));
    Tracing {
        providers: texts(&wire.providers),
        sampling_per_million: wire.sampling_per_million,
        disabled: wire.disabled,
        tags: wire.tags.iter().filter_map(tag).collect(),
        propagation_disabled: wire.propagation_disabled,
        sampling_by_chance: wire.sampling_by_chance,
        istio_tags_disabled: wire.istio_tags_disabled,
    }
}

fn tag_source(wire: &wire::tag::Source) -> TagSource {
    use wire::tag::Source;
    match wire {
        Source::Literal(it) => TagSource::Literal(it.as_str().into()),
        Source::Environment(it) => {
            let (name, default) = pair(it);
            TagSource::Environment(name, default)
        }
        Source::Header(it) => {
            let (name, default) = pair(it);
            TagSource::Header(name, default)
        }
    }
}

impl From<&Telemetry> for wire::Telemetry {
    fn from(it: &Telemetry) -> Self {
        let logs = it.access_logs.as_ref();
        Self {
            key: it.key.to_string(),
            targets: wire_list(&it.targets),
            metrics: wire_list(&it.metrics.overrides),
            access_logs: logs.map(|it| wire::AccessLogs {
                logs: wire_list(it),
            }),
            tracing: wire_optional(it.tracing.as_ref()),
        }
    }
}

impl From<&MetricOverride> for wire::MetricOverride {
    fn from(it: &MetricOverride) -> Self {
        Self {
            metric: wire_text(it.metric.as_ref()),
            disabled: it.disabled,
            tags: wire_pairs(&it.tags),
        }
    }
}

impl From<&AccessLogging> for wire::AccessLogging {
    fn from(it: &AccessLogging) -> Self {
        Self {
            providers: wire_texts(&it.providers),
            disabled: it.disabled,
            filter: wire_text(it.filter.as_ref()),
        }
    }
}

impl From<&Tracing> for wire::Tracing {
    fn from(it: &Tracing) -> Self {
        use wire::tag::Source;
        let pair = |name: &crate::names::Str, default: &Option<crate::names::Str>| wire::Pair {
            key: name.to_string(),
            value: wire_text(default.as_ref()),
        };
        let tags = it.tags.iter().map(|(name, source)| wire::Tag {
            name: name.to_string(),
            source: Some(match source {
                TagSource::Literal(it) => Source::Literal(it.to_string()),
                TagSource::Environment(name, default) => Source::Environment(pair(name, default)),
                TagSource::Header(name, default) => Source::Header(pair(name, default)),
            }),
        });
        Self {
            providers: wire_texts(&it.providers),
            sampling_per_million: it.sampling_per_million,
            disabled: it.disabled,
            tags: tags.collect(),
            propagation_disabled: it.propagation_disabled,
            sampling_by_chance: it.sampling_by_chance,
            istio_tags_disabled: it.istio_tags_disabled,
        }
    }
}
