//! Kimi-Linear and Kimi K3: DeepSeek-V3's block; K3's experts work at a latent width, with an activation of
//! their own.
//!
//! Source: `KimiLinearSparseMoeBlock` of transformers; for K3 `kimi_k3.py` of SGLang.

use serde_json::{Value, json};

use super::config::Config;
use super::deepseek_v3;
use super::model::{Block, Family, Kinds, Model, SWIGLU};
use super::names::{FUSED, LatentNames, MLP, Names, PROJ, SHARED_EXPERTS, SHORT, short};
use crate::error::Result;
use crate::spec::{Activation, LatentNorm};

pub(super) const FAMILY: Family = Family {
    name: "kimi_linear",
    model_types: &["kimi_linear", "kimi_k3"],
    examples: &["Kimi-Linear-48B-A3B", "Kimi K3"],
    // Width of the dense layers.
    irrelevant: &["intermediate_size"],
    names: Names {
        modules: &["block_sparse_moe", "mlp"],
        experts: &[FUSED, SHORT, PROJ],
        shared: &[SHARED_EXPERTS, short("shared_experts")],
        latent: Some(LatentNames {
            down: "routed_expert_down_proj",
            up: "routed_expert_up_proj",
            norm: "routed_expert_norm.weight",
            post_norm: "",
            zero_centred: false,
        }),
        ..MLP
    },
    read,
};

fn read(config: &Config<'_>) -> Result<Model> {
    config.ignored("use_grouped_topk", &[json!(true)]);
    let activation = match config.word("hidden_act", &["silu", "swish", "situ"])? {
        "situ" => situ(config)?,
        _ => {
            config.ignored("activation_situ_beta", &[]);
            config.ignored("activation_situ_linear_beta", &[]);
            SWIGLU
        }
    };
    let block = deepseek_v3::routed(config, activation)?;
    // Only K3 has these keys.
    let norm = match config.optional_flag("latent_moe_use_norm")?.unwrap_or(false) {
        true => LatentNorm::Reduced { eps: config.number(&["rms_norm_eps"])? },
        false => LatentNorm::None,
    };
    let latent = config.any_count(&["routed_expert_hidden_size"])?.map(|size| (size, norm));
    let shared = deepseek_v3::shared(config, block.intermediate_size, activation)?;
    Ok(Model::new(Kinds::listed_or_first(config)?, &Block { shared, latent, ..block }))
}

fn situ(config: &Config<'_>) -> Result<Activation> {
    let beta = config.nullable_number(&["activation_situ_beta"])?.filter(|beta| *beta != 0.0).unwrap_or(1.0);
    let key = "activation_situ_linear_beta";
    match config.nullable_number(&[key])? {
        Some(linear_beta) => Ok(Activation::Situ { beta, linear_beta }),
        None => Err(config.unsupported(key, &Value::Null, "only an activation that bounds up is implemented")),
    }
}
