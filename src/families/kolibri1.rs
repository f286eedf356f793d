//! Kolibri1: the bias is added to the logit, not to the score; w is the sigmoid of the logit alone.
//!
//! Source: `Kolibri1SparseMoeBlock` of transformers.

use super::config::Config;
use super::model::{Block, Family, Kinds, Model, Shared, Sizes, activation};
use super::names::{MLP, Names, SHARED_EXPERT, SHARED_EXPERTS};
use crate::error::Result;
use crate::spec::{Denominator, RoutingMethod, Score, SelectionKey};

pub(super) const FAMILY: Family = Family {
    name: "kolibri1",
    model_types: &["kolibri1"],
    examples: &["Kolibri1"],
    irrelevant: &[],
    names: Names {
        beside: &["moe"],
        router: &["gate", "moe.router"],
        selection_bias: &["moe.router.expert_bias", "gate.e_score_correction_bias"],
        shared: &[SHARED_EXPERTS, SHARED_EXPERT],
        ..MLP
    },
    read,
};

fn read(config: &Config<'_>) -> Result<Model> {
    let experts = &["num_experts", "num_local_experts"];
    let sizes = Sizes::read(config, experts, &["num_experts_per_tok"], &["moe_intermediate_size"])?;
    let method = RoutingMethod::TopK { score: Score::Sigmoid, key: SelectionKey::LogitPlusBias, groups: None };
    let block = Block::new(sizes, method, activation(config, "hidden_act")?);
    let block = Block {
        renormalize: config.flag(&["norm_topk_prob"])?.then_some(Denominator::Sum),
        shared: Shared::plain(config.count(&["shared_expert_intermediate_size"])?, block.activation),
        ..block
    };
    Ok(Model::new(Kinds::all(config.num_layers()?), &block))
}
