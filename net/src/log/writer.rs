//! The queue and the thread between whoever logs and the output.

use std::{
    io::{self, Write},
    sync::Arc,
    thread,
    time::Duration,
};

use parking_lot::{Condvar, Mutex};

/// Lines that may wait for the output; whoever logs one more waits with them (node-tunnel.md 1.8).
pub const QUEUE_LINES: usize = 10_000;
/// After each write the thread rests for this long, so that a stream of lines costs a call and a wake-up for each rest and
/// not for each line. A line after a silence is written at once.
const REST: Duration = Duration::from_millis(10);
/// Lines that end the rest.
const CROWD: usize = QUEUE_LINES / 2;
/// A buffer that grew beyond this in a storm is given back, in bytes.
const KEPT_BUFFER: usize = 256 * 1024;

/// Takes lines; cheap to clone. The thread ends when the last clone is dropped and everything is written.
#[derive(Clone)]
pub(super) struct Writer(Arc<Owner>);

struct Owner(Arc<Shared>);

struct Shared {
    queue: Mutex<Queue>,
    /// The thread has something to do, or to end for.
    filled: Condvar,
    /// Lines were written.
    emptied: Condvar,
}

#[derive(Default)]
struct Queue {
    bytes: Vec<u8>,
    /// Lines in `bytes`.
    waiting: usize,
    /// Lines that the thread holds.
    in_flight: usize,
    /// The thread lets lines gather.
    resting: bool,
    /// Somebody waits for what is waiting.
    hurried: bool,
    ended: bool,
}

impl Queue {
    fn lines(&self) -> usize {
        self.waiting + self.in_flight
    }

    fn may_gather(&self) -> bool {
        self.waiting < CROWD && !self.hurried && !self.ended
    }
}

impl Shared {
    fn add(&self, queue: &mut Queue, line: &[u8]) {
        queue.bytes.extend_from_slice(line);
        queue.bytes.push(b'\n');
        queue.waiting += 1;
        let enough = if queue.resting { CROWD } else { 1 };
        if queue.waiting == enough {
            self.filled.notify_one();
        }
    }
}

impl Writer {
    pub(super) fn start(output: impl Write + Send + 'static) -> io::Result<Self> {
        Self::start_resting(output, REST)
    }

    /// As [`Writer::start`], with another length of the rest.
    pub(super) fn start_resting(
        output: impl Write + Send + 'static,
        rest: Duration,
    ) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            queue: Mutex::default(),
            filled: Condvar::new(),
            emptied: Condvar::new(),
        });
        let for_thread = Arc::clone(&shared);
        thread::Builder::new()
            .name("log".to_owned())
            .spawn(move || for_thread.write_all_to(output, rest))?;
        Ok(Self(Arc::new(Owner(shared))))
    }

    /// Adds one line, without its newline. Waits while the queue is full.
    pub(super) fn line(&self, line: &[u8]) {
        let shared = &self.0.0;
        let mut queue = shared.queue.lock();
        shared
            .emptied
            .wait_while(&mut queue, |queue| queue.lines() >= QUEUE_LINES);
        shared.add(&mut queue, line);
    }

    /// Adds one line, without its newline, unless the queue is full; tells whether it did.
    pub(super) fn try_line(&self, line: &[u8]) -> bool {
        let shared = &self.0.0;
        let mut queue = shared.queue.lock();
        let room = queue.lines() < QUEUE_LINES;
        if room {
            shared.add(&mut queue, line);
        }
        room
    }

    pub(super) fn flush(&self) {
        let shared = &self.0.0;
        let mut queue = shared.queue.lock();
        while queue.lines() > 0 {
            if queue.waiting > 0 {
                queue.hurried = true;
                shared.filled.notify_one();
            }
            shared.emptied.wait(&mut queue);
        }
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        self.0.queue.lock().ended = true;
        self.0.filled.notify_one();
    }
}

impl Shared {
    fn write_all_to(&self, mut output: impl Write, rest: Duration) {
        let mut batch = Vec::new();
        while self.take(&mut batch) {
            write_whole(&mut output, &batch);
            batch.clear();
            batch.shrink_to(KEPT_BUFFER);
            self.rest(rest);
        }
    }

    /// Waits for lines and moves them into `batch`; false: there will be no more.
    fn take(&self, batch: &mut Vec<u8>) -> bool {
        let mut queue = self.queue.lock();
        self.filled
            .wait_while(&mut queue, |queue| queue.waiting == 0 && !queue.ended);
        std::mem::swap(batch, &mut queue.bytes);
        queue.in_flight = std::mem::take(&mut queue.waiting);
        queue.hurried = false;
        queue.in_flight > 0
    }

    /// The batch is written: lets lines gather for a while, unless somebody waits for them or there is a crowd.
    fn rest(&self, rest: Duration) {
        let mut queue = self.queue.lock();
        queue.in_flight = 0;
        self.emptied.notify_all();
        queue.resting = true;
        self.filled
            .wait_while_for(&mut queue, |queue| queue.may_gather(), rest);
        queue.resting = false;
    }
}

/// Writes all, also to an output that somebody made non-blocking. A broken output loses lines: there is nowhere left
/// to say so.
fn write_whole(output: &mut impl Write, mut bytes: &[u8]) {
    const PAUSE: Duration = Duration::from_millis(1);
    while !bytes.is_empty() {
        match output.write(bytes) {
            Ok(0) => return,
            Ok(n) => bytes = &bytes[n..],
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => thread::sleep(PAUSE),
            Err(_) => return,
        }
    }
    let _ = output.flush();
}
