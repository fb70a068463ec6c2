//! The data plane's threads, each with a runtime of its own.
//!
//! A connection, the tunnel that carries it and the tasks of both stay on one lane, so that they wake each other without
//! waking another thread: on a proxy's path that hand-over costs as much as the work. What keeps the lanes even is where
//! a connection begins ([`Lanes::place`]).

use std::{
    cell::Cell,
    io,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
};

use tokio::{
    net::TcpStream,
    runtime::{self, Handle},
};
use tokio_util::sync::{CancellationToken, DropGuard};

thread_local! {
    static CURRENT: Cell<usize> = const { Cell::new(0) };
}

/// Which lane runs the caller; 0 outside all lanes.
pub fn current() -> usize {
    CURRENT.get()
}

/// Handles of the lanes. They end with [`Running`].
#[derive(Clone, Debug)]
pub struct Lanes {
    all: Arc<[Lane]>,
    turn: Arc<AtomicUsize>,
}

#[derive(Debug)]
struct Lane {
    handle: Handle,
    load: Arc<AtomicUsize>,
}

/// The threads. Dropping it ends every task on them, in the background.
#[derive(Debug)]
pub struct Running {
    _end: DropGuard,
}

/// A connection's place. It counts there until it is dropped.
#[derive(Debug)]
pub struct Place {
    index: usize,
    load: Arc<AtomicUsize>,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.load.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Lanes {
    /// The current runtime alone, as it is.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn here() -> Self {
        Self::of(Arc::new([Lane::of(Handle::current())]))
    }

    /// Starts `count` threads, one at least, called `name`.
    ///
    /// # Errors
    /// A thread or its runtime cannot be made.
    pub fn start(count: usize, name: &str) -> io::Result<(Self, Running)> {
        let end = CancellationToken::new();
        let lanes: io::Result<Arc<[Lane]>> = (0..count.max(1))
            .map(|index| spawn(index, name, end.clone()))
            .collect();
        let running = Running {
            _end: end.drop_guard(),
        };
        Ok((Self::of(lanes?), running))
    }

    fn of(all: Arc<[Lane]>) -> Self {
        Self {
            all,
            turn: Arc::default(),
        }
    }

    /// Each one in turn, for what accepts connections: where they arrive is where they stay if they can.
    pub fn in_turn(&self) -> &Handle {
        let turn = self.turn.fetch_add(1, Ordering::Relaxed);
        &self.all[turn % self.all.len()].handle
    }

    /// Where what belongs to no connection runs.
    pub fn home(&self) -> &Handle {
        &self.all[0].handle
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.all.len()
    }

    /// Each one's runtime.
    pub fn handles(&self) -> impl Iterator<Item = &Handle> {
        self.all.iter().map(|lane| &lane.handle)
    }

    /// Where a new connection goes: where there are fewest, and here rather than elsewhere.
    pub fn place(&self) -> Place {
        let loads = self
            .all
            .iter()
            .map(|lane| lane.load.load(Ordering::Relaxed));
        let index = choose(loads, current().min(self.all.len() - 1));
        let load = self.all[index].load.clone();
        load.fetch_add(1, Ordering::Relaxed);
        Place { index, load }
    }

    /// Hands a connection over to its place; answers the runtime there.
    ///
    /// # Errors
    /// It cannot be watched there.
    pub fn settle(&self, stream: TcpStream, place: &Place) -> io::Result<(TcpStream, &Handle)> {
        let handle = &self.all[place.index].handle;
        if self.all.len() == 1 || place.index == current() {
            return Ok((stream, handle));
        }
        let stream = stream.into_std()?;
        let _there = handle.enter();
        Ok((TcpStream::from_std(stream)?, handle))
    }
}

impl Lane {
    fn of(handle: Handle) -> Self {
        Self {
            handle,
            load: Arc::default(),
        }
    }
}

fn choose(loads: impl Iterator<Item = usize> + Clone, here: usize) -> usize {
    let emptiest = loads.clone().enumerate().min_by_key(|(_, load)| *load);
    let (index, least) = emptiest.unwrap_or((here, 0));
    let own = loads.clone().nth(here).unwrap_or(least);
    if own <= least { here } else { index }
}

fn spawn(index: usize, name: &str, end: CancellationToken) -> io::Result<Lane> {
    let runtime = runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let lane = Lane::of(runtime.handle().clone());
    thread::Builder::new()
        .name(name.to_owned())
        .spawn(move || {
            CURRENT.set(index);
            runtime.block_on(end.cancelled());
            runtime.shutdown_background();
        })?;
    Ok(lane)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_connection_stays_where_it_arrives_unless_another_lane_has_fewer() {
        assert_eq!(choose([0, 0].into_iter(), 1), 1);
        assert_eq!(choose([0, 1].into_iter(), 1), 0);
        assert_eq!(choose([2, 1].into_iter(), 1), 1);
        assert_eq!(choose([3, 2, 1].into_iter(), 0), 2);
    }

    #[test]
    fn lanes_stay_even_and_are_left_when_a_connection_ends() {
        let (lanes, _running) = Lanes::start(3, "lane").expect("threads");
        let places: Vec<_> = (0..30).map(|_| lanes.place()).collect();
        let loads = || {
            lanes
                .all
                .iter()
                .map(|lane| lane.load.load(Ordering::Relaxed))
        };
        assert!(
            loads().all(|load| load == 10),
            "{:?}",
            loads().collect::<Vec<_>>()
        );
        drop(places);
        assert_eq!(loads().sum::<usize>(), 0);
    }

    #[test]
    fn tasks_of_a_connection_stay_on_its_lane() {
        let (lanes, _running) = Lanes::start(2, "lane").expect("threads");
        let (tell, told) = std::sync::mpsc::channel();
        for handle in lanes.handles() {
            let tell = tell.clone();
            handle.spawn(async move {
                let nested = tokio::spawn(async { current() });
                tell.send((current(), nested.await.expect("no panic")))
            });
        }
        drop(tell);
        let mut seen: Vec<_> = told.iter().collect();
        seen.sort_unstable();
        assert_eq!(seen, [(0, 0), (1, 1)]);
    }

    #[test]
    fn tasks_end_with_the_lanes() {
        let (lanes, running) = Lanes::start(1, "lane").expect("threads");
        let (alive, dropped) = std::sync::mpsc::channel::<()>();
        lanes.home().spawn(async move {
            let _alive = alive;
            std::future::pending::<()>().await;
        });
        drop(running);
        let ended = dropped.recv_timeout(std::time::Duration::from_secs(30));
        assert_eq!(ended, Err(std::sync::mpsc::RecvTimeoutError::Disconnected));
    }
}
