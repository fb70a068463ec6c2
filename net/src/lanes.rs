//! The data plane's threads, each with a runtime of its own.
//!
//! A connection, the tunnel that carries it and the tasks of both stay on one lane, so that they wake each other without
//! waking another thread: on a proxy's path that hand-over costs as much as the work. What keeps the lanes even is where
//! a connection begins ([`Lanes::place`]): with fewest connections, of those that stay. Brief ones are left where they are
//! accepted, as their moving costs more than their weight, while that lane has time for them: how many of a lane's are brief
//! is told by those that ended, and its time by what its thread has used of its processor meanwhile.

use std::{
    cell::Cell,
    io,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use nix::sys::{
    resource::{UsageWho, getrusage},
    time::TimeValLike,
};
use parking_lot::Mutex;
use tokio::{
    net::TcpStream,
    runtime::{self, Handle},
};
use tokio_util::sync::{CancellationToken, DropGuard};

mod brief;

use brief::Brief;

thread_local! {
    static CURRENT: Cell<Option<usize>> = const { Cell::new(None) };
}

/// Which lane runs the caller; 0 outside all lanes.
pub fn current() -> usize {
    CURRENT.get().unwrap_or(0)
}

/// What a lane's thread has used of its processor; `None` where the caller is on another one.
fn used_by(index: usize) -> Option<Duration> {
    if CURRENT.get() != Some(index) {
        return None;
    }
    let usage = getrusage(UsageWho::RUSAGE_THREAD).ok()?;
    let used = usage.user_time() + usage.system_time();
    u64::try_from(used.num_microseconds())
        .ok()
        .map(Duration::from_micros)
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
    load: Arc<Load>,
}

/// The connections of a lane.
#[derive(Debug)]
struct Load {
    open: AtomicUsize,
    brief: Mutex<Brief>,
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
    load: Arc<Load>,
    since: Instant,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.load.open.fetch_sub(1, Ordering::Relaxed);
        let now = Instant::now();
        let life = now.saturating_duration_since(self.since);
        let used = || used_by(self.index);
        self.load.brief.lock().ended(life, now, used);
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

    /// Where a new connection goes: where there are fewest that stay, and here rather than elsewhere.
    pub fn place(&self) -> Place {
        self.place_at(Instant::now())
    }

    fn place_at(&self, since: Instant) -> Place {
        let index = match &*self.all {
            [_] => 0,
            all => {
                let loads = all.iter().map(|lane| lane.load.staying(since));
                choose(loads, current().min(all.len() - 1))
            }
        };
        let load = self.all[index].load.clone();
        load.open.fetch_add(1, Ordering::Relaxed);
        Place { index, load, since }
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
            load: Arc::new(Load {
                open: AtomicUsize::new(0),
                brief: Mutex::new(Brief::new(Instant::now())),
            }),
        }
    }
}

impl Load {
    /// The connections that will still be open in a moment, as far as can be told.
    fn staying(&self, now: Instant) -> usize {
        let open = self.open.load(Ordering::Relaxed);
        match open {
            0 => 0,
            _ => open.saturating_sub(self.brief.lock().staying_here(now)),
        }
    }
}

/// Which lane has the least of these loads, and `here` where none has less.
fn choose(loads: impl Iterator<Item = usize>, here: usize) -> usize {
    let order = |(index, load): &(usize, usize)| (*load, *index != here, *index);
    let emptiest = loads.enumerate().min_by_key(order);
    emptiest.map_or(here, |(index, _)| index)
}

fn spawn(index: usize, name: &str, end: CancellationToken) -> io::Result<Lane> {
    let runtime = runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let lane = Lane::of(runtime.handle().clone());
    thread::Builder::new()
        .name(name.to_owned())
        .spawn(move || {
            CURRENT.set(Some(index));
            runtime.block_on(end.cancelled());
            runtime.shutdown_background();
        })?;
    Ok(lane)
}

#[cfg(test)]
mod tests {
    use std::{cmp::Reverse, collections::BinaryHeap};

    use super::*;

    #[test]
    fn a_connection_stays_where_it_arrives_unless_another_lane_has_fewer() {
        assert_eq!(choose([0, 0].into_iter(), 1), 1);
        assert_eq!(choose([0, 1].into_iter(), 1), 0);
        assert_eq!(choose([2, 1].into_iter(), 1), 1);
        assert_eq!(choose([3, 2, 1].into_iter(), 0), 2);
    }

    fn open(lanes: &Lanes) -> Vec<usize> {
        let open = |lane: &Lane| lane.load.open.load(Ordering::Relaxed);
        lanes.all.iter().map(open).collect()
    }

    #[test]
    fn lanes_stay_even_and_are_left_when_a_connection_ends() {
        let (lanes, _running) = Lanes::start(3, "lane").expect("threads");
        let places: Vec<_> = (0..30).map(|_| lanes.place()).collect();
        assert_eq!(open(&lanes), [10; 3]);
        drop(places);
        assert_eq!(open(&lanes), [0; 3]);
    }

    #[test]
    fn many_that_are_held_are_spread_whatever_the_number() {
        let (lanes, _running) = Lanes::start(2, "lane").expect("threads");
        let mut held = Vec::new();
        for each in [8, 5_000] {
            held.resize_with(2 * each, || lanes.place());
            assert_eq!(open(&lanes), [each; 2]);
        }
    }

    #[test]
    fn brief_connections_stay_where_they_are_accepted_and_long_ones_beside_them_are_spread() {
        let (lanes, _running) = Lanes::start(2, "lane").expect("threads");
        let now = Instant::now();
        lanes.all[0].load.brief.lock().remember_one_at_a_time(now);
        let brief: Vec<_> = (0..4).map(|_| lanes.place_at(now)).collect();
        assert_eq!(open(&lanes), [4, 0], "no more than are expected");
        let long: Vec<_> = (0..16).map(|_| lanes.place_at(now)).collect();
        assert_eq!(open(&lanes), [12, 8]);
        drop((brief, long));
    }

    /// Lanes whose threads are in somebody's head: clients connect to the first one, each again as soon as it has been served,
    /// which takes `COST` of the lane's thread and `elsewhere` beside that.
    struct Model {
        lanes: Vec<ModelLane>,
        now: Instant,
        /// When which connection of which lane ends, and when it began.
        ends: BinaryHeap<Reverse<(Instant, usize, Instant)>>,
    }

    struct ModelLane {
        brief: Brief,
        open: usize,
        idle_from: Instant,
        used: Duration,
    }

    impl Model {
        const COST: Duration = Duration::from_micros(100);

        fn new(lanes: usize) -> Self {
            let now = Instant::now();
            let lane = || ModelLane {
                brief: Brief::new(now),
                open: 0,
                idle_from: now,
                used: Duration::ZERO,
            };
            Self {
                lanes: std::iter::repeat_with(lane).take(lanes).collect(),
                now,
                ends: BinaryHeap::new(),
            }
        }

        fn connect(&mut self, elsewhere: Duration) {
            let now = self.now;
            let staying = |it: &mut ModelLane| it.open.saturating_sub(it.brief.staying_here(now));
            let index = choose(self.lanes.iter_mut().map(staying), 0);
            let lane = &mut self.lanes[index];
            lane.open += 1;
            lane.used += Self::COST;
            lane.idle_from = lane.idle_from.max(now) + Self::COST;
            let end = lane.idle_from + elsewhere;
            self.ends.push(Reverse((end, index, now)));
        }

        /// Connections of each lane in the second of two seconds.
        fn run(mut self, clients: usize, elsewhere: Duration) -> Vec<u32> {
            let second = Duration::from_secs(1);
            let (from, until) = (self.now + second, self.now + 2 * second);
            let mut served = vec![0; self.lanes.len()];
            (0..clients).for_each(|_| self.connect(elsewhere));
            while let Some(Reverse((end, index, began))) = self.ends.pop() {
                if end > until {
                    break;
                }
                self.now = end;
                served[index] += u32::from(end > from);
                let lane = &mut self.lanes[index];
                lane.open -= 1;
                let used = lane.used - lane.idle_from.saturating_duration_since(end);
                lane.brief.ended(end - began, end, || Some(used));
                self.connect(elsewhere);
            }
            served
        }
    }

    #[test]
    fn no_lane_is_overloaded_with_brief_connections_while_others_idle() {
        // Each client takes a lane 9 % of its time: 32 of them are three lanes' work.
        let elsewhere = Duration::from_millis(1);
        for (lanes, least) in [(1, 9_900), (2, 18_000), (8, 25_000)] {
            let served = Model::new(lanes).run(32, elsewhere);
            let sum: u32 = served.iter().sum();
            assert!(sum >= least, "{lanes} lanes: {served:?}");
        }
    }

    #[test]
    fn brief_connections_stay_on_a_lane_that_has_time_for_them() {
        for (clients, millis) in [(16, 20), (16, 4), (5, 1)] {
            let served = Model::new(8).run(clients, Duration::from_millis(millis));
            let elsewhere: u32 = served[1..].iter().sum();
            assert!(
                elsewhere * 50 < served[0],
                "{clients}, {millis} ms: {served:?}"
            );
        }
    }

    #[test]
    fn what_a_lane_has_used_is_known_to_itself_alone() {
        let (lanes, _running) = Lanes::start(2, "lane").expect("threads");
        assert_eq!(used_by(0), None, "this thread is no lane");
        let (tell, told) = std::sync::mpsc::channel();
        lanes.all[1].handle.spawn(async move {
            let before = used_by(1).expect("its own");
            while used_by(1).expect("its own") <= before {}
            tell.send(used_by(0))
        });
        let of_another = told.recv_timeout(Duration::from_secs(30));
        assert_eq!(of_another, Ok(None), "and its own grows");
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
