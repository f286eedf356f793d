//! Random layers, and the device that MOEWE_ADAPTER names.

use std::sync::OnceLock;

use fastrand::Rng;
use moewe::host::{self, Limits, Session};
use moewe::reference::{self, Inputs};
use moewe::schedule::{DECODE_TOKENS, DeviceFacts};
use moewe::spec::*;
use moewe::weights::{Dtype, Rows};
use moewe::{Cpu, Matrix, MlpWeights, MoeWeights, Options, Plan, RouterWeights, Tensor, Wgpu};

/// The device under test, under the portability floor. No adapter is a failure.
pub fn gpu() -> &'static Wgpu {
    static GPU: OnceLock<Wgpu> = OnceLock::new();
    GPU.get_or_init(|| {
        let wanted = std::env::var("MOEWE_ADAPTER").unwrap_or_default();
        let adapters = host::adapters();
        let names: Vec<_> = adapters.iter().map(|adapter| &adapter.name).collect();
        let adapter = adapters.iter().find(|adapter| adapter.matches(&wanted));
        let adapter = adapter.unwrap_or_else(|| panic!("no adapter matches {wanted:?}; there are {names:?}"));
        println!("adapter: {}", adapter.name);
        host::open(adapter, limits()).unwrap()
    })
}

/// WebGPU's default limits and no features, which is what the tests are about; MOEWE_LIMITS=adapter, for
/// benches, takes the adapter's own and its timestamps.
fn limits() -> Limits {
    match std::env::var("MOEWE_LIMITS").as_deref() {
        Ok("adapter") => Limits::Adapter,
        Ok(_) | Err(_) => Limits::Default,
    }
}

/// A random number from N(0, 1).
pub fn normal(rng: &mut Rng) -> f32 {
    let radius = (-2.0 * (1.0 - rng.f64()).ln()).sqrt();
    (radius * (rng.f64() * std::f64::consts::TAU).cos()) as f32
}

pub struct OwnedTensor {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub bytes: Vec<u8>,
}

impl OwnedTensor {
    fn view(&self) -> Tensor<'_> {
        Tensor { name: "random".into(), dtype: self.dtype, shape: self.shape.clone(), bytes: &self.bytes }
    }
}

/// A matrix in its checkpoint form.
pub struct OwnedMatrix {
    codes: OwnedTensor,
    scale: Option<OwnedTensor>,
    format: WeightFormat,
    shape: [usize; 2],
}

impl OwnedMatrix {
    pub fn random(rng: &mut Rng, format: WeightFormat, [rows, cols]: [usize; 2]) -> Self {
        let spread = 1.0 / (cols as f32).sqrt();
        let mut scale = None;
        let count = rows * cols;
        let (dtype, bytes): (_, Vec<u8>) = match format {
            WeightFormat::F32 => (Dtype::F32, (0..count).flat_map(|_| (normal(rng) * spread).to_le_bytes()).collect()),
            WeightFormat::F16 => {
                (Dtype::F16, (0..count).flat_map(|_| half::f16::from_f32(normal(rng) * spread).to_le_bytes()).collect())
            }
            WeightFormat::Bf16 => (
                Dtype::BF16,
                (0..count).flat_map(|_| half::bf16::from_f32(normal(rng) * spread).to_le_bytes()).collect(),
            ),
            WeightFormat::Fp8Block { block, scale: kind } => {
                let shape = vec![rows.div_ceil(block[0]), cols.div_ceil(block[1])];
                let blocks = shape[0] * shape[1];
                let (dtype, bytes): (_, Vec<u8>) = match kind {
                    ScaleFormat::F32 => (
                        Dtype::F32,
                        (0..blocks).flat_map(|_| (spread * (0.005 + 0.02 * rng.f32())).to_le_bytes()).collect(),
                    ),
                    ScaleFormat::E8m0 => (Dtype::F8_E8M0, (0..blocks).map(|_| rng.u8(115..121)).collect()),
                };
                scale = Some(OwnedTensor { dtype, shape, bytes });
                // Any code but NaN.
                let code = |rng: &mut Rng| rng.u8(0..0x7f) | if rng.bool() { 0x80 } else { 0 };
                (Dtype::F8_E4M3, (0..count).map(|_| code(rng)).collect())
            }
        };
        Self { codes: OwnedTensor { dtype, shape: vec![rows, cols], bytes }, scale, format, shape: [rows, cols] }
    }

    pub fn view(&self) -> Matrix<'_> {
        let tensor = self.codes.view();
        let scale = self.scale.as_ref().map(OwnedTensor::view);
        Matrix::view(&tensor, scale.as_ref(), self.format, Orientation::OutIn, Rows::All, None, self.shape).unwrap()
    }
}

pub struct OwnedMlp {
    gate: Option<OwnedMatrix>,
    up: OwnedMatrix,
    down: OwnedMatrix,
    gate_bias: Option<Vec<f32>>,
    up_bias: Option<Vec<f32>>,
    down_bias: Option<Vec<f32>>,
}

fn vector(rng: &mut Rng, wanted: bool, len: usize) -> Option<Vec<f32>> {
    wanted.then(|| (0..len).map(|_| normal(rng)).collect())
}

impl OwnedMlp {
    fn random(rng: &mut Rng, mlp: &ExpertMlp, hidden_size: usize) -> Self {
        let (inner, gated) = (mlp.intermediate_size, mlp.activation.gated());
        Self {
            gate: gated.then(|| OwnedMatrix::random(rng, mlp.format, [inner, hidden_size])),
            up: OwnedMatrix::random(rng, mlp.format, [inner, hidden_size]),
            down: OwnedMatrix::random(rng, mlp.format, [hidden_size, inner]),
            gate_bias: vector(rng, mlp.gate_up_bias && gated, inner),
            up_bias: vector(rng, mlp.gate_up_bias, inner),
            down_bias: vector(rng, mlp.down_bias, hidden_size),
        }
    }

    fn view(&self) -> MlpWeights<'_> {
        MlpWeights {
            gate: self.gate.as_ref().map(OwnedMatrix::view),
            up: self.up.view(),
            down: self.down.view(),
            gate_bias: self.gate_bias.clone(),
            up_bias: self.up_bias.clone(),
            down_bias: self.down_bias.clone(),
        }
    }
}

/// A layer with random weights.
pub struct RandomLayer {
    pub spec: MoeSpec,
    router: OwnedMatrix,
    router_bias: Option<Vec<f32>>,
    pub selection_bias: Option<Vec<f32>>,
    tid2eid: Option<Vec<i32>>,
    experts: Vec<OwnedMlp>,
    shared: Option<OwnedMlp>,
}

impl RandomLayer {
    pub fn new(spec: MoeSpec, seed: u64) -> Self {
        let rng = &mut Rng::with_seed(seed);
        let (hidden_size, outputs) = (spec.hidden_size, spec.router_outputs());
        let Router::Linear { format, bias, .. } = spec.router else { panic!("the rig makes linear routers") };
        let tid2eid = match spec.routing.method {
            RoutingMethod::Hash { vocab_size, .. } => {
                Some((0..vocab_size * spec.top_k).map(|_| rng.i32(0..outputs as i32)).collect())
            }
            _ => None,
        };
        Self {
            router: OwnedMatrix::random(rng, format, [outputs, hidden_size]),
            router_bias: vector(rng, bias, outputs),
            selection_bias: vector(rng, spec.has_selection_bias(), outputs),
            tid2eid,
            experts: (0..spec.num_experts).map(|_| OwnedMlp::random(rng, &spec.experts, hidden_size)).collect(),
            shared: spec.shared.as_ref().map(|shared| OwnedMlp::random(rng, &shared.mlp, hidden_size)),
            spec,
        }
    }

    /// Makes the selection bias as small as the differences of scores, so that both decide.
    pub fn soften_bias(&mut self) {
        for bias in self.selection_bias.iter_mut().flatten() {
            *bias *= 0.1;
        }
    }

    pub fn weights(&self) -> MoeWeights<'_> {
        MoeWeights {
            router: RouterWeights {
                weight: Some(self.router.view()),
                bias: self.router_bias.clone(),
                selection_bias: self.selection_bias.clone(),
                tid2eid: self.tid2eid.clone(),
            },
            experts: self.experts.iter().map(OwnedMlp::view).collect(),
            shared: self.shared.as_ref().map(OwnedMlp::view),
            shared_gate: None,
        }
    }

    /// Rows exactly representable in the input type, and token ids where the layer reads them.
    pub fn inputs(&self, tokens: usize, seed: u64) -> (Vec<f32>, Option<Vec<u32>>) {
        let rng = &mut Rng::with_seed(seed);
        let input = self.spec.precision.input;
        let hidden_states =
            (0..tokens * self.spec.hidden_size).map(|_| moewe::numerics::round_to(input, 2.0 * normal(rng))).collect();
        let ids = match self.spec.routing.method {
            RoutingMethod::Hash { vocab_size, .. } => {
                Some((0..tokens).map(|_| rng.u32(0..vocab_size as u32)).collect())
            }
            _ => None,
        };
        (hidden_states, ids)
    }

    pub fn reference(&self, hidden_states: &[f32], token_ids: Option<&[u32]>) -> reference::Layer {
        reference::layer(&self.spec, &self.weights(), Inputs { hidden_states, token_ids, logits: None }).unwrap()
    }

    pub fn on_gpu(&self, max_tokens: usize, options: &Options) -> Session<Wgpu> {
        let plan = Plan::new(gpu().clone(), &self.spec, &self.weights(), max_tokens, &segmented(options)).unwrap();
        Session::new(plan, &self.spec).unwrap()
    }

    pub fn on_cpu(&self, max_tokens: usize, options: &Options, facts: Option<DeviceFacts>) -> Session<Cpu> {
        let cpu = facts.map_or_else(Cpu::new, Cpu::like);
        let plan = Plan::new(cpu, &self.spec, &self.weights(), max_tokens, &segmented(options)).unwrap();
        Session::new(plan, &self.spec).unwrap()
    }
}

/// The library's own choice of kernels.
pub const AUTO: Options = Options { segment_bytes: None, decode_tokens: DECODE_TOKENS };
/// The matrix-vector kernels for any number of tokens.
pub const GEMV: Options = Options { segment_bytes: None, decode_tokens: usize::MAX };
/// The tiled kernels for any number of tokens.
pub const TILED: Options = Options { segment_bytes: None, decode_tokens: 0 };

/// `options` in segments of MOEWE_SEGMENT_BYTES, where that is set and the test does not choose.
pub fn segmented(options: &Options) -> Options {
    let wanted = std::env::var("MOEWE_SEGMENT_BYTES").ok().map(|bytes| bytes.parse().unwrap());
    Options { segment_bytes: options.segment_bytes.or(wanted), ..*options }
}

/// A small layer in the manner of DeepSeek-V3, every parameter away from its neutral value.
pub fn deepseek_like() -> MoeSpec {
    let mlp = ExpertMlp {
        intermediate_size: 24,
        activation: Activation::Swiglu { limit: Some(0.75) },
        gate_up_layout: GateUpLayout::Separate,
        orientation: Orientation::OutIn,
        gate_up_bias: false,
        down_bias: false,
        format: WeightFormat::Bf16,
        activation_quant: ActivationQuant::None,
    };
    MoeSpec {
        hidden_size: 40,
        num_experts: 12,
        top_k: 3,
        router: Router::Linear {
            input: RouterInput::Hidden,
            format: WeightFormat::Bf16,
            bias: false,
            transform: LogitTransform::None,
        },
        routing: Routing {
            method: RoutingMethod::TopK {
                score: Score::Sigmoid,
                key: SelectionKey::ScorePlusBias,
                groups: Some(Groups { n_group: 4, topk_group: 2, score: GroupScore::Top2SumOfKey }),
            },
            renormalize: Some(Denominator::SumPlus { eps: 1e-20 }),
            routed_scaling_factor: 2.5,
            apply_routed_scale_to_output: false,
            per_expert_scale: false,
            weight_position: WeightPosition::Output,
            zero_experts: None,
            nan_policy: NanPolicy::Zero,
        },
        shared: Some(SharedExperts {
            mlp: ExpertMlp {
                intermediate_size: 20,
                activation: Activation::Swiglu { limit: Some(0.5) },
                ..mlp.clone()
            },
            gate: SharedGate::None,
            combination: SharedCombination::Sum,
        }),
        experts: mlp,
        latent: None,
        lora: None,
        expert_input: ExpertInput::Hidden,
        output_bias: false,
        placement: Placement::All,
        shard: TensorShard::Whole,
        entry: Entry::TokenMajor,
        precision: Precision::float32(FloatType::Bf16, FloatType::F32),
    }
}

fn pick<T: Clone>(rng: &mut Rng, of: &[T]) -> T {
    of[rng.usize(0..of.len())].clone()
}

const FORMATS: [WeightFormat; 7] = [
    WeightFormat::F32,
    WeightFormat::F16,
    WeightFormat::Bf16,
    WeightFormat::Fp8Block { block: [128, 128], scale: ScaleFormat::F32 },
    WeightFormat::Fp8Block { block: [16, 32], scale: ScaleFormat::F32 },
    WeightFormat::Fp8Block { block: [3, 16], scale: ScaleFormat::E8m0 },
    WeightFormat::Fp8Block { block: [32, 32], scale: ScaleFormat::E8m0 },
];

fn random_mlp(rng: &mut Rng) -> ExpertMlp {
    let limit = pick(rng, &[None, Some(0.5), Some(3.0)]);
    let activation = pick(
        rng,
        &[
            Activation::Swiglu { limit },
            Activation::SwigluOai { alpha: 1.702, limit, beta: 1.0 },
            Activation::SwigluClampAfter { limit: 0.5 },
            Activation::Relu2,
        ],
    );
    ExpertMlp {
        intermediate_size: pick(rng, &[1, 3, 16, 33, 48, 80, 131]),
        activation,
        gate_up_layout: GateUpLayout::Separate,
        orientation: Orientation::OutIn,
        gate_up_bias: rng.bool(),
        down_bias: rng.bool(),
        format: pick(rng, &FORMATS),
        activation_quant: ActivationQuant::None,
    }
}

/// A random spec of all that the kernels can do.
pub fn random_spec(rng: &mut Rng) -> MoeSpec {
    let num_experts: usize = pick(rng, &[1, 2, 3, 6, 8, 12, 16, 60, 65]);
    let score = pick(rng, &[Score::Softmax, Score::Sigmoid, Score::SqrtSoftplus, Score::Identity]);
    let key = pick(rng, &[SelectionKey::Score, SelectionKey::ScorePlusBias, SelectionKey::LogitPlusBias]);
    let divisors: Vec<usize> = (1..=num_experts / 2).filter(|n| num_experts.is_multiple_of(*n)).collect();
    let groups = (num_experts > 1 && rng.bool()).then(|| {
        let n_group = pick(rng, &divisors);
        let score = pick(rng, &[GroupScore::Top2SumOfKey, GroupScore::MaxOfScore, GroupScore::Top2SumOfScore]);
        Groups { n_group, topk_group: rng.usize(1..=n_group), score }
    });
    let selectable = groups.map_or(num_experts, |groups| num_experts / groups.n_group * groups.topk_group);
    let method = match rng.usize(0..6) {
        0 => RoutingMethod::TopKThenScore { score: pick(rng, &[ChosenScore::Softmax, ChosenScore::Sigmoid]) },
        1 => RoutingMethod::Hash { score, vocab_size: 17 },
        _ => RoutingMethod::TopK { score, key, groups },
    };
    let renormalize = pick(
        rng,
        &[
            None,
            Some(Denominator::Sum),
            Some(Denominator::SumPlus { eps: 1e-3 }),
            Some(Denominator::AtLeast { floor: 0.7 }),
            Some(Denominator::SumOrOne),
        ],
    );
    // A sum of identity scores of either sign can be near 0: then no bound on the weights holds.
    let renormalize = if score == Score::Identity { None } else { renormalize };
    let shared = rng.bool().then(|| SharedExperts {
        mlp: random_mlp(rng),
        gate: SharedGate::None,
        combination: SharedCombination::Sum,
    });
    let types = [FloatType::F32, FloatType::F16, FloatType::Bf16];
    MoeSpec {
        hidden_size: pick(rng, &[1, 4, 5, 24, 64, 100, 130]),
        num_experts,
        top_k: rng.usize(1..=selectable.min(9)),
        router: Router::Linear {
            input: RouterInput::Hidden,
            format: pick(rng, &FORMATS[..3]),
            bias: rng.bool(),
            transform: LogitTransform::None,
        },
        routing: Routing {
            method,
            renormalize,
            routed_scaling_factor: pick(rng, &[1.0, 2.5, 0.3]),
            apply_routed_scale_to_output: rng.bool(),
            per_expert_scale: false,
            weight_position: WeightPosition::Output,
            zero_experts: None,
            nan_policy: NanPolicy::Zero,
        },
        experts: random_mlp(rng),
        shared,
        latent: None,
        lora: None,
        expert_input: ExpertInput::Hidden,
        output_bias: false,
        placement: Placement::All,
        shard: TensorShard::Whole,
        entry: Entry::TokenMajor,
        precision: Precision::float32(pick(rng, &types), pick(rng, &types)),
    }
}
