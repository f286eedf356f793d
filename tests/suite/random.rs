//! Random specs that together have every pair of field values.

use std::collections::BTreeSet;

use fastrand::Rng;
use moewe::spec::*;

use crate::rig::fits;

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

const QUANTS: [ActivationQuant; 11] = {
    use ActivationCode::{E4m3, Int8};
    use ActivationScale::{F32, F32CeilPow2, Ue8m0Packed};
    [
        ActivationQuant::None,
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
const ROUNDINGS: [Rounding; 2] = [Rounding::F32, Rounding::Model];

/// Fields and how many values each has. A spec is first one number for each of them.
const FIELDS: [(&str, usize); 52] = [
    ("hidden_size", 8),
    ("num_experts", 9),
    ("top_k", 4),
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
    ("experts.intermediate_size", 8),
    ("experts.activation", ACTIVATIONS.len()),
    ("experts.gate_up_bias", 2),
    ("experts.down_bias", 2),
    ("experts.format", FORMATS.len()),
    ("experts.activation_quant", QUANTS.len()),
    ("shared", 2),
    ("shared.intermediate_size", 5),
    ("shared.activation", ACTIVATIONS.len()),
    ("shared.bias", 2),
    ("shared.format", 11),
    ("shared.activation_quant", QUANTS.len()),
    ("shared.gate", 2),
    ("shared.combination", 2),
    ("latent", 4),
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
    ("entry", 4),
];

type Choices = [usize; FIELDS.len()];

/// Pairs of choices that a set of specs has.
#[derive(Default)]
pub struct Pairs(BTreeSet<(usize, usize, usize, usize)>);

impl Pairs {
    fn add(&mut self, choices: &Choices) {
        for a in 0..choices.len() {
            for b in 0..a {
                self.0.insert((b, choices[b], a, choices[a]));
            }
        }
    }

    fn new_with(&self, choices: &Choices, field: usize) -> usize {
        let pair = |other: usize| {
            let (a, b) = (field.min(other), field.max(other));
            (a, choices[a], b, choices[b])
        };
        (0..choices.len()).filter(|&other| other != field && !self.0.contains(&pair(other))).count()
    }
}

/// The first `count` of a sequence in which each brings many pairs that those before it lacked.
fn covering(count: usize) -> Vec<Choices> {
    let mut pairs = Pairs::default();
    let rng = &mut Rng::with_seed(0xa12);
    (0..count)
        .map(|_| {
            let mut choices: Choices = FIELDS.map(|(_, values)| rng.usize(0..values));
            // One value of each field in turn, the one that makes most new pairs; random where none does.
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
            pairs.add(&choices);
            choices
        })
        .collect()
}

/// Whether the codes of such weights can meet codes of activations.
pub fn sums_codes(format: WeightFormat) -> bool {
    !matches!(format, WeightFormat::Q4K | WeightFormat::Int4 { act_order: true, .. })
}

/// `count` specs that have, where `count` allows, every pair of field values but those that exclude each other.
pub fn specs(count: usize) -> Vec<MoeSpec> {
    let rngs = (0..).map(|seed| Rng::with_seed(0x5bec + seed));
    covering(count).iter().zip(rngs).map(|(choices, mut rng)| spec(choices, &mut rng)).collect()
}

/// A spec that nothing steers.
pub fn random_spec(rng: &mut Rng) -> MoeSpec {
    let choices = FIELDS.map(|(_, values)| rng.usize(0..values));
    spec(&choices, rng)
}

/// The spec of these choices; where two of them exclude each other, the later field gives way.
fn spec(choices: &Choices, rng: &mut Rng) -> MoeSpec {
    let choice = |name: &str| choices[FIELDS.iter().position(|(field, _)| *field == name).unwrap()];
    // Blocks of 256 columns would hardly ever meet two widths that are whole blocks.
    let super_blocks = !fits(FORMATS[choice("experts.format")], 64);
    let whole = |size: usize| if super_blocks { 256 } else { size };
    let hidden_size = whole([1, 4, 5, 24, 64, 100, 130, 256][choice("hidden_size")]);
    // Formats whose codes share bytes or blocks give way where a row does not fill them.
    let fitting = |format: WeightFormat, cols: &[usize]| match cols.iter().all(|&cols| fits(format, cols)) {
        true => format,
        false => WeightFormat::Fp8Channel,
    };
    let num_experts: usize = [1, 2, 3, 6, 8, 12, 16, 60, 65][choice("num_experts")];
    let joint = choice("method") == 4;
    let mut latent = (choice("latent") > 0).then(|| Latent {
        size: whole([7, 20, 36, 256][rng.usize(0..4)]),
        format: FORMATS[rng.usize(0..FORMATS.len())],
        norm: match choice("latent") {
            1 => LatentNorm::None,
            2 => LatentNorm::Reduced { eps: 1e-5 },
            _ => LatentNorm::PreAndPost { pre_eps: 1e-5, post_eps: 1e-6 },
        },
    });
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
    // The last: all that may be chosen, up to 12.
    let mut top_k = [1, 2, 4, 12][choice("top_k")].min(allowed);
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
    if let Some(latent) = &mut latent {
        latent.format = fitting(latent.format, &[hidden_size, latent.size]);
    }
    let width = latent.as_ref().map_or(hidden_size, |latent| latent.size);
    let format = fitting(FORMATS[choice("router.format")], &[hidden_size, 256]);
    let router = match choice("router") {
        kind @ (0 | 1) => Router::Linear {
            input: if kind == 0 { RouterInput::Hidden } else { RouterInput::RmsNormScaled { eps: 1e-6 } },
            format,
            bias: choice("router.bias") == 1,
            transform,
        },
        2 => Router::Given { transform },
        kind => Router::Mlp { state_size: 19, rms_norm_eps: 1e-5, previous_state: kind == 3, format },
    };
    // The shared experts' is every second one, beginning at one of two.
    let format_of = |path: &str, width: usize, inner: usize| {
        let at = choice(&format!("{path}.format"));
        let at = if path == "shared" { (2 * at + num_experts % 2) % FORMATS.len() } else { at };
        fitting(FORMATS[at], &[width, inner])
    };
    let mlp = |path: &str, width: usize, inner: usize, gate_up_bias: bool, down_bias: bool| ExpertMlp {
        intermediate_size: inner,
        activation: ACTIVATIONS[choice(&format!("{path}.activation"))],
        gate_up_layout: GateUpLayout::Separate,
        orientation: Orientation::OutIn,
        gate_up_bias,
        down_bias,
        format: format_of(path, width, inner),
        activation_quant: match QUANTS[choice(&format!("{path}.activation_quant"))] {
            // Minima and orders need numbers.
            _ if !sums_codes(format_of(path, width, inner)) => ActivationQuant::None,
            quant => quant,
        },
    };
    let inner = whole([1, 3, 16, 33, 48, 80, 131, 256][choice("experts.intermediate_size")]);
    let experts = mlp("experts", width, inner, choice("experts.gate_up_bias") == 1, choice("experts.down_bias") == 1);
    let bias = choice("shared.bias") == 1;
    let shared = (joint || choice("shared") == 1).then(|| SharedExperts {
        mlp: mlp("shared", hidden_size, [1, 20, 33, 64, 256][choice("shared.intermediate_size")], bias, bias),
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
    if choice("entry") == 3 {
        spec.entry = Entry::Batched { capacity: [1, 3, 8, 70][rng.usize(0..4)] };
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

/// Specs of one run of the property tests.
pub const SPECS: usize = 340;

#[test]
fn as_many_specs_as_a_run_has_bring_every_pair_of_field_values() {
    let mut pairs = Pairs::default();
    covering(SPECS).iter().for_each(|choices| pairs.add(choices));
    let missing = |a: usize, b: usize| {
        let all = (0..FIELDS[a].1).flat_map(move |x| (0..FIELDS[b].1).map(move |y| (a, x, b, y)));
        all.filter(|pair| !pairs.0.contains(pair))
            .map(|(a, x, b, y)| (FIELDS[a].0, x, FIELDS[b].0, y))
            .collect::<Vec<_>>()
    };
    let missing: Vec<_> =
        (0..FIELDS.len()).flat_map(|b| (0..b).map(move |a| (a, b))).flat_map(|(a, b)| missing(a, b)).collect();
    assert!(missing.is_empty(), "{missing:?}");
}
