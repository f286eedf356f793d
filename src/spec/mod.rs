//! What a Mixture-of-Experts layer computes: pure data in the field's own terms.
//!
//! No type here has a default and "off" is `None`: whoever writes a [`MoeSpec`] names every field,
//! and every consumer destructures it with every field named, so a new field does not compile
//! until each consumer says what it does with it.
//!
//! A long file on purpose: the vocabulary in one place, but for the formats of weights and activations
//! (`format.rs`), adapters (`lora.rs`) and what a device holds of a layer (`distribution.rs`). `validate.rs` has the
//! rules.
//!
//! Notation of the docs: T tokens, E experts, k = `top_k`, H = `hidden_size`, I = `intermediate_size`,
//! x one row of hidden states, l logits, s scores, w routing weights.

mod distribution;
mod format;
mod lora;
mod validate;

pub(crate) use distribution::replica;
pub use distribution::{CommonTerms, Entry, Placement, Slot, TensorShard};
pub use format::{ActivationCode, ActivationQuant, ActivationScale, ScaleFormat, ScaleRule, ScaleSpan, WeightFormat};
pub use lora::{Lora, LoraDelta};

/// One Mixture-of-Experts layer.
#[derive(Debug, Clone, PartialEq)]
pub struct MoeSpec {
    /// H: width of the rows that enter and leave the layer.
    pub hidden_size: usize,
    /// E: routed experts that have weights. Zero experts are counted in [`Routing::zero_experts`].
    pub num_experts: usize,
    /// k: experts chosen per token.
    pub top_k: usize,
    /// Where the logits come from.
    pub router: Router,
    /// How ids and weights come from the logits.
    pub routing: Routing,
    /// The routed experts.
    pub experts: ExpertMlp,
    /// An MLP that every token passes, added to the routed sum.
    pub shared: Option<SharedExperts>,
    /// Projections around the routed experts, which then work at a smaller width.
    pub latent: Option<Latent>,
    /// Low-rank adapters on the routed experts.
    pub lora: Option<Lora>,
    /// What the experts read.
    pub expert_input: ExpertInput,
    /// A bias `[H]` on the routed sum (JetMoE).
    pub output_bias: bool,
    /// A norm on the layer's output, shared experts included (A.X-K1).
    pub output_norm: Option<OutputNorm>,
    /// Which experts this device holds.
    pub placement: Placement,
    /// Which part of the intermediate size this device holds.
    pub shard: TensorShard,
    /// Whether this device adds what a sum over devices has once.
    pub common_terms: CommonTerms,
    /// How rows enter the experts.
    pub entry: Entry,
    /// Types at the boundary and the roundings inside.
    pub precision: Precision,
}

/// Where the router's logits [T, E + zero experts] come from.
#[derive(Debug, Clone, PartialEq)]
pub enum Router {
    /// `l = W x (+ bias)`, W [outputs, H].
    Linear {
        /// What is done to x first.
        input: RouterInput,
        /// Type of W in the checkpoint.
        format: WeightFormat,
        /// A bias `[outputs]` inside the logits (gpt-oss). Not the selection bias.
        bias: bool,
        /// What is done to the logits before the score.
        transform: LogitTransform,
    },
    /// Zaya: `h = W_d x + b_d (+ state of the previous MoE layer * router_states_scale)`, then
    /// `l = W_o gelu(W_2 gelu(W_1 rms_norm(h) + b_1) + b_2)` with the erf GELU. h is the state that leaves.
    Mlp {
        /// S: width of the router's state.
        state_size: usize,
        /// Epsilon of its RMS norm.
        rms_norm_eps: f32,
        /// Whether a state [T, S] enters; it does in all MoE layers but the first.
        previous_state: bool,
        /// Type of its matrices.
        format: WeightFormat,
    },
    /// The caller gives f32 logits.
    Given {
        /// What is done to the logits before the score.
        transform: LogitTransform,
    },
}

/// What the router does to its input row.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum RouterInput {
    /// Nothing.
    Hidden,
    /// Gemma-4: `rms_norm(x) * scale * H^-0.5`, a norm without weight, then a learned scale `[H]`.
    RmsNormScaled {
        /// Epsilon of the norm.
        eps: f32,
    },
}

/// What is done to a logit before its score.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum LogitTransform {
    /// Nothing.
    None,
    /// `cap * tanh(l / cap)` (Laguna).
    SoftCap {
        /// The cap.
        cap: f32,
    },
    /// `l * factor` (Muse-Spark).
    Multiply {
        /// The factor.
        factor: f32,
    },
}

/// How ids and weights come from logits.
#[derive(Debug, Clone, PartialEq)]
pub struct Routing {
    /// Score and selection.
    pub method: RoutingMethod,
    /// `w /= D(sum w)` over the k chosen, in slot order. `None`: not renormalised.
    pub renormalize: Option<Denominator>,
    /// rho: multiplies the routed part once. Never touches the shared expert, but for the shares of
    /// [`RoutingMethod::JointNorm`], which hold it.
    pub routed_scaling_factor: f32,
    /// `false`: rho is in the weights. `true`: rho multiplies the routed sum and the weights lack it.
    pub apply_routed_scale_to_output: bool,
    /// `w *= per_expert_scale[id]` after renormalisation (Gemma-4).
    pub per_expert_scale: bool,
    /// Where w acts.
    pub weight_position: WeightPosition,
    /// Router outputs beyond E that have no weights.
    pub zero_experts: Option<ZeroExperts>,
    /// What a score that is NaN or infinite does.
    pub nan_policy: NanPolicy,
}

/// Score and selection of k experts. Ties go to the lowest id; a chosen expert is removed by id.
#[derive(Debug, Clone, PartialEq)]
pub enum RoutingMethod {
    /// Score all, select the k largest keys, gather w = `s[id]` (never key - bias).
    TopK {
        /// s from l.
        score: Score,
        /// What is compared.
        key: SelectionKey,
        /// Restrict the selection to the best groups.
        groups: Option<Groups>,
    },
    /// Select the k largest logits, then score only those (gpt-oss, Granite, JetMoE, Cohere2).
    TopKThenScore {
        /// Score of the chosen logits.
        score: ChosenScore,
    },
    /// `ids = tid2eid[token_id]` (DeepSeek-V4's first layers); w = `s[id]`. Rows may repeat an id.
    Hash {
        /// s from l.
        score: Score,
        /// Rows of `tid2eid`.
        vocab_size: usize,
    },
    /// Inkling: sigmoid + bias selects; `w = sigmoid(l) / D`, D the sum of the sigmoids of the k chosen and of
    /// the shared logits. The shared experts' w are their shares ([`SharedGate::Joint`]).
    JointNorm {
        /// n: shared experts, whose logits stand last.
        num_shared: usize,
        /// A learned factor on all weights, shares included.
        global_scale: bool,
    },
    /// Phi-MoE: twice the largest logit m (the second time without the first), each weighed by a softmax
    /// over the logits that [`RoutingMethod::Sparsemixer::router_jitter_noise`] leaves.
    Sparsemixer {
        /// An expert e is left out of the softmax if `(l_m - l_e) / max(|l_e|, l_m)` exceeds twice this.
        router_jitter_noise: f32,
    },
}

/// s from l over all router outputs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Score {
    /// `exp(l - max l) / sum exp(l - max l)`.
    Softmax,
    /// `1 / (1 + exp(-l))`.
    Sigmoid,
    /// `sqrt(log(1 + exp l))`, with `softplus(l) = l` above 20 (DeepSeek-V4).
    SqrtSoftplus,
    /// `l`.
    Identity,
}

/// Score of the k chosen logits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChosenScore {
    /// Softmax over the k chosen.
    Softmax,
    /// Sigmoid of each.
    Sigmoid,
}

/// What selection compares. The bias `[outputs]` is f32 from checkpoint to addition.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SelectionKey {
    /// s.
    Score,
    /// s + `e_score_correction_bias` (DeepSeek-V3 and its kin).
    ScorePlusBias,
    /// l + bias (Kolibri1).
    LogitPlusBias,
}

/// Contiguous groups of E / `n_group` experts; only the best `topk_group` may be selected from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Groups {
    /// Number of groups. Divides E.
    pub n_group: usize,
    /// Groups kept.
    pub topk_group: usize,
    /// How a group is judged.
    pub score: GroupScore,
}

/// How a group is judged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GroupScore {
    /// Sum of its two largest keys, bias included (DeepSeek-V3).
    Top2SumOfKey,
    /// Its largest s (DeepSeek-V2).
    MaxOfScore,
    /// Sum of its two largest s, without bias (Mistral-4).
    Top2SumOfScore,
}

/// D of `w /= D(sum w)`. A sum of 0 gives weights 0, never 0/0.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Denominator {
    /// `sum`.
    Sum,
    /// `sum + eps`, in f32 (1e-20 for the sigmoid family).
    SumPlus {
        /// eps.
        eps: f32,
    },
    /// `max(sum, floor)`.
    AtLeast {
        /// floor.
        floor: f32,
    },
    /// `sum > 0 ? sum : 1`.
    SumOrOne,
    /// `(sum |w|^p)^(1/p)` (DBRX).
    PNorm {
        /// p.
        p: f32,
    },
}

/// Where a routing weight acts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WeightPosition {
    /// On the expert's output, in the weighted sum.
    Output,
    /// On x before the first GEMM and before its quantisation (Llama-4); the sum is then unweighted, but for
    /// zero experts, which have no GEMM.
    Input,
    /// On the activation before the second GEMM and its quantisation (DeepSeek-V4's own code).
    BeforeDown,
}

/// Router outputs E.. that have no weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ZeroExperts {
    /// How many.
    pub count: usize,
    /// What they return.
    pub kind: ZeroExpertKind,
}

/// What a zero expert returns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ZeroExpertKind {
    /// x (LongCat).
    Identity,
    /// Nothing (Zaya).
    Skip,
}

/// What a non-finite score does. In both, ids are k distinct experts in range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NanPolicy {
    /// It has the lowest key and w = 0.
    Zero,
    /// It has the lowest key and w = NaN.
    Propagate,
}

/// One gated (or plain) MLP, or E of one shape.
#[derive(Debug, Clone, PartialEq)]
pub struct ExpertMlp {
    /// I: inner width.
    pub intermediate_size: usize,
    /// Between the two GEMMs.
    pub activation: Activation,
    /// How the checkpoint stores gate and up.
    pub gate_up_layout: GateUpLayout,
    /// How the checkpoint stores a matrix.
    pub orientation: Orientation,
    /// A bias on the gate and up rows.
    pub gate_up_bias: bool,
    /// A bias on the down rows, inside the weighted sum.
    pub down_bias: bool,
    /// Type of the matrices.
    pub format: WeightFormat,
    /// What is done to the rows that enter each GEMM.
    pub activation_quant: ActivationQuant,
}

/// How an expert combines its gate and up projections, in f32, keeping NaN.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Activation {
    /// `silu(gate) * up`. With `limit`, gate is first bounded above and `up` on both sides
    /// (DeepSeek-V4). A clamp *after* silu is [`Activation::SwigluClampAfter`].
    Swiglu {
        /// L, finite and positive.
        limit: Option<f32>,
    },
    /// `min(silu(gate), L) * clamp(up, -L, L)` (Step-3.5).
    SwigluClampAfter {
        /// L, finite and positive.
        limit: f32,
    },
    /// `g sigma(alpha g) (u + beta)`, g and u clamped as in [`Activation::Swiglu`] (gpt-oss).
    SwigluOai {
        /// 1.702 in gpt-oss.
        alpha: f32,
        /// L, finite and positive.
        limit: Option<f32>,
        /// 1 in gpt-oss.
        beta: f32,
    },
    /// `beta tanh(gate / beta) sigma(gate) * linear_beta tanh(up / linear_beta)` (Kimi K3).
    Situ {
        /// Bound of the gate.
        beta: f32,
        /// Bound of up.
        linear_beta: f32,
    },
    /// `0.5 g (1 + tanh(sqrt(2/pi) (g + 0.044715 g^3))) * up`.
    GeluTanh,
    /// `0.5 g (1 + erf(g / sqrt 2)) * up`.
    GeluErf,
    /// `max(v, 0)^2`, without gate: the first GEMM has I rows (Nemotron-H).
    Relu2,
}

impl Activation {
    /// Whether the first GEMM yields gate and up (2 I rows) or one value (I rows).
    pub fn gated(&self) -> bool {
        match self {
            Self::Swiglu { limit: _ }
            | Self::SwigluClampAfter { limit: _ }
            | Self::SwigluOai { alpha: _, limit: _, beta: _ }
            | Self::Situ { beta: _, linear_beta: _ }
            | Self::GeluTanh
            | Self::GeluErf => true,
            Self::Relu2 => false,
        }
    }
}

/// How the checkpoint stores the gate and up rows of an expert.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GateUpLayout {
    /// Two tensors. Also the value for activations without gate.
    Separate,
    /// One tensor, I gate rows, then I up rows.
    Halves,
    /// One tensor, gate rows even, up rows odd (gpt-oss).
    Interleaved,
}

/// How the checkpoint stores a matrix that maps `in` to `out`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Orientation {
    /// [out, in], as `torch.nn.Linear`.
    OutIn,
    /// [in, out] (gpt-oss in bf16, Llama-4, Qwen3-VL).
    InOut,
}

/// An MLP that every token passes. n shared experts of width I are one MLP of width n * I, except under
/// [`SharedGate::Joint`]. Reads what the routed experts read, unweighted.
#[derive(Debug, Clone, PartialEq)]
pub struct SharedExperts {
    /// Its matrices and activation, clamp included: a field of its own, not the routed one.
    pub mlp: ExpertMlp,
    /// What multiplies its output.
    pub gate: SharedGate,
    /// How it joins the routed sum.
    pub combination: SharedCombination,
}

/// What multiplies a shared expert's output.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SharedGate {
    /// Nothing.
    None,
    /// `sigmoid(x . shared_expert_gate)` (Qwen2-MoE).
    Sigmoid {
        /// Type of the gate's row [1, H].
        format: WeightFormat,
    },
    /// Its share from [`RoutingMethod::JointNorm`], which has n shared experts: n MLPs of this shape.
    Joint,
}

/// How the shared expert joins the routed sum.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SharedCombination {
    /// routed + shared.
    Sum,
    /// (routed + shared) / 2 (Cohere2).
    Average,
}

/// Projections around the routed experts. Router and shared expert stay at H. rho acts before the up-projection.
#[derive(Debug, Clone, PartialEq)]
pub struct Latent {
    /// Width at which the routed experts work.
    pub size: usize,
    /// Type of the projections.
    pub format: WeightFormat,
    /// Norms inside.
    pub norm: LatentNorm,
}

/// Norms of a latent layer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum LatentNorm {
    /// None (Nemotron).
    None,
    /// `rms_norm(sum) * weight` on the reduced sum before the up-projection (Kimi K3).
    Reduced {
        /// Epsilon.
        eps: f32,
    },
    /// `rms_norm(z) * pre` before the experts, `rms_norm(f * post)` after each expert and before its routing
    /// weight (Muse-Spark): the first weight acts behind its norm, the second before it.
    PreAndPost {
        /// Epsilon of the first.
        pre_eps: f32,
        /// Epsilon of the second.
        post_eps: f32,
    },
}

/// `rms_norm(output) * weight`, weight `[H]`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct OutputNorm {
    /// Epsilon.
    pub eps: f32,
}

/// What the experts read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExpertInput {
    /// The rows that the router read.
    Hidden,
    /// A second input of the same shape, for routed, shared and zero experts (Gemma-4).
    Separate,
}

/// A float type at the layer's boundary or of a rounding step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FloatType {
    /// IEEE binary32.
    F32,
    /// IEEE binary16.
    F16,
    /// bfloat16.
    Bf16,
}

impl FloatType {
    /// Bytes of one value.
    pub fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }
}

/// Types at the boundary and the roundings inside. All arithmetic is f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Precision {
    /// Type of `hidden_states` [T, H]; widened exactly.
    pub input: FloatType,
    /// Type of the output [T, H]; one rounding at the end, overflow to infinity.
    pub output: FloatType,
    /// T: the type that [`Rounding::Model`] steps round to.
    pub model: FloatType,
    /// Logits.
    pub router_gemm: Rounding,
    /// Routing weights, at the end of the routing.
    pub routing_weights: Rounding,
    /// `x * w` of [`WeightPosition::Input`].
    pub weighted_input: Rounding,
    /// Gate and up before the activation, with their bias.
    pub gate_up: Rounding,
    /// The activation's steps.
    pub activation: ActivationRounding,
    /// Expert outputs and their sum.
    pub combine: CombineRounding,
    /// Order of the weighted sum.
    pub combine_order: CombineOrder,
    /// How block scales meet the products.
    pub block_scale: BlockScale,
}

/// Whether a value stays f32 or is rounded to the model's type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rounding {
    /// Stays f32.
    F32,
    /// Rounded to nearest even.
    Model,
}

/// Roundings inside the activation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ActivationRounding {
    /// None: what the second GEMM reads stays f32.
    F32,
    /// P-fused: one rounding of what the second GEMM reads.
    Fused,
    /// P-torch: also the gate's factor (`silu(gate)`) and up's before their product, and the product.
    Torch,
}

/// Roundings of the weighted sum.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CombineRounding {
    /// C1: unweighted f32 rows, f32 sum, one cast. With [`WeightPosition::BeforeDown`] this is C4.
    F32,
    /// C2: weighted rows rounded, f32 sum.
    WeightedRows,
    /// C3: rows, products and partial sums rounded, and so is each step with rho, bias and shared expert.
    EveryStep,
}

/// Order of the weighted sum.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CombineOrder {
    /// Slots 0..k, as selected.
    Slot,
    /// Ascending expert id, repeated ids by slot.
    Expert,
}

/// How block scales meet the products of a quantised GEMM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BlockScale {
    /// Scales act in f32: on each weight, on a part of a block's sum, or on the whole of it.
    Exact,
    /// As `Exact`, but the sum of 128 columns' products of E4M3 codes, before it is scaled and added in f32, may be as
    /// narrow as FP8 matrix units keep it: 13 bits behind the largest product's first. A device without such units
    /// keeps f32.
    Promoted,
    /// Scales are folded into narrower operands.
    Folded,
}

impl Precision {
    /// f32 throughout with no rounding between steps: the profile of the golden vectors.
    pub const fn float32(input: FloatType, output: FloatType) -> Self {
        Self {
            input,
            output,
            model: FloatType::F32,
            router_gemm: Rounding::F32,
            routing_weights: Rounding::F32,
            weighted_input: Rounding::F32,
            gate_up: Rounding::F32,
            activation: ActivationRounding::F32,
            combine: CombineRounding::F32,
            combine_order: CombineOrder::Slot,
            block_scale: BlockScale::Exact,
        }
    }
}

/// Largest router width. Bounds the histogram and the selection of every backend.
pub const MAX_ROUTER_OUTPUTS: usize = 1024;
/// Largest width of a row. Keeps `rows * width` of one matrix below 2^40.
pub(crate) const MAX_WIDTH: usize = 1 << 20;

impl MoeSpec {
    /// E plus zero experts: what a token can be routed to.
    pub fn selectable(&self) -> usize {
        self.num_experts.saturating_add(self.routing.zero_experts.map_or(0, |zero| zero.count))
    }

    /// Width of the logits: the selectable outputs, and the shared experts' under joint normalisation.
    pub fn router_outputs(&self) -> usize {
        self.selectable().saturating_add(self.joint_shares())
    }

    /// n of [`RoutingMethod::JointNorm`], else 0.
    pub fn joint_shares(&self) -> usize {
        match &self.routing.method {
            RoutingMethod::JointNorm { num_shared, global_scale: _ } => *num_shared,
            RoutingMethod::TopK { score: _, key: _, groups: _ }
            | RoutingMethod::TopKThenScore { score: _ }
            | RoutingMethod::Hash { score: _, vocab_size: _ }
            | RoutingMethod::Sparsemixer { router_jitter_noise: _ } => 0,
        }
    }

    /// MLPs of [`MoeSpec::shared`]: none, one, or n under [`SharedGate::Joint`].
    pub fn shared_mlps(&self) -> usize {
        match &self.shared {
            None => 0,
            Some(SharedExperts { mlp: _, gate: SharedGate::None, combination: _ })
            | Some(SharedExperts { mlp: _, gate: SharedGate::Sigmoid { format: _ }, combination: _ }) => 1,
            Some(SharedExperts { mlp: _, gate: SharedGate::Joint, combination: _ }) => self.joint_shares(),
        }
    }

    /// Width at which the routed experts work: H, or the latent size.
    pub fn expert_width(&self) -> usize {
        match &self.latent {
            None => self.hidden_size,
            Some(Latent { size, format: _, norm: _ }) => *size,
        }
    }

    /// Whether the selection adds `e_score_correction_bias`, one for each selectable output.
    pub fn has_selection_bias(&self) -> bool {
        match &self.routing.method {
            RoutingMethod::TopK { score: _, key, groups: _ } => match key {
                SelectionKey::Score => false,
                SelectionKey::ScorePlusBias | SelectionKey::LogitPlusBias => true,
            },
            RoutingMethod::JointNorm { num_shared: _, global_scale: _ } => true,
            RoutingMethod::TopKThenScore { score: _ }
            | RoutingMethod::Hash { score: _, vocab_size: _ }
            | RoutingMethod::Sparsemixer { router_jitter_noise: _ } => false,
        }
    }
}

impl Precision {
    /// The type that a step rounds to: f32 where it does not.
    pub fn rounded(&self, rounding: Rounding) -> FloatType {
        match rounding {
            Rounding::F32 => FloatType::F32,
            Rounding::Model => self.model,
        }
    }
}
