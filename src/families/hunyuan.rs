//! Hunyuan-A13B, Hy3 and Hy4.
//!
//! Source: `HunYuanMoEV1Moe`, `HYV3MoE` and `HYV4MoE` of transformers.

use serde_json::json;

use super::config::Config;
use super::deepseek_v3;
use super::model::{
    Block, Family, Kinds, Model, SIGMOID_BIAS, SOFTMAX, SWIGLU, Shared, Sizes, activation, silu, swiglu_limit,
};
use super::names::{MLP, Names, SHARED_EXPERTS, named, proj};
use crate::error::Result;
use crate::spec::{Activation, Denominator};

pub(super) const HUNYUAN_V1_MOE: Family = Family {
    name: "hunyuan_v1_moe",
    model_types: &["hunyuan_v1_moe"],
    examples: &["Hunyuan-A13B"],
    irrelevant: &[
        // training
        "moe_random_routing_dropped_token",
        // other parts of the authors' models
        "add_classification_head",
        "class_num",
        "cla_share_factor",
        "dense_list",
        "org_vocab_size",
        "pad_id",
        "pool_type",
        "use_cla",
        "attention_head_dim",
        "position_embedding_xdrope",
        "xdrope_section",
        "mlp_bias",
        "im_start_id",
        "im_end_id",
        "im_newline_id",
        "mask_init_id",
        "image_token_id",
        "max_image_size",
        "min_length",
        "num_media_embeds",
        "skip_cls_token",
        "text_start_id",
        "text_end_id",
        "video_start_id",
        "video_end_id",
        "vit_mapping_type",
        "vit_norm_type",
        "vit_path",
        "vit_patch",
        "vit_token",
        "vit_type",
        "vit_used_rms_norm",
        "vit_add_patchemb_bias",
        "vit_input_resolution",
        "vit_remove_prenorm",
        "anyres_pooling_size",
        "anyres_vit_max_image_size",
        "anyres_vit_two_views",
    ],
    names: Names { router: &["gate.wg"], selection_bias: &[], shared: &[proj("shared_mlp")], ..MLP },
    read: hunyuan,
};

pub(super) const HY_V3: Family = Family {
    name: "hy_v3",
    model_types: &["hy_v3"],
    examples: &["Hy3"],
    // Width of the dense layers.
    irrelevant: &["intermediate_size"],
    names: Names {
        router: &["router.gate", "gate"],
        selection_bias: &["expert_bias", "e_score_correction_bias", "gate.e_score_correction_bias"],
        shared: &[proj("shared_mlp"), SHARED_EXPERTS],
        ..MLP
    },
    read: hy_v3,
};

pub(super) const HY_V4: Family = Family {
    name: "hy_v4",
    model_types: &["hy_v4"],
    examples: &["Hy4"],
    irrelevant: &["intermediate_size"],
    // transformers renames `linear_gate` of attention to `gate_proj` when it loads, and every `gate_proj` back when
    // it saves.
    names: Names { shared: &[SHARED_EXPERTS, named("shared_experts", "linear_gate", "up_proj", "down_proj")], ..MLP },
    read: |config| {
        silu(config)?;
        let limit = swiglu_limit(config, "Hy4 has 10")?;
        let block = deepseek_v3::routed(config, Activation::Swiglu { limit })?;
        // The limit is the routed experts' alone.
        let shared = deepseek_v3::shared(config, block.intermediate_size, SWIGLU)?;
        Ok(Model::new(Kinds::listed_or_fixed(config, 1)?, &Block { shared, ..block }))
    },
};

fn hunyuan(config: &Config<'_>) -> Result<Model> {
    config.ignored("norm_topk_prob", &[json!(true)]);
    config.ignored("routed_scaling_factor", &[json!(1), json!(1.0)]);
    for key in ["group_limited_greedy", "n_group", "topk_group"] {
        config.ignored(key, &[json!(false), json!(0), json!(1)]);
    }
    config.fixed("moe_layer_num_skipped", 0)?;
    config.fixed("use_mixed_mlp_moe", true)?;
    let layers = config.num_layers()?;
    let width = config.size(&["intermediate_size"])?;
    // transformers reads one width and one shared expert; other programs the numbers of each layer.
    for (key, only) in [("moe_intermediate_size", width), ("num_shared_expert", 1)] {
        if config.has(key) && config.size_by_layer(&[key], layers)?.iter().any(|value| *value != only) {
            let expected = format!("{only} in each layer, which is what transformers computes");
            return Err(config.contradiction(key, "another number", expected));
        }
    }
    let experts = config.size_by_layer(&["num_experts", "num_local_experts"], layers)?;
    let top_k = config.size_by_layer(&["moe_topk", "num_experts_per_tok"], layers)?;
    let hidden_size = config.size(&["hidden_size"])?;
    let activation = activation(config, "hidden_act")?;
    Model::each(Kinds::all(layers), |layer| {
        let of = |list: &[usize]| list.get(layer).copied().unwrap_or(0);
        let (num_experts, top_k) = (of(&experts), of(&top_k));
        let block =
            Block::new(Sizes { hidden_size, num_experts, top_k, intermediate_size: width }, SOFTMAX, activation);
        Ok(Block { renormalize: Some(Denominator::Sum), shared: Shared::plain(width, activation), ..block })
    })
}

fn hy_v3(config: &Config<'_>) -> Result<Model> {
    config.ignored("route_norm", &[json!(true)]);
    config.ignored("moe_router_enable_expert_bias", &[json!(true)]);
    config.ignored("moe_router_use_sigmoid", &[json!(true)]);
    let biases = config.optional_flag("mlp_bias")?.unwrap_or(false);
    let sizes = Sizes::read(
        config,
        &["num_experts", "num_local_experts"],
        &["num_experts_per_tok"],
        &["moe_intermediate_size", "expert_hidden_dim"],
    )?;
    let block = Block::new(sizes, SIGMOID_BIAS, activation(config, "hidden_act")?);
    let count = config.nullable_count(&["num_shared_experts"])?.unwrap_or(0);
    let shared = Shared::times(count, block.intermediate_size, block.activation)?;
    let block = Block {
        renormalize: Some(Denominator::SumPlus { eps: 1e-20 }),
        routed_scaling_factor: config.nullable_number(&["router_scaling_factor"])?.unwrap_or(1.0),
        shared: shared.map(|shared| Shared { biases, ..shared }),
        ..block
    };
    Ok(Model::new(Kinds::listed_or_fixed(config, 1)?, &block))
}
