//! Faults that other projects had, as tests: rows of the conformance suite. A name is the row's number and the
//! rule. Rows 26 and 27 stand beside what they are about; those of LoRA and expert parallelism come with them.
//!
//! A long file: the whole list in one place.

use moewe::host::Host;
use moewe::kernels::pack::{GroupSource, PackedMatrix, SPAN_WORDS, Span};
use moewe::reference::Inputs;
use moewe::schedule::{DeviceFacts, Units, lower};
use moewe::spec::*;
use moewe::weights::{Dtype, Rows, Stored};
use moewe::{Matrix, Options, Tensor, numerics};

use crate::layers::{check, check_inputs};
use crate::random::FORMATS;
use crate::rig::{GEMV, LayerInputs, RandomLayer, TILED, deepseek_like, gpu};

/// Few and many tokens, through both GEMM kernels.
const PATHS: [(usize, Options); 4] = [(1, GEMV), (5, GEMV), (5, TILED), (70, TILED)];

/// Both backends give on every path what the reference gives, and the reference moves far when the parameter
/// is dropped.
fn acts(spec: &MoeSpec, dropped: impl Fn(&mut MoeSpec), what: &str) {
    let mut without = spec.clone();
    dropped(&mut without);
    assert_ne!(spec, &without, "{what}: nothing was dropped");
    without.validate().unwrap();
    let (layer, without) = (RandomLayer::new(spec.clone(), 61), RandomLayer::new(without, 61));
    for (tokens, options) in PATHS {
        check(&layer, tokens, &options, what);
        let inputs = layer.all_inputs(tokens, 7);
        let (with, lost) = (layer.judge(inputs.view()), without.judge(inputs.view()));
        let far = with.output.iter().zip(&lost.output).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
        assert!(far > 1e-2, "{what}: dropping it moves the output by {far} only");
    }
}

fn shared(spec: &mut MoeSpec) -> &mut SharedExperts {
    spec.shared.as_mut().unwrap()
}

fn top_k(score: Score, key: SelectionKey) -> RoutingMethod {
    RoutingMethod::TopK { score, key, groups: None }
}

/// A layer without experts' work, whose logits the caller gives.
fn router_only(method: RoutingMethod, num_experts: usize, k: usize) -> MoeSpec {
    let mut spec = deepseek_like();
    (spec.hidden_size, spec.num_experts, spec.top_k) = (4, num_experts, k);
    spec.experts.intermediate_size = 2;
    spec.shared = None;
    spec.router = Router::Given { transform: LogitTransform::None };
    spec.routing.method = method;
    spec.routing.renormalize = Some(Denominator::SumPlus { eps: 1e-20 });
    spec
}

/// Ids and weights of given logits, the same from all three.
fn routed(layer: &RandomLayer, logits: &[f32]) -> (Vec<i32>, Vec<f32>) {
    let tokens = logits.len() / layer.spec.router_outputs();
    let hidden_states = vec![1.0; tokens * layer.spec.hidden_size];
    let inputs = Inputs { logits: Some(logits), ..Inputs::of(&hidden_states) };
    let want = layer.judge(inputs).routed;
    for outcome in
        [layer.on_cpu(tokens, &GEMV, None).run(&inputs).unwrap(), layer.on_gpu(tokens, &GEMV).run(&inputs).unwrap()]
    {
        assert_eq!(outcome.topk_ids, want.topk_ids);
        for (got, want) in outcome.topk_weights.iter().zip(&want.topk_weights) {
            assert!((got - want).abs() <= 1e-6 * want.abs().max(1.0) || (got.is_nan() && want.is_nan()));
        }
    }
    (want.topk_ids, want.topk_weights)
}

#[test]
fn bug_01_the_limit_reaches_every_gemm_path() {
    acts(&deepseek_like(), |spec| spec.experts.activation = Activation::Swiglu { limit: None }, "limit");
}

#[test]
fn bug_02_the_shared_expert_is_clamped() {
    acts(&deepseek_like(), |spec| shared(spec).mlp.activation = Activation::Swiglu { limit: None }, "shared limit");
}

#[test]
fn bug_03_the_limit_reaches_every_weight_format() {
    for format in FORMATS {
        // Widths that every format fits.
        let mut spec = deepseek_like();
        (spec.hidden_size, spec.experts.intermediate_size) = (256, 256);
        shared(&mut spec).mlp.intermediate_size = 256;
        (spec.experts.format, shared(&mut spec).mlp.format) = (format, format);
        acts(&spec, |spec| spec.experts.activation = Activation::Swiglu { limit: None }, "limit");
    }
}

/// vLLM #42287, #42855: the limit in quantised paths, fused with the quantisation and before it, in the routed and
/// in the shared expert.
#[test]
fn bug_01_and_02_the_limit_reaches_every_quantised_path() {
    for (quant, format) in [
        (ActivationQuant::dynamic_fp8(32, ActivationScale::F32), WeightFormat::Fp8Channel),
        (ActivationQuant::dynamic_fp8(64, ActivationScale::Ue8m0Packed), WeightFormat::Mxfp4),
        (ActivationQuant::Static { code: ActivationCode::E4m3 }, WeightFormat::Fp8Tensor),
    ] {
        let mut spec = deepseek_like();
        let mlps = [&mut spec.experts, &mut spec.shared.as_mut().unwrap().mlp];
        for mlp in mlps {
            (mlp.activation_quant, mlp.format) = (quant, format);
        }
        let mut without = spec.clone();
        without.experts.activation = Activation::Swiglu { limit: None };
        let mut shared_without = spec.clone();
        shared(&mut shared_without).mlp.activation = Activation::Swiglu { limit: None };
        let layer = RandomLayer::new(spec, 61);
        for fuse_quantization in [true, false] {
            for base in [GEMV, TILED] {
                check(&layer, 5, &Options { fuse_quantization, ..base }, "limit behind quantised rows");
            }
        }
        let inputs = layer.all_inputs(5, 7);
        let with = layer.judge(inputs.view());
        for lost in [without, shared_without] {
            let lost = RandomLayer::new(lost, 61).judge(inputs.view());
            let far = with.output.iter().zip(&lost.output).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
            assert!(far > 0.05, "dropping a limit moves the output by {far} only");
        }
    }
}

/// vLLM #39046, #48173: sizes that are no multiple of 128 have partial blocks, each with a scale of its own.
#[test]
fn bug_28_partial_blocks_have_their_scales() {
    for scale in [ScaleFormat::F32, ScaleFormat::E8m0] {
        let mut spec = deepseek_like();
        (spec.hidden_size, spec.experts.intermediate_size) = (320, 192);
        spec.experts.format = WeightFormat::Fp8Block { block: [128, 128], scale };
        for quant in [ActivationQuant::None, ActivationQuant::dynamic_fp8(128, ActivationScale::F32)] {
            spec.experts.activation_quant = quant;
            let layer = RandomLayer::new(spec.clone(), 28);
            for (tokens, options) in PATHS {
                check(&layer, tokens, &options, "partial blocks");
            }
        }
    }
}

/// FlashInfer #3103: the output is dense [T, H], row by row, and nothing behind the last token is touched.
#[test]
fn bug_30_the_output_is_dense_and_nothing_behind_it_is_touched() {
    let layer = RandomLayer::new(deepseek_like(), 30);
    let h = layer.spec.hidden_size;
    for options in [GEMV, TILED] {
        let session = layer.on_gpu(9, &options);
        let read = || gpu().read(session.output().unwrap()).unwrap();
        let before = read();
        for tokens in [1, 4, 9] {
            let inputs = layer.all_inputs(tokens, 5);
            let output = session.run(&inputs.view()).unwrap().output;
            let words = read();
            let bits: Vec<u32> = output.iter().map(|value| value.to_bits()).collect();
            assert_eq!(words[..tokens * h], bits, "row t begins at t * H");
            if tokens == 1 {
                assert_eq!(words[h..], before[h..], "words behind the last row changed");
            }
        }
    }
}

/// llama.cpp #25582: one path gives another layer than the others. Whatever the path, format and number of tokens:
/// the reference's.
#[test]
fn bug_37_every_path_gives_the_same_layer() {
    for format in [WeightFormat::Mxfp4, WeightFormat::Q8_0, WeightFormat::Nvfp4] {
        let mut spec = deepseek_like();
        (spec.hidden_size, spec.experts.intermediate_size) = (64, 32);
        spec.experts.format = format;
        let layer = RandomLayer::new(spec, 37);
        for (tokens, options) in PATHS {
            check(&layer, tokens, &options, "path");
        }
    }
}

#[test]
fn bug_04_gate_is_bounded_above_only_and_up_on_both_sides() {
    let limited = Activation::Swiglu { limit: Some(0.75) };
    let value = |gate, up| numerics::activate(limited, gate, up);
    assert_eq!(value(-5.0, 1.0), numerics::activate(Activation::Swiglu { limit: None }, -5.0, 0.75));
    assert_eq!(value(1.0, -9.0), -value(1.0, 9.0));
    acts(
        &deepseek_like(),
        |spec| spec.experts.activation = Activation::Swiglu { limit: Some(0.1) },
        "the limit's value",
    );
}

#[test]
fn bug_05_a_clamp_before_and_one_behind_silu_are_two_functions() {
    let mut spec = deepseek_like();
    spec.experts.activation = Activation::SwigluClampAfter { limit: 0.3 };
    acts(&spec, |spec| spec.experts.activation = Activation::Swiglu { limit: Some(0.3) }, "clamp behind silu");
    let mut spec = deepseek_like();
    spec.experts.activation = Activation::SwigluOai { alpha: 1.702, limit: Some(0.75), beta: 1.0 };
    acts(&spec, |spec| spec.experts.activation = Activation::Swiglu { limit: Some(0.75) }, "alpha and beta");
}

#[test]
fn bug_06_the_routed_scale_reaches_every_routing_method() {
    let methods = [
        top_k(Score::Softmax, SelectionKey::Score),
        top_k(Score::Sigmoid, SelectionKey::ScorePlusBias),
        top_k(Score::SqrtSoftplus, SelectionKey::ScorePlusBias),
        top_k(Score::Sigmoid, SelectionKey::LogitPlusBias),
        RoutingMethod::TopKThenScore { score: ChosenScore::Softmax },
        RoutingMethod::TopKThenScore { score: ChosenScore::Sigmoid },
        RoutingMethod::Hash { score: Score::SqrtSoftplus, vocab_size: 17 },
    ];
    for method in methods {
        let mut spec = deepseek_like();
        spec.routing.method = method;
        acts(&spec, |spec| spec.routing.routed_scaling_factor = 1.0, "routed scale");
    }
}

#[test]
fn bug_07_the_routed_scale_acts_once_and_never_on_the_shared_expert() {
    for on_output in [false, true] {
        let mut spec = deepseek_like();
        spec.routing.apply_routed_scale_to_output = on_output;
        acts(&spec, |spec| spec.routing.routed_scaling_factor = 6.25, "the scale twice");
        acts(&spec, |spec| spec.routing.routed_scaling_factor = 1.0, "the scale never");
    }
}

#[test]
fn bug_08_one_expert_a_token_with_a_routed_scale() {
    let mut spec = deepseek_like();
    spec.top_k = 1;
    acts(&spec, |spec| spec.routing.routed_scaling_factor = 1.0, "k = 1");
}

#[test]
fn bug_09_the_biased_score_is_no_weight() {
    let mut layer = RandomLayer::new(router_only(top_k(Score::Sigmoid, SelectionKey::ScorePlusBias), 4, 2), 62);
    layer.selection_bias = Some(vec![0.0, 9.0, 0.0, 5.0]);
    let (ids, weights) = routed(&layer, &[0.0, 0.0, 3.0, 0.0]);
    assert_eq!(ids, [1, 3]);
    // Equal scores: equal weights, whatever the bias.
    assert_eq!(weights, [1.25, 1.25]);
}

#[test]
fn bug_10_large_biases_do_not_cancel_small_scores() {
    let mut layer = RandomLayer::new(router_only(top_k(Score::Sigmoid, SelectionKey::ScorePlusBias), 4, 2), 62);
    layer.selection_bias = Some(vec![35.0, 12.0, -3.0, 0.5]);
    // Scores of 1e-9: (s + b) - b would be 0, and 0 / 0 the weight.
    let (ids, weights) = routed(&layer, &[-20.723, -20.723, 2.0, 2.0]);
    assert_eq!((ids, weights), (vec![0, 1], vec![1.25, 1.25]));
}

#[test]
fn bug_11_the_selection_bias_stays_f32() {
    let mut layer = RandomLayer::new(router_only(top_k(Score::Sigmoid, SelectionKey::ScorePlusBias), 4, 2), 62);
    // All the same in bf16.
    layer.selection_bias = Some(vec![7.001, 7.004, 7.002, 7.003]);
    assert_eq!(routed(&layer, &[0.0; 4]).0, [1, 3]);
}

#[test]
fn bug_12_the_bias_of_the_weights_is_the_one_that_is_used() {
    let mut layer = RandomLayer::new(router_only(top_k(Score::Sigmoid, SelectionKey::ScorePlusBias), 4, 1), 62);
    for chosen in 0..4 {
        layer.selection_bias = Some((0..4).map(|e| if e == chosen { 1.0 } else { 0.0 }).collect());
        assert_eq!(routed(&layer, &[0.0; 4]).0, [chosen]);
    }
}

#[test]
fn bug_13_the_type_of_the_input_and_the_norm_flag_are_heeded() {
    for input in [FloatType::F32, FloatType::F16, FloatType::Bf16] {
        let mut spec = deepseek_like();
        spec.precision = Precision::float32(input, FloatType::F32);
        acts(&spec, |spec| spec.routing.renormalize = None, "renormalisation");
    }
}

#[test]
fn bug_14_groups_are_excluded_by_membership_and_not_by_a_value() {
    let groups = Some(Groups { n_group: 2, topk_group: 1, score: GroupScore::Top2SumOfKey });
    let method = RoutingMethod::TopK { score: Score::Sigmoid, key: SelectionKey::ScorePlusBias, groups };
    let mut layer = RandomLayer::new(router_only(method, 6, 3), 62);
    // Every key is negative: a masked value of 0 would win.
    layer.selection_bias = Some(vec![-5.0, -6.0, -7.0, -3.0, -4.0, -8.0]);
    assert_eq!(routed(&layer, &[0.0; 6]).0, [3, 4, 5]);
}

#[test]
fn bug_15_the_bias_is_not_lost_without_groups_and_shared_expert() {
    let mut spec = deepseek_like();
    spec.shared = None;
    spec.routing.method = top_k(Score::Sigmoid, SelectionKey::ScorePlusBias);
    acts(&spec, |spec| spec.routing.method = top_k(Score::Sigmoid, SelectionKey::Score), "bias");
}

#[test]
fn bug_16_keys_that_are_all_negative_select_distinct_experts() {
    for (score, logit) in [(Score::Identity, -1e30f32), (Score::Identity, -3.0), (Score::Sigmoid, -80.0)] {
        let mut spec = router_only(top_k(score, SelectionKey::LogitPlusBias), 5, 3);
        spec.routing.renormalize = None;
        let mut layer = RandomLayer::new(spec, 62);
        layer.selection_bias = Some(vec![-1e31, -2e31, -1e31, -3e31, -0.5e31]);
        assert_eq!(routed(&layer, &[logit; 5]).0, [4, 0, 2]);
    }
}

#[test]
fn bug_17_rows_of_nan_give_distinct_ids_in_range_and_no_weight() {
    for score in [Score::Softmax, Score::Sigmoid, Score::SqrtSoftplus, Score::Identity] {
        for (policy, nan) in [(NanPolicy::Zero, false), (NanPolicy::Propagate, true)] {
            let mut spec = router_only(top_k(score, SelectionKey::Score), 5, 3);
            spec.routing.nan_policy = policy;
            let (ids, weights) = routed(&RandomLayer::new(spec, 62), &[f32::NAN; 5]);
            assert_eq!(ids, [0, 1, 2]);
            assert!(weights.iter().all(|weight| if nan { weight.is_nan() } else { *weight == 0.0 }), "{weights:?}");
        }
    }
}

#[test]
fn bug_18_ties_go_to_the_lowest_id_in_every_kernel() {
    for method in [
        top_k(Score::Softmax, SelectionKey::Score),
        top_k(Score::Sigmoid, SelectionKey::Score),
        RoutingMethod::TopKThenScore { score: ChosenScore::Softmax },
    ] {
        let layer = RandomLayer::new(router_only(method, 6, 4), 62);
        let (ids, weights) = routed(&layer, &[0.0, 1.0, -0.0, 1.0, 0.0, 1.0]);
        assert_eq!(ids, [1, 3, 5, 0]);
        assert!(weights[0] == weights[1] && weights[1] == weights[2]);
    }
    // Groups that tie: the lowest group too.
    let groups = Some(Groups { n_group: 3, topk_group: 1, score: GroupScore::MaxOfScore });
    let method = RoutingMethod::TopK { score: Score::Softmax, key: SelectionKey::Score, groups };
    assert_eq!(routed(&RandomLayer::new(router_only(method, 6, 2), 62), &[1.0; 6]).0, [0, 1]);
}

#[test]
fn bug_19_softmax_over_all_is_not_softmax_over_the_chosen() {
    let mut spec = deepseek_like();
    spec.routing.method = top_k(Score::Softmax, SelectionKey::Score);
    spec.routing.renormalize = None;
    let chosen = RoutingMethod::TopKThenScore { score: ChosenScore::Softmax };
    acts(&spec, |spec| spec.routing.method = chosen.clone(), "softmax over all");
}

#[test]
fn bug_20_groups_that_do_not_divide_the_experts_are_refused_and_never_ignored() {
    for (num_experts, n_group) in [(12, 5), (4, 8), (7, 2)] {
        let mut spec = deepseek_like();
        spec.num_experts = num_experts;
        let groups = Some(Groups { n_group, topk_group: 1, score: GroupScore::MaxOfScore });
        spec.routing.method = RoutingMethod::TopK { score: Score::Sigmoid, key: SelectionKey::Score, groups };
        let said = moewe::supports(gpu(), &spec, 4).unwrap_err().to_string();
        assert!(said.contains("n_group"), "{said}");
    }
    // One expert a group has no second: a sum of two is refused too.
    let mut spec = deepseek_like();
    let groups = Some(Groups { n_group: 12, topk_group: 4, score: GroupScore::Top2SumOfKey });
    spec.routing.method = RoutingMethod::TopK { score: Score::Sigmoid, key: SelectionKey::ScorePlusBias, groups };
    let said = moewe::supports(gpu(), &spec, 4).unwrap_err().to_string();
    assert!(said.contains("n_group"), "{said}");
}

#[test]
fn bug_21_and_45_products_beyond_31_bits_stay_in_chunks() {
    let mut spec = deepseek_like();
    (spec.hidden_size, spec.num_experts, spec.top_k) = (7168, 256, 8);
    spec.experts.intermediate_size = 2048;
    let facts = DeviceFacts {
        backend: "test",
        max_binding_bytes: (2 << 30) - 4,
        max_workgroups: 65_535,
        exact_halves: false,
        matrix_units: Units::None,
    };
    let schedule = lower(&spec, moewe::Scope::Layer, 1 << 17, &facts, &TILED).unwrap();
    for buffer in schedule.buffers.iter().filter(|buffer| buffer.token_bytes.is_none()) {
        assert!(buffer.bytes < 1 << 31, "{}", buffer.name);
    }
}

/// An INT4 layer at the size of Kimi-K2's: 384 experts, groups of 32 columns.
fn kimi_k2() -> MoeSpec {
    let mut spec = deepseek_like();
    (spec.hidden_size, spec.num_experts, spec.top_k) = (7168, 384, 8);
    spec.experts.intermediate_size = 2048;
    spec.experts.format =
        WeightFormat::Int4 { group: Some(32), scale: ScaleFormat::Bf16, zero_points: false, act_order: false };
    spec
}

/// The packed weights of that layer, for a device with bindings of this size.
fn kimi_k2_matrix(name: &str, max_binding_bytes: u64) -> PackedMatrix {
    let facts = DeviceFacts {
        backend: "test",
        max_binding_bytes,
        max_workgroups: 65_535,
        exact_halves: false,
        matrix_units: Units::None,
    };
    let schedule = lower(&kimi_k2(), moewe::Scope::Layer, 4096, &facts, &TILED).unwrap();
    schedule.matrices.into_iter().find(|matrix| matrix.name == name).unwrap()
}

/// WebGPU's default, and what large adapters have.
const BINDINGS: [u64; 2] = [128 << 20, (2 << 30) - 4];

/// vLLM #45884: int32 offsets in kernels for 4-bit weights. Elements of a matrix are beyond 2^32, those of a segment
/// may be beyond 2^31; what a kernel counts, vectors and words of one segment, is not.
#[test]
fn bug_22_offsets_of_four_bit_weights_fit_32_bits() {
    for (max_binding_bytes, large) in BINDINGS.into_iter().zip([false, true]) {
        for (name, [rows, cols]) in [("experts.gate_up", [4096, 7168]), ("experts.down", [7168, 2048])] {
            let matrix = kimi_k2_matrix(name, max_binding_bytes);
            let all = [384, rows, cols].into_iter().try_fold(1u64, |all, size| all.checked_mul(size)).unwrap();
            assert!([matrix.groups, matrix.rows, matrix.cols] == [384, rows as usize, cols as usize] && all > 1 << 32);
            let blocks = matrix.blocks().unwrap();
            let (row_vecs, scale_words) = (matrix.vecs_per_row() as i32, blocks.words as i32);
            let (mut placed, mut most) = (0, 0);
            for (at, segment) in matrix.segments.iter().enumerate() {
                let words = i32::try_from(segment.words).unwrap();
                assert!(4 * segment.words as u64 <= max_binding_bytes);
                let mut elements = 0;
                for (span, row) in segment.spans.iter().map(|span| (span, span.group * SPAN_WORDS)) {
                    // As the kernels read it: rows, vectors of codes, words of scales.
                    let table = &matrix.span_table(at)[row..][..SPAN_WORDS];
                    let entry = |at: usize| i32::try_from(table[at]).unwrap();
                    let [begin, end, codes, scales] = [0, 1, 2, 3].map(entry);
                    assert_eq!([begin, end, 4 * codes, scales].map(|entry| entry as usize), {
                        [span.row_begin, span.row_end, span.codes, span.scales]
                    });
                    let last = end - 1 - begin;
                    let vec = last.checked_mul(row_vecs).and_then(|vec| vec.checked_add(codes + row_vecs - 1)).unwrap();
                    assert_eq!(vec.checked_mul(4).and_then(|word| word.checked_add(4)), Some(scales));
                    let behind = last.checked_add(1).and_then(|rows| rows.checked_mul(scale_words)).unwrap();
                    assert!(scales.checked_add(behind).unwrap() <= words);
                    elements += u64::from((end - begin) as u32) * cols;
                }
                placed += elements;
                most = most.max(elements);
            }
            assert_eq!(placed, all);
            assert_eq!(most > 1 << 31, large, "{name}: {most} elements in a segment");
        }
    }
}

/// Likewise from the checkpoint to the packed weights: the last expert of a stack of 2^33 codes, in a file with a hole
/// where the others would be.
#[test]
fn bug_22_the_last_expert_of_a_stack_is_itself() {
    use std::io::{Seek, SeekFrom, Write};
    let (experts, rows, cols, group) = (384, 4096, 7168, 32);
    let (row_bytes, groups) = (cols / 2, cols / group);
    let sizes = [experts * rows * row_bytes, experts * rows * groups * 2];
    let entry = |dtype: &str, width: usize, start: usize, end: usize| serde_json::json!({"dtype": dtype, "shape": [experts, rows, width], "data_offsets": [start, end]});
    let header = serde_json::json!({
        "codes": entry("I32", cols / 8, 0, sizes[0]), "scales": entry("BF16", groups, sizes[0], sizes[0] + sizes[1]),
    });
    let header = header.to_string();
    let first = 8 + header.len();
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), "{}").unwrap();
    let mut file = std::fs::File::create(dir.path().join("model.safetensors")).unwrap();
    file.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
    file.write_all(header.as_bytes()).unwrap();
    file.set_len((first + sizes[0] + sizes[1]) as u64).unwrap();
    // The scales of the last expert, and the codes of its last rows of gate (2,047) and up (4,095).
    let rng = &mut fastrand::Rng::with_seed(22);
    let scales: Vec<u16> = (0..rows * groups).map(|_| rng.u16(0x3c00..0x3e00)).collect();
    let codes: Vec<u8> = (0..2 * row_bytes).map(|_| rng.u8(..)).collect();
    let mut put = |at: usize, bytes: &[u8]| {
        file.seek(SeekFrom::Start((first + at) as u64)).unwrap();
        file.write_all(bytes).unwrap();
    };
    put(sizes[0] + sizes[1] - 2 * scales.len(), bytemuck::cast_slice(&scales));
    put(sizes[0] - (rows / 2 + 1) * row_bytes, &codes[..row_bytes]);
    put(sizes[0] - row_bytes, &codes[row_bytes..]);

    let checkpoint = moewe::Checkpoint::open(dir.path()).unwrap();
    let [stored, stored_scales] = ["codes", "scales"].map(|name| checkpoint.tensor(name).unwrap());
    let format = kimi_k2().experts.format;
    let view = |rows, at| {
        let stored = Stored::PackQuantized { codes: &stored, scales: &stored_scales, zeros: None, g_idx: None };
        Matrix::view(stored, format, Orientation::OutIn, rows, Some((at, experts)), [2048, cols])
    };
    let parts = [Rows::Gate(GateUpLayout::Halves), Rows::Up(GateUpLayout::Halves)];
    let matrices = parts.map(|part| view(part, experts - 1).unwrap());
    // The one before it is the hole.
    assert!(view(parts[1], experts - 2).unwrap_err().to_string().contains("a scale of 0"));
    let value = |part: usize, row: usize, col: usize| {
        let byte = if row == 2047 { codes[part * row_bytes + col / 2] } else { 0 };
        let scale = f32::from_bits(u32::from(scales[(2048 * part + row) * groups + col / group]) << 16);
        (f32::from(byte >> (4 * (col % 2)) & 15) - 8.0) * scale
    };
    for max_binding_bytes in BINDINGS {
        let mut matrix = kimi_k2_matrix("experts.gate_up", max_binding_bytes);
        let mut last = matrix.segments.pop().unwrap();
        last.spans.retain(|span| span.group == experts - 1);
        let span = last.spans[0];
        assert_eq!(span.row_end, rows);
        // Only this run of rows, wherever it lies.
        let mut memory = vec![u32::MAX; last.words - span.codes];
        matrix.segments = vec![last];
        let source = |_| Ok(GroupSource { matrices: matrices.iter().collect(), biases: vec![] });
        let write = &mut |first: usize, words: &[u32]| {
            memory[first - span.codes..][..words.len()].copy_from_slice(words);
            Ok(())
        };
        matrix.pack(0, &source, write).unwrap();
        let here = Span { codes: 0, scales: span.scales - span.codes, bias: span.bias - span.codes, ..span };
        for row in [span.row_begin, span.row_begin + 1, rows - 4, rows - 3, rows - 2, rows - 1] {
            for col in 0..cols {
                let (part, feature) = (row % 2, row / 2);
                let want = value(part, feature, col);
                assert_eq!(matrices[part].get(feature, col), want, "stored ({row}, {col})");
                assert_eq!(matrix.value(&memory, &here, row, col), want, "packed ({row}, {col})");
            }
        }
    }
}

#[test]
fn bug_23_interleaved_rows_are_not_halves() {
    let bytes: Vec<u8> = (0..12u32).flat_map(|value| (value as f32).to_le_bytes()).collect();
    let tensor = Tensor { name: "gate_up_proj".into(), dtype: Dtype::F32, shape: vec![4, 3], bytes: &bytes };
    let first = |rows| {
        let view =
            Matrix::view(Stored::Plain(&tensor), WeightFormat::F32, Orientation::OutIn, rows, None, [2, 3]).unwrap();
        [view.get(0, 0), view.get(1, 0)]
    };
    assert_eq!(first(Rows::Gate(GateUpLayout::Halves)), [0.0, 3.0]);
    assert_eq!(first(Rows::Up(GateUpLayout::Halves)), [6.0, 9.0]);
    assert_eq!(first(Rows::Gate(GateUpLayout::Interleaved)), [0.0, 6.0]);
    assert_eq!(first(Rows::Up(GateUpLayout::Interleaved)), [3.0, 9.0]);
}

#[test]
fn bug_24_rows_are_judged_one_by_one_however_small_they_are() {
    // An absolute tolerance would not see a wrong row of 1e-11: what inputs of 2^-20 give has to be right too.
    let layer = RandomLayer::new(deepseek_like(), 63);
    let mut inputs = layer.all_inputs(9, 3);
    inputs.hidden_states.iter_mut().for_each(|value| *value *= 1.0 / f32::from(1u16 << 10) / f32::from(1u16 << 10));
    let want = layer.judge(inputs.view()).output;
    for got in [
        layer.on_cpu(9, &GEMV, None).run(&inputs.view()).unwrap().output,
        layer.on_gpu(9, &TILED).run(&inputs.view()).unwrap().output,
    ] {
        for (want, got) in want.chunks(40).zip(got.chunks(40)) {
            let size = want.iter().map(|value| value * value).sum::<f32>().sqrt();
            let off = want.iter().zip(got).map(|(a, b)| (a - b) * (a - b)).sum::<f32>().sqrt();
            assert!(size > 0.0 && off <= 1e-4 * size, "{off} of {size}");
        }
    }
}

/// vLLM #43557, aiter #3992, #3212: the exponent of a sixth of the largest magnitude. Ours is the smallest power of two
/// with which nothing saturates (CEIL): the largest magnitude itself at 6 powers, twice as much from just above on.
/// Whatever was chosen, a code means its value times that power.
#[test]
fn bug_25_mxfp4_blocks_are_scaled_by_the_power_that_reaches_their_largest_value() {
    let beside = |value: f32, step: i32| f32::from_bits(value.to_bits().wrapping_add_signed(step));
    for power in [-120, -37, -1, 0, 1, 90] {
        let two = 2f32.powi(power);
        // (largest of a block, its scale, what it decodes to): 7 is a tie of 3 and 4 at twice the power.
        let blocks = [
            (4.0 * two, two, 4.0 * two),
            (beside(4.0 * two, 1), two, 4.0 * two),
            (5.0 * two, two, 4.0 * two),
            (beside(6.0 * two, -1), two, 6.0 * two),
            (6.0 * two, two, 6.0 * two),
            (beside(6.0 * two, 1), 2.0 * two, 6.0 * two),
            (7.0 * two, 2.0 * two, 8.0 * two),
            (beside(8.0 * two, -1), 2.0 * two, 8.0 * two),
        ];
        let bytes = blocks.map(|(amax, scale, _)| {
            let byte = numerics::mxfp4_scale(numerics::Mxfp4Scale::Ceil, amax);
            assert_eq!(numerics::decode_e8m0(byte), scale, "{amax:e}");
            byte
        });
        // A row of blocks, each with its largest value at another place and sign, among all other codes.
        let negative = |block: usize| block % 2 == 1;
        let value = |block: usize, col: usize| {
            let (amax, scale, _) = blocks[block];
            let sign = if negative(block) { -1.0 } else { 1.0 };
            let other = numerics::decode_e2m1(((col + block) % 8) as u8 + 8 * (col % 2) as u8);
            if col == 4 * block { sign * amax } else { (other * scale).clamp(-amax, amax) }
        };
        let code = |block: usize, col: usize| numerics::encode_e2m1(value(block, col) / blocks[block].1).unwrap();
        let all = (0..8).flat_map(|block| (0..32).map(move |col| (block, col)));
        let codes: Vec<u8> = all.clone().map(|(block, col)| code(block, col)).collect();
        let packed: Vec<u8> = codes.chunks(2).map(|pair| pair[0] | pair[1] << 4).collect();
        // ggml's block: the byte, then codes j and j + 16.
        let ggml = bytes
            .iter()
            .zip(codes.chunks(32))
            .flat_map(|(byte, codes)| std::iter::once(*byte).chain((0..16).map(|at| codes[at] | codes[at + 16] << 4)));
        let ggml: Vec<u8> = ggml.collect();
        let tensor =
            |bytes, shape: &[usize]| Tensor { name: "w".into(), dtype: Dtype::U8, shape: shape.to_vec(), bytes };
        let scales = tensor(&bytes, &[1, 8]);
        let (halves, rows, blocks_of_16) =
            (tensor(&packed, &[1, 128]), tensor(&ggml, &[1, 136]), tensor(&packed, &[1, 8, 16]));
        for stored in [
            Stored::Scaled { codes: &halves, scales: &scales },
            Stored::Scaled { codes: &blocks_of_16, scales: &scales },
            Stored::Gguf(&rows),
        ] {
            let matrix =
                Matrix::view(stored, WeightFormat::Mxfp4, Orientation::OutIn, Rows::All, None, [1, 256]).unwrap();
            let placed = PackedMatrix {
                name: "test",
                groups: 1,
                rows: 1,
                cols: 256,
                parts: WeightFormat::Mxfp4.parts(),
                pair: 1,
                bias: false,
                segments: vec![],
            };
            let placed = placed.place("test", 1 << 20).unwrap();
            let mut memory = vec![u32::MAX; placed.segments[0].words];
            let source = |_| Ok(GroupSource { matrices: vec![&matrix], biases: vec![] });
            let write = &mut |first: usize, words: &[u32]| {
                memory[first..][..words.len()].copy_from_slice(words);
                Ok(())
            };
            placed.pack(0, &source, write).unwrap();
            for (block, col) in all.clone() {
                let (amax, scale, decoded) = blocks[block];
                let at = 32 * block + col;
                let got = matrix.get(0, at);
                assert_eq!(placed.value(&memory, &placed.segments[0].spans[0], 0, at), got);
                assert_eq!(got, numerics::decode_e2m1(codes[at]) * scale);
                if col == 4 * block {
                    assert_eq!(got.abs(), decoded, "{amax:e}");
                    assert_eq!(got < 0.0, negative(block));
                }
            }
        }
    }
}

#[test]
fn bug_29_and_33_nothing_unwritten_is_read() {
    // Scratch and output begin as NaN, and a second run finds what the first left there: `check` compares both.
    let mut spec = deepseek_like();
    spec.routing.zero_experts = Some(ZeroExperts { count: 4, kind: ZeroExpertKind::Identity });
    spec.routing.method = top_k(Score::Softmax, SelectionKey::ScorePlusBias);
    for (tokens, options) in PATHS {
        check(&RandomLayer::new(spec.clone(), 64), tokens, &options, "poisoned scratch");
    }
}

#[test]
fn bug_31_an_id_of_minus_1_is_nobody() {
    crate::layers::ids_and_weights_of_a_caller(12);
}

#[test]
fn bug_34_and_36_tails_of_any_size_stay_inside() {
    for num_experts in [2, 3, 12] {
        for tokens in [1, 2, 63, 64, 65] {
            let mut spec = deepseek_like();
            (spec.num_experts, spec.top_k) = (num_experts, 1);
            spec.routing.method = top_k(Score::Sigmoid, SelectionKey::ScorePlusBias);
            (spec.hidden_size, spec.experts.intermediate_size) = (33, 17);
            check(&RandomLayer::new(spec, 65), tokens, &TILED, &format!("{num_experts} experts, {tokens} tokens"));
        }
    }
}

#[test]
fn bug_35_an_expert_twice_in_one_row_contributes_twice() {
    let mut spec = deepseek_like();
    spec.top_k = 4;
    spec.routing.method = RoutingMethod::Hash { score: Score::SqrtSoftplus, vocab_size: 2 };
    // Rows of the random table repeat ids: two entries of 12 experts, four slots.
    let seed = (0..).find(|&seed| {
        let table = RandomLayer::new(spec.clone(), seed).weights().router.tid2eid.unwrap();
        table.chunks(4).all(|row| (0..4).any(|at| row[..at].contains(&row[at])))
    });
    let layer = RandomLayer::new(spec, seed.unwrap());
    for (tokens, options) in PATHS {
        check(&layer, tokens, &options, "repeated ids");
    }
}

#[test]
fn bug_39_and_40_the_shared_expert_is_added_once_with_its_gate() {
    let mut spec = deepseek_like();
    acts(&spec, |spec| spec.shared = None, "shared expert");
    shared(&mut spec).gate = SharedGate::Sigmoid { format: WeightFormat::Bf16 };
    acts(&spec, |spec| shared(spec).gate = SharedGate::None, "sigmoid gate");
    shared(&mut spec).combination = SharedCombination::Average;
    acts(&spec, |spec| shared(spec).combination = SharedCombination::Sum, "average");
}

#[test]
fn bug_41_experts_are_summed_in_f32() {
    let mut spec = deepseek_like();
    spec.precision = Precision { model: FloatType::Bf16, ..Precision::float32(FloatType::Bf16, FloatType::F32) };
    let exact = RandomLayer::new(spec.clone(), 66);
    check(&exact, 70, &TILED, "f32 sums");
    spec.precision.combine = CombineRounding::EveryStep;
    let rounded = RandomLayer::new(spec, 66);
    let inputs = exact.all_inputs(70, 7);
    assert_ne!(exact.judge(inputs.view()).output, rounded.judge(inputs.view()).output);
}

#[test]
fn bug_42_every_number_of_tokens_gives_a_token_the_same_row() {
    let layer = RandomLayer::new(deepseek_like(), 67);
    let all = layer.all_inputs(70, 7);
    let first = |tokens: usize| LayerInputs {
        hidden_states: all.hidden_states[..tokens * 40].to_vec(),
        token_ids: None,
        expert_hidden_states: None,
        logits: None,
        router_states: None,
        adapter_ids: None,
        counts: None,
        row_weights: None,
    };
    for tokens in [1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 17, 32, 33, 63, 64, 65, 70] {
        check_inputs(&layer, tokens, &crate::rig::AUTO, &first(tokens), &format!("{tokens} tokens"));
    }
}

#[test]
fn bug_43_weights_stand_beside_their_ids_in_descending_order() {
    let layer = RandomLayer::new(router_only(top_k(Score::Softmax, SelectionKey::Score), 65, 9), 62);
    let logits: Vec<f32> = (0..65).map(|e| ((e * 29) % 65) as f32 * 0.1).collect();
    let (ids, weights) = routed(&layer, &logits);
    assert!(weights.windows(2).all(|pair| pair[0] > pair[1]));
    let exps: Vec<f32> = ids.iter().map(|&id| logits[id as usize].exp()).collect();
    let sum: f32 = exps.iter().sum();
    for (weight, exp) in weights.iter().zip(exps) {
        assert!((weight / 2.5 - exp / sum).abs() < 1e-6);
    }
}

#[test]
fn bug_44_the_routers_logits_are_f32_unless_the_precision_says_otherwise() {
    // Two logits that bf16 cannot tell apart.
    let mut layer = RandomLayer::new(router_only(top_k(Score::Sigmoid, SelectionKey::Score), 4, 1), 62);
    let logits = [4.001, 4.002, 4.003, 4.0];
    assert_eq!(routed(&layer, &logits).0, [2]);
    layer.spec.precision.model = FloatType::Bf16;
    layer.spec.precision.router_gemm = Rounding::Model;
    assert_eq!(routed(&layer, &logits).0, [0]);
}

#[test]
fn bug_46_a_chosen_expert_is_removed_by_its_id() {
    // -inf is a legal key: an expert that was removed by such a value could be chosen again.
    let mut spec = router_only(RoutingMethod::TopKThenScore { score: ChosenScore::Sigmoid }, 4, 4);
    spec.routing.renormalize = None;
    let infinite = f32::NEG_INFINITY;
    let (ids, weights) = routed(&RandomLayer::new(spec, 62), &[infinite, 0.0, infinite, infinite]);
    assert_eq!((ids, weights), (vec![1, 0, 2, 3], vec![1.25, 0.0, 0.0, 0.0]));
}
