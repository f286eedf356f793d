//! DeepSeek-V4: sqrt-softplus scores, a selection bias or, in the first layers, experts looked up by
//! token id; gate and up are clamped in routed and shared experts alike.
//!
//! Source: `DeepseekV4SparseMoeBlock` of transformers; DeepSeek-V4 `inference/model.py`.

use super::config::Config;
use super::names::{Names, Stacked};
use super::{Family, Layer, Model, unclamped};
use crate::error::Result;
use crate::spec::{Activation, Denominator, RoutingMethod, Score, SelectionKey};

pub(super) const FAMILY: Family = Family {
    name: "deepseek_v4",
    model_types: &["deepseek_v4"],
    irrelevant: &[
        // compressed and sparse attention, hyper-connections, output projection
        "compress_rates",
        "compress_ratios",
        "compress_rope_theta",
        "hc_eps",
        "hc_mult",
        "hc_sinkhorn_iters",
        "index_head_dim",
        "index_n_heads",
        "index_topk",
        "o_groups",
        "o_lora_rank",
        // noise on the router's input in training
        "router_jitter_noise",
        // speculative decoding
        "dspark_markov_rank",
        "dspark_target_layer_ids",
    ],
    modules: &[ORIGINAL, HUB],
    read,
};

/// The authors' own names.
const ORIGINAL: Names = Names {
    module: "ffn",
    router: "gate",
    router_bias: None,
    selection_bias: Some("gate.bias"),
    tid2eid: Some("gate.tid2eid"),
    projections: Some(["w1", "w3", "w2"]),
    scale: "scale",
    shared: Some("shared_experts"),
    stacked: Stacked::HALVES,
};

/// As transformers names the module's parts.
const HUB: Names = Names {
    module: "mlp",
    router: "gate",
    router_bias: None,
    selection_bias: Some("gate.e_score_correction_bias"),
    tid2eid: Some("gate.tid2eid"),
    projections: Some(["gate_proj", "up_proj", "down_proj"]),
    scale: "weight_scale_inv",
    shared: Some("shared_experts"),
    stacked: Stacked::HALVES,
};

fn read(config: &Config<'_>) -> Result<Model> {
    config.word("hidden_act", &["silu"])?;
    config.word("scoring_func", &["sqrtsoftplus"])?;
    config.optional_word("topk_method", &["noaux_tc"])?;
    // The published experts are FP4; only the FP8 and BF16 variants can be run.
    config.optional_word("expert_dtype", &["fp8"])?;
    if let Some(value) = config.get("mlp_bias").filter(|value| value.as_bool() != Some(false)) {
        return Err(config.unsupported("mlp_bias", value, "the family's experts have no biases"));
    }

    let activation = Activation::Swiglu { limit: config.limit("swiglu_limit")? };
    Ok(Model {
        hidden_size: config.size(&["hidden_size"])?,
        num_experts: config.size(&["n_routed_experts"])?,
        top_k: config.size(&["num_experts_per_tok"])?,
        layers: layers(config)?,
        dense_keys: "mlp_layer_types",
        renormalize: config.flag("norm_topk_prob")?.then_some(Denominator::SumPlus { eps: 1e-20 }),
        routed_scaling_factor: config.nullable_number("routed_scaling_factor")?.unwrap_or(1.0),
        intermediate_size: config.size(&["moe_intermediate_size"])?,
        activation,
        shared: config.nullable_count("n_shared_experts")?.filter(|count| *count > 0),
        shared_activation: activation,
        notes: unclamped(config, "DeepSeek-V4 has 10"),
    })
}

/// The routing of each layer: DeepSeek counts the hash-routed ones, transformers lists the kind of each.
fn layers(config: &Config<'_>) -> Result<Vec<Layer>> {
    let num_layers = config.num_layers()?;
    let listed: Option<Vec<bool>> = config
        .words("mlp_layer_types", &["hash_moe", "moe"])?
        .map(|words| words.iter().map(|word| *word == "hash_moe").collect());
    if let Some(listed) = listed.as_ref().filter(|listed| listed.len() != num_layers) {
        let found = format!("{} entries", listed.len());
        return Err(config.contradiction("mlp_layer_types", found, format!("num_hidden_layers = {num_layers}")));
    }
    let counted: Option<Vec<bool>> =
        config.optional_count("num_hash_layers", 0)?.map(|count| (0..num_layers).map(|layer| layer < count).collect());
    let hashed = match (counted, listed) {
        (Some(counted), Some(listed)) if counted != listed => {
            let found = "other hash layers than mlp_layer_types";
            return Err(config.contradiction("num_hash_layers", found, "the same layers under both keys"));
        }
        (Some(hashed), _) | (None, Some(hashed)) => hashed,
        (None, None) => {
            let keys = "num_hash_layers or mlp_layer_types";
            return Err(config.missing(keys, "the hash-routed layers, counted or listed"));
        }
    };
    let score = Score::SqrtSoftplus;
    let top_k = RoutingMethod::TopK { score, key: SelectionKey::ScorePlusBias, groups: None };
    let hash = match hashed.contains(&true) {
        true => RoutingMethod::Hash { score, vocab_size: config.size(&["vocab_size"])? },
        false => top_k.clone(),
    };
    Ok(hashed.iter().map(|hashed| Layer::Moe(if *hashed { hash.clone() } else { top_k.clone() })).collect())
}
