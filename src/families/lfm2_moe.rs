//! LFM2-MoE: sigmoid scores, a selection bias or none.
//!
//! Source: `Lfm2MoeSparseMoeBlock` of transformers.

use super::config::Config;
use super::model::{Block, Family, Kinds, Model, SIGMOID_BIAS, SWIGLU, Sizes};
use super::names::{FUSED, MLP, Names, PROJ, SHORT};
use crate::error::Result;
use crate::spec::{Denominator, RoutingMethod, Score, SelectionKey};

pub(super) const FAMILY: Family = Family {
    name: "lfm2_moe",
    model_types: &["lfm2_moe"],
    examples: &["LFM2-8B-A1B"],
    // Width of the dense layers.
    irrelevant: &["block_dim", "full_attn_idxs", "intermediate_size", "theta"],
    names: Names {
        modules: &["feed_forward"],
        selection_bias: &["expert_bias"],
        experts: &[FUSED, SHORT, PROJ],
        shared: &[],
        ..MLP
    },
    read,
};

fn read(config: &Config<'_>) -> Result<Model> {
    let experts = &["num_experts", "num_local_experts"];
    let sizes = Sizes::read(config, experts, &["num_experts_per_tok"], &["moe_intermediate_size"])?;
    let method = match config.flag(&["use_expert_bias"])? {
        true => SIGMOID_BIAS,
        false => RoutingMethod::TopK { score: Score::Sigmoid, key: SelectionKey::Score, groups: None },
    };
    let block = Block {
        renormalize: config.flag(&["norm_topk_prob"])?.then_some(Denominator::SumPlus { eps: 1e-6 }),
        routed_scaling_factor: config.nullable_number(&["routed_scaling_factor"])?.unwrap_or(1.0),
        // The class has no other activation and reads no key for one.
        ..Block::new(sizes, method, SWIGLU)
    };
    let first = config.count(&["num_dense_layers"])?;
    Ok(Model::new(Kinds::where_(config.num_layers()?, "num_dense_layers", |layer| layer >= first), &block))
}
