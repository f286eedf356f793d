//! A call in slices: the bits of a whole one, and no submission longer than was asked for.

use std::time::Duration;

use moewe::conformance::witnesses::witnesses;
use moewe::host::{Host, Session};
use moewe::schedule::{DeviceFacts, Step, Units, Work, lower};
use moewe::spec::*;
use moewe::{Cpu, Options, Pace, Plan, Rates, Scope, Slice, Tokens, reference};

use crate::rig::{AUTO, RandomLayer, deepseek_like, gpu};

const RATES: Rates = Rates { read_bytes_per_s: 1_000_000_000, flops_per_s: 1_000_000_000 };

fn pace(longest: Duration) -> Pace {
    Pace { longest, rates: RATES }
}

/// The words of each buffer that a call leaves, whole and in slices; and the slices.
fn whole_and_sliced<B: Host + Clone>(backend: &B, spec: &MoeSpec, tokens: usize, pace: Pace, counted: bool) -> usize {
    let layer = RandomLayer::new(spec.clone(), 71);
    let options = Options { pace: Some(pace), ..AUTO };
    let plan = Plan::new(backend.clone(), spec, &layer.weights(), tokens + 3, &options).unwrap();
    let session = Session::new(plan, spec).unwrap();
    let tokens = session.write(&layer.all_inputs(tokens, 72).view()).unwrap();
    let count = backend.upload("count", &[tokens as u32]).unwrap();
    let tokens = if counted { Tokens::Device(&count, 0) } else { Tokens::Host(tokens) };
    let read = || {
        let names = ["topk_ids", "topk_weights"].iter().filter_map(|name| session.scratch().buffer(name));
        names.chain(session.output()).map(|buffer| backend.read(buffer).unwrap()).collect::<Vec<_>>()
    };
    let mut encoder = backend.encoder();
    session.bound().record(&mut encoder, &tokens).unwrap();
    backend.submit(encoder).unwrap();
    let whole = read();
    // Nothing that the call before left may be taken for this one's.
    let layout = session.plan().scratch_layout();
    let scratch = layout.buffers.iter().filter_map(|(name, _)| session.scratch().buffer(name));
    for buffer in scratch.chain(session.output()) {
        backend.write(buffer, 0, &vec![0x7fff_7fff; backend.buffer_bytes(buffer) as usize / 4]).unwrap();
    }
    let slices: Vec<Slice> = session.bound().slices(&tokens, pace).unwrap().collect();
    for slice in &slices {
        let mut encoder = backend.encoder();
        session.bound().record_slice(&mut encoder, &tokens, slice).unwrap();
        backend.submit(encoder).unwrap();
    }
    assert!(read() == whole, "{tokens} tokens of {spec:?}", tokens = session.bound().max_tokens());
    slices.len()
}

#[test]
fn a_call_in_slices_gives_the_bits_of_a_whole_one() {
    // From every step alone to all at once; with more tokens than the smallest chunk has.
    for (tokens, longest, least) in [(5, 0, 8), (300, 0, 24), (300, 1_000, 3), (300, 3_600_000, 1)] {
        let pace = pace(Duration::from_millis(longest) / 1000);
        for counted in [false, true] {
            let slices = whole_and_sliced(&Cpu::new(), &deepseek_like(), tokens, pace, counted);
            assert!(slices >= least, "{slices} slices of {tokens} tokens");
            assert_eq!(whole_and_sliced(gpu(), &deepseek_like(), tokens, pace, counted), slices);
        }
    }
}

/// Whatever a layer can have.
#[test]
fn every_layer_can_be_sliced() {
    let legal = witnesses().into_iter().filter(|witness| reference::supports(&witness.spec).is_ok());
    let mut sliced = 0;
    for witness in legal.step_by(9) {
        let tokens = if witness.spec.entry.is_batched() { 1 } else { 150 };
        sliced += whole_and_sliced(&Cpu::new(), &witness.spec, tokens, pace(Duration::ZERO), false);
    }
    assert!(sliced > 300, "{sliced}");
}

/// Slices follow each other without a gap, each as long as it may be.
#[test]
fn no_slice_is_longer_than_was_asked_for_but_one_step_of_the_smallest_chunk() {
    let layer = RandomLayer::new(deepseek_like(), 73);
    let (mut alone, mut several) = (0, 0);
    for (tokens, micros) in [0, 20, 200, 2_000, 20_000, 200_000].into_iter().flat_map(|n| [(1000, n), (7, n)]) {
        let pace = pace(Duration::from_micros(micros));
        let options = Options { pace: Some(pace), ..AUTO };
        let plan = Plan::new(Cpu::new(), &layer.spec, &layer.weights(), tokens, &options).unwrap();
        let session = Session::new(plan, &layer.spec).unwrap();
        let schedule = session.plan().schedule();
        // (chunk, step) of the whole call, each with its time.
        let times: Vec<((usize, usize), Duration)> = (0..tokens.div_ceil(schedule.chunk_tokens))
            .flat_map(|chunk| {
                let tokens = schedule.chunk_tokens.min(tokens - chunk * schedule.chunk_tokens);
                let steps = schedule.buckets[schedule.bucket(tokens)].steps.iter().enumerate();
                steps.map(move |(at, step)| ((chunk, at), schedule.work(step, tokens).time(RATES)))
            })
            .collect();
        let mut rest = times.as_slice();
        let mut end = (0, 0);
        for slice in session.bound().slices(&Tokens::Host(tokens), pace).unwrap() {
            assert_eq!(slice.first, end);
            end = slice.end;
            let (these, others) = rest.split_at(rest.iter().take_while(|(place, _)| *place < end).count());
            assert_eq!(slice.estimate, these.iter().map(|(_, time)| *time).sum());
            assert!(slice.estimate <= pace.longest || (these.len() == 1 && schedule.chunk_tokens <= 128));
            assert!(others.first().is_none_or(|(_, next)| slice.estimate + *next > pace.longest));
            match these.len() {
                1 => alone += 1,
                _ => several += 1,
            }
            rest = others;
        }
        assert!(rest.is_empty(), "{rest:?}");
    }
    assert!(alone > 50 && several > 20, "{alone} {several}");
}

/// 128 experts of Qwen3-30B-A3B in bf16: 9.4 MB each.
fn qwen3() -> MoeSpec {
    let mut spec = deepseek_like();
    (spec.hidden_size, spec.num_experts, spec.top_k) = (2048, 128, 8);
    spec.experts.intermediate_size = 768;
    spec.experts.format = WeightFormat::Bf16;
    spec.shared = None;
    spec.routing.method = RoutingMethod::TopK { score: Score::Softmax, key: SelectionKey::Score, groups: None };
    spec
}

const FACTS: DeviceFacts = DeviceFacts {
    backend: "test",
    max_binding_bytes: (2 << 30) - 4,
    max_workgroups: 65_535,
    exact_halves: false,
    matrix_units: Units::None,
};

#[test]
fn chunks_are_cut_until_no_dispatch_takes_longer() {
    let lowered = |pace| lower(&qwen3(), Scope::Layer, 4096, &FACTS, &Options { pace, ..AUTO }).unwrap();
    let (whole, cut) = (lowered(None), lowered(Some(Pace::DESKTOP)));
    assert_eq!(whole.chunk_tokens, 4096);
    assert!(whole.longest_step(Rates::CONSERVATIVE) > Pace::DESKTOP.longest);
    assert!(cut.chunk_tokens >= 128 && cut.chunk_tokens.is_multiple_of(128), "{}", cut.chunk_tokens);
    assert!(cut.longest_step(Rates::CONSERVATIVE) <= Pace::DESKTOP.longest || cut.chunk_tokens == 128);
    // What is short enough stays whole, and what cannot be short enough is as short as it gets.
    let hours = Pace { longest: Duration::from_secs(36_000), ..Pace::DESKTOP };
    assert_eq!(lowered(Some(hours)), whole);
    let never = Pace { longest: Duration::ZERO, ..Pace::DESKTOP };
    assert_eq!(lowered(Some(never)).chunk_tokens, 128);
    // Rates of nothing are no reason to panic.
    let rates = Rates { read_bytes_per_s: 0, flops_per_s: 0 };
    assert_eq!(lowered(Some(Pace { rates, ..Pace::DESKTOP })).chunk_tokens, 128);
}

#[test]
fn a_call_whose_rows_share_a_scale_is_not_cut() {
    let mut spec = qwen3();
    spec.experts.format = WeightFormat::Fp8Channel;
    let (span, scale) = (ScaleSpan::Tensor, ActivationScale::F32);
    spec.experts.activation_quant =
        ActivationQuant::Dynamic { code: ActivationCode::E4m3, span, rule: ScaleRule::FlooredAmax, scale };
    let pace = Some(Pace { longest: Duration::ZERO, ..Pace::DESKTOP });
    let schedule = lower(&spec, Scope::Layer, 1000, &FACTS, &Options { pace, ..AUTO }).unwrap();
    assert_eq!(schedule.chunk_tokens, 1000);
}

/// Never less than the multiplications and the weights that a step has.
#[test]
fn the_work_of_a_step_is_at_least_what_it_has_to_do() {
    let spec = qwen3();
    let schedule = lower(&spec, Scope::Layer, 4096, &FACTS, &AUTO).unwrap();
    let find = |tokens: usize, name: &str| -> (Step, Work) {
        let bucket = &schedule.buckets[schedule.bucket(tokens)];
        let step = bucket.steps.iter().find(|step| step.name == name).unwrap();
        (step.clone(), schedule.work(step, tokens))
    };
    for tokens in [1, 2, 7, 16, 64, 100, 512, 2000, 4096] {
        for (name, elements) in [("experts.gate_up", 2 * 768 * 2048), ("experts.down", 768 * 2048)] {
            let (_, work) = find(tokens, name);
            let rows = 8 * tokens as u64;
            assert!(work.flops >= 2 * rows * elements, "{name} of {tokens} tokens: {work:?}");
            assert!(work.bytes >= rows.min(128) * elements * 2, "{name} of {tokens} tokens: {work:?}");
        }
        for step in &schedule.buckets[schedule.bucket(tokens)].steps {
            let (less, more) = (schedule.work(step, tokens), schedule.work(step, tokens + 1));
            assert!(more.flops >= less.flops && more.bytes >= less.bytes, "{} of {tokens} tokens", step.name);
            assert!(less.time(RATES) > Duration::ZERO, "{}", step.name);
        }
    }
    // In segments each may get all rows.
    let small = DeviceFacts { max_binding_bytes: 128 << 20, ..FACTS };
    let cut = lower(&spec, Scope::Layer, 64, &small, &AUTO).unwrap();
    let steps = &cut.buckets[cut.bucket(64)].steps;
    let segments: Vec<&Step> = steps.iter().filter(|step| step.name.starts_with("experts.gate_up[")).collect();
    assert!(segments.len() > 3);
    let whole = find(64, "experts.gate_up").1;
    assert!(segments.iter().all(|step| cut.work(step, 64).flops == whole.flops), "{whole:?}");
}
