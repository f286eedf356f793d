//! Fields that can be dropped from a layer as a user has it: for each the spec without it, and the weights that are
//! then read. The reference, given both, says what dropping the field would do to the output.
//!
//! [`witnesses`](super::witnesses) are layers made to show a field; here the layer is given. What is listed are the
//! fields that have a neutral value: a limit that is not there, a factor of 1, a softmax instead of another score.
//! Sizes, types and layouts have none, and what stands at its neutral value cannot be dropped.

use std::fmt::Debug;

use crate::numerics::round_to;
use crate::spec::{
    Activation, ActivationQuant, ActivationRounding, ChosenScore, CombineOrder, CombineRounding, ExpertInput,
    ExpertMlp, FloatType, Groups, Latent, LatentNorm, LogitTransform, MoeSpec, OutputNorm, Precision, Rounding, Router,
    RouterInput, Routing, RoutingMethod, Score, SelectionKey, SharedCombination, SharedExperts, SharedGate,
    WeightPosition, ZeroExpertKind, ZeroExperts,
};
use crate::weights::{LatentNormWeights, MlpWeights, MoeWeights};

/// A field that can be dropped.
#[derive(Debug, Clone, PartialEq)]
pub struct Ablation {
    /// Path of the field, as the [`vocabulary`](super::vocabulary::vocabulary) has it; of the selection bias's type,
    /// which is no field but was dropped by engines, [`BIAS_TYPE`].
    pub field: String,
    /// What configs and engines call it.
    pub key: &'static str,
    /// Its value.
    pub value: String,
    /// What the layer is without it: behind "as if".
    pub instead: &'static str,
    /// The spec without it.
    pub spec: MoeSpec,
}

/// The field of an [`Ablation`] that rounds the selection bias to bf16.
pub const BIAS_TYPE: &str = "router.selection_bias.dtype";

impl Ablation {
    /// Whether `wanted` names it: its key, or words of its path in their order.
    pub fn is_called(&self, wanted: &str) -> bool {
        self.key == wanted || super::within(wanted, &self.field)
    }

    /// The weights that the spec without the field reads, of those that the one with it has.
    #[must_use]
    pub fn weights<'a>(&self, weights: &MoeWeights<'a>) -> MoeWeights<'a> {
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
            expert_input: _,
            output_bias,
            output_norm,
            placement: _,
            shard: _,
            common_terms: _,
            entry: _,
            precision: _,
        } = &self.spec;
        let mut left = weights.clone();
        let MoeWeights {
            router: router_weights,
            experts: expert_weights,
            lora: lora_weights,
            shared: shared_weights,
            shared_gate,
            latent: latent_weights,
            output_bias: output_bias_row,
            output_norm: output_norm_row,
        } = &mut left;
        let (bias, scale, state) = match router {
            Router::Linear { input, format: _, bias, transform: _ } => (*bias, *input != RouterInput::Hidden, false),
            Router::Mlp { state_size: _, rms_norm_eps: _, previous_state, format: _ } => {
                (false, false, *previous_state)
            }
            Router::Given { transform: _ } => (false, false, false),
        };
        keep(&mut router_weights.bias, bias);
        keep(&mut router_weights.input_scale, scale);
        if let Some(mlp) = &mut router_weights.mlp {
            keep(&mut mlp.states_scale, state);
        }
        let (hash, global_scale) = match &routing.method {
            RoutingMethod::Hash { score: _, vocab_size: _ } => (true, false),
            RoutingMethod::JointNorm { num_shared: _, global_scale } => (false, *global_scale),
            RoutingMethod::TopK { score: _, key: _, groups: _ }
            | RoutingMethod::TopKThenScore { score: _ }
            | RoutingMethod::Sparsemixer { router_jitter_noise: _ } => (false, false),
        };
        keep(&mut router_weights.tid2eid, hash);
        keep(&mut router_weights.global_scale, global_scale);
        keep(&mut router_weights.per_expert_scale, routing.per_expert_scale);
        keep(&mut router_weights.selection_bias, self.spec.has_selection_bias());
        if self.field == BIAS_TYPE {
            let rounded = |bias: &mut f32| *bias = round_to(FloatType::Bf16, *bias);
            router_weights.selection_bias.iter_mut().flatten().for_each(rounded);
        }
        expert_weights.iter_mut().for_each(|weights| keep_of_mlp(weights, experts));
        match shared {
            None => {
                shared_weights.clear();
                *shared_gate = None;
            }
            Some(SharedExperts { mlp, gate, combination: _ }) => {
                shared_weights.iter_mut().for_each(|weights| keep_of_mlp(weights, mlp));
                match gate {
                    SharedGate::None | SharedGate::Joint => *shared_gate = None,
                    SharedGate::Sigmoid { format: _ } => {}
                }
            }
        }
        if let (Some(weights), Some(Latent { size: _, format: _, norm: LatentNorm::None })) = (latent_weights, latent) {
            weights.norm = LatentNormWeights::None;
        }
        if lora.is_none() {
            lora_weights.clear();
        }
        keep(output_bias_row, *output_bias);
        keep(output_norm_row, output_norm.is_some());
        left
    }
}

fn keep<T>(weights: &mut Option<T>, kept: bool) {
    if !kept {
        *weights = None;
    }
}

fn keep_of_mlp(weights: &mut MlpWeights<'_>, mlp: &ExpertMlp) {
    keep(&mut weights.gate_bias, mlp.gate_up_bias);
    keep(&mut weights.up_bias, mlp.gate_up_bias);
    keep(&mut weights.down_bias, mlp.down_bias);
    let fixed = match mlp.activation_quant {
        ActivationQuant::Static { code: _ } => true,
        ActivationQuant::None | ActivationQuant::Dynamic { code: _, span: _, rule: _, scale: _ } => false,
    };
    keep(&mut weights.input_scales, fixed);
}

/// Every field of this spec that can be dropped, in the spec's order.
pub fn ablations(spec: &MoeSpec) -> Vec<Ablation> {
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
        output_norm,
        // What a device has of a layer, and how rows enter it, is no part of the model.
        placement: _,
        shard: _,
        common_terms: _,
        entry: _,
        precision,
    } = spec;
    let mut list = List { whole: spec, found: vec![] };
    list.router(router);
    list.routing(routing);
    list.mlp("experts", experts, |spec| Some(&mut spec.experts));
    list.shared(shared.as_ref());
    if let Some(Latent { size: _, format: _, norm }) = latent {
        list.latent_norm(norm);
    }
    list.off("lora", "lora", lora.as_ref(), "there were no adapters", |spec| spec.lora = None);
    match expert_input {
        ExpertInput::Hidden => {}
        ExpertInput::Separate => {
            let instead = "experts read the router's rows";
            list.add("expert_input.Separate", "expert_input", expert_input, instead, |spec| {
                spec.expert_input = ExpertInput::Hidden;
            });
        }
    }
    list.flag("output_bias", "output_bias", *output_bias, |spec| spec.output_bias = false);
    let norm = output_norm.as_ref().map(|OutputNorm { eps }| eps);
    list.off("output_norm", "output_norm", norm, "the output were not normed", |spec| spec.output_norm = None);
    list.precision(precision);
    list.found
}

struct List<'a> {
    whole: &'a MoeSpec,
    found: Vec<Ablation>,
}

/// An MLP of a spec.
type Of = fn(&mut MoeSpec) -> Option<&mut ExpertMlp>;

impl List<'_> {
    fn add(
        &mut self,
        field: impl Into<String>,
        key: &'static str,
        value: &dyn Debug,
        instead: &'static str,
        drop: impl FnOnce(&mut MoeSpec),
    ) {
        let mut spec = self.whole.clone();
        drop(&mut spec);
        self.found.push(Ablation { field: field.into(), key, value: format!("{value:?}"), instead, spec });
    }

    /// What is `None` without it.
    fn off<T: Debug>(
        &mut self,
        field: &str,
        key: &'static str,
        value: Option<T>,
        instead: &'static str,
        drop: impl FnOnce(&mut MoeSpec),
    ) {
        if let Some(value) = value {
            self.add(field, key, &value, instead, drop);
        }
    }

    /// What is `false` without it.
    fn flag(&mut self, field: &str, key: &'static str, value: bool, drop: impl FnOnce(&mut MoeSpec)) {
        self.off(field, key, value.then_some(value), "it were false", drop);
    }

    fn router(&mut self, router: &Router) {
        match *router {
            Router::Linear { input, format: _, bias, transform } => {
                match input {
                    RouterInput::Hidden => {}
                    RouterInput::RmsNormScaled { eps: _ } => {
                        let instead = "the router read the rows as they are";
                        self.add("router.Linear.input.RmsNormScaled", "router_norm", &input, instead, |spec| {
                            if let Some((input, _)) = linear(spec) {
                                *input = RouterInput::Hidden;
                            }
                        });
                    }
                }
                self.flag("router.Linear.bias", "router_bias", bias, |spec| {
                    if let Some((_, bias)) = linear(spec) {
                        *bias = false;
                    }
                });
                self.transform("router.Linear.transform", transform);
            }
            Router::Mlp { state_size: _, rms_norm_eps: _, previous_state, format: _ } => {
                self.flag("router.Mlp.previous_state", "router_states", previous_state, |spec| {
                    match &mut spec.router {
                        Router::Mlp { state_size: _, rms_norm_eps: _, previous_state, format: _ } => {
                            *previous_state = false;
                        }
                        Router::Linear { input: _, format: _, bias: _, transform: _ }
                        | Router::Given { transform: _ } => {}
                    }
                });
            }
            Router::Given { transform } => self.transform("router.Given.transform", transform),
        }
    }

    fn transform(&mut self, path: &str, transform: LogitTransform) {
        let (variant, key) = match transform {
            LogitTransform::None => return,
            LogitTransform::SoftCap { cap: _ } => ("SoftCap", "router_logit_softcapping"),
            LogitTransform::Multiply { factor: _ } => ("Multiply", "router_logit_multiplier"),
        };
        self.add(format!("{path}.{variant}"), key, &transform, "logits stayed as they are", |spec| {
            match &mut spec.router {
                Router::Linear { input: _, format: _, bias: _, transform } | Router::Given { transform } => {
                    *transform = LogitTransform::None;
                }
                Router::Mlp { state_size: _, rms_norm_eps: _, previous_state: _, format: _ } => {}
            }
        });
    }

    fn routing(&mut self, routing: &Routing) {
        let Routing {
            method,
            renormalize,
            routed_scaling_factor,
            // The same product, in another place.
            apply_routed_scale_to_output: _,
            per_expert_scale,
            weight_position,
            zero_experts,
            // Acts on scores that are no numbers only.
            nan_policy: _,
        } = routing;
        self.method(method);
        let instead = "weights were not renormalised";
        self.off("routing.renormalize", "norm_topk_prob", renormalize.as_ref(), instead, |spec| {
            spec.routing.renormalize = None;
        });
        let rho = Some(*routed_scaling_factor).filter(|rho| *rho != 1.0);
        self.off("routing.routed_scaling_factor", "routed_scaling_factor", rho, "it were 1", |spec| {
            spec.routing.routed_scaling_factor = 1.0;
        });
        self.flag("routing.per_expert_scale", "per_expert_scale", *per_expert_scale, |spec| {
            spec.routing.per_expert_scale = false;
        });
        let variant = match weight_position {
            WeightPosition::Output => None,
            WeightPosition::Input => Some("Input"),
            WeightPosition::BeforeDown => Some("BeforeDown"),
        };
        if let Some(variant) = variant {
            let (field, key) = (format!("routing.weight_position.{variant}"), "apply_router_weight_on_input");
            self.add(field, key, weight_position, "weights acted on the experts' outputs", |spec| {
                spec.routing.weight_position = WeightPosition::Output;
            });
        }
        match zero_experts {
            None | Some(ZeroExperts { count: _, kind: ZeroExpertKind::Skip }) => {}
            Some(ZeroExperts { count, kind: kind @ ZeroExpertKind::Identity }) => {
                let skip = Some(ZeroExperts { count: *count, kind: ZeroExpertKind::Skip });
                let instead = "zero experts gave nothing";
                self.add("routing.zero_experts.kind.Identity", "zero_expert_type", kind, instead, |spec| {
                    spec.routing.zero_experts = skip;
                });
            }
        }
    }

    fn method(&mut self, method: &RoutingMethod) {
        let path = "routing.method";
        match *method {
            RoutingMethod::TopK { score, key, groups } => {
                let top_k = |score, key, groups| {
                    move |spec: &mut MoeSpec| spec.routing.method = RoutingMethod::TopK { score, key, groups }
                };
                self.score(&format!("{path}.TopK.score"), score, top_k(Score::Softmax, key, groups));
                let variant = match key {
                    SelectionKey::Score => None,
                    SelectionKey::ScorePlusBias => Some("ScorePlusBias"),
                    SelectionKey::LogitPlusBias => Some("LogitPlusBias"),
                };
                if let Some(variant) = variant {
                    let (field, name) = (format!("{path}.TopK.key.{variant}"), "e_score_correction_bias");
                    self.add(field, name, &key, "no bias were added", top_k(score, SelectionKey::Score, groups));
                    self.bias_type();
                }
                if let Some(Groups { n_group: _, topk_group: _, score: _ }) = &groups {
                    let instead = "experts of all groups could be chosen";
                    self.add(format!("{path}.TopK.groups"), "n_group", &groups, instead, top_k(score, key, None));
                }
            }
            RoutingMethod::TopKThenScore { score } => {
                match score {
                    ChosenScore::Softmax => {}
                    ChosenScore::Sigmoid => {
                        let field = format!("{path}.TopKThenScore.score.Sigmoid");
                        self.add(field, "scoring_func", &score, "it were a softmax", |spec| {
                            spec.routing.method = RoutingMethod::TopKThenScore { score: ChosenScore::Softmax };
                        });
                    }
                }
                let (before, instead) = match score {
                    ChosenScore::Softmax => (Score::Softmax, "the softmax were over all experts"),
                    ChosenScore::Sigmoid => (Score::Sigmoid, "all experts were scored"),
                };
                self.add(format!("{path}.TopKThenScore"), "score_before_topk", method, instead, |spec| {
                    let (score, key) = (before, SelectionKey::Score);
                    spec.routing.method = RoutingMethod::TopK { score, key, groups: None };
                });
            }
            RoutingMethod::Hash { score, vocab_size } => {
                let instead = "the best scores chose the experts";
                self.add(format!("{path}.Hash"), "tid2eid", method, instead, |spec| {
                    let key = SelectionKey::Score;
                    spec.routing.method = RoutingMethod::TopK { score, key, groups: None };
                });
                self.score(&format!("{path}.Hash.score"), score, |spec| {
                    spec.routing.method = RoutingMethod::Hash { score: Score::Softmax, vocab_size };
                });
            }
            RoutingMethod::JointNorm { num_shared, global_scale } => {
                self.bias_type();
                self.flag(&format!("{path}.JointNorm.global_scale"), "global_scale", global_scale, |spec| {
                    spec.routing.method = RoutingMethod::JointNorm { num_shared, global_scale: false };
                });
            }
            RoutingMethod::Sparsemixer { router_jitter_noise: _ } => {
                let instead = "a softmax over the chosen weighed them";
                self.add(format!("{path}.Sparsemixer"), "router_jitter_noise", method, instead, |spec| {
                    spec.routing.method = RoutingMethod::TopKThenScore { score: ChosenScore::Softmax };
                });
            }
        }
    }

    fn bias_type(&mut self) {
        self.add(BIAS_TYPE, "e_score_correction_bias_dtype", &FloatType::F32, "the bias were rounded to bf16", |_| {});
    }

    fn score(&mut self, path: &str, score: Score, drop: impl FnOnce(&mut MoeSpec)) {
        let variant = match score {
            Score::Softmax => return,
            Score::Sigmoid => "Sigmoid",
            Score::SqrtSoftplus => "SqrtSoftplus",
            Score::Identity => "Identity",
        };
        self.add(format!("{path}.{variant}"), "scoring_func", &score, "it were a softmax", drop);
    }

    fn mlp(&mut self, path: &str, mlp: &ExpertMlp, of: Of) {
        let ExpertMlp {
            intermediate_size: _,
            activation,
            gate_up_layout: _,
            orientation: _,
            gate_up_bias,
            down_bias,
            format: _,
            activation_quant,
        } = mlp;
        self.activation(&format!("{path}.activation"), *activation, of);
        let edit = move |spec: &mut MoeSpec, edit: fn(&mut ExpertMlp)| {
            if let Some(mlp) = of(spec) {
                edit(mlp);
            }
        };
        self.flag(&format!("{path}.gate_up_bias"), "gate_up_proj_bias", *gate_up_bias, |spec| {
            edit(spec, |mlp| mlp.gate_up_bias = false);
        });
        self.flag(&format!("{path}.down_bias"), "down_proj_bias", *down_bias, |spec| {
            edit(spec, |mlp| mlp.down_bias = false);
        });
        let variant = match activation_quant {
            ActivationQuant::None => None,
            ActivationQuant::Dynamic { code: _, span: _, rule: _, scale: _ } => Some("Dynamic"),
            ActivationQuant::Static { code: _ } => Some("Static"),
        };
        if let Some(variant) = variant {
            let (field, key) = (format!("{path}.activation_quant.{variant}"), "activation_quant");
            self.add(field, key, activation_quant, "rows were not quantised", |spec| {
                edit(spec, |mlp| mlp.activation_quant = ActivationQuant::None);
            });
        }
    }

    fn activation(&mut self, path: &str, activation: Activation, of: Of) {
        let mut add = |field: &str, key, value: &dyn Debug, instead, left: Activation| {
            self.add(format!("{path}.{field}"), key, value, instead, |spec| {
                if let Some(mlp) = of(spec) {
                    mlp.activation = left;
                }
            });
        };
        let plain = Activation::Swiglu { limit: None };
        match activation {
            Activation::Swiglu { limit } => {
                if let Some(limit) = limit {
                    add("Swiglu.limit", "swiglu_limit", &limit, "there were no limit", plain);
                }
            }
            Activation::SwigluClampAfter { limit } => {
                add("SwigluClampAfter.limit", "swiglu_limit", &limit, "there were no limit", plain);
            }
            Activation::SwigluOai { alpha, limit, beta } => {
                let oai = |alpha, limit, beta| Activation::SwigluOai { alpha, limit, beta };
                let standard = Activation::Swiglu { limit };
                if (alpha, beta) != (1.0, 0.0) {
                    add("SwigluOai", "hidden_act", &activation, "alpha were 1 and beta 0", standard);
                }
                if alpha != 1.0 {
                    add("SwigluOai.alpha", "swiglu_alpha", &alpha, "it were 1", oai(1.0, limit, beta));
                }
                if let Some(limit) = limit {
                    add("SwigluOai.limit", "swiglu_limit", &limit, "there were no limit", oai(alpha, None, beta));
                }
                if beta != 0.0 {
                    add("SwigluOai.beta", "swiglu_beta", &beta, "it were 0", oai(alpha, limit, 0.0));
                }
            }
            Activation::Situ { beta: _, linear_beta: _ } => {
                add("Situ", "hidden_act", &activation, "gate and up had no bounds", plain);
            }
            Activation::GeluTanh => {
                add("GeluTanh", "hidden_act", &activation, "it were the GELU of erf", Activation::GeluErf);
            }
            Activation::GeluErf => {
                add("GeluErf", "hidden_act", &activation, "it were the GELU of tanh", Activation::GeluTanh);
            }
            // The only one without a gate: no other fits its weights.
            Activation::Relu2 => {}
        }
    }

    fn shared(&mut self, shared: Option<&SharedExperts>) {
        let Some(SharedExperts { mlp, gate, combination }) = shared else { return };
        match gate {
            // The method that makes its shares goes with it.
            SharedGate::Joint => {}
            SharedGate::None | SharedGate::Sigmoid { format: _ } => {
                let value = format_args!("an MLP of width {}", mlp.intermediate_size);
                self.add("shared", "shared_experts", &value, "there were none", |spec| {
                    spec.shared = None;
                });
            }
        }
        self.mlp("shared.mlp", mlp, |spec| {
            spec.shared.as_mut().map(|SharedExperts { mlp, gate: _, combination: _ }| mlp)
        });
        match gate {
            SharedGate::None | SharedGate::Joint => {}
            SharedGate::Sigmoid { format: _ } => {
                let instead = "the shared expert had no gate";
                self.add("shared.gate.Sigmoid", "shared_expert_gate", gate, instead, |spec| {
                    if let Some(shared) = &mut spec.shared {
                        shared.gate = SharedGate::None;
                    }
                });
            }
        }
        match combination {
            SharedCombination::Sum => {}
            SharedCombination::Average => {
                let (key, instead) = ("shared_expert_combination_strategy", "routed and shared were summed");
                self.add("shared.combination.Average", key, combination, instead, |spec| {
                    if let Some(shared) = &mut spec.shared {
                        shared.combination = SharedCombination::Sum;
                    }
                });
            }
        }
    }

    fn latent_norm(&mut self, norm: &LatentNorm) {
        let variant = match norm {
            LatentNorm::None => return,
            LatentNorm::Reduced { eps: _ } => "Reduced",
            LatentNorm::PreAndPost { pre_eps: _, post_eps: _ } => "PreAndPost",
        };
        self.add(format!("latent.norm.{variant}"), "latent_norm", norm, "nothing were normed there", |spec| {
            if let Some(latent) = &mut spec.latent {
                latent.norm = LatentNorm::None;
            }
        });
    }

    /// No family has a rounding; a host that asks for an engine's bits has.
    fn precision(&mut self, precision: &Precision) {
        let Precision {
            input: _,
            output: _,
            model: _,
            router_gemm,
            routing_weights,
            weighted_input,
            gate_up,
            activation,
            combine,
            combine_order,
            // Refused but for one value.
            block_scale: _,
        } = precision;
        let unrounded = "it stayed f32";
        type Drop = fn(&mut Precision);
        let steps: [(&str, &Rounding, Drop); 4] = [
            ("router_gemm", router_gemm, |precision| precision.router_gemm = Rounding::F32),
            ("routing_weights", routing_weights, |precision| precision.routing_weights = Rounding::F32),
            ("weighted_input", weighted_input, |precision| precision.weighted_input = Rounding::F32),
            ("gate_up", gate_up, |precision| precision.gate_up = Rounding::F32),
        ];
        for (name, rounding, drop) in steps {
            match rounding {
                Rounding::F32 => {}
                Rounding::Model => {
                    let field = format!("precision.{name}.Model");
                    self.add(field, name, rounding, unrounded, |spec| drop(&mut spec.precision));
                }
            }
        }
        let variant = match activation {
            ActivationRounding::F32 => None,
            ActivationRounding::Fused => Some("Fused"),
            ActivationRounding::Torch => Some("Torch"),
        };
        if let Some(variant) = variant {
            self.add(format!("precision.activation.{variant}"), "activation", activation, unrounded, |spec| {
                spec.precision.activation = ActivationRounding::F32;
            });
        }
        let variant = match combine {
            CombineRounding::F32 => None,
            CombineRounding::WeightedRows => Some("WeightedRows"),
            CombineRounding::EveryStep => Some("EveryStep"),
        };
        if let Some(variant) = variant {
            self.add(format!("precision.combine.{variant}"), "combine", combine, unrounded, |spec| {
                spec.precision.combine = CombineRounding::F32;
            });
        }
        match combine_order {
            CombineOrder::Slot => {}
            CombineOrder::Expert => {
                let instead = "slots were summed as selected";
                self.add("precision.combine_order.Expert", "combine_order", combine_order, instead, |spec| {
                    spec.precision.combine_order = CombineOrder::Slot;
                });
            }
        }
    }
}

fn linear(spec: &mut MoeSpec) -> Option<(&mut RouterInput, &mut bool)> {
    match &mut spec.router {
        Router::Linear { input, format: _, bias, transform: _ } => Some((input, bias)),
        Router::Mlp { state_size: _, rms_norm_eps: _, previous_state: _, format: _ }
        | Router::Given { transform: _ } => None,
    }
}
