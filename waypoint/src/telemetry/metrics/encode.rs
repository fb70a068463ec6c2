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
        let counter = match metric {
            Metric::Requests => &series.requests,
            Metric::RequestMessages => &series.request_messages,
            Metric::ResponseMessages => &series.response_messages,
            Metric::Duration => {
                series.duration.write(text, &labels);
                continue;
            }
            Metric::RequestBytes => {
                series.request_bytes.write(text, &labels);
                continue;
            }
            Metric::ResponseBytes => {
                series.response_bytes.write(text, &labels);
                continue;
            }
        };
        text.counter(&labels, counter.load(Relaxed));
    }
}
