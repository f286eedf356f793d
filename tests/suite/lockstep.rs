//! Every step of a schedule on the device against its twin: the first kernel that is wrong is named.

use moewe::conformance::lockstep;
use moewe::conformance::sample::LayerInputs;
use moewe::plan::Backend;
use moewe::spec::*;
use moewe::{Cpu, Options};

use crate::random::{FORMATS, Sample, samples, sums_codes};
use crate::rig::{
    CUTS, FULL_TILES, GEMV, OCTETS, PAIRS, QUADS, RandomLayer, TILED, UNIT_CUTS, deepseek_like, fits, for_matrix_units,
    gpu,
};

fn walk(spec: MoeSpec, tokens: usize, options: &Options) {
    let layer = RandomLayer::new(spec, 11);
    let inputs = layer.all_inputs(tokens, 12);
    let (device, twin) = (layer.on_gpu(tokens, options), layer.on_cpu(tokens, options, Some(gpu().facts())));
    for step in lockstep::walk(&device, &twin, &layer.spec, &inputs.view()).unwrap() {
        assert_eq!(step.complaint, None, "{step:?}");
        assert!(step.error <= step.tolerance, "{step:?}");
    }
}

#[test]
fn every_step_equals_its_twin() {
    let fp8 = |block| WeightFormat::Fp8Block { block, scale: ScaleFormat::F32 };
    let formats = [WeightFormat::F32, WeightFormat::F16, WeightFormat::Bf16, fp8([128, 128]), fp8([8, 16])];
    let types = [FloatType::F32, FloatType::F16, FloatType::Bf16, FloatType::Bf16, FloatType::F16];
    for (format, input) in formats.into_iter().zip(types) {
        for options in CUTS {
            let mut spec = deepseek_like();
            spec.experts.format = format;
            spec.experts.gate_up_bias = true;
            spec.experts.down_bias = true;
            spec.precision = Precision::float32(input, FloatType::F32);
            walk(spec, 70, &options);
        }
    }
}

/// Tiles that are full, and such that are not, of each height.
#[test]
fn what_matrix_units_compute_equals_its_twins() {
    for spec in for_matrix_units() {
        for options in UNIT_CUTS {
            for tokens in [3, 150] {
                walk(spec.clone(), tokens, &options);
            }
        }
        // More rows than one tile of any height has.
        walk(spec, 400, &FULL_TILES);
    }
}

#[test]
fn every_routing_kernel_equals_its_twin() {
    let mut methods = vec![
        RoutingMethod::TopKThenScore { score: ChosenScore::Softmax },
        RoutingMethod::TopKThenScore { score: ChosenScore::Sigmoid },
        RoutingMethod::Hash { score: Score::SqrtSoftplus, vocab_size: 17 },
    ];
    for score in [Score::Softmax, Score::Sigmoid, Score::SqrtSoftplus, Score::Identity] {
        for group in [None, Some(GroupScore::MaxOfScore), Some(GroupScore::Top2SumOfScore)] {
            let groups = group.map(|score| Groups { n_group: 4, topk_group: 2, score });
            methods.push(RoutingMethod::TopK { score, key: SelectionKey::LogitPlusBias, groups });
        }
    }
    for method in methods {
        let mut spec = deepseek_like();
        spec.routing.method = method;
        spec.routing.renormalize = None;
        spec.shared = None;
        walk(spec, 9, &GEMV);
    }
}

/// Widths of real models: several vectors a lane, several stages, several blocks and segments.
#[test]
fn wide_rows_equal_their_twins() {
    for format in [WeightFormat::Bf16, WeightFormat::Fp8Block { block: [128, 128], scale: ScaleFormat::F32 }] {
        for segment_bytes in [None, Some(1 << 20)] {
            let mut spec = deepseek_like();
            spec.hidden_size = 4608;
            spec.num_experts = 4;
            spec.top_k = 2;
            spec.routing.method =
                RoutingMethod::TopK { score: Score::Sigmoid, key: SelectionKey::ScorePlusBias, groups: None };
            spec.experts.intermediate_size = 320;
            spec.experts.format = format;
            spec.shared = None;
            for base in CUTS {
                walk(spec.clone(), 3, &Options { segment_bytes, ..base });
            }
        }
    }
}

/// Every rule, span and type of scale, fused with the activation and behind it, with both kinds of GEMM.
#[test]
fn quantised_rows_equal_their_twins() {
    let (fp8, int8) = (ActivationCode::E4m3, ActivationCode::Int8);
    let rules = [
        ScaleRule::FlooredAmax,
        ScaleRule::FlooredAmaxTimesReciprocal,
        ScaleRule::FlooredScale { upper: None },
        ScaleRule::FlooredScale { upper: Some(1e-3) },
        ScaleRule::ReciprocalScale,
        ScaleRule::ReciprocalAmax,
    ];
    let spans =
        [ScaleSpan::Group(32), ScaleSpan::Group(128), ScaleSpan::Group(64), ScaleSpan::Token, ScaleSpan::Tensor];
    let scales = [ActivationScale::F32, ActivationScale::F32CeilPow2, ActivationScale::Ue8m0Packed];
    let block = |scale| WeightFormat::Fp8Block { block: [128, 128], scale };
    let formats = [
        (fp8, block(ScaleFormat::F32)),
        (fp8, block(ScaleFormat::E8m0)),
        (fp8, WeightFormat::Mxfp4),
        (int8, WeightFormat::Int8Channel),
        (fp8, WeightFormat::Nvfp4),
        (fp8, WeightFormat::Int4 { group: Some(32), scale: ScaleFormat::Bf16, zero_points: true, act_order: false }),
        (fp8, WeightFormat::Fp8Channel),
    ];
    let positions = [WeightPosition::Output, WeightPosition::BeforeDown, WeightPosition::Input];
    let mut quants = vec![ActivationQuant::Static { code: fp8 }, ActivationQuant::Static { code: int8 }];
    for (at, rule) in rules.into_iter().enumerate() {
        for (other, span) in spans.into_iter().enumerate() {
            let scale = match rule {
                ScaleRule::ReciprocalAmax => ActivationScale::F32,
                _ => scales[(at + other) % 3],
            };
            let code = if (at + other) % 4 == 3 { int8 } else { fp8 };
            quants.push(ActivationQuant::Dynamic { code, span, rule, scale });
        }
    }
    // Where a run has few random layers, because compiling takes long, a quarter of them.
    let every = if crate::layers::cases() < 50 { 4 } else { 1 };
    for (at, quant) in quants.into_iter().enumerate().step_by(every) {
        let mut spec = deepseek_like();
        spec.hidden_size = 288;
        spec.experts.intermediate_size = 176;
        spec.experts.format = formats[at % formats.len()].1;
        spec.experts.activation_quant = quant;
        spec.routing.weight_position = positions[at % 3];
        if let Some(shared) = &mut spec.shared {
            shared.mlp.activation_quant = quant;
            shared.mlp.format = formats[(at + 1) % formats.len()].1;
        }
        // Fused and not, with two kinds of GEMM, in turn.
        let even = at / every % 2 == 0;
        let [a, b] = [[GEMV, TILED], [PAIRS, QUADS], [OCTETS, TILED]][at / every / 2 % 3];
        for (options, fuse_quantization) in [(a, even), (b, !even)] {
            walk(spec.clone(), 5, &Options { fuse_quantization, ..options });
        }
    }
}

/// Counts are exact, and are those of the buffers that they count.
#[test]
fn diagnoses_equal_their_twins() {
    for (format, quant) in [
        (WeightFormat::Bf16, ActivationQuant::None),
        (WeightFormat::Fp8Channel, ActivationQuant::Static { code: ActivationCode::E4m3 }),
        (WeightFormat::Int8Channel, ActivationQuant::Static { code: ActivationCode::Int8 }),
    ] {
        for activation in [Activation::Swiglu { limit: Some(0.4) }, Activation::SwigluClampAfter { limit: 0.3 }] {
            for base in [GEMV, TILED] {
                let mut spec = deepseek_like();
                spec.experts.format = format;
                spec.experts.activation = activation;
                spec.experts.activation_quant = quant;
                spec.precision.output = if base == GEMV { FloatType::F16 } else { FloatType::Bf16 };
                walk(spec, 9, &Options { diagnostics: true, ..base });
            }
        }
    }
}

/// Steps of the CPU backend, whose GEMMs may be vector instructions, against those of a CPU that runs twins only.
fn walk_on_cpu(layer: &RandomLayer, inputs: &LayerInputs, tokens: usize, options: &Options) {
    let (fast, twin) = (layer.on_cpu(tokens, options, None), layer.on_cpu(tokens, options, Some(Cpu::new().facts())));
    for step in lockstep::walk(&fast, &twin, &layer.spec, &inputs.view()).unwrap() {
        assert_eq!(step.complaint, None, "{step:?}, {options:?}: {:?}", layer.spec);
        assert!(step.error <= step.tolerance, "{step:?}");
    }
}

/// Every format of weights in rows of several vectors, of which the last is not whole where a format can have that; as
/// many entering rows as a tile has, less and more; rows with NaN and infinities among them.
#[test]
fn the_vector_gemms_of_a_cpu_equal_their_twins() {
    let inputs = [FloatType::F32, FloatType::F16, FloatType::Bf16];
    let fp8 = ActivationQuant::dynamic_fp8(128, ActivationScale::F32);
    for (at, format) in FORMATS.into_iter().enumerate() {
        for quant in [ActivationQuant::None, fp8] {
            if quant.is_on() && !sums_codes(format) {
                continue;
            }
            let mut spec = deepseek_like();
            spec.hidden_size = if fits(format, 416) { 416 } else { 512 };
            (spec.num_experts, spec.top_k, spec.experts.intermediate_size) = (4, 2, 256);
            spec.routing.method =
                RoutingMethod::TopK { score: Score::Sigmoid, key: SelectionKey::ScorePlusBias, groups: None };
            (spec.experts.format, spec.experts.activation_quant) = (format, quant);
            spec.experts.gate_up_bias = at % 2 == 0;
            spec.precision.input = inputs[at % 3];
            let layer = RandomLayer::new(spec, at as u64);
            // Once more rows of a matrix than it meets at once.
            let many = if at == 2 { 150 } else { 20 };
            for (tokens, options) in [(1, GEMV), (3, PAIRS), (6, QUADS), (many, TILED)] {
                let mut inputs = layer.all_inputs(tokens, 12);
                walk_on_cpu(&layer, &inputs, tokens, &options);
                for (token, value) in [(0, f32::NAN), (3, f32::INFINITY), (5, f32::NEG_INFINITY)] {
                    if let Some(x) = inputs.hidden_states.get_mut(token * layer.spec.hidden_size + 17 * token) {
                        *x = value;
                    }
                }
                walk_on_cpu(&layer, &inputs, tokens, &options);
            }
        }
    }
}

/// Whatever else a layer may have, in sizes that no vector divides.
#[test]
fn the_gemms_of_random_layers_on_a_cpu_equal_their_twins() {
    for (seed, Sample { spec, tokens, options, .. }) in samples(crate::layers::cases().min(300)).into_iter().enumerate()
    {
        let layer = RandomLayer::new(spec, seed as u64);
        walk_on_cpu(&layer, &layer.all_inputs(layer.tokens(tokens), 12), layer.tokens(tokens).max(1), &options);
    }
}

/// A weight that is NaN is one in the sums of its row alone, whatever instructions decode it.
#[test]
fn weights_that_are_nan_spoil_the_same_sums() {
    let mut spec = deepseek_like();
    spec.experts.format = WeightFormat::F32;
    let mut layer = RandomLayer::new(spec, 5);
    layer.spoil(1);
    for tokens in [1, 20] {
        walk_on_cpu(&layer, &layer.all_inputs(tokens, 12), tokens, &GEMV);
    }
}
