//! The parts of the spec that no backend has yet, refused by name in one place.

use std::borrow::Cow;

use crate::error::Unsupported;
use crate::spec::{
    Activation, ActivationQuant, ActivationRounding, BlockScale, CombineOrder, CombineRounding, Entry, ExpertInput,
    ExpertMlp, MoeSpec, Placement, Precision, Rounding, Router, RouterInput, Routing, RoutingMethod, SharedExperts,
    TensorShard,
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
        output_bias,
        placement,
        shard,
        entry,
        precision,
    } = spec;
    match router {
        Router::Linear { input: RouterInput::Hidden, format: _, bias: _, transform: _ }
        | Router::Given { transform: _ } => {}
        Router::Linear { input: input @ RouterInput::RmsNormScaled { eps: _ }, format: _, bias: _, transform: _ } => {
            return lacks("router.input", input, "no norm before the router yet");
        }
        Router::Mlp { state_size: _, rms_norm_eps: _ } => {
            return lacks("router", router, "no router with state yet");
        }
    }
    let Routing {
        method,
        renormalize: _,
        routed_scaling_factor: _,
        apply_routed_scale_to_output: _,
        per_expert_scale,
        weight_position: _,
        zero_experts,
        nan_policy: _,
    } = routing;
    match method {
        RoutingMethod::TopK { score: _, key: _, groups: _ }
        | RoutingMethod::TopKThenScore { score: _ }
        | RoutingMethod::Hash { score: _, vocab_size: _ } => {}
        RoutingMethod::JointNorm { num_shared: _, global_scale: _ } => {
            return lacks("routing.method", method, "no joint normalisation yet");
        }
        RoutingMethod::Sparsemixer { router_jitter_noise: _ } => {
            return lacks("routing.method", method, "no sparsemixer yet");
        }
    }
    if *per_expert_scale {
        return lacks("routing.per_expert_scale", per_expert_scale, "no per-expert scale yet");
    }
    if zero_experts.is_some() {
        return lacks("routing.zero_experts", zero_experts, "no zero experts yet");
    }
    let Precision {
        input: _,
        output: _,
        model: _,
        router_gemm,
        routing_weights,
        gate_up,
        activation,
        combine,
        combine_order,
        block_scale,
    } = precision;
    for (field, rounding) in [
        ("precision.router_gemm", router_gemm),
        ("precision.routing_weights", routing_weights),
        ("precision.gate_up", gate_up),
    ] {
        match rounding {
            Rounding::F32 => {}
            Rounding::Model => return lacks(field, rounding, "no rounding between steps yet"),
        }
    }
    if scope == Scope::Routing {
        return Ok(());
    }
    match activation {
        ActivationRounding::Fused => {}
        ActivationRounding::Torch => {
            return lacks("precision.activation", activation, "no rounding inside the activation yet");
        }
    }
    match combine {
        CombineRounding::F32 => {}
        CombineRounding::WeightedRows | CombineRounding::EveryStep => {
            return lacks("precision.combine", combine, "no rounding inside the weighted sum yet");
        }
    }
    match combine_order {
        CombineOrder::Slot => {}
        CombineOrder::Expert => return lacks("precision.combine_order", combine_order, "only the order of slots yet"),
    }
    match block_scale {
        BlockScale::Exact => {}
        BlockScale::Folded => return lacks("precision.block_scale", block_scale, "no folded scales yet"),
    }
    let shared = shared.as_ref().map(|SharedExperts { mlp, gate: _, combination: _ }| ("shared.mlp", mlp));
    for (path, mlp) in [("experts", experts)].into_iter().chain(shared) {
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
            ActivationQuant::None => {}
            ActivationQuant::DynamicFp8 { group: _, scale: _ } => {
                let field = if path == "experts" { "experts.activation_quant" } else { "shared.mlp.activation_quant" };
                return lacks(field, activation_quant, "no activation quantisation yet");
            }
        }
    }
    if latent.is_some() {
        return lacks("latent", latent, "no latent projections yet");
    }
    if lora.is_some() {
        return lacks("lora", lora, "no adapters yet");
    }
    match expert_input {
        ExpertInput::Hidden => {}
        ExpertInput::Separate => return lacks("expert_input", expert_input, "no second input yet"),
    }
    if *output_bias {
        return lacks("output_bias", output_bias, "no output bias yet");
    }
    match placement {
        Placement::All => {}
        Placement::Range { first: _, count: _ } | Placement::Map { slots: _ } => {
            return lacks("placement", placement, "no expert parallelism yet");
        }
    }
    match shard {
        TensorShard::Whole => {}
        TensorShard::Part { first: _, size: _, owns_down_bias: _ } => {
            return lacks("shard", shard, "no tensor parallelism yet");
        }
    }
    match entry {
        Entry::TokenMajor => Ok(()),
        Entry::Batched { capacity: _ } => lacks("entry", entry, "no expert-major entry yet"),
    }
}
