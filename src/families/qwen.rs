//! Qwen: softmax over all experts, then the k best; where there is a shared expert it has a sigmoid gate.
//!
//! Source: `Qwen2MoeSparseMoeBlock`, `Qwen3MoeSparseMoeBlock`, `Qwen3NextSparseMoeBlock`,
//! `Qwen3VLMoeTextSparseMoeBlock`, `Qwen3_5MoeSparseMoeBlock` and `Qwen4ExpSparseMoeBlock` of transformers.

use serde_json::json;

use super::config::Config;
use super::model::{Block, Family, Gate, Kinds, Model, SOFTMAX, Shared, Sizes, activation};
use super::names::{MLP, Names, SHARED_EXPERT, SHARED_EXPERTS};
use crate::error::Result;
use crate::spec::Denominator;

const GATED: Names = Names {
    selection_bias: &[],
    shared: &[SHARED_EXPERT, SHARED_EXPERTS],
    shared_gate: &["shared_expert_gate.weight"],
    ..MLP
};
const ROUTED: Names = Names { selection_bias: &[], shared: &[], ..MLP };

pub(super) const QWEN2_MOE: Family = Family {
    name: "qwen2_moe",
    model_types: &["qwen2_moe"],
    examples: &["Qwen1.5-MoE-A2.7B", "Qwen2-57B-A14B"],
    // Width of the dense layers.
    irrelevant: &["intermediate_size"],
    names: GATED,
    read: |config| {
        // Qwen1.5-MoE's config lacks `mlp_only_layers`, and the class gives that one meaning.
        let dense = config.any_integers("mlp_only_layers")?.unwrap_or_default();
        Ok(Model::new(Kinds::sparse_step(config, &dense)?, &gated(config, by_flag(config)?)?))
    },
};

pub(super) const QWEN3_MOE: Family = Family {
    name: "qwen3_moe",
    model_types: &["qwen3_moe"],
    examples: &["Qwen3-30B-A3B, 235B-A22B"],
    irrelevant: &["intermediate_size"],
    names: ROUTED,
    read: |config| Ok(Model::new(by_step(config)?, &routed(config, by_flag(config)?)?)),
};

pub(super) const QWEN3_VL_MOE: Family = Family {
    name: "qwen3_vl_moe",
    model_types: &["qwen3_vl_moe"],
    examples: &["Qwen3-VL-30B-A3B, 235B-A22B"],
    irrelevant: &["intermediate_size"],
    names: ROUTED,
    read: |config| Ok(Model::new(by_step(config)?, &routed(config, always(config))?)),
};

pub(super) const QWEN3_NEXT: Family = Family {
    name: "qwen3_next",
    model_types: &["qwen3_next"],
    examples: &["Qwen3-Next-80B-A3B"],
    irrelevant: &["intermediate_size"],
    names: GATED,
    read: |config| Ok(Model::new(by_step(config)?, &gated(config, by_flag(config)?)?)),
};

pub(super) const QWEN3_5_MOE: Family = Family {
    name: "qwen3_5_moe",
    model_types: &["qwen3_5_moe"],
    examples: &["Qwen3.5-35B-A3B, 397B-A17B"],
    irrelevant: &["intermediate_size"],
    names: GATED,
    read: |config| {
        let block = gated(config, always(config))?;
        all(config, &block)
    },
};

pub(super) const QWEN4_EXP: Family = Family {
    name: "qwen4_exp",
    model_types: &["qwen4_exp"],
    examples: &["Qwen4-Exp"],
    irrelevant: &["intermediate_size"],
    names: GATED,
    read: |config| {
        let block = gated(config, by_flag(config)?)?;
        all(config, &block)
    },
};

/// Required: class defaults are false here and true there, and published checkpoints differ from both.
fn by_flag(config: &Config<'_>) -> Result<Option<Denominator>> {
    Ok(config.flag(&["norm_topk_prob"])?.then_some(Denominator::Sum))
}

/// The class reads no key.
fn always(config: &Config<'_>) -> Option<Denominator> {
    config.ignored("norm_topk_prob", &[json!(true)]);
    Some(Denominator::Sum)
}

fn by_step(config: &Config<'_>) -> Result<Kinds> {
    let dense = config.integers("mlp_only_layers")?;
    Kinds::sparse_step(config, &dense)
}

/// The class has experts in each layer.
fn all(config: &Config<'_>, block: &Block) -> Result<Model> {
    config.ignored("mlp_only_layers", &[json!([])]);
    config.ignored("decoder_sparse_step", &[json!(1)]);
    Ok(Model::new(Kinds::all(config.num_layers()?), block))
}

fn routed(config: &Config<'_>, renormalize: Option<Denominator>) -> Result<Block> {
    let sizes = Sizes::read(
        config,
        &["num_experts", "num_local_experts"],
        &["num_experts_per_tok"],
        &["moe_intermediate_size"],
    )?;
    Ok(Block { renormalize, ..Block::new(sizes, SOFTMAX, activation(config, "hidden_act")?) })
}

fn gated(config: &Config<'_>, renormalize: Option<Denominator>) -> Result<Block> {
    let block = routed(config, renormalize)?;
    let shared = Shared::plain(config.size(&["shared_expert_intermediate_size"])?, block.activation);
    Ok(Block { shared: shared.map(|shared| Shared { gate: Gate::Sigmoid, ..shared }), ..block })
}
