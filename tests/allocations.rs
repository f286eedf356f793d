//! What a recorded call takes: no memory of the host's, and of the device nothing but the commands.
//!
//! A binary of its own, because its allocator counts what every thread allocates.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use moewe::conformance::sample::{RandomLayer, deepseek_like};
use moewe::conformance::witnesses::witnesses;
use moewe::host::{self, Host, Limits, Session};
use moewe::{Backend, Cpu, Io, MoeSpec, Options, Pace, Plan, Scratch, Tokens, Wgpu, reference};

struct Counting;

#[global_allocator]
static COUNTING: Counting = Counting;

static ON: AtomicBool = AtomicBool::new(false);
static COUNT: AtomicUsize = AtomicUsize::new(0);
static LARGEST: AtomicUsize = AtomicUsize::new(0);

fn count(bytes: usize) {
    if ON.load(Ordering::Relaxed) {
        COUNT.fetch_add(1, Ordering::Relaxed);
        LARGEST.fetch_max(bytes, Ordering::Relaxed);
    }
}

#[allow(unsafe_code, reason = "an allocator; it hands each call on as it is")]
// SAFETY: the system's allocator does the work, with the arguments as they came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size());
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size());
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count(size);
        unsafe { System.realloc(pointer, layout, size) }
    }
}

/// How often all threads allocate while `run` runs, and the most bytes at once.
fn allocations(run: impl FnOnce()) -> (usize, usize) {
    COUNT.store(0, Ordering::Relaxed);
    LARGEST.store(0, Ordering::Relaxed);
    ON.store(true, Ordering::SeqCst);
    run();
    ON.store(false, Ordering::SeqCst);
    (COUNT.load(Ordering::Relaxed), LARGEST.load(Ordering::Relaxed))
}

const MAX_TOKENS: usize = 48;

fn session<B: Host + Clone>(backend: &B, spec: &MoeSpec) -> (Session<B>, usize) {
    let layer = RandomLayer::new(spec.clone(), 21).unwrap();
    let weights = layer.weights().unwrap();
    // Everything that a layer can have: diagnostics too.
    let options = Options { diagnostics: true, ..Options::AUTO };
    let plan = Plan::new(backend.clone(), spec, &weights, MAX_TOKENS, &options).unwrap();
    let session = Session::new(plan, spec).unwrap();
    let inputs = layer.inputs(MAX_TOKENS, 22);
    let tokens = session.write(&inputs.view()).unwrap();
    (session, tokens)
}

/// One test: the allocator counts every thread, and tests run side by side.
#[test]
fn recording_allocates_nothing() {
    the_only_thread_of_a_cpu_allocates_nothing();
    threads_of_a_cpu_allocate_their_queues();
    a_device_creates_nothing();
}

/// Each field of the spec in turn, from the first call on.
fn the_only_thread_of_a_cpu_allocates_nothing() {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    let legal = witnesses().into_iter().filter(|witness| reference::supports(&witness.spec).is_ok());
    let mut layers = 0;
    for witness in legal {
        pool.install(|| {
            let (session, all) = session(&Cpu::new(), &witness.spec);
            let counts = if witness.spec.entry.is_batched() { vec![all] } else { vec![5, 48, 1, 0] };
            for tokens in counts {
                let (count, _) = allocations(|| {
                    session.bound().record(&mut Cpu::new().encoder(), &Tokens::Host(tokens)).unwrap();
                });
                assert_eq!(count, 0, "{}, {tokens} tokens", witness.field);
            }
            // The halves of a layer, and a count that only the device knows.
            let counted = Cpu::new().upload("tokens", &[all as u32]).unwrap();
            let (count, _) = allocations(|| {
                let (bound, mut encoder) = (session.bound(), Cpu::new().encoder());
                bound.record_routing(&mut encoder, &Tokens::Host(all)).unwrap();
                bound.record_experts(&mut encoder, &Tokens::Host(all)).unwrap();
                bound.record(&mut encoder, &Tokens::Device(&counted, 0)).unwrap();
                for slice in
                    bound.slices(&Tokens::Host(all), Pace { longest: Duration::ZERO, ..Pace::DESKTOP }).unwrap()
                {
                    bound.record_slice(&mut encoder, &Tokens::Host(all), &slice).unwrap();
                }
            });
            assert_eq!(count, 0, "{}: in parts", witness.field);
        });
        layers += 1;
    }
    assert!(layers > 350, "{layers}");
    // The count would see it.
    assert_eq!(allocations(|| drop(std::hint::black_box(vec![1u8; 10]))), (1, 10));
}

/// Blocks of rayon's queue, one for every few dozen of its jobs.
fn threads_of_a_cpu_allocate_their_queues() {
    const CALLS: usize = 100;
    let (session, _) = session(&Cpu::new(), &deepseek_like());
    let record = || session.bound().record(&mut Cpu::new().encoder(), &Tokens::Host(MAX_TOKENS)).unwrap();
    // Each thread keeps what it needs from the first time that it computes.
    (0..CALLS).for_each(|_| record());
    let (count, largest) = allocations(|| (0..CALLS).for_each(|_| record()));
    // 63 jobs of two words and a state each: crossbeam's block.
    assert!(largest <= 63 * 24 + 16, "{largest} bytes at once");
    // At most two parallel loops a step, and a block for 63 of them.
    let steps = session.bound().steps(MAX_TOKENS).len();
    assert!(count <= CALLS * steps * 2 / 63 + 1, "{count} in {CALLS} calls of {steps} steps");
}

/// Buffers, bind groups, pipelines and all that they are made of, as wgpu counts them.
fn a_device_creates_nothing() {
    let wanted = std::env::var("MOEWE_ADAPTER").unwrap_or_default();
    let adapter = host::adapters().into_iter().find(|adapter| adapter.matches(&wanted)).expect("an adapter");
    let backend: Wgpu = host::open(&adapter, Limits::Default).unwrap();
    let objects = || {
        let hal = backend.device().get_internal_counters().hal;
        [
            &hal.buffers,
            &hal.bind_groups,
            &hal.bind_group_layouts,
            &hal.compute_pipelines,
            &hal.pipeline_layouts,
            &hal.shader_modules,
            &hal.query_sets,
            &hal.memory_allocations,
        ]
        .map(|counter| counter.read())
    };
    let nothing = objects();
    let layer = RandomLayer::new(deepseek_like(), 21).unwrap();
    let weights = layer.weights().unwrap();
    let plan = Plan::new(backend.clone(), &layer.spec, &weights, MAX_TOKENS, &Options::AUTO).unwrap();
    let scratch = Scratch::new(&backend, &plan.scratch_layout()).unwrap();
    let rows = layer.inputs(MAX_TOKENS, 22).hidden_states;
    let x = backend.upload("x", &host::encode(layer.spec.precision.input, &rows)).unwrap();
    let y = backend.create_buffer("y", 4 * rows.len() as u64, false).unwrap();
    let tokens = backend.upload("tokens", &[7]).unwrap();
    let bound = plan.bind(&Io { output: Some(&y), ..Io::of(&x) }, &scratch).unwrap();
    // Weights were written through staging buffers, which live until the queue has copied them.
    backend.submit(backend.encoder()).unwrap();
    let bound_objects = objects();
    assert!(nothing.iter().zip(&bound_objects).take(6).all(|(before, bound)| before < bound), "nothing is counted");
    for calls in 0..3 {
        let mut encoder = backend.encoder();
        let before = objects();
        for _ in 0..20 {
            bound.record(&mut encoder, &Tokens::Host(MAX_TOKENS)).unwrap();
            bound.record(&mut encoder, &Tokens::Device(&tokens, 0)).unwrap();
            bound.record_routing(&mut encoder, &Tokens::Host(1)).unwrap();
            bound.record_experts(&mut encoder, &Tokens::Host(1)).unwrap();
        }
        assert_eq!(objects(), before, "call {calls}");
        backend.submit(encoder).unwrap();
    }
    assert_eq!(objects(), bound_objects);
}
