//! The parts of the spec that no backend has yet, refused by name in one place.

use std::borrow::Cow;

use crate::error::Unsupported;
use crate::spec::{
    Activation, ActivationQuant, ActivationRounding, BlockScale, CombineOrder, CombineRounding, CommonTerms, Entry,
    ExpertInput, ExpertMlp, Latent, LatentNorm, Lora, LoraDelta, MoeSpec, Placement, Precision, Rounding, Router,
    RouterInput, Routing, SharedExperts, TensorShard,
};

/// How much of a layer a plan covers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// Ids and weights only.
    Routing,
    /// The whole layer.
    Layer,
}

/// Refuses on behalf of `backend`.
pub(crate) fn refuse(
    backend: &'static str,
    field: &'static str,
    value: &dyn std::fmt::Debug,
    because: impl Into<Cow<'static, str>>,
) -> Unsupported {
    Unsupported { backend: backend.into(), field: field.into(), value: format!("{value:?}"), because: because.into() }
}

/// The first field that has not landed in any backend.
pub(crate) fn landed(backend: &'static str, spec: &MoeSpec, scope: Scope) -> Result<(), Unsupported> {
    let lacks = |field, value: &dyn std::fmt::Debug, because: &'static str| Err(refuse(backend, field, value, because));
    let MoeSpec {
        hidden_size: _,
        num_experts: _,
        top_k: _,
        router,
        routing,
        experts,
        shared,
        latent,
        lora,
        expert_input,
        output_bias: true | false,
        output_norm: _,
        placement,
        shard,
        common_terms,
        entry,
        precision,
    } = spec;
    match router {
        Router::Linear {
            input: RouterInput::Hidden | RouterInput::RmsNormScaled { eps: _ },
            format: _,
            bias: _,
            transform: _,
        }
        | Router::Mlp { state_size: _, rms_norm_eps: _, previous_state: _, format: _ }
        | Router::Given { transform: _ } => {}
    }
    let Routing {
        method: _,
        renormalize: _,
        routed_scaling_factor: _,
        apply_routed_scale_to_output: _,
        per_expert_scale: _,
        weight_position: _,
        zero_experts: _,
        nan_policy: _,
    } = routing;
    let Precision {
        input: _,
        output: _,
        model: _,
        router_gemm: Rounding::F32 | Rounding::Model,
        routing_weights: Rounding::F32 | Rounding::Model,
        weighted_input: Rounding::F32 | Rounding::Model,
        gate_up: Rounding::F32 | Rounding::Model,
        activation: ActivationRounding::F32 | ActivationRounding::Fused | ActivationRounding::Torch,
        combine: CombineRounding::F32 | CombineRounding::WeightedRows | CombineRounding::EveryStep,
        combine_order: CombineOrder::Slot | CombineOrder::Expert,
        block_scale,
    } = precision;
    if scope == Scope::Routing {
        return Ok(());
    }
    match block_scale {
        // f32 is no narrower than it may be.
        BlockScale::Exact | BlockScale::Promoted => {}
        BlockScale::Folded => return lacks("precision.block_scale", block_scale, "no folded scales yet"),
    }
    let shared = shared.as_ref().map(|SharedExperts { mlp, gate: _, combination: _ }| mlp);
    for mlp in std::iter::once(experts).chain(shared) {
        let ExpertMlp {
            intermediate_size: _,
            activation,
            gate_up_layout: _,
            orientation: _,
            gate_up_bias: _,
            down_bias: _,
            format: _,
            activation_quant,
        } = mlp;
        match activation {
            Activation::Swiglu { limit: _ }
            | Activation::SwigluClampAfter { limit: _ }
            | Activation::SwigluOai { alpha: _, limit: _, beta: _ }
            | Activation::Situ { beta: _, linear_beta: _ }
            | Activation::GeluTanh
            | Activation::GeluErf
            | Activation::Relu2 => {}
        }
        match activation_quant {
            ActivationQuant::None
            | ActivationQuant::Dynamic { code: _, span: _, rule: _, scale: _ }
            | ActivationQuant::Static { code: _ } => {}
        }
    }
    match latent {
        None
        | Some(Latent {
            size: _,
            format: _,
            norm: LatentNorm::None | LatentNorm::Reduced { eps: _ } | LatentNorm::PreAndPost { pre_eps: _, post_eps: _ },
        }) => {}
    }
    match lora {
        None | Some(Lora { num_adapters: _, rank: _, format: _, delta: LoraDelta::F32 | LoraDelta::Model }) => {}
    }
    match expert_input {
        ExpertInput::Hidden | ExpertInput::Separate => {}
    }
    match placement {
        Placement::All | Placement::Range { first: _, count: _ } => {}
        Placement::Map { num_slots: _, replicas: _, slots: _ } => {}
    }
    match shard {
        TensorShard::Whole | TensorShard::Part { first: _, size: _, owns_down_bias: true | false } => {}
    }
    match common_terms {
        CommonTerms::Here | CommonTerms::Elsewhere => {}
    }
    match entry {
        Entry::TokenMajor | Entry::Batched { capacity: _ } => Ok(()),
    }
}
