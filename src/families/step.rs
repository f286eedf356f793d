//! Step-3.5 and 3.7: sigmoid scores and a selection bias, always renormalised; limits of their own for each layer.
//!
//! Source: `Step3p7TextMoE` of transformers.

use serde_json::{Value, json};

use super::config::{Config, show};
use super::model::{Block, Family, Kinds, Model, SIGMOID_BIAS, SWIGLU, Shared, Sizes, silu};
use super::names::{FUSED, MLP, Names, SHARED_EXPERTS, proj, stacked};
use crate::error::Result;
use crate::spec::{Activation, Denominator};

pub(super) const FAMILY: Family = Family {
    name: "step3p5",
    model_types: &["step3p5", "step3p7"],
    examples: &["Step-3.5-Flash", "Step-3.7-Flash"],
    // Width of the dense layers; a switch and a step that go with the list of layers.
    irrelevant: &["intermediate_size", "moe_every_n_layer", "use_moe"],
    names: Names {
        modules: &["moe", "mlp"],
        beside: &["share_expert"],
        selection_bias: &["router_bias", "gate.e_score_correction_bias"],
        experts: &[FUSED, stacked("", "gate_proj.weight", "up_proj.weight", "down_proj.weight")],
        shared: &[proj("share_expert"), SHARED_EXPERTS],
        ..MLP
    },
    read,
};

fn read(config: &Config<'_>) -> Result<Model> {
    silu(config)?;
    config.optional_word("moe_router_activation", &["sigmoid"])?;
    config.ignored("norm_expert_weight", &[json!(true)]);
    config.ignored("use_moe_router_bias", &[json!(true)]);
    let sizes = Sizes::read(
        config,
        &["moe_num_experts", "n_routed_experts", "num_local_experts"],
        &["moe_top_k", "num_experts_per_tok"],
        &["moe_intermediate_size"],
    )?;
    let width = config.count(&["share_expert_dim", "share_expert_dims"])?;
    let biases = config.optional_flag("mlp_bias")?.unwrap_or(false);
    let block = Block {
        renormalize: Some(Denominator::Sum),
        routed_scaling_factor: config.nullable_number(&["moe_router_scaling_factor"])?.unwrap_or(1.0),
        apply_routed_scale_to_output: true,
        ..Block::new(sizes, SIGMOID_BIAS, SWIGLU)
    };
    let kinds = kinds(config)?;
    let routed = clamped(config, "swiglu_limits", &kinds)?;
    let shared = clamped(config, "swiglu_limits_shared", &kinds)?;
    Model::each(kinds, |layer| {
        let shared = Shared::plain(width, shared.get(layer).copied().unwrap_or(SWIGLU));
        Ok(Block {
            activation: routed.get(layer).copied().unwrap_or(SWIGLU),
            shared: shared.map(|shared| Shared { biases, ..shared }),
            ..block.clone()
        })
    })
}

/// The activation of each layer. Lists may go on for the layers of multi-token prediction.
fn clamped(config: &Config<'_>, key: &'static str, kinds: &Kinds) -> Result<Vec<Activation>> {
    let layers = kinds.moe.len();
    let Some(limits) = config.limits(key)? else { return Ok(vec![SWIGLU; layers]) };
    if limits.len() < layers {
        let found = format!("{} entries", limits.len());
        return Err(config.contradiction(key, found, format!("at least num_hidden_layers = {layers}")));
    }
    let activation = |limit: &Option<f32>| limit.map_or(SWIGLU, |limit| Activation::SwigluClampAfter { limit });
    Ok(limits.iter().map(activation).collect())
}

/// `mlp_layer_types`, which may go on likewise, or the authors' `moe_layers_enum`, numbers in a list or a text.
fn kinds(config: &Config<'_>) -> Result<Kinds> {
    let layers = config.num_layers()?;
    config.get("moe_layer_freq");
    if let Some(words) = config.words("mlp_layer_types", &["sparse", "moe", "dense"])? {
        config.get("moe_layers_enum");
        let mut moe: Vec<bool> = words.iter().map(|word| *word != "dense").collect();
        moe.truncate(layers);
        return Kinds::of_list(config, "mlp_layer_types", moe.into_iter(), layers);
    }
    let key = "moe_layers_enum";
    let listed = match config.get(key) {
        Some(Value::String(text)) => {
            let numbers: Option<Vec<usize>> = text.split(',').map(|number| number.trim().parse().ok()).collect();
            numbers.ok_or_else(|| config.contradiction(key, show(&json!(text)), "numbers of layers between commas"))?
        }
        _ => config
            .any_integers(key)?
            .ok_or_else(|| config.missing("mlp_layer_types or moe_layers_enum", "the layers that have experts"))?,
    };
    Ok(Kinds::where_(layers, key, |layer| listed.contains(&layer)))
}
