//! What a scrape reads.

use std::{
    borrow::Cow,
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use prometheus_client::{
    collector::Collector,
    encoding::{
        DescriptorEncoder, EncodeLabel, EncodeLabelSet, EncodeMetric, LabelSetEncoder,
        MetricEncoder,
    },
    metrics::{MetricType, counter::ConstCounter},
};

use super::{Key, Requests, Series, family::Metric};

#[derive(Debug)]
struct Pairs<'a>(Vec<(Cow<'a, str>, Cow<'a, str>)>);

impl EncodeLabelSet for Pairs<'_> {
    fn encode(&self, encoder: &mut LabelSetEncoder<'_>) -> Result<(), fmt::Error> {
        for (name, value) in &self.0 {
            EncodeLabel::encode(&(&**name, &**value), encoder.encode_label())?;
        }
        Ok(())
    }
}

impl Collector for Requests {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        self.forget(self.0.began.elapsed().as_secs());
        let rows = self.rows();
        for metric in Metric::ALL {
            encode(metric, &rows, &mut encoder)?;
        }
        Ok(())
    }
}

fn encode(
    metric: Metric,
    rows: &[(Key, Arc<Series>)],
    encoder: &mut DescriptorEncoder<'_>,
) -> Result<(), fmt::Error> {
    let counter = matches!(
        metric,
        Metric::Requests | Metric::RequestMessages | Metric::ResponseMessages
    );
    let kind = if counter {
        MetricType::Counter
    } else {
        MetricType::Histogram
    };
    // The encoder adds the suffix of counters itself.
    let name = metric.name();
    let name = name.strip_suffix("_total").unwrap_or(name);
    let mut family = encoder.encode_descriptor(name, metric.help(), None, kind)?;
    for (key, series) in rows.iter().filter(|(key, _)| key.has(metric)) {
        let pairs = Pairs(key.pairs());
        let mut encoder = family.encode_family(&pairs)?;
        match metric {
            Metric::Requests => count(&series.requests, encoder)?,
            Metric::RequestMessages => count(&series.request_messages, encoder)?,
            Metric::ResponseMessages => count(&series.response_messages, encoder)?,
            Metric::Duration => series.duration.encode(&mut encoder)?,
            Metric::RequestBytes => series.request_bytes.encode(&mut encoder)?,
            Metric::ResponseBytes => series.response_bytes.encode(&mut encoder)?,
        }
    }
    Ok(())
}

fn count(value: &AtomicU64, encoder: MetricEncoder<'_>) -> Result<(), fmt::Error> {
    ConstCounter::new(value.load(Relaxed)).encode(encoder)
}
