//! Zaya: a router that is an MLP with a state from layer to layer; one of its outputs skips the experts.
//!
//! Source: `ZayaSparseMoeBlock` and `ZayaRouter` of transformers. There the skipped expert gives 0; SGLang returns
//! the input times its weight instead.

use super::config::Config;
use super::model::{Block, Family, Kinds, Model, RouterKind, Sizes, activation};
use super::names::{MLP, Names, RouterMlpNames};
use crate::error::Result;
use crate::spec::{RoutingMethod, Score, SelectionKey, ZeroExpertKind, ZeroExperts};

pub(super) const FAMILY: Family = Family {
    name: "zaya",
    model_types: &["zaya"],
    examples: &["ZAYA1-8B"],
    irrelevant: &[],
    names: Names {
        selection_bias: &["gate.balancing_biases"],
        router_mlp: Some(RouterMlpNames {
            down: "down_proj",
            states_scale: "router_states_scale",
            norm: "router_mlp.norm.weight",
            fc1: "router_mlp.fc1",
            fc2: "router_mlp.fc2",
            out: "router_mlp.out_proj",
        }),
        shared: &[],
        ..MLP
    },
    read,
};

fn read(config: &Config<'_>) -> Result<Model> {
    if let Some(value) = config.get("zaya_layers") {
        return Err(config.unsupported(
            "zaya_layers",
            value,
            "the layout of ZAYA1-base is not read, only transformers'",
        ));
    }
    config.fixed("num_experts_per_tok", 1)?;
    let sizes = Sizes::read(config, &["num_experts"], &["num_experts_per_tok"], &["moe_intermediate_size"])?;
    let method = RoutingMethod::TopK { score: Score::Softmax, key: SelectionKey::ScorePlusBias, groups: None };
    let block = Block {
        zero_experts: Some(ZeroExperts { count: 1, kind: ZeroExpertKind::Skip }),
        ..Block::new(sizes, method, activation(config, "hidden_act")?)
    };
    let state_size = config.size(&["router_hidden_size"])?;
    let rms_norm_eps = config.number(&["rms_norm_eps"])?;
    Model::each(Kinds::all(config.num_layers()?), |layer| {
        let router = RouterKind::Mlp { state_size, rms_norm_eps, previous_state: layer > 0 };
        Ok(Block { router, ..block.clone() })
    })
}
