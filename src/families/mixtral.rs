//! Mixtral: softmax over all experts, then the k best, always renormalised.
//!
//! Source: `MixtralSparseMoeBlock` of transformers.

use super::config::Config;
use super::names::{Names, Stacked};
use super::{Family, Layer, Model};
use crate::error::Result;
use crate::spec::{Activation, Denominator, RoutingMethod, Score, SelectionKey};

pub(super) const FAMILY: Family = Family {
    name: "mixtral",
    model_types: &["mixtral"],
    // Noise on the router's input in training.
    irrelevant: &["router_jitter_noise"],
    modules: &[
        names("block_sparse_moe"),
        // transformers 5 calls the module so.
        names("mlp"),
    ],
    read,
};

const fn names(module: &'static str) -> Names {
    Names {
        module,
        router: "gate",
        router_bias: None,
        selection_bias: None,
        tid2eid: None,
        projections: Some(["w1", "w3", "w2"]),
        scale: "weight_scale_inv",
        shared: None,
        stacked: Stacked::HALVES,
    }
}

fn read(config: &Config<'_>) -> Result<Model> {
    config.word("hidden_act", &["silu"])?;
    let method = RoutingMethod::TopK { score: Score::Softmax, key: SelectionKey::Score, groups: None };
    let activation = Activation::Swiglu { limit: None };
    Ok(Model {
        hidden_size: config.size(&["hidden_size"])?,
        num_experts: config.size(&["num_local_experts", "num_experts"])?,
        top_k: config.size(&["num_experts_per_tok"])?,
        layers: vec![Layer::Moe(method); config.num_layers()?],
        dense_keys: "num_hidden_layers",
        renormalize: Some(Denominator::Sum),
        routed_scaling_factor: 1.0,
        intermediate_size: config.size(&["intermediate_size"])?,
        activation,
        shared: None,
        shared_activation: activation,
        notes: Vec::new(),
    })
}
