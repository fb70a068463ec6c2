//! Gauges of the process and of its runtime, read at each scrape.

use std::{fmt, fs};

use nix::sys::resource::{Resource, getrlimit};
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeCounterValue, EncodeMetric},
    metrics::{MetricType, counter::ConstCounter, gauge::ConstGauge},
    registry::Registry,
};
use tokio::runtime::{Handle, RuntimeMetrics};

#[derive(Debug)]
struct Process {
    runtimes: Vec<Handle>,
}

/// Registers open and maximum descriptors, and for `runtimes`, if there are any, their workers, queues and tasks together.
pub fn register(registry: &mut Registry, runtimes: Vec<Handle>) {
    registry.register_collector(Box::new(Process { runtimes }));
}

impl Collector for Process {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        if let Ok(open) = fs::read_dir("/proc/self/fd") {
            // One of them reads the folder.
            let open = open.count().saturating_sub(1);
            gauge(
                &mut encoder,
                "process_open_fds",
                "Open descriptors",
                open as u64,
            )?;
        }
        if let Ok((soft, _)) = getrlimit(Resource::RLIMIT_NOFILE) {
            gauge(
                &mut encoder,
                "process_max_fds",
                "Limit of descriptors",
                soft,
            )?;
        }
        if let Some(memory) = resident_bytes() {
            let name = "process_resident_memory_bytes";
            gauge(&mut encoder, name, "Resident memory", memory)?;
        }
        if self.runtimes.is_empty() {
            return Ok(());
        }
        encode_runtimes(&mut encoder, &self.runtimes)
    }
}

fn encode_runtimes(
    encoder: &mut DescriptorEncoder<'_>,
    runtimes: &[Handle],
) -> Result<(), fmt::Error> {
    let mut row = |name, help, of: fn(&RuntimeMetrics) -> usize| {
        let each = runtimes.iter().map(|runtime| of(&runtime.metrics()));
        gauge(encoder, name, help, each.sum::<usize>() as u64)
    };
    row(
        "tokio_num_workers",
        "Worker threads of the runtime",
        RuntimeMetrics::num_workers,
    )?;
    row(
        "tokio_global_queue_depth",
        "Tasks in the runtime's global queue",
        RuntimeMetrics::global_queue_depth,
    )?;
    row(
        "tokio_num_alive_tasks",
        "Tasks of the runtime that have not ended",
        RuntimeMetrics::num_alive_tasks,
    )?;
    encode_workers(encoder, runtimes)
}

/// What each worker has done, numbered through all runtimes.
fn encode_workers(
    encoder: &mut DescriptorEncoder<'_>,
    runtimes: &[Handle],
) -> Result<(), fmt::Error> {
    counters(
        encoder,
        ("tokio_worker_total_busy_duration_seconds", "Time at work"),
        workers(runtimes, |runtime, worker| {
            runtime.worker_total_busy_duration(worker).as_secs_f64()
        }),
    )?;
    counters(
        encoder,
        ("tokio_worker_park_count", "Times that it went to sleep"),
        workers(runtimes, RuntimeMetrics::worker_park_count),
    )?;
    counters(
        encoder,
        (
            "tokio_worker_park_unpark_count",
            "Times that it went to sleep or woke; odd: it sleeps",
        ),
        workers(runtimes, RuntimeMetrics::worker_park_unpark_count),
    )
}

fn workers<N>(
    runtimes: &[Handle],
    of: impl Fn(&RuntimeMetrics, usize) -> N,
) -> impl Iterator<Item = N> {
    runtimes.iter().flat_map(move |runtime| {
        let metrics = runtime.metrics();
        let each = (0..metrics.num_workers()).map(|worker| of(&metrics, worker));
        each.collect::<Vec<_>>()
    })
}

fn counters<N: EncodeCounterValue>(
    encoder: &mut DescriptorEncoder<'_>,
    (name, help): (&str, &str),
    values: impl Iterator<Item = N>,
) -> Result<(), fmt::Error> {
    let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
    for (worker, value) in values.enumerate() {
        let labels = [("worker", worker.to_string())];
        let metric = family.encode_family(&labels)?;
        ConstCounter::new(value).encode(metric)?;
    }
    Ok(())
}

fn gauge(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    value: u64,
) -> Result<(), fmt::Error> {
    let value = ConstGauge::new(value);
    let metric = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
    value.encode(metric)
}

/// Resident memory of this process. Source: proc_pid_statm(5), second field, in pages.
pub fn resident_bytes() -> Option<u64> {
    let text = fs::read_to_string("/proc/self/statm").ok()?;
    let pages: u64 = text.split_whitespace().nth(1)?.parse().ok()?;
    let page = nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE).ok()??;
    pages.checked_mul(u64::try_from(page).ok()?)
}
