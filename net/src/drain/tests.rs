use std::future::pending;

use super::*;

#[tokio::test(start_paused = true)]
async fn finishes_when_the_last_watch_is_dropped() {
    let (trigger, watch) = channel();
    let worker = tokio::spawn(async move {
        let mut watch = watch;
        watch.started().await
    });
    let mode = Mode::graceful(Duration::from_secs(60));
    assert_eq!(trigger.drain(mode).await, Completion::Finished);
    assert_eq!(worker.await.expect("no panic"), mode);
}

#[tokio::test(start_paused = true)]
async fn is_forced_at_the_deadline() {
    let (trigger, watch) = channel();
    let started = Instant::now();
    let worker = tokio::spawn(watch.until_forced(pending::<()>()));
    let grace = Duration::from_secs(25);
    let ended = trigger.drain(Mode::graceful(grace)).await;
    assert_eq!(ended, Completion::Forced);
    assert_eq!(worker.await.expect("no panic"), None);
    assert_eq!(started.elapsed().as_secs(), grace.as_secs());
}

#[tokio::test(start_paused = true)]
async fn an_immediate_drain_cuts_at_once() {
    let (trigger, watch) = channel();
    let worker = tokio::spawn(watch.until_forced(pending::<()>()));
    assert_eq!(trigger.drain(Mode::Immediate).await, Completion::Forced);
    assert_eq!(worker.await.expect("no panic"), None);
}

#[tokio::test(start_paused = true)]
async fn a_drain_can_only_be_shortened() {
    let (trigger, mut watch) = channel();
    trigger.start(Mode::graceful(Duration::from_secs(60)));
    let sooner = Mode::graceful(Duration::from_secs(5));
    trigger.start(sooner);
    trigger.start(Mode::graceful(Duration::from_secs(90)));
    assert_eq!(watch.mode(), Some(sooner));
    trigger.start(Mode::Immediate);
    trigger.start(sooner);
    assert_eq!(watch.started().await, Mode::Immediate);
}

#[tokio::test(start_paused = true)]
async fn a_deadline_that_is_brought_forward_is_kept() {
    let (trigger, mut watch) = channel();
    trigger.start(Mode::graceful(Duration::from_secs(60)));
    let began = Instant::now();
    let worker = tokio::spawn(async move {
        watch.forced().await;
        began.elapsed()
    });
    tokio::task::yield_now().await;
    trigger.start(Mode::graceful(Duration::from_secs(2)));
    let took = worker.await.expect("no panic");
    assert!(took < Duration::from_secs(3), "{took:?}");
}

#[tokio::test(start_paused = true)]
async fn a_dropped_trigger_ends_nothing() {
    let (trigger, mut watch) = channel();
    drop(trigger);
    let waited = tokio::time::timeout(Duration::from_secs(3600), watch.started()).await;
    assert!(waited.is_err());
}

#[tokio::test(start_paused = true)]
async fn a_released_watch_hears_and_holds_nothing_up() {
    let (trigger, watch) = channel();
    let mut released = watch.release();
    let ended = trigger.drain(Mode::graceful(Duration::from_secs(60))).await;
    assert_eq!(ended, Completion::Finished);
    assert!(matches!(released.started().await, Mode::Graceful { .. }));
}

#[tokio::test(start_paused = true)]
async fn work_that_is_done_in_time_gives_its_result() {
    let (trigger, watch) = channel();
    trigger.start(Mode::graceful(Duration::from_secs(5)));
    assert_eq!(watch.until_forced(async { 7 }).await, Some(7));
}
