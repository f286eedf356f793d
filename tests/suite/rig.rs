//! Random layers, and the device that MOEWE_ADAPTER names.

use std::sync::OnceLock;

use fastrand::Rng;
use moewe::host::{self, Limits, Session};
use moewe::reference::{self, Inputs};
use moewe::schedule::{DECODE_TOKENS, DeviceFacts};
use moewe::spec::*;
use moewe::weights::{Dtype, InputScales, LatentNormWeights, LatentWeights, RouterMlpWeights, Rows, Stored};
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
    beside: Beside,
    format: WeightFormat,
    shape: [usize; 2],
}

/// The tensors beside the codes, which say how these are arranged.
enum Beside {
    Nothing,
    Scales(OwnedTensor),
    Nvfp4 { scales: OwnedTensor, global: OwnedTensor, divides: bool },
    PackQuantized { scales: OwnedTensor, zeros: Option<OwnedTensor>, g_idx: Option<OwnedTensor> },
    Gptq { scales: OwnedTensor, zeros: OwnedTensor, less_one: bool, g_idx: Option<OwnedTensor> },
    Awq { scales: OwnedTensor, zeros: OwnedTensor },
    Gguf,
}

/// Whether a matrix of so many columns can have this format.
pub fn fits(format: WeightFormat, cols: usize) -> bool {
    match format {
        WeightFormat::Mxfp4 | WeightFormat::Nvfp4 => cols.is_multiple_of(2),
        WeightFormat::Q8_0 => cols.is_multiple_of(32),
        WeightFormat::Q4K | WeightFormat::Q6K => cols.is_multiple_of(256),
        _ => true,
    }
}

/// Random words whose nibbles are `legal`.
fn nibbles(rng: &mut Rng, words: usize, legal: std::ops::Range<u32>) -> Vec<u8> {
    let word = |rng: &mut Rng| (0..8).fold(0, |word, at| word | rng.u32(legal.clone()) << (4 * at));
    (0..words).flat_map(|_| word(rng).to_le_bytes()).collect()
}

/// Random positive scales about `size`.
fn scales(rng: &mut Rng, format: ScaleFormat, size: f32, shape: Vec<usize>) -> OwnedTensor {
    let count: usize = shape.iter().product();
    let one = |rng: &mut Rng| size * (0.5 + rng.f32());
    let (dtype, bytes): (_, Vec<u8>) = match format {
        ScaleFormat::F32 => (Dtype::F32, (0..count).flat_map(|_| one(rng).to_le_bytes()).collect()),
        ScaleFormat::F16 => {
            (Dtype::F16, (0..count).flat_map(|_| half::f16::from_f32(one(rng)).to_le_bytes()).collect())
        }
        ScaleFormat::Bf16 => {
            (Dtype::BF16, (0..count).flat_map(|_| half::bf16::from_f32(one(rng)).to_le_bytes()).collect())
        }
        ScaleFormat::E8m0 => {
            let power = (size.log2() + 127.0) as u8;
            (Dtype::F8_E8M0, (0..count).map(|_| rng.u8(power - 1..power + 2)).collect())
        }
    };
    OwnedTensor { dtype, shape, bytes }
}

impl OwnedMatrix {
    pub fn random(rng: &mut Rng, format: WeightFormat, [rows, cols]: [usize; 2]) -> Self {
        assert!(fits(format, cols), "{format:?} with {cols} columns");
        let spread = 1.0 / (cols as f32).sqrt();
        let count = rows * cols;
        let whole = vec![rows, cols];
        // Any E4M3 code but NaN; those reach 448, INT8 127, E2M1 6, INT4 8.
        let e4m3 = |rng: &mut Rng, count: usize| -> Vec<u8> {
            (0..count).map(|_| rng.u8(0..0x7f) | if rng.bool() { 0x80 } else { 0 }).collect()
        };
        let bytes = |rng: &mut Rng, count: usize| -> Vec<u8> { (0..count).map(|_| rng.u8(..)).collect() };
        let owned = |dtype: Dtype, shape: Vec<usize>, bytes: Vec<u8>| OwnedTensor { dtype, shape, bytes };
        let (codes, beside) = match format {
            WeightFormat::F32 => {
                let bytes = (0..count).flat_map(|_| (normal(rng) * spread).to_le_bytes()).collect();
                (owned(Dtype::F32, whole, bytes), Beside::Nothing)
            }
            WeightFormat::F16 => {
                let bytes = (0..count).flat_map(|_| half::f16::from_f32(normal(rng) * spread).to_le_bytes()).collect();
                (owned(Dtype::F16, whole, bytes), Beside::Nothing)
            }
            WeightFormat::Bf16 => {
                let bytes = (0..count).flat_map(|_| half::bf16::from_f32(normal(rng) * spread).to_le_bytes()).collect();
                (owned(Dtype::BF16, whole, bytes), Beside::Nothing)
            }
            WeightFormat::Fp8Block { block, scale } => {
                let shape = vec![rows.div_ceil(block[0]), cols.div_ceil(block[1])];
                let beside = Beside::Scales(scales(rng, scale, spread / 64.0, shape));
                (owned(Dtype::F8_E4M3, whole, e4m3(rng, count)), beside)
            }
            WeightFormat::Fp8Tensor => {
                let beside = Beside::Scales(scales(rng, ScaleFormat::F32, spread / 64.0, vec![]));
                (owned(Dtype::F8_E4M3, whole, e4m3(rng, count)), beside)
            }
            WeightFormat::Fp8Channel => {
                let beside = Beside::Scales(scales(rng, ScaleFormat::F32, spread / 64.0, vec![rows, 1]));
                (owned(Dtype::F8_E4M3, whole, e4m3(rng, count)), beside)
            }
            WeightFormat::Int8Channel => {
                let beside = Beside::Scales(scales(rng, ScaleFormat::Bf16, spread / 64.0, vec![rows, 1]));
                (owned(Dtype::I8, whole, bytes(rng, count)), beside)
            }
            WeightFormat::Mxfp4 => {
                let shape = vec![rows, cols.div_ceil(32)];
                let beside = Beside::Scales(scales(rng, ScaleFormat::E8m0, spread / 3.0, shape));
                (owned(Dtype::I8, vec![rows, cols / 2], bytes(rng, count / 2)), beside)
            }
            WeightFormat::Nvfp4 => {
                let shape = vec![rows, cols.div_ceil(16)];
                let blocks = shape[0] * shape[1];
                // A block in ten is all zeros.
                let scale = |rng: &mut Rng| if rng.u8(0..10) == 0 { 0 } else { rng.u8(0x60..0x7f) };
                let scales = owned(Dtype::F8_E4M3, shape, (0..blocks).map(|_| scale(rng)).collect());
                let divides = rng.bool();
                let global = spread / 400.0 * (0.5 + rng.f32());
                let global = if divides { 1.0 / global } else { global };
                let global = owned(Dtype::F32, vec![], global.to_le_bytes().to_vec());
                (
                    owned(Dtype::U8, vec![rows, cols / 2], bytes(rng, count / 2)),
                    Beside::Nvfp4 { scales, global, divides },
                )
            }
            WeightFormat::Int4 { group, scale, zero_points, act_order } => {
                let groups = group.map_or(1, |group| cols.div_ceil(group));
                let order = |rng: &mut Rng| {
                    let bytes = (0..cols).flat_map(|_| rng.u32(0..groups as u32).to_le_bytes()).collect();
                    act_order.then(|| owned(Dtype::I32, vec![cols], bytes))
                };
                let less_one = rng.bool();
                let legal = match (zero_points, less_one) {
                    (true, _) => 0..16,
                    (false, true) => 7..8,
                    (false, false) => 8..9,
                };
                let size = spread / 4.0;
                match rng.u8(0..3) {
                    0 if cols.is_multiple_of(8) => {
                        let codes = owned(Dtype::I32, vec![cols / 8, rows], nibbles(rng, count / 8, 0..16));
                        let words = rows.div_ceil(8);
                        let zeros = owned(Dtype::I32, vec![groups, words], nibbles(rng, groups * words, legal));
                        let scales = scales(rng, scale, size, vec![groups, rows]);
                        (codes, Beside::Gptq { scales, zeros, less_one, g_idx: order(rng) })
                    }
                    1 if rows.is_multiple_of(8) && !act_order => {
                        let legal = if zero_points { 0..16 } else { 8..9 };
                        let codes = owned(Dtype::I32, vec![cols, rows / 8], nibbles(rng, count / 8, 0..16));
                        let zeros = owned(Dtype::I32, vec![groups, rows / 8], nibbles(rng, groups * rows / 8, legal));
                        (codes, Beside::Awq { scales: scales(rng, scale, size, vec![groups, rows]), zeros })
                    }
                    _ => {
                        let words = cols.div_ceil(8);
                        let codes = owned(Dtype::I32, vec![rows, words], nibbles(rng, rows * words, 0..16));
                        let scales = scales(rng, scale, size, vec![rows, groups]);
                        let words = rows.div_ceil(8);
                        let zeros = zero_points
                            .then(|| owned(Dtype::I32, vec![words, groups], nibbles(rng, words * groups, 0..16)));
                        (codes, Beside::PackQuantized { scales, zeros, g_idx: order(rng) })
                    }
                }
            }
            WeightFormat::Q8_0 => {
                let mut data = bytes(rng, count / 32 * 34);
                for block in data.chunks_exact_mut(34) {
                    block[..2].copy_from_slice(&half::f16::from_f32(spread / 64.0 * (rng.f32() - 0.5)).to_le_bytes());
                }
                (owned(Dtype::U8, vec![rows, cols / 32 * 34], data), Beside::Gguf)
            }
            WeightFormat::Q4K => {
                let mut data = bytes(rng, count / 256 * 144);
                for block in data.chunks_exact_mut(144) {
                    for at in [0, 2] {
                        let d = half::f16::from_f32(spread / 256.0 * rng.f32());
                        block[at..at + 2].copy_from_slice(&d.to_le_bytes());
                    }
                }
                (owned(Dtype::U8, vec![rows, cols / 256 * 144], data), Beside::Gguf)
            }
            WeightFormat::Q6K => {
                let mut data = bytes(rng, count / 256 * 210);
                for block in data.chunks_exact_mut(210) {
                    let d = half::f16::from_f32(spread / 2000.0 * (rng.f32() - 0.5));
                    block[208..].copy_from_slice(&d.to_le_bytes());
                }
                (owned(Dtype::U8, vec![rows, cols / 256 * 210], data), Beside::Gguf)
            }
        };
        Self { codes, beside, format, shape: [rows, cols] }
    }

    pub fn view(&self) -> Matrix<'_> {
        let codes = &self.codes.view();
        let tensor = OwnedTensor::view;
        match &self.beside {
            Beside::Nothing => self.matrix(Stored::Plain(codes)),
            Beside::Scales(scales) => self.matrix(Stored::Scaled { codes, scales: &tensor(scales) }),
            Beside::Nvfp4 { scales, global, divides } => {
                let (scales, global) = (&tensor(scales), &tensor(global));
                self.matrix(Stored::Nvfp4 { codes, scales, global, divides: *divides })
            }
            Beside::PackQuantized { scales, zeros, g_idx } => {
                let (zeros, g_idx) = (zeros.as_ref().map(tensor), g_idx.as_ref().map(tensor));
                let (zeros, g_idx) = (zeros.as_ref(), g_idx.as_ref());
                self.matrix(Stored::PackQuantized { codes, scales: &tensor(scales), zeros, g_idx })
            }
            Beside::Gptq { scales, zeros, less_one, g_idx } => {
                let g_idx = g_idx.as_ref().map(tensor);
                let (scales, zeros) = (&tensor(scales), &tensor(zeros));
                self.matrix(Stored::Gptq { codes, scales, zeros, zeros_less_one: *less_one, g_idx: g_idx.as_ref() })
            }
            Beside::Awq { scales, zeros } => {
                self.matrix(Stored::Awq { codes, scales: &tensor(scales), zeros: &tensor(zeros) })
            }
            Beside::Gguf => self.matrix(Stored::Gguf(codes)),
        }
    }

    fn matrix<'a>(&'a self, stored: Stored<'_, 'a>) -> Matrix<'a> {
        Matrix::view(stored, self.format, Orientation::OutIn, Rows::All, None, self.shape).unwrap()
    }
}

pub struct OwnedMlp {
    gate: Option<OwnedMatrix>,
    up: OwnedMatrix,
    down: OwnedMatrix,
    gate_bias: Option<Vec<f32>>,
    up_bias: Option<Vec<f32>>,
    down_bias: Option<Vec<f32>>,
    input_scales: Option<InputScales>,
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
            // Small ones saturate some codes.
            input_scales: matches!(mlp.activation_quant, ActivationQuant::Static { .. })
                .then(|| InputScales { gate_up: 0.005 + 0.01 * rng.f32(), down: 0.005 + 0.01 * rng.f32() }),
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
            input_scales: self.input_scales,
        }
    }
}

/// The layers of an MLP router.
struct OwnedRouterMlp {
    /// down, fc1, fc2, out.
    matrices: [OwnedMatrix; 4],
    /// down, fc1, fc2.
    biases: [Vec<f32>; 3],
    states_scale: Option<Vec<f32>>,
    norm: Vec<f32>,
}

impl OwnedRouterMlp {
    fn view(&self) -> RouterMlpWeights<'_> {
        let [down, fc1, fc2, out] = [0, 1, 2, 3].map(|at: usize| self.matrices[at].view());
        let [down_bias, fc1_bias, fc2_bias] = self.biases.clone();
        let (states_scale, norm) = (self.states_scale.clone(), self.norm.clone());
        RouterMlpWeights { down, down_bias, states_scale, norm, fc1, fc1_bias, fc2, fc2_bias, out }
    }
}

/// A layer with random weights.
pub struct RandomLayer {
    pub spec: MoeSpec,
    router: Option<OwnedMatrix>,
    router_mlp: Option<OwnedRouterMlp>,
    router_bias: Option<Vec<f32>>,
    pub selection_bias: Option<Vec<f32>>,
    tid2eid: Option<Vec<i32>>,
    input_scale: Option<Vec<f32>>,
    per_expert_scale: Option<Vec<f32>>,
    global_scale: Option<f32>,
    experts: Vec<OwnedMlp>,
    shared: Vec<OwnedMlp>,
    shared_gate: Option<OwnedMatrix>,
    latent: Option<[OwnedMatrix; 2]>,
    latent_norm: LatentNormWeights,
    output_bias: Option<Vec<f32>>,
    output_norm: Option<Vec<f32>>,
}

/// What a layer reads, each row exactly representable in its type.
pub struct LayerInputs {
    pub hidden_states: Vec<f32>,
    pub token_ids: Option<Vec<u32>>,
    pub expert_hidden_states: Option<Vec<f32>>,
    pub logits: Option<Vec<f32>>,
    pub router_states: Option<Vec<f32>>,
}

impl LayerInputs {
    pub fn view(&self) -> Inputs<'_> {
        Inputs {
            hidden_states: &self.hidden_states,
            token_ids: self.token_ids.as_deref(),
            logits: self.logits.as_deref(),
            expert_hidden_states: self.expert_hidden_states.as_deref(),
            router_states: self.router_states.as_deref(),
        }
    }
}

impl RandomLayer {
    pub fn new(spec: MoeSpec, seed: u64) -> Self {
        let rng = &mut Rng::with_seed(seed);
        let (hidden_size, outputs, selectable) = (spec.hidden_size, spec.router_outputs(), spec.selectable());
        let near_one = |rng: &mut Rng, len: usize| (0..len).map(|_| 1.0 + 0.3 * normal(rng)).collect::<Vec<f32>>();
        let tid2eid = match spec.routing.method {
            RoutingMethod::Hash { vocab_size, .. } => {
                Some((0..vocab_size * spec.top_k).map(|_| rng.i32(0..selectable as i32)).collect())
            }
            _ => None,
        };
        let (mut router, mut router_mlp, mut router_bias, mut input_scale) = (None, None, None, None);
        match spec.router {
            Router::Linear { input, format, bias, .. } => {
                router = Some(OwnedMatrix::random(rng, format, [outputs, hidden_size]));
                router_bias = vector(rng, bias, outputs);
                if let RouterInput::RmsNormScaled { .. } = input {
                    // The router divides by sqrt(H): keep its logits as far apart as without.
                    let root = (hidden_size as f32).sqrt();
                    input_scale = Some(near_one(rng, hidden_size).iter().map(|scale| scale * root).collect());
                }
            }
            Router::Mlp { state_size, previous_state, format, .. } => {
                let mut matrix = |shape| OwnedMatrix::random(rng, format, shape);
                let matrices = [
                    matrix([state_size, hidden_size]),
                    matrix([state_size, state_size]),
                    matrix([state_size, state_size]),
                    matrix([outputs, state_size]),
                ];
                let biases = [0, 1, 2].map(|_| vector(rng, true, state_size).unwrap());
                let states_scale = previous_state.then(|| near_one(rng, state_size));
                router_mlp = Some(OwnedRouterMlp { matrices, biases, states_scale, norm: near_one(rng, state_size) });
            }
            Router::Given { .. } => {}
        }
        let latent = spec.latent.as_ref().map(|latent| {
            let mut matrix = |shape| OwnedMatrix::random(rng, latent.format, shape);
            [matrix([latent.size, hidden_size]), matrix([hidden_size, latent.size])]
        });
        let width = spec.expert_width();
        let latent_norm = match spec.latent.as_ref().map(|latent| latent.norm) {
            None | Some(LatentNorm::None) => LatentNormWeights::None,
            Some(LatentNorm::Reduced { .. }) => LatentNormWeights::Reduced(near_one(rng, width)),
            Some(LatentNorm::PreAndPost { .. }) => {
                LatentNormWeights::PreAndPost { pre: near_one(rng, width), post: near_one(rng, width) }
            }
        };
        Self {
            router,
            router_mlp,
            router_bias,
            selection_bias: vector(rng, spec.has_selection_bias(), selectable),
            tid2eid,
            input_scale,
            per_expert_scale: spec.routing.per_expert_scale.then(|| near_one(rng, spec.num_experts)),
            global_scale: match spec.routing.method {
                RoutingMethod::JointNorm { global_scale: true, .. } => Some(1.7),
                _ => None,
            },
            experts: (0..spec.num_experts).map(|_| OwnedMlp::random(rng, &spec.experts, width)).collect(),
            shared: match &spec.shared {
                None => vec![],
                Some(shared) => {
                    (0..spec.shared_mlps()).map(|_| OwnedMlp::random(rng, &shared.mlp, hidden_size)).collect()
                }
            },
            shared_gate: spec.shared.as_ref().and_then(|shared| match shared.gate {
                SharedGate::Sigmoid { format } => Some(OwnedMatrix::random(rng, format, [1, hidden_size])),
                SharedGate::None | SharedGate::Joint => None,
            }),
            latent,
            latent_norm,
            output_bias: vector(rng, spec.output_bias, hidden_size),
            output_norm: spec.output_norm.map(|_| near_one(rng, hidden_size)),
            spec,
        }
    }

    /// Sets all gate and up biases, of the routed or of the shared experts.
    pub fn set_gate_up_bias(&mut self, routed: bool, gate: f32, up: f32) {
        for mlp in if routed { &mut self.experts } else { &mut self.shared } {
            for (bias, value) in [(&mut mlp.gate_bias, gate), (&mut mlp.up_bias, up)] {
                bias.iter_mut().flatten().for_each(|bias| *bias = value);
            }
        }
    }

    /// Writes NaN into one weight of an expert's up matrix, which has to be F32.
    pub fn spoil(&mut self, expert: usize) {
        let up = &mut self.experts[expert].up;
        assert_eq!(up.format, WeightFormat::F32);
        up.codes.bytes[..4].copy_from_slice(&f32::NAN.to_le_bytes());
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
                weight: self.router.as_ref().map(OwnedMatrix::view),
                bias: self.router_bias.clone(),
                selection_bias: self.selection_bias.clone(),
                tid2eid: self.tid2eid.clone(),
                input_scale: self.input_scale.clone(),
                per_expert_scale: self.per_expert_scale.clone(),
                global_scale: self.global_scale,
                mlp: self.router_mlp.as_ref().map(OwnedRouterMlp::view),
            },
            experts: self.experts.iter().map(OwnedMlp::view).collect(),
            shared: self.shared.iter().map(OwnedMlp::view).collect(),
            shared_gate: self.shared_gate.as_ref().map(OwnedMatrix::view),
            latent: self.latent.as_ref().map(|[down, up]| LatentWeights {
                down: down.view(),
                up: up.view(),
                norm: self.latent_norm.clone(),
            }),
            output_bias: self.output_bias.clone(),
            output_norm: self.output_norm.clone(),
        }
    }

    /// Hidden states, and token ids where the layer reads them.
    pub fn inputs(&self, tokens: usize, seed: u64) -> (Vec<f32>, Option<Vec<u32>>) {
        let LayerInputs { hidden_states, token_ids, .. } = self.all_inputs(tokens, seed);
        (hidden_states, token_ids)
    }

    /// All that the layer reads. Logits that are given have ties, NaN and infinities.
    pub fn all_inputs(&self, tokens: usize, seed: u64) -> LayerInputs {
        let rng = &mut Rng::with_seed(seed);
        let input = self.spec.precision.input;
        let rows = |rng: &mut Rng| -> Vec<f32> {
            let value = |_| moewe::numerics::round_to(input, 2.0 * normal(rng));
            (0..tokens * self.spec.hidden_size).map(value).collect()
        };
        let hidden_states = rows(rng);
        let token_ids = match self.spec.routing.method {
            RoutingMethod::Hash { vocab_size, .. } => {
                Some((0..tokens).map(|_| rng.u32(0..vocab_size as u32)).collect())
            }
            _ => None,
        };
        let expert_hidden_states = match self.spec.expert_input {
            ExpertInput::Hidden => None,
            ExpertInput::Separate => Some(rows(rng)),
        };
        let logits = match self.spec.router {
            Router::Given { .. } => {
                let odd = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 0.0, -0.0, 1.5, 1.5];
                let outputs = self.spec.router_outputs();
                let row = |rng: &mut Rng| -> Vec<f32> {
                    // Most rows are plain; some have ties only; some have what is no number.
                    let kind = rng.usize(0..6);
                    (0..outputs)
                        .map(|_| match kind {
                            0 => odd[rng.usize(0..odd.len())],
                            1 => odd[rng.usize(3..odd.len())],
                            _ => 2.0 * normal(rng),
                        })
                        .collect()
                };
                Some((0..tokens).flat_map(|_| row(rng)).collect())
            }
            _ => None,
        };
        let router_states = match self.spec.router {
            Router::Mlp { state_size, previous_state: true, .. } => {
                Some((0..tokens * state_size).map(|_| normal(rng)).collect())
            }
            _ => None,
        };
        LayerInputs { hidden_states, token_ids, expert_hidden_states, logits, router_states }
    }

    pub fn reference(&self, hidden_states: &[f32], token_ids: Option<&[u32]>) -> reference::Layer {
        self.judge(Inputs { token_ids, ..Inputs::of(hidden_states) })
    }

    pub fn judge(&self, inputs: Inputs<'_>) -> reference::Layer {
        reference::layer(&self.spec, &self.weights(), inputs).unwrap()
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
pub const AUTO: Options =
    Options { segment_bytes: None, decode_tokens: DECODE_TOKENS, fuse_quantization: true, diagnostics: false };
/// The matrix-vector kernels for any number of tokens.
pub const GEMV: Options =
    Options { segment_bytes: None, decode_tokens: usize::MAX, fuse_quantization: true, diagnostics: false };
/// The tiled kernels for any number of tokens.
pub const TILED: Options =
    Options { segment_bytes: None, decode_tokens: 0, fuse_quantization: true, diagnostics: false };

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
        output_norm: None,
        placement: Placement::All,
        shard: TensorShard::Whole,
        entry: Entry::TokenMajor,
        precision: Precision::float32(FloatType::Bf16, FloatType::F32),
    }
}
