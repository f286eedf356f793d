//! GLM-4.5 to GLM-5: DeepSeek-V3's block; the newest clamps.
//!
//! Source: `Glm4MoeMoE`, `Glm4MoeLiteMoE`, `Glm4vMoeTextMoE`, `GlmMoeDsaMoE` and `Glm5NextMoE` of transformers.

use serde_json::json;

use super::config::Config;
use super::deepseek_v3;
use super::model::{Block, Family, Kinds, Model, silu, swiglu_limit};
use super::names::MLP;
use crate::error::Result;
use crate::spec::Activation;

/// Width of the dense layers.
const IRRELEVANT: &[&str] = &["intermediate_size"];

pub(super) const GLM4_MOE: Family = Family {
    name: "glm4_moe",
    model_types: &["glm4_moe"],
    examples: &["GLM-4.5, 4.6, 4.7, 4.5-Air"],
    irrelevant: IRRELEVANT,
    names: MLP,
    read: first,
};

pub(super) const GLM4V_MOE: Family = Family {
    name: "glm4v_moe",
    model_types: &["glm4v_moe"],
    examples: &["GLM-4.5V, 4.6V"],
    irrelevant: IRRELEVANT,
    names: MLP,
    read: first,
};

pub(super) const GLM4_MOE_LITE: Family = Family {
    name: "glm4_moe_lite",
    model_types: &["glm4_moe_lite"],
    examples: &["GLM-4.7-Flash"],
    irrelevant: IRRELEVANT,
    names: MLP,
    // The class reads no `first_k_dense_replace`: without a list the first layer is dense.
    read: |config| Ok(Model::new(Kinds::listed_or_fixed(config, 1)?, &deepseek_v3::block(config)?)),
};

pub(super) const GLM_MOE_DSA: Family = Family {
    name: "glm_moe_dsa",
    model_types: &["glm_moe_dsa"],
    examples: &["GLM-5, 5.1, 5.2"],
    irrelevant: IRRELEVANT,
    names: MLP,
    read: |config| {
        config.ignored("mlp_bias", &[json!(false)]);
        Ok(Model::new(Kinds::listed_or_first(config)?, &deepseek_v3::block(config)?))
    },
};

pub(super) const GLM5_NEXT: Family = Family {
    name: "glm5_next",
    model_types: &["glm5_next"],
    examples: &["GLM-5.3-Flash"],
    irrelevant: IRRELEVANT,
    names: MLP,
    read: |config| {
        silu(config)?;
        let activation = Activation::Swiglu { limit: swiglu_limit(config, "GLM-5.3-Flash has 10")? };
        let block = deepseek_v3::routed(config, activation)?;
        let shared = deepseek_v3::shared(config, block.intermediate_size, activation)?;
        Ok(Model::new(Kinds::listed_or_fixed(config, 3)?, &Block { shared, ..block }))
    },
};

fn first(config: &Config<'_>) -> Result<Model> {
    Ok(Model::new(Kinds::first(config, config.num_layers()?)?, &deepseek_v3::block(config)?))
}
