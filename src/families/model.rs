//! What a family says about a model: its names as data, its config as blocks.

use super::config::Config;
use super::names::Names;
use crate::error::{Error, Result};
use crate::spec::{
    Activation, Denominator, ExpertInput, GroupScore, Groups, LatentNorm, LogitTransform, OutputNorm, RouterInput,
    RoutingMethod, Score, SelectionKey, SharedCombination, WeightPosition, ZeroExperts,
};

/// A family, as data.
pub(super) struct Family {
    pub(super) name: &'static str,
    /// Values of `model_type`, without the `_text` of multimodal models' text parts.
    pub(super) model_types: &'static [&'static str],
    /// Models of the family, for the table of what is supported.
    pub(super) examples: &'static [&'static str],
    /// Keys that do not concern the layer, beside those that concern no family's.
    pub(super) irrelevant: &'static [&'static str],
    /// How the layer's tensors are called.
    pub(super) names: Names,
    pub(super) read: fn(&Config<'_>) -> Result<Model>,
}

/// What `config.json` says about a model's Mixture-of-Experts layers.
pub(super) struct Model {
    /// One entry a layer.
    pub(super) layers: Vec<Layer>,
    /// The keys that decide which layers are dense, for messages.
    pub(super) dense_keys: &'static str,
}

#[derive(Debug, Clone)]
pub(super) enum Layer {
    Dense,
    Moe(Box<Block>),
}

impl Model {
    /// The same block in each layer that has experts.
    pub(super) fn new(Kinds { moe, keys }: Kinds, block: &Block) -> Self {
        let layer = |moe: &bool| if *moe { Layer::Moe(Box::new(block.clone())) } else { Layer::Dense };
        Self { layers: moe.iter().map(layer).collect(), dense_keys: keys }
    }

    /// A block of its own in each layer that has experts.
    pub(super) fn each(Kinds { moe, keys }: Kinds, block: impl Fn(usize) -> Result<Block>) -> Result<Self> {
        let layer = |(index, moe): (usize, &bool)| match moe {
            true => Ok(Layer::Moe(Box::new(block(index)?))),
            false => Ok(Layer::Dense),
        };
        Ok(Self { layers: moe.iter().enumerate().map(layer).collect::<Result<_>>()?, dense_keys: keys })
    }
}

/// Which layers have experts, and the keys that say so.
#[derive(Debug, Clone)]
pub(super) struct Kinds {
    pub(super) moe: Vec<bool>,
    pub(super) keys: &'static str,
}

/// A layer as `config.json` describes it: a spec without what only the tensors say.
#[derive(Debug, Clone)]
pub(super) struct Block {
    pub(super) hidden_size: usize,
    pub(super) num_experts: usize,
    pub(super) top_k: usize,
    pub(super) router: RouterKind,
    pub(super) method: RoutingMethod,
    pub(super) renormalize: Option<Denominator>,
    pub(super) routed_scaling_factor: f32,
    pub(super) apply_routed_scale_to_output: bool,
    pub(super) per_expert_scale: bool,
    pub(super) weight_position: WeightPosition,
    pub(super) zero_experts: Option<ZeroExperts>,
    /// I of a routed expert.
    pub(super) intermediate_size: usize,
    pub(super) activation: Activation,
    /// Biases of the routed experts.
    pub(super) biases: bool,
    pub(super) shared: Option<Shared>,
    /// Width of the routed experts and norms around them.
    pub(super) latent: Option<(usize, LatentNorm)>,
    pub(super) expert_input: ExpertInput,
    pub(super) output_bias: bool,
    pub(super) output_norm: Option<OutputNorm>,
}

/// Where the logits come from.
#[derive(Debug, Clone, Copy)]
pub(super) enum RouterKind {
    Linear { input: RouterInput, bias: bool, transform: LogitTransform },
    Mlp { state_size: usize, rms_norm_eps: f32, previous_state: bool },
}

/// The shared experts.
#[derive(Debug, Clone, Copy)]
pub(super) struct Shared {
    /// Of all of them together, or of each where the router weighs them.
    pub(super) width: usize,
    pub(super) activation: Activation,
    pub(super) biases: bool,
    pub(super) gate: Gate,
    pub(super) combination: SharedCombination,
}

/// What multiplies a shared expert.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Gate {
    None,
    Sigmoid,
    Joint,
}

/// The numbers that every layer has.
pub(super) struct Sizes {
    pub(super) hidden_size: usize,
    pub(super) num_experts: usize,
    pub(super) top_k: usize,
    pub(super) intermediate_size: usize,
}

impl Sizes {
    /// E, k and I under the family's spellings of them.
    pub(super) fn read(
        config: &Config<'_>,
        num_experts: &[&'static str],
        top_k: &[&'static str],
        intermediate_size: &[&'static str],
    ) -> Result<Self> {
        Ok(Self {
            hidden_size: config.size(&["hidden_size"])?,
            num_experts: config.size(num_experts)?,
            top_k: config.size(top_k)?,
            intermediate_size: config.size(intermediate_size)?,
        })
    }
}

impl Block {
    /// A linear router, weights that are not renormalised and act on the output, plain experts, and nothing
    /// beside them: the families say what they have more.
    pub(super) fn new(sizes: Sizes, method: RoutingMethod, activation: Activation) -> Self {
        let Sizes { hidden_size, num_experts, top_k, intermediate_size } = sizes;
        Self {
            hidden_size,
            num_experts,
            top_k,
            router: RouterKind::Linear { input: RouterInput::Hidden, bias: false, transform: LogitTransform::None },
            method,
            renormalize: None,
            routed_scaling_factor: 1.0,
            apply_routed_scale_to_output: false,
            per_expert_scale: false,
            weight_position: WeightPosition::Output,
            zero_experts: None,
            intermediate_size,
            activation,
            biases: false,
            shared: None,
            latent: None,
            expert_input: ExpertInput::Hidden,
            output_bias: false,
            output_norm: None,
        }
    }
}

impl Block {
    /// Shared experts that the router weighs.
    pub(super) fn joint_shares(&self) -> usize {
        match &self.method {
            RoutingMethod::JointNorm { num_shared, global_scale: _ } => *num_shared,
            RoutingMethod::TopK { score: _, key: _, groups: _ }
            | RoutingMethod::TopKThenScore { score: _ }
            | RoutingMethod::Hash { score: _, vocab_size: _ }
            | RoutingMethod::Sparsemixer { router_jitter_noise: _ } => 0,
        }
    }
}

impl Shared {
    /// An MLP without bias and gate that is added; none of width 0.
    pub(super) fn plain(width: usize, activation: Activation) -> Option<Self> {
        let gate = Gate::None;
        (width > 0).then_some(Self { width, activation, biases: false, gate, combination: SharedCombination::Sum })
    }

    /// n MLPs of width I are one of width n I.
    pub(super) fn times(count: usize, intermediate_size: usize, activation: Activation) -> Result<Option<Self>> {
        let width = count.checked_mul(intermediate_size).ok_or_else(|| {
            Error::invalid(
                "n_shared_experts",
                format!("{count} experts of width {intermediate_size}"),
                "a product that fits this machine",
                "correct n_shared_experts in config.json",
            )
        })?;
        Ok(Self::plain(width, activation))
    }
}

/// `silu(gate) * up` without a bound.
pub(super) const SWIGLU: Activation = Activation::Swiglu { limit: None };

/// Softmax over all experts, the k largest.
pub(super) const SOFTMAX: RoutingMethod =
    RoutingMethod::TopK { score: Score::Softmax, key: SelectionKey::Score, groups: None };

/// Sigmoid of each, the k largest with the selection bias.
pub(super) const SIGMOID_BIAS: RoutingMethod =
    RoutingMethod::TopK { score: Score::Sigmoid, key: SelectionKey::ScorePlusBias, groups: None };

/// `n_group` and `topk_group`. One group out of one restricts nothing.
pub(super) fn groups(
    config: &Config<'_>,
    n_group: &[&'static str],
    topk_group: &[&'static str],
    score: GroupScore,
) -> Result<Option<Groups>> {
    let (n_group, topk_group) = (config.size(n_group)?, config.size(topk_group)?);
    Ok(match (n_group, topk_group) {
        (1, 1) => None,
        (_, _) => Some(Groups { n_group, topk_group, score }),
    })
}

/// The activation that a word of `config.json` names, as `torch` computes it in transformers' `ACT2FN`.
pub(super) fn activation(config: &Config<'_>, key: &'static str) -> Result<Activation> {
    const KNOWN: [&str; 8] =
        ["silu", "swish", "gelu", "gelu_python", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_python_tanh"];
    Ok(match config.word(key, &KNOWN)? {
        "gelu" | "gelu_python" => Activation::GeluErf,
        "gelu_new" | "gelu_fast" | "gelu_pytorch_tanh" | "gelu_python_tanh" => Activation::GeluTanh,
        // The only others that `word` lets through.
        _ => SWIGLU,
    })
}

/// SwiGLU, clamped or not, where the family's code has no other activation.
pub(super) fn silu(config: &Config<'_>) -> Result<()> {
    config.word("hidden_act", &["silu", "swish"]).map(|_| ())
}

/// The clamp limit, and a note if a family whose published models clamp has none in its config.
pub(super) fn swiglu_limit(config: &Config<'_>, published: &str) -> Result<Option<f32>> {
    if config.get("swiglu_limit").is_none() {
        config.note(format!("swiglu_limit is not in config.json: experts are not clamped (published {published})"));
    }
    config.limit("swiglu_limit")
}
