//! MiniMax-M2 and M3: sigmoid scores and a selection bias, always renormalised.
//!
//! Source: `MiniMaxM2SparseMoeBlock` and `MiniMaxM3VLSparseMoeBlock` of transformers.

use super::config::Config;
use super::mixtral;
use super::model::{Block, Family, Kinds, Model, SIGMOID_BIAS, Shared, Sizes, activation, swiglu_limit};
use super::names::{Names, SHARED_EXPERTS, fused};
use crate::error::Result;
use crate::spec::{Activation, Denominator, GateUpLayout, RoutingMethod, Score, SelectionKey};

const NAMES: Names = Names {
    selection_bias: &["e_score_correction_bias", "gate.e_score_correction_bias"],
    shared: &[fused("shared_experts", "gate_up_proj.weight", "down_proj.weight", GateUpLayout::Halves), SHARED_EXPERTS],
    ..mixtral::NAMES
};

pub(super) const MINIMAX_M2: Family = Family {
    name: "minimax_m2",
    model_types: &["minimax_m2"],
    examples: &["MiniMax-M2, M2.1, M2.5"],
    irrelevant: &["router_jitter_noise", "shared_moe_mode"],
    names: NAMES,
    read: |config| {
        config.fixed("shared_intermediate_size", 0)?;
        let activation = activation(config, "hidden_act")?;
        Ok(Model::new(Kinds::all(config.num_layers()?), &routed(config, activation)?))
    },
};

pub(super) const MINIMAX_M3: Family = Family {
    name: "minimax_m3",
    model_types: &["minimax_m3_vl"],
    examples: &["MiniMax-M3"],
    // Width of the dense layers; n_shared_experts is in the shared width.
    irrelevant: &["dense_intermediate_size", "n_shared_experts", "router_jitter_noise"],
    names: NAMES,
    read: |config| {
        // The class has one activation, under whatever name.
        config.optional_word("hidden_act", &["silu", "swigluoai"])?;
        let limit = swiglu_limit(config, "MiniMax-M3 has 7")?;
        // The class has 1 as a constant.
        let beta = config.optional_number("swiglu_beta")?.unwrap_or(1.0);
        let activation = Activation::SwigluOai { alpha: config.number(&["swiglu_alpha"])?, limit, beta };
        let block = Block {
            routed_scaling_factor: config.nullable_number(&["routed_scaling_factor"])?.unwrap_or(1.0),
            apply_routed_scale_to_output: true,
            shared: Shared::plain(config.count(&["shared_intermediate_size"])?, activation),
            ..routed(config, activation)?
        };
        Ok(Model::new(m3_kinds(config)?, &block))
    },
};

fn routed(config: &Config<'_>, activation: Activation) -> Result<Block> {
    config.optional_word("scoring_func", &["sigmoid"])?;
    let sizes =
        Sizes::read(config, &["num_local_experts", "num_experts"], &["num_experts_per_tok"], &["intermediate_size"])?;
    // Absent from configs that transformers wrote: its class always has the bias.
    let method = match config.optional_flag("use_routing_bias")?.unwrap_or(true) {
        true => SIGMOID_BIAS,
        false => RoutingMethod::TopK { score: Score::Sigmoid, key: SelectionKey::Score, groups: None },
    };
    Ok(Block { renormalize: Some(Denominator::Sum), ..Block::new(sizes, method, activation) })
}

/// `mlp_layer_types`, or the list `moe_layer_freq`.
fn m3_kinds(config: &Config<'_>) -> Result<Kinds> {
    let layers = config.num_layers()?;
    let listed = Kinds::listed(config, layers)?;
    match (listed, config.any_flags("moe_layer_freq")?) {
        (Some(kinds), _) => Ok(kinds),
        (None, Some(list)) => Kinds::of_list(config, "moe_layer_freq", list.into_iter(), layers),
        (None, None) => Err(config.missing("mlp_layer_types or moe_layer_freq", "the layers that have experts")),
    }
}
