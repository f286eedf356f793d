//! The rules of a spec that need no device, each with the field it names.

use super::{
    Activation, ActivationRounding, BlockScale, ChosenScore, CombineOrder, CombineRounding, CommonTerms, Denominator,
    Entry, ExpertInput, ExpertMlp, FloatType, GateUpLayout, GroupScore, Groups, Latent, LatentNorm, LogitTransform,
    MAX_ROUTER_OUTPUTS, MAX_WIDTH, MoeSpec, NanPolicy, Orientation, OutputNorm, Placement, Precision, Rounding, Router,
    RouterInput, Routing, RoutingMethod, Score, SelectionKey, SharedCombination, SharedExperts, SharedGate,
    TensorShard, WeightPosition, ZeroExpertKind, ZeroExperts,
};
use crate::error::{Error, Result};

impl MoeSpec {
    /// Checks every rule that needs no device.
    ///
    /// # Errors
    /// [`Error::Invalid`] with the field, its value, the rule and the remedy.
    pub fn validate(&self) -> Result<()> {
        let Self {
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
            output_bias: true | false,
            output_norm,
            placement,
            shard,
            common_terms,
            entry,
            precision,
        } = self;
        width("hidden_size", *hidden_size)?;
        let (outputs, selectable) = (self.router_outputs(), self.selectable());
        if *num_experts == 0 || outputs > MAX_ROUTER_OUTPUTS {
            return Err(Error::invalid(
                "num_experts",
                outputs,
                format!("1 to {MAX_ROUTER_OUTPUTS} router outputs"),
                "correct num_experts or zero_experts",
            ));
        }
        if *top_k == 0 || *top_k > selectable {
            return Err(Error::invalid(
                "top_k",
                top_k,
                format!("1 to {selectable} (experts that can be chosen)"),
                "choose at most as many experts as there are",
            ));
        }
        router.validate()?;
        routing.validate(selectable, *top_k)?;
        experts.validate("experts")?;
        if let Some(SharedExperts { mlp, gate, combination: SharedCombination::Sum | SharedCombination::Average }) =
            shared
        {
            mlp.validate("shared.mlp")?;
            match gate {
                SharedGate::None => {}
                SharedGate::Sigmoid { format } => format.validate("shared.gate.format")?,
                SharedGate::Joint if self.joint_shares() == 0 => {
                    return Err(Error::invalid(
                        "shared.gate",
                        "Joint",
                        "a routing.method of JointNorm beside it",
                        "correct the gate or the method",
                    ));
                }
                SharedGate::Joint => {}
            }
        }
        // Shares that nobody takes would be dropped.
        let takes_shares = match shared {
            None => false,
            Some(SharedExperts { mlp: _, gate, combination: _ }) => *gate == SharedGate::Joint,
        };
        if self.joint_shares() > 0 && !takes_shares {
            return Err(Error::invalid(
                "shared.gate",
                format!("{:?}", shared.as_ref().map(|shared| shared.gate)),
                "Joint, as routing.method is JointNorm",
                "give the shared experts the gate Joint",
            ));
        }
        if let Some(Latent { size, format, norm }) = latent {
            width("latent.size", *size)?;
            format.validate("latent.format")?;
            match norm {
                LatentNorm::None => {}
                LatentNorm::Reduced { eps } => positive("latent.norm.eps", *eps)?,
                LatentNorm::PreAndPost { pre_eps, post_eps } => {
                    positive("latent.norm.pre_eps", *pre_eps)?;
                    positive("latent.norm.post_eps", *post_eps)?;
                }
            }
        }
        match (latent, routing.zero_experts) {
            (Some(_), Some(ZeroExperts { count: _, kind: ZeroExpertKind::Identity })) => {
                return Err(Error::invalid(
                    "routing.zero_experts",
                    "Identity beside latent projections",
                    "one of the two",
                    "an identity has no latent width: no model has both",
                ));
            }
            (Some(_), None | Some(ZeroExperts { count: _, kind: ZeroExpertKind::Skip })) | (None, _) => {}
        }
        match expert_input {
            ExpertInput::Hidden | ExpertInput::Separate => {}
        }
        if let Some(OutputNorm { eps }) = output_norm {
            positive("output_norm.eps", *eps)?;
        }
        let (Placement::All
        | Placement::Range { first: _, count: _ }
        | Placement::Map { num_slots: _, replicas: _, slots: _ }) = placement;
        let (TensorShard::Whole | TensorShard::Part { first: _, size: _, owns_down_bias: _ }) = shard;
        let (Entry::TokenMajor | Entry::Batched { capacity: _ }) = entry;
        let (CommonTerms::Here | CommonTerms::Elsewhere) = common_terms;
        self.validate_distribution()?;
        if let Some(lora) = lora {
            lora.validate(self.num_slots())?;
        }
        let Precision {
            input: FloatType::F32 | FloatType::F16 | FloatType::Bf16,
            output: FloatType::F32 | FloatType::F16 | FloatType::Bf16,
            model: FloatType::F32 | FloatType::F16 | FloatType::Bf16,
            router_gemm: Rounding::F32 | Rounding::Model,
            routing_weights: Rounding::F32 | Rounding::Model,
            weighted_input: Rounding::F32 | Rounding::Model,
            gate_up: Rounding::F32 | Rounding::Model,
            activation: ActivationRounding::F32 | ActivationRounding::Fused | ActivationRounding::Torch,
            combine: CombineRounding::F32 | CombineRounding::WeightedRows | CombineRounding::EveryStep,
            combine_order: CombineOrder::Slot | CombineOrder::Expert,
            block_scale: BlockScale::Exact | BlockScale::Promoted | BlockScale::Folded,
        } = precision;
        Ok(())
    }
}

impl Router {
    fn validate(&self) -> Result<()> {
        let transform = match self {
            Self::Linear { input, format, bias: true | false, transform } => {
                match input {
                    RouterInput::Hidden => {}
                    RouterInput::RmsNormScaled { eps } => positive("router.input.eps", *eps)?,
                }
                format.validate("router.format")?;
                *transform
            }
            Self::Mlp { state_size, rms_norm_eps, previous_state: true | false, format } => {
                width("router.state_size", *state_size)?;
                positive("router.rms_norm_eps", *rms_norm_eps)?;
                format.validate("router.format")?;
                LogitTransform::None
            }
            Self::Given { transform } => *transform,
        };
        match transform {
            LogitTransform::None => Ok(()),
            LogitTransform::SoftCap { cap } => positive("router.transform.cap", cap),
            LogitTransform::Multiply { factor } => finite("router.transform.factor", factor),
        }
    }
}

impl Routing {
    fn validate(&self, outputs: usize, top_k: usize) -> Result<()> {
        let Self {
            method,
            renormalize,
            routed_scaling_factor,
            apply_routed_scale_to_output,
            per_expert_scale: true | false,
            weight_position: WeightPosition::Output | WeightPosition::Input | WeightPosition::BeforeDown,
            zero_experts,
            nan_policy: NanPolicy::Zero | NanPolicy::Propagate,
        } = self;
        finite("routing.routed_scaling_factor", *routed_scaling_factor)?;
        match zero_experts {
            None => {}
            Some(ZeroExperts { count, kind: ZeroExpertKind::Identity | ZeroExpertKind::Skip }) => {
                width("routing.zero_experts.count", *count)?;
            }
        }
        match renormalize {
            None | Some(Denominator::Sum | Denominator::SumOrOne) => {}
            Some(Denominator::SumPlus { eps }) => positive("routing.renormalize.eps", *eps)?,
            Some(Denominator::AtLeast { floor }) => positive("routing.renormalize.floor", *floor)?,
            Some(Denominator::PNorm { p }) => positive("routing.renormalize.p", *p)?,
        }
        match method {
            RoutingMethod::TopK {
                score: Score::Softmax | Score::Sigmoid | Score::SqrtSoftplus | Score::Identity,
                key: SelectionKey::Score | SelectionKey::ScorePlusBias | SelectionKey::LogitPlusBias,
                groups,
            } => match groups {
                None => Ok(()),
                Some(groups) => groups.validate(outputs, top_k),
            },
            RoutingMethod::TopKThenScore { score: ChosenScore::Softmax | ChosenScore::Sigmoid } => Ok(()),
            RoutingMethod::Hash {
                score: Score::Softmax | Score::Sigmoid | Score::SqrtSoftplus | Score::Identity,
                vocab_size,
            } => {
                if *vocab_size == 0 || *vocab_size > i32::MAX as usize / top_k {
                    return Err(Error::invalid(
                        "routing.method.vocab_size",
                        vocab_size,
                        "1 or more, with vocab_size * top_k below 2^31",
                        "correct the rows of tid2eid",
                    ));
                }
                Ok(())
            }
            RoutingMethod::JointNorm { num_shared, global_scale: true | false } => {
                // Its weights are normalised with the shares, which rho multiplies too.
                if renormalize.is_some() {
                    let remedy = "joint normalisation is the renormalisation";
                    return Err(Error::invalid("routing.renormalize", "Some", "None with JointNorm", remedy));
                }
                if *apply_routed_scale_to_output {
                    let remedy = "joint shares hold the factor too";
                    let field = "routing.apply_routed_scale_to_output";
                    return Err(Error::invalid(field, true, "false with JointNorm", remedy));
                }
                width("routing.method.num_shared", *num_shared)
            }
            RoutingMethod::Sparsemixer { router_jitter_noise } => {
                finite("routing.method.router_jitter_noise", *router_jitter_noise)?;
                if *router_jitter_noise < 0.0 {
                    return Err(Error::invalid(
                        "routing.method.router_jitter_noise",
                        router_jitter_noise,
                        "0 or more",
                        "correct the value",
                    ));
                }
                if top_k != 2 {
                    return Err(Error::invalid("top_k", top_k, "2 with sparsemixer", "correct top_k"));
                }
                Ok(())
            }
        }
    }
}

impl Groups {
    fn validate(&self, outputs: usize, top_k: usize) -> Result<()> {
        let Self { n_group, topk_group, score } = self;
        if *n_group == 0 || !outputs.is_multiple_of(*n_group) {
            return Err(Error::invalid(
                "routing.groups.n_group",
                n_group,
                format!("a divisor of {outputs} experts"),
                "correct n_group",
            ));
        }
        if *topk_group == 0 || topk_group > n_group {
            return Err(Error::invalid(
                "routing.groups.topk_group",
                topk_group,
                format!("1 to n_group = {n_group}"),
                "correct topk_group",
            ));
        }
        let size = outputs / n_group;
        match score {
            GroupScore::MaxOfScore => {}
            GroupScore::Top2SumOfKey | GroupScore::Top2SumOfScore => {
                if size < 2 {
                    return Err(Error::invalid(
                        "routing.groups.n_group",
                        n_group,
                        "groups of at least 2 experts for a sum of two",
                        "correct n_group",
                    ));
                }
            }
        }
        if top_k > topk_group * size {
            return Err(Error::invalid(
                "top_k",
                top_k,
                format!("at most {} ({topk_group} groups of {size})", topk_group * size),
                "lower top_k or raise topk_group",
            ));
        }
        Ok(())
    }
}

impl ExpertMlp {
    pub(crate) fn validate(&self, path: &'static str) -> Result<()> {
        let Self {
            intermediate_size,
            activation,
            gate_up_layout,
            orientation: Orientation::OutIn | Orientation::InOut,
            gate_up_bias: true | false,
            down_bias: true | false,
            format,
            activation_quant,
        } = self;
        width(path, *intermediate_size)?;
        format.validate(path)?;
        match activation {
            Activation::Swiglu { limit } => limit.map_or(Ok(()), |limit| positive("activation.limit", limit))?,
            Activation::SwigluClampAfter { limit } => positive("activation.limit", *limit)?,
            Activation::SwigluOai { alpha, limit, beta } => {
                finite("activation.alpha", *alpha)?;
                finite("activation.beta", *beta)?;
                limit.map_or(Ok(()), |limit| positive("activation.limit", limit))?;
            }
            Activation::Situ { beta, linear_beta } => {
                positive("activation.beta", *beta)?;
                positive("activation.linear_beta", *linear_beta)?;
            }
            Activation::GeluTanh | Activation::GeluErf | Activation::Relu2 => {}
        }
        match (activation.gated(), gate_up_layout) {
            (true, GateUpLayout::Separate | GateUpLayout::Halves | GateUpLayout::Interleaved)
            | (false, GateUpLayout::Separate) => {}
            (false, GateUpLayout::Halves | GateUpLayout::Interleaved) => {
                return Err(Error::invalid(
                    "gate_up_layout",
                    format!("{gate_up_layout:?}"),
                    "Separate for an activation without gate",
                    "set gate_up_layout to Separate",
                ));
            }
        }
        activation_quant.validate(path, *format)
    }
}

pub(super) fn width(field: &'static str, value: usize) -> Result<()> {
    if value == 0 || value > MAX_WIDTH {
        return Err(Error::invalid(field, value, format!("1 to {MAX_WIDTH}"), "correct the size"));
    }
    Ok(())
}

fn finite(field: &'static str, value: f32) -> Result<()> {
    if !value.is_finite() {
        return Err(Error::invalid(field, value, "a finite number", "correct the value"));
    }
    Ok(())
}

pub(super) fn positive(field: &'static str, value: f32) -> Result<()> {
    if !(value.is_finite() && value > 0.0) {
        return Err(Error::invalid(
            field,
            value,
            "a finite number above 0",
            "write None (or leave the key out) for no bound",
        ));
    }
    Ok(())
}
