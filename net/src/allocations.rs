//! What a test holds in memory and how often it asks for some, counted by the thread: a test of one thread counts its own alone.

#![allow(unsafe_code, reason = "an allocator is unsafe to implement")]

use std::{
    alloc::{GlobalAlloc, Layout, System},
    cell::Cell,
};

/// The system's allocator, with a count of what each thread has.
struct Counting;

#[global_allocator]
static COUNTING: Counting = Counting;

thread_local! {
    static HELD: Cell<usize> = const { Cell::new(0) };
    static MOST: Cell<usize> = const { Cell::new(0) };
    static CALLS: Cell<usize> = const { Cell::new(0) };
}

fn took(bytes: usize) {
    let _ = CALLS.try_with(|calls| calls.set(calls.get().wrapping_add(1)));
    // A thread that is ending has no counters any more.
    let _ = HELD.try_with(|held| {
        let now = held.get().wrapping_add(bytes);
        held.set(now);
        let _ = MOST.try_with(|most| most.set(most.get().max(now)));
    });
}

fn gave(bytes: usize) {
    // What another thread took may be given back here.
    let _ = HELD.try_with(|held| held.set(held.get().saturating_sub(bytes)));
}

// SAFETY: every call is the system allocator's, with the arguments that were given; counting neither allocates nor unwinds.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        took(layout.size());
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        gave(layout.size());
        // SAFETY: the caller's promise is passed on.
        unsafe { System.dealloc(pointer, layout) }
    }
}

/// The most that this thread has held since then, beyond what it held then.
pub(crate) struct Peak(usize);

impl Peak {
    pub(crate) fn start() -> Self {
        let held = HELD.get();
        MOST.set(held);
        Self(held)
    }

    pub(crate) fn bytes(&self) -> usize {
        MOST.get().saturating_sub(self.0)
    }
}

/// How often this thread has asked for memory since then.
pub(crate) struct Count(usize);

impl Count {
    pub(crate) fn start() -> Self {
        Self(CALLS.get())
    }

    pub(crate) fn allocations(&self) -> usize {
        CALLS.get().wrapping_sub(self.0)
    }
}

#[test]
fn the_most_is_counted_also_when_it_was_given_back() {
    let peak = Peak::start();
    drop(std::hint::black_box(vec![0_u8; 1 << 20]));
    assert!(
        (1 << 20..2 << 20).contains(&peak.bytes()),
        "{}",
        peak.bytes()
    );
}
