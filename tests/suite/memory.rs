//! Counts what a thread allocates.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

struct Counting;

#[global_allocator]
static COUNTING: Counting = Counting;

thread_local! {
    /// What is held now, and the most since the last reset. What another thread frees is not taken off.
    static HELD: Cell<[usize; 2]> = const { Cell::new([0; 2]) };
}

fn count(more: usize, less: usize) {
    // A thread that ends has none any more.
    let _ = HELD.try_with(|held| {
        let [now, most] = held.get();
        let now = now.saturating_add(more).saturating_sub(less);
        held.set([now, most.max(now)]);
    });
}

#[allow(unsafe_code, reason = "an allocator; it hands each call on as it is")]
// SAFETY: the system's allocator does the work, with the arguments as they came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size(), 0);
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size(), 0);
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        count(0, layout.size());
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count(size, layout.size());
        unsafe { System.realloc(pointer, layout, size) }
    }
}

/// The result of `run`, and the most bytes that this thread held in it beyond those before.
pub fn peak<T>(run: impl FnOnce() -> T) -> (T, usize) {
    let [before, _] = HELD.get();
    HELD.set([before, before]);
    let result = run();
    let [_, most] = HELD.get();
    (result, most - before)
}

#[test]
fn the_peak_is_counted() {
    let (_, most) = peak(|| drop(std::hint::black_box(vec![1_u8; 1 << 20])));
    assert!((1 << 20..1 << 21).contains(&most), "{most}");
}
