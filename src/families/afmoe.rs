//! Trinity (AFMoE): sigmoid scores and a selection bias, always renormalised.
//!
//! Source: `AfmoeMoE` of transformers.

use serde_json::json;

use super::config::Config;
use super::deepseek_v3;
use super::model::{Block, Family, Kinds, Model, SIGMOID_BIAS, activation};
use super::names::{MLP, Names};
use crate::error::Result;
use crate::spec::Denominator;

pub(super) const FAMILY: Family = Family {
    name: "afmoe",
    model_types: &["afmoe"],
    examples: &["Trinity-Mini, Nano"],
    // Width of the dense layers.
    irrelevant: &["intermediate_size"],
    names: Names { router: &["router.gate"], selection_bias: &["expert_bias"], ..MLP },
    read,
};

fn read(config: &Config<'_>) -> Result<Model> {
    config.ignored("score_func", &[json!("sigmoid")]);
    config.ignored("route_norm", &[json!(true)]);
    for key in ["n_group", "topk_group", "num_expert_groups", "num_limited_groups"] {
        config.ignored(key, &[json!(1)]);
    }
    let activation = activation(config, "hidden_act")?;
    let block = Block::new(deepseek_v3::sizes(config)?, SIGMOID_BIAS, activation);
    let shared = deepseek_v3::shared(config, block.intermediate_size, activation)?;
    let block = Block {
        renormalize: Some(Denominator::SumPlus { eps: 1e-20 }),
        routed_scaling_factor: config.nullable_number(&["route_scale"])?.unwrap_or(1.0),
        shared,
        ..block
    };
    let first = config.count(&["num_dense_layers"])?;
    Ok(Model::new(Kinds::where_(config.num_layers()?, "num_dense_layers", |layer| layer >= first), &block))
}
