//! DBRX: softmax over all experts, renormalised by a p-norm; a matrix of all experts in one tensor.
//!
//! Source: `DbrxFFN`, `DbrxRouter` and `DbrxExpertGLU` of transformers.

use super::config::Config;
use super::model::{Block, Family, Kinds, Model, SOFTMAX, SWIGLU, Sizes, activation};
use super::names::{FUSED, MLP, Names, flat};
use crate::error::Result;
use crate::spec::Denominator;

pub(super) const FAMILY: Family = Family {
    name: "dbrx",
    model_types: &["dbrx"],
    examples: &["DBRX Base, Instruct"],
    irrelevant: &[],
    names: Names {
        layers: "blocks",
        modules: &["ffn"],
        router: &["router.layer"],
        selection_bias: &[],
        experts: &[FUSED, flat("experts.mlp", "w1", "v1", "w2")],
        shared: &[],
        ..MLP
    },
    read,
};

/// Of `ffn_config`: its width, which the model's own overrides.
const IRRELEVANT: &[&str] = &["hidden_size", "model_type"];

fn read(config: &Config<'_>) -> Result<Model> {
    let hidden_size = config.size(&["d_model", "hidden_size"])?;
    let block = config.object("ffn_config", IRRELEVANT, |ffn| {
        ffn.fixed("uniform_expert_assignment", false)?;
        let activation = match ffn.has("ffn_act_fn") {
            true => ffn.object("ffn_act_fn", &[], |config| activation(config, "name"))?,
            // The class makes null so.
            false => SWIGLU,
        };
        let sizes = Sizes {
            hidden_size,
            num_experts: ffn.size(&["moe_num_experts"])?,
            top_k: ffn.size(&["moe_top_k"])?,
            intermediate_size: ffn.size(&["ffn_hidden_size"])?,
        };
        let renormalize = ffn.nullable_number(&["moe_normalize_expert_weights"])?.map(|p| match p == 1.0 {
            // Probabilities are their own absolute values.
            true => Denominator::Sum,
            false => Denominator::PNorm { p },
        });
        Ok(Block { renormalize, ..Block::new(sizes, SOFTMAX, activation) })
    })?;
    Ok(Model::new(Kinds::all(config.layers(&["n_layers", "num_hidden_layers"])?), &block))
}
