//! Inkling: shared experts stand in the router's normalisation and receive their share of the weights.
//!
//! Source: `InklingTextMoE` of transformers.

use super::config::Config;
use super::model::{Block, Family, Gate, Kinds, Model, Shared, Sizes, activation};
use super::names::{FUSED, MLP, Names, PROJ, fused, stacked};
use crate::error::Result;
use crate::spec::{GateUpLayout, RoutingMethod};

pub(super) const FAMILY: Family = Family {
    name: "inkling",
    model_types: &["inkling", "inkling_mm_model", "inkling_model"],
    examples: &["Inkling"],
    // Declared by the class and never read.
    irrelevant: &["rms_norm_eps_moe_gate"],
    names: Names {
        selection_bias: &["gate.bias", "gate.e_score_correction_bias"],
        global_scale: &["gate.global_scale"],
        experts: &[FUSED, fused("experts", "w13_weight", "w2_weight", GateUpLayout::Interleaved), PROJ],
        shared: &[
            fused("shared_experts", "shared_w13_weight", "shared_w2_weight", GateUpLayout::Interleaved),
            stacked("shared_experts", "gate_proj", "up_proj", "down_proj"),
        ],
        ..MLP
    },
    read,
};

fn read(config: &Config<'_>) -> Result<Model> {
    // What the authors' programs can switch and the class has as constants.
    for key in
        ["use_gate_bias", "use_global_scale", "norm_after_topk", "shared_expert_sink", "inference_moe_w13_interleaved"]
    {
        config.fixed(key, true)?;
    }
    config.fixed("shared_experts_size", 1)?;
    config.optional_word("gate_activation", &["sigmoid"])?;
    // Where a config has a width for dense layers, the other one is the experts'.
    let inner = match config.has("dense_intermediate_size") {
        true => "intermediate_size",
        false => "moe_intermediate_size",
    };
    let experts = &["n_routed_experts", "num_local_experts", "num_experts"];
    let sizes = Sizes::read(config, experts, &["num_experts_per_tok"], &[inner])?;
    for key in ["intermediate_size", "moe_intermediate_size"] {
        config.get(key);
    }
    let num_shared = config.size(&["n_shared_experts"])?;
    let method = RoutingMethod::JointNorm { num_shared, global_scale: true };
    let block = Block::new(sizes, method, activation(config, "hidden_act")?);
    let shared = Shared::plain(block.intermediate_size, block.activation);
    let block = Block {
        routed_scaling_factor: config.nullable_number(&["route_scale"])?.unwrap_or(1.0),
        shared: shared.map(|shared| Shared { gate: Gate::Joint, ..shared }),
        ..block
    };
    let layers = config.num_layers()?;
    let listed = Kinds::listed(config, layers)?;
    let first = config.any_count(&["dense_mlp_idx"])?;
    match (listed, first) {
        (Some(kinds), _) => Ok(Model::new(kinds, &block)),
        (None, Some(first)) => Ok(Model::new(Kinds::where_(layers, "dense_mlp_idx", |layer| layer >= first), &block)),
        (None, None) => Err(config.missing("mlp_layer_types or dense_mlp_idx", "the layers that have experts")),
    }
}
