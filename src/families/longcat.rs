//! LongCat-Flash: softmax and a selection bias over experts with and without weights.
//!
//! Source: `LongcatFlashMoE` of transformers.

use serde_json::json;

use super::config::Config;
use super::model::{Block, Family, Kinds, Model, Sizes, activation};
use super::names::{MLP, Names};
use crate::error::Result;
use crate::spec::{RoutingMethod, Score, SelectionKey, ZeroExpertKind, ZeroExperts};

pub(super) const FAMILY: Family = Family {
    name: "longcat_flash",
    model_types: &["longcat_flash"],
    examples: &["LongCat-Flash"],
    // Width of the dense layers.
    irrelevant: &["ffn_hidden_size", "intermediate_size"],
    names: Names {
        router: &["router.classifier"],
        selection_bias: &["router.e_score_correction_bias"],
        shared: &[],
        ..MLP
    },
    read,
};

fn read(config: &Config<'_>) -> Result<Model> {
    config.optional_word("zero_expert_type", &["identity"])?;
    // Programs disagree: transformers holds such a bias and never adds it, SGLang adds it.
    config.fixed("router_bias", false)?;
    config.ignored("norm_topk_prob", &[json!(false)]);
    config.ignored("topk_method", &[]);
    let sizes = Sizes::read(
        config,
        &["n_routed_experts", "num_local_experts"],
        &["moe_topk", "num_experts_per_tok"],
        &["expert_ffn_hidden_size", "moe_intermediate_size"],
    )?;
    let method = RoutingMethod::TopK { score: Score::Softmax, key: SelectionKey::ScorePlusBias, groups: None };
    let zero = config.nullable_count(&["zero_expert_num"])?.filter(|count| *count > 0);
    let block = Block {
        routed_scaling_factor: config.nullable_number(&["routed_scaling_factor"])?.unwrap_or(1.0),
        zero_experts: zero.map(|count| ZeroExperts { count, kind: ZeroExpertKind::Identity }),
        ..Block::new(sizes, method, activation(config, "hidden_act")?)
    };
    // A layer is two of other models', which is what `num_hidden_layers` counts in some configs.
    config.get("num_hidden_layers");
    let layers = config.layers(&["num_layers"])?;
    Ok(Model::new(Kinds { moe: vec![true; layers], keys: "num_layers" }, &block))
}
