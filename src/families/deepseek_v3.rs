//! DeepSeek-V3, R1, V3.1 and V3.2, and Kimi K2 and K2.5: sigmoid scores, a selection bias, groups.
//!
//! Source: `DeepseekV3MoE` of transformers; DeepSeek-V3 `inference/model.py`. Many families have this block with
//! other names, other dense layers or another activation: they begin with [`block`].

use super::config::Config;
use super::model::{Block, Family, Kinds, Model, SWIGLU, Shared, Sizes, groups, silu};
use super::names::MLP;
use crate::error::Result;
use crate::spec::{Activation, Denominator, GroupScore, RoutingMethod, Score, SelectionKey};

pub(super) const FAMILY: Family = Family {
    name: "deepseek_v3",
    model_types: &["deepseek_v3", "deepseek_v32", "kimi_k2", "kimi_k25"],
    examples: &["DeepSeek-V3, R1, V3.1, V3.2", "Kimi K2, K2.5"],
    // Width of the dense layers.
    irrelevant: &["intermediate_size"],
    names: MLP,
    read,
};

fn read(config: &Config<'_>) -> Result<Model> {
    Ok(Model::new(Kinds::listed_or_first(config)?, &block(config)?))
}

/// `w /= sum w + 1e-20` where the config says so.
pub(super) fn renormalize(config: &Config<'_>) -> Result<Option<Denominator>> {
    let keys = &["norm_topk_prob", "moe_renormalize"];
    Ok(config.flag(keys)?.then_some(Denominator::SumPlus { eps: 1e-20 }))
}

/// Sizes in the spellings of this block.
pub(super) fn sizes(config: &Config<'_>) -> Result<Sizes> {
    Sizes::read(
        config,
        &["n_routed_experts", "num_experts", "num_local_experts"],
        &["num_experts_per_tok", "num_experts_per_token"],
        &["moe_intermediate_size"],
    )
}

/// The block without shared experts.
pub(super) fn routed(config: &Config<'_>, activation: Activation) -> Result<Block> {
    // Absent from configs that transformers wrote: its class knows no other values.
    for key in ["scoring_func", "score_function", "moe_router_activation_func"] {
        config.optional_word(key, &["sigmoid"])?;
    }
    config.optional_word("topk_method", &["noaux_tc"])?;
    let n_group = &["n_group", "num_expert_group"];
    let groups = groups(config, n_group, &["topk_group"], GroupScore::Top2SumOfKey)?;
    let method = RoutingMethod::TopK { score: Score::Sigmoid, key: SelectionKey::ScorePlusBias, groups };
    Ok(Block {
        renormalize: renormalize(config)?,
        routed_scaling_factor: config.nullable_number(&["routed_scaling_factor"])?.unwrap_or(1.0),
        ..Block::new(sizes(config)?, method, activation)
    })
}

/// Shared experts in the spellings of this block.
pub(super) fn shared(config: &Config<'_>, inner: usize, activation: Activation) -> Result<Option<Shared>> {
    let count = config.nullable_count(&["n_shared_experts", "num_shared_experts"])?.unwrap_or(0);
    Shared::times(count, inner, activation)
}

/// The block with plain SwiGLU in routed and shared experts.
pub(super) fn block(config: &Config<'_>) -> Result<Block> {
    silu(config)?;
    let block = routed(config, SWIGLU)?;
    Ok(Block { shared: shared(config, block.intermediate_size, SWIGLU)?, ..block })
}
