//! DeepSeek-V3, R1, V3.1 and V3.2, and Kimi K2: sigmoid scores, a selection bias, groups.
//!
//! Source: `DeepseekV3MoE` of transformers; DeepSeek-V3 `inference/model.py`.

use super::config::Config;
use super::names::{Names, Stacked};
use super::{Family, Layer, Model};
use crate::error::Result;
use crate::spec::{Activation, Denominator, GroupScore, Groups, RoutingMethod, Score, SelectionKey};

pub(super) const FAMILY: Family = Family {
    name: "deepseek_v3",
    model_types: &["deepseek_v3", "deepseek_v32", "kimi_k2"],
    irrelevant: &[
        // width of the dense layers
        "intermediate_size",
        // V3.2's sparse attention
        "index_head_dim",
        "index_n_heads",
        "index_topk",
    ],
    modules: &[Names {
        module: "mlp",
        router: "gate",
        router_bias: None,
        selection_bias: Some("gate.e_score_correction_bias"),
        tid2eid: None,
        projections: Some(["gate_proj", "up_proj", "down_proj"]),
        scale: "weight_scale_inv",
        shared: Some("shared_experts"),
        stacked: Stacked::HALVES,
    }],
    read,
};

fn read(config: &Config<'_>) -> Result<Model> {
    config.word("hidden_act", &["silu"])?;
    // Absent from configs that transformers wrote: its class knows no other values.
    config.optional_word("scoring_func", &["sigmoid"])?;
    config.optional_word("topk_method", &["noaux_tc"])?;

    let num_layers = config.num_layers()?;
    let first = config.count("first_k_dense_replace")?;
    // Absent likewise: every layer from the first on.
    let every = config.optional_count("moe_layer_freq", 1)?.unwrap_or(1);
    let n_group = config.size(&["n_group"])?;
    let topk_group = config.size(&["topk_group"])?;
    // One group out of one restricts nothing.
    let groups = match (n_group, topk_group) {
        (1, 1) => None,
        (_, _) => Some(Groups { n_group, topk_group, score: GroupScore::Top2SumOfKey }),
    };
    let method = RoutingMethod::TopK { score: Score::Sigmoid, key: SelectionKey::ScorePlusBias, groups };
    let layer = |index: usize| match index >= first && index.is_multiple_of(every) {
        true => Layer::Moe(method.clone()),
        false => Layer::Dense,
    };
    let activation = Activation::Swiglu { limit: None };
    Ok(Model {
        hidden_size: config.size(&["hidden_size"])?,
        num_experts: config.size(&["n_routed_experts"])?,
        top_k: config.size(&["num_experts_per_tok"])?,
        layers: (0..num_layers).map(layer).collect(),
        dense_keys: "first_k_dense_replace and moe_layer_freq",
        renormalize: config.flag("norm_topk_prob")?.then_some(Denominator::SumPlus { eps: 1e-20 }),
        routed_scaling_factor: config.nullable_number("routed_scaling_factor")?.unwrap_or(1.0),
        intermediate_size: config.size(&["moe_intermediate_size"])?,
        activation,
        shared: config.nullable_count("n_shared_experts")?.filter(|count| *count > 0),
        shared_activation: activation,
        notes: Vec::new(),
    })
}
