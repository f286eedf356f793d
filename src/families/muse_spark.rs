//! Muse-Spark: scaled logits, sigmoid scores and a selection bias; experts at a latent width between two norms.
//!
//! Source: `MuseSparkTextMoE` of transformers.

use super::config::Config;
use super::model::{Block, Family, Kinds, Model, RouterKind, SIGMOID_BIAS, Sizes, activation};
use super::names::{LatentNames, MLP, Names};
use crate::error::Result;
use crate::spec::{Denominator, LatentNorm, LogitTransform, RouterInput};

pub(super) const FAMILY: Family = Family {
    name: "muse_spark",
    model_types: &["muse_spark"],
    examples: &["Muse-Spark"],
    // Width of the dense layers.
    irrelevant: &["intermediate_size"],
    names: Names {
        shared: &[],
        latent: Some(LatentNames {
            down: "pre_expert_proj",
            up: "post_expert_proj",
            norm: "pre_expert_norm.weight",
            post_norm: "experts.post_expert_norm.weight",
            zero_centred: true,
        }),
        ..MLP
    },
    read,
};

fn read(config: &Config<'_>) -> Result<Model> {
    config.fixed("num_shared_experts", 0)?;
    config.fixed("inference_moe_w13_interleaved", false)?;
    let experts = &["num_local_experts", "num_experts"];
    let sizes = Sizes::read(config, experts, &["num_experts_per_tok"], &["moe_intermediate_size"])?;
    let norm = LatentNorm::PreAndPost {
        pre_eps: config.number(&["rms_norm_eps"])?,
        post_eps: config.number(&["post_norm_eps"])?,
    };
    let transform = LogitTransform::Multiply { factor: config.number(&["output_multiplier"])? };
    let block = Block {
        router: RouterKind::Linear { input: RouterInput::Hidden, bias: false, transform },
        // A constant of the class, as is that it renormalises.
        renormalize: Some(Denominator::SumPlus { eps: 1e-15 }),
        routed_scaling_factor: config.nullable_number(&["routed_scaling_factor"])?.unwrap_or(1.0),
        latent: Some((config.size(&["moe_hidden_size"])?, norm)),
        ..Block::new(sizes, SIGMOID_BIAS, activation(config, "hidden_act")?)
    };
    let layers = config.num_layers()?;
    // Without a list the class has experts in each layer.
    Ok(Model::new(Kinds::listed(config, layers)?.unwrap_or_else(|| Kinds::all(layers)), &block))
}
