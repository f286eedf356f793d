//! Sizes, presence and ids of weights against the spec: what every later index relies on is proved here.

use super::tensor::finite;
use super::{
    InputScales, LatentNormWeights, LatentWeights, LoraWeights, Matrix, MlpWeights, MoeWeights, RouterMlpWeights,
    RouterWeights,
};
use crate::error::{Error, Result};
use crate::spec::{
    ActivationQuant, ExpertMlp, Latent, LatentNorm, Lora, MoeSpec, Router, RouterInput, RoutingMethod, SharedExperts,
    SharedGate, WeightFormat,
};

impl RouterWeights<'_> {
    /// Checks sizes, presence and ids against the spec.
    ///
    /// # Errors
    /// Names the tensor that is missing, surplus, misshapen or out of range.
    pub fn check(&self, spec: &MoeSpec) -> Result<()> {
        let Self { weight, bias, selection_bias, tid2eid, input_scale, per_expert_scale, global_scale, mlp } = self;
        let (outputs, selectable) = (spec.router_outputs(), spec.selectable());
        let (mut has_weight, mut has_bias, mut has_scale, mut has_mlp) = (false, false, false, false);
        match spec.router {
            Router::Linear { input, format, bias, transform: _ } => {
                if let Some(weight) = weight {
                    expect_matrix("router.weight", weight, [outputs, spec.hidden_size], format)?;
                }
                (has_weight, has_bias) = (true, bias);
                match input {
                    RouterInput::Hidden => {}
                    RouterInput::RmsNormScaled { eps: _ } => has_scale = true,
                }
            }
            Router::Mlp { state_size, rms_norm_eps: _, previous_state, format } => {
                has_mlp = true;
                if let Some(mlp) = mlp {
                    mlp.check([spec.hidden_size, state_size, outputs], previous_state, format)?;
                }
            }
            Router::Given { transform: _ } => {}
        }
        present("router.weight", weight.is_some(), has_weight)?;
        present("router.mlp", mlp.is_some(), has_mlp)?;
        vector("router.bias", bias.as_deref(), has_bias, outputs)?;
        vector("router.selection_bias", selection_bias.as_deref(), spec.has_selection_bias(), selectable)?;
        vector("router.input_scale", input_scale.as_deref(), has_scale, spec.hidden_size)?;
        let per_expert = spec.routing.per_expert_scale;
        vector("router.per_expert_scale", per_expert_scale.as_deref(), per_expert, spec.num_experts)?;
        let has_global_scale = match spec.routing.method {
            RoutingMethod::JointNorm { num_shared: _, global_scale } => global_scale,
            RoutingMethod::TopK { score: _, key: _, groups: _ }
            | RoutingMethod::TopKThenScore { score: _ }
            | RoutingMethod::Hash { score: _, vocab_size: _ }
            | RoutingMethod::Sparsemixer { router_jitter_noise: _ } => false,
        };
        vector("router.global_scale", global_scale.as_ref().map(std::slice::from_ref), has_global_scale, 1)?;
        let vocab_size = match spec.routing.method {
            RoutingMethod::Hash { score: _, vocab_size } => Some(vocab_size),
            RoutingMethod::TopK { score: _, key: _, groups: _ } => None,
            RoutingMethod::TopKThenScore { score: _ } => None,
            RoutingMethod::JointNorm { num_shared: _, global_scale: _ } => None,
            RoutingMethod::Sparsemixer { router_jitter_noise: _ } => None,
        };
        present("router.tid2eid", tid2eid.is_some(), vocab_size.is_some())?;
        if let (Some(table), Some(vocab_size)) = (tid2eid, vocab_size) {
            let expected = vocab_size * spec.top_k;
            if table.len() != expected {
                return Err(Error::invalid(
                    "router.tid2eid",
                    format!("{} ids", table.len()),
                    format!("{expected} ([{vocab_size}, {}])", spec.top_k),
                    "check the table against vocab_size and num_experts_per_tok",
                ));
            }
            if let Some(id) = table.iter().find(|&&id| usize::try_from(id).map_or(true, |id| id >= selectable)) {
                return Err(Error::invalid(
                    "router.tid2eid",
                    format!("expert id {id}"),
                    format!("ids in 0..{selectable}"),
                    "the table belongs to another model",
                ));
            }
        }
        Ok(())
    }
}

impl RouterMlpWeights<'_> {
    fn check(
        &self,
        [hidden_size, state, outputs]: [usize; 3],
        previous_state: bool,
        format: WeightFormat,
    ) -> Result<()> {
        let Self { down, down_bias, states_scale, norm, fc1, fc1_bias, fc2, fc2_bias, out } = self;
        expect_matrix("router.mlp.down", down, [state, hidden_size], format)?;
        expect_matrix("router.mlp.fc1", fc1, [state, state], format)?;
        expect_matrix("router.mlp.fc2", fc2, [state, state], format)?;
        expect_matrix("router.mlp.out", out, [outputs, state], format)?;
        vector("router.mlp.down_bias", Some(down_bias), true, state)?;
        vector("router.mlp.states_scale", states_scale.as_deref(), previous_state, state)?;
        vector("router.mlp.norm", Some(norm), true, state)?;
        vector("router.mlp.fc1_bias", Some(fc1_bias), true, state)?;
        vector("router.mlp.fc2_bias", Some(fc2_bias), true, state)
    }
}

impl LatentWeights<'_> {
    fn check(&self, spec: &Latent, hidden_size: usize) -> Result<()> {
        let Self { down, up, norm } = self;
        let Latent { size, format, norm: spec_norm } = spec;
        expect_matrix("latent.down", down, [*size, hidden_size], *format)?;
        expect_matrix("latent.up", up, [hidden_size, *size], *format)?;
        let (reduced, pre, post) = match norm {
            LatentNormWeights::None => (None, None, None),
            LatentNormWeights::Reduced(weight) => (Some(weight.as_slice()), None, None),
            LatentNormWeights::PreAndPost { pre, post } => (None, Some(pre.as_slice()), Some(post.as_slice())),
        };
        let (has_reduced, has_both) = match spec_norm {
            LatentNorm::None => (false, false),
            LatentNorm::Reduced { eps: _ } => (true, false),
            LatentNorm::PreAndPost { pre_eps: _, post_eps: _ } => (false, true),
        };
        vector("latent.norm", reduced, has_reduced, *size)?;
        vector("latent.norm.pre", pre, has_both, *size)?;
        vector("latent.norm.post", post, has_both, *size)
    }
}

impl MlpWeights<'_> {
    /// Against an MLP of which `inner` columns are here, and a down bias or not.
    fn check(&self, mlp: &ExpertMlp, [hidden_size, inner]: [usize; 2], owns_down_bias: bool, path: &str) -> Result<()> {
        let Self { gate, up, down, gate_bias, up_bias, down_bias, input_scales } = self;
        let fixed = match mlp.activation_quant {
            ActivationQuant::None | ActivationQuant::Dynamic { code: _, span: _, rule: _, scale: _ } => false,
            ActivationQuant::Static { code: _ } => true,
        };
        present("experts.input_scales", input_scales.is_some(), fixed)?;
        if let Some(InputScales { gate_up, down }) = input_scales {
            for (field, scale) in [("input_scales.gate_up", *gate_up), ("input_scales.down", *down)] {
                if !(scale.is_finite() && scale > 0.0) {
                    let remedy = "the checkpoint is damaged: download or convert it again";
                    return Err(Error::invalid(field, scale, "a finite positive scale", remedy));
                }
            }
        }
        let gated = mlp.activation.gated();
        present("experts.gate", gate.is_some(), gated)?;
        if let Some(gate) = gate {
            expect_matrix(path, gate, [inner, hidden_size], mlp.format)?;
        }
        expect_matrix(path, up, [inner, hidden_size], mlp.format)?;
        expect_matrix(path, down, [hidden_size, inner], mlp.format)?;
        vector("experts.gate_bias", gate_bias.as_deref(), mlp.gate_up_bias && gated, inner)?;
        vector("experts.up_bias", up_bias.as_deref(), mlp.gate_up_bias, inner)?;
        vector("experts.down_bias", down_bias.as_deref(), mlp.down_bias && owns_down_bias, hidden_size)
    }
}

impl LoraWeights<'_> {
    fn check(&self, lora: &Lora, gated: bool, [width, inner]: [usize; 2]) -> Result<()> {
        let Self { gate_up_a, gate_b, up_b, down_a, down_b } = self;
        let Lora { num_adapters: _, rank, format, delta: _ } = lora;
        present("lora.gate_b", gate_b.is_some(), gated)?;
        if let Some(gate_b) = gate_b {
            expect_matrix("lora.gate_b", gate_b, [inner, *rank], *format)?;
        }
        expect_matrix("lora.gate_up_a", gate_up_a, [*rank, width], *format)?;
        expect_matrix("lora.up_b", up_b, [inner, *rank], *format)?;
        expect_matrix("lora.down_a", down_a, [*rank, inner], *format)?;
        expect_matrix("lora.down_b", down_b, [width, *rank], *format)
    }
}

impl MoeWeights<'_> {
    /// Checks the whole layer against the spec.
    ///
    /// # Errors
    /// Names the tensor that is missing, surplus, misshapen or out of range.
    pub fn check(&self, spec: &MoeSpec) -> Result<()> {
        let Self { router, experts, lora, shared, shared_gate, latent, output_bias, output_norm } = self;
        if !spec.entry.is_batched() {
            router.check(spec)?;
        }
        let count = |field: &'static str, found: usize, expected: usize| match found == expected {
            true => Ok(()),
            false => Err(Error::invalid(
                field,
                format!("weights of {found}"),
                format!("of {expected}"),
                "give the weights of each expert that is here, by slot",
            )),
        };
        count("experts", experts.len(), spec.num_slots())?;
        let (_, inner) = spec.shard.columns(spec.experts.intermediate_size);
        let width = spec.expert_width();
        for expert in experts {
            expert.check(&spec.experts, [width, inner], spec.shard.owns_down_bias(), "experts")?;
        }
        count("lora", lora.len(), spec.lora.as_ref().map_or(0, |lora| lora.num_adapters))?;
        for adapter in lora {
            count("lora", adapter.len(), spec.num_slots())?;
            for (expert, lora) in adapter.iter().zip(&spec.lora) {
                expert.check(lora, spec.experts.activation.gated(), [width, inner])?;
            }
        }
        let common = spec.adds_common_terms();
        count("shared", shared.len(), if common { spec.shared_mlps() } else { 0 })?;
        let mut gated = false;
        if let Some(SharedExperts { mlp, gate, combination: _ }) = &spec.shared {
            for shared in shared {
                shared.check(mlp, [spec.hidden_size, mlp.intermediate_size], true, "shared")?;
            }
            match gate {
                SharedGate::None | SharedGate::Joint => {}
                SharedGate::Sigmoid { format } => {
                    gated = common;
                    if let Some(row) = shared_gate {
                        expect_matrix("shared.gate", row, [1, spec.hidden_size], *format)?;
                    }
                }
            }
        }
        present("shared.gate", shared_gate.is_some(), gated)?;
        present("latent", latent.is_some(), spec.latent.is_some())?;
        if let (Some(weights), Some(latent)) = (latent, &spec.latent) {
            weights.check(latent, spec.hidden_size)?;
        }
        vector("output_bias", output_bias.as_deref(), spec.output_bias && common, spec.hidden_size)?;
        vector("output_norm", output_norm.as_deref(), spec.output_norm.is_some(), spec.hidden_size)
    }
}

fn present(field: &'static str, found: bool, expected: bool) -> Result<()> {
    let word = |there| if there { "present" } else { "absent" };
    if found != expected {
        return Err(Error::invalid(field, word(found), word(expected), "make weights and spec agree"));
    }
    Ok(())
}

fn vector(field: &'static str, found: Option<&[f32]>, expected: bool, len: usize) -> Result<()> {
    present(field, found.is_some(), expected)?;
    let Some(values) = found else { return Ok(()) };
    if values.len() != len {
        return Err(Error::invalid(
            field,
            format!("{} values", values.len()),
            format!("{len} values"),
            "check the tensor against the spec",
        ));
    }
    finite(field, values)
}

fn expect_matrix(path: &str, matrix: &Matrix<'_>, shape: [usize; 2], format: WeightFormat) -> Result<()> {
    if matrix.shape() != shape || matrix.format() != format {
        return Err(Error::invalid(
            format!("{path} ({})", matrix.name()),
            format!("{:?} of {:?}", matrix.shape(), matrix.format()),
            format!("{shape:?} of {format:?}"),
            "make weights and spec agree",
        ));
    }
    Ok(())
}
