//! Each family that the golden set lacks: a small checkpoint with the published keys and names becomes the spec that
//! is written out here, and every layout of its experts gives the same output, bit for bit.
//!
//! A long file on purpose: most of it is one table, a family's config, tensors and spec side by side.

use std::collections::BTreeMap;

use moewe::checkpoint::Checkpoint;
use moewe::error::Error;
use moewe::families::{Request, Resolved, resolve, resolve_router};
use moewe::reference::{self, Inputs};
use moewe::spec::*;
use moewe::weights::Dtype;
use serde_json::{Map, Value, json};

use crate::families::{SWIGLU, layer, mlp, sum, top_k};
use crate::samples::{ANY, Sample, Stored, says};

/// H, I, E, k and layers of all samples; L is the latent width.
const H: usize = 24;
const I: usize = 8;
const E: usize = 4;
const K: usize = 2;
const L: usize = 20;

const PROJ: [&str; 3] = ["gate_proj", "up_proj", "down_proj"];
const SHORT: [&str; 3] = ["w1", "w3", "w2"];

/// How the routed experts are stored, under a name that the prefix precedes.
#[derive(Debug, Clone, Copy)]
enum Layout {
    /// `MODULE.I.PART.weight`.
    Each(&'static str, [&'static str; 3]),
    /// [E, 2 I, H] and [E, H, I].
    Halves(&'static str, &'static str),
    /// [E, H, 2 I] and [E, I, H].
    Transposed(&'static str, &'static str),
    /// [E, 2 I, H], even rows gate.
    Interleaved(&'static str, &'static str),
    /// All [E I, H].
    Flat([&'static str; 3]),
}

/// transformers' layout in memory.
const FUSED: Layout = Layout::Halves("mlp.experts.gate_up_proj", "mlp.experts.down_proj");
const TRANSPOSED: Layout = Layout::Transposed("mlp.experts.gate_up_proj", "mlp.experts.down_proj");
const HUB: Layout = Layout::Each("mlp.experts", PROJ);

/// One family's sample.
struct Family {
    /// The layer's config without the keys that all have.
    config: Value,
    /// What precedes the names of the layer's tensors.
    prefix: &'static str,
    /// Tensors beside the experts.
    tensors: Vec<(&'static str, Dtype, Vec<usize>)>,
    /// Experts as they are published, then other layouts that have to be read.
    layouts: Vec<Layout>,
    /// Width of the routed experts.
    width: usize,
    spec: MoeSpec,
}

/// Small numbers that differ from tensor to tensor, all of them bf16.
fn numbers(name: &str, len: usize) -> Vec<f32> {
    let mut state = name.bytes().fold(0x9e37_u32, |state, byte| state.wrapping_mul(31).wrapping_add(byte.into()));
    let next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        ((state >> 24) as f32 - 127.5) / 128.0
    };
    std::iter::repeat_with(next).take(len).map(|value| f32::from_bits(value.to_bits() & 0xffff_0000)).collect()
}

fn stored(dtype: Dtype, shape: &[usize], values: &[f32]) -> Stored {
    assert_eq!(shape.iter().product::<usize>(), values.len());
    let bytes = values.iter().flat_map(|value| match dtype {
        Dtype::BF16 => ((value.to_bits() >> 16) as u16).to_le_bytes().to_vec(),
        _ => value.to_le_bytes().to_vec(),
    });
    Stored { dtype, shape: shape.to_vec(), bytes: bytes.collect() }
}

/// Keys of the class that do not matter, from `family_keys.txt`.
fn other_keys(model_type: &str) -> Vec<&'static str> {
    let mut found: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    let mut section = "";
    for line in include_str!("family_keys.txt").lines() {
        match line.strip_suffix(':') {
            Some(name) => section = name,
            None => found.entry(section).or_default().extend(line.split_whitespace()),
        }
    }
    ["all", model_type].iter().flat_map(|name| found.get(name).cloned().unwrap_or_default()).collect()
}

impl Family {
    fn config(&self) -> Map<String, Value> {
        let mut config = self.config.as_object().unwrap().clone();
        for (key, value) in [("hidden_size", json!(H)), ("num_hidden_layers", json!(3)), ("hidden_act", json!("silu"))]
        {
            config.entry(key).or_insert(value);
        }
        // A null would be found if the key were read where it should not be.
        for key in other_keys(self.config["model_type"].as_str().unwrap()) {
            config.entry(key).or_insert(Value::Null);
        }
        config.retain(|_, value| *value != json!("absent"));
        config
    }

    fn sample(&self, layout: Layout) -> Sample {
        let mut sample = Sample { config: self.config(), tensors: BTreeMap::new() };
        for (name, dtype, shape) in &self.tensors {
            let values = numbers(name, shape.iter().product());
            sample.tensors.insert(format!("{}{name}", self.prefix), stored(*dtype, shape, &values));
        }
        let width = self.width;
        // Row by row: gate and up [I, W], down [W, I].
        let matrix = |id: usize, part: usize| numbers(&format!("{id} {part}"), I * width);
        let transpose = |values: &[f32], rows: usize| -> Vec<f32> {
            let cols = values.len() / rows;
            (0..cols).flat_map(|col| (0..rows).map(move |row| values[row * cols + col])).collect()
        };
        let all = |one: &dyn Fn(usize) -> Vec<f32>| (0..E).flat_map(one).collect::<Vec<f32>>();
        let mut put = |name: String, shape: &[usize], values: Vec<f32>| {
            sample.tensors.insert(format!("{}{name}", self.prefix), stored(Dtype::BF16, shape, &values));
        };
        let gated = self.spec.experts.activation.gated();
        let both = |id: usize| [matrix(id, 0), matrix(id, 1)].concat();
        match layout {
            Layout::Each(module, parts) => {
                for id in 0..E {
                    for (part, name) in parts.iter().enumerate().filter(|(part, _)| gated || *part > 0) {
                        let shape = if part == 2 { [width, I] } else { [I, width] };
                        put(format!("{module}.{id}.{name}.weight"), &shape, matrix(id, part));
                    }
                }
            }
            // Without a gate the first tensor is [E, I, W].
            Layout::Halves(first, down) => {
                let one = |id| if gated { both(id) } else { matrix(id, 1) };
                put(first.into(), &[E, if gated { 2 * I } else { I }, width], all(&one));
                put(down.into(), &[E, width, I], all(&|id| matrix(id, 2)));
            }
            Layout::Transposed(first, down) => {
                put(first.into(), &[E, width, 2 * I], all(&|id| transpose(&both(id), 2 * I)));
                put(down.into(), &[E, I, width], all(&|id| transpose(&matrix(id, 2), width)));
            }
            Layout::Interleaved(first, down) => {
                let one = |id| {
                    let (gate, up) = (matrix(id, 0), matrix(id, 1));
                    gate.chunks(width).zip(up.chunks(width)).flat_map(|(gate, up)| [gate, up].concat()).collect()
                };
                put(first.into(), &[E, 2 * I, width], all(&one));
                put(down.into(), &[E, width, I], all(&|id| matrix(id, 2)));
            }
            Layout::Flat([gate, up, down]) => {
                put(gate.into(), &[E * I, width], all(&|id| matrix(id, 0)));
                put(up.into(), &[E * I, width], all(&|id| matrix(id, 1)));
                put(down.into(), &[E * I, width], all(&|id| transpose(&matrix(id, 2), width)));
            }
        }
        sample
    }
}

/// Output, ids and weights of three tokens.
fn run(checkpoint: &Checkpoint, resolved: &Resolved) -> reference::Layer {
    let hidden_states = numbers("hidden_states", 3 * H);
    let other = numbers("expert_hidden_states", 3 * H);
    let states = numbers("router_states", 3 * 12);
    let inputs = Inputs {
        expert_hidden_states: (resolved.spec.expert_input == ExpertInput::Separate).then_some(&other[..]),
        router_states: Some(&states),
        ..Inputs::of(&hidden_states)
    };
    reference::layer(&resolved.spec, &resolved.weights(checkpoint).unwrap(), inputs).unwrap()
}

const SIGMOID_BIAS: (Score, SelectionKey) = (Score::Sigmoid, SelectionKey::ScorePlusBias);
const SUM: Option<Denominator> = Some(Denominator::Sum);
const EPS: Option<Denominator> = Some(Denominator::SumPlus { eps: 1e-20 });

/// A layer with plain SwiGLU experts.
fn plain((score, key): (Score, SelectionKey), renormalize: Option<Denominator>, rho: f32) -> MoeSpec {
    layer([E, K, H], mlp(I, SWIGLU, WeightFormat::Bf16), top_k(score, key, None), renormalize, rho)
}

fn softmax(renormalize: Option<Denominator>) -> MoeSpec {
    plain((Score::Softmax, SelectionKey::Score), renormalize, 1.0)
}

fn chosen(score: ChosenScore, renormalize: Option<Denominator>) -> MoeSpec {
    let method = RoutingMethod::TopKThenScore { score };
    layer([E, K, H], mlp(I, SWIGLU, WeightFormat::Bf16), method, renormalize, 1.0)
}

fn shared(spec: MoeSpec, width: usize) -> MoeSpec {
    MoeSpec { shared: sum(mlp(width, SWIGLU, WeightFormat::Bf16)), ..spec }
}

fn on_output(mut spec: MoeSpec) -> MoeSpec {
    spec.routing.apply_routed_scale_to_output = true;
    spec
}

fn transformed(mut spec: MoeSpec, with: LogitTransform) -> MoeSpec {
    let (input, format) = (RouterInput::Hidden, WeightFormat::Bf16);
    spec.router = Router::Linear { input, format, bias: false, transform: with };
    spec
}

fn stored_as(mut spec: MoeSpec, rows: GateUpLayout) -> MoeSpec {
    spec.experts.gate_up_layout = rows;
    spec
}

fn b16(name: &'static str, shape: &[usize]) -> (&'static str, Dtype, Vec<usize>) {
    (name, Dtype::BF16, shape.to_vec())
}

fn f32s(name: &'static str, shape: &[usize]) -> (&'static str, Dtype, Vec<usize>) {
    (name, Dtype::F32, shape.to_vec())
}

/// Matrices of a shared expert.
fn three([gate, up, down]: [&'static str; 3], width: usize) -> Vec<(&'static str, Dtype, Vec<usize>)> {
    vec![b16(gate, &[width, H]), b16(up, &[width, H]), b16(down, &[H, width])]
}

const SHARED_EXPERTS: [&str; 3] =
    ["mlp.shared_experts.gate_proj.weight", "mlp.shared_experts.up_proj.weight", "mlp.shared_experts.down_proj.weight"];
const SHARED_EXPERT: [&str; 3] =
    ["mlp.shared_expert.gate_proj.weight", "mlp.shared_expert.up_proj.weight", "mlp.shared_expert.down_proj.weight"];

/// A family of DeepSeek-V3's kin.
fn kin(config: Value, bias: &'static str, spec: MoeSpec) -> Family {
    let mut tensors = vec![b16("mlp.gate.weight", &[E, H]), f32s(bias, &[E])];
    if let Some(SharedExperts { mlp, .. }) = &spec.shared {
        tensors.extend(three(SHARED_EXPERTS, mlp.intermediate_size));
    }
    Family { config, prefix: "model.layers.2.", tensors, layouts: vec![HUB, FUSED, TRANSPOSED], width: H, spec }
}

/// A family of Qwen's kin.
fn qwen(config: Value, prefix: &'static str, gated: bool, layouts: Vec<Layout>) -> Family {
    let mut tensors = vec![b16("mlp.gate.weight", &[E, H])];
    let mut spec = softmax(SUM);
    if gated {
        tensors.extend(three(SHARED_EXPERT, 12));
        tensors.push(b16("mlp.shared_expert_gate.weight", &[1, H]));
        spec = shared(spec, 12);
        spec.shared.as_mut().unwrap().gate = SharedGate::Sigmoid { format: WeightFormat::Bf16 };
    }
    if let Layout::Transposed(..) = layouts[0] {
        spec.experts.orientation = Orientation::InOut;
        spec.experts.gate_up_layout = GateUpLayout::Halves;
    }
    Family { config, prefix, tensors, layouts, width: H, spec }
}

/// Keys of DeepSeek-V3's router.
fn v3(model_type: &str, more: Value) -> Value {
    let mut config = json!({"model_type": model_type, "n_routed_experts": E, "num_experts_per_tok": K,
        "moe_intermediate_size": I, "n_group": 1, "topk_group": 1, "norm_topk_prob": true, "routed_scaling_factor": 2.5,
        "n_shared_experts": 1, "intermediate_size": 99});
    config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    config
}

fn families() -> Vec<Family> {
    let gate_bias = "mlp.gate.e_score_correction_bias";
    let v3_spec = || shared(plain(SIGMOID_BIAS, EPS, 2.5), I);
    let types = json!(["dense", "dense", "sparse"]);
    let clamped = |spec: MoeSpec, limit: f32, both: bool| {
        let mut spec = spec;
        spec.experts.activation = Activation::Swiglu { limit: Some(limit) };
        if both {
            spec.shared.as_mut().unwrap().mlp.activation = Activation::Swiglu { limit: Some(limit) };
        }
        spec
    };
    let first =
        json!({"first_k_dense_replace": 1, "scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1});
    let listed = json!({"mlp_layer_types": types});
    let with = |mut family: Family, tensors: Vec<(&'static str, Dtype, Vec<usize>)>| {
        family.tensors.extend(tensors);
        family
    };
    let mut all = vec![
        // DeepSeek-V3's block
        kin(v3("dots1", first.clone()), gate_bias, v3_spec()),
        with(
            kin(
                v3("axk1", json!({"mlp_layer_types": types, "rms_norm_eps": 1e-6})),
                gate_bias,
                MoeSpec { output_norm: Some(OutputNorm { eps: 1e-6 }), ..v3_spec() },
            ),
            vec![b16("post_mlp_layernorm.weight", &[H])],
        ),
        kin(v3("solar_open", json!({"use_qk_norm": false})), gate_bias, v3_spec()),
        kin(
            v3(
                "exaone_moe",
                json!({"n_routed_experts": "absent", "num_experts": E, "n_shared_experts": "absent",
                "num_shared_experts": 1, "is_moe_layer": [false, false, true], "first_k_dense_replace": 1}),
            ),
            "mlp.e_score_correction_bias",
            v3_spec(),
        ),
        kin(
            v3(
                "mimo_v2_flash",
                json!({"n_shared_experts": null, "routed_scaling_factor": null,
                "moe_layer_freq": [0, 0, 1], "hybrid_layer_pattern": [0], "swa_rope_theta": 1}),
            ),
            gate_bias,
            plain(SIGMOID_BIAS, EPS, 1.0),
        ),
        kin(v3("glm4_moe_lite", listed.clone()), gate_bias, v3_spec()),
        kin(v3("glm4v_moe_text", json!({"first_k_dense_replace": 1, "use_qk_norm": true})), gate_bias, v3_spec()),
        // The class's default stands beside the list that decides.
        kin(
            v3("glm_moe_dsa", json!({"mlp_layer_types": types, "first_k_dense_replace": 3, "mlp_bias": false})),
            gate_bias,
            v3_spec(),
        ),
        kin(
            v3("glm5_next_text", json!({"mlp_layer_types": types, "swiglu_limit": 10.0})),
            gate_bias,
            clamped(v3_spec(), 10.0, true),
        ),
        kin(
            v3("hy_v4", json!({"mlp_layer_types": null, "swiglu_limit": 10.0, "first_k_dense_replace": 1})),
            gate_bias,
            clamped(v3_spec(), 10.0, false),
        ),
        kin(
            v3(
                "bailing_hybrid",
                json!({"first_k_dense_replace": 2, "n_group": 2, "topk_group": 1,
                "expert_swiglu_limit_list": [0, null, 7.0], "share_expert_swiglu_limit_list": [0, 0], "moe_router_enable_expert_bias": true,
                "score_function": "sigmoid"}),
            ),
            "mlp.gate.expert_bias",
            {
                let mut spec = v3_spec();
                let groups = Groups { n_group: 2, topk_group: 1, score: GroupScore::Top2SumOfKey };
                spec.routing.method = top_k(Score::Sigmoid, SelectionKey::ScorePlusBias, Some(groups));
                spec.experts.activation = Activation::SwigluClampAfter { limit: 7.0 };
                spec
            },
        ),
        // Qwen
        qwen(
            json!({"model_type": "qwen3_next", "num_experts": E, "num_experts_per_tok": K, "moe_intermediate_size": I,
                "norm_topk_prob": true, "decoder_sparse_step": 1, "mlp_only_layers": [], "shared_expert_intermediate_size": 12}),
            "model.layers.1.",
            true,
            vec![HUB, FUSED],
        ),
        qwen(
            json!({"model_type": "qwen3_vl_moe_text", "num_experts": E, "num_experts_per_tok": K, "moe_intermediate_size": I,
                "decoder_sparse_step": 1, "mlp_only_layers": null, "intermediate_size": 99, "norm_topk_prob": true}),
            "model.language_model.layers.1.",
            false,
            vec![TRANSPOSED, FUSED, HUB],
        ),
        qwen(
            json!({"model_type": "qwen3_5_moe_text", "num_experts": E, "num_experts_per_tok": K, "moe_intermediate_size": I,
                "shared_expert_intermediate_size": 12, "full_attention_interval": 4}),
            "model.layers.1.",
            true,
            vec![HUB, FUSED],
        ),
        qwen(
            json!({"model_type": "qwen4_exp_text", "num_experts": E, "num_experts_per_tok": K, "moe_intermediate_size": I,
                "norm_topk_prob": true, "shared_expert_intermediate_size": 12, "number_of_conv_states": 3}),
            "model.language_model.layers.1.",
            true,
            vec![HUB, FUSED],
        ),
    ];
    let linear = |config: Value, prefix, router, layouts: Vec<Layout>, spec: MoeSpec| Family {
        config,
        prefix,
        tensors: vec![b16(router, &[E, H])],
        layouts,
        width: H,
        spec,
    };
    let block = [
        Layout::Each("block_sparse_moe.experts", SHORT),
        Layout::Halves("block_sparse_moe.experts.gate_up_proj", "block_sparse_moe.experts.down_proj"),
    ];
    let block_shared = [
        "block_sparse_moe.shared_experts.gate_proj.weight",
        "block_sparse_moe.shared_experts.up_proj.weight",
        "block_sparse_moe.shared_experts.down_proj.weight",
    ];
    all.extend([
        // softmax
        linear(
            json!({"model_type": "minimax", "num_local_experts": E, "num_experts_per_tok": K, "intermediate_size": I,
                "shared_intermediate_size": 0, "shared_moe_mode": "sigmoid", "attn_type_list": [0], "postnorm": true}),
            "model.layers.0.",
            "block_sparse_moe.gate.weight",
            block.to_vec(),
            softmax(SUM),
        ),
        linear(
            json!({"model_type": "flex_olmo", "num_experts": E, "num_experts_per_tok": K, "intermediate_size": I,
                "norm_topk_prob": false}),
            "model.layers.0.",
            "mlp.gate.weight",
            vec![HUB, FUSED],
            softmax(None),
        ),
        linear(
            json!({"model_type": "jamba", "num_experts": E, "num_experts_per_tok": K, "intermediate_size": I,
                "expert_layer_period": 2, "expert_layer_offset": 1}),
            "model.layers.1.",
            "feed_forward.router.weight",
            vec![
                Layout::Each("feed_forward.experts", PROJ),
                Layout::Halves("feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"),
            ],
            softmax(None),
        ),
        linear(
            json!({"model_type": "dbrx", "hidden_size": "absent", "num_hidden_layers": "absent", "d_model": H, "n_layers": 3,
                "hidden_act": "absent",
                "ffn_config": {"ffn_act_fn": {"name": "silu"}, "ffn_hidden_size": I, "moe_num_experts": E, "moe_top_k": K,
                    "moe_normalize_expert_weights": 2.0, "moe_jitter_eps": 0.01, "moe_loss_weight": 0.05,
                    "uniform_expert_assignment": false, "hidden_size": 6144, "model_type": ""}}),
            "transformer.blocks.1.",
            "ffn.router.layer.weight",
            vec![
                Layout::Flat(["ffn.experts.mlp.w1", "ffn.experts.mlp.v1", "ffn.experts.mlp.w2"]),
                Layout::Halves("ffn.experts.gate_up_proj", "ffn.experts.down_proj"),
            ],
            softmax(Some(Denominator::PNorm { p: 2.0 })),
        ),
        with(
            linear(
                json!({"model_type": "mistral4", "n_routed_experts": E, "num_experts_per_tok": K, "moe_intermediate_size": I,
                    "n_shared_experts": 2, "routed_scaling_factor": 1.5, "n_group": 2, "topk_group": 1, "norm_topk_prob": false,
                    "first_k_dense_replace": 0, "intermediate_size": 99}),
                "model.language_model.layers.0.",
                "mlp.gate.weight",
                vec![FUSED, HUB],
                {
                    let groups = Groups { n_group: 2, topk_group: 1, score: GroupScore::Top2SumOfScore };
                    let method = top_k(Score::Softmax, SelectionKey::Score, Some(groups));
                    let experts = mlp(I, SWIGLU, WeightFormat::Bf16);
                    stored_as(shared(layer([E, K, H], experts, method, None, 1.5), 2 * I), GateUpLayout::Halves)
                },
            ),
            three(SHARED_EXPERTS, 2 * I),
        ),
        // Mistral's own names stand in the layer itself.
        with(
            linear(
                json!({"model_type": "mistral_large4_text", "n_routed_experts": E, "num_experts_per_tok": K,
                    "moe_intermediate_size": I, "n_shared_experts": 1, "routed_scaling_factor": 1.0, "n_group": 1,
                    "topk_group": 1, "mlp_layer_types": ["dense", "sparse", "sparse"], "first_k_dense_replace": 1,
                    "intermediate_size": 99}),
                "layers.2.",
                "gate.weight",
                vec![Layout::Each("experts", SHORT), Layout::Halves("experts.gate_up_proj", "experts.down_proj")],
                shared(softmax(EPS), I),
            ),
            three(["shared_experts.w1.weight", "shared_experts.w3.weight", "shared_experts.w2.weight"], I),
        ),
        with(
            linear(
                json!({"model_type": "hunyuan_v1_moe", "num_experts": E, "moe_topk": [K, K, K], "intermediate_size": I,
                    "moe_intermediate_size": [I, I, I], "num_shared_expert": [1, 1, 1], "use_mixed_mlp_moe": true,
                    "moe_layer_num_skipped": 0, "norm_topk_prob": true}),
                "model.layers.0.",
                "mlp.gate.wg.weight",
                vec![HUB, FUSED],
                shared(softmax(SUM), I),
            ),
            three(
                ["mlp.shared_mlp.gate_proj.weight", "mlp.shared_mlp.up_proj.weight", "mlp.shared_mlp.down_proj.weight"],
                I,
            ),
        ),
        // the largest logits, then a score
        with(
            linear(
                json!({"model_type": "granitemoehybrid", "num_local_experts": E, "num_experts_per_tok": K,
                    "intermediate_size": I, "shared_intermediate_size": 12, "layers_block_type": ["mamba"]}),
                "model.layers.0.",
                "block_sparse_moe.router.layer.weight",
                vec![
                    Layout::Halves("block_sparse_moe.input_linear.weight", "block_sparse_moe.output_linear.weight"),
                    block[1],
                ],
                {
                    let mut spec = stored_as(shared(chosen(ChosenScore::Softmax, None), 12), GateUpLayout::Halves);
                    spec.shared.as_mut().unwrap().mlp.gate_up_layout = GateUpLayout::Halves;
                    spec
                },
            ),
            vec![b16("shared_mlp.input_linear.weight", &[24, H]), b16("shared_mlp.output_linear.weight", &[H, 12])],
        ),
        linear(
            json!({"model_type": "granitemoeshared", "num_local_experts": E, "num_experts_per_tok": K,
                "intermediate_size": I, "shared_intermediate_size": 0}),
            "model.layers.0.",
            "block_sparse_moe.router.weight",
            vec![block[1]],
            stored_as(chosen(ChosenScore::Softmax, None), GateUpLayout::Halves),
        ),
        with(
            linear(
                json!({"model_type": "jetmoe", "num_local_experts": E, "num_experts_per_tok": K, "intermediate_size": I,
                    "hidden_act": "absent", "activation_function": "silu", "glu": true}),
                "model.layers.0.",
                "mlp.router.layer.weight",
                vec![Layout::Halves("mlp.input_linear.weight", "mlp.output_linear.weight"), FUSED],
                MoeSpec {
                    output_bias: true,
                    ..stored_as(chosen(ChosenScore::Softmax, None), GateUpLayout::Halves)
                },
            ),
            vec![b16("mlp.bias", &[H])],
        ),
        with(
            linear(
                json!({"model_type": "cohere2_moe", "num_experts": E, "num_experts_per_tok": K, "intermediate_size": I,
                    "num_shared_experts": 2, "shared_expert_combination_strategy": "average",
                    "expert_selection_fn": "sigmoid", "norm_topk_prob": true, "mlp_layer_types": null,
                    "first_k_dense_replace": 1, "prefix_dense_intermediate_size": null}),
                "model.layers.1.",
                "mlp.gate.weight",
                vec![HUB, FUSED],
                {
                    let mut spec = shared(chosen(ChosenScore::Sigmoid, SUM), 2 * I);
                    spec.shared.as_mut().unwrap().combination = SharedCombination::Average;
                    spec
                },
            ),
            three(SHARED_EXPERTS, 2 * I),
        ),
        // sigmoid
        with(
            linear(
                json!({"model_type": "kolibri1", "num_experts": E, "num_experts_per_tok": K, "moe_intermediate_size": I,
                    "norm_topk_prob": false, "shared_expert_intermediate_size": 12}),
                "model.layers.0.",
                "mlp.gate.weight",
                vec![HUB, FUSED],
                shared(plain((Score::Sigmoid, SelectionKey::LogitPlusBias), None, 1.0), 12),
            ),
            [three(SHARED_EXPERTS, 12), vec![f32s("moe.router.expert_bias", &[E])]].concat(),
        ),
        with(
            linear(
                json!({"model_type": "laguna", "num_experts": E, "num_experts_per_tok": K, "moe_intermediate_size": I,
                    "shared_expert_intermediate_size": 12, "moe_routed_scaling_factor": 2.5,
                    "moe_apply_router_weight_on_input": false, "moe_router_logit_softcapping": 3.0,
                    "mlp_layer_types": null, "intermediate_size": 99}),
                "model.layers.1.",
                "mlp.gate.weight",
                vec![HUB, FUSED],
                on_output(transformed(shared(plain(SIGMOID_BIAS, SUM, 2.5), 12), LogitTransform::SoftCap { cap: 3.0 })),
            ),
            [three(SHARED_EXPERT, 12), vec![f32s("mlp.experts.e_score_correction_bias", &[E])]].concat(),
        ),
        with(
            linear(
                json!({"model_type": "flint", "num_experts": E, "num_experts_per_tok": K, "moe_intermediate_size": I,
                    "shared_expert_intermediate_size": 12, "norm_topk_prob": true, "decoder_sparse_step": 1,
                    "mlp_only_layers": null, "intermediate_size": 99}),
                "model.layers.2.",
                "mlp.gate.weight",
                vec![HUB, FUSED],
                shared(plain((Score::Sigmoid, SelectionKey::Score), SUM, 1.0), 12),
            ),
            three(SHARED_EXPERT, 12),
        ),
        with(
            linear(
                json!({"model_type": "lfm2_moe", "num_experts": E, "num_experts_per_tok": K, "moe_intermediate_size": I,
                    "num_dense_layers": 2, "use_expert_bias": true, "routed_scaling_factor": 1.0, "norm_topk_prob": true,
                    "hidden_act": "absent", "intermediate_size": 99, "conv_dim": 8}),
                "model.layers.2.",
                "feed_forward.gate.weight",
                vec![
                    Layout::Each("feed_forward.experts", SHORT),
                    Layout::Halves("feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"),
                ],
                plain(SIGMOID_BIAS, Some(Denominator::SumPlus { eps: 1e-6 }), 1.0),
            ),
            vec![f32s("feed_forward.expert_bias", &[E])],
        ),
        with(
            linear(
                json!({"model_type": "hy_v3", "num_experts": E, "num_experts_per_tok": K, "num_shared_experts": 1,
                    "moe_intermediate_size": I, "router_scaling_factor": 2.826, "mlp_bias": false, "mlp_layer_types": null,
                    "first_k_dense_replace": 1, "moe_router_enable_expert_bias": true, "moe_router_use_sigmoid": true,
                    "route_norm": true, "enable_moe_fp32_combine": true, "intermediate_size": 99}),
                "model.layers.1.",
                "mlp.router.gate.weight",
                vec![HUB, FUSED],
                shared(plain(SIGMOID_BIAS, EPS, 2.826), I),
            ),
            [
                three(
                    ["mlp.shared_mlp.gate_proj.weight", "mlp.shared_mlp.up_proj.weight", "mlp.shared_mlp.down_proj.weight"],
                    I,
                ),
                vec![f32s("mlp.expert_bias", &[E])],
            ]
            .concat(),
        ),
        with(
            linear(
                json!({"model_type": "minimax_m3_vl_text", "num_local_experts": E, "num_experts_per_tok": K,
                    "intermediate_size": I, "shared_intermediate_size": 12, "dense_intermediate_size": 99,
                    "routed_scaling_factor": 2.0, "swiglu_alpha": 1.702, "swiglu_limit": 7.0, "hidden_act": "swigluoai",
                    "moe_layer_freq": [0, 0, 1], "scoring_func": "sigmoid", "use_routing_bias": true}),
                "language_model.model.layers.2.",
                "block_sparse_moe.gate.weight",
                block.to_vec(),
                {
                    let mut spec = on_output(shared(plain(SIGMOID_BIAS, SUM, 2.0), 12));
                    let oai = Activation::SwigluOai { alpha: 1.702, limit: Some(7.0), beta: 1.0 };
                    spec.experts.activation = oai;
                    spec.shared.as_mut().unwrap().mlp.activation = oai;
                    spec
                },
            ),
            [three(block_shared, 12), vec![f32s("block_sparse_moe.e_score_correction_bias", &[E])]].concat(),
        ),
    ]);
    let router = |spec: MoeSpec, router: Router| MoeSpec { router, ..spec };
    all.extend([
        // Kimi K3 in the spelling of kimi_linear
        Family {
            config: json!({"model_type": "kimi_linear", "num_experts": E, "num_experts_per_token": K,
                "moe_intermediate_size": I, "num_expert_group": 1, "topk_group": 1, "moe_renormalize": true,
                "routed_scaling_factor": 1.0, "num_shared_experts": 2, "first_k_dense_replace": 1, "moe_layer_freq": 1,
                "moe_router_activation_func": "sigmoid", "use_grouped_topk": true, "hidden_act": "situ",
                "activation_situ_beta": 4.0, "activation_situ_linear_beta": 25.0, "routed_expert_hidden_size": L,
                "latent_moe_use_norm": true, "rms_norm_eps": 1e-5, "attn_res_block_size": 1, "intermediate_size": 99}),
            prefix: "language_model.model.layers.1.",
            tensors: [
                three(block_shared, 2 * I),
                vec![
                    b16("block_sparse_moe.gate.weight", &[E, H]),
                    f32s("block_sparse_moe.gate.e_score_correction_bias", &[E]),
                    b16("block_sparse_moe.routed_expert_down_proj.weight", &[L, H]),
                    b16("block_sparse_moe.routed_expert_up_proj.weight", &[H, L]),
                    b16("block_sparse_moe.routed_expert_norm.weight", &[L]),
                ],
            ]
            .concat(),
            layouts: block.to_vec(),
            width: L,
            spec: {
                let mut spec = shared(plain(SIGMOID_BIAS, EPS, 1.0), 2 * I);
                let situ = Activation::Situ { beta: 4.0, linear_beta: 25.0 };
                spec.experts.activation = situ;
                spec.shared.as_mut().unwrap().mlp.activation = situ;
                let norm = LatentNorm::Reduced { eps: 1e-5 };
                MoeSpec { latent: Some(Latent { size: L, format: WeightFormat::Bf16, norm }), ..spec }
            },
        },
        // Nemotron without a latent width
        Family {
            config: json!({"model_type": "nemotron_h", "n_routed_experts": E, "num_experts_per_tok": K,
                "moe_intermediate_size": I, "moe_shared_expert_intermediate_size": 12, "n_group": 1, "topk_group": 1,
                "norm_topk_prob": true, "routed_scaling_factor": 2.5, "mlp_hidden_act": "relu2", "mlp_bias": false,
                "hybrid_override_pattern": "ME*-", "n_shared_experts": 1, "hidden_act": "absent", "use_bias": false,
                "intermediate_size": 99, "layer_types": null}),
            prefix: "backbone.layers.1.",
            tensors: vec![
                b16("mixer.gate.weight", &[E, H]),
                f32s("mixer.gate.e_score_correction_bias", &[E]),
                b16("mixer.shared_experts.up_proj.weight", &[12, H]),
                b16("mixer.shared_experts.down_proj.weight", &[H, 12]),
            ],
            layouts: vec![
                Layout::Each("mixer.experts", PROJ),
                Layout::Halves("mixer.experts.up_proj", "mixer.experts.down_proj"),
            ],
            width: H,
            spec: {
                let mut spec = shared(plain(SIGMOID_BIAS, EPS, 2.5), 12);
                spec.experts.activation = Activation::Relu2;
                spec.shared.as_mut().unwrap().mlp.activation = Activation::Relu2;
                spec
            },
        },
        Family {
            config: json!({"model_type": "muse_spark_text", "num_local_experts": E, "num_experts_per_tok": K,
                "moe_intermediate_size": I, "moe_hidden_size": L, "routed_scaling_factor": 1.5, "output_multiplier": 0.25,
                "rms_norm_eps": 1e-5, "post_norm_eps": 1e-8, "mlp_layer_types": null, "intermediate_size": 99}),
            prefix: "model.language_model.layers.0.",
            tensors: vec![
                b16("mlp.gate.weight", &[E, H]),
                f32s("mlp.gate.e_score_correction_bias", &[E]),
                b16("mlp.pre_expert_proj.weight", &[L, H]),
                b16("mlp.pre_expert_norm.weight", &[L]),
                b16("mlp.experts.post_expert_norm.weight", &[L]),
                b16("mlp.post_expert_proj.weight", &[H, L]),
            ],
            layouts: vec![FUSED, HUB],
            width: L,
            spec: {
                let spec = plain(SIGMOID_BIAS, Some(Denominator::SumPlus { eps: 1e-15 }), 1.5);
                let spec = transformed(spec, LogitTransform::Multiply { factor: 0.25 });
                let norm = LatentNorm::PreAndPost { pre_eps: 1e-5, post_eps: 1e-8 };
                let latent = Some(Latent { size: L, format: WeightFormat::Bf16, norm });
                MoeSpec { latent, ..stored_as(spec, GateUpLayout::Halves) }
            },
        },
        Family {
            config: json!({"model_type": "gemma4_text", "enable_moe_block": true, "num_experts": E, "top_k_experts": K,
                "moe_intermediate_size": I, "hidden_activation": "gelu_pytorch_tanh", "rms_norm_eps": 1e-6,
                "hidden_act": "absent", "intermediate_size": 99, "use_double_wide_mlp": false, "num_kv_shared_layers": 0,
                "per_layer_config": {"5": {"head_dim": 512, "num_key_value_heads": 4}, "6": {}}}),
            prefix: "model.language_model.layers.0.",
            tensors: vec![
                b16("router.proj.weight", &[E, H]),
                b16("router.scale", &[H]),
                b16("router.per_expert_scale", &[E]),
                // The dense MLP beside the experts is not theirs.
                b16("mlp.gate_proj.weight", &[99, H]),
            ],
            layouts: vec![Layout::Halves("experts.gate_up_proj", "experts.down_proj"), Layout::Each("experts", PROJ)],
            width: H,
            spec: {
                let input = RouterInput::RmsNormScaled { eps: 1e-6 };
                let format = WeightFormat::Bf16;
                let linear = Router::Linear { input, format, bias: false, transform: LogitTransform::None };
                let mut spec = stored_as(router(softmax(SUM), linear), GateUpLayout::Halves);
                spec.routing.per_expert_scale = true;
                spec.experts.activation = Activation::GeluTanh;
                MoeSpec { expert_input: ExpertInput::Separate, ..spec }
            },
        },
        Family {
            config: json!({"model_type": "inkling_text", "n_routed_experts": E, "num_experts_per_tok": K,
                "n_shared_experts": 2, "route_scale": 8.0, "moe_intermediate_size": 99, "intermediate_size": I,
                "dense_intermediate_size": 77, "dense_mlp_idx": 1, "shared_expert_sink": true, "use_gate_bias": true,
                "use_global_scale": true, "norm_after_topk": true, "gate_activation": "sigmoid", "shared_experts_size": 1,
                "inference_moe_w13_interleaved": true, "rms_norm_eps_moe_gate": 1e-6}),
            prefix: "model.llm.layers.1.",
            tensors: vec![
                b16("mlp.gate.weight", &[E + 2, H]),
                f32s("mlp.gate.bias", &[E]),
                f32s("mlp.gate.global_scale", &[1]),
                b16("mlp.shared_experts.shared_w13_weight", &[2, 2 * I, H]),
                b16("mlp.shared_experts.shared_w2_weight", &[2, H, I]),
            ],
            layouts: vec![Layout::Interleaved("mlp.experts.w13_weight", "mlp.experts.w2_weight"), FUSED],
            width: H,
            spec: {
                let interleaved = ExpertMlp {
                    gate_up_layout: GateUpLayout::Interleaved,
                    ..mlp(I, SWIGLU, WeightFormat::Bf16)
                };
                let method = RoutingMethod::JointNorm { num_shared: 2, global_scale: true };
                let mut spec = layer([E, K, H], interleaved.clone(), method, None, 8.0);
                spec.shared = sum(interleaved);
                spec.shared.as_mut().unwrap().gate = SharedGate::Joint;
                spec
            },
        },
        Family {
            config: json!({"model_type": "zaya", "num_experts": E, "num_experts_per_tok": 1, "moe_intermediate_size": I,
                "router_hidden_size": 12, "rms_norm_eps": 1e-5}),
            prefix: "model.layers.1.",
            tensors: vec![
                b16("mlp.gate.down_proj.weight", &[12, H]),
                b16("mlp.gate.down_proj.bias", &[12]),
                b16("mlp.gate.router_states_scale", &[12]),
                b16("mlp.gate.router_mlp.norm.weight", &[12]),
                b16("mlp.gate.router_mlp.fc1.weight", &[12, 12]),
                b16("mlp.gate.router_mlp.fc1.bias", &[12]),
                b16("mlp.gate.router_mlp.fc2.weight", &[12, 12]),
                b16("mlp.gate.router_mlp.fc2.bias", &[12]),
                b16("mlp.gate.router_mlp.out_proj.weight", &[E + 1, 12]),
                f32s("mlp.gate.balancing_biases", &[E + 1]),
            ],
            layouts: vec![FUSED, HUB],
            width: H,
            spec: {
                let mut spec = plain((Score::Softmax, SelectionKey::ScorePlusBias), None, 1.0);
                spec.routing.zero_experts = Some(ZeroExperts { count: 1, kind: ZeroExpertKind::Skip });
                spec.top_k = 1;
                let format = WeightFormat::Bf16;
                let mlp = Router::Mlp { state_size: 12, rms_norm_eps: 1e-5, previous_state: true, format };
                stored_as(router(spec, mlp), GateUpLayout::Halves)
            },
        },
    ]);
    all
}

/// A layer of each family that the golden set lacks.
pub fn samples() -> Vec<Sample> {
    families().iter().map(|family| family.sample(family.layouts[0])).collect()
}

#[test]
fn every_family_resolves_to_its_spec() {
    for family in families() {
        let name = family.config["model_type"].as_str().unwrap().to_owned();
        let resolved = family.sample(family.layouts[0]).resolve().unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(resolved.spec, family.spec, "{name}");
        assert_eq!(resolved.unknown_keys, [""; 0], "{name}");
        assert_eq!(resolved.notes, [""; 0], "{name}");
        assert_eq!(resolved.model_type, name);
    }
}

#[test]
fn every_layout_gives_the_same_bits() {
    for family in families() {
        let name = family.config["model_type"].as_str().unwrap().to_owned();
        let mut first: Option<reference::Layer> = None;
        for &layout in &family.layouts {
            let checkpoint = family.sample(layout).open();
            let resolved = resolve(&checkpoint, &ANY).unwrap_or_else(|error| panic!("{name} {layout:?}: {error}"));
            let found = run(&checkpoint, &resolved);
            assert!(
                found.output.iter().all(|value| value.is_finite()) && found.output.iter().any(|value| *value != 0.0)
            );
            assert_eq!(first.get_or_insert(found.clone()), &found, "{name} {layout:?}");
        }
    }
}

/// transformers' names in memory, which its re-saves have, beside the published ones.
const IN_MEMORY: [(&str, &[(&str, &str)]); 19] = [
    ("minimax", &[("block_sparse_moe.", "mlp.")]),
    ("minimax_m3_vl_text", &[("block_sparse_moe.e_score", "mlp.gate.e_score"), ("block_sparse_moe.", "mlp.")]),
    ("kimi_linear", &[("block_sparse_moe.", "mlp.")]),
    ("exaone_moe", &[("mlp.e_score", "mlp.gate.e_score")]),
    ("bailing_hybrid", &[("gate.expert_bias", "gate.e_score_correction_bias")]),
    ("laguna", &[("mlp.experts.e_score", "mlp.gate.e_score"), ("shared_expert.", "shared_experts.")]),
    ("kolibri1", &[("moe.router.expert_bias", "mlp.gate.e_score_correction_bias")]),
    (
        "hy_v3",
        &[
            ("router.gate.", "gate."),
            ("mlp.expert_bias", "mlp.e_score_correction_bias"),
            ("shared_mlp.", "shared_experts."),
        ],
    ),
    ("granitemoehybrid", &[("router.layer.", "router.")]),
    ("hy_v4", &[("shared_experts.gate_proj.", "shared_experts.linear_gate.")]),
    ("inkling_text", &[("gate.bias", "gate.e_score_correction_bias")]),
    (
        "mistral_large4_text",
        &[
            ("2.gate.", "2.mlp.gate."),
            ("2.experts.", "2.mlp.experts."),
            ("2.shared_experts.w1", "2.mlp.shared_experts.gate_proj"),
            ("2.shared_experts.w3", "2.mlp.shared_experts.up_proj"),
            ("2.shared_experts.w2", "2.mlp.shared_experts.down_proj"),
        ],
    ),
    // of the golden set
    ("golden kimi_linear", &[("block_sparse_moe.", "mlp.")]),
    ("golden phimoe", &[("block_sparse_moe.gate.", "mlp.router."), ("block_sparse_moe.", "mlp.")]),
    ("golden mixtral", &[("block_sparse_moe.", "mlp.")]),
    ("golden minimax_m2", &[("block_sparse_moe.", "mlp.")]),
    ("golden ernie4_5_moe", &[("mlp.moe_statics.", "mlp.gate.moe_statics.")]),
    (
        "golden granitemoe",
        &[
            ("router.layer.", "router."),
            ("input_linear.weight", "experts.gate_up_proj"),
            ("output_linear.weight", "experts.down_proj"),
        ],
    ),
    ("golden deepseek_v3", &[("model.layers.", "model.language_model.layers.")]),
];

#[test]
fn the_names_in_memory_are_read_too() {
    for (name, renames) in IN_MEMORY {
        let published = match name.strip_prefix("golden ") {
            Some(case) => Sample::golden(case),
            None => {
                let family = families().into_iter().find(|family| family.config["model_type"] == name).unwrap();
                family.sample(family.layouts[0])
            }
        };
        let in_memory = published
            .clone()
            .rename(|name| renames.iter().fold(name.to_owned(), |name, (from, to)| name.replace(from, to)));
        assert_ne!(published.tensors.keys().collect::<Vec<_>>(), in_memory.tensors.keys().collect::<Vec<_>>());
        let (one, other) = (published.open(), in_memory.open());
        let (a, b) = (resolve(&one, &ANY).unwrap(), resolve(&other, &ANY));
        let b = b.unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(a.spec, b.spec, "{name}");
        let numbers = numbers("hidden_states", a.spec.hidden_size);
        let states = [0.0; 12];
        let run = |checkpoint: &Checkpoint, resolved: &Resolved| {
            let inputs = Inputs { router_states: Some(&states), ..Inputs::of(&numbers) };
            reference::layer(&resolved.spec, &resolved.weights(checkpoint).unwrap(), inputs).unwrap()
        };
        assert_eq!(run(&one, &a), run(&other, &b), "{name}");
    }
}

#[test]
fn shared_experts_in_memory_are_read_too() {
    // Inkling's are published with gate and up rows in turn, and held as three stacks.
    let family = families().into_iter().find(|family| family.config["model_type"] == "inkling_text").unwrap();
    let published = family.sample(family.layouts[0]);
    let mut in_memory = published.clone();
    let both = in_memory.take("model.llm.layers.1.mlp.shared_experts.shared_w13_weight");
    let down = in_memory.take("model.llm.layers.1.mlp.shared_experts.shared_w2_weight");
    let part =
        |first: usize| -> Vec<u8> { both.bytes.chunks(2 * H).skip(first).step_by(2).flatten().copied().collect() };
    for (name, shape, bytes) in [
        ("gate_proj", vec![2, I, H], part(0)),
        ("up_proj", vec![2, I, H], part(1)),
        ("down_proj", vec![2, H, I], down.bytes.clone()),
    ] {
        let name = format!("model.llm.layers.1.mlp.shared_experts.{name}");
        in_memory.tensors.insert(name, Stored { dtype: Dtype::BF16, shape, bytes });
    }
    let (one, other) = (published.open(), in_memory.open());
    let (a, b) = (resolve(&one, &ANY).unwrap(), resolve(&other, &ANY).unwrap());
    assert_eq!(run(&one, &a), run(&other, &b));

    // MiniMax-M3's are published one by one and held fused.
    let family = families().into_iter().find(|family| family.config["model_type"] == "minimax_m3_vl_text").unwrap();
    let published = family.sample(family.layouts[0]);
    let mut in_memory = published.clone();
    let prefix = "language_model.model.layers.2.block_sparse_moe.shared_experts";
    let [gate, up] = ["gate_proj", "up_proj"].map(|part| in_memory.take(&format!("{prefix}.{part}.weight")));
    let fused = Stored { dtype: Dtype::BF16, shape: vec![24, H], bytes: [gate.bytes, up.bytes].concat() };
    in_memory.tensors.insert(format!("{prefix}.gate_up_proj.weight"), fused);
    let (one, other) = (published.open(), in_memory.open());
    let (a, b) = (resolve(&one, &ANY).unwrap(), resolve(&other, &ANY).unwrap());
    assert_eq!(run(&one, &a), run(&other, &b));
}

#[test]
fn text_parts_of_multimodal_models_are_read_in_their_wrappers() {
    // Keys of the wrappers' classes that are not the text's.
    let around = "vision_config audio_config image_token_id audio_token_id image_bos_token_id audio_bos_token_id \
        video_token_id out_hidden_size projector_hidden_size projector_hidden_act boi_token_id eoi_token_id boa_token_id \
        eoa_token_index initializer_range tie_word_embeddings image_token_index video_token_index vision_start_token_id \
        vision_end_token_id image_start_token_id image_end_token_id video_start_token_id video_end_token_id \
        projection_hidden_size projection_layer_norm_eps media_placeholder_token_id ignore_index boi_token_index \
        eoi_token_index projector_bias vision_feature_layer multimodal_projector_bias spatial_merge_size pad_token_id \
        image_placeholder mtp_config architectures torch_dtype transformers_version";
    for (outer, inner) in [
        ("inkling_mm_model", "inkling_text"),
        ("muse_spark", "muse_spark_text"),
        ("gemma4", "gemma4_text"),
        ("minimax_m3_vl", "minimax_m3_vl_text"),
        ("glm4v_moe", "glm4v_moe_text"),
        ("glm5_next", "glm5_next_text"),
        ("qwen3_vl_moe", "qwen3_vl_moe_text"),
        ("qwen3_5_moe", "qwen3_5_moe_text"),
        ("qwen4_exp", "qwen4_exp_text"),
        ("mistral_large4", "mistral_large4_text"),
        ("mistral3", "mistral4"),
        ("kimi_k3", "kimi_linear"),
    ] {
        let family = families().into_iter().find(|family| family.config["model_type"] == inner).unwrap();
        let mut sample = family.sample(family.layouts[0]);
        let text = std::mem::take(&mut sample.config);
        let mut bare = text.clone();
        for key in around.split_whitespace() {
            sample = sample.set(key, Value::Null);
        }
        sample = sample.set("model_type", outer).set("text_config", text);
        let resolved = sample.resolve().unwrap_or_else(|error| panic!("{outer}: {error}"));
        assert_eq!(resolved.spec, family.spec, "{outer}");
        assert_eq!(resolved.unknown_keys, [""; 0], "{outer}");
        // The wrapper's type is enough where the text has none.
        if outer != "mistral3" {
            bare.shift_remove("model_type");
            assert_eq!(sample.set("text_config", bare).resolve().unwrap().spec, family.spec, "{outer}");
        }
    }
}

#[test]
fn every_router_resolves_alone() {
    for family in families() {
        let name = family.config["model_type"].as_str().unwrap().to_owned();
        let sample = family.sample(family.layouts[0]);
        let layer: usize = family.prefix.trim_end_matches('.').rsplit('.').next().unwrap().parse().unwrap();
        let request = Request { layer: Some(layer), ..ANY };
        let router = resolve_router(&sample.open(), &request).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!((&router.spec.router, &router.spec.routing), (&family.spec.router, &family.spec.routing), "{name}");
        // By itself, under its own names.
        let mut bare = sample.clone();
        let beside = ["mlp.e_score", "mlp.expert_bias", "moe.router.", "experts.e_score", "block_sparse_moe.e_score"];
        let of_router = |part: &str| {
            [".gate.", "router."].iter().any(|word| format!(".{part}").contains(word))
                || part.ends_with("expert_bias")
                || beside.iter().any(|word| part.contains(word))
        };
        bare.tensors = sample
            .tensors
            .iter()
            .filter_map(|(name, tensor)| Some((name.strip_prefix(family.prefix)?, tensor)))
            .filter(|(part, _)| of_router(part))
            .map(|(part, tensor)| (format!("gate.{}", part.trim_start_matches("mlp.gate.")), tensor.clone()))
            .collect();
        let checkpoint = bare.open();
        let alone = resolve_router(&checkpoint, &request).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(alone.spec.routing, family.spec.routing, "{name}");
        alone.router_weights(&checkpoint).unwrap();
    }
}

/// The sample of a family with a key changed.
fn changed(model_type: &str, key: &str, value: Value) -> moewe::Result<Resolved> {
    let family = families().into_iter().find(|family| family.config["model_type"] == model_type).unwrap();
    let mut sample = family.sample(family.layouts[0]);
    sample.config.insert(key.into(), value);
    sample.config.retain(|_, value| *value != json!("absent"));
    sample.resolve()
}

#[test]
fn values_without_an_implementation_are_refused_by_name() {
    for (model_type, key, value) in [
        ("laguna", "moe_apply_router_weight_on_input", json!(true)),
        ("laguna", "moe_router_score_func", json!("softmax")),
        ("cohere2_moe", "expert_selection_fn", json!("tanh")),
        ("cohere2_moe", "shared_expert_combination_strategy", json!("max")),
        ("gemma4_text", "hidden_activation", json!("quick_gelu")),
        ("nemotron_h", "mlp_hidden_act", json!("silu")),
        ("kimi_linear", "moe_router_activation_func", json!("softmax")),
        ("kimi_linear", "activation_situ_linear_beta", json!(null)),
        ("minimax_m3_vl_text", "hidden_act", json!("gelu")),
        ("minimax", "shared_intermediate_size", json!(64)),
        ("inkling_text", "shared_expert_sink", json!(false)),
        ("inkling_text", "gate_activation", json!("softmax")),
        ("zaya", "num_experts_per_tok", json!(2)),
        ("zaya", "zaya_layers", json!(["a", 16])),
        ("mimo_v2_flash", "n_shared_experts", json!(1)),
        ("hunyuan_v1_moe", "moe_layer_num_skipped", json!(1)),
        ("bailing_hybrid", "router_type", json!("MultiRouter")),
        ("glm5_next_text", "hidden_act", json!("gelu")),
        ("muse_spark_text", "num_shared_experts", json!(1)),
        ("hy_v4", "first_k_dense_replace", json!(2)),
        ("granitemoeshared", "hidden_act", json!("relu")),
        ("dots1", "per_layer_config", json!({"1": {"num_experts_per_tok": 1}})),
        ("dots1", "per_layer_config", json!({"1": {"head_dim": 64, "swiglu_limit": 7.0}})),
        ("dots1", "per_layer_config", json!([{"head_dim": 64}])),
        // Irrelevant elsewhere, but Gemma 4's router reads it.
        ("gemma4_text", "per_layer_config", json!({"1": {"rms_norm_eps": 1e-5}})),
    ] {
        let error = changed(model_type, key, value).unwrap_err();
        let Error::Unsupported(unsupported) = &error else { panic!("{model_type} {key}: {error}") };
        assert_eq!(unsupported.field, key, "{model_type}");
    }
}

#[test]
fn nemotrons_biases_are_the_shared_experts() {
    let family = families().into_iter().find(|family| family.config["model_type"] == "nemotron_h").unwrap();
    let mut sample = family.sample(family.layouts[0]).set("mlp_bias", true);
    for (part, width) in [("up_proj", 12), ("down_proj", H)] {
        let bias = Stored { dtype: Dtype::BF16, shape: vec![width], bytes: vec![0; 2 * width] };
        sample.tensors.insert(format!("backbone.layers.1.mixer.shared_experts.{part}.bias"), bias);
    }
    let mlp = sample.resolve().unwrap().spec.shared.unwrap().mlp;
    assert!(mlp.gate_up_bias && mlp.down_bias);

    let error = Sample::golden("nemotron_h_latent").set("mlp_bias", true).resolve().unwrap_err();
    let Error::Unsupported(unsupported) = &error else { panic!("{error}") };
    assert_eq!(unsupported.field, "mlp_bias");
}

#[test]
fn a_missing_key_is_an_error_that_names_it() {
    for (model_type, keys) in [
        ("laguna", "num_experts moe_routed_scaling_factor shared_expert_intermediate_size"),
        ("cohere2_moe", "expert_selection_fn norm_topk_prob shared_expert_combination_strategy num_shared_experts"),
        ("gemma4_text", "enable_moe_block top_k_experts rms_norm_eps hidden_activation"),
        ("muse_spark_text", "output_multiplier post_norm_eps moe_hidden_size routed_scaling_factor rms_norm_eps"),
        ("zaya", "router_hidden_size rms_norm_eps num_experts_per_tok"),
        ("inkling_text", "route_scale n_shared_experts dense_mlp_idx"),
        ("nemotron_h", "moe_shared_expert_intermediate_size n_group hybrid_override_pattern norm_topk_prob"),
        ("lfm2_moe", "use_expert_bias num_dense_layers norm_topk_prob routed_scaling_factor"),
        ("flint", "mlp_only_layers norm_topk_prob decoder_sparse_step"),
        ("kolibri1", "norm_topk_prob shared_expert_intermediate_size"),
        ("mistral4", "norm_topk_prob topk_group first_k_dense_replace"),
        ("hy_v3", "router_scaling_factor num_shared_experts"),
        ("qwen3_next", "norm_topk_prob decoder_sparse_step mlp_only_layers"),
        ("flex_olmo", "norm_topk_prob"),
        ("jamba", "expert_layer_period expert_layer_offset"),
        ("granitemoehybrid", "shared_intermediate_size num_local_experts"),
        ("minimax_m3_vl_text", "swiglu_alpha routed_scaling_factor moe_layer_freq"),
        ("kimi_linear", "moe_renormalize num_shared_experts activation_situ_beta first_k_dense_replace"),
        ("dbrx", "ffn_config d_model n_layers"),
    ] {
        for key in keys.split(' ') {
            let error = changed(model_type, key, json!("absent")).unwrap_err();
            let Error::Invalid { field, found, .. } = &error else { panic!("{model_type} {key}: {error}") };
            assert!(field.contains(key), "{model_type} {key}: {error}");
            assert_eq!(found, "no such key", "{model_type} {key}");
        }
    }
}

#[test]
fn lists_must_have_an_entry_for_each_layer() {
    for (model_type, key, value) in [
        ("glm4_moe_lite", "mlp_layer_types", json!(["dense", "sparse"])),
        ("exaone_moe", "is_moe_layer", json!([true])),
        ("mimo_v2_flash", "moe_layer_freq", json!([0, 1, 1, 1])),
        ("minimax_m3_vl_text", "moe_layer_freq", json!([1])),
        ("hunyuan_v1_moe", "moe_topk", json!([2, 2])),
    ] {
        says(&changed(model_type, key, value).unwrap_err().to_string(), &[key, "entries", "num_hidden_layers = 3"]);
    }
    let step = Sample::golden("step3p7_clamp").set("swiglu_limits", json!([0, 0, 4.0]));
    says(&step.refusal(), &["swiglu_limits", "3 entries", "at least num_hidden_layers = 4"]);
    // Layers of multi-token prediction may follow.
    let step = Sample::golden("step3p7_clamp").set("swiglu_limits", json!([0, 0, 4.0, 0, 9.0]));
    assert_eq!(step.resolve().unwrap().spec.experts.activation, Activation::SwigluClampAfter { limit: 4.0 });
    for none in [json!(null), json!([0, 0, 0, 0]), json!([0, 0, null, 0]), json!([0, 0, -1.0, 0])] {
        let step = Sample::golden("step3p7_clamp").set("swiglu_limits", none);
        assert_eq!(step.resolve().unwrap().spec.experts.activation, SWIGLU);
    }
    let text = Sample::golden("step3p7_clamp").unset("mlp_layer_types").set("moe_layers_enum", "2, 3");
    assert_eq!(text.resolve().unwrap().layer, Some(2));
}

#[test]
fn keys_that_a_family_s_own_code_does_not_read_are_noted() {
    for (case, key, value) in [
        ("deepseek_v2_group", "norm_topk_prob", json!(true)),
        ("afmoe", "route_norm", json!(false)),
        ("afmoe", "n_group", json!(4)),
        ("longcat_flash", "norm_topk_prob", json!(true)),
        ("phimoe", "num_experts_per_tok", json!(4)),
        ("step3p7_clamp", "norm_expert_weight", json!(false)),
    ] {
        let plain = Sample::golden(case).resolve().unwrap();
        let resolved = Sample::golden(case).set(key, value).resolve().unwrap();
        assert_eq!(resolved.spec, plain.spec, "{case}");
        says(&resolved.notes[0], &[key, "not applied", "own code"]);
    }
}

#[test]
fn a_square_tensor_takes_its_orientation_from_the_other() {
    // 2 I = H: [E, 2 I, H] and [E, H, 2 I] look alike.
    let mut family = families().into_iter().find(|family| family.config["model_type"] == "qwen3_vl_moe_text").unwrap();
    family.config["hidden_size"] = json!(2 * I);
    family.width = 2 * I;
    family.tensors = vec![b16("mlp.gate.weight", &[E, 2 * I])];
    let outputs: Vec<Vec<f32>> = family
        .layouts
        .iter()
        .map(|&layout| {
            let checkpoint = family.sample(layout).open();
            let resolved = resolve(&checkpoint, &ANY).unwrap();
            let hidden_states = numbers("hidden_states", 6 * I);
            let weights = resolved.weights(&checkpoint).unwrap();
            reference::layer(&resolved.spec, &weights, Inputs::of(&hidden_states)).unwrap().output
        })
        .collect();
    assert!(outputs.iter().all(|output| *output == outputs[0]));
}

#[test]
fn norm_weights_that_are_stored_less_one_are_given_whole() {
    let family = families().into_iter().find(|family| family.config["model_type"] == "muse_spark_text").unwrap();
    let checkpoint = family.sample(FUSED).open();
    let weights = resolve(&checkpoint, &ANY).unwrap().weights(&checkpoint).unwrap();
    let whole = |name: &str| numbers(name, L).iter().map(|weight| 1.0 + weight).collect();
    let (pre, post) = (whole("mlp.pre_expert_norm.weight"), whole("mlp.experts.post_expert_norm.weight"));
    assert_eq!(weights.latent.unwrap().norm, moewe::weights::LatentNormWeights::PreAndPost { pre, post });
}

#[test]
fn a_bias_that_is_not_a_number_is_refused_by_its_name() {
    for (case, name) in [
        ("deepseek_v3", "model.layers.3.mlp.gate.e_score_correction_bias"),
        ("afmoe", "model.layers.2.mlp.expert_bias"),
        ("gpt_oss", "model.layers.2.mlp.experts.down_proj_bias"),
    ] {
        let mut sample = Sample::golden(case);
        let tensor = sample.tensors.get_mut(name).unwrap();
        let width = tensor.dtype.bitsize() / 8;
        let at = tensor.bytes.len() - width;
        tensor.bytes[at..].copy_from_slice(&f32::NAN.to_le_bytes()[4 - width..]);
        says(&sample.refusal(), &[name, "NaN", "finite numbers"]);
    }
}
