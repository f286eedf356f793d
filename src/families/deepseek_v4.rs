//! DeepSeek-V4: sqrt-softplus scores, a selection bias or, in the first layers, experts looked up by
//! token id; gate and up are clamped in routed and shared experts alike.
//!
//! Source: `DeepseekV4SparseMoeBlock` of transformers; DeepSeek-V4 `inference/model.py`.

use super::config::Config;
use super::deepseek_v3;
use super::model::{Block, Family, Kinds, Model, silu, swiglu_limit};
use super::names::{FUSED, MLP, Names, PROJ, SHARED_EXPERTS, SHORT, short};
use crate::error::Result;
use crate::spec::{Activation, RoutingMethod, Score, SelectionKey};

pub(super) const FAMILY: Family = Family {
    name: "deepseek_v4",
    model_types: &["deepseek_v4"],
    examples: &["DeepSeek-V4-Flash, V4-Pro"],
    irrelevant: &[
        // compressed attention, output projection
        "compress_rates",
        "compress_ratios",
        "compress_rope_theta",
        "o_groups",
        "o_lora_rank",
        // noise on the router's input in training
        "router_jitter_noise",
        // speculative decoding
        "dspark_markov_rank",
        "dspark_target_layer_ids",
    ],
    // The authors' own names, and those of transformers.
    names: Names {
        modules: &["ffn", "mlp"],
        selection_bias: &["gate.bias", "gate.e_score_correction_bias"],
        tid2eid: &["gate.tid2eid"],
        experts: &[FUSED, SHORT, PROJ],
        shared: &[short("shared_experts"), SHARED_EXPERTS],
        ..MLP
    },
    read,
};

fn read(config: &Config<'_>) -> Result<Model> {
    silu(config)?;
    config.word("scoring_func", &["sqrtsoftplus"])?;
    config.optional_word("topk_method", &["noaux_tc"])?;
    config.fixed("mlp_bias", false)?;

    let score = Score::SqrtSoftplus;
    let top_k = RoutingMethod::TopK { score, key: SelectionKey::ScorePlusBias, groups: None };
    let activation = Activation::Swiglu { limit: swiglu_limit(config, "DeepSeek-V4 has 10")? };
    let block = Block::new(deepseek_v3::sizes(config)?, top_k.clone(), activation);
    let block = Block {
        renormalize: deepseek_v3::renormalize(config)?,
        routed_scaling_factor: config.nullable_number(&["routed_scaling_factor"])?.unwrap_or(1.0),
        shared: deepseek_v3::shared(config, block.intermediate_size, activation)?,
        ..block
    };
    let hashed = hashed(config)?;
    let hash = match hashed.contains(&true) {
        true => RoutingMethod::Hash { score, vocab_size: config.size(&["vocab_size"])? },
        false => top_k.clone(),
    };
    let kinds = Kinds { moe: vec![true; hashed.len()], keys: "mlp_layer_types" };
    Model::each(kinds, |layer| {
        let hashed = hashed.get(layer).copied().unwrap_or(false);
        Ok(Block { method: if hashed { hash.clone() } else { top_k.clone() }, ..block.clone() })
    })
}

/// Which layers are hash-routed: DeepSeek counts them, transformers lists the kind of each.
fn hashed(config: &Config<'_>) -> Result<Vec<bool>> {
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
    match (counted, listed) {
        (Some(counted), Some(listed)) if counted != listed => {
            let found = "other hash layers than mlp_layer_types";
            Err(config.contradiction("num_hash_layers", found, "the same layers under both keys"))
        }
        (Some(hashed), _) | (None, Some(hashed)) => Ok(hashed),
        (None, None) => {
            let keys = "num_hash_layers or mlp_layer_types";
            Err(config.missing(keys, "the hash-routed layers, counted or listed"))
        }
    }
}
