//! Phi-3.5-MoE: sparsemixer, which takes two experts one after the other.
//!
//! Source: `PhimoeSparseMoeBlock` and `sparsemixer` of transformers.

use serde_json::json;

use super::config::Config;
use super::mixtral;
use super::model::{Block, Family, Kinds, Model, Sizes, activation};
use super::names::Names;
use crate::error::Result;
use crate::spec::RoutingMethod;

pub(super) const FAMILY: Family = Family {
    name: "phimoe",
    model_types: &["phimoe"],
    examples: &["Phi-3.5-MoE", "Phi-mini-MoE, Phi-tiny-MoE"],
    irrelevant: &[],
    names: Names { router: &["gate", "router"], ..mixtral::NAMES },
    read,
};

fn read(config: &Config<'_>) -> Result<Model> {
    // The class takes two whatever this says.
    config.ignored("num_experts_per_tok", &[json!(2)]);
    let sizes = Sizes {
        hidden_size: config.size(&["hidden_size"])?,
        num_experts: config.size(&["num_local_experts", "num_experts"])?,
        top_k: 2,
        intermediate_size: config.size(&["intermediate_size"])?,
    };
    // It acts at inference too, whatever its name.
    let method = RoutingMethod::Sparsemixer { router_jitter_noise: config.number(&["router_jitter_noise"])? };
    let block = Block::new(sizes, method, activation(config, "hidden_act")?);
    Ok(Model::new(Kinds::all(config.num_layers()?), &block))
}
