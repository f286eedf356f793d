//! Whole layers: every backend against the reference.

use std::sync::atomic::{AtomicUsize, Ordering};

use fastrand::Rng;
use moewe::host::{Host, Outcome, Session};
use moewe::kernels::pack::PackedMatrix;
use moewe::reference::{self, Inputs};
use moewe::schedule::{DeviceFacts, Units};
use moewe::spec::*;
use moewe::{Options, Plan};

use crate::random::{CPU_SAMPLES, GPU_SAMPLES, Sample, samples, specs};
use crate::rig::{
    AUTO, CUTS, FULL_TILES, GEMV, LayerInputs, PAIRS, RandomLayer, TILED, UNIT_CUTS, deepseek_like, for_matrix_units,
    fresh_gpu, gpu, segmented, with_units,
};

/// Largest |a - b| relative to the row's largest value: a row is a sum of products of one size, so its rounding
/// errors have the size of its largest terms. An exponential of x errs by 3 + 2|x| ulp, and x has some tens; a
/// row's terms may cancel to a fifth. Measured over 2,000 specs: at most 1.7e-5.
const ROW_TOLERANCE: f32 = 3e-5;
/// Scores pass one exponential, which WGSL gives to 3 + 2|x| ulp.
const WEIGHT_TOLERANCE: f32 = 1e-5;

/// Half the distance of neighbouring values near 1, where anything is rounded to that type.
fn half_ulp(float_type: FloatType) -> f32 {
    match float_type {
        FloatType::F32 => 0.0,
        FloatType::F16 => 1.0 / 2048.0,
        FloatType::Bf16 => 1.0 / 256.0,
    }
}

/// What roundings inside the layer add to a tolerance: a value beside the middle of two may go either way.
struct Slack {
    logits: f32,
    weights: f32,
    rows: f32,
    /// rel_fro of all rows together: a value beside the middle is one of some thousand, so their sum stays far
    /// below what a rounding too many or too few would do.
    whole: f32,
}

impl Slack {
    fn of(spec: &MoeSpec) -> Self {
        let precision = &spec.precision;
        let rounding = |rounding| 2.0 * half_ulp(precision.rounded(rounding));
        let (logits, weights) = (rounding(precision.router_gemm), rounding(precision.routing_weights));
        let inside = precision.gate_up == Rounding::Model
            || precision.weighted_input == Rounding::Model
            || precision.activation != ActivationRounding::F32
            || precision.combine != CombineRounding::F32
            || matches!(spec.lora, Some(Lora { delta: LoraDelta::Model, .. }));
        // Several steps of one value may go the other way, one behind the other.
        let rows = if inside { 4.0 * half_ulp(precision.model) } else { 0.0 };
        // 1 + tanh cancels: where it leaves 1e-4, its relative error is 1e-3, and a norm makes that of a whole row.
        let normed = matches!(spec.latent, Some(Latent { norm: LatentNorm::PreAndPost { .. }, .. }));
        let rows = if normed && spec.experts.activation == Activation::GeluTanh { rows + 2e-3 } else { rows };
        // A norm makes the errors of a small row as large as it makes the row: 1 / sqrt(eps) of random.rs, that is 4.5.
        let rows = if spec.output_norm.is_some() { 5.0 * (rows + ROW_TOLERANCE) } else { rows };
        let whole = if rows + weights > 0.0 { 0.3 * half_ulp(precision.model) } else { 0.0 };
        // A value beside the middle of two E4M3 codes moves by an eighth when it goes the other way. lockstep.rs
        // compares codes and scales exactly.
        let shared = spec.shared.as_ref().is_some_and(|shared| shared.mlp.activation_quant.is_on());
        let coded = shared || spec.experts.activation_quant.is_on();
        let (rows, whole) = if coded { (rows + 0.15, whole + 0.02) } else { (rows, whole) };
        Self { logits, weights, rows: rows + weights, whole }
    }
}

fn same(a: f32, b: f32, allowed: f32) -> bool {
    a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan()) || (a - b).abs() <= allowed || a == b
}

/// Compares what each token got. A token may have other experts, or another order of them, only where the
/// reference itself chooses so after logits moved by rounding; such tokens are few.
fn compare(layer: &RandomLayer, want: &reference::Layer, got: &Outcome, what: &str) {
    // Rows of a batched entry are routed and combined elsewhere.
    let k = if layer.spec.entry.is_batched() { 0 } else { layer.spec.top_k };
    let h = layer.spec.hidden_size;
    let (shares, slack) = (layer.spec.joint_shares(), Slack::of(&layer.spec));
    let tokens = want.output.len() / h;
    let mut compared = 0;
    let (mut off, mut size, mut values) = (0f64, 0f64, 0);
    assert_eq!(got.router_states.len(), want.routed.router_states.len(), "{what}");
    for (got, want) in got.router_states.iter().zip(&want.routed.router_states) {
        assert!(same(*got, *want, 1e-5 * want.abs().max(1.0)), "{what}: router_states {got}, expected {want}");
    }
    for token in 0..tokens {
        let slots = token * k..(token + 1) * k;
        let by_id = |ids: &[i32], weights: &[f32]| {
            let mut pairs: Vec<(i32, f32)> = ids.iter().copied().zip(weights.iter().copied()).collect();
            pairs.sort_by_key(|(id, weight)| (*id, weight.to_bits()));
            pairs
        };
        let (want_ids, got_ids) = (&want.routed.topk_ids[slots.clone()], &got.topk_ids[slots.clone()]);
        let mut distinct: Vec<i32> = got_ids.to_vec();
        distinct.sort_unstable();
        distinct.dedup();
        let hashed = matches!(layer.spec.routing.method, RoutingMethod::Hash { .. });
        assert!(hashed || distinct.len() == k, "{what}: token {token}: an expert twice in {got_ids:?}");
        if want_ids != got_ids {
            let near = slack.logits > 0.0 || near_tie(layer, want, token, got_ids);
            assert!(near, "{what}: token {token}: ids {got_ids:?}, expected {want_ids:?}");
        }
        let want_pairs = by_id(want_ids, &want.routed.topk_weights[slots.clone()]);
        let got_pairs = by_id(got_ids, &got.topk_weights[slots]);
        if want_pairs.iter().zip(&got_pairs).any(|(want, got)| want.0 != got.0) {
            continue;
        }
        let weights = want_pairs.iter().zip(&got_pairs).map(|((_, want), (_, got))| (*want, *got));
        let of_shared = token * shares..(token + 1) * shares;
        let of_shared = want.routed.shared_weights[of_shared.clone()].iter().zip(&got.shared_weights[of_shared]);
        let mut moved = false;
        for (want, got) in weights.chain(of_shared.map(|(want, got)| (*want, *got))) {
            let close = same(want, got, WEIGHT_TOLERANCE * want.abs().max(1.0) + slack.weights * want.abs());
            // A logit that was rounded the other way moves its weight.
            moved = moved || !close;
            assert!(close || slack.logits > 0.0, "{what}: token {token}, weight {got}, expected {want}");
        }
        if moved {
            continue;
        }
        let want = &want.output[token * h..(token + 1) * h];
        let got = &got.output[token * h..(token + 1) * h];
        let largest =
            want.iter().filter(|value| value.is_finite()).fold(1f32, |largest, value| largest.max(value.abs()));
        let ulp = 2.0 * half_ulp(layer.spec.precision.output);
        for (at, (want, got)) in want.iter().zip(got).enumerate() {
            let allowed = (ROW_TOLERANCE + slack.rows) * largest + ulp * want.abs() + 1e-7 * ulp;
            if want.is_finite() && got.is_finite() {
                off += f64::from(want - got).powi(2);
                size += f64::from(*want).powi(2);
                values += 1;
            }
            assert!(
                same(*want, *got, allowed),
                "{what}: token {token} value {at}: {got}, expected {want} within {allowed}"
            );
        }
        compared += 1;
    }
    // A whole output shows a rounding that is missing; a few values show nothing.
    let unlike = (off / size.max(1e-30)).sqrt() as f32;
    let plain =
        slack.logits == 0.0 && layer.spec.output_norm.is_none() && layer.spec.precision.output == FloatType::F32;
    if slack.whole > 0.0 && values > 500 && plain {
        assert!(unlike < slack.whole, "{what}: rel_fro {unlike}: a step is rounded otherwise");
    }
    // Rounded logits often stand beside a middle.
    let least = if slack.logits > 0.0 { tokens.saturating_sub(2) / 2 } else { (9 * tokens).div_ceil(10) };
    assert!(compared >= least, "{what}: only {compared} of {tokens} tokens were compared");
}

/// Whether the reference chooses `ids`, in this order, after the logits moved by less than an exponential's
/// error, the earlier of them up by more.
fn near_tie(layer: &RandomLayer, want: &reference::Layer, token: usize, ids: &[i32]) -> bool {
    let outputs = layer.spec.router_outputs();
    let mut logits = want.routed.logits[token * outputs..(token + 1) * outputs].to_vec();
    for (slot, &id) in ids.iter().enumerate() {
        let Some(logit) = usize::try_from(id).ok().and_then(|id| logits.get_mut(id)) else { return false };
        let step = 1e-5 * (1.0 - slot as f32 / ids.len() as f32);
        *logit += step * (1.0 + logit.abs());
    }
    let mut spec = layer.spec.clone();
    spec.router = Router::Given { transform: LogitTransform::None };
    let weights = layer.weights().router;
    let router = moewe::RouterWeights { weight: None, bias: None, input_scale: None, mlp: None, ..weights };
    let row = vec![0.0; spec.hidden_size];
    let inputs = Inputs { logits: Some(&logits), ..Inputs::of(&row) };
    match spec.routing.method {
        // The table leaves no choice.
        RoutingMethod::Hash { .. } => false,
        _ => reference::route(&spec, &router, inputs).unwrap().topk_ids == ids,
    }
}

pub fn check(layer: &RandomLayer, tokens: usize, options: &Options, what: &str) {
    let tokens = layer.tokens(tokens);
    check_inputs(layer, tokens, options, &layer.all_inputs(tokens, 7), what);
}

/// Both backends against the reference, each twice.
pub fn check_inputs(layer: &RandomLayer, tokens: usize, options: &Options, inputs: &LayerInputs, what: &str) {
    let want = layer.judge(inputs.view());
    assert_eq!(want.output.len(), tokens * layer.spec.hidden_size);
    agrees_on_cpu(layer, &want, options, inputs, what);
    agrees_on_gpu(layer, &want, options, inputs, what);
}

fn agrees_on_cpu(layer: &RandomLayer, want: &reference::Layer, options: &Options, inputs: &LayerInputs, what: &str) {
    let tokens = want.output.len() / layer.spec.hidden_size;
    twice(layer, want, &layer.on_cpu(tokens.max(1), options, None), inputs, &format!("cpu: {what}"));
}

fn agrees_on_gpu(layer: &RandomLayer, want: &reference::Layer, options: &Options, inputs: &LayerInputs, what: &str) {
    let tokens = want.output.len() / layer.spec.hidden_size;
    twice(layer, want, &layer.on_gpu(tokens.max(1), options), inputs, &format!("wgpu: {what}"));
}

/// Likewise without keeping the kernels, which hardly any other layer has: a software driver needs megabytes of each.
fn agrees_on_gpu_once(layer: &RandomLayer, want: &reference::Layer, sample: &Sample, inputs: &LayerInputs, what: &str) {
    let tokens = want.output.len() / layer.spec.hidden_size;
    let options = segmented(&sample.options);
    let plan = Plan::new(fresh_gpu(), &layer.spec, &layer.weights(), tokens.max(1), &options).unwrap();
    twice(layer, want, &Session::new(plan, &layer.spec).unwrap(), inputs, &format!("wgpu: {what}"));
}

fn twice<B: Host>(
    layer: &RandomLayer,
    want: &reference::Layer,
    session: &Session<B>,
    inputs: &LayerInputs,
    what: &str,
) {
    let got = session.run(&inputs.view()).unwrap();
    compare(layer, want, &got, what);
    assert_eq!(bits(&got), bits(&session.run(&inputs.view()).unwrap()), "{what}: two runs differ");
}

/// Everything that came back, as words.
fn bits(outcome: &Outcome) -> Vec<u32> {
    let Outcome { topk_ids, topk_weights, shared_weights, router_states, output } = outcome;
    let floats = [topk_weights, shared_weights, router_states, output].into_iter().flatten();
    topk_ids.iter().map(|&id| id as u32).chain(floats.map(|value| value.to_bits())).collect()
}

fn from_environment(name: &str) -> Option<usize> {
    std::env::var(name).ok().and_then(|count| count.parse().ok())
}

/// Random layers a run, MOEWE_CASES or 2,000 (20,000 in a long run), and how many of them wgpu computes as well,
/// MOEWE_GPU_CASES or 300.
fn counts() -> [usize; 2] {
    let cpu = from_environment("MOEWE_CASES").unwrap_or(CPU_SAMPLES);
    [cpu, from_environment("MOEWE_GPU_CASES").unwrap_or(GPU_SAMPLES).min(cpu)]
}

/// Random layers that a device computes in one run.
pub fn cases() -> usize {
    counts()[1]
}

/// All pairs of values of fields: on the CPU, and most of them on the device.
#[test]
fn random_layers_agree_with_the_reference() {
    let [cpu, on_gpu] = counts();
    let samples = samples(cpu);
    // Those of the device come first and take longest.
    let next = AtomicUsize::new(0);
    let part = || {
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            let Some(sample) = samples.get(seed) else { break };
            let Sample { spec, tokens, options, .. } = sample;
            let layer = RandomLayer::new(spec.clone(), seed as u64);
            let what = format!("seed {seed}, {tokens} tokens, {options:?}, {spec:?}");
            let inputs = layer.all_inputs(*tokens, 7);
            let want = layer.judge(inputs.view());
            agrees_on_cpu(&layer, &want, options, &inputs, &what);
            if seed < on_gpu {
                agrees_on_gpu_once(&layer, &want, sample, &inputs, &what);
            }
        }
    };
    let threads = std::thread::available_parallelism().map_or(1, |threads| threads.get().min(16));
    std::thread::scope(|scope| (0..threads).for_each(|_| drop(scope.spawn(part))));
}

#[test]
fn each_kernel_takes_each_number_of_tokens() {
    let layer = RandomLayer::new(deepseek_like(), 1);
    for tokens in [0, 1, 2, 3, 4, 5, 127, 128, 129] {
        for options in [AUTO].into_iter().chain(CUTS) {
            check(&layer, tokens, &options, &format!("{tokens} tokens, {options:?}"));
        }
    }
}

#[test]
fn weights_may_be_cut_into_segments_of_any_size() {
    let mut spec = deepseek_like();
    spec.experts.gate_up_bias = true;
    for format in [WeightFormat::Bf16, WeightFormat::Fp8Block { block: [16, 16], scale: ScaleFormat::F32 }] {
        spec.experts.format = format;
        let layer = RandomLayer::new(spec.clone(), 2);
        for (at, segment_bytes) in [512, 1000, 4096, 64 << 10].into_iter().enumerate() {
            for base in [CUTS[at], TILED] {
                let options = Options { segment_bytes: Some(segment_bytes), ..base };
                check(&layer, 70, &options, &format!("{segment_bytes} bytes, {format:?}"));
            }
        }
    }
}

#[test]
fn an_expert_may_be_cut_between_segments_at_a_tile() {
    let mut spec = deepseek_like();
    spec.hidden_size = 256;
    spec.experts.intermediate_size = 150;
    for base in CUTS {
        // A segment holds 127 rows, of which the cut takes 64: the rest must begin another segment.
        let options = Options { segment_bytes: Some(64 << 10), ..base };
        check(&RandomLayer::new(spec.clone(), 2), 20, &options, "64 KiB");
    }
}

#[test]
fn one_expert_may_take_every_token() {
    let mut spec = deepseek_like();
    spec.top_k = 1;
    spec.routing.method = RoutingMethod::TopK { score: Score::Sigmoid, key: SelectionKey::ScorePlusBias, groups: None };
    let mut layer = RandomLayer::new(spec, 3);
    layer.selection_bias = Some((0..12).map(|e| if e == 7 { 10.0 } else { -3.0 }).collect());
    check(&layer, 130, &TILED, "expert 7 takes all");
    check(&layer, 130, &GEMV, "expert 7 takes all");
}

#[test]
fn every_expert_may_be_chosen() {
    let mut spec = deepseek_like();
    spec.top_k = 12;
    spec.routing.method = RoutingMethod::TopK { score: Score::Softmax, key: SelectionKey::Score, groups: None };
    check(&RandomLayer::new(spec, 4), 9, &AUTO, "k = E");
}

#[test]
fn a_thousand_experts_are_not_too_many() {
    let mut spec = deepseek_like();
    spec.num_experts = 1023;
    spec.experts.intermediate_size = 4;
    spec.hidden_size = 16;
    spec.routing.method = RoutingMethod::TopK { score: Score::Sigmoid, key: SelectionKey::ScorePlusBias, groups: None };
    let layer = RandomLayer::new(spec, 5);
    check(&layer, 70, &TILED, "E = 1023");
    check(&layer, 3, &GEMV, "E = 1023");
}

/// Twins of what only CUDA has: the schedule is right wherever its kernels equal them.
#[test]
fn schedules_for_matrix_units_compute_the_layer() {
    for (matrix_units, kernel) in
        [(Units::Warps, "grouped_gemm/mma"), (Units::Warpgroups { multiprocessors: 132 }, "grouped_gemm/wgmma")]
    {
        for spec in for_matrix_units() {
            let layer = RandomLayer::new(spec, 21);
            let (hidden_states, _) = layer.inputs(90, 22);
            let want = layer.reference(&hidden_states, None);
            for options in UNIT_CUTS {
                let facts = with_units(matrix_units);
                let cpu = layer.on_cpu(90, &options, Some(facts));
                let kernels: Vec<_> =
                    cpu.bound().steps(90).iter().map(|step| step.operation.source().kernel()).collect();
                // Warpgroups leave these to warps.
                let kernel = match layer.spec.experts.format {
                    WeightFormat::Bf16 | WeightFormat::Mxfp4 if options.cuts == PAIRS.cuts => "grouped_gemm/mma",
                    WeightFormat::Fp8Channel => "grouped_gemm/mma",
                    WeightFormat::Fp8Block { .. }
                        if options.cuts == FULL_TILES.cuts && matrix_units != Units::Warps =>
                    {
                        "grouped_gemm/wgmma_codes"
                    }
                    _ => kernel,
                };
                assert_eq!(kernels.contains(&kernel), options.cuts != GEMV.cuts, "{kernels:?}");
                compare(&layer, &want, &cpu.run(&Inputs::of(&hidden_states)).unwrap(), kernel);
            }
        }
    }
}

/// Their results leave by vectors, and scales are a warpgroup's.
#[test]
fn warpgroups_leave_segments_that_begin_between_their_rows_to_warps() {
    let facts = with_units(Units::Warpgroups { multiprocessors: 132 });
    let mut found = 0;
    for spec in for_matrix_units() {
        // Some 34 rows a segment.
        let row_bytes = if spec.experts.format == WeightFormat::Bf16 { 576 } else { 288 };
        let layer = RandomLayer::new(spec, 23);
        let (hidden_states, _) = layer.inputs(50, 24);
        let want = layer.reference(&hidden_states, None);
        let options = Options { segment_bytes: Some(34 * row_bytes), ..TILED };
        let cpu = layer.on_cpu(50, &options, Some(facts));
        let schedule = cpu.plan().schedule();
        let odd = |matrix: &PackedMatrix| {
            let mut spans = matrix.segments.iter().flat_map(|segment| &segment.spans);
            matrix.name.starts_with("experts.") && spans.any(|span| !span.row_begin.is_multiple_of(64))
        };
        if schedule.matrices.iter().any(odd) {
            let steps = cpu.bound().steps(50).iter().filter(|step| step.name.starts_with("experts."));
            let kernels: Vec<_> = steps.map(|step| step.operation.source().kernel()).collect();
            assert!(kernels.contains(&"grouped_gemm/mma") && !kernels.contains(&"grouped_gemm/wgmma"), "{kernels:?}");
            found += 1;
        }
        compare(&layer, &want, &cpu.run(&Inputs::of(&hidden_states)).unwrap(), "odd segments");
    }
    assert!(found > 1, "{found} layers");
}

/// Boxes are of whole matrices.
#[test]
fn warpgroups_copy_no_boxes_of_matrices_that_are_split() {
    let facts = with_units(Units::Warpgroups { multiprocessors: 132 });
    for spec in for_matrix_units() {
        let layer = RandomLayer::new(spec, 25);
        let (hidden_states, _) = layer.inputs(50, 26);
        let want = layer.reference(&hidden_states, None);
        // Some 70 rows or more a segment, of which 64 are taken.
        let options = Options { segment_bytes: Some(70 * 576), ..FULL_TILES };
        let cpu = layer.on_cpu(50, &options, Some(facts));
        let steps = cpu.bound().steps(50).iter().filter(|step| step.name.starts_with("experts."));
        let kernels: Vec<_> = steps.map(|step| step.operation.source().kernel()).collect();
        assert!(!kernels.contains(&"grouped_gemm/wgmma_codes"), "{kernels:?}");
        compare(&layer, &want, &cpu.run(&Inputs::of(&hidden_states)).unwrap(), "split matrices");
    }
}

#[test]
fn token_chunks_give_the_same_rows() {
    let layer = RandomLayer::new(deepseek_like(), 6);
    let tokens = 300;
    let (hidden_states, _) = layer.inputs(tokens, 8);
    let want = layer.reference(&hidden_states, None);
    // A binding of 70,000 bytes holds the expert rows of 145 tokens: chunks of 128.
    let facts = DeviceFacts {
        backend: "small",
        max_binding_bytes: 70_000,
        max_workgroups: 65_535,
        exact_halves: false,
        matrix_units: Units::None,
    };
    let cpu = layer.on_cpu(tokens, &AUTO, Some(facts));
    assert_eq!(cpu.plan().schedule().chunk_tokens, 128);
    let inputs = Inputs::of(&hidden_states);
    compare(&layer, &want, &cpu.run(&inputs).unwrap(), "cpu in chunks");
    let gpu = gpu().with_binding_limit(70_000);
    let plan = Plan::new(gpu, &layer.spec, &layer.weights(), tokens, &AUTO).unwrap();
    assert_eq!(plan.schedule().chunk_tokens, 128);
    let session = Session::new(plan, &layer.spec).unwrap();
    compare(&layer, &want, &session.run(&inputs).unwrap(), "wgpu in chunks");
}

#[test]
fn chunks_of_odd_rows_of_16_bits_begin_where_a_binding_may() {
    let mut spec = deepseek_like();
    spec.hidden_size = 33;
    spec.precision = Precision::float32(FloatType::Bf16, FloatType::F16);
    let layer = RandomLayer::new(spec, 9);
    let tokens = 300;
    let (hidden_states, _) = layer.inputs(tokens, 10);
    let want = layer.reference(&hidden_states, None);
    let gpu = gpu().with_binding_limit(60_000);
    let plan = Plan::new(gpu, &layer.spec, &layer.weights(), tokens, &AUTO).unwrap();
    assert_eq!(plan.schedule().chunk_tokens, 128);
    let session = Session::new(plan, &layer.spec).unwrap();
    let inputs = Inputs::of(&hidden_states);
    compare(&layer, &want, &session.run(&inputs).unwrap(), "odd rows in chunks");
}

#[test]
fn as_many_experts_as_a_router_may_have_can_all_be_chosen() {
    let mut spec = deepseek_like();
    (spec.hidden_size, spec.num_experts, spec.top_k) = (4, 1024, 1024);
    spec.experts.intermediate_size = 1;
    spec.routing.method = RoutingMethod::TopK { score: Score::Sigmoid, key: SelectionKey::Score, groups: None };
    for tokens in [64, 65] {
        // 65 tokens have more rows than a grid has workgroups.
        check(&RandomLayer::new(spec.clone(), 10), tokens, &GEMV, &format!("k = E = 1024, {tokens} tokens"));
    }
}

#[test]
fn the_count_of_tokens_may_come_from_the_device() {
    use moewe::Tokens;
    let layer = RandomLayer::new(deepseek_like(), 7);
    let (hidden_states, _) = layer.inputs(20, 9);
    let want = layer.reference(&hidden_states[..13 * 40], None);
    let session = layer.on_gpu(20, &AUTO);
    session.write(&Inputs::of(&hidden_states)).unwrap();
    let count = gpu().upload("count", &[99, 13]).unwrap();
    let mut encoder = gpu().encoder();
    session.bound().record(&mut encoder, &Tokens::Device(&count, 4)).unwrap();
    gpu().submit(encoder).unwrap();
    compare(&layer, &want, &session.outcome(13).unwrap(), "13 tokens");
    let untouched = session.outcome(20).unwrap().output[13 * 40..].iter().all(|value| value.is_nan());
    assert!(untouched, "rows beyond the count were written");
}

/// Both answers come before a buffer is made, and are the same.
#[test]
fn supports_says_what_planning_says() {
    let mut refused = 0;
    for (seed, mut spec) in specs(200).into_iter().enumerate() {
        let rng = &mut Rng::with_seed(seed as u64);
        // A part that no backend has, in one of two specs.
        match rng.usize(0..12) {
            0..4 => spec.precision.block_scale = BlockScale::Folded,
            4..6 => {
                spec.experts.format = WeightFormat::Fp8Block { block: [8, 12], scale: ScaleFormat::F32 };
                // Its blocks lie across the rows of one tensor for both.
                (spec.experts.gate_up_layout, spec.experts.orientation) = (GateUpLayout::Separate, Orientation::OutIn);
            }
            _ => {}
        }
        let layer = RandomLayer::new(spec, seed as u64);
        let word = |result: moewe::Result<()>| result.map_err(|error| error.to_string());
        let early = word(moewe::supports(&moewe::Cpu::new(), &layer.spec, 9));
        let planned = moewe::Plan::new(moewe::Cpu::new(), &layer.spec, &layer.weights(), 9, &AUTO).map(|_| ());
        assert_eq!(early, word(planned), "cpu: {:?}", layer.spec);
        let gpu_early = word(moewe::supports(gpu(), &layer.spec, 9));
        assert_eq!(gpu_early.clone().map_err(|said| said.replace("wgpu ", "cpu ").replace("cuda ", "cpu ")), early);
        refused += usize::from(early.is_err());
        if let Err(said) = early {
            assert!(said.starts_with("cpu does not support "), "{said}");
        }
    }
    assert!((60..160).contains(&refused), "{refused} of 200 were refused");
}

/// Engines that route themselves, padding tokens, repeated ids: any ids and weights.
#[test]
fn ids_and_weights_of_a_caller_give_what_the_reference_says() {
    ids_and_weights_of_a_caller(cases().min(60));
}

pub fn ids_and_weights_of_a_caller(count: usize) {
    use moewe::{Cpu, Tokens};
    fn run<B: Host>(
        backend: B,
        layer: &RandomLayer,
        options: &Options,
        inputs: &LayerInputs,
        routed: &reference::Routed,
    ) -> Vec<f32> {
        let tokens = inputs.hidden_states.len() / layer.spec.hidden_size;
        let plan = Plan::new(backend, &layer.spec, &layer.weights(), tokens, options).unwrap();
        let session = Session::new(plan, &layer.spec).unwrap();
        session.write(&inputs.view()).unwrap();
        let host = session.plan().backend();
        let write = |name: &str, words: &[u32]| {
            if let Some(buffer) = session.scratch().buffer(name) {
                host.write(buffer, 0, words).unwrap();
            }
        };
        write("topk_ids", bytemuck::cast_slice(&routed.topk_ids));
        write("topk_weights", bytemuck::cast_slice(&routed.topk_weights));
        write("shared_weights", bytemuck::cast_slice(&routed.shared_weights));
        let mut encoder = host.encoder();
        session.bound().record_experts(&mut encoder, &Tokens::Host(tokens)).unwrap();
        host.submit(encoder).unwrap();
        session.outcome(tokens).unwrap().output
    }
    // Rows of a batched entry have no ids.
    for (seed, mut spec) in specs(count).into_iter().filter(|spec| !spec.entry.is_batched()).enumerate() {
        let rng = &mut Rng::with_seed(seed as u64);
        // Roundings have tests of their own; here every value is compared closely.
        spec.precision = Precision {
            combine_order: spec.precision.combine_order,
            ..Precision::float32(FloatType::F32, FloatType::F32)
        };
        let layer = RandomLayer::new(spec, seed as u64);
        // A code beside the middle of two moves by an eighth of its value, which is one of a row's many.
        let coded = Slack::of(&layer.spec).whole > 0.0;
        let tolerance = if coded { 0.05 } else { ROW_TOLERANCE };
        let (tokens, k) = (11, layer.spec.top_k);
        let inputs = layer.all_inputs(tokens, 3);
        let selectable = layer.spec.selectable() as i32;
        // Any id twice, none (-1) now and then, padding tokens with none at all, one token with an id that
        // nobody has.
        let id = |rng: &mut Rng, token: usize| match (token, rng.usize(0..5)) {
            (3 | 10, _) | (_, 0) => -1,
            (7, 1) => [selectable, -2, i32::MIN, i32::MAX][rng.usize(0..4)],
            _ => rng.i32(0..selectable),
        };
        let topk_ids: Vec<i32> = (0..tokens * k).map(|slot| id(rng, slot / k)).collect();
        let topk_weights = topk_ids.iter().map(|&id| if id == -1 { 0.0 } else { rng.f32() - 0.3 }).collect();
        let shared_weights = (0..tokens * layer.spec.joint_shares()).map(|_| rng.f32()).collect();
        let routed =
            reference::Routed { logits: vec![], topk_ids, topk_weights, shared_weights, router_states: vec![] };
        let want = reference::experts(&layer.spec, &layer.weights(), inputs.view(), &routed).unwrap();
        for options in [GEMV, TILED] {
            for (name, got) in [
                ("cpu", run(Cpu::new(), &layer, &options, &inputs, &routed)),
                ("wgpu", run(gpu().clone(), &layer, &options, &inputs, &routed)),
            ] {
                let h = layer.spec.hidden_size;
                for (token, (want, got)) in want.chunks(h).zip(got.chunks(h)).enumerate() {
                    let largest = want.iter().fold(1f32, |largest, value| largest.max(value.abs()));
                    let close = want.iter().zip(got).all(|(want, got)| same(*want, *got, tolerance * largest));
                    assert!(close, "{name}: seed {seed}, {options:?}, token {token}: {got:?}, expected {want:?}");
                }
            }
        }
    }
}
