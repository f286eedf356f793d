//! Every key of `config.json` that a family reads: its values, its absence, its null, its wrong types.

use moewe::error::{Error, Unsupported};
use moewe::families::resolve;
use moewe::spec::*;
use serde_json::{Value, json};

use crate::samples::{ANY, Sample, open, says};

#[test]
fn keys_of_published_configs_are_known() {
    let v3 = json!({"auto_map": {}, "ep_size": 1, "aux_loss_alpha": 0.001, "seq_aux": true, "rope_scaling": {"type": "yarn"},
        "rope_theta": 10000, "torch_dtype": "bfloat16", "index_topk": 2048, "index_n_heads": 64, "index_head_dim": 128});
    let qwen3 = json!({"num_experts": 8, "max_window_layers": 48, "rope_scaling": null, "rope_theta": 1e6});
    let mixtral = json!({"rope_theta": 1e6, "torch_dtype": "bfloat16"});
    let gpt_oss =
        json!({"experts_per_token": 4, "initial_context_length": 4096, "rope_theta": 150000, "rope_scaling": {}});
    let v4 = json!({"num_hash_layers": 3, "topk_method": "noaux_tc", "expert_dtype": "fp8", "compress_ratios": [0],
        "index_topk": 512, "rope_scaling": {}, "dspark_markov_rank": 1, "dspark_target_layer_ids": [40]});
    let cases = [
        ("deepseek_v3", v3),
        ("qwen3_moe", qwen3),
        ("mixtral", mixtral),
        ("gpt_oss", gpt_oss),
        ("deepseek_v4_topk", v4),
        ("deepseek_v3", json!({"model_type": "kimi_k2"})),
        ("deepseek_v3", json!({"model_type": "deepseek_v32"})),
        ("qwen3_moe", json!({"model_type": "qwen3_moe_text"})),
    ];
    for (case, keys) in cases {
        let mut sample = Sample::golden(case);
        sample.config.extend(keys.as_object().unwrap().clone());
        assert_eq!(sample.resolve().unwrap().unknown_keys, [""; 0], "{case}");
    }
}

#[test]
fn unknown_values_are_refused_by_name() {
    let cases = [
        ("deepseek_v3", "hidden_act", json!("gelu")),
        ("deepseek_v3", "scoring_func", json!("softmax")),
        ("deepseek_v3", "topk_method", json!("greedy")),
        ("qwen3_moe", "hidden_act", json!("relu")),
        ("mixtral", "hidden_act", json!("quick_gelu")),
        ("gpt_oss", "hidden_act", json!("swish")),
        ("deepseek_v4_topk", "hidden_act", json!("gelu")),
        ("deepseek_v4_topk", "scoring_func", json!("sigmoid")),
        ("deepseek_v4_topk", "topk_method", json!("group_limited_greedy")),
        ("deepseek_v4_topk", "expert_dtype", json!("fp6")),
        ("deepseek_v4_topk", "mlp_bias", json!(true)),
        ("deepseek_v3", "quantization_config.quant_method", json!("quark")),
        ("fp8_deepseek_v3", "quantization_config.quant_method", json!("bitsandbytes")),
        ("fp8_deepseek_v3", "quantization_config.fmt", json!("e5m2")),
        ("fp8_deepseek_v3", "quantization_config.activation_scheme", json!("sometimes")),
        ("fp8_deepseek_v3", "quantization_config.scale_fmt", json!("e4m3")),
        ("fp8_deepseek_v3", "quantization_config.expert_dtype", json!("fp6")),
    ];
    for (case, field, value) in cases {
        let mut sample = Sample::golden(case);
        let shown = value.to_string();
        match field.split_once('.') {
            None => drop(sample.config.insert(field.into(), value)),
            Some((outer, key)) => {
                let object = sample.config.entry(outer).or_insert(json!({}));
                object[key] = value;
            }
        }
        let error = sample.resolve().unwrap_err();
        let Error::Unsupported(Unsupported { backend, field: found, value, because }) = error else {
            panic!("{case} {field}: {error}")
        };
        assert!(backend.starts_with("family "), "{backend}");
        assert_eq!((found.as_ref(), &value), (field, &shown), "{case}");
        assert!(!because.is_empty());
    }
    let sample =
        Sample::golden("deepseek_v4_topk").set("mlp_layer_types", json!(["moe", "dense", "moe", "moe", "moe", "moe"]));
    says(&sample.refusal(), &["family deepseek_v4", "mlp_layer_types", "\"dense\"", "hash_moe or moe"]);
    // Without blocks there is a scale for a matrix or for each of its rows.
    let mut sample = Sample::golden("fp8_deepseek_v3");
    sample.config["quantization_config"].as_object_mut().unwrap().shift_remove("weight_block_size");
    says(&sample.refusal(), &["weight_scale_inv", "[1, 2]", "Fp8Tensor, Fp8Channel"]);
}

#[test]
fn a_missing_key_is_named_and_has_no_default() {
    let cases: [(&str, &[&str]); 5] = [
        (
            "deepseek_v3",
            &[
                "model_type",
                "hidden_act",
                "hidden_size",
                "num_hidden_layers",
                "n_routed_experts",
                "num_experts_per_tok",
                "moe_intermediate_size",
                "n_shared_experts",
                "routed_scaling_factor",
                "norm_topk_prob",
                "n_group",
                "topk_group",
                "first_k_dense_replace",
            ],
        ),
        (
            "qwen3_moe",
            &[
                "hidden_act",
                "hidden_size",
                "num_hidden_layers",
                "num_local_experts",
                "num_experts_per_tok",
                "moe_intermediate_size",
                "norm_topk_prob",
                "decoder_sparse_step",
                "mlp_only_layers",
            ],
        ),
        ("mixtral", &["hidden_act", "hidden_size", "num_local_experts", "num_experts_per_tok", "intermediate_size"]),
        ("gpt_oss", &["hidden_size", "num_local_experts", "num_experts_per_tok", "intermediate_size"]),
        (
            "deepseek_v4_hash",
            &[
                "hidden_act",
                "scoring_func",
                "mlp_layer_types",
                "vocab_size",
                "n_routed_experts",
                "n_shared_experts",
                "routed_scaling_factor",
                "norm_topk_prob",
                "moe_intermediate_size",
            ],
        ),
    ];
    for (case, keys) in cases {
        for key in keys {
            let error = Sample::golden(case).unset(key).resolve().unwrap_err();
            let Error::Invalid { field, found, expected: _, remedy: _ } = &error else {
                panic!("{case} {key}: {error}")
            };
            assert!(field.contains(key), "{case} {key}: {error}");
            assert_eq!(found, "no such key");
        }
    }
    // Fixed by the architecture.
    for (case, key) in [
        ("deepseek_v3", "scoring_func"),
        ("deepseek_v3", "topk_method"),
        ("deepseek_v3", "moe_layer_freq"),
        ("gpt_oss", "hidden_act"),
        ("gpt_oss", "swiglu_alpha"),
        ("deepseek_v4_hash", "mlp_bias"),
    ] {
        let spec = Sample::golden(case).resolve().unwrap().spec;
        assert_eq!(Sample::golden(case).unset(key).resolve().unwrap().spec, spec, "{case} {key}");
    }
}

#[test]
fn null_differs_from_missing() {
    let spec = Sample::golden("deepseek_v3").set("routed_scaling_factor", Value::Null).resolve().unwrap().spec;
    assert_eq!(spec.routing.routed_scaling_factor, 1.0);
    for none in [json!(null), json!(0)] {
        let mut sample = Sample::golden("deepseek_v3").set("n_shared_experts", none);
        says(&sample.refusal(), &["shared_experts", "has a use for this tensor"]);
        sample.tensors.retain(|name, _| !name.contains("shared_experts"));
        assert_eq!(sample.resolve().unwrap().spec.shared, None);
    }
    let spec = Sample::golden("qwen3_moe").set("mlp_only_layers", Value::Null).resolve().unwrap().spec;
    assert_eq!(spec, Sample::golden("qwen3_moe").resolve().unwrap().spec);
    for (case, key) in [
        ("deepseek_v3", "norm_topk_prob"),
        ("deepseek_v3", "n_group"),
        ("deepseek_v3", "moe_layer_freq"),
        ("deepseek_v3", "scoring_func"),
        ("qwen3_moe", "num_local_experts"),
        ("gpt_oss", "swiglu_alpha"),
        ("deepseek_v4_hash", "num_hash_layers"),
    ] {
        let error = Sample::golden(case).set(key, Value::Null).resolve().unwrap_err();
        assert!(matches!(error, Error::Invalid { .. }), "{case} {key}: {error}");
        says(&error.to_string(), &[key, "found null", "expected"]);
    }
    let sample = Sample::golden("deepseek_v3").set("quantization_config", Value::Null);
    assert!(sample.resolve().unwrap().unknown_keys.is_empty());
}

#[test]
fn norm_topk_prob_false_does_not_renormalise() {
    for case in ["deepseek_v3", "qwen3_moe", "deepseek_v4_topk"] {
        let spec = Sample::golden(case).set("norm_topk_prob", false).resolve().unwrap().spec;
        assert_eq!(spec.routing.renormalize, None, "{case}");
    }
}

#[test]
fn the_clamp_limit_follows_one_rule() {
    let limits = |value: Option<&str>| -> moewe::Result<Vec<Option<f32>>> {
        ["gpt_oss", "deepseek_v4_topk"]
            .into_iter()
            .map(|case| {
                let mut sample = Sample::golden(case);
                sample.config.shift_remove("swiglu_limit");
                let mut config = Value::Object(sample.config.clone()).to_string();
                if let Some(value) = value {
                    config.insert_str(1, &format!("\"swiglu_limit\": {value},"));
                }
                let resolved = resolve(&open(&config, sample.file())?, &ANY)?;
                let noted = resolved.notes.iter().any(|note| note.contains("swiglu_limit is not in config.json"));
                assert_eq!(noted, value.is_none());
                let (Activation::Swiglu { limit } | Activation::SwigluOai { alpha: _, limit, beta: _ }) =
                    resolved.spec.experts.activation
                else {
                    panic!("{:?}", resolved.spec.experts.activation)
                };
                if let Some(SharedExperts { mlp, gate: _, combination: _ }) = resolved.spec.shared {
                    assert_eq!(mlp.activation, Activation::Swiglu { limit });
                }
                Ok(limit)
            })
            .collect()
    };
    for (value, limit) in [
        (None, None),
        (Some("null"), None),
        (Some("0"), None),
        (Some("-0.0"), None),
        (Some("-3"), None),
        (Some("Infinity"), None),
        (Some("-Infinity"), None),
        (Some("1e999"), None),
        (Some("1e300"), None),
        (Some("\"inf\""), None),
        (Some("{\"__float__\": \"Infinity\"}"), None),
        (Some("7"), Some(7.0)),
        (Some("0.5"), Some(0.5)),
        (Some("1e-6"), Some(1e-6)),
    ] {
        assert_eq!(limits(value).unwrap(), [limit, limit], "{value:?}");
    }
    for value in ["NaN", "\"nan\"", "{\"__float__\": \"NaN\"}", "true", "\"ten\"", "[7]", "{}", "1e-60"] {
        let error = limits(Some(value)).unwrap_err();
        assert!(matches!(error, Error::Invalid { .. }), "{value}: {error}");
        says(&error.to_string(), &["swiglu_limit", "expected a"]);
    }
}

#[test]
fn wrong_types_are_refused_by_key() {
    let integers =
        [json!("8"), json!(-1), json!(2.5), json!(8.0), json!(1_u64 << 40), json!(u64::MAX), json!([8]), json!(true)];
    for value in integers {
        for key in
            ["hidden_size", "n_routed_experts", "num_experts_per_tok", "num_hidden_layers", "first_k_dense_replace"]
        {
            let error = Sample::golden("deepseek_v3").set(key, value.clone()).resolve().unwrap_err();
            assert!(matches!(error, Error::Invalid { .. }), "{key} {value}: {error}");
            says(&error.to_string(), &[key, &format!("found {value}"), "expected an integer", "config.json"]);
        }
    }
    for (case, key, value, expected) in [
        ("deepseek_v3", "hidden_size", json!(0), "an integer from 1"),
        ("deepseek_v3", "num_hidden_layers", json!(1 << 20), "at most 65536 layers"),
        ("deepseek_v3", "moe_layer_freq", json!(0), "an integer from 1"),
        ("deepseek_v3", "moe_layer_freq", json!([0, 1]), "an integer from 1"),
        ("deepseek_v3", "norm_topk_prob", json!(1), "true or false"),
        ("deepseek_v3", "norm_topk_prob", json!("true"), "true or false"),
        ("deepseek_v3", "routed_scaling_factor", json!("2.5"), "a number"),
        ("deepseek_v3", "routed_scaling_factor", json!(1e300), "finite in f32"),
        ("deepseek_v3", "hidden_act", json!(1), "silu"),
        ("deepseek_v3", "model_type", json!(3), "the name of an architecture"),
        ("deepseek_v3", "quantization_config", json!([]), "an object or null"),
        ("qwen3_moe", "decoder_sparse_step", json!(0), "an integer from 1"),
        ("qwen3_moe", "mlp_only_layers", json!(3), "a list of integers"),
        ("qwen3_moe", "mlp_only_layers", json!(["3"]), "an integer from 0"),
        ("deepseek_v4_topk", "mlp_layer_types", json!("moe"), "a list of words"),
        ("deepseek_v4_topk", "mlp_layer_types", json!(["moe"]), "num_hidden_layers = 6"),
        ("deepseek_v4_topk", "mlp_layer_types", json!([1]), "hash_moe or moe"),
    ] {
        let error = Sample::golden(case).set(key, value).resolve().unwrap_err();
        assert!(matches!(error, Error::Invalid { .. }), "{case} {key}: {error}");
        says(&error.to_string(), &[key, expected]);
    }
}

#[test]
fn two_spellings_must_agree() {
    for (case, key, same, other) in [
        ("qwen3_moe", "num_experts", json!(8), json!(16)),
        ("gpt_oss", "experts_per_token", json!(4), json!(2)),
        ("deepseek_v4_topk", "num_hash_layers", json!(3), json!(2)),
    ] {
        let spec = Sample::golden(case).resolve().unwrap().spec;
        assert_eq!(Sample::golden(case).set(key, same).resolve().unwrap().spec, spec);
        let error = Sample::golden(case).set(key, other).resolve().unwrap_err();
        assert!(matches!(error, Error::Invalid { .. }), "{error}");
        says(&error.to_string(), &[key]);
    }
    let spec =
        Sample::golden("deepseek_v4_topk").unset("mlp_layer_types").set("num_hash_layers", 3).resolve().unwrap().spec;
    assert_eq!(spec, Sample::golden("deepseek_v4_topk").resolve().unwrap().spec);
}
