//! Which layer is taken, under which names and layouts its tensors are found, and that none is left over.

use moewe::error::{Error, Unsupported};
use moewe::families::{Request, resolve, resolve_router};
use moewe::spec::*;
use moewe::weights::{Dtype, Matrix, MlpWeights};
use serde_json::json;

use crate::samples::{ANY, Sample, Stored, says};

const FP8: WeightFormat = WeightFormat::Fp8Block { block: [128, 128], scale: ScaleFormat::F32 };

#[test]
fn a_dense_layer_is_refused_as_such() {
    let ask = |sample: &Sample, layer: usize| {
        resolve(&sample.open(), &Request { layer: Some(layer), ..ANY }).unwrap_err().to_string()
    };
    let v3 = Sample::golden("deepseek_v3");
    says(&ask(&v3, 2), &["layer: found 2, a dense layer by first_k_dense_replace", "3 of them, from 3 to 5"]);
    says(&ask(&v3, 6), &["layer: found 6", "num_hidden_layers = 6"]);
    says(&ask(&v3.clone().set("moe_layer_freq", 2), 3), &["3, a dense layer"]);
    let qwen = Sample::golden("qwen3_moe");
    says(&ask(&qwen.clone().set("mlp_only_layers", json!([2])), 2), &["2, a dense layer by decoder_sparse_step"]);
    says(&ask(&qwen.clone().set("decoder_sparse_step", 2), 2), &["2, a dense layer"]);
    // Layer 2 + 1 is a multiple of 3.
    assert!(qwen.clone().set("decoder_sparse_step", 3).resolve().is_ok());
    // Without a number the only layer whose tensors are here is a dense one.
    let error = qwen.set("decoder_sparse_step", 2).resolve().unwrap_err();
    assert!(matches!(error, Error::MissingTensor { .. }), "{error}");
}

#[test]
fn the_first_complete_layer_is_taken() {
    let mut sample = Sample::golden("qwen3_moe");
    let copies: Vec<(String, Stored)> = sample.tensors.clone().into_iter().collect();
    for layer in [1, 4] {
        let renamed = copies
            .iter()
            .map(|(name, tensor)| (name.replace("layers.2.", &format!("layers.{layer}.")), tensor.clone()));
        sample.tensors.extend(renamed);
    }
    assert_eq!(sample.resolve().unwrap().layer, Some(1));
    sample.take("model.layers.1.mlp.experts.7.up_proj.weight");
    let resolved = sample.resolve().unwrap();
    assert_eq!(resolved.layer, Some(2));
    says(&resolved.notes[0], &["layer 1 was passed over", "model.layers.1.mlp.experts.7.up_proj.weight"]);
    for (layer, name) in [(1, "layers.1.mlp.experts.7.up_proj.weight"), (3, "layers.3.mlp.*")] {
        let error = resolve(&sample.open(), &Request { layer: Some(layer), ..ANY }).unwrap_err();
        assert!(matches!(error, Error::MissingTensor { .. }), "{error}");
        says(&error.to_string(), &[name, "1 of 1 shards in memory", "download"]);
    }
}

fn values(matrix: &Matrix<'_>) -> Vec<f32> {
    let [rows, cols] = matrix.shape();
    (0..rows).flat_map(|row| (0..cols).map(move |col| (row, col))).map(|(row, col)| matrix.get(row, col)).collect()
}

fn all(mlp: &MlpWeights<'_>) -> [Vec<f32>; 3] {
    [values(mlp.gate.as_ref().unwrap()), values(&mlp.up), values(&mlp.down)]
}

/// The same layer as transformers holds it in memory.
fn fused(case: &str, prefix: &str, [gate, up, down]: [&str; 3], count: usize) -> Sample {
    let mut sample = Sample::golden(case);
    let (mut gate_up, mut downs) = (Vec::new(), Vec::new());
    let mut shape = Vec::new();
    for id in 0..count {
        let mut take = |part: &str| sample.take(&format!("{prefix}experts.{id}.{part}.weight"));
        let (gate, up, down) = (take(gate), take(up), take(down));
        shape = gate.shape;
        gate_up.extend([gate.bytes, up.bytes].concat());
        downs.extend(down.bytes);
    }
    let (inner, hidden) = (shape[0], shape[1]);
    for (name, shape, bytes) in
        [("gate_up_proj", vec![count, 2 * inner, hidden], gate_up), ("down_proj", vec![count, hidden, inner], downs)]
    {
        sample.tensors.insert(format!("{prefix}experts.{name}"), Stored { dtype: Dtype::BF16, shape, bytes });
    }
    sample
}

#[test]
fn the_fused_layout_gives_the_same_weights() {
    let hub = ["gate_proj", "up_proj", "down_proj"];
    let short = ["w1", "w3", "w2"];
    for (case, prefix, names, count) in [
        ("deepseek_v3", "model.layers.3.mlp.", hub, 12),
        ("qwen3_moe", "model.layers.2.mlp.", hub, 8),
        ("mixtral", "model.layers.2.block_sparse_moe.", short, 8),
        ("deepseek_v4_topk", "layers.4.ffn.", short, 8),
        ("deepseek_v4_hash", "layers.1.ffn.", short, 8),
    ] {
        let (separate, fused) = (Sample::golden(case).open(), fused(case, prefix, names, count));
        let (one, other) = (resolve(&separate, &ANY).unwrap(), fused.resolve().unwrap());
        let mut expected = one.spec.clone();
        expected.experts.gate_up_layout = GateUpLayout::Halves;
        assert_eq!(other.spec, expected, "{case}");
        let checkpoint = fused.open();
        let (one, other) = (one.weights(&separate).unwrap(), other.weights(&checkpoint).unwrap());
        for (one, other) in one.experts.iter().zip(&other.experts) {
            assert_eq!(all(one), all(other), "{case}");
        }
        // Both layouts at once: one of them would be dropped.
        let name = format!("{prefix}experts.0.{}.weight", names[0]);
        let [inner, hidden] = expected_shape(&expected);
        says(&fused.zeros(&name, Dtype::BF16, &[inner, hidden]).refusal(), &[&name, "has a use for this tensor"]);
    }
}

fn expected_shape(spec: &MoeSpec) -> [usize; 2] {
    [spec.experts.intermediate_size, spec.hidden_size]
}

#[test]
fn the_fused_fp8_layout_gives_the_same_weights() {
    let (case, prefix, parts) = ("fp8_deepseek_v3", "model.layers.3.mlp.", ["gate_proj", "up_proj", "down_proj"]);
    let mut sample = fused(case, prefix, parts, 8);
    for tensor in sample
        .tensors
        .iter_mut()
        .filter(|(name, _)| name.contains("experts.gate_up") || name.ends_with("experts.down_proj"))
    {
        tensor.1.dtype = Dtype::F8_E4M3;
    }
    let (mut gate_up, mut down) = (Vec::new(), Vec::new());
    for id in 0..8 {
        let mut take = |part: &str| sample.take(&format!("{prefix}experts.{id}.{part}.weight_scale_inv")).bytes;
        gate_up.extend([take(parts[0]), take(parts[1])].concat());
        down.extend(take(parts[2]));
    }
    for (name, shape, bytes) in [("gate_up_proj", vec![8, 2, 2], gate_up), ("down_proj", vec![8, 2, 1], down)] {
        let stored = Stored { dtype: Dtype::F32, shape, bytes };
        sample.tensors.insert(format!("{prefix}experts.{name}_scale_inv"), stored);
    }
    let separate = Sample::golden(case).open();
    let fused = sample.open();
    let (one, other) = (resolve(&separate, &ANY).unwrap(), resolve(&fused, &ANY).unwrap());
    assert_eq!(other.spec.experts.format, FP8);
    let (one, other) = (one.weights(&separate).unwrap(), other.weights(&fused).unwrap());
    for (one, other) in one.experts.iter().zip(&other.experts) {
        assert_eq!(all(one), all(other));
    }
}

#[test]
fn gpt_oss_experts_are_stacked_transposed_and_interleaved() {
    let sample = Sample::golden("gpt_oss");
    let checkpoint = sample.open();
    let weights = resolve(&checkpoint, &ANY).unwrap().weights(&checkpoint).unwrap();
    let (hidden, inner) = (136, 48);
    let read = |name: &str| checkpoint.tensor(&format!("model.layers.2.mlp.{name}")).unwrap();
    let numbers = |name: &str, len: usize| read(name).to_f32(len).unwrap();
    let gate_up = numbers("experts.gate_up_proj", 8 * hidden * 2 * inner);
    let down = numbers("experts.down_proj", 8 * inner * hidden);
    let gate_up_bias = numbers("experts.gate_up_proj_bias", 8 * 2 * inner);
    let down_bias = numbers("experts.down_proj_bias", 8 * hidden);
    for (id, expert) in weights.experts.iter().enumerate() {
        let gate = expert.gate.as_ref().unwrap();
        for row in 0..inner {
            for col in 0..hidden {
                let at = (id * hidden + col) * 2 * inner + 2 * row;
                assert_eq!((gate.get(row, col), expert.up.get(row, col)), (gate_up[at], gate_up[at + 1]));
                assert_eq!(expert.down.get(col, row), down[(id * inner + row) * hidden + col]);
            }
            let at = 2 * (id * inner + row);
            let biases = (expert.gate_bias.as_ref().unwrap()[row], expert.up_bias.as_ref().unwrap()[row]);
            assert_eq!(biases, (gate_up_bias[at], gate_up_bias[at + 1]));
        }
        assert_eq!(expert.down_bias.as_ref().unwrap(), &down_bias[id * hidden..(id + 1) * hidden]);
    }
    assert_eq!(weights.router.bias.unwrap(), numbers("router.bias", 8));
    let mut sample = sample;
    sample.take("model.layers.2.mlp.experts.down_proj_bias");
    says(&sample.refusal(), &["model.layers.2.mlp.experts.down_proj_bias"]);
}

#[test]
fn deepseek_v4_takes_both_sets_of_names() {
    for case in ["deepseek_v4_topk", "deepseek_v4_hash"] {
        let original = Sample::golden(case);
        let hub = original.clone().rename(|name| {
            let parts = [("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj"), (".ffn.", ".mlp.")];
            let name = parts.iter().fold(name.to_owned(), |name, (from, to)| name.replace(from, to));
            format!("model.{}", name.replace("gate.bias", "gate.e_score_correction_bias"))
        });
        let (one, other) = (original.open(), hub.open());
        let (a, b) = (resolve(&one, &ANY).unwrap(), resolve(&other, &ANY).unwrap());
        assert_eq!(a.spec, b.spec, "{case}");
        let (a, b) = (a.weights(&one).unwrap(), b.weights(&other).unwrap());
        assert_eq!((a.router.selection_bias, a.router.tid2eid), (b.router.selection_bias, b.router.tid2eid), "{case}");
        assert_eq!(all(&a.experts[5]), all(&b.experts[5]), "{case}");
        assert_eq!(all(&a.shared[0]), all(&b.shared[0]), "{case}");
    }
}

#[test]
fn deepseek_v4_fp8_has_exponent_scales() {
    let mut sample = Sample::golden("deepseek_v4_topk").set("expert_dtype", "fp8").set(
        "quantization_config",
        json!({"quant_method": "fp8", "fmt": "e4m3", "scale_fmt": "ue8m0", "activation_scheme": "dynamic",
               "weight_block_size": [128, 128]}),
    );
    let matrices: Vec<String> = sample.tensors.keys().filter(|name| name.contains("experts.")).cloned().collect();
    for name in matrices {
        let shape = sample.take(&name).shape;
        let scale = name.replace(".weight", ".scale");
        sample = sample.zeros(&name, Dtype::F8_E4M3, &shape).zeros(&scale, Dtype::F8_E8M0, &[1, 1]);
    }
    let format = WeightFormat::Fp8Block { block: [128, 128], scale: ScaleFormat::E8m0 };
    let spec = sample.resolve().unwrap().spec;
    assert_eq!((spec.experts.format, spec.shared.unwrap().mlp.format), (format, format));
    sample.take("layers.4.ffn.shared_experts.w2.scale");
    says(&sample.refusal(), &["layers.4.ffn.shared_experts.w2.scale"]);
}

#[test]
fn layers_are_found_under_any_prefix_and_nowhere_else() {
    let plain = Sample::golden("deepseek_v3");
    for prefix in ["", "language_model.model.", "model.language_model.", "model.llm."] {
        let sample = plain.clone().rename(|name| name.replace("model.", prefix));
        assert_eq!(sample.resolve().unwrap().spec, plain.resolve().unwrap().spec, "{prefix}");
    }
    // Neither a draft layer nor a vision tower is a layer of the model; a second decoder is a riddle.
    let gate = "layers.4.mlp.gate.weight";
    for other in
        ["mtp.layers.4.mlp.gate.weight", "vision_tower.layers.3.mlp.fc1.weight", "model.xlayers.4.mlp.gate.weight"]
    {
        let sample = plain.clone().zeros(other, Dtype::BF16, &[12, 128]);
        assert_eq!(sample.resolve().unwrap().layer, Some(3), "{other}");
    }
    let twice = plain.zeros(&format!("talker.{}", gate.replace('4', "3")), Dtype::BF16, &[12, 128]);
    says(&twice.refusal(), &["model.layers.3.mlp.", "talker.layers.3.mlp.", "one module"]);
}

#[test]
fn a_tensor_without_a_use_is_refused() {
    for (case, name, shape) in [
        ("deepseek_v3", "model.layers.3.mlp.experts.12.gate_proj.weight", vec![48, 128]),
        ("deepseek_v3", "model.layers.3.mlp.gate.bias", vec![12]),
        ("deepseek_v3", "model.layers.3.mlp.gate.weight_scale_inv", vec![1, 1]),
        ("qwen3_moe", "model.layers.2.mlp.shared_expert_gate.weight", vec![1, 192]),
        ("qwen3_moe", "model.layers.2.mlp.gate.e_score_correction_bias", vec![8]),
        ("mixtral", "model.layers.2.block_sparse_moe.experts.0.w1.bias", vec![48]),
        ("gpt_oss", "model.layers.2.mlp.experts.gate_up_proj_lora_A", vec![2, 2]),
        ("deepseek_v4_topk", "layers.4.ffn.gate.bias_vl", vec![8]),
        ("deepseek_v4_hash", "layers.1.ffn.gate.bias", vec![8]),
        ("deepseek_v4_topk", "layers.4.ffn.gate.tid2eid", vec![96, 3]),
    ] {
        let error = Sample::golden(case).zeros(name, Dtype::BF16, &shape).resolve().unwrap_err();
        let Error::Unsupported(Unsupported { field, .. }) = &error else { panic!("{case}: {error}") };
        assert_eq!(field, name);
    }
    // Other layers and other parts of this one do not matter.
    let sample = Sample::golden("deepseek_v3")
        .zeros("model.layers.3.input_layernorm.weight", Dtype::BF16, &[128])
        .zeros("model.layers.4.mlp.gate.bias", Dtype::BF16, &[12])
        .zeros("model.layers.30.mlp.gate.bias", Dtype::BF16, &[12]);
    assert_eq!(sample.resolve().unwrap().layer, Some(3));
    let router = Sample::golden("routing_mixtral_8").zeros("gate.bias", Dtype::BF16, &[8]).open();
    says(&resolve_router(&router, &ANY).unwrap_err().to_string(), &["gate.bias", "has a use"]);
    let router = Sample::golden("routing_mixtral_8").zeros("other.weight", Dtype::BF16, &[8]).open();
    says(&resolve_router(&router, &ANY).unwrap_err().to_string(), &["gate.weight", "other.weight"]);
}

#[test]
fn experts_take_quantised_activations_if_they_are_quantised() {
    let quantised = |scale| ActivationQuant::dynamic_fp8(128, scale);
    let wanted = quantised(ActivationScale::F32);
    let request = Request { activations: wanted, ..ANY };
    let fp8 = Sample::golden("fp8_deepseek_v3");
    let resolved = resolve(&fp8.open(), &request).unwrap();
    assert_eq!(resolved.spec.experts.activation_quant, wanted);
    assert_eq!(resolved.spec.shared.unwrap().mlp.activation_quant, wanted);
    assert!(resolved.notes.is_empty(), "{:?}", resolved.notes);

    // A shared expert that is not quantised reads plain rows.
    let mut mixed = fp8;
    for part in ["gate_proj", "up_proj", "down_proj"] {
        let name = format!("model.layers.3.mlp.shared_experts.{part}");
        let shape = mixed.take(&format!("{name}.weight")).shape;
        mixed.take(&format!("{name}.weight_scale_inv"));
        mixed = mixed.zeros(&format!("{name}.weight"), Dtype::BF16, &shape);
    }
    let resolved = resolve(&mixed.open(), &request).unwrap();
    let shared = resolved.spec.shared.unwrap().mlp;
    assert_eq!((resolved.spec.experts.format, shared.format), (FP8, WeightFormat::Bf16));
    assert_eq!((resolved.spec.experts.activation_quant, shared.activation_quant), (wanted, ActivationQuant::None));
    says(&resolved.notes[0], &["shared expert is stored as Bf16"]);

    let ue8m0 = Sample::golden("fp8_qwen3_moe_ue8m0").open();
    says(&resolve(&ue8m0, &request).unwrap().notes[0], &["scale_fmt = ue8m0"]);
    let request = Request { activations: quantised(ActivationScale::F32CeilPow2), ..ANY };
    assert!(resolve(&ue8m0, &request).unwrap().notes.is_empty());

    for error in [
        resolve(&Sample::golden("deepseek_v3").open(), &request).unwrap_err(),
        resolve_router(&Sample::golden("routing_mixtral_8").open(), &request).unwrap_err(),
    ] {
        assert!(matches!(&error, Error::Unsupported(Unsupported { field, .. }) if field == "activations"), "{error}");
    }
}

#[test]
fn formats_come_from_dtypes() {
    // Correction biases that a re-save rounded to bf16 are read as they are.
    let mut sample = Sample::golden("deepseek_v3");
    sample.take("model.layers.3.mlp.gate.e_score_correction_bias");
    sample = sample.zeros("model.layers.3.mlp.gate.e_score_correction_bias", Dtype::BF16, &[1, 12]);
    sample.take("model.layers.3.mlp.gate.weight");
    sample = sample.zeros("model.layers.3.mlp.gate.weight", Dtype::F32, &[12, 128]);
    let spec = sample.resolve().unwrap().spec;
    assert!(matches!(spec.router, Router::Linear { format: WeightFormat::F32, .. }));
    assert_eq!(spec.experts.format, WeightFormat::Bf16);

    let fp8 = Sample::golden("fp8_deepseek_v3").unset("quantization_config");
    says(&fp8.refusal(), &["F8_E4M3 weights and no quantization_config", "add the model's quantization_config"]);
    let stale = Sample::golden("deepseek_v3")
        .set("quantization_config", json!({"quant_method": "fp8", "weight_block_size": [128, 128]}));
    says(&stale.resolve().unwrap().notes[0], &["quantization_config says fp8", "Bf16"]);
}
