//! Gemma 4: experts beside a dense MLP; the router norms and scales its input, the experts read another tensor,
//! and each expert has a factor on its weight.
//!
//! Source: `Gemma4TextRouter`, `Gemma4TextExperts` and `Gemma4TextDecoderLayer` of transformers. The dense MLP and
//! the norms around both are not part of the layer.

use super::config::Config;
use super::model::{Block, Family, Kinds, Layer, Model, RouterKind, SOFTMAX, Sizes, activation};
use super::names::{MLP, Names};
use crate::error::Result;
use crate::spec::{Denominator, ExpertInput, LogitTransform, RouterInput};

pub(super) const FAMILY: Family = Family {
    name: "gemma4",
    model_types: &["gemma4"],
    examples: &["Gemma-4-26B-A4B"],
    // The dense MLP and shared keys and values.
    irrelevant: &["intermediate_size", "num_kv_shared_layers", "use_double_wide_mlp"],
    names: Names {
        modules: &[""],
        parts: &["router", "experts"],
        router: &["router.proj"],
        selection_bias: &[],
        input_scale: &["router.scale"],
        per_expert_scale: &["router.per_expert_scale"],
        shared: &[],
        ..MLP
    },
    read,
};

fn read(config: &Config<'_>) -> Result<Model> {
    let layers = config.num_layers()?;
    if !config.flag(&["enable_moe_block"])? {
        // The sizes are null then.
        for key in ["num_experts", "top_k_experts", "moe_intermediate_size", "hidden_activation"] {
            config.get(key);
        }
        return Ok(Model { layers: vec![Layer::Dense; layers], dense_keys: "enable_moe_block" });
    }
    let sizes = Sizes::read(config, &["num_experts"], &["top_k_experts"], &["moe_intermediate_size"])?;
    let input = RouterInput::RmsNormScaled { eps: config.number(&["rms_norm_eps"])? };
    let block = Block {
        router: RouterKind::Linear { input, bias: false, transform: LogitTransform::None },
        renormalize: Some(Denominator::Sum),
        per_expert_scale: true,
        expert_input: ExpertInput::Separate,
        ..Block::new(sizes, SOFTMAX, activation(config, "hidden_activation")?)
    };
    Ok(Model::new(Kinds::all(layers), &block))
}
