//! The resolved spec, one line a field. Every field is named here, so a new one does not compile unprinted.

use std::fmt::Debug;

use moewe::MoeSpec;
use moewe::spec::{ExpertMlp, Latent, Lora, Precision, Router, Routing, SharedExperts};

/// (path, value) of each field.
pub fn fields(spec: &MoeSpec) -> Vec<(String, String)> {
    let MoeSpec {
        hidden_size,
        num_experts,
        top_k,
        router,
        routing,
        experts,
        shared,
        latent,
        lora,
        expert_input,
        output_bias,
        output_norm,
        placement,
        shard,
        common_terms,
        entry,
        precision,
    } = spec;
    let mut lines = Lines::default();
    lines.add("hidden_size", hidden_size);
    lines.add("num_experts", num_experts);
    lines.add("top_k", top_k);
    lines.router(router);
    lines.routing(routing);
    lines.mlp("experts", experts);
    lines.shared(shared.as_ref());
    lines.latent(latent.as_ref());
    lines.lora(lora.as_ref());
    lines.add("expert_input", expert_input);
    lines.add("output_bias", output_bias);
    lines.add("output_norm", output_norm);
    lines.add("placement", placement);
    lines.add("shard", shard);
    lines.add("common_terms", common_terms);
    lines.add("entry", entry);
    lines.precision(precision);
    lines.0
}

#[derive(Default)]
struct Lines(Vec<(String, String)>);

impl Lines {
    fn add(&mut self, path: impl Into<String>, value: &dyn Debug) {
        self.0.push((path.into(), format!("{value:?}")));
    }

    fn router(&mut self, router: &Router) {
        match router {
            Router::Linear { input, format, bias, transform } => {
                self.add("router.linear.input", input);
                self.add("router.linear.format", format);
                self.add("router.linear.bias", bias);
                self.add("router.linear.transform", transform);
            }
            Router::Mlp { state_size, rms_norm_eps, previous_state, format } => {
                self.add("router.mlp.previous_state", previous_state);
                self.add("router.mlp.format", format);
                self.add("router.mlp.state_size", state_size);
                self.add("router.mlp.rms_norm_eps", rms_norm_eps);
            }
            Router::Given { transform } => self.add("router.given.transform", transform),
        }
    }

    fn routing(&mut self, routing: &Routing) {
        let Routing {
            method,
            renormalize,
            routed_scaling_factor,
            apply_routed_scale_to_output,
            per_expert_scale,
            weight_position,
            zero_experts,
            nan_policy,
        } = routing;
        self.add("routing.method", method);
        self.add("routing.renormalize", renormalize);
        self.add("routing.routed_scaling_factor", routed_scaling_factor);
        self.add("routing.apply_routed_scale_to_output", apply_routed_scale_to_output);
        self.add("routing.per_expert_scale", per_expert_scale);
        self.add("routing.weight_position", weight_position);
        self.add("routing.zero_experts", zero_experts);
        self.add("routing.nan_policy", nan_policy);
    }

    fn mlp(&mut self, path: &str, mlp: &ExpertMlp) {
        let ExpertMlp {
            intermediate_size,
            activation,
            gate_up_layout,
            orientation,
            gate_up_bias,
            down_bias,
            format,
            activation_quant,
        } = mlp;
        self.add(format!("{path}.intermediate_size"), intermediate_size);
        self.add(format!("{path}.activation"), activation);
        self.add(format!("{path}.gate_up_layout"), gate_up_layout);
        self.add(format!("{path}.orientation"), orientation);
        self.add(format!("{path}.gate_up_bias"), gate_up_bias);
        self.add(format!("{path}.down_bias"), down_bias);
        self.add(format!("{path}.format"), format);
        self.add(format!("{path}.activation_quant"), activation_quant);
    }

    fn shared(&mut self, shared: Option<&SharedExperts>) {
        let Some(SharedExperts { mlp, gate, combination }) = shared else { return self.none("shared") };
        self.mlp("shared.mlp", mlp);
        self.add("shared.gate", gate);
        self.add("shared.combination", combination);
    }

    fn latent(&mut self, latent: Option<&Latent>) {
        let Some(Latent { size, format, norm }) = latent else { return self.none("latent") };
        self.add("latent.size", size);
        self.add("latent.format", format);
        self.add("latent.norm", norm);
    }

    fn lora(&mut self, lora: Option<&Lora>) {
        let Some(Lora { num_adapters, rank, format, delta }) = lora else { return self.none("lora") };
        self.add("lora.num_adapters", num_adapters);
        self.add("lora.rank", rank);
        self.add("lora.format", format);
        self.add("lora.delta", delta);
    }

    fn precision(&mut self, precision: &Precision) {
        let Precision {
            input,
            output,
            model,
            router_gemm,
            routing_weights,
            weighted_input,
            gate_up,
            activation,
            combine,
            combine_order,
            block_scale,
        } = precision;
        self.add("precision.input", input);
        self.add("precision.output", output);
        self.add("precision.model", model);
        self.add("precision.router_gemm", router_gemm);
        self.add("precision.routing_weights", routing_weights);
        self.add("precision.weighted_input", weighted_input);
        self.add("precision.gate_up", gate_up);
        self.add("precision.activation", activation);
        self.add("precision.combine", combine);
        self.add("precision.combine_order", combine_order);
        self.add("precision.block_scale", block_scale);
    }

    fn none(&mut self, path: &str) {
        self.add(path, &None::<()>);
    }
}
