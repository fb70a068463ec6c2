//! How a node's certificates stand, read at each scrape: what an alarm is set on before connections fail.

use std::{
    fmt,
    time::{SystemTime, UNIX_EPOCH},
};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric},
    metrics::{MetricType, gauge::ConstGauge},
    registry::Registry,
};

use crate::ca::{CertificateState, Certificates};

struct Source(Certificates);

impl fmt::Debug for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Certificates")
    }
}

/// How many certificates stand how, and when the first of them ends.
#[derive(Debug, Default, PartialEq, Eq)]
struct Summary {
    available: u64,
    initializing: u64,
    unavailable: u64,
    earliest: Option<SystemTime>,
}

/// Registers `leyline_certificates{state}` and the Unix time at which the first certificate that there is ends; a
/// series per identity would be as many as service accounts.
pub fn register(registry: &mut Registry, certificates: Certificates) {
    registry.register_collector(Box::new(Source(certificates)));
}

impl<'s> FromIterator<&'s CertificateState> for Summary {
    fn from_iter<I: IntoIterator<Item = &'s CertificateState>>(states: I) -> Self {
        let mut summary = Self::default();
        for state in states {
            match state {
                CertificateState::Initializing => summary.initializing += 1,
                CertificateState::Unavailable(_) => summary.unavailable += 1,
                CertificateState::Available(certificate) => {
                    let ends = certificate.not_after();
                    summary.available += 1;
                    summary.earliest =
                        Some(summary.earliest.map_or(ends, |earliest| earliest.min(ends)));
                }
            }
        }
        summary
    }
}

impl Collector for Source {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let states = self.0.states();
        let summary: Summary = states.iter().map(|(_, state)| state).collect();
        summary.encode(&mut encoder)
    }
}

impl Summary {
    fn encode(&self, encoder: &mut DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let help = "Certificates of this node's identities, by how they stand";
        let kind = MetricType::Gauge;
        let mut family = encoder.encode_descriptor("leyline_certificates", help, None, kind)?;
        for (state, count) in [
            ("available", self.available),
            ("initializing", self.initializing),
            ("unavailable", self.unavailable),
        ] {
            let labels = [("state", state)];
            ConstGauge::new(count).encode(family.encode_family(&labels)?)?;
        }
        let Some(seconds) = self
            .earliest
            .and_then(|ends| ends.duration_since(UNIX_EPOCH).ok())
        else {
            return Ok(());
        };
        let name = "leyline_certificates_earliest_expiry_timestamp_seconds";
        let help = "When the first certificate of this node ends, in Unix seconds";
        let metric = encoder.encode_descriptor(name, help, None, kind)?;
        ConstGauge::new(seconds.as_secs()).encode(metric)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::{
        ca::IssueError,
        clock::SystemClock,
        testing::TestCa,
        tls::{KeyExchange, Policy, Versions},
    };

    #[test]
    fn the_first_to_end_is_told_and_each_is_counted_by_how_it_stands() {
        let clock = Arc::new(SystemClock);
        let policy = Policy::new(Versions::Tls13, KeyExchange::Default, clock);
        let hours = |hours: u64| {
            let lifetime = std::time::Duration::from_secs(hours * 3600);
            let ca = TestCa::new("cluster.local", &policy).with_lifetime(lifetime);
            ca.certificate(&ca.identity("a", "b"))
        };
        let (long, short) = (hours(24), hours(1));
        let states = [
            CertificateState::Available(long),
            CertificateState::Available(short.clone()),
            CertificateState::Initializing,
            CertificateState::Unavailable(Arc::new(IssueError::Header("x".to_owned()))),
        ];
        let expected = Summary {
            available: 2,
            initializing: 1,
            unavailable: 1,
            earliest: Some(short.not_after()),
        };
        assert_eq!(states.iter().collect::<Summary>(), expected);
        assert_eq!([].iter().collect::<Summary>(), Summary::default());
    }
}
