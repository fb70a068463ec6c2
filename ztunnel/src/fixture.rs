//! What the tests of several modules share: a workload, and what is logged.

use std::{
    io::{self, Write},
    sync::Arc,
};

use mesh::{names::WorkloadUid, workload::Workload};
use net::log;
use parking_lot::Mutex;

/// The record of pod `web-1` of account `web` in namespace `shop`.
pub(crate) fn workload() -> Workload {
    let uid = WorkloadUid("Kubernetes//Pod/shop/web-1".into());
    let mut it = Workload::new(uid, "web-1".into(), "shop".into());
    it.service_account = "web".into();
    it.set_workload_name("web".into());
    it.canonical_name = "web-canonical".into();
    it.canonical_revision = "v2".into();
    it
}

#[derive(Clone, Default)]
struct Output(Arc<Mutex<Vec<u8>>>);

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The plain lines that `log` writes at `filter`, without their time.
pub(crate) fn lines(filter: &str, log: impl FnOnce()) -> Vec<String> {
    let options = log::Options {
        filter: filter.to_owned(),
        ..log::Options::default()
    };
    let output = Output::default();
    let (subscriber, handle) = log::subscriber(&options, output.clone()).expect("a good filter");
    tracing::subscriber::with_default(subscriber, log);
    handle.flush();
    let text = String::from_utf8(output.0.lock().clone()).expect("text");
    let untimed = text.lines().filter_map(|line| line.split_once('\t'));
    untimed.map(|(_, rest)| rest.to_owned()).collect()
}
