//! Cohere2-MoE: the k largest logits, then a softmax or a sigmoid; shared experts are added or averaged.
//!
//! Source: `Cohere2MoeSparseMoeBlock` of transformers.

use super::config::Config;
use super::model::{Block, Family, Kinds, Model, Shared, Sizes, activation};
use super::names::{MLP, Names};
use crate::error::Result;
use crate::spec::{ChosenScore, Denominator, RoutingMethod, SharedCombination};

pub(super) const FAMILY: Family = Family {
    name: "cohere2_moe",
    model_types: &["cohere2_moe"],
    examples: &["Cohere2-MoE"],
    // Width of the dense layers.
    irrelevant: &["prefix_dense_intermediate_size"],
    names: Names { selection_bias: &[], ..MLP },
    read,
};

fn read(config: &Config<'_>) -> Result<Model> {
    // Required though a softmax has no use for it: over the chosen it sums to 1 as it is.
    let renormalize = config.flag(&["norm_topk_prob"])?.then_some(Denominator::Sum);
    let (score, renormalize) = match config.word("expert_selection_fn", &["softmax", "sigmoid"])? {
        "sigmoid" => (ChosenScore::Sigmoid, renormalize),
        _ => (ChosenScore::Softmax, None),
    };
    let combination = match config.word("shared_expert_combination_strategy", &["sum", "average"])? {
        "average" => SharedCombination::Average,
        _ => SharedCombination::Sum,
    };
    let experts = &["num_experts", "num_local_experts"];
    let sizes = Sizes::read(config, experts, &["num_experts_per_tok"], &["intermediate_size"])?;
    let method = RoutingMethod::TopKThenScore { score };
    let block = Block::new(sizes, method, activation(config, "hidden_act")?);
    let count = config.count(&["num_shared_experts"])?;
    // Without shared experts nothing is halved.
    let shared = Shared::times(count, block.intermediate_size, block.activation)?;
    let shared = shared.map(|shared| Shared { combination, ..shared });
    Ok(Model::new(Kinds::listed_or_first(config)?, &Block { renormalize, shared, ..block }))
}
