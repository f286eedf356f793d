//! Every step of a schedule on the device against its twin: the first kernel that is wrong is named.

use moewe::host::{Host, Session};
use moewe::kernels::{Access, Operation, Stage, ValueSource};
use moewe::plan::Backend;
use moewe::spec::*;
use moewe::{Cpu, Options, Tokens, Wgpu};

use crate::rig::{CUTS, GEMV, OCTETS, PAIRS, QUADS, RandomLayer, TILED, deepseek_like, gpu};

/// Rounding errors of an f32 sum of n terms of size 1 walk at random: sqrt(n) times half an ulp of the
/// sum, some sixteen times that at worst over a whole buffer. Relative to the row's largest value.
const SUM_TOLERANCE: f32 = 16.0 * 6e-8;
/// One `exp` and a division in WGSL: 3 + 2|x| and 2.5 ulp, |x| below 10.
const SCORE_TOLERANCE: f32 = 3e-6;

/// Both sides of a lockstep: same schedule, buffers by name.
struct Lockstep {
    gpu: Session<Wgpu>,
    cpu: Session<Cpu>,
    tokens: usize,
}

/// Runs one step on both sides from the device's own buffers, and compares what it wrote.
fn step(both: &Lockstep, at: usize) {
    let schedule = both.gpu.plan().schedule();
    let step = &both.gpu.bound().steps(both.tokens)[at];
    let before = buffers(both);
    let mut encoder = gpu().encoder();
    both.gpu.bound().record_steps(&mut encoder, &Tokens::Host(both.tokens), &|index, _| index == at).unwrap();
    gpu().submit(encoder).unwrap();
    let after = buffers(both);

    // The twin starts from what the device had.
    let cpu = both.cpu.plan().backend();
    let of_cpu = |name: &str| match name {
        "output" => both.cpu.output().unwrap(),
        name => both.cpu.scratch().buffer(name).unwrap(),
    };
    for (name, words) in &before {
        cpu.write(of_cpu(name), 0, words).unwrap();
    }
    both.cpu.bound().record_steps(&mut cpu.encoder(), &Tokens::Host(both.tokens), &|index, _| index == at).unwrap();
    for (binding, &index) in step.operation.source().bindings.iter().zip(&step.buffers) {
        let name = schedule.buffers[index].name.as_str();
        let got = &after.iter().find(|(known, _)| known == name);
        let Some((_, got)) = got else { continue };
        if !matches!(binding.access, Access::Write | Access::ReadWrite) {
            let (_, old) = before.iter().find(|(known, _)| known == name).unwrap();
            assert_eq!(got, old, "{}: the step changed {name}, which it only reads", step.name);
            continue;
        }
        equal(&step.name, &step.operation, name, &cpu.read(of_cpu(name)).unwrap(), got);
    }
}

fn buffers(both: &Lockstep) -> Vec<(String, Vec<u32>)> {
    let scratch = both.gpu.plan().scratch_layout().buffers.into_iter().map(|(name, _)| {
        let words = gpu().read(both.gpu.scratch().buffer(&name).unwrap()).unwrap();
        (name, words)
    });
    let output = gpu().read(both.gpu.output().unwrap()).unwrap();
    scratch.chain([("output".to_string(), output)]).collect()
}

/// Integers and unwritten (poisoned) words exactly, sums and scores within their bounds.
fn equal(step: &str, operation: &Operation, buffer: &str, want: &[u32], got: &[u32]) {
    let exact = |at: usize| assert_eq!(got[at], want[at], "step {step}: {buffer}[{at}] differs from the twin");
    let stage = operation.stage();
    let terms = match operation {
        Operation::GroupedGemm(gemm) => gemm.cols.max(16) as f32,
        Operation::Norm(norm) => norm.cols.max(16) as f32,
        Operation::Combine(_)
        | Operation::TopkRouting(_)
        | Operation::Permute(_)
        | Operation::Assign(_)
        | Operation::Activate(_)
        | Operation::Quantize(_)
        | Operation::Amax(_)
        | Operation::Diagnose(_)
        | Operation::Synthesize(_)
        | Operation::Stream(_) => 16.0,
    };
    let bounded = match (stage, buffer) {
        (Stage::Quantize, _) => return quantized(step, operation, buffer, want, got),
        (Stage::Assign | Stage::Permute | Stage::Diagnose | Stage::Synthesize | Stage::Stream, _) | (_, "topk_ids") => {
            None
        }
        (Stage::Activation, _) => Some(SCORE_TOLERANCE),
        (Stage::TopkRouting, _) => Some(SCORE_TOLERANCE),
        (Stage::GroupedGemm | Stage::Norm | Stage::Combine, _) => Some(SUM_TOLERANCE * terms.sqrt()),
    };
    let Some(tolerance) = bounded else { return (0..want.len()).for_each(exact) };
    let width = match operation {
        Operation::GroupedGemm(gemm) => gemm.features(),
        Operation::Norm(norm) => norm.cols,
        _ => want.len(),
    };
    for (row, want_row) in want.chunks(width).enumerate() {
        let largest = want_row.iter().map(|&word| f32::from_bits(word).abs());
        let largest = largest.filter(|value| value.is_finite()).fold(1f32, f32::max);
        for (col, &word) in want_row.iter().enumerate() {
            let at = row * width + col;
            let (want_value, value) = (f32::from_bits(word), f32::from_bits(got[at]));
            if want_value.is_nan() {
                exact(at);
            } else {
                let near = (value - want_value).abs() <= tolerance * largest;
                assert!(near, "step {step}: {buffer}[{at}] is {value}, its twin says {want_value}");
            }
        }
    }
}

/// Codes and scales of given values exactly; behind an activation, whose `exp` may err, within a code.
fn quantized(step: &str, operation: &Operation, buffer: &str, want: &[u32], got: &[u32]) {
    let exact = match operation {
        Operation::Quantize(quantize) => match quantize.source {
            ValueSource::Rows { .. } => true,
            ValueSource::Activated(_) => false,
        },
        _ => true,
    };
    // Codes in order of their values.
    let rank = |word: u32, byte: usize| {
        let code = (word >> (8 * byte)) as u8;
        if code & 0x80 == 0 { i32::from(code) } else { -i32::from(code & 0x7f) }
    };
    let mut flipped = 0;
    for (at, (&want, &got)) in want.iter().zip(got).enumerate() {
        if want == got {
            continue;
        }
        assert!(!exact, "step {step}: {buffer}[{at}] is {got:#x}, its twin says {want:#x}");
        if buffer.ends_with(".codes") {
            let near = (0..4).all(|byte| (rank(want, byte) - rank(got, byte)).abs() <= 1);
            assert!(near, "step {step}: {buffer}[{at}] is {got:#x}, its twin says {want:#x}");
            flipped += 1;
        } else {
            let [want, got] = [want, got].map(f32::from_bits);
            assert!((want - got).abs() <= 4e-6 * want, "step {step}: {buffer}[{at}] is {got}, its twin says {want}");
        }
    }
    // An ulp or some change few codes.
    assert!(flipped * 50 <= want.len().max(50), "step {step}: {flipped} of {} words of {buffer} differ", want.len());
}

fn walk(spec: MoeSpec, tokens: usize, options: &Options) {
    let layer = RandomLayer::new(spec, 11);
    let inputs = layer.all_inputs(tokens, 12);
    let both = Lockstep {
        gpu: layer.on_gpu(tokens, options),
        cpu: layer.on_cpu(tokens, options, Some(gpu().facts())),
        tokens,
    };
    // Only the backend's name may differ between the two schedules.
    assert_eq!(both.cpu.plan().schedule(), both.gpu.plan().schedule());
    both.gpu.write(&inputs.view()).unwrap();
    both.cpu.write(&inputs.view()).unwrap();
    for at in 0..both.gpu.bound().steps(tokens).len() {
        step(&both, at);
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
