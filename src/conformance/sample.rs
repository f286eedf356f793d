//! Layers with random weights, each with all that its spec asks for, and random tokens for them.

use fastrand::Rng;

pub use super::matrix::{OwnedMatrix, OwnedTensor, fits};

use super::matrix::normal;
use crate::error::Result;
use crate::numerics::round_to;
use crate::reference::{self, Inputs};
use crate::spec::{
    Activation, ActivationQuant, Denominator, Entry, ExpertInput, ExpertMlp, FloatType, GateUpLayout, GroupScore,
    Groups, Latent, LatentNorm, LogitTransform, MoeSpec, NanPolicy, Orientation, Placement, Precision, Router,
    RouterInput, Routing, RoutingMethod, Score, SelectionKey, SharedCombination, SharedExperts, SharedGate,
    TensorShard, WeightFormat, WeightPosition,
};
use crate::weights::{
    InputScales, LatentNormWeights, LatentWeights, Matrix, MlpWeights, MoeWeights, RouterMlpWeights, RouterWeights,
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

fn vector(rng: &mut Rng, wanted: bool, len: usize) -> Option<Vec<f32>> {
    wanted.then(|| normals(rng, len))
}

fn normals(rng: &mut Rng, len: usize) -> Vec<f32> {
    (0..len).map(|_| normal(rng)).collect()
}

fn near_one(rng: &mut Rng, len: usize) -> Vec<f32> {
    (0..len).map(|_| 1.0 + 0.3 * normal(rng)).collect()
}

fn view(matrix: Option<&OwnedMatrix>) -> Result<Option<Matrix<'_>>> {
    matrix.map(OwnedMatrix::view).transpose()
}

fn views(mlps: &[OwnedMlp]) -> Result<Vec<MlpWeights<'_>>> {
    mlps.iter().map(OwnedMlp::view).collect()
}

impl OwnedMlp {
    fn random(rng: &mut Rng, mlp: &ExpertMlp, hidden_size: usize) -> Result<Self> {
        let ExpertMlp {
            intermediate_size,
            activation,
            gate_up_layout: _,
            orientation: _,
            gate_up_bias,
            down_bias,
            format,
            activation_quant,
        } = *mlp;
        let (inner, gated) = (intermediate_size, activation.gated());
        let mut matrix = |shape| OwnedMatrix::random(rng, format, shape);
        let gate = gated.then(|| matrix([inner, hidden_size])).transpose()?;
        let (up, down) = (matrix([inner, hidden_size])?, matrix([hidden_size, inner])?);
        Ok(Self {
            gate,
            up,
            down,
            gate_bias: vector(rng, gate_up_bias && gated, inner),
            up_bias: vector(rng, gate_up_bias, inner),
            down_bias: vector(rng, down_bias, hidden_size),
            input_scales: match activation_quant {
                // Small ones saturate some codes.
                ActivationQuant::Static { code: _ } => {
                    Some(InputScales { gate_up: 0.005 + 0.01 * rng.f32(), down: 0.005 + 0.01 * rng.f32() })
                }
                ActivationQuant::None | ActivationQuant::Dynamic { code: _, span: _, rule: _, scale: _ } => None,
            },
        })
    }

    fn view(&self) -> Result<MlpWeights<'_>> {
        let Self { gate, up, down, gate_bias, up_bias, down_bias, input_scales } = self;
        Ok(MlpWeights {
            gate: view(gate.as_ref())?,
            up: up.view()?,
            down: down.view()?,
            gate_bias: gate_bias.clone(),
            up_bias: up_bias.clone(),
            down_bias: down_bias.clone(),
            input_scales: *input_scales,
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

/// A layer with random weights.
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
}

impl LayerInputs {
    /// As a layer takes them.
    pub fn view(&self) -> Inputs<'_> {
        let Self { hidden_states, token_ids, expert_hidden_states, logits, router_states } = self;
        Inputs {
            hidden_states,
            token_ids: token_ids.as_deref(),
            logits: logits.as_deref(),
            expert_hidden_states: expert_hidden_states.as_deref(),
            router_states: router_states.as_deref(),
        }
    }
}

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
    /// Weights of this seed.
    ///
    /// # Errors
    /// A format that a row of the layer cannot have.
    pub fn new(spec: MoeSpec, seed: u64) -> Result<Self> {
        let rng = &mut Rng::with_seed(seed);
        let (hidden_size, outputs, selectable) = (spec.hidden_size, spec.router_outputs(), spec.selectable());
        let tid2eid = vocab_size(&spec.routing.method)
            .map(|rows| (0..rows * spec.top_k).map(|_| rng.i32(0..selectable as i32)).collect());
        let (mut router, mut router_mlp, mut router_bias, mut input_scale) = (None, None, None, None);
        match spec.router {
            Router::Linear { input, format, bias, transform: _ } => {
                router = Some(OwnedMatrix::random(rng, format, [outputs, hidden_size])?);
                router_bias = vector(rng, bias, outputs);
                match input {
                    RouterInput::Hidden => {}
                    RouterInput::RmsNormScaled { eps: _ } => {
                        // The router divides by sqrt(H): keep its logits as far apart as without.
                        let root = (hidden_size as f32).sqrt();
                        input_scale = Some(near_one(rng, hidden_size).iter().map(|scale| scale * root).collect());
                    }
                }
            }
            Router::Mlp { state_size, rms_norm_eps: _, previous_state, format } => {
                let mut matrix = |shape| OwnedMatrix::random(rng, format, shape);
                let matrices = [
                    matrix([state_size, hidden_size])?,
                    matrix([state_size, state_size])?,
                    matrix([state_size, state_size])?,
                    matrix([outputs, state_size])?,
                ];
                let biases = [0, 1, 2].map(|_| normals(rng, state_size));
                let states_scale = previous_state.then(|| near_one(rng, state_size));
                router_mlp = Some(OwnedRouterMlp { matrices, biases, states_scale, norm: near_one(rng, state_size) });
            }
            Router::Given { transform: _ } => {}
        }
        let width = spec.expert_width();
        let (mut latent, mut latent_norm) = (None, LatentNormWeights::None);
        if let Some(Latent { size, format, norm }) = &spec.latent {
            let mut matrix = |shape| OwnedMatrix::random(rng, *format, shape);
            latent = Some([matrix([*size, hidden_size])?, matrix([hidden_size, *size])?]);
            latent_norm = match norm {
                LatentNorm::None => LatentNormWeights::None,
                LatentNorm::Reduced { eps: _ } => LatentNormWeights::Reduced(near_one(rng, width)),
                LatentNorm::PreAndPost { pre_eps: _, post_eps: _ } => {
                    LatentNormWeights::PreAndPost { pre: near_one(rng, width), post: near_one(rng, width) }
                }
            };
        }
        let selection_bias = vector(rng, spec.has_selection_bias(), selectable);
        let per_expert_scale = spec.routing.per_expert_scale.then(|| near_one(rng, spec.num_experts));
        let global_scale = match spec.routing.method {
            RoutingMethod::JointNorm { num_shared: _, global_scale } => global_scale.then_some(1.7),
            RoutingMethod::TopK { score: _, key: _, groups: _ }
            | RoutingMethod::TopKThenScore { score: _ }
            | RoutingMethod::Hash { score: _, vocab_size: _ }
            | RoutingMethod::Sparsemixer { router_jitter_noise: _ } => None,
        };
        let mut mlps = |mlp: &ExpertMlp, width: usize, count: usize| -> Result<Vec<OwnedMlp>> {
            (0..count).map(|_| OwnedMlp::random(rng, mlp, width)).collect()
        };
        let experts = mlps(&spec.experts, width, spec.num_experts)?;
        let (mut shared, mut shared_gate) = (vec![], None);
        if let Some(SharedExperts { mlp, gate, combination: _ }) = &spec.shared {
            shared = mlps(mlp, hidden_size, spec.shared_mlps())?;
            shared_gate = match gate {
                SharedGate::Sigmoid { format } => Some(OwnedMatrix::random(rng, *format, [1, hidden_size])?),
                SharedGate::None | SharedGate::Joint => None,
            };
        }
        Ok(Self {
            router,
            router_mlp,
            router_bias,
            selection_bias,
            tid2eid,
            input_scale,
            per_expert_scale,
            global_scale,
            experts,
            shared,
            shared_gate,
            latent,
            latent_norm,
            output_bias: vector(rng, spec.output_bias, hidden_size),
            output_norm: spec.output_norm.map(|_| near_one(rng, hidden_size)),
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

    /// Its weights, as a checkpoint has them.
    ///
    /// # Errors
    /// Tensors that are not what the spec implies.
    pub fn weights(&self) -> Result<MoeWeights<'_>> {
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
            experts: views(&self.experts)?,
            shared: views(&self.shared)?,
            shared_gate: view(self.shared_gate.as_ref())?,
            latent,
            output_bias: self.output_bias.clone(),
            output_norm: self.output_norm.clone(),
        })
    }

    /// All that the layer reads. Logits that are given have ties, NaN and infinities.
    pub fn inputs(&self, tokens: usize, seed: u64) -> LayerInputs {
        let rng = &mut Rng::with_seed(seed);
        let input = self.spec.precision.input;
        let rows = |rng: &mut Rng| -> Vec<f32> {
            (0..tokens * self.spec.hidden_size).map(|_| round_to(input, 2.0 * normal(rng))).collect()
        };
        let hidden_states = rows(rng);
        let token_ids = vocab_size(&self.spec.routing.method)
            .map(|vocab_size| (0..tokens).map(|_| rng.u32(0..vocab_size as u32)).collect());
        let expert_hidden_states = match self.spec.expert_input {
            ExpertInput::Hidden => None,
            ExpertInput::Separate => Some(rows(rng)),
        };
        let (mut logits, mut router_states) = (None, None);
        match self.spec.router {
            Router::Given { transform: _ } => {
                let outputs = self.spec.router_outputs();
                logits = Some((0..tokens).flat_map(|_| odd_logits(rng, outputs)).collect());
            }
            Router::Mlp { state_size, rms_norm_eps: _, previous_state, format: _ } => {
                router_states = vector(rng, previous_state, tokens * state_size);
            }
            Router::Linear { input: _, format: _, bias: _, transform: _ } => {}
        }
        LayerInputs { hidden_states, token_ids, expert_hidden_states, logits, router_states }
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
        entry: Entry::TokenMajor,
        precision: Precision::float32(FloatType::Bf16, FloatType::F32),
    }
}
