//! Each family's config becomes the spec that is written out here, or a refusal that names the key.

use moewe::checkpoint::Checkpoint;
use moewe::error::{Error, Unsupported};
use moewe::families::{Request, resolve, resolve_router};
use moewe::spec::*;
use serde_json::json;

use crate::samples::{ANY, Sample, golden, says};

pub const SWIGLU: Activation = Activation::Swiglu { limit: None };
const FP8: WeightFormat = WeightFormat::Fp8Block { block: [128, 128], scale: ScaleFormat::F32 };

pub fn mlp(intermediate_size: usize, activation: Activation, format: WeightFormat) -> ExpertMlp {
    ExpertMlp {
        intermediate_size,
        activation,
        gate_up_layout: GateUpLayout::Separate,
        orientation: Orientation::OutIn,
        gate_up_bias: false,
        down_bias: false,
        format,
        activation_quant: ActivationQuant::None,
    }
}

pub fn sum(mlp: ExpertMlp) -> Option<SharedExperts> {
    Some(SharedExperts { mlp, gate: SharedGate::None, combination: SharedCombination::Sum })
}

/// A layer [E, k, H] of separate bf16 experts without shared expert.
pub fn layer(
    [num_experts, top_k, hidden_size]: [usize; 3],
    experts: ExpertMlp,
    method: RoutingMethod,
    renormalize: Option<Denominator>,
    routed_scaling_factor: f32,
) -> MoeSpec {
    MoeSpec {
        hidden_size,
        num_experts,
        top_k,
        router: Router::Linear {
            input: RouterInput::Hidden,
            format: WeightFormat::Bf16,
            bias: false,
            transform: LogitTransform::None,
        },
        routing: Routing {
            method,
            renormalize,
            routed_scaling_factor,
            apply_routed_scale_to_output: false,
            per_expert_scale: false,
            weight_position: WeightPosition::Output,
            zero_experts: None,
            nan_policy: NanPolicy::Zero,
        },
        experts,
        shared: None,
        latent: None,
        lora: None,
        expert_input: ExpertInput::Hidden,
        output_bias: false,
        output_norm: None,
        placement: Placement::All,
        shard: TensorShard::Whole,
        common_terms: CommonTerms::Here,
        entry: Entry::TokenMajor,
        precision: Precision {
            input: FloatType::Bf16,
            output: FloatType::F32,
            model: FloatType::F32,
            router_gemm: Rounding::F32,
            routing_weights: Rounding::F32,
            gate_up: Rounding::F32,
            weighted_input: Rounding::F32,
            activation: ActivationRounding::F32,
            combine: CombineRounding::F32,
            combine_order: CombineOrder::Slot,
            block_scale: BlockScale::Exact,
        },
    }
}

pub fn top_k(score: Score, key: SelectionKey, groups: Option<Groups>) -> RoutingMethod {
    RoutingMethod::TopK { score, key, groups }
}

const V3_GROUPS: Option<Groups> = Some(Groups { n_group: 4, topk_group: 2, score: GroupScore::Top2SumOfKey });
const EPS: Option<Denominator> = Some(Denominator::SumPlus { eps: 1e-20 });

fn deepseek_v3(shape: [usize; 3], inner: usize, format: WeightFormat) -> MoeSpec {
    let method = top_k(Score::Sigmoid, SelectionKey::ScorePlusBias, V3_GROUPS);
    let experts = mlp(inner, SWIGLU, format);
    MoeSpec { shared: sum(experts.clone()), ..layer(shape, experts, method, EPS, 2.5) }
}

fn deepseek_v4(method: RoutingMethod) -> MoeSpec {
    let experts = mlp(48, Activation::Swiglu { limit: Some(10.0) }, WeightFormat::Bf16);
    MoeSpec { shared: sum(experts.clone()), ..layer([8, 3, 128], experts, method, EPS, 1.5) }
}

fn qwen3_moe(shape: [usize; 3], inner: usize, format: WeightFormat) -> MoeSpec {
    let method = top_k(Score::Softmax, SelectionKey::Score, None);
    layer(shape, mlp(inner, SWIGLU, format), method, Some(Denominator::Sum), 1.0)
}

fn gpt_oss() -> MoeSpec {
    let mut spec = layer(
        [8, 4, 136],
        ExpertMlp {
            gate_up_layout: GateUpLayout::Interleaved,
            orientation: Orientation::InOut,
            gate_up_bias: true,
            down_bias: true,
            ..mlp(48, Activation::SwigluOai { alpha: 1.702, limit: Some(7.0), beta: 1.0 }, WeightFormat::Bf16)
        },
        RoutingMethod::TopKThenScore { score: ChosenScore::Softmax },
        None,
        1.0,
    );
    spec.router = Router::Linear {
        input: RouterInput::Hidden,
        format: WeightFormat::Bf16,
        bias: true,
        transform: LogitTransform::None,
    };
    spec
}

#[test]
fn every_golden_layer_resolves_to_its_spec() {
    let v4_top_k = top_k(Score::SqrtSoftplus, SelectionKey::ScorePlusBias, None);
    let v4_hash = RoutingMethod::Hash { score: Score::SqrtSoftplus, vocab_size: 96 };
    let mixtral = MoeSpec { ..qwen3_moe([8, 2, 160], 48, WeightFormat::Bf16) };
    let bf16 = WeightFormat::Bf16;
    let cases = [
        ("deepseek_v3", "deepseek_v3", 3, deepseek_v3([12, 4, 128], 48, bf16)),
        ("qwen3_moe", "qwen3_moe", 2, qwen3_moe([8, 4, 192], 48, bf16)),
        ("mixtral", "mixtral", 2, mixtral),
        ("gpt_oss", "gpt_oss", 2, gpt_oss()),
        ("deepseek_v4_topk", "deepseek_v4", 4, deepseek_v4(v4_top_k)),
        ("deepseek_v4_hash", "deepseek_v4", 1, deepseek_v4(v4_hash)),
        ("fp8_deepseek_v3", "deepseek_v3", 3, deepseek_v3([8, 3, 256], 128, FP8)),
        ("fp8_qwen3_moe_ue8m0", "qwen3_moe", 3, qwen3_moe([8, 2, 128], 128, FP8)),
    ];
    for (case, family, layer, spec) in cases {
        let checkpoint = Checkpoint::open(&golden(case)).unwrap();
        let resolved = resolve(&checkpoint, &ANY).unwrap();
        assert_eq!(resolved.spec, spec, "{case}");
        assert_eq!((resolved.family, resolved.model_type.as_str()), (family, family), "{case}");
        assert_eq!(resolved.layer, Some(layer), "{case}");
        assert_eq!(resolved.unknown_keys, [""; 0], "{case}");
        let weights = resolved.weights(&checkpoint).unwrap();
        assert_eq!(weights.experts.len(), spec.num_experts, "{case}");
        let fp8 = case.starts_with("fp8");
        let note = "activation_scheme = dynamic of the checkpoint is not applied: \
                    activations stay unquantised (--activations none)";
        assert_eq!(resolved.notes, if fp8 { vec![note.to_owned()] } else { vec![] }, "{case}");
        // The same layer by its number.
        let request = Request { layer: Some(layer), ..ANY };
        assert_eq!(resolve(&checkpoint, &request).unwrap().spec, spec, "{case}");
    }
}

#[test]
fn golden_routers_resolve_alone() {
    let gpt_oss = RoutingMethod::TopKThenScore { score: ChosenScore::Softmax };
    let groups = Some(Groups { n_group: 8, topk_group: 4, score: GroupScore::Top2SumOfKey });
    let softmax = top_k(Score::Softmax, SelectionKey::Score, None);
    let sum = Some(Denominator::Sum);
    let v3 = top_k(Score::Sigmoid, SelectionKey::ScorePlusBias, groups);
    let v4 = top_k(Score::SqrtSoftplus, SelectionKey::ScorePlusBias, None);
    let cases = [
        ("routing_deepseek_v3_256", [256, 8], v3, EPS, 2.5, Some(3), (false, true)),
        ("routing_deepseek_v4_256", [256, 6], v4, EPS, 1.5, Some(3), (false, true)),
        ("routing_qwen3_moe_128", [128, 8], softmax.clone(), sum, 1.0, Some(0), (false, false)),
        ("routing_mixtral_8", [8, 2], softmax, sum, 1.0, Some(0), (false, false)),
        ("routing_gpt_oss_128", [128, 4], gpt_oss, None, 1.0, Some(0), (true, false)),
    ];
    for (case, [num_experts, top_k], method, renormalize, rho, layer, (bias, selection_bias)) in cases {
        let checkpoint = Checkpoint::open(&golden(case)).unwrap();
        let resolved = resolve_router(&checkpoint, &ANY).unwrap();
        let Routing { method: found, renormalize: denominator, routed_scaling_factor, .. } = &resolved.spec.routing;
        assert_eq!((found, denominator, routed_scaling_factor), (&method, &renormalize, &rho), "{case}");
        assert_eq!([resolved.spec.num_experts, resolved.spec.top_k], [num_experts, top_k], "{case}");
        assert_eq!((resolved.layer, &resolved.unknown_keys), (layer, &vec![]), "{case}");
        let weights = resolved.router_weights(&checkpoint).unwrap();
        assert_eq!(weights.weight.unwrap().shape(), [num_experts, 64], "{case}");
        assert_eq!((weights.bias.is_some(), weights.selection_bias.is_some()), (bias, selection_bias), "{case}");
        assert!(resolved.weights(&checkpoint).unwrap().experts.is_empty(), "{case}");
    }
}

#[test]
fn a_router_resolves_alone_in_a_checkpoint_of_layers() {
    for case in ["deepseek_v3", "qwen3_moe", "mixtral", "gpt_oss", "deepseek_v4_topk"] {
        let checkpoint = Checkpoint::open(&golden(case)).unwrap();
        let whole = resolve(&checkpoint, &ANY).unwrap();
        let router = resolve_router(&checkpoint, &ANY).unwrap();
        assert_eq!((&router.spec.router, &router.spec.routing), (&whole.spec.router, &whole.spec.routing), "{case}");
        assert_eq!(router.layer, whole.layer);
        let (one, other) = (whole.router_weights(&checkpoint).unwrap(), router.router_weights(&checkpoint).unwrap());
        assert_eq!((one.bias, one.selection_bias), (other.bias, other.selection_bias), "{case}");
    }
    // A hash-routed layer only by its number.
    let checkpoint = Checkpoint::open(&golden("deepseek_v4_hash")).unwrap();
    assert!(matches!(resolve_router(&checkpoint, &ANY), Err(Error::MissingTensor { .. })));
    let hash = resolve_router(&checkpoint, &Request { layer: Some(1), ..ANY }).unwrap();
    assert_eq!(hash.router_weights(&checkpoint).unwrap().tid2eid.unwrap().len(), 96 * 3);
}

#[test]
fn an_architecture_that_nobody_knows_is_refused_by_name() {
    let error = Sample::golden("mixtral").set("model_type", "mixtral_of_mixtrals").resolve().unwrap_err();
    let Error::Unsupported(Unsupported { backend: _, field, value, because }) = error else { panic!("{error}") };
    assert_eq!((field.as_ref(), value.as_str()), ("model_type", "mixtral_of_mixtrals"));
    says(&because, &["no family of this name", "deepseek_v3", "zaya"]);
}

#[test]
fn keys_that_nobody_reads_are_reported() {
    let sample = Sample::golden("deepseek_v3").set("swiglu_limit", 10.0).set("use_moe_magic", true);
    assert_eq!(sample.resolve().unwrap().unknown_keys, ["swiglu_limit", "use_moe_magic"]);
    let mut sample = Sample::golden("fp8_deepseek_v3");
    sample.config["quantization_config"]["modules_to_not_convert"] = json!(["lm_head"]);
    sample.config["quantization_config"]["act_order"] = json!(true);
    assert_eq!(sample.resolve().unwrap().unknown_keys, ["quantization_config.act_order"]);
}

#[test]
fn a_nested_text_config_is_read() {
    let mut sample = Sample::golden("fp8_deepseek_v3");
    let mut text = std::mem::take(&mut sample.config);
    text.insert("moe_magic".into(), json!(1));
    let quantization = text.shift_remove("quantization_config").unwrap();
    sample = sample.set("model_type", "kimi_k25").set("vision_config", json!({})).set("tie_word_embeddings", false);
    sample = sample.set("quantization_config", quantization).set("swiglu_limit", 7).set("text_config", text);
    sample = sample.rename(|name| format!("language_model.{name}"));
    let resolved = sample.resolve().unwrap();
    assert_eq!(resolved.spec, deepseek_v3([8, 3, 256], 128, FP8));
    assert_eq!(resolved.model_type, "deepseek_v3");
    assert_eq!(resolved.unknown_keys, ["text_config.moe_magic", "swiglu_limit"]);

    sample.config["text_config"]["hidden_size"] = json!("128");
    says(&sample.refusal(), &["text_config.hidden_size", "\"128\"", "an integer"]);
    sample.config["text_config"]["quantization_config"] = json!({"quant_method": "mxfp4"});
    says(&sample.refusal(), &["quantization_config", "mxfp4", "one value in both places"]);
    says(&sample.set("text_config", 3).refusal(), &["text_config", "found 3", "an object"]);
}

#[test]
fn one_group_of_one_restricts_nothing() {
    let spec = Sample::golden("deepseek_v3").set("n_group", 1).set("topk_group", 1).resolve().unwrap().spec;
    assert_eq!(spec.routing.method, top_k(Score::Sigmoid, SelectionKey::ScorePlusBias, None));
}
