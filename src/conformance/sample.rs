//! Layers with random weights, each with all that its spec asks for, and random tokens for them.
//! A long file: each part of a layer beside what draws it.

use fastrand::Rng;

pub use super::matrix::{OwnedMatrix, OwnedTensor, fits};

use super::matrix::{Streams, normal};
use crate::error::{Error, Result};
use crate::numerics::round_to;
use crate::reference::{self, Inputs};
use crate::spec::{
    Activation, ActivationQuant, CommonTerms, Denominator, Entry, ExpertInput, ExpertMlp, FloatType, GateUpLayout,
    GroupScore, Groups, Latent, LatentNorm, LogitTransform, Lora, MoeSpec, NanPolicy, Orientation, Placement,
    Precision, Router, RouterInput, Routing, RoutingMethod, Score, SelectionKey, SharedCombination, SharedExperts,
    SharedGate, TensorShard, WeightFormat, WeightPosition,
};
use crate::weights::{
    InputScales, LatentNormWeights, LatentWeights, LoraWeights, Matrix, MlpWeights, MoeWeights, RouterMlpWeights,
    RouterWeights, Rows,
};

/// The weights of one MLP.
#[derive(Debug, Clone, PartialEq)]
pub struct OwnedMlp {
    gate: Option<OwnedMatrix>,
    up: OwnedMatrix,
    down: OwnedMatrix,
    gate_bias: Option<Vec<f32>>,
    up_bias: Option<Vec<f32>>,
    down_bias: Option<Vec<f32>>,
    input_scales: Option<InputScales>,
}

fn normals(mut rng: Rng, len: usize) -> Vec<f32> {
    (0..len).map(|_| normal(&mut rng)).collect()
}

fn near_one(mut rng: Rng, len: usize) -> Vec<f32> {
    (0..len).map(|_| 1.0 + 0.3 * normal(&mut rng)).collect()
}

fn view(matrix: Option<&OwnedMatrix>) -> Result<Option<Matrix<'_>>> {
    matrix.map(OwnedMatrix::view).transpose()
}

impl OwnedMlp {
    fn random(streams: Streams, name: &str, mlp: &ExpertMlp, width: usize) -> Result<Self> {
        let ExpertMlp {
            intermediate_size,
            activation,
            gate_up_layout,
            orientation,
            gate_up_bias,
            down_bias,
            format,
            activation_quant,
        } = *mlp;
        let (inner, gated) = (intermediate_size, activation.gated());
        let stream = |part: &str| streams.of(&format!("{name}.{part}"));
        let matrix = |part: &str, shape| OwnedMatrix::random(&mut stream(part), format, shape);
        let bias = |part: &str, wanted: bool, len| wanted.then(|| normals(stream(part), len));
        let mut gate = gated.then(|| matrix("gate", [inner, width])).transpose()?;
        let (mut up, mut down) = (matrix("up", [inner, width])?, matrix("down", [width, inner])?);
        match (gate_up_layout, &gate) {
            (GateUpLayout::Separate, _) | (GateUpLayout::Halves | GateUpLayout::Interleaved, None) => {}
            (GateUpLayout::Halves | GateUpLayout::Interleaved, Some(first)) => {
                up = match first.is_plain() {
                    true => OwnedMatrix::fused(first, &up, gate_up_layout)?,
                    // Scales follow the rows of one tensor, which are not those of two.
                    false => matrix("gate_up", [2 * inner, width])?,
                };
                gate = None;
            }
        }
        match orientation {
            Orientation::OutIn => {}
            Orientation::InOut => {
                (up, down) = (up.transposed()?, down.transposed()?);
                gate = gate.map(|gate| gate.transposed()).transpose()?;
            }
        }
        Ok(Self {
            gate,
            up,
            down,
            gate_bias: bias("gate_bias", gate_up_bias && gated, inner),
            up_bias: bias("up_bias", gate_up_bias, inner),
            down_bias: bias("down_bias", down_bias, width),
            input_scales: match activation_quant {
                // Small ones saturate some codes.
                ActivationQuant::Static { code: _ } => {
                    let mut rng = stream("input_scales");
                    Some(InputScales { gate_up: 0.005 + 0.01 * rng.f32(), down: 0.005 + 0.01 * rng.f32() })
                }
                ActivationQuant::None | ActivationQuant::Dynamic { code: _, span: _, rule: _, scale: _ } => None,
            },
        })
    }

    /// What a reader finds who takes gate, up and down to be stored as these specs say.
    fn view(&self, [gate_spec, up_spec, down_spec]: [&ExpertMlp; 3], width: usize) -> Result<MlpWeights<'_>> {
        let Self { gate, up, down, gate_bias, up_bias, down_bias, input_scales } = self;
        let inner = |mlp: &ExpertMlp| [mlp.intermediate_size, width];
        let gate = match gate_spec.activation.gated() {
            true => {
                let rows = Rows::Gate(gate_spec.gate_up_layout);
                Some(gate.as_ref().unwrap_or(up).read(gate_spec.orientation, rows, inner(gate_spec))?)
            }
            false => None,
        };
        Ok(MlpWeights {
            gate,
            up: up.read(up_spec.orientation, Rows::Up(up_spec.gate_up_layout), inner(up_spec))?,
            down: down.read(down_spec.orientation, Rows::All, [width, down_spec.intermediate_size])?,
            gate_bias: gate_bias.clone(),
            up_bias: up_bias.clone(),
            down_bias: down_bias.clone(),
            input_scales: *input_scales,
        })
    }
}

/// One adapter on one expert.
#[derive(Debug, Clone, PartialEq)]
struct OwnedLora {
    gate_up_a: OwnedMatrix,
    gate_b: Option<OwnedMatrix>,
    up_b: OwnedMatrix,
    down_a: OwnedMatrix,
    down_b: OwnedMatrix,
}

impl OwnedLora {
    fn random(streams: Streams, name: &str, lora: &Lora, gated: bool, [width, inner]: [usize; 2]) -> Result<Self> {
        let Lora { num_adapters: _, rank, format, delta: _ } = *lora;
        let matrix = |part: &str, shape| OwnedMatrix::random(&mut streams.of(&format!("{name}.{part}")), format, shape);
        Ok(Self {
            gate_up_a: matrix("gate_up_a", [rank, width])?,
            gate_b: gated.then(|| matrix("gate_b", [inner, rank])).transpose()?,
            up_b: matrix("up_b", [inner, rank])?,
            down_a: matrix("down_a", [rank, inner])?,
            down_b: matrix("down_b", [width, rank])?,
        })
    }

    fn view(&self) -> Result<LoraWeights<'_>> {
        let Self { gate_up_a, gate_b, up_b, down_a, down_b } = self;
        Ok(LoraWeights {
            gate_up_a: gate_up_a.view()?,
            gate_b: view(gate_b.as_ref())?,
            up_b: up_b.view()?,
            down_a: down_a.view()?,
            down_b: down_b.view()?,
        })
    }
}

/// The layers of an MLP router.
#[derive(Debug, Clone, PartialEq)]
struct OwnedRouterMlp {
    /// down, fc1, fc2, out.
    matrices: [OwnedMatrix; 4],
    /// down, fc1, fc2.
    biases: [Vec<f32>; 3],
    states_scale: Option<Vec<f32>>,
    norm: Vec<f32>,
}

impl OwnedRouterMlp {
    fn view(&self) -> Result<RouterMlpWeights<'_>> {
        let Self { matrices: [down, fc1, fc2, out], biases, states_scale, norm } = self;
        let [down_bias, fc1_bias, fc2_bias] = biases.clone();
        Ok(RouterMlpWeights {
            down: down.view()?,
            down_bias,
            states_scale: states_scale.clone(),
            norm: norm.clone(),
            fc1: fc1.view()?,
            fc1_bias,
            fc2: fc2.view()?,
            fc2_bias,
            out: out.view()?,
        })
    }
}

/// A layer with random weights: of the whole layer, whatever its spec says that this device has of it.
#[derive(Debug, Clone, PartialEq)]
pub struct RandomLayer {
    /// What it computes. Of another spec only what asks for the same weights may differ.
    pub spec: MoeSpec,
    router: Option<OwnedMatrix>,
    router_mlp: Option<OwnedRouterMlp>,
    router_bias: Option<Vec<f32>>,
    /// One for each selectable output.
    pub selection_bias: Option<Vec<f32>>,
    tid2eid: Option<Vec<i32>>,
    input_scale: Option<Vec<f32>>,
    per_expert_scale: Option<Vec<f32>>,
    global_scale: Option<f32>,
    experts: Vec<OwnedMlp>,
    /// By adapter and expert.
    lora: Vec<Vec<OwnedLora>>,
    shared: Vec<OwnedMlp>,
    shared_gate: Option<OwnedMatrix>,
    latent: Option<[OwnedMatrix; 2]>,
    latent_norm: LatentNormWeights,
    output_bias: Option<Vec<f32>>,
    output_norm: Option<Vec<f32>>,
}

/// What a layer reads, each row exactly representable in its type.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerInputs {
    /// [T, H].
    pub hidden_states: Vec<f32>,
    /// `[T]`, with hash routing.
    pub token_ids: Option<Vec<u32>>,
    /// [T, H], if the experts read another input.
    pub expert_hidden_states: Option<Vec<f32>>,
    /// [T, outputs], if the caller gives the logits.
    pub logits: Option<Vec<f32>>,
    /// [T, S], if a state enters the router.
    pub router_states: Option<Vec<f32>>,
    /// `[T]`, if there are adapters.
    pub adapter_ids: Option<Vec<i32>>,
    /// `[slots]`, of a batched entry.
    pub counts: Option<Vec<u32>>,
    /// `[T]`, of a batched entry whose weights act inside of the experts.
    pub row_weights: Option<Vec<f32>>,
}

impl LayerInputs {
    /// As a layer takes them.
    pub fn view(&self) -> Inputs<'_> {
        let Self {
            hidden_states,
            token_ids,
            expert_hidden_states,
            logits,
            router_states,
            adapter_ids,
            counts,
            row_weights,
        } = self;
        Inputs {
            hidden_states,
            token_ids: token_ids.as_deref(),
            logits: logits.as_deref(),
            expert_hidden_states: expert_hidden_states.as_deref(),
            router_states: router_states.as_deref(),
            adapter_ids: adapter_ids.as_deref(),
            counts: counts.as_deref(),
            row_weights: row_weights.as_deref(),
        }
    }
}

/// The matrices that layouts and orientations are about.
pub(super) const READ: [&str; 6] =
    ["experts.gate", "experts.up", "experts.down", "shared.gate", "shared.up", "shared.down"];

/// Rows of the table of hash routing.
fn vocab_size(method: &RoutingMethod) -> Option<usize> {
    match method {
        RoutingMethod::Hash { score: _, vocab_size } => Some(*vocab_size),
        RoutingMethod::TopK { score: _, key: _, groups: _ }
        | RoutingMethod::TopKThenScore { score: _ }
        | RoutingMethod::JointNorm { num_shared: _, global_scale: _ }
        | RoutingMethod::Sparsemixer { router_jitter_noise: _ } => None,
    }
}

impl RandomLayer {
    /// Weights of this seed. A tensor of the same name and shape is the same in the layer of another spec.
    ///
    /// # Errors
    /// A format that a row of the layer cannot have, or a layout that a format has not.
    pub fn new(spec: MoeSpec, seed: u64) -> Result<Self> {
        let streams = Streams(seed);
        let (hidden_size, outputs, selectable) = (spec.hidden_size, spec.router_outputs(), spec.selectable());
        let matrix = |name: &str, format, shape| OwnedMatrix::random(&mut streams.of(name), format, shape);
        let vector = |name: &str, wanted: bool, len| wanted.then(|| normals(streams.of(name), len));
        let scales = |name: &str, len| near_one(streams.of(name), len);
        let tid2eid = vocab_size(&spec.routing.method).map(|rows| {
            let mut rng = streams.of("tid2eid");
            (0..rows * spec.top_k).map(|_| rng.i32(0..selectable as i32)).collect()
        });
        let (mut router, mut router_mlp, mut router_bias, mut input_scale) = (None, None, None, None);
        match spec.router {
            Router::Linear { input, format, bias, transform: _ } => {
                router = Some(matrix("router", format, [outputs, hidden_size])?);
                router_bias = vector("router.bias", bias, outputs);
                match input {
                    RouterInput::Hidden => {}
                    RouterInput::RmsNormScaled { eps: _ } => {
                        // The router divides by sqrt(H): keep its logits as far apart as without.
                        let root = (hidden_size as f32).sqrt();
                        let scales = scales("router.input_scale", hidden_size);
                        input_scale = Some(scales.iter().map(|scale| scale * root).collect());
                    }
                }
            }
            Router::Mlp { state_size, rms_norm_eps: _, previous_state, format } => {
                let bias = |name: &str| normals(streams.of(name), state_size);
                router_mlp = Some(OwnedRouterMlp {
                    matrices: [
                        matrix("router.down", format, [state_size, hidden_size])?,
                        matrix("router.fc1", format, [state_size, state_size])?,
                        matrix("router.fc2", format, [state_size, state_size])?,
                        matrix("router.out", format, [outputs, state_size])?,
                    ],
                    biases: [bias("router.down_bias"), bias("router.fc1_bias"), bias("router.fc2_bias")],
                    states_scale: previous_state.then(|| scales("router.states_scale", state_size)),
                    norm: scales("router.norm", state_size),
                });
            }
            Router::Given { transform: _ } => {}
        }
        let width = spec.expert_width();
        let (mut latent, mut latent_norm) = (None, LatentNormWeights::None);
        if let Some(Latent { size, format, norm }) = &spec.latent {
            let down = matrix("latent.down", *format, [*size, hidden_size])?;
            latent = Some([down, matrix("latent.up", *format, [hidden_size, *size])?]);
            latent_norm = match norm {
                LatentNorm::None => LatentNormWeights::None,
                LatentNorm::Reduced { eps: _ } => LatentNormWeights::Reduced(scales("latent.norm", width)),
                LatentNorm::PreAndPost { pre_eps: _, post_eps: _ } => LatentNormWeights::PreAndPost {
                    pre: scales("latent.pre_norm", width),
                    post: scales("latent.post_norm", width),
                },
            };
        }
        let global_scale = match spec.routing.method {
            RoutingMethod::JointNorm { num_shared: _, global_scale } => global_scale.then_some(1.7),
            RoutingMethod::TopK { score: _, key: _, groups: _ }
            | RoutingMethod::TopKThenScore { score: _ }
            | RoutingMethod::Hash { score: _, vocab_size: _ }
            | RoutingMethod::Sparsemixer { router_jitter_noise: _ } => None,
        };
        let mlps = |name: &str, mlp: &ExpertMlp, width, count| -> Result<Vec<OwnedMlp>> {
            (0..count).map(|at: usize| OwnedMlp::random(streams, &format!("{name}[{at}]"), mlp, width)).collect()
        };
        let (mut shared, mut shared_gate) = (vec![], None);
        if let Some(SharedExperts { mlp, gate, combination: _ }) = &spec.shared {
            shared = mlps("shared", mlp, hidden_size, spec.shared_mlps())?;
            shared_gate = match gate {
                SharedGate::Sigmoid { format } => Some(matrix("shared.gate", *format, [1, hidden_size])?),
                SharedGate::None | SharedGate::Joint => None,
            };
        }
        let mut lora = vec![];
        if let Some(adapters) = &spec.lora {
            let (gated, shape) = (spec.experts.activation.gated(), [width, spec.experts.intermediate_size]);
            for adapter in 0..adapters.num_adapters {
                let one = |expert: usize| {
                    OwnedLora::random(streams, &format!("lora[{adapter}][{expert}]"), adapters, gated, shape)
                };
                lora.push((0..spec.num_experts).map(one).collect::<Result<_>>()?);
            }
        }
        Ok(Self {
            router,
            router_mlp,
            router_bias,
            selection_bias: vector("selection_bias", spec.has_selection_bias(), selectable),
            tid2eid,
            input_scale,
            per_expert_scale: spec.routing.per_expert_scale.then(|| scales("per_expert_scale", spec.num_experts)),
            global_scale,
            experts: mlps("experts", &spec.experts, width, spec.num_experts)?,
            lora,
            shared,
            shared_gate,
            latent,
            latent_norm,
            output_bias: vector("output_bias", spec.output_bias, hidden_size),
            output_norm: spec.output_norm.map(|_| scales("output_norm", hidden_size)),
            spec,
        })
    }

    /// Sets all gate and up biases, of the routed or of the shared experts.
    pub fn set_gate_up_bias(&mut self, routed: bool, gate: f32, up: f32) {
        for mlp in if routed { &mut self.experts } else { &mut self.shared } {
            for (bias, value) in [(&mut mlp.gate_bias, gate), (&mut mlp.up_bias, up)] {
                bias.iter_mut().flatten().for_each(|bias| *bias = value);
            }
        }
    }

    /// Writes NaN into one weight of an expert's up matrix; `false` if there is none of F32.
    #[must_use]
    pub fn spoil(&mut self, expert: usize) -> bool {
        self.experts.get_mut(expert).is_some_and(|mlp| mlp.up.spoil())
    }

    /// Makes the selection bias as small as the differences of scores, so that both decide.
    pub fn soften_bias(&mut self) {
        for bias in self.selection_bias.iter_mut().flatten() {
            *bias *= 0.1;
        }
    }

    /// What its device has of its weights.
    ///
    /// # Errors
    /// Tensors that are not what the spec implies.
    pub fn weights(&self) -> Result<MoeWeights<'_>> {
        self.read(&|_| &self.spec, &self.spec)
    }

    /// The weights of the whole layer, as a checkpoint has them.
    ///
    /// # Errors
    /// As [`RandomLayer::weights`].
    pub fn whole(&self) -> Result<MoeWeights<'_>> {
        self.read_whole(&|_| &self.spec)
    }

    /// The weights that a reader finds who takes each of [`READ`] to be stored as another spec says, which may
    /// differ in the layouts and orientations of its experts only, and who has what `device` says of them.
    ///
    /// # Errors
    /// Tensors that are not what these imply.
    pub(super) fn read<'a>(
        &'a self,
        as_in: &dyn Fn(&'static str) -> &'a MoeSpec,
        device: &MoeSpec,
    ) -> Result<MoeWeights<'a>> {
        let whole = self.read_whole(as_in)?;
        let partial = device.placement.is_partial() || device.shard.is_partial() || device.entry.is_batched();
        if partial { whole.part(device) } else { Ok(whole) }
    }

    fn read_whole<'a>(&'a self, as_in: &dyn Fn(&'static str) -> &'a MoeSpec) -> Result<MoeWeights<'a>> {
        let [experts, shared] =
            [&READ[..3], &READ[3..]].map(|names| [as_in(names[0]), as_in(names[1]), as_in(names[2])]);
        let width = self.spec.expert_width();
        let experts = self.experts.iter().map(|mlp| mlp.view(experts.map(|spec| &spec.experts), width));
        let shared = self.shared.iter().map(|mlp| {
            let none = || Error::invalid("shared", "None", "a spec with shared experts", "read them as one that has");
            let [gate, up, down] = shared.map(|spec| spec.shared.as_ref().map(|shared| &shared.mlp).ok_or_else(none));
            mlp.view([gate?, up?, down?], self.spec.hidden_size)
        });
        let adapter = |experts: &'a Vec<OwnedLora>| experts.iter().map(OwnedLora::view).collect();
        let latent = match &self.latent {
            None => None,
            Some([down, up]) => {
                Some(LatentWeights { down: down.view()?, up: up.view()?, norm: self.latent_norm.clone() })
            }
        };
        Ok(MoeWeights {
            router: RouterWeights {
                weight: view(self.router.as_ref())?,
                bias: self.router_bias.clone(),
                selection_bias: self.selection_bias.clone(),
                tid2eid: self.tid2eid.clone(),
                input_scale: self.input_scale.clone(),
                per_expert_scale: self.per_expert_scale.clone(),
                global_scale: self.global_scale,
                mlp: self.router_mlp.as_ref().map(OwnedRouterMlp::view).transpose()?,
            },
            experts: experts.collect::<Result<_>>()?,
            lora: self.lora.iter().map(adapter).collect::<Result<_>>()?,
            shared: shared.collect::<Result<_>>()?,
            shared_gate: view(self.shared_gate.as_ref())?,
            latent,
            output_bias: self.output_bias.clone(),
            output_norm: self.output_norm.clone(),
        })
    }

    /// Rows of a call: `wanted`, or all of a batched entry.
    pub fn tokens(&self, wanted: usize) -> usize {
        match self.spec.entry {
            Entry::TokenMajor => wanted,
            Entry::Batched { capacity } => self.spec.num_slots() * capacity,
        }
    }

    /// All that the layer reads. Logits that are given have ties, NaN and infinities; rows of a batched entry that
    /// do not exist are NaN.
    pub fn inputs(&self, tokens: usize, seed: u64) -> LayerInputs {
        let tokens = self.tokens(tokens);
        let streams = Streams(seed);
        let rows = |name: &str| -> Vec<f32> {
            let values = normals(streams.of(name), tokens * self.spec.hidden_size);
            values.into_iter().map(|value| round_to(self.spec.precision.input, 2.0 * value)).collect()
        };
        let (mut logits, mut router_states) = (None, None);
        match self.spec.router {
            Router::Given { transform: _ } => {
                let (mut rng, outputs) = (streams.of("logits"), self.spec.router_outputs());
                logits = Some((0..tokens).flat_map(|_| odd_logits(&mut rng, outputs)).collect());
            }
            Router::Mlp { state_size, rms_norm_eps: _, previous_state, format: _ } => {
                router_states = previous_state.then(|| normals(streams.of("router_states"), tokens * state_size));
            }
            Router::Linear { input: _, format: _, bias: _, transform: _ } => {}
        }
        let counts: Option<Vec<u32>> = match self.spec.entry {
            Entry::TokenMajor => None,
            Entry::Batched { capacity } => {
                let mut rng = streams.of("counts");
                Some((0..self.spec.num_slots()).map(|_| rng.u32(0..=capacity as u32)).collect())
            }
        };
        let weights_rows = match self.spec.routing.weight_position {
            WeightPosition::Output => false,
            WeightPosition::Input | WeightPosition::BeforeDown => counts.is_some(),
        };
        let mut hidden_states = rows("hidden_states");
        if let (Some(counts), Entry::Batched { capacity }) = (&counts, self.spec.entry) {
            for (row, values) in hidden_states.chunks_exact_mut(self.spec.hidden_size).enumerate() {
                if row % capacity >= counts[row / capacity] as usize {
                    values.fill(f32::NAN);
                }
            }
        }
        LayerInputs {
            hidden_states,
            token_ids: vocab_size(&self.spec.routing.method).map(|vocab_size| {
                let mut rng = streams.of("token_ids");
                (0..tokens).map(|_| rng.u32(0..vocab_size as u32)).collect()
            }),
            expert_hidden_states: match self.spec.expert_input {
                ExpertInput::Hidden => None,
                ExpertInput::Separate => Some(rows("expert_hidden_states")),
            },
            logits,
            router_states,
            adapter_ids: self.spec.lora.as_ref().map(|lora| {
                let (mut rng, adapters) = (streams.of("adapter_ids"), lora.num_adapters as i32);
                (0..tokens).map(|_| rng.i32(-1..adapters)).collect()
            }),
            counts,
            row_weights: weights_rows.then(|| {
                let mut rng = streams.of("row_weights");
                (0..tokens).map(|_| 0.1 + rng.f32()).collect()
            }),
        }
    }

    /// What is right.
    ///
    /// # Errors
    /// Inputs that are not the layer's.
    pub fn judge(&self, inputs: Inputs<'_>) -> Result<reference::Layer> {
        reference::layer(&self.spec, &self.weights()?, inputs)
    }
}

/// A row of logits. Most are plain; some have ties only; some have what is no number.
fn odd_logits(rng: &mut Rng, outputs: usize) -> Vec<f32> {
    let odd = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 0.0, -0.0, 1.5, 1.5];
    let kind = rng.usize(0..6);
    let mut logit = || match kind {
        0 => odd[rng.usize(0..odd.len())],
        1 => odd[rng.usize(3..odd.len())],
        _ => 2.0 * normal(rng),
    };
    (0..outputs).map(|_| logit()).collect()
}

/// A small layer in the manner of DeepSeek-V3, every parameter away from its neutral value.
pub fn deepseek_like() -> MoeSpec {
    let mlp = |intermediate_size: usize, limit: f32| ExpertMlp {
        intermediate_size,
        activation: Activation::Swiglu { limit: Some(limit) },
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
        experts: mlp(24, 0.75),
        shared: Some(SharedExperts { mlp: mlp(20, 0.5), gate: SharedGate::None, combination: SharedCombination::Sum }),
        latent: None,
        lora: None,
        expert_input: ExpertInput::Hidden,
        output_bias: false,
        output_norm: None,
        placement: Placement::All,
        shard: TensorShard::Whole,
        common_terms: CommonTerms::Here,
        entry: Entry::TokenMajor,
        precision: Precision::float32(FloatType::Bf16, FloatType::F32),
    }
}
