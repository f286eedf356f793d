//! Whole layers: every backend against the reference.

use fastrand::Rng;
use moewe::Options;
use moewe::host::Outcome;
use moewe::reference::{self, Inputs};
use moewe::spec::*;

use crate::rig::{AUTO, GEMV, RandomLayer, TILED, deepseek_like, gpu, random_spec};

/// Largest |a - b| in units of one f32 ulp of the row's largest value: a row is a sum of products of
/// one size, so its rounding errors have the size of its largest terms.
const ROW_TOLERANCE: f32 = 1e-5;
/// Scores pass one exponential, which WGSL gives to 3 + 2|x| ulp.
const WEIGHT_TOLERANCE: f32 = 1e-5;

/// Compares what each token got. A token may have other experts, or another order of them, only where the
/// reference itself chooses so after logits moved by rounding; such tokens are few.
fn compare(layer: &RandomLayer, want: &reference::Layer, got: &Outcome, what: &str) {
    let (k, h) = (layer.spec.top_k, layer.spec.hidden_size);
    let tokens = want.output.len() / h;
    let mut compared = 0;
    for token in 0..tokens {
        let slots = token * k..(token + 1) * k;
        let by_id = |ids: &[i32], weights: &[f32]| {
            let mut pairs: Vec<(i32, f32)> = ids.iter().copied().zip(weights.iter().copied()).collect();
            pairs.sort_by_key(|(id, _)| *id);
            pairs
        };
        let (want_ids, got_ids) = (&want.routed.topk_ids[slots.clone()], &got.topk_ids[slots.clone()]);
        if want_ids != got_ids {
            let near = near_tie(layer, want, token, got_ids);
            assert!(near, "{what}: token {token}: ids {got_ids:?}, expected {want_ids:?}");
        }
        let want_pairs = by_id(want_ids, &want.routed.topk_weights[slots.clone()]);
        let got_pairs = by_id(got_ids, &got.topk_weights[slots]);
        if want_pairs.iter().zip(&got_pairs).any(|(want, got)| want.0 != got.0) {
            continue;
        }
        for ((id, want), (_, got)) in want_pairs.into_iter().zip(got_pairs) {
            let close = (want - got).abs() <= WEIGHT_TOLERANCE * want.abs().max(1.0);
            assert!(close, "{what}: token {token}, weight of expert {id}: {got}, expected {want}");
        }
        let want = &want.output[token * h..(token + 1) * h];
        let got = &got.output[token * h..(token + 1) * h];
        let largest = want.iter().fold(0f32, |largest, value| largest.max(value.abs()));
        let ulp = match layer.spec.precision.output {
            FloatType::F32 => 0.0,
            FloatType::F16 => 1.0 / 1024.0,
            FloatType::Bf16 => 1.0 / 128.0,
        };
        for (at, (want, got)) in want.iter().zip(got).enumerate() {
            let allowed = ROW_TOLERANCE * largest.max(1.0) + ulp * want.abs() + 1e-7 * ulp;
            let close = (want - got).abs() <= allowed || (want.is_infinite() && want == got);
            assert!(close, "{what}: token {token} value {at}: {got}, expected {want} within {allowed}");
        }
        compared += 1;
    }
    assert!(10 * compared >= 9 * tokens, "{what}: only {compared} of {tokens} tokens were compared");
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
    let router = moewe::RouterWeights { weight: None, bias: None, ..weights };
    let row = vec![0.0; spec.hidden_size];
    let inputs = Inputs { hidden_states: &row, token_ids: None, logits: Some(&logits) };
    match spec.routing.method {
        // The table leaves no choice.
        RoutingMethod::Hash { .. } => false,
        _ => reference::route(&spec, &router, inputs).unwrap().topk_ids == ids,
    }
}

fn check(layer: &RandomLayer, tokens: usize, options: &Options, what: &str) {
    let (hidden_states, token_ids) = layer.inputs(tokens, 7);
    let want = layer.reference(&hidden_states, token_ids.as_deref());
    let inputs = Inputs { hidden_states: &hidden_states, token_ids: token_ids.as_deref(), logits: None };
    let cpu = layer.on_cpu(tokens.max(1), options, None);
    compare(layer, &want, &cpu.run(&inputs).unwrap(), &format!("cpu: {what}"));
    let session = layer.on_gpu(tokens.max(1), options);
    let got = session.run(&inputs).unwrap();
    compare(layer, &want, &got, &format!("wgpu: {what}"));
    let again = session.run(&inputs).unwrap();
    let bits = |outcome: &Outcome| outcome.output.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
    assert_eq!(bits(&got), bits(&again), "wgpu: {what}: two runs differ");
}

/// Random specs a run: 40 here, more through MOEWE_CASES.
fn cases() -> u64 {
    std::env::var("MOEWE_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(40)
}

#[test]
fn random_layers_agree_with_the_reference() {
    for seed in 0..cases() {
        let rng = &mut Rng::with_seed(0x5eed + seed);
        let layer = RandomLayer::new(random_spec(rng), seed);
        let tokens = [1, 2, 3, 7, 9, 65][rng.usize(0..6)];
        let options = [AUTO, GEMV, TILED][rng.usize(0..3)];
        check(&layer, tokens, &options, &format!("seed {seed}, {tokens} tokens, {options:?}, {:?}", layer.spec));
    }
}

#[test]
fn each_kernel_takes_each_number_of_tokens() {
    let layer = RandomLayer::new(deepseek_like(), 1);
    for tokens in [0, 1, 2, 3, 4, 5, 127, 128, 129] {
        for options in [AUTO, GEMV, TILED] {
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
        for segment_bytes in [512, 1000, 4096, 64 << 10] {
            for decode_tokens in [0, usize::MAX] {
                let options = Options { segment_bytes: Some(segment_bytes), decode_tokens };
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
    for decode_tokens in [0, usize::MAX] {
        // A segment holds 127 rows, of which the cut takes 64: the rest must begin another segment.
        let options = Options { segment_bytes: Some(64 << 10), decode_tokens };
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

#[test]
fn token_chunks_give_the_same_rows() {
    use moewe::schedule::DeviceFacts;
    let layer = RandomLayer::new(deepseek_like(), 6);
    let tokens = 300;
    let (hidden_states, _) = layer.inputs(tokens, 8);
    let want = layer.reference(&hidden_states, None);
    // A binding of 70,000 bytes holds the expert rows of 145 tokens: chunks of 128.
    let facts = DeviceFacts { backend: "small", max_binding_bytes: 70_000, max_workgroups: 65_535 };
    let cpu = layer.on_cpu(tokens, &AUTO, Some(facts));
    assert_eq!(cpu.plan().schedule().chunk_tokens, 128);
    let inputs = Inputs { hidden_states: &hidden_states, token_ids: None, logits: None };
    compare(&layer, &want, &cpu.run(&inputs).unwrap(), "cpu in chunks");
    let gpu = moewe::backend::wgpu::Wgpu::with_binding_limit(gpu(), 70_000);
    let plan = moewe::Plan::new(gpu, &layer.spec, &layer.weights(), tokens, &AUTO).unwrap();
    assert_eq!(plan.schedule().chunk_tokens, 128);
    let session = moewe::host::Session::new(plan, &layer.spec).unwrap();
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
    let plan = moewe::Plan::new(gpu, &layer.spec, &layer.weights(), tokens, &AUTO).unwrap();
    assert_eq!(plan.schedule().chunk_tokens, 128);
    let session = moewe::host::Session::new(plan, &layer.spec).unwrap();
    let inputs = Inputs { hidden_states: &hidden_states, token_ids: None, logits: None };
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
    use moewe::host::Host;
    let layer = RandomLayer::new(deepseek_like(), 7);
    let (hidden_states, _) = layer.inputs(20, 9);
    let want = layer.reference(&hidden_states[..13 * 40], None);
    let session = layer.on_gpu(20, &AUTO);
    session.write(&Inputs { hidden_states: &hidden_states, token_ids: None, logits: None }).unwrap();
    let count = gpu().upload("count", &[99, 13]).unwrap();
    let mut encoder = gpu().encoder();
    session.bound().record(&mut encoder, &Tokens::Device(&count, 4)).unwrap();
    gpu().submit(encoder).unwrap();
    compare(&layer, &want, &session.outcome(13).unwrap(), "13 tokens");
    let untouched = session.outcome(20).unwrap().output[13 * 40..].iter().all(|value| value.is_nan());
    assert!(untouched, "rows beyond the count were written");
}
