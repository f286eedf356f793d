//! Mistral 4 and Mistral Large 4: softmax scores, groups judged by their two best scores.
//!
//! Source: `Mistral4MoE` and `MistralLarge4TextMoE` of transformers.

use serde_json::json;

use super::config::Config;
use super::deepseek_v3;
use super::model::{Block, Family, Kinds, Model, activation, groups};
use super::names::{FUSED, MLP, Names, PROJ, SHARED_EXPERTS, SHORT, short};
use crate::error::Result;
use crate::spec::{Denominator, GroupScore, RoutingMethod, Score, SelectionKey};

/// Mistral's own names stand in the layer itself.
const NAMES: Names = Names {
    modules: &["", "mlp"],
    parts: &["gate", "experts", "shared_experts"],
    selection_bias: &[],
    experts: &[FUSED, SHORT, PROJ],
    shared: &[short("shared_experts"), SHARED_EXPERTS],
    ..MLP
};

pub(super) const MISTRAL4: Family = Family {
    name: "mistral4",
    model_types: &["mistral4"],
    examples: &["Mistral-Small-4"],
    // Width of the dense layers.
    irrelevant: &["intermediate_size"],
    names: NAMES,
    read: |config| {
        let renormalize = deepseek_v3::renormalize(config)?;
        let kinds = Kinds::first(config, config.num_layers()?)?;
        Ok(Model::new(kinds, &Block { renormalize, ..block(config)? }))
    },
};

pub(super) const MISTRAL_LARGE4: Family = Family {
    name: "mistral_large4",
    model_types: &["mistral_large4"],
    examples: &["Mistral-Large-4"],
    irrelevant: &["intermediate_size"],
    names: NAMES,
    read: |config| {
        // The class always renormalises.
        config.ignored("norm_topk_prob", &[json!(true)]);
        let renormalize = Some(Denominator::SumPlus { eps: 1e-20 });
        Ok(Model::new(Kinds::listed_or_first(config)?, &Block { renormalize, ..block(config)? }))
    },
};

fn block(config: &Config<'_>) -> Result<Block> {
    let groups = groups(config, &["n_group"], &["topk_group"], GroupScore::Top2SumOfScore)?;
    let method = RoutingMethod::TopK { score: Score::Softmax, key: SelectionKey::Score, groups };
    let block = Block::new(deepseek_v3::sizes(config)?, method, activation(config, "hidden_act")?);
    Ok(Block {
        routed_scaling_factor: config.nullable_number(&["routed_scaling_factor"])?.unwrap_or(1.0),
        shared: deepseek_v3::shared(config, block.intermediate_size, block.activation)?,
        ..block
    })
}
