//! Ernie 4.5: softmax and a selection bias, renormalised with a floor.
//!
//! Source: `Ernie4_5_MoeSparseMoeBlock` of transformers.

use super::config::Config;
use super::model::{Block, Family, Kinds, Model, Shared, Sizes, activation};
use super::names::{MLP, Names};
use crate::error::Result;
use crate::spec::{Denominator, RoutingMethod, Score, SelectionKey};

pub(super) const FAMILY: Family = Family {
    name: "ernie4_5_moe",
    model_types: &["ernie4_5_moe"],
    examples: &["ERNIE-4.5-21B-A3B, 300B-A47B"],
    // Width of the dense layers; how the authors' own programs train.
    irrelevant: &["compression_ratio", "intermediate_size", "moe_gate", "moe_group", "use_moe"],
    names: Names {
        selection_bias: &[
            "moe_statics.e_score_correction_bias",
            "gate.moe_statics.e_score_correction_bias",
            "gate.e_score_correction_bias",
        ],
        ..MLP
    },
    read,
};

fn read(config: &Config<'_>) -> Result<Model> {
    config.fixed("moe_use_aux_free", true)?;
    let experts = &["moe_num_experts", "num_experts"];
    let sizes = Sizes::read(config, experts, &["moe_k", "num_experts_per_tok"], &["moe_intermediate_size"])?;
    let method = RoutingMethod::TopK { score: Score::Softmax, key: SelectionKey::ScorePlusBias, groups: None };
    // Published configs lack the floor, which guards a division by zero and is far below any sum.
    let floor = config.optional_number("moe_norm_min")?.unwrap_or(1e-12);
    let biases = config.flag(&["use_bias"])?;
    let block = Block::new(sizes, method, activation(config, "hidden_act")?);
    let count = config.nullable_count(&["moe_num_shared_experts"])?.unwrap_or(0);
    let shared = Shared::times(count, block.intermediate_size, block.activation)?;
    let block = Block {
        renormalize: Some(Denominator::AtLeast { floor }),
        shared: shared.map(|shared| Shared { biases, ..shared }),
        ..block
    };
    Ok(Model::new(kinds(config)?, &block))
}

fn kinds(config: &Config<'_>) -> Result<Kinds> {
    let layers = config.num_layers()?;
    let first = config.count(&["moe_layer_start_index"])?;
    let interval = config.size(&["moe_layer_interval"])?;
    let last = match config.optional_signed("moe_layer_end_index")? {
        None => return Err(config.missing("moe_layer_end_index", "an integer, -1 for the last layer")),
        Some(-1) => layers - 1,
        Some(last) => usize::try_from(last).map_err(|_| {
            config.contradiction("moe_layer_end_index", last.to_string(), "a layer, or -1 for the last")
        })?,
    };
    // Where programs disagree about the layers of an interval, none is taken.
    if interval > 1 && first % interval != interval - 1 {
        config.note(format!(
            "moe_layer_interval = {interval}: layers are counted from 0 as transformers does, not from \
             moe_layer_start_index = {first}"
        ));
    }
    let keys = "moe_layer_start_index, moe_layer_end_index and moe_layer_interval";
    Ok(Kinds::where_(layers, keys, |layer| (first..=last).contains(&layer) && (layer + 1).is_multiple_of(interval)))
}
