//! What a scrape reads.

use std::sync::{Arc, atomic::Ordering::Relaxed};

use net::metrics::{Families, Text};

use super::{Key, Requests, Series, family::Metric};

impl Families for Requests {
    fn write(&self, text: &mut Text<'_>) {
        self.forget(self.0.began.elapsed().as_secs());
        let rows = self.rows();
        for metric in Metric::ALL {
            family(metric, &rows, text);
        }
    }
}

fn family(metric: Metric, rows: &[(Key, Arc<Series>)], text: &mut Text<'_>) {
    let (name, help) = (metric.name(), metric.help());
    match name.strip_suffix("_total") {
        Some(name) => text.counters(name, help),
        None => text.histograms(name, help),
    }
    for (key, series) in rows.iter().filter(|(key, _)| key.has(metric)) {
        let labels = key.pairs();
        match metric {
            Metric::Requests => text.counter(&labels, series.requests.load(Relaxed)),
            Metric::RequestMessages => {
                text.counter(&labels, series.request_messages.load(Relaxed));
            }
            Metric::ResponseMessages => {
                text.counter(&labels, series.response_messages.load(Relaxed));
            }
            Metric::Duration => series.duration.write(text, &labels),
            Metric::RequestBytes => series.request_bytes.write(text, &labels),
            Metric::ResponseBytes => series.response_bytes.write(text, &labels),
        }
    }
}
