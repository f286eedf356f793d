//! Mixtral, and MiniMax-Text-01 and M1: softmax over all experts, then the k best, always renormalised.
//!
//! Source: `MixtralSparseMoeBlock` and `MiniMaxSparseMoeBlock` of transformers.

use super::config::Config;
use super::model::{Block, Family, Kinds, Model, SOFTMAX, Sizes, activation};
use super::names::{FUSED, MLP, Names, PROJ, SHORT};
use crate::error::Result;
use crate::spec::Denominator;

/// Of Mixtral and its kin; transformers 5 calls the module `mlp`.
pub(super) const NAMES: Names = Names {
    modules: &["block_sparse_moe", "mlp"],
    selection_bias: &[],
    experts: &[FUSED, SHORT, PROJ],
    shared: &[],
    ..MLP
};

pub(super) const FAMILY: Family = Family {
    name: "mixtral",
    model_types: &["mixtral"],
    examples: &["Mixtral 8x7B, 8x22B"],
    // Noise on the router's input in training.
    irrelevant: &["router_jitter_noise"],
    names: NAMES,
    read,
};

pub(super) const MINIMAX: Family = Family {
    name: "minimax",
    model_types: &["minimax"],
    examples: &["MiniMax-Text-01, M1"],
    irrelevant: &["router_jitter_noise", "shared_moe_mode"],
    names: NAMES,
    read: |config| {
        // The authors' configs have the key, and 0.
        config.fixed("shared_intermediate_size", 0)?;
        read(config)
    },
};

fn read(config: &Config<'_>) -> Result<Model> {
    let sizes =
        Sizes::read(config, &["num_local_experts", "num_experts"], &["num_experts_per_tok"], &["intermediate_size"])?;
    let block = Block::new(sizes, SOFTMAX, activation(config, "hidden_act")?);
    let block = Block { renormalize: Some(Denominator::Sum), ..block };
    Ok(Model::new(Kinds::all(config.num_layers()?), &block))
}
