//! gpt-oss: the k largest logits, then a softmax over them; biases everywhere; its own activation.
//!
//! Source: `GptOssMLP` of transformers. The bf16 layout: stacked, transposed, gate and up interleaved.

use super::config::Config;
use super::model::{Block, Family, Kinds, Model, RouterKind, Sizes, swiglu_limit};
use super::names::{Layout, MLP, Mlp, Names};
use crate::error::Result;
use crate::spec::{Activation, ChosenScore, GateUpLayout, LogitTransform, Orientation, RouterInput, RoutingMethod};

pub(super) const FAMILY: Family = Family {
    name: "gpt_oss",
    model_types: &["gpt_oss"],
    examples: &["gpt-oss-20b, 120b"],
    // Context length before the rope was stretched.
    irrelevant: &["initial_context_length"],
    names: Names {
        router: &["router"],
        router_bias: &["router.bias"],
        selection_bias: &[],
        experts: &[Mlp {
            module: "experts",
            layout: Layout::Fused {
                gate_up: "gate_up_proj",
                down: "down_proj",
                rows: GateUpLayout::Interleaved,
                orientation: Some(Orientation::InOut),
            },
        }],
        shared: &[],
        ..MLP
    },
    read,
};

fn read(config: &Config<'_>) -> Result<Model> {
    // Configs say silu; the activation is fixed by the architecture, so the key may be absent.
    config.optional_word("hidden_act", &["silu"])?;
    let limit = swiglu_limit(config, "gpt-oss has 7")?;
    // The class has these two as constants; newer configs spell out the first.
    let alpha = config.optional_number("swiglu_alpha")?.unwrap_or(1.702);
    let sizes = Sizes::read(
        config,
        &["num_local_experts", "num_experts"],
        &["num_experts_per_tok", "experts_per_token"],
        &["intermediate_size"],
    )?;
    let method = RoutingMethod::TopKThenScore { score: ChosenScore::Softmax };
    let block = Block {
        router: RouterKind::Linear { input: RouterInput::Hidden, bias: true, transform: LogitTransform::None },
        biases: true,
        ..Block::new(sizes, method, Activation::SwigluOai { alpha, limit, beta: 1.0 })
    };
    Ok(Model::new(Kinds::all(config.num_layers()?), &block))
}
