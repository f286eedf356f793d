//! Flint: sigmoid scores without a selection bias; an ungated shared expert.
//!
//! Source: `FlintSparseMoeBlock` of transformers.

use super::config::Config;
use super::model::{Block, Family, Kinds, Model, Shared, Sizes, activation};
use super::names::{MLP, Names, SHARED_EXPERT, SHARED_EXPERTS};
use crate::error::Result;
use crate::spec::{Denominator, RoutingMethod, Score, SelectionKey};

pub(super) const FAMILY: Family = Family {
    name: "flint",
    model_types: &["flint"],
    examples: &["Flint"],
    // Width of the dense layers.
    irrelevant: &["intermediate_size"],
    names: Names { selection_bias: &[], shared: &[SHARED_EXPERT, SHARED_EXPERTS], ..MLP },
    read,
};

fn read(config: &Config<'_>) -> Result<Model> {
    let experts = &["num_experts", "num_local_experts"];
    let sizes = Sizes::read(config, experts, &["num_experts_per_tok"], &["moe_intermediate_size"])?;
    let method = RoutingMethod::TopK { score: Score::Sigmoid, key: SelectionKey::Score, groups: None };
    let block = Block::new(sizes, method, activation(config, "hidden_act")?);
    let block = Block {
        renormalize: config.flag(&["norm_topk_prob"])?.then_some(Denominator::Sum),
        shared: Shared::plain(config.count(&["shared_expert_intermediate_size"])?, block.activation),
        ..block
    };
    // Null is not the empty list here: the class makes it the first two layers.
    let dense = match config.has("mlp_only_layers") {
        true => config.integers("mlp_only_layers")?,
        false => config.integers("mlp_only_layers").map(|_| vec![0, 1])?,
    };
    Ok(Model::new(Kinds::sparse_step(config, &dense)?, &block))
}
