//! OLMoE, FlexOlmo and Jamba: softmax over all experts, then the k best, nothing beside them.
//!
//! Source: `OlmoeSparseMoeBlock`, `FlexOlmoSparseMoeBlock` and `JambaSparseMoeBlock` of transformers.

use super::config::Config;
use super::model::{Block, Family, Kinds, Model, SOFTMAX, Sizes, activation};
use super::names::{MLP, Names};
use crate::error::Result;
use crate::spec::Denominator;

const NAMES: Names = Names { selection_bias: &[], shared: &[], ..MLP };

pub(super) const OLMOE: Family = Family {
    name: "olmoe",
    model_types: &["olmoe"],
    examples: &["OLMoE-1B-7B"],
    irrelevant: &[],
    names: NAMES,
    read: olmo,
};

pub(super) const FLEX_OLMO: Family = Family {
    name: "flex_olmo",
    model_types: &["flex_olmo"],
    examples: &["FlexOlmo-7x7B-1T"],
    irrelevant: &[],
    names: NAMES,
    read: olmo,
};

pub(super) const JAMBA: Family = Family {
    name: "jamba",
    model_types: &["jamba"],
    examples: &["Jamba 1.5, 1.6"],
    irrelevant: &[],
    names: Names { modules: &["feed_forward"], router: &["router"], ..NAMES },
    read: |config| {
        let layers = config.num_layers()?;
        let period = config.size(&["expert_layer_period"])?;
        let offset = config.count(&["expert_layer_offset"])?;
        let block = block(config)?;
        let keys = "num_experts, expert_layer_period and expert_layer_offset";
        let moe = |layer: usize| block.num_experts > 1 && layer % period == offset;
        // Never renormalised.
        Ok(Model::new(Kinds::where_(layers, keys, moe), &block))
    },
};

fn olmo(config: &Config<'_>) -> Result<Model> {
    // Required: OLMoE weighs with the probabilities as they are.
    let renormalize = config.flag(&["norm_topk_prob"])?.then_some(Denominator::Sum);
    Ok(Model::new(Kinds::all(config.num_layers()?), &Block { renormalize, ..block(config)? }))
}

fn block(config: &Config<'_>) -> Result<Block> {
    let experts = &["num_experts", "num_local_experts"];
    let sizes = Sizes::read(config, experts, &["num_experts_per_tok"], &["intermediate_size"])?;
    Ok(Block::new(sizes, SOFTMAX, activation(config, "hidden_act")?))
}
