//! A whole layer, by tokens, on the CPU backend and on the adapter (MOEWE_ADAPTER). Each case is checked
//! against the reference before it is timed. `cargo bench -- --test` checks and times once.

#[allow(dead_code, reason = "the rig serves the test suite first")]
#[path = "../tests/suite/rig.rs"]
mod rig;
mod roofline;

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use moewe::host::Host;
use moewe::spec::*;
use moewe::{Bound, Cpu, Io, Plan, Scratch, Tokens};

use rig::{AUTO, RandomLayer, wgpu};
use roofline::{Device, bench_spec};

/// A layer, and whether its activations are quantised in one step with the activation function.
struct Case {
    name: &'static str,
    spec: MoeSpec,
    fused: &'static [bool],
}

/// The cases of this bench: small layers, and with MOEWE_BENCH_FULL=1 Qwen3-30B-A3B's (FP8 weights) and
/// MiniMax-M2's (FP8 weights and activations) at full size.
fn cases() -> Vec<Case> {
    let quantised = |mut spec: MoeSpec| {
        spec.experts.activation_quant = ActivationQuant::dynamic_fp8(128, ActivationScale::F32);
        if let Some(shared) = &mut spec.shared {
            shared.mlp.activation_quant = spec.experts.activation_quant;
        }
        spec
    };
    let mut cases = vec![
        Case { name: "small_fp8", spec: bench_spec(), fused: &[true] },
        Case { name: "small_w8a8", spec: quantised(bench_spec()), fused: &[true, false] },
    ];
    if std::env::var("MOEWE_BENCH_FULL").is_ok_and(|full| full == "1") {
        let mut spec = bench_spec();
        spec.hidden_size = 2048;
        spec.num_experts = 128;
        spec.experts.intermediate_size = 768;
        spec.shared = None;
        spec.routing.method = RoutingMethod::TopK { score: Score::Softmax, key: SelectionKey::Score, groups: None };
        spec.routing.renormalize = Some(Denominator::Sum);
        spec.routing.routed_scaling_factor = 1.0;
        let mut minimax = quantised(spec.clone());
        minimax.hidden_size = 3072;
        minimax.num_experts = 256;
        minimax.experts.intermediate_size = 1536;
        minimax.routing.method =
            RoutingMethod::TopK { score: Score::Sigmoid, key: SelectionKey::ScorePlusBias, groups: None };
        cases.push(Case { name: "qwen3_30b_fp8", spec, fused: &[true] });
        cases.push(Case { name: "minimax_m2_fp8", spec: minimax, fused: &[true, false] });
    }
    cases
}

/// One plan bound to several inputs. Rotating through them, weights come from memory and not from a cache.
struct Rotation<B: Host> {
    bounds: Vec<Bound<B>>,
    /// Ids of the experts that each input chose.
    topk_ids: Vec<Vec<i32>>,
    /// Largest calc_diff of the inputs that were checked.
    checked: f64,
}

impl<B: Host + Clone> Rotation<B> {
    /// Binds `inputs` inputs of `tokens` tokens and checks each (one, where the reference takes long).
    fn new(backend: &B, plan: &Plan<B>, layer: &RandomLayer, tokens: usize, inputs: usize) -> Self {
        let spec = &layer.spec;
        let scratch = Scratch::new(backend, &plan.scratch_layout()).unwrap();
        let mut this = Self { bounds: vec![], topk_ids: vec![], checked: 0.0 };
        for seed in 0..inputs as u64 {
            let (hidden_states, _) = layer.inputs(tokens, 100 + seed);
            let x = backend.upload("x", &moewe::host::encode(spec.precision.input, &hidden_states)).unwrap();
            let y = backend.create_buffer("y", 4 * hidden_states.len() as u64, false).unwrap();
            let io = Io { output: Some(&y), ..Io::of(&x) };
            let bound = plan.bind(&io, &scratch).unwrap();
            let mut encoder = backend.encoder();
            bound.record(&mut encoder, &Tokens::Host(tokens)).unwrap();
            backend.submit(encoder).unwrap();
            let ids = backend.read(scratch.buffer("topk_ids").unwrap()).unwrap();
            this.topk_ids.push(ids.into_iter().take(tokens * spec.top_k).map(|id| id as i32).collect());
            let work = tokens * spec.top_k * 3 * spec.hidden_size * spec.experts.intermediate_size;
            if seed == 0 || work < 100_000_000 {
                let output = moewe::host::decode(FloatType::F32, &backend.read(&y).unwrap(), hidden_states.len());
                let rows = (2_000_000_000 / (work / tokens)).clamp(1, tokens);
                let values = rows * spec.hidden_size;
                this.checked = this.checked.max(roofline::check(layer, &hidden_states[..values], &output[..values]));
            }
            this.bounds.push(bound);
        }
        this
    }

    /// Seconds of each of `runs` runs.
    fn time(&self, backend: &B, tokens: usize, runs: usize) -> (Vec<f64>, &'static str) {
        let record = &mut |encoder: &mut B::Encoder, at: usize| {
            self.bounds[at % self.bounds.len()].record(encoder, &Tokens::Host(tokens))
        };
        backend.time(runs, record).unwrap()
    }
}

fn layer<B: Host + Clone>(criterion: &mut Criterion, backend: &B, device: &Device) {
    let wanted = std::env::var("MOEWE_BENCH_CASE").unwrap_or_default();
    for Case { name, spec, fused } in cases() {
        if !format!("{name}/{}", device.name).contains(&wanted) {
            continue;
        }
        let layer = RandomLayer::new(spec, 1);
        for &fuse_quantization in fused {
            let case = match (fused.len(), fuse_quantization) {
                (1, _) => name.to_owned(),
                (_, true) => format!("{name}_fused"),
                (_, false) => format!("{name}_unfused"),
            };
            let options = moewe::Options { fuse_quantization, ..AUTO };
            let plan = Plan::new(backend.clone(), &layer.spec, &layer.weights(), MOST_TOKENS, &options).unwrap();
            time_case(criterion, backend, device, &case, &layer, &plan);
        }
    }
}

const MOST_TOKENS: usize = 64;

fn time_case<B: Host + Clone>(
    criterion: &mut Criterion,
    backend: &B,
    device: &Device,
    case: &str,
    layer: &RandomLayer,
    plan: &Plan<B>,
) {
    let mut group = criterion.benchmark_group(format!("{case}/{}", device.name));
    for tokens in [1, 4, 16, MOST_TOKENS] {
        let rotation = Rotation::new(backend, plan, layer, tokens, if tokens <= 4 { 8 } else { 2 });
        let floor = device.report(case, &layer.spec, &rotation.topk_ids[0], tokens, rotation.checked);
        group.bench_function(BenchmarkId::from_parameter(tokens), |bencher| {
            bencher.iter_custom(|runs| {
                let (seconds, _) = rotation.time(backend, tokens, runs.min(500) as usize);
                std::time::Duration::from_secs_f64(seconds.iter().sum::<f64>() * runs as f64 / seconds.len() as f64)
            });
        });
        let (mut seconds, method) = rotation.time(backend, tokens, 24);
        seconds.sort_by(f64::total_cmp);
        let median = seconds[seconds.len() / 2];
        println!("{case}, {tokens} tokens: median {:.1} us by {method}, {:.2} floors", 1e6 * median, median / floor);
    }
}

fn all(criterion: &mut Criterion) {
    let cpu = Cpu::new();
    layer(criterion, &cpu, &Device::cpu());
    layer(criterion, wgpu(), &Device::gpu(wgpu()));
}

criterion_group! {
    name = layers;
    config = Criterion::default().sample_size(10);
    targets = all
}
criterion_main!(layers);
