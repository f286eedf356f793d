//! Ling 3 (bailing_hybrid): DeepSeek-V3's block; late layers may be clamped behind the activation.
//!
//! Source: `BailingHybridMoE` of transformers; the limits, which transformers does not know, from SGLang.

use super::config::Config;
use super::deepseek_v3;
use super::model::{Block, Family, Kinds, Model, SWIGLU, Shared, silu};
use super::names::{MLP, Names};
use crate::error::Result;
use crate::spec::Activation;

pub(super) const FAMILY: Family = Family {
    name: "bailing_hybrid",
    model_types: &["bailing_hybrid"],
    examples: &["Ling-3.0-Flash"],
    // Width of the dense layers; biases of attention.
    irrelevant: &["intermediate_size", "use_bias"],
    names: Names { selection_bias: &["gate.expert_bias", "gate.e_score_correction_bias"], ..MLP },
    read,
};

fn read(config: &Config<'_>) -> Result<Model> {
    silu(config)?;
    config.fixed("moe_router_enable_expert_bias", true)?;
    config.fixed("multi_gate", false)?;
    if let Some(value) = config.get("router_type").filter(|value| value.as_str() == Some("MultiRouter")) {
        return Err(config.unsupported("router_type", value, "gates of their own for images and audio are not read"));
    }
    let block = deepseek_v3::routed(config, SWIGLU)?;
    let shared = deepseek_v3::shared(config, block.intermediate_size, SWIGLU)?;
    let shared = match config.any_count(&["moe_shared_expert_intermediate_size"])?.filter(|width| *width > 0) {
        // As wide as the shared experts together.
        Some(width) => Shared::plain(width, SWIGLU),
        None => shared,
    };
    let limits = |key| config.limits(key).map(Option::unwrap_or_default);
    let (routed_limits, shared_limits) =
        (limits("expert_swiglu_limit_list")?, limits("share_expert_swiglu_limit_list")?);
    // A layer beyond the end of a list has no limit: so the authors' own programs read them.
    let clamped = |limits: &[Option<f32>], layer: usize| match limits.get(layer).copied().flatten() {
        Some(limit) => Activation::SwigluClampAfter { limit },
        None => SWIGLU,
    };
    Model::each(Kinds::listed_or_first(config)?, |layer| {
        let activation = clamped(&shared_limits, layer);
        Ok(Block {
            activation: clamped(&routed_limits, layer),
            shared: shared.map(|shared| Shared { activation, ..shared }),
            ..block.clone()
        })
    })
}
