//! Behaviour of each field: two specs that differ only there, and an input for which the reference
//! moves far beyond tolerance. Each backend must match both, or refuse both with the field's name.

use moewe::host::Session;
use moewe::spec::*;
use moewe::{Error, Plan};

use crate::rig::{AUTO, LayerInputs, RandomLayer, deepseek_like, gpu, segmented};

/// A field and the change to it.
struct Witness {
    field: &'static str,
    /// What the spec is before, beside [`base`].
    before: fn(&mut MoeSpec),
    change: fn(&mut MoeSpec),
}

fn witness(field: &'static str, change: fn(&mut MoeSpec)) -> Witness {
    Witness { field, before: |_| {}, change }
}

/// A field that acts only where another has some value.
fn witness_of(field: &'static str, before: fn(&mut MoeSpec), change: fn(&mut MoeSpec)) -> Witness {
    Witness { field, before, change }
}

/// Every parameter away from its neutral value, and a model type whose roundings show.
fn base() -> MoeSpec {
    let mut spec = deepseek_like();
    spec.precision.model = FloatType::Bf16;
    spec
}

fn joint(spec: &mut MoeSpec) {
    spec.routing.method = RoutingMethod::JointNorm { num_shared: 2, global_scale: true };
    spec.routing.renormalize = None;
    if let Some(shared) = &mut spec.shared {
        shared.gate = SharedGate::Joint;
    }
}

fn sparsemixer(spec: &mut MoeSpec) {
    spec.top_k = 2;
    spec.routing.method = RoutingMethod::Sparsemixer { router_jitter_noise: 0.01 };
}

const PLAIN_RULE: ScaleRule = ScaleRule::FlooredAmax;

fn quantised(spec: &mut MoeSpec, span: ScaleSpan, rule: ScaleRule, scale: ActivationScale) {
    spec.experts.activation_quant = ActivationQuant::Dynamic { code: ActivationCode::E4m3, span, rule, scale };
}

fn by_group(spec: &mut MoeSpec) {
    quantised(spec, ScaleSpan::Group(32), PLAIN_RULE, ActivationScale::F32);
}

fn router_mlp(spec: &mut MoeSpec) {
    let format = WeightFormat::Bf16;
    spec.router = Router::Mlp { state_size: 10, rms_norm_eps: 1e-5, previous_state: true, format };
}

fn latent(spec: &mut MoeSpec, norm: LatentNorm) {
    spec.latent = Some(Latent { size: 8, format: WeightFormat::Bf16, norm });
}

/// Every field that changes a result without changing the weights' shapes. Destructured so that a new
/// field does not compile until it has a line here.
fn witnesses() -> Vec<Witness> {
    let spec = deepseek_like();
    let MoeSpec {
        hidden_size: _, // a shape
        num_experts: _, // a shape
        top_k: _,
        router,
        routing,
        experts,
        shared,
        latent: _,
        lora: _,
        expert_input: _,
        output_bias: _,
        output_norm: _,
        placement: _,
        shard: _,
        common_terms: _,
        entry: _,
        precision,
    } = &spec;
    let Router::Linear { input: _, format: _, bias: _, transform: _ } = router else { panic!("linear") };
    let Routing {
        method: _,
        renormalize: _,
        routed_scaling_factor: _,
        apply_routed_scale_to_output: _,
        per_expert_scale: _,
        weight_position: _,
        zero_experts: _,
        nan_policy: _, // see routing.rs: needs a score that is not finite
    } = routing;
    let ExpertMlp {
        intermediate_size: _, // a shape
        activation: _,
        gate_up_layout: _, // how MoeWeights reads a checkpoint: families tests
        orientation: _,    // likewise
        gate_up_bias: _,   // presence of a tensor: MoeWeights::check
        down_bias: _,      // likewise
        format: _,         // type of a tensor: Matrix::view
        activation_quant: _,
    } = experts;
    let Some(SharedExperts { mlp: _, gate: _, combination: _ }) = shared else { panic!("shared") };
    let Precision {
        input: _, // type of a caller's buffer: lockstep
        output: _,
        model: _,
        router_gemm: _,
        routing_weights: _,
        weighted_input: _,
        gate_up: _,
        activation: _,
        combine: _,
        combine_order: _,
        block_scale: _,
    } = precision;
    vec![
        witness("top_k", |spec| spec.top_k = 2),
        witness("router.transform", |spec| transform(spec, LogitTransform::Multiply { factor: 0.25 })),
        witness("router.transform", |spec| transform(spec, LogitTransform::SoftCap { cap: 1.0 })),
        witness_of(
            "router.transform.cap",
            |spec| transform(spec, LogitTransform::SoftCap { cap: 1.0 }),
            |spec| transform(spec, LogitTransform::SoftCap { cap: 2.0 }),
        ),
        witness_of(
            "router.transform.factor",
            |spec| transform(spec, LogitTransform::Multiply { factor: 0.25 }),
            |spec| transform(spec, LogitTransform::Multiply { factor: 0.5 }),
        ),
        witness("router.input", |spec| router_input(spec, RouterInput::RmsNormScaled { eps: 1e-6 })),
        witness_of(
            "router.input.eps",
            |spec| router_input(spec, RouterInput::RmsNormScaled { eps: 1e-6 }),
            |spec| router_input(spec, RouterInput::RmsNormScaled { eps: 3.0 }),
        ),
        witness("router", router_mlp),
        witness_of("router.rms_norm_eps", router_mlp, |spec| {
            let format = WeightFormat::Bf16;
            spec.router = Router::Mlp { state_size: 10, rms_norm_eps: 2.0, previous_state: true, format };
        }),
        witness_of("router.previous_state", router_mlp, |spec| {
            let format = WeightFormat::Bf16;
            spec.router = Router::Mlp { state_size: 10, rms_norm_eps: 1e-5, previous_state: false, format };
        }),
        witness("router", |spec| spec.router = Router::Given { transform: LogitTransform::None }),
        witness("method.score", |spec| set_method(spec, |score, _, _| *score = Score::SqrtSoftplus)),
        witness("method.key", |spec| set_method(spec, |_, key, _| *key = SelectionKey::LogitPlusBias)),
        witness("method.groups", |spec| set_method(spec, |_, _, groups| *groups = None)),
        witness("groups.n_group", |spec| set_groups(spec, |groups| groups.n_group = 6)),
        witness("groups.topk_group", |spec| set_groups(spec, |groups| groups.topk_group = 1)),
        witness("groups.score", |spec| set_groups(spec, |groups| groups.score = GroupScore::MaxOfScore)),
        witness("routing.method", sparsemixer),
        witness_of("method.router_jitter_noise", sparsemixer, |spec| {
            spec.routing.method = RoutingMethod::Sparsemixer { router_jitter_noise: 0.3 };
        }),
        witness("routing.method", joint),
        witness_of("method.num_shared", joint, |spec| {
            spec.routing.method = RoutingMethod::JointNorm { num_shared: 1, global_scale: true };
        }),
        witness_of("method.global_scale", joint, |spec| {
            spec.routing.method = RoutingMethod::JointNorm { num_shared: 2, global_scale: false };
        }),
        witness("routing.method", |spec| {
            spec.routing.method = RoutingMethod::TopKThenScore { score: ChosenScore::Softmax };
        }),
        witness("routing.method", |spec| {
            spec.routing.method = RoutingMethod::TopKThenScore { score: ChosenScore::Sigmoid };
        }),
        witness("routing.method", |spec| {
            spec.routing.method = RoutingMethod::Hash { score: Score::Sigmoid, vocab_size: 50 };
        }),
        witness("routing.renormalize", |spec| spec.routing.renormalize = None),
        witness("renormalize.eps", |spec| spec.routing.renormalize = Some(Denominator::SumPlus { eps: 0.5 })),
        witness("renormalize.floor", |spec| spec.routing.renormalize = Some(Denominator::AtLeast { floor: 5.0 })),
        witness("routing.renormalize", |spec| spec.routing.renormalize = Some(Denominator::PNorm { p: 2.0 })),
        witness("routing.routed_scaling_factor", |spec| spec.routing.routed_scaling_factor = 1.0),
        witness("routing.apply_routed_scale_to_output", |spec| spec.routing.apply_routed_scale_to_output = true),
        witness("routing.per_expert_scale", |spec| spec.routing.per_expert_scale = true),
        witness("routing.weight_position", |spec| spec.routing.weight_position = WeightPosition::Input),
        // Without a bias behind it, a factor before the down projection is one on its output.
        witness_of(
            "routing.weight_position",
            |spec| spec.experts.down_bias = true,
            |spec| spec.routing.weight_position = WeightPosition::BeforeDown,
        ),
        witness("routing.zero_experts", |spec| {
            spec.routing.zero_experts = Some(ZeroExperts { count: 4, kind: ZeroExpertKind::Identity });
        }),
        witness_of(
            "zero_experts.kind",
            |spec| spec.routing.zero_experts = Some(ZeroExperts { count: 4, kind: ZeroExpertKind::Identity }),
            |spec| spec.routing.zero_experts = Some(ZeroExperts { count: 4, kind: ZeroExpertKind::Skip }),
        ),
        witness("experts.activation.limit", |spec| spec.experts.activation = Activation::Swiglu { limit: None }),
        witness("experts.activation.limit", |spec| spec.experts.activation = Activation::Swiglu { limit: Some(0.2) }),
        witness("experts.activation", |spec| {
            spec.experts.activation = Activation::SwigluClampAfter { limit: 0.75 };
        }),
        witness("experts.activation.alpha", |spec| {
            spec.experts.activation = Activation::SwigluOai { alpha: 1.702, limit: Some(0.75), beta: 0.0 };
        }),
        witness("experts.activation.beta", |spec| {
            spec.experts.activation = Activation::SwigluOai { alpha: 1.0, limit: Some(0.75), beta: 1.0 };
        }),
        witness("experts.activation", |spec| {
            spec.experts.activation = Activation::Situ { beta: 4.0, linear_beta: 25.0 };
        }),
        witness_of(
            "activation.beta",
            |spec| spec.experts.activation = Activation::Situ { beta: 4.0, linear_beta: 25.0 },
            |spec| spec.experts.activation = Activation::Situ { beta: 1.0, linear_beta: 25.0 },
        ),
        witness_of(
            "activation.linear_beta",
            |spec| spec.experts.activation = Activation::Situ { beta: 4.0, linear_beta: 25.0 },
            |spec| spec.experts.activation = Activation::Situ { beta: 4.0, linear_beta: 1.0 },
        ),
        witness("experts.activation", |spec| spec.experts.activation = Activation::GeluTanh),
        witness("experts.activation", |spec| spec.experts.activation = Activation::GeluErf),
        witness("experts.activation_quant", |spec| {
            spec.experts.activation_quant = ActivationQuant::dynamic_fp8(128, ActivationScale::F32);
        }),
        witness("activation_quant.span", |spec| quantised(spec, ScaleSpan::Token, PLAIN_RULE, ActivationScale::F32)),
        witness("activation_quant.span", |spec| quantised(spec, ScaleSpan::Tensor, PLAIN_RULE, ActivationScale::F32)),
        witness_of("activation_quant.scale", by_group, |spec| {
            quantised(spec, ScaleSpan::Group(32), PLAIN_RULE, ActivationScale::F32CeilPow2);
        }),
        witness_of("activation_quant.rule", by_group, |spec| {
            let rule = ScaleRule::FlooredScale { upper: Some(1e-3) };
            quantised(spec, ScaleSpan::Group(32), rule, ActivationScale::F32);
        }),
        witness_of("activation_quant.code", by_group, |spec| {
            let (span, rule, scale) = (ScaleSpan::Group(32), PLAIN_RULE, ActivationScale::F32);
            let code = ActivationCode::Int8;
            spec.experts.activation_quant = ActivationQuant::Dynamic { code, span, rule, scale };
        }),
        witness("experts.activation_quant", |spec| {
            spec.experts.activation_quant = ActivationQuant::Static { code: ActivationCode::E4m3 };
        }),
        witness("shared.mlp.activation_quant", |spec| {
            if let Some(shared) = &mut spec.shared {
                shared.mlp.activation_quant = ActivationQuant::dynamic_fp8(32, ActivationScale::F32);
            }
        }),
        witness("shared.mlp.activation.limit", |spec| {
            if let Some(shared) = &mut spec.shared {
                shared.mlp.activation = Activation::Swiglu { limit: None };
            }
        }),
        witness("shared", |spec| spec.shared = None),
        witness("shared.gate", |spec| {
            if let Some(shared) = &mut spec.shared {
                shared.gate = SharedGate::Sigmoid { format: WeightFormat::Bf16 };
            }
        }),
        witness("shared.combination", |spec| {
            if let Some(shared) = &mut spec.shared {
                shared.combination = SharedCombination::Average;
            }
        }),
        witness("latent", |spec| latent(spec, LatentNorm::None)),
        witness_of(
            "latent.norm",
            |spec| latent(spec, LatentNorm::None),
            |spec| latent(spec, LatentNorm::Reduced { eps: 1e-5 }),
        ),
        witness_of(
            "latent.norm",
            |spec| latent(spec, LatentNorm::None),
            |spec| latent(spec, LatentNorm::PreAndPost { pre_eps: 1e-5, post_eps: 1e-5 }),
        ),
        witness_of(
            "latent.norm.eps",
            |spec| latent(spec, LatentNorm::Reduced { eps: 1e-5 }),
            |spec| latent(spec, LatentNorm::Reduced { eps: 0.5 }),
        ),
        witness_of(
            "latent.norm.pre_eps",
            |spec| latent(spec, LatentNorm::PreAndPost { pre_eps: 1e-5, post_eps: 1e-5 }),
            |spec| latent(spec, LatentNorm::PreAndPost { pre_eps: 0.5, post_eps: 1e-5 }),
        ),
        witness_of(
            "latent.norm.post_eps",
            |spec| latent(spec, LatentNorm::PreAndPost { pre_eps: 1e-5, post_eps: 1e-5 }),
            |spec| latent(spec, LatentNorm::PreAndPost { pre_eps: 1e-5, post_eps: 0.5 }),
        ),
        witness("lora", |spec| {
            spec.lora = Some(Lora { num_adapters: 1, rank: 2, format: WeightFormat::Bf16, delta: LoraDelta::F32 });
        }),
        witness("expert_input", |spec| spec.expert_input = ExpertInput::Separate),
        witness("output_bias", |spec| spec.output_bias = true),
        witness("output_norm", |spec| spec.output_norm = Some(OutputNorm { eps: 1e-6 })),
        witness_of(
            "output_norm.eps",
            |spec| spec.output_norm = Some(OutputNorm { eps: 1e-6 }),
            |spec| spec.output_norm = Some(OutputNorm { eps: 1.0 }),
        ),
        witness_of(
            "common_terms",
            |spec| spec.placement = Placement::Range { first: 0, count: 6 },
            |spec| spec.common_terms = CommonTerms::Elsewhere,
        ),
        witness("placement", |spec| spec.placement = Placement::Range { first: 0, count: 6 }),
        witness("shard", |spec| {
            spec.shard = TensorShard::Part { first: 0, size: 8, owns_down_bias: true };
        }),
        witness_of(
            "entry",
            |spec| {
                spec.router = Router::Given { transform: LogitTransform::None };
                spec.shared = None;
            },
            |spec| spec.entry = Entry::Batched { capacity: 8 },
        ),
        witness("precision.output", |spec| spec.precision.output = FloatType::Bf16),
        witness("precision.router_gemm", |spec| spec.precision.router_gemm = Rounding::Model),
        witness("precision.routing_weights", |spec| spec.precision.routing_weights = Rounding::Model),
        witness_of(
            "precision.weighted_input",
            |spec| spec.routing.weight_position = WeightPosition::Input,
            |spec| spec.precision.weighted_input = Rounding::Model,
        ),
        witness("precision.gate_up", |spec| spec.precision.gate_up = Rounding::Model),
        witness("precision.activation", |spec| spec.precision.activation = ActivationRounding::Fused),
        witness_of(
            "precision.activation",
            |spec| spec.precision.activation = ActivationRounding::Fused,
            |spec| spec.precision.activation = ActivationRounding::Torch,
        ),
        witness("precision.combine", |spec| spec.precision.combine = CombineRounding::WeightedRows),
        witness("precision.combine", |spec| spec.precision.combine = CombineRounding::EveryStep),
        witness_of(
            "precision.model",
            |spec| spec.precision.combine = CombineRounding::EveryStep,
            |spec| spec.precision.model = FloatType::F16,
        ),
        // In f32 the order is below every tolerance: it shows where each partial sum is rounded.
        witness_of(
            "precision.combine_order",
            |spec| spec.precision.combine = CombineRounding::EveryStep,
            |spec| spec.precision.combine_order = CombineOrder::Expert,
        ),
        witness("precision.block_scale", |spec| spec.precision.block_scale = BlockScale::Folded),
    ]
}

fn transform(spec: &mut MoeSpec, transform: LogitTransform) {
    let format = WeightFormat::Bf16;
    spec.router = Router::Linear { input: RouterInput::Hidden, format, bias: false, transform };
}

fn router_input(spec: &mut MoeSpec, input: RouterInput) {
    let format = WeightFormat::Bf16;
    spec.router = Router::Linear { input, format, bias: false, transform: LogitTransform::None };
}

fn set_method(spec: &mut MoeSpec, change: fn(&mut Score, &mut SelectionKey, &mut Option<Groups>)) {
    if let RoutingMethod::TopK { score, key, groups } = &mut spec.routing.method {
        change(score, key, groups);
    }
}

fn set_groups(spec: &mut MoeSpec, change: fn(&mut Groups)) {
    if let RoutingMethod::TopK { score: _, key: _, groups: Some(groups) } = &mut spec.routing.method {
        change(groups);
    }
}

/// rel_fro: what two outputs differ by, relative to the first. Different experts count as different.
fn distance(a: &[f32], b: &[f32]) -> f64 {
    if a.len() != b.len() {
        return f64::INFINITY;
    }
    let square = |values: &mut dyn Iterator<Item = f64>| values.map(|value| value * value).sum::<f64>().sqrt();
    let difference = square(&mut a.iter().zip(b).map(|(a, b)| f64::from(a - b)));
    difference / square(&mut a.iter().map(|&a| f64::from(a))).max(1e-30)
}

/// Output, weights and shares of the reference.
fn judged(layer: &RandomLayer, inputs: &LayerInputs) -> Vec<f32> {
    let layer = layer.judge(inputs.view());
    [layer.output, layer.routed.topk_weights, layer.routed.shared_weights].concat()
}

const TOKENS: usize = 48;
const SEED: u64 = 21;
/// Backends are right to about 1e-6; a field counts as acting if it moves the output a hundred times that.
const MATCHES: f64 = 1e-5;
const MOVES: f64 = 1e-3;
/// Beside the middle of two bf16 values a difference of 1e-6 becomes one of 2^-8, in one of some thousand values:
/// a rounding has to move the output several times as far as that.
const MATCHES_ROUNDED: f64 = 1e-4;
const MOVES_ROUNDED: f64 = 2e-4;
const ROUNDING_RATIO: f64 = 5.0;

fn run<B: moewe::host::Host>(backend: B, layer: &RandomLayer, inputs: &LayerInputs) -> Result<Vec<f32>, Error> {
    let plan = Plan::new(backend, &layer.spec, &layer.weights(), layer.tokens(TOKENS), &segmented(&AUTO))?;
    let outcome = Session::new(plan, &layer.spec)?.run(&inputs.view())?;
    Ok([outcome.output, outcome.topk_weights, outcome.shared_weights].concat())
}

/// Numbers of witnesses that a backend matches and refuses.
fn judge<B: moewe::host::Host + Clone>(backend: &B) -> (usize, Vec<&'static str>) {
    let name = backend.facts().backend;
    let layer = |spec: MoeSpec| {
        let mut layer = RandomLayer::new(spec, SEED);
        layer.soften_bias();
        layer
    };
    let (mut matched, mut refused) = (0, vec![]);
    for Witness { field, before, change } in witnesses() {
        let mut neutral = base();
        before(&mut neutral);
        let mut spec = neutral.clone();
        change(&mut spec);
        assert_ne!(spec, neutral, "{field}: the witness changes nothing");
        let (neutral, changed) = (layer(neutral), layer(spec));
        let inputs = changed.all_inputs(TOKENS, 22);
        match run(backend.clone(), &changed, &inputs) {
            Ok(output) => {
                let want = judged(&changed, &inputs);
                let rounded = neutral.spec.precision != changed.spec.precision;
                let (matches, moves) = if rounded { (MATCHES_ROUNDED, MOVES_ROUNDED) } else { (MATCHES, MOVES) };
                let off = distance(&want, &output);
                assert!(off < matches, "{name}: {field} is wrong by {off}: {:?}", changed.spec);
                let inputs = neutral.all_inputs(TOKENS, 22);
                let neutral = judged(&neutral, &inputs);
                let moved = distance(&neutral, &want);
                let shows = moved > moves && moved > ROUNDING_RATIO * off;
                assert!(shows, "{field}: the witness moves the reference by {moved} only, {name} is off by {off}");
                matched += 1;
            }
            Err(Error::Unsupported(refusal)) => {
                assert_eq!(refusal.backend, name);
                assert!(
                    refusal.field.contains(field) || field.contains(&*refusal.field),
                    "{name}: {field} is refused as {refusal}"
                );
                // `supports` gives the same answer without planning.
                let early = moewe::supports(backend, &changed.spec, TOKENS).unwrap_err();
                assert_eq!(early.to_string(), refusal.to_string());
                refused.push(field);
            }
            Err(error) => panic!("{name}: {field}: {error}"),
        }
    }
    (matched, refused)
}

/// What no backend has yet.
const REFUSED: [&str; 1] = ["precision.block_scale"];

#[test]
fn each_field_acts_or_is_refused_by_name_on_cpu() {
    assert_eq!(judge(&moewe::Cpu::new()), (witnesses().len() - REFUSED.len(), REFUSED.to_vec()));
}

#[test]
fn each_field_acts_or_is_refused_by_name_on_wgpu() {
    assert_eq!(judge(gpu()), (witnesses().len() - REFUSED.len(), REFUSED.to_vec()));
}
