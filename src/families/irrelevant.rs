//! Keys of `config.json` that say nothing about a Mixture-of-Experts layer's result.
//!
//! A key stands here only if no value of it can change the layer. All others are read or reported.

/// Of every text model.
pub(super) const SHARED: &[&str] = &[
    // transformers' bookkeeping
    "_attn_implementation",
    "_name_or_path",
    "architectures",
    "attn_implementation",
    "auto_map",
    "chunk_size_feed_forward",
    "dtype",
    "ep_size",
    "id2label",
    "is_decoder",
    "is_encoder_decoder",
    "label2id",
    "name_or_path",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "pretraining_tp",
    "problem_type",
    "return_dict",
    "tokenizer_class",
    "torch_dtype",
    "transformers_version",
    "use_cache",
    // tokens and embeddings
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "tie_word_embeddings",
    "vocab_size",
    // norms outside of the layer
    "rms_norm_eps",
    // attention and positions
    "attention_bias",
    "attention_dropout",
    "head_dim",
    "kv_lora_rank",
    "layer_types",
    "max_position_embeddings",
    "max_window_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "partial_rotary_factor",
    "q_lora_rank",
    "qk_head_dim",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "rope_interleave",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "sliding_window",
    "use_sliding_window",
    "v_head_dim",
    // training
    "aux_loss_alpha",
    "initializer_range",
    "router_aux_loss_coef",
    "seq_aux",
    // multi-token prediction
    "num_nextn_predict_layers",
];

/// Of the object around a nested text model.
pub(super) const MULTIMODAL: &[&str] = &[
    "audio_config",
    "audio_token_id",
    "ignore_index",
    "image_token_id",
    "image_token_index",
    "media_placeholder_token_id",
    "projector_hidden_act",
    "use_unified_vision_chunk",
    "video_placeholder",
    "video_token_id",
    "vision_config",
    "vision_end_token_id",
    "vision_start_token_id",
];

/// Of a `quantization_config`: lists of modules that stay unquantised. What a tensor is, its dtype says.
pub(super) const QUANTIZATION: &[&str] = &["ignore", "ignored_layers", "modules_to_not_convert"];
