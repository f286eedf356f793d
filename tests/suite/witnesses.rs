//! Behaviour of each field: two specs that differ only there, and an input for which the reference
//! moves far beyond tolerance. Each backend must match both, or refuse both with the field's name.

use moewe::host::Session;
use moewe::reference::Inputs;
use moewe::spec::*;
use moewe::{Error, Plan};

use crate::rig::{AUTO, RandomLayer, deepseek_like, gpu, segmented};

/// A field and the change to it.
struct Witness {
    field: &'static str,
    change: fn(&mut MoeSpec),
}

fn witness(field: &'static str, change: fn(&mut MoeSpec)) -> Witness {
    Witness { field, change }
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
        placement: _,
        shard: _,
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
        model: _, // only with Rounding::Model
        router_gemm: _,
        routing_weights: _,
        gate_up: _,
        activation: _,
        combine: _,
        combine_order: _,
        block_scale: _,
    } = precision;
    vec![
        witness("top_k", |spec| spec.top_k = 2),
        witness("router.transform", |spec| {
            let format = WeightFormat::Bf16;
            let transform = LogitTransform::Multiply { factor: 0.25 };
            spec.router = Router::Linear { input: RouterInput::Hidden, format, bias: false, transform };
        }),
        witness("router.input", |spec| {
            let input = RouterInput::RmsNormScaled { eps: 1e-6 };
            let (format, transform) = (WeightFormat::Bf16, LogitTransform::None);
            spec.router = Router::Linear { input, format, bias: false, transform };
        }),
        witness("method.score", |spec| set_method(spec, |score, _, _| *score = Score::SqrtSoftplus)),
        witness("method.key", |spec| set_method(spec, |_, key, _| *key = SelectionKey::LogitPlusBias)),
        witness("method.groups", |spec| set_method(spec, |_, _, groups| *groups = None)),
        witness("groups.n_group", |spec| set_groups(spec, |groups| groups.n_group = 6)),
        witness("groups.topk_group", |spec| set_groups(spec, |groups| groups.topk_group = 1)),
        witness("groups.score", |spec| set_groups(spec, |groups| groups.score = GroupScore::MaxOfScore)),
        witness("routing.method", |spec| {
            spec.top_k = 2;
            spec.routing.method = RoutingMethod::Sparsemixer { router_jitter_noise: 0.01 };
        }),
        witness("routing.renormalize", |spec| spec.routing.renormalize = None),
        witness("renormalize.eps", |spec| spec.routing.renormalize = Some(Denominator::SumPlus { eps: 0.5 })),
        witness("renormalize.floor", |spec| spec.routing.renormalize = Some(Denominator::AtLeast { floor: 5.0 })),
        witness("routing.renormalize", |spec| spec.routing.renormalize = Some(Denominator::PNorm { p: 2.0 })),
        witness("routing.routed_scaling_factor", |spec| spec.routing.routed_scaling_factor = 1.0),
        witness("routing.apply_routed_scale_to_output", |spec| spec.routing.apply_routed_scale_to_output = true),
        witness("routing.per_expert_scale", |spec| spec.routing.per_expert_scale = true),
        witness("routing.weight_position", |spec| spec.routing.weight_position = WeightPosition::Input),
        witness("routing.weight_position", |spec| spec.routing.weight_position = WeightPosition::BeforeDown),
        witness("routing.zero_experts", |spec| {
            spec.routing.zero_experts = Some(ZeroExperts { count: 4, kind: ZeroExpertKind::Identity });
        }),
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
        witness("experts.activation", |spec| spec.experts.activation = Activation::GeluTanh),
        witness("experts.activation", |spec| spec.experts.activation = Activation::GeluErf),
        witness("experts.activation_quant", |spec| {
            let quant = ActivationQuant::DynamicFp8 { group: 128, scale: ActivationScale::F32 };
            spec.experts.activation_quant = quant;
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
        witness("latent", |spec| {
            spec.latent = Some(Latent { size: 8, format: WeightFormat::Bf16, norm: LatentNorm::None });
        }),
        witness("lora", |spec| {
            spec.lora = Some(Lora { num_adapters: 1, rank: 2, delta: LoraDelta::F32 });
        }),
        witness("expert_input", |spec| spec.expert_input = ExpertInput::Separate),
        witness("output_bias", |spec| spec.output_bias = true),
        witness("placement", |spec| spec.placement = Placement::Range { first: 0, count: 6 }),
        witness("shard", |spec| {
            spec.shard = TensorShard::Part { first: 0, size: 8, owns_down_bias: true };
        }),
        witness("entry", |spec| spec.entry = Entry::Batched { capacity: 8 }),
        witness("precision.output", |spec| spec.precision.output = FloatType::Bf16),
        witness("precision.router_gemm", |spec| spec.precision.router_gemm = Rounding::Model),
        witness("precision.routing_weights", |spec| spec.precision.routing_weights = Rounding::Model),
        witness("precision.gate_up", |spec| spec.precision.gate_up = Rounding::Model),
        witness("precision.activation", |spec| spec.precision.activation = ActivationRounding::Torch),
        witness("precision.combine", |spec| spec.precision.combine = CombineRounding::EveryStep),
        witness("precision.combine_order", |spec| spec.precision.combine_order = CombineOrder::Expert),
        witness("precision.block_scale", |spec| spec.precision.block_scale = BlockScale::Folded),
    ]
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

/// Output and weights of the reference.
fn judged(layer: &RandomLayer, hidden_states: &[f32]) -> Vec<f32> {
    let layer = layer.reference(hidden_states, None);
    [layer.output, layer.routed.topk_weights].concat()
}

/// Backends are right to about 1e-6; a field counts as acting if it moves the output a hundred times that.
const TOKENS: usize = 48;
const SEED: u64 = 21;
const MATCHES: f64 = 1e-5;
const MOVES: f64 = 1e-3;

fn run<B: moewe::host::Host>(backend: B, layer: &RandomLayer, inputs: &Inputs<'_>) -> Result<Vec<f32>, Error> {
    let plan = Plan::new(backend, &layer.spec, &layer.weights(), TOKENS, &segmented(&AUTO))?;
    let outcome = Session::new(plan, &layer.spec)?.run(inputs)?;
    Ok([outcome.output, outcome.topk_weights].concat())
}

fn judge<B: moewe::host::Host + Clone>(backend: &B) -> (usize, usize) {
    let mut base = RandomLayer::new(deepseek_like(), SEED);
    base.soften_bias();
    let (hidden_states, _) = base.inputs(TOKENS, 22);
    let inputs = Inputs { hidden_states: &hidden_states, token_ids: None, logits: None };
    let neutral = judged(&base, &hidden_states);
    assert!(distance(&neutral, &run(backend.clone(), &base, &inputs).unwrap()) < MATCHES);
    let name = backend.facts().backend;
    let (mut matched, mut refused) = (0, 0);
    for Witness { field, change } in witnesses() {
        let mut spec = deepseek_like();
        change(&mut spec);
        assert_ne!(spec, deepseek_like(), "{field}: the witness changes nothing");
        let mut changed = RandomLayer::new(spec, SEED);
        changed.soften_bias();
        match run(backend.clone(), &changed, &inputs) {
            Ok(output) => {
                let want = judged(&changed, &hidden_states);
                assert!(distance(&want, &output) < MATCHES, "{name}: {field} is wrong: {:?}", changed.spec);
                // Rounding the output moves it by up to half an ulp of bf16.
                assert!(distance(&neutral, &want) > MOVES, "{field}: the witness does not move the reference");
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
                refused += 1;
            }
            Err(error) => panic!("{name}: {field}: {error}"),
        }
    }
    (matched, refused)
}

#[test]
fn each_field_acts_or_is_refused_by_name_on_cpu() {
    assert_eq!(judge(&moewe::Cpu::new()), (20, 28));
}

#[test]
fn each_field_acts_or_is_refused_by_name_on_wgpu() {
    assert_eq!(judge(gpu()), (20, 28));
}
