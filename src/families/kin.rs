//! Families with DeepSeek-V3's block under their own names and rules of dense layers.
//!
//! Source: `Dots1MoE`, `AXK1MoE`, `SolarOpenMoE`, `ExaoneMoeSparseMoEBlock` and `MiMoV2FlashMoE` of transformers.

use serde_json::json;

use super::config::Config;
use super::deepseek_v3;
use super::model::{Block, Family, Kinds, Model, SWIGLU, silu};
use super::names::{MLP, Names};
use crate::error::Result;
use crate::spec::OutputNorm;

/// Width of the dense layers.
const IRRELEVANT: &[&str] = &["intermediate_size"];

pub(super) const DOTS1: Family = Family {
    name: "dots1",
    model_types: &["dots1"],
    examples: &["dots.llm1"],
    irrelevant: IRRELEVANT,
    names: MLP,
    read: |config| Ok(Model::new(Kinds::first(config, config.num_layers()?)?, &deepseek_v3::block(config)?)),
};

pub(super) const SOLAR_OPEN: Family = Family {
    name: "solar_open",
    model_types: &["solar_open"],
    examples: &["Solar-Open-100B"],
    irrelevant: IRRELEVANT,
    names: MLP,
    read: |config| {
        // The class has experts in each layer.
        config.ignored("first_k_dense_replace", &[json!(0)]);
        config.ignored("moe_layer_freq", &[json!(1)]);
        Ok(Model::new(Kinds::all(config.num_layers()?), &deepseek_v3::block(config)?))
    },
};

pub(super) const AXK1: Family = Family {
    name: "axk1",
    model_types: &["axk1"],
    examples: &["A.X-K1"],
    irrelevant: IRRELEVANT,
    // The hub's norm stands in the layer, that of a module in memory in the block; dense layers have one too,
    // which their class does not read.
    names: Names {
        beside: &["post_mlp_layernorm", "mlp"],
        output_norm: &["post_mlp_layernorm.weight", "mlp.post_mlp_layernorm.weight"],
        ..MLP
    },
    read: |config| {
        let eps = config.number(&["rms_norm_eps"])?;
        let block = Block { output_norm: Some(OutputNorm { eps }), ..deepseek_v3::block(config)? };
        Ok(Model::new(Kinds::listed_or_first(config)?, &block))
    },
};

pub(super) const EXAONE_MOE: Family = Family {
    name: "exaone_moe",
    model_types: &["exaone_moe"],
    examples: &["K-EXAONE-236B-A23B"],
    irrelevant: IRRELEVANT,
    names: Names { selection_bias: &["e_score_correction_bias", "gate.e_score_correction_bias"], ..MLP },
    read: |config| Ok(Model::new(exaone_kinds(config)?, &deepseek_v3::block(config)?)),
};

pub(super) const MIMO_V2_FLASH: Family = Family {
    name: "mimo_v2_flash",
    model_types: &["mimo_v2_flash"],
    examples: &["MiMo-V2-Flash"],
    irrelevant: IRRELEVANT,
    names: Names { shared: &[], ..MLP },
    read: |config| {
        silu(config)?;
        // Null in the published config; the class has no shared experts.
        config.fixed("n_shared_experts", 0)?;
        let block: Block = deepseek_v3::routed(config, SWIGLU)?;
        Ok(Model::new(mimo_kinds(config)?, &block))
    },
};

/// `mlp_layer_types`, or its older spelling `is_moe_layer`, or the first layers are dense.
fn exaone_kinds(config: &Config<'_>) -> Result<Kinds> {
    let layers = config.num_layers()?;
    if let Some(kinds) = Kinds::listed(config, layers)? {
        config.get("is_moe_layer");
        config.get("first_k_dense_replace");
        return Ok(kinds);
    }
    match config.any_flags("is_moe_layer")? {
        Some(list) => {
            config.get("first_k_dense_replace");
            Kinds::of_list(config, "is_moe_layer", list.into_iter(), layers)
        }
        None => Kinds::first(config, layers),
    }
}

/// `mlp_layer_types`, or the hub's list `moe_layer_freq`, or all but the first.
fn mimo_kinds(config: &Config<'_>) -> Result<Kinds> {
    let layers = config.num_layers()?;
    if let Some(kinds) = Kinds::listed(config, layers)? {
        config.get("moe_layer_freq");
        return Ok(kinds);
    }
    match config.any_flags("moe_layer_freq")? {
        Some(list) => Kinds::of_list(config, "moe_layer_freq", list.into_iter(), layers),
        None => Ok(Kinds::where_(layers, "the family's code", |layer| layer > 0)),
    }
}
