//! Every step of a schedule on the device against its twin: the first kernel that is wrong is named.

use moewe::host::{Host, Session};
use moewe::kernels::{Access, Operation, Stage};
use moewe::plan::Backend;
use moewe::spec::*;
use moewe::{Cpu, Options, Tokens, Wgpu};

use crate::rig::{GEMV, RandomLayer, TILED, deepseek_like, gpu};

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
        if binding.access != Access::Write {
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
        Operation::Combine(_) | Operation::TopkRouting(_) | Operation::Permute(_) => 16.0,
    };
    let bounded = match (stage, buffer) {
        (Stage::Permute, _) | (_, "topk_ids") => None,
        (Stage::TopkRouting, _) => Some(SCORE_TOLERANCE),
        (Stage::GroupedGemm | Stage::Norm | Stage::Combine, _) => Some(SUM_TOLERANCE * terms.sqrt()),
    };
    let Some(tolerance) = bounded else { return (0..want.len()).for_each(exact) };
    let width = match operation {
        Operation::GroupedGemm(gemm) => gemm.features(),
        Operation::Norm(norm) => norm.cols,
        Operation::Combine(_) | Operation::TopkRouting(_) | Operation::Permute(_) => want.len(),
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
        for options in [GEMV, TILED] {
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
            for decode_tokens in [0, usize::MAX] {
                walk(spec.clone(), 3, &Options { segment_bytes, decode_tokens });
            }
        }
    }
}
