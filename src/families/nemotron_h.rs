//! Nemotron 3: DeepSeek-V3's router, experts without gate, for the larger models at a latent width.
//!
//! Source: `NemotronHMoE` of transformers.

use serde_json::Value;

use super::config::{Config, show};
use super::deepseek_v3;
use super::model::{Block, Family, Kinds, Model, Shared};
use super::names::{LatentNames, Layout, MLP, Mlp, Names, Parts};
use crate::error::Result;
use crate::spec::{Activation, LatentNorm};

const PARTS: Parts = Parts { gate: None, up: "up_proj", down: "down_proj" };

pub(super) const FAMILY: Family = Family {
    name: "nemotron_h",
    model_types: &["nemotron_h"],
    examples: &["Nemotron-3-Nano-30B-A3B, Super"],
    irrelevant: &[
        // width of the dense layers, their number, biases of the state spaces
        "intermediate_size",
        "num_hidden_layers",
        "use_bias",
        // the class has one shared expert of a width of its own, whatever this says
        "n_shared_experts",
        "attention_head_dim",
    ],
    names: Names {
        modules: &["mixer"],
        experts: &[
            Mlp { module: "experts", layout: Layout::Stacked(PARTS) },
            Mlp { module: "experts", layout: Layout::Each(PARTS) },
        ],
        shared: &[Mlp { module: "shared_experts", layout: Layout::Each(PARTS) }],
        latent: Some(LatentNames {
            down: "fc1_latent_proj",
            up: "fc2_latent_proj",
            norm: "",
            post_norm: "",
            zero_centred: false,
        }),
        ..MLP
    },
    read,
};

fn read(config: &Config<'_>) -> Result<Model> {
    config.word("mlp_hidden_act", &["relu2"])?;
    // Absent from the configs of models without latent experts.
    let latent = config.any_count(&["moe_latent_size"])?.map(|size| (size, LatentNorm::None));
    // Of the shared expert and of the latent projections, which have none here.
    let biases = config.optional_flag("mlp_bias")?.unwrap_or(false);
    if latent.is_some() {
        config.fixed("mlp_bias", false)?;
    }
    let width = config.count(&["moe_shared_expert_intermediate_size"])?;
    let block = deepseek_v3::routed(config, Activation::Relu2)?;
    let shared = Shared::plain(width, Activation::Relu2).map(|shared| Shared { biases, ..shared });
    let block = Block { latent, shared, ..block };
    Ok(Model::new(kinds(config)?, &block))
}

/// A word or a letter for each layer.
fn kinds(config: &Config<'_>) -> Result<Kinds> {
    for key in ["layers_block_type", "layer_types"] {
        if config.has(key) {
            let known = ["moe", "mlp", "mamba", "attention", "linear_attention", "full_attention", "sliding_attention"];
            let words = config.words(key, &known)?.unwrap_or_default();
            config.get("hybrid_override_pattern");
            return Ok(Kinds { moe: words.iter().map(|word| *word == "moe").collect(), keys: key });
        }
    }
    let key = "hybrid_override_pattern";
    match config.get(key) {
        Some(Value::String(letters)) if letters.chars().all(|letter| "ME*-".contains(letter)) => {
            Ok(Kinds { moe: letters.chars().map(|letter| letter == 'E').collect(), keys: key })
        }
        Some(value) => Err(config.contradiction(key, show(value), "a letter of M, E, * and - for each layer")),
        None => Err(config.missing("layers_block_type or hybrid_override_pattern", "the kind of each layer")),
    }
}
