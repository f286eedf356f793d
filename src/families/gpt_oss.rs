//! gpt-oss: the k largest logits, then a softmax over them; biases everywhere; its own activation.
//!
//! Source: `GptOssMLP` of transformers. The bf16 layout: stacked, transposed, gate and up interleaved.

use super::config::Config;
use super::names::{Names, Stacked};
use super::{Family, Layer, Model, unclamped};
use crate::error::Result;
use crate::spec::{Activation, ChosenScore, GateUpLayout, Orientation, RoutingMethod};

pub(super) const FAMILY: Family = Family {
    name: "gpt_oss",
    model_types: &["gpt_oss"],
    // Context length before the rope was stretched.
    irrelevant: &["initial_context_length"],
    modules: &[Names {
        module: "mlp",
        router: "router",
        router_bias: Some("router.bias"),
        selection_bias: None,
        tid2eid: None,
        projections: None,
        scale: "weight_scale_inv",
        shared: None,
        stacked: Stacked { layout: GateUpLayout::Interleaved, orientation: Orientation::InOut, biases: true },
    }],
    read,
};

fn read(config: &Config<'_>) -> Result<Model> {
    // Configs say silu; the activation is fixed by the architecture, so the key may be absent.
    config.optional_word("hidden_act", &["silu"])?;
    let limit = config.limit("swiglu_limit")?;
    // The class has these two as constants; newer configs spell out the first.
    let alpha = config.optional_number("swiglu_alpha")?.unwrap_or(1.702);
    let method = RoutingMethod::TopKThenScore { score: ChosenScore::Softmax };
    let activation = Activation::SwigluOai { alpha, limit, beta: 1.0 };
    Ok(Model {
        hidden_size: config.size(&["hidden_size"])?,
        num_experts: config.size(&["num_local_experts", "num_experts"])?,
        top_k: config.size(&["num_experts_per_tok", "experts_per_token"])?,
        layers: vec![Layer::Moe(method); config.num_layers()?],
        dense_keys: "num_hidden_layers",
        renormalize: None,
        routed_scaling_factor: 1.0,
        intermediate_size: config.size(&["intermediate_size"])?,
        activation,
        shared: None,
        shared_activation: activation,
        notes: unclamped(config, "gpt-oss has 7"),
    })
}
