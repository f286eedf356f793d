//! Qwen3-MoE: softmax over all experts, then the k best, renormalised if the config says so.
//!
//! Source: `Qwen3MoeSparseMoeBlock` of transformers.

use super::config::Config;
use super::names::{Names, Stacked};
use super::{Family, Layer, Model};
use crate::error::Result;
use crate::spec::{Activation, Denominator, RoutingMethod, Score, SelectionKey};

pub(super) const FAMILY: Family = Family {
    name: "qwen3_moe",
    model_types: &["qwen3_moe"],
    // Width of the dense layers.
    irrelevant: &["intermediate_size"],
    modules: &[Names {
        module: "mlp",
        router: "gate",
        router_bias: None,
        selection_bias: None,
        tid2eid: None,
        projections: Some(["gate_proj", "up_proj", "down_proj"]),
        scale: "weight_scale_inv",
        shared: None,
        stacked: Stacked::HALVES,
    }],
    read,
};

fn read(config: &Config<'_>) -> Result<Model> {
    config.word("hidden_act", &["silu"])?;
    let num_layers = config.num_layers()?;
    let step = config.size(&["decoder_sparse_step"])?;
    let dense = config.integers("mlp_only_layers")?;
    let method = RoutingMethod::TopK { score: Score::Softmax, key: SelectionKey::Score, groups: None };
    let layer = |index: usize| match (index + 1).is_multiple_of(step) && !dense.contains(&index) {
        true => Layer::Moe(method.clone()),
        false => Layer::Dense,
    };
    let activation = Activation::Swiglu { limit: None };
    Ok(Model {
        hidden_size: config.size(&["hidden_size"])?,
        num_experts: config.size(&["num_experts", "num_local_experts"])?,
        top_k: config.size(&["num_experts_per_tok"])?,
        layers: (0..num_layers).map(layer).collect(),
        dense_keys: "decoder_sparse_step and mlp_only_layers",
        // Required: the class default is false, published checkpoints say true.
        renormalize: config.flag("norm_topk_prob")?.then_some(Denominator::Sum),
        routed_scaling_factor: 1.0,
        intermediate_size: config.size(&["moe_intermediate_size"])?,
        activation,
        shared: None,
        shared_activation: activation,
        notes: Vec::new(),
    })
}
