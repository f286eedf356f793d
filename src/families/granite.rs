//! Granite 3 and 4, and JetMoE: the k largest logits, then a softmax over them; experts stacked in two tensors.
//!
//! Source: `GraniteMoeMoE`, `GraniteMoeSharedMLP`, `GraniteMoeHybridMoE` and `JetMoeMoE` of transformers.

use super::config::Config;
use super::model::{Block, Family, Kinds, Model, Shared, Sizes, activation};
use super::names::{FUSED, MLP, Mlp, Names, fused};
use crate::error::Result;
use crate::spec::{ChosenScore, GateUpLayout, RoutingMethod};

const METHOD: RoutingMethod = RoutingMethod::TopKThenScore { score: ChosenScore::Softmax };
const LINEARS: Mlp = fused("", "input_linear.weight", "output_linear.weight", GateUpLayout::Halves);

const ROUTED: Names = Names {
    modules: &["block_sparse_moe"],
    router: &["router.layer", "router"],
    selection_bias: &[],
    experts: &[FUSED, LINEARS],
    shared: &[],
    ..MLP
};
const WITH_SHARED: Names = Names {
    beside: &["shared_mlp"],
    shared: &[fused("shared_mlp", "input_linear.weight", "output_linear.weight", GateUpLayout::Halves)],
    ..ROUTED
};

pub(super) const GRANITEMOE: Family = Family {
    name: "granitemoe",
    model_types: &["granitemoe"],
    examples: &["Granite 3.0 1B-A400M, 3B-A800M"],
    irrelevant: &[],
    names: ROUTED,
    read: |config| Ok(Model::new(Kinds::all(config.num_layers()?), &block(config)?)),
};

pub(super) const GRANITEMOESHARED: Family = Family {
    name: "granitemoeshared",
    model_types: &["granitemoeshared"],
    examples: &["Granite MoE with shared experts"],
    irrelevant: &[],
    names: WITH_SHARED,
    read: |config| Ok(Model::new(Kinds::all(config.num_layers()?), &shared(config)?)),
};

pub(super) const GRANITEMOEHYBRID: Family = Family {
    name: "granitemoehybrid",
    model_types: &["granitemoehybrid"],
    examples: &["Granite 4.0-H Tiny, Small"],
    // Kinds of attention.
    irrelevant: &["layers_block_type"],
    names: WITH_SHARED,
    read: |config| {
        let layers = config.num_layers()?;
        if config.count(&["num_local_experts"])? == 0 {
            return Ok(Model { dense_keys: "num_local_experts", layers: vec![super::model::Layer::Dense; layers] });
        }
        Ok(Model::new(Kinds::all(layers), &shared(config)?))
    },
};

pub(super) const JETMOE: Family = Family {
    name: "jetmoe",
    model_types: &["jetmoe"],
    examples: &["JetMoE-8B"],
    irrelevant: &[],
    names: Names { modules: &["mlp"], output_bias: &["bias"], ..ROUTED },
    read: |config| {
        config.fixed("glu", true)?;
        // The authors' own config spells the sizes otherwise.
        let sizes = Sizes::read(
            config,
            &["num_local_experts", "moe_num_experts"],
            &["num_experts_per_tok", "moe_top_k"],
            &["intermediate_size", "ffn_hidden_size"],
        )?;
        let activation = activation(config, "activation_function")?;
        // The class adds the bias whatever the config says.
        config.fixed("bias", true)?;
        let block = Block { output_bias: true, ..Block::new(sizes, METHOD, activation) };
        Ok(Model::new(Kinds::all(config.num_layers()?), &block))
    },
};

fn block(config: &Config<'_>) -> Result<Block> {
    let sizes = Sizes::read(config, &["num_local_experts"], &["num_experts_per_tok"], &["intermediate_size"])?;
    Ok(Block::new(sizes, METHOD, activation(config, "hidden_act")?))
}

fn shared(config: &Config<'_>) -> Result<Block> {
    let block = block(config)?;
    Ok(Block { shared: Shared::plain(config.count(&["shared_intermediate_size"])?, block.activation), ..block })
}
