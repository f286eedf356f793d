//! Laguna: a soft cap on the logits, sigmoid scores and a selection bias, the factor on the routed sum.
//!
//! Source: `LagunaSparseMoeBlock` of transformers.

use super::config::Config;
use super::model::{Block, Family, Kinds, Model, RouterKind, SIGMOID_BIAS, Shared, Sizes, activation};
use super::names::{MLP, Names, SHARED_EXPERT, SHARED_EXPERTS};
use crate::error::Result;
use crate::spec::{Denominator, LogitTransform, RouterInput};

pub(super) const FAMILY: Family = Family {
    name: "laguna",
    model_types: &["laguna"],
    examples: &["Laguna-XS"],
    // Width of the dense layers.
    irrelevant: &["intermediate_size"],
    names: Names {
        selection_bias: &["experts.e_score_correction_bias", "gate.e_score_correction_bias"],
        shared: &[SHARED_EXPERT, SHARED_EXPERTS],
        ..MLP
    },
    read,
};

fn read(config: &Config<'_>) -> Result<Model> {
    config.fixed("moe_apply_router_weight_on_input", false)?;
    config.optional_word("moe_router_score_func", &["sigmoid"])?;
    let experts = &["num_experts", "num_local_experts"];
    let sizes = Sizes::read(config, experts, &["num_experts_per_tok"], &["moe_intermediate_size"])?;
    // A bound like those of activations: absent, null and 0 are none.
    let transform = match config.limit("moe_router_logit_softcapping")? {
        Some(cap) => LogitTransform::SoftCap { cap },
        None => LogitTransform::None,
    };
    let block = Block::new(sizes, SIGMOID_BIAS, activation(config, "hidden_act")?);
    let block = Block {
        router: RouterKind::Linear { input: RouterInput::Hidden, bias: false, transform },
        renormalize: Some(Denominator::Sum),
        routed_scaling_factor: config.nullable_number(&["moe_routed_scaling_factor"])?.unwrap_or(1.0),
        apply_routed_scale_to_output: true,
        shared: Shared::plain(config.count(&["shared_expert_intermediate_size"])?, block.activation),
        ..block
    };
    Ok(Model::new(Kinds::listed_or_fixed(config, 1)?, &block))
}
