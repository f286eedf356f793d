//! Llama 4: a sigmoid of the largest logits, which multiplies what the expert reads.
//!
//! Source: `Llama4TextMoe` of transformers.

use super::config::Config;
use super::model::{Block, Family, Kinds, Model, Shared, Sizes, activation};
use super::names::{MLP, Names, SHARED_EXPERT};
use crate::error::Result;
use crate::spec::{ChosenScore, RoutingMethod, WeightPosition};

pub(super) const FAMILY: Family = Family {
    name: "llama4",
    model_types: &["llama4"],
    examples: &["Llama 4 Scout, Maverick"],
    // Width of the dense layers; noise in training; a mark of a tool.
    irrelevant: &["for_llm_compressor", "intermediate_size_mlp", "router_jitter_noise"],
    names: Names {
        modules: &["feed_forward"],
        router: &["router"],
        selection_bias: &[],
        shared: &[SHARED_EXPERT],
        ..MLP
    },
    read,
};

fn read(config: &Config<'_>) -> Result<Model> {
    let experts = &["num_local_experts", "num_experts"];
    let sizes = Sizes::read(config, experts, &["num_experts_per_tok"], &["intermediate_size"])?;
    let method = RoutingMethod::TopKThenScore { score: ChosenScore::Sigmoid };
    let block = Block::new(sizes, method, activation(config, "hidden_act")?);
    let block = Block {
        weight_position: WeightPosition::Input,
        // As wide as one routed expert.
        shared: Shared::plain(block.intermediate_size, block.activation),
        ..block
    };
    let layers = config.num_layers()?;
    let kinds = match config.any_integers("moe_layers")? {
        Some(listed) => {
            config.get("interleave_moe_layer_step");
            Kinds::where_(layers, "moe_layers", |layer| listed.contains(&layer))
        }
        None => {
            let step = config.size(&["interleave_moe_layer_step"])?;
            Kinds::where_(layers, "interleave_moe_layer_step", |layer| (layer + 1).is_multiple_of(step))
        }
    };
    Ok(Model::new(kinds, &block))
}
