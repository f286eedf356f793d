//! Random layers and runs of them that together have every pair of values of their fields.
//! A long file: the fields, what a layer of their values is, and the search for pairs belong together.

use std::collections::BTreeSet;

use fastrand::Rng;
use moewe::Options;
use moewe::spec::*;
use rayon::prelude::*;

use crate::rig::{CUTS, fits};

const fn int4(group: Option<usize>, scale: ScaleFormat, zero_points: bool, act_order: bool) -> WeightFormat {
    WeightFormat::Int4 { group, scale, zero_points, act_order }
}

pub const FORMATS: [WeightFormat; 21] = [
    WeightFormat::F32,
    WeightFormat::F16,
    WeightFormat::Bf16,
    WeightFormat::Fp8Block { block: [128, 128], scale: ScaleFormat::F32 },
    WeightFormat::Fp8Block { block: [3, 16], scale: ScaleFormat::Bf16 },
    WeightFormat::Fp8Block { block: [32, 32], scale: ScaleFormat::E8m0 },
    // MXFP8
    WeightFormat::Fp8Block { block: [1, 32], scale: ScaleFormat::E8m0 },
    WeightFormat::Fp8Tensor,
    WeightFormat::Fp8Channel,
    WeightFormat::Int8Channel,
    WeightFormat::Mxfp4,
    WeightFormat::Nvfp4,
    int4(Some(32), ScaleFormat::Bf16, false, false),
    int4(Some(16), ScaleFormat::F32, false, false),
    int4(Some(64), ScaleFormat::F16, true, false),
    int4(Some(32), ScaleFormat::Bf16, true, true),
    int4(Some(128), ScaleFormat::F16, false, true),
    int4(None, ScaleFormat::F16, false, false),
    WeightFormat::Q8_0,
    WeightFormat::Q4K,
    WeightFormat::Q6K,
];
const fn dynamic(code: ActivationCode, span: ScaleSpan, rule: ScaleRule, scale: ActivationScale) -> ActivationQuant {
    ActivationQuant::Dynamic { code, span, rule, scale }
}

const QUANTS: [ActivationQuant; 10] = {
    use ActivationCode::{E4m3, Int8};
    use ActivationScale::{F32, F32CeilPow2, Ue8m0Packed};
    [
        ActivationQuant::None,
        ActivationQuant::dynamic_fp8(128, F32),
        dynamic(E4m3, ScaleSpan::Group(64), ScaleRule::FlooredScale { upper: None }, F32CeilPow2),
        dynamic(E4m3, ScaleSpan::Group(32), ScaleRule::ReciprocalScale, Ue8m0Packed),
        dynamic(E4m3, ScaleSpan::Group(128), ScaleRule::ReciprocalAmax, F32),
        dynamic(E4m3, ScaleSpan::Group(64), ScaleRule::ReciprocalScale, F32),
        dynamic(E4m3, ScaleSpan::Token, ScaleRule::FlooredScale { upper: Some(0.5) }, F32),
        dynamic(E4m3, ScaleSpan::Tensor, ScaleRule::FlooredAmaxTimesReciprocal, F32),
        dynamic(Int8, ScaleSpan::Token, ScaleRule::FlooredAmax, F32),
        ActivationQuant::Static { code: E4m3 },
    ]
};
const ACTIVATIONS: [Activation; 11] = [
    Activation::Swiglu { limit: None },
    Activation::Swiglu { limit: Some(0.5) },
    Activation::Swiglu { limit: Some(3.0) },
    Activation::SwigluOai { alpha: 1.702, limit: None, beta: 1.0 },
    Activation::SwigluOai { alpha: 1.702, limit: Some(0.5), beta: 1.0 },
    Activation::SwigluOai { alpha: 0.7, limit: Some(3.0), beta: -0.3 },
    Activation::SwigluClampAfter { limit: 0.5 },
    Activation::Situ { beta: 0.8, linear_beta: 2.0 },
    Activation::GeluTanh,
    Activation::GeluErf,
    Activation::Relu2,
];
const TYPES: [FloatType; 3] = [FloatType::F32, FloatType::F16, FloatType::Bf16];
const SCORES: [Score; 4] = [Score::Softmax, Score::Sigmoid, Score::SqrtSoftplus, Score::Identity];
const KEYS: [SelectionKey; 3] = [SelectionKey::Score, SelectionKey::ScorePlusBias, SelectionKey::LogitPlusBias];
const GROUPS: [Option<GroupScore>; 4] =
    [None, Some(GroupScore::Top2SumOfKey), Some(GroupScore::MaxOfScore), Some(GroupScore::Top2SumOfScore)];
const DENOMINATORS: [Option<Denominator>; 8] = [
    None,
    Some(Denominator::Sum),
    Some(Denominator::SumPlus { eps: 1e-3 }),
    Some(Denominator::AtLeast { floor: 0.7 }),
    Some(Denominator::SumOrOne),
    Some(Denominator::PNorm { p: 1.0 }),
    Some(Denominator::PNorm { p: 2.0 }),
    Some(Denominator::PNorm { p: 3.0 }),
];
const LAYOUTS: [GateUpLayout; 3] = [GateUpLayout::Separate, GateUpLayout::Halves, GateUpLayout::Interleaved];
const ROUNDINGS: [Rounding; 2] = [Rounding::F32, Rounding::Model];

// Widths of a part of a vector, of whole vectors and blocks, and beyond them; formats make 32 and 256 of them.
const HIDDEN_SIZES: [usize; 7] = [1, 4, 5, 24, 64, 100, 130];
const NUM_EXPERTS: [usize; 9] = [1, 2, 3, 6, 8, 12, 16, 60, 65];
/// The last: all that may be chosen, up to 12.
const TOP_KS: [usize; 4] = [1, 2, 4, 12];
const INTERMEDIATE_SIZES: [usize; 7] = [1, 3, 16, 33, 48, 80, 131];
const SHARED_INTERMEDIATE_SIZES: [usize; 4] = [1, 20, 33, 64];
const LATENT_SIZES: [usize; 3] = [7, 20, 36];
/// None, few, a whole tile and one more.
const TOKENS: [usize; 8] = [0, 1, 2, 3, 9, 33, 64, 65];
/// Rows of a slot that enter in a batch.
const CAPACITIES: [usize; 4] = [1, 3, 8, 70];
const PATHS: [Options; 5] = CUTS;
/// Products of the routed experts in one run: what a reference computes in a fraction of a second.
const MOST_PRODUCTS: usize = 13_000_000;

/// Fields and how many values each has. A layer and its run are first one number for each of them. What has a value
/// here is used in `spec` or `Sample::of`, and `acts` says when a layer really has it.
const FIELDS: [(&str, usize); 58] = [
    ("hidden_size", HIDDEN_SIZES.len()),
    ("num_experts", NUM_EXPERTS.len()),
    ("top_k", TOP_KS.len()),
    ("router", 5),
    ("router.format", 3),
    ("router.bias", 2),
    ("router.transform", 3),
    ("method", 6),
    ("method.score", SCORES.len()),
    ("method.key", KEYS.len()),
    ("method.groups", GROUPS.len()),
    ("renormalize", DENOMINATORS.len()),
    ("routed_scaling_factor", 3),
    ("apply_routed_scale_to_output", 2),
    ("per_expert_scale", 2),
    ("weight_position", 3),
    ("zero_experts", 3),
    ("nan_policy", 2),
    ("experts.intermediate_size", INTERMEDIATE_SIZES.len()),
    ("experts.activation", ACTIVATIONS.len()),
    ("experts.gate_up_bias", 2),
    ("experts.down_bias", 2),
    ("experts.format", FORMATS.len()),
    ("experts.gate_up_layout", LAYOUTS.len()),
    ("experts.orientation", 2),
    ("experts.activation_quant", QUANTS.len()),
    ("shared", 2),
    ("shared.intermediate_size", SHARED_INTERMEDIATE_SIZES.len()),
    ("shared.activation", ACTIVATIONS.len()),
    ("shared.bias", 2),
    ("shared.format", FORMATS.len()),
    ("shared.activation_quant", QUANTS.len()),
    ("shared.gate", 2),
    ("shared.combination", 2),
    ("latent", 4),
    ("latent.format", FORMATS.len()),
    ("expert_input", 2),
    ("output_bias", 2),
    ("output_norm", 2),
    ("precision.input", 3),
    ("precision.output", 3),
    ("precision.model", 3),
    ("precision.router_gemm", 2),
    ("precision.routing_weights", 2),
    ("precision.weighted_input", 2),
    ("precision.gate_up", 2),
    ("precision.activation", 3),
    ("precision.combine", 3),
    ("precision.combine_order", 2),
    ("lora", 3),
    ("lora.format", 3),
    ("placement", 4),
    ("shard", 3),
    ("common_terms", 2),
    ("entry", 2),
    ("tokens", TOKENS.len()),
    ("path", PATHS.len()),
    ("fuse_quantization", 2),
];

/// What acts on tokens only, before they are rows of experts and behind.
const OF_TOKENS: [&str; 34] = [
    "top_k",
    "router",
    "router.format",
    "router.bias",
    "router.transform",
    "method",
    "method.score",
    "method.key",
    "method.groups",
    "renormalize",
    "routed_scaling_factor",
    "apply_routed_scale_to_output",
    "per_expert_scale",
    "zero_experts",
    "nan_policy",
    "shared",
    "shared.intermediate_size",
    "shared.activation",
    "shared.bias",
    "shared.format",
    "shared.activation_quant",
    "shared.gate",
    "shared.combination",
    "latent",
    "latent.format",
    "expert_input",
    "output_bias",
    "output_norm",
    "common_terms",
    "precision.router_gemm",
    "precision.routing_weights",
    "precision.combine",
    "precision.combine_order",
    "tokens",
];

/// Of so many one is taken.
const CANDIDATES: usize = 30;

type Choices = [usize; FIELDS.len()];

fn choice(choices: &Choices, name: &str) -> usize {
    choices[FIELDS.iter().position(|(field, _)| *field == name).unwrap()]
}

/// A layer and how it is run.
pub struct Sample {
    pub spec: MoeSpec,
    pub tokens: usize,
    pub options: Options,
    choices: Choices,
}

impl Sample {
    fn of(choices: Choices, rng: &mut Rng) -> Self {
        let spec = spec(&choices, rng);
        let tokens = TOKENS[choice(&choices, "tokens")].min(MOST_PRODUCTS / (spec.top_k * products_of_a_row(&spec)));
        let fuse_quantization = choice(&choices, "fuse_quantization") == 1;
        Self { spec, tokens, options: Options { fuse_quantization, ..PATHS[choice(&choices, "path")] }, choices }
    }

    /// Which of the chosen values the layer has: some give way to others, and some are of parts that it lacks.
    fn acting(&self) -> [bool; FIELDS.len()] {
        FIELDS.map(|(field, _)| self.acts(field))
    }

    fn acts(&self, field: &str) -> bool {
        let spec = &self.spec;
        let chosen = choice(&self.choices, field);
        let (method, shared) = (&spec.routing.method, spec.shared.as_ref());
        if spec.entry.is_batched() && OF_TOKENS.contains(&field) {
            return false;
        }
        match field {
            "hidden_size" => spec.hidden_size == HIDDEN_SIZES[chosen],
            "top_k" => chosen == TOP_KS.len() - 1 || spec.top_k == TOP_KS[chosen],
            "router.format" => matches!(spec.router, Router::Linear { .. } | Router::Mlp { .. }),
            "router.bias" => matches!(spec.router, Router::Linear { .. }),
            "router.transform" => matches!(spec.router, Router::Linear { .. } | Router::Given { .. }),
            "method" => chosen != 5 || matches!(method, RoutingMethod::Sparsemixer { .. }),
            "method.score" => matches!(method, RoutingMethod::TopK { .. } | RoutingMethod::Hash { .. }),
            "method.key" => matches!(method, RoutingMethod::TopK { .. }),
            "method.groups" => match method {
                RoutingMethod::TopK { groups, .. } => groups.map(|groups| groups.score) == GROUPS[chosen],
                _ => false,
            },
            "renormalize" => spec.joint_shares() == 0 && spec.routing.renormalize == DENOMINATORS[chosen],
            "apply_routed_scale_to_output" => spec.routing.apply_routed_scale_to_output == (chosen == 1),
            "zero_experts" => spec.routing.zero_experts.map_or(0, |zero| zero.count) == [0, 4, 3][chosen],
            "experts.intermediate_size" => spec.experts.intermediate_size == INTERMEDIATE_SIZES[chosen],
            "experts.gate_up_layout" => spec.experts.gate_up_layout == LAYOUTS[chosen],
            "experts.orientation" => (spec.experts.orientation == Orientation::InOut) == (chosen == 1),
            "experts.activation_quant" => spec.experts.activation_quant == QUANTS[chosen],
            "shared" => shared.is_some() == (chosen == 1),
            "shared.intermediate_size" => {
                shared.is_some_and(|shared| shared.mlp.intermediate_size == SHARED_INTERMEDIATE_SIZES[chosen])
            }
            "shared.activation" | "shared.bias" | "shared.format" | "shared.combination" => shared.is_some(),
            "shared.activation_quant" => shared.is_some_and(|shared| shared.mlp.activation_quant == QUANTS[chosen]),
            "shared.gate" => shared.is_some() && spec.joint_shares() == 0,
            "latent" => match spec.latent.as_ref().map(|latent| latent.norm) {
                None => chosen == 0,
                Some(LatentNorm::None) => chosen == 1,
                Some(LatentNorm::Reduced { .. }) => chosen == 2,
                Some(LatentNorm::PreAndPost { .. }) => chosen == 3,
            },
            "latent.format" => spec.latent.is_some(),
            "expert_input" => spec.expert_input == [ExpertInput::Hidden, ExpertInput::Separate][chosen],
            "output_bias" => spec.output_bias == (chosen == 1),
            "output_norm" => spec.output_norm.is_some() == (chosen == 1),
            "lora.format" => spec.lora.is_some(),
            "shard" => spec.shard.is_partial() == (chosen > 0),
            "common_terms" => spec.placement.is_partial() || spec.shard.is_partial(),
            "tokens" => self.tokens == TOKENS[chosen],
            "fuse_quantization" => {
                spec.experts.activation_quant.is_on()
                    || shared.is_some_and(|shared| shared.mlp.activation_quant.is_on())
            }
            "precision.weighted_input" => spec.routing.weight_position == WeightPosition::Input,
            _ => true,
        }
    }
}

/// What a row costs in its expert.
fn products_of_a_row(spec: &MoeSpec) -> usize {
    3 * spec.experts.intermediate_size * spec.expert_width()
}

/// Pairs of values, each of another field.
struct Pairs {
    /// Number of the first value of each field.
    first: [usize; FIELDS.len()],
    values: usize,
    /// By the numbers of two values, the lower one first.
    state: Vec<u8>,
}

impl Pairs {
    /// A layer has both.
    const SEEN: u8 = u8::MAX;
    /// So often both were chosen and one of them gave way: they seem to exclude each other.
    const GIVEN_UP: u8 = 2;

    fn none() -> Self {
        let mut values = 0;
        let first = FIELDS.map(|(_, count)| {
            values += count;
            values - count
        });
        Self { first, values, state: vec![0; values * values] }
    }

    fn at(&self, choices: &Choices, a: usize, b: usize) -> usize {
        let (a, b) = (a.min(b), a.max(b));
        (self.first[a] + choices[a]) * self.values + self.first[b] + choices[b]
    }

    fn add(&mut self, sample: &Sample) {
        let acting = sample.acting();
        for b in 0..FIELDS.len() {
            for a in 0..b {
                let at = self.at(&sample.choices, a, b);
                let state = &mut self.state[at];
                *state = if acting[a] && acting[b] { Self::SEEN } else { *state + u8::from(*state < Self::GIVEN_UP) };
            }
        }
    }

    /// How many pairs a layer has that none before it has.
    fn new_of(&self, sample: &Sample) -> usize {
        let acting = sample.acting();
        let new = |&(a, b): &(usize, usize)| {
            acting[a] && acting[b] && self.state[self.at(&sample.choices, a, b)] != Self::SEEN
        };
        (0..FIELDS.len()).flat_map(|b| (0..b).map(move |a| (a, b))).filter(new).count()
    }

    /// How many pairs with `field` are wanted still.
    fn new_with(&self, choices: &Choices, field: usize) -> usize {
        let wanted = |&other: &usize| other != field && self.state[self.at(choices, field, other)] < Self::GIVEN_UP;
        (0..FIELDS.len()).filter(wanted).count()
    }

    /// All pairs by field and value, and whether a layer has them.
    fn all(&self) -> Vec<([(usize, usize); 2], bool)> {
        let values = |field: usize| (0..FIELDS[field].1).map(move |value| (field, value));
        let fields = (0..FIELDS.len()).flat_map(|b| (0..b).map(move |a| (a, b)));
        let pairs = fields.flat_map(|(a, b)| values(a).flat_map(move |x| values(b).map(move |y| [x, y])));
        let number = |(field, value): (usize, usize)| self.first[field] + value;
        pairs.map(|pair| (pair, self.state[number(pair[0]) * self.values + number(pair[1])] == Self::SEEN)).collect()
    }
}

/// The first `count` of a sequence in which each brings many pairs that those before it lacked, for few kernels.
pub fn samples(count: usize) -> Vec<Sample> {
    let mut pairs = Pairs::none();
    let rng = &mut Rng::with_seed(0xa12);
    let mut in_vain = 0;
    (0..count)
        .map(|_| {
            // Of several the best one, for what was chosen may give way; any when there is nothing new.
            let candidates = if in_vain < 300 { CANDIDATES } else { 1 };
            let worth = |sample: &Sample| 1_000_000 * pairs.new_of(sample) / kernels(&sample.spec).pow(2);
            let candidates = (0..candidates).map(|_| Sample::of(choices(&pairs, rng), rng));
            let sample = candidates.max_by_key(worth).unwrap();
            in_vain = if pairs.new_of(&sample) > 0 { 0 } else { in_vain + 1 };
            pairs.add(&sample);
            sample
        })
        .collect()
}

/// About how many kernels a device has to compile for it, which is what takes its time.
fn kernels(spec: &MoeSpec) -> usize {
    let quantised = |mlp: &ExpertMlp| 2 * usize::from(mlp.activation_quant.is_on());
    let router = match spec.router {
        Router::Mlp { .. } => 4,
        Router::Linear { .. } => 1,
        Router::Given { .. } => 0,
    };
    let shared = spec.shared.as_ref().map_or(0, |shared| 2 + quantised(&shared.mlp));
    let (latent, lora) = (3 * usize::from(spec.latent.is_some()), 5 * usize::from(spec.lora.is_some()));
    4 + router + quantised(&spec.experts) + shared + latent + lora
}

/// One value of each field in turn, the one that makes most wanted pairs; a random one where none does.
fn choices(pairs: &Pairs, rng: &mut Rng) -> Choices {
    let mut choices: Choices = FIELDS.map(|(_, values)| rng.usize(0..values));
    let mut order: Vec<usize> = (0..FIELDS.len()).collect();
    rng.shuffle(&mut order);
    for field in order {
        let first = rng.usize(0..FIELDS[field].1);
        let gain = |value: usize| {
            let mut with = choices;
            with[field] = value;
            pairs.new_with(&with, field)
        };
        let values = (0..FIELDS[field].1).map(|at| (at + first) % FIELDS[field].1);
        choices[field] = values.max_by_key(|&value| gain(value)).unwrap();
    }
    choices
}

/// Columns that have to be together, a power of two.
fn unit(format: WeightFormat) -> usize {
    [1, 2, 32, 256].into_iter().find(|cols| fits(format, *cols)).unwrap()
}

/// Whether the codes of such weights can meet codes of activations.
pub fn sums_codes(format: WeightFormat) -> bool {
    !matches!(format, WeightFormat::Q4K | WeightFormat::Int4 { act_order: true, .. })
}

/// Their layers.
pub fn specs(count: usize) -> Vec<MoeSpec> {
    samples(count).into_iter().map(|sample| sample.spec).collect()
}

/// A spec that nothing steers.
pub fn random_spec(rng: &mut Rng) -> MoeSpec {
    let choices = FIELDS.map(|(_, values)| rng.usize(0..values));
    spec(&choices, rng)
}

/// The spec of these choices; where two of them exclude each other, the later field gives way, but widths to formats.
fn spec(choices: &Choices, rng: &mut Rng) -> MoeSpec {
    let choice = |name: &str| choice(choices, name);
    let num_experts = NUM_EXPERTS[choice("num_experts")];
    let joint = choice("method") == 4;
    let (format, shared_format) = (FORMATS[choice("experts.format")], FORMATS[choice("shared.format")]);
    let (has_latent, has_shared) = (choice("latent") > 0, joint || choice("shared") == 1);
    let latent_format = FORMATS[choice("latent.format")];
    let latent = has_latent.then(|| Latent {
        size: LATENT_SIZES[rng.usize(0..LATENT_SIZES.len())].next_multiple_of(unit(latent_format).max(unit(format))),
        format: latent_format,
        norm: match choice("latent") {
            1 => LatentNorm::None,
            2 => LatentNorm::Reduced { eps: 1e-5 },
            _ => LatentNorm::PreAndPost { pre_eps: 1e-5, post_eps: 1e-6 },
        },
    });
    let routed_unit = if has_latent { unit(latent_format) } else { unit(format) };
    let hidden_unit = if has_shared { routed_unit.max(unit(shared_format)) } else { routed_unit };
    let hidden_size = HIDDEN_SIZES[choice("hidden_size")].next_multiple_of(hidden_unit);
    let zero_experts = match (choice("zero_experts"), &latent) {
        (0, _) => None,
        (1, None) => Some(ZeroExperts { count: 4, kind: ZeroExpertKind::Identity }),
        (_, _) => Some(ZeroExperts { count: 3, kind: ZeroExpertKind::Skip }),
    };
    let selectable = num_experts + zero_experts.map_or(0, |zero| zero.count);
    let score = SCORES[choice("method.score")];
    let groups = GROUPS[choice("method.groups")].and_then(|score| {
        let divisors: Vec<usize> = (1..=selectable / 2).filter(|n| selectable.is_multiple_of(*n)).collect();
        let n_group = *divisors.get(rng.usize(0..divisors.len().max(1)))?;
        Some(Groups { n_group, topk_group: rng.usize(1..=n_group), score })
    });
    let mut method = match choice("method") {
        0 => RoutingMethod::TopK { score, key: KEYS[choice("method.key")], groups },
        1 => RoutingMethod::TopKThenScore { score: ChosenScore::Softmax },
        2 => RoutingMethod::TopKThenScore { score: ChosenScore::Sigmoid },
        3 => RoutingMethod::Hash { score, vocab_size: 17 },
        4 => RoutingMethod::JointNorm { num_shared: rng.usize(1..4), global_scale: rng.bool() },
        _ => RoutingMethod::Sparsemixer { router_jitter_noise: 0.1 },
    };
    let allowed = match &method {
        RoutingMethod::TopK { groups: Some(groups), .. } => selectable / groups.n_group * groups.topk_group,
        _ => selectable,
    };
    let mut top_k = TOP_KS[choice("top_k")].min(allowed);
    if let RoutingMethod::Sparsemixer { .. } = method {
        if selectable < 2 {
            method = RoutingMethod::TopK { score, key: KEYS[choice("method.key")], groups: None };
        } else {
            top_k = 2;
        }
    }
    let scores_may_cancel = match method {
        RoutingMethod::TopK { score, .. } | RoutingMethod::Hash { score, .. } => score == Score::Identity,
        _ => false,
    };
    let renormalize = match DENOMINATORS[choice("renormalize")] {
        _ if joint => None,
        // A sum of scores of either sign can be near 0: then no bound on the weights holds.
        Some(Denominator::Sum | Denominator::SumPlus { .. } | Denominator::SumOrOne) if scores_may_cancel => None,
        renormalize => renormalize,
    };
    let transform = match choice("router.transform") {
        0 => LogitTransform::None,
        1 => LogitTransform::SoftCap { cap: 2.5 },
        _ => LogitTransform::Multiply { factor: 0.6 },
    };
    let router_format = FORMATS[choice("router.format")];
    let router = match choice("router") {
        kind @ (0 | 1) => Router::Linear {
            input: if kind == 0 { RouterInput::Hidden } else { RouterInput::RmsNormScaled { eps: 1e-6 } },
            format: router_format,
            bias: choice("router.bias") == 1,
            transform,
        },
        2 => Router::Given { transform },
        kind => Router::Mlp { state_size: 19, rms_norm_eps: 1e-5, previous_state: kind == 3, format: router_format },
    };
    let mlp = |path: &str, format: WeightFormat, inner: usize, gate_up_bias: bool, down_bias: bool| ExpertMlp {
        intermediate_size: inner.next_multiple_of(unit(format)),
        activation: ACTIVATIONS[choice(&format!("{path}.activation"))],
        gate_up_layout: GateUpLayout::Separate,
        orientation: Orientation::OutIn,
        gate_up_bias,
        down_bias,
        format,
        activation_quant: match QUANTS[choice(&format!("{path}.activation_quant"))] {
            // Minima and orders need numbers.
            _ if !sums_codes(format) => ActivationQuant::None,
            quant => quant,
        },
    };
    let inner = INTERMEDIATE_SIZES[choice("experts.intermediate_size")];
    let mut experts =
        mlp("experts", format, inner, choice("experts.gate_up_bias") == 1, choice("experts.down_bias") == 1);
    // Blocks of several rows do not lie across gate and up, and only numbers lie the other way.
    let one_row = format.parts().blocks.is_none_or(|blocks| blocks.rows == 1);
    if experts.activation.gated() && one_row {
        experts.gate_up_layout = LAYOUTS[choice("experts.gate_up_layout")];
    }
    if choice("experts.orientation") == 1
        && matches!(format, WeightFormat::F32 | WeightFormat::F16 | WeightFormat::Bf16)
    {
        experts.orientation = Orientation::InOut;
    }
    let inner = SHARED_INTERMEDIATE_SIZES[choice("shared.intermediate_size")];
    let bias = choice("shared.bias") == 1;
    let shared = has_shared.then(|| SharedExperts {
        mlp: mlp("shared", shared_format, inner, bias, bias),
        gate: match choice("shared.gate") {
            _ if joint => SharedGate::Joint,
            0 => SharedGate::None,
            _ => SharedGate::Sigmoid { format: WeightFormat::Bf16 },
        },
        combination: [SharedCombination::Sum, SharedCombination::Average][choice("shared.combination")],
    });
    let mut spec = MoeSpec {
        hidden_size,
        num_experts,
        top_k,
        router,
        routing: Routing {
            method,
            renormalize,
            routed_scaling_factor: [1.25, 2.5, 0.3][choice("routed_scaling_factor")],
            apply_routed_scale_to_output: !joint && choice("apply_routed_scale_to_output") == 1,
            per_expert_scale: choice("per_expert_scale") == 1,
            weight_position: [WeightPosition::Output, WeightPosition::Input, WeightPosition::BeforeDown]
                [choice("weight_position")],
            zero_experts,
            nan_policy: [NanPolicy::Zero, NanPolicy::Propagate][choice("nan_policy")],
        },
        experts,
        shared,
        latent,
        lora: None,
        expert_input: [ExpertInput::Hidden, ExpertInput::Separate][choice("expert_input")],
        output_bias: choice("output_bias") == 1,
        output_norm: (choice("output_norm") == 1).then_some(OutputNorm { eps: 0.05 }),
        placement: Placement::All,
        shard: TensorShard::Whole,
        common_terms: CommonTerms::Here,
        entry: Entry::TokenMajor,
        precision: Precision {
            input: TYPES[choice("precision.input")],
            output: TYPES[choice("precision.output")],
            model: TYPES[choice("precision.model")],
            router_gemm: ROUNDINGS[choice("precision.router_gemm")],
            routing_weights: ROUNDINGS[choice("precision.routing_weights")],
            weighted_input: ROUNDINGS[choice("precision.weighted_input")],
            gate_up: ROUNDINGS[choice("precision.gate_up")],
            activation: [ActivationRounding::F32, ActivationRounding::Fused, ActivationRounding::Torch]
                [choice("precision.activation")],
            combine: [CombineRounding::F32, CombineRounding::WeightedRows, CombineRounding::EveryStep]
                [choice("precision.combine")],
            combine_order: [CombineOrder::Slot, CombineOrder::Expert][choice("precision.combine_order")],
            block_scale: BlockScale::Exact,
        },
    };
    distribute(&mut spec, &choice, rng);
    spec.validate().unwrap();
    spec
}

/// Adapters, and what a device has of the layer; what cannot stand beside a part of a layer gives way.
fn distribute(spec: &mut MoeSpec, choice: &dyn Fn(&str) -> usize, rng: &mut Rng) {
    let (num_experts, inner) = (spec.num_experts, spec.experts.intermediate_size);
    spec.lora = (choice("lora") > 0).then(|| Lora {
        num_adapters: rng.usize(1..4),
        rank: [1, 4, 16][rng.usize(0..3)],
        format: FORMATS[choice("lora.format")],
        delta: [LoraDelta::F32, LoraDelta::Model][choice("lora") - 1],
    });
    spec.placement = match choice("placement") {
        0 => Placement::All,
        1 => {
            let count = rng.usize(1..=num_experts);
            Placement::Range { first: rng.usize(0..=num_experts - count), count }
        }
        kind => map(num_experts, kind == 3, rng),
    };
    // Where columns share scales, pieces of 16 of them can have their own; orders and super-blocks cannot be cut.
    let cut = match spec.experts.format {
        WeightFormat::Int4 { act_order: true, .. } => None,
        WeightFormat::Q4K | WeightFormat::Q6K => Some(256),
        format if format.parts().blocks.is_some() => Some(16),
        _ => Some(1),
    };
    // Codes meet codes in blocks of 16 columns at least, so some shards begin at a block.
    let cut = cut.map(|cut| if spec.experts.activation_quant.is_on() { 32.max(cut) } else { cut });
    if let (Some(cut), true) = (cut, choice("shard") > 0) {
        let first = rng.usize(0..inner.div_ceil(cut)) * cut;
        let size = rng.usize(1..=inner - first);
        // Half bytes and whole blocks of the checkpoint.
        spec.shard = TensorShard::Part { first, size, owns_down_bias: choice("shard") == 1 };
    }
    let partial = spec.placement.is_partial() || spec.shard.is_partial();
    if partial {
        spec.output_norm = None;
        if let Some(latent) = &mut spec.latent {
            let cuts_row = matches!(latent.norm, LatentNorm::PreAndPost { .. }) && spec.shard.is_partial();
            if cuts_row || matches!(latent.norm, LatentNorm::Reduced { .. }) {
                latent.norm = LatentNorm::None;
            }
        }
        spec.common_terms = [CommonTerms::Here, CommonTerms::Elsewhere][choice("common_terms")];
    }
    if choice("entry") == 1 {
        let most = (MOST_PRODUCTS / (products_of_a_row(spec) * spec.num_slots())).max(1);
        spec.entry = Entry::Batched { capacity: CAPACITIES[rng.usize(0..CAPACITIES.len())].min(most) };
        spec.router = Router::Given { transform: LogitTransform::None };
        spec.routing.apply_routed_scale_to_output = false;
        spec.routing.zero_experts = None;
        if let RoutingMethod::JointNorm { .. } = spec.routing.method {
            spec.routing.method = RoutingMethod::TopKThenScore { score: ChosenScore::Softmax };
        }
        if let RoutingMethod::TopK { groups, .. } = &mut spec.routing.method {
            *groups = None;
        }
        spec.top_k = spec.top_k.min(num_experts);
        if let RoutingMethod::Sparsemixer { .. } = spec.routing.method {
            spec.routing.method = RoutingMethod::TopKThenScore { score: ChosenScore::Softmax };
        }
        // The latent width is that of the rows then.
        if let Some(latent) = spec.latent.take() {
            spec.hidden_size = latent.size;
        }
        (spec.shared, spec.output_bias, spec.output_norm) = (None, false, None);
        spec.expert_input = ExpertInput::Hidden;
    }
}

/// A table in which experts are here, elsewhere or (rarely) missing, with up to three replicas or one.
fn map(num_experts: usize, replicated: bool, rng: &mut Rng) -> Placement {
    let replicas = if replicated { 3 } else { 1 };
    let mut num_slots = 0;
    let mut slots = vec![];
    let sure = rng.usize(0..num_experts);
    let mut order: Vec<usize> = (0..num_experts).collect();
    rng.shuffle(&mut order);
    let mut of = vec![vec![]; num_experts];
    for expert in order {
        of[expert] = match rng.usize(0..8) {
            0..3 if expert != sure => vec![-1; replicas],
            3 if expert != sure && rng.usize(0..3) == 0 => vec![-2; replicas],
            _ => {
                let distinct = rng.usize(1..=replicas);
                let first = num_slots;
                num_slots += distinct;
                (0..replicas).map(|at| (first + at % distinct) as i32).collect()
            }
        };
    }
    of.iter().for_each(|entries| slots.extend(entries));
    Placement::Map { num_slots, replicas, slots }
}

/// Samples of one run of the property tests: on the CPU, and as many of the first of them on the device.
pub const CPU_SAMPLES: usize = 2000;
pub const GPU_SAMPLES: usize = 300;

/// Fields some of whose values exclude each other; and those of `OF_TOKENS` batched rows.
const EXCLUDING: [(&str, &str); 40] = [
    // Blocks have to be whole.
    ("hidden_size", "shared.format"),
    ("hidden_size", "latent.format"),
    ("experts.intermediate_size", "experts.format"),
    ("shared.intermediate_size", "shared.format"),
    // Minima and orders of columns need numbers.
    ("experts.format", "experts.activation_quant"),
    ("shared.format", "shared.activation_quant"),
    // Gate and up are one tensor where there is a gate and no block has rows of both; only numbers lie the other way.
    ("experts.activation", "experts.gate_up_layout"),
    ("experts.format", "experts.gate_up_layout"),
    ("experts.format", "experts.orientation"),
    // Orders of columns cannot be cut.
    ("experts.format", "shard"),
    // A part of a sum has no norm; nothing is common where nothing is elsewhere.
    ("latent", "placement"),
    ("latent", "shard"),
    ("latent", "common_terms"),
    ("output_norm", "placement"),
    ("output_norm", "shard"),
    ("output_norm", "common_terms"),
    // Rules of the spec.
    ("method", "apply_routed_scale_to_output"),
    ("method", "renormalize"),
    ("method", "shared"),
    ("method", "shared.gate"),
    ("method.score", "renormalize"),
    ("top_k", "method"),
    ("zero_experts", "latent"),
    ("zero_experts", "latent.format"),
    // A part that is not there has no parameters.
    ("router", "router.format"),
    ("router", "router.bias"),
    ("router", "router.transform"),
    ("method", "method.score"),
    ("method", "method.key"),
    ("method", "method.groups"),
    ("weight_position", "precision.weighted_input"),
    ("latent", "latent.format"),
    ("lora", "lora.format"),
    ("shared", "shared.intermediate_size"),
    ("shared", "shared.activation"),
    ("shared", "shared.bias"),
    ("shared", "shared.format"),
    ("shared", "shared.activation_quant"),
    ("shared", "shared.gate"),
    ("shared", "shared.combination"),
];

#[test]
fn as_many_samples_as_a_run_has_bring_every_pair_of_values() {
    let samples = samples(CPU_SAMPLES);
    let mut pairs = Pairs::none();
    samples[..GPU_SAMPLES].iter().for_each(|sample| pairs.add(sample));
    let on_device = pairs.all().into_iter().filter(|(_, seen)| *seen).count();
    samples[GPU_SAMPLES..].iter().for_each(|sample| pairs.add(sample));
    let all = pairs.all();
    let missing: Vec<_> = all.iter().filter(|(_, seen)| !seen).map(|(pair, _)| *pair).collect();
    let had = all.len() - missing.len();
    println!("{had} of {} pairs, {on_device} of them on the device", all.len());
    // What is missing cannot be: no choice of the other fields has both values.
    let possible = |pair: &&[(usize, usize); 2]| {
        let rng = &mut Rng::with_seed(0xe4c1);
        (0..200).any(|_| {
            let mut choices = FIELDS.map(|(_, values)| rng.usize(0..values));
            pair.iter().for_each(|(field, value)| choices[*field] = *value);
            let sample = Sample::of(choices, rng);
            pair.iter().all(|(field, _)| sample.acts(FIELDS[*field].0))
        })
    };
    let named = |pair: &[(usize, usize); 2]| pair.map(|(field, value)| (FIELDS[field].0, value));
    let possible: Vec<_> = missing.par_iter().filter(possible).map(named).collect();
    assert!(possible.is_empty(), "{possible:?}");
    let excluding: BTreeSet<_> = missing.iter().map(|[(a, _), (b, _)]| (FIELDS[*a].0, FIELDS[*b].0)).collect();
    let order = |field: &str| FIELDS.iter().position(|(name, _)| *name == field);
    let beside_batches =
        OF_TOKENS.map(|field| if order(field) < order("entry") { (field, "entry") } else { ("entry", field) });
    assert_eq!(excluding, EXCLUDING.into_iter().chain(beside_batches).collect());
    // As many as so few can have: 92 of 100 when this was written.
    assert!(on_device * 100 >= had * 85, "{on_device} of {had}");
}
