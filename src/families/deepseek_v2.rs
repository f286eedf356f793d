//! DeepSeek-V2 and V2-Lite: softmax scores, groups judged by their best expert, no renormalisation.
//!
//! Source: `DeepseekV2Moe` of transformers.

use serde_json::json;

use super::config::Config;
use super::deepseek_v3;
use super::model::{Block, Family, Kinds, Model, Shared, activation, groups};
use super::names::{MLP, Names};
use crate::error::Result;
use crate::spec::{GroupScore, RoutingMethod, Score, SelectionKey};

pub(super) const FAMILY: Family = Family {
    name: "deepseek_v2",
    model_types: &["deepseek_v2"],
    examples: &["DeepSeek-V2, V2-Lite"],
    // Width of the dense layers.
    irrelevant: &["intermediate_size"],
    names: Names { selection_bias: &[], ..MLP },
    read,
};

fn read(config: &Config<'_>) -> Result<Model> {
    let activation = activation(config, "hidden_act")?;
    config.optional_word("scoring_func", &["softmax"])?;
    // transformers never renormalises; vLLM does if the config says so. No published config does.
    config.ignored("norm_topk_prob", &[json!(false)]);
    let n_group = |config| groups(config, &["n_group"], &["topk_group"], GroupScore::MaxOfScore);
    let groups = match config.word("topk_method", &["greedy", "group_limited_greedy"])? {
        "greedy" => {
            // Null in configs that transformers wrote; without a meaning here.
            config.get("n_group");
            config.get("topk_group");
            None
        }
        _ => n_group(config)?,
    };
    let biases = config.optional_flag("mlp_bias")?.unwrap_or(false);
    let kinds = Kinds::first(config, config.num_layers()?)?;
    let method = RoutingMethod::TopK { score: Score::Softmax, key: SelectionKey::Score, groups };
    let block = Block::new(deepseek_v3::sizes(config)?, method, activation);
    let shared = deepseek_v3::shared(config, block.intermediate_size, activation)?;
    let block = Block {
        routed_scaling_factor: config.nullable_number(&["routed_scaling_factor"])?.unwrap_or(1.0),
        shared: shared.map(|shared| Shared { biases, ..shared }),
        ..block
    };
    Ok(Model::new(kinds, &block))
}
