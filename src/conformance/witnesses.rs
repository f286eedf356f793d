//! For each field of the spec two layers that differ in it, and in nothing else unless the rules of the spec tie
//! another field to it.
//!
//! One line a field, in the order of the spec. A type that stands in several places (formats, activations, ...)
//! has one list, which each place calls: an engine may heed a field in one place and drop it in another.
//! A long file: the list is long.

use super::sample::deepseek_like;
use crate::spec::{
    Activation, ActivationCode, ActivationQuant, ActivationRounding, ActivationScale, BlockScale, ChosenScore,
    CombineOrder, CombineRounding, CommonTerms, Denominator, Entry, ExpertInput, ExpertMlp, FloatType, GateUpLayout,
    GroupScore, Groups, Latent, LatentNorm, LogitTransform, Lora, LoraDelta, MoeSpec, NanPolicy, Orientation,
    OutputNorm, Placement, Rounding, Router, RouterInput, RoutingMethod, ScaleFormat, ScaleRule, ScaleSpan, Score,
    SelectionKey, SharedCombination, SharedExperts, SharedGate, TensorShard, WeightFormat, WeightPosition,
    ZeroExpertKind, ZeroExperts,
};

/// Two specs that differ in a field, and rows for which that shows.
#[derive(Debug, Clone, PartialEq)]
pub struct Witness {
    /// Path of the field, as the [`vocabulary`](super::vocabulary::vocabulary) has it.
    pub field: String,
    /// Without the field, or with another value of it. Where sizes differ this one is the smaller.
    pub neutral: MoeSpec,
    /// With the field.
    pub spec: MoeSpec,
    /// What is not as usual about it.
    pub special: Special,
    /// What the field does to the layer's result.
    pub effect: Effect,
}

/// What a field does to the result of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    /// Another value of it is another result.
    Moves,
    /// It says how the same numbers are stored. Who reads them otherwise gets others.
    Reads,
    /// Nothing, whatever its value, and why.
    Nothing(&'static str),
}

/// What is special about a witness; else its rows and weights are random.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Special {
    /// Nothing.
    No,
    /// Rows so small that the floors of scales act.
    SmallRows,
    /// Given logits, of which every second row has fewer numbers than experts are chosen.
    SpoiledLogits,
    /// The experts once more behind ids and weights of the caller's, as engines call it that route for
    /// themselves.
    Seam,
    /// Slots of one expert have other weights, so that it shows which of them a token takes.
    UnequalReplicas,
}

impl Witness {
    /// The change in words: the first difference of the two specs, as Rust prints them.
    pub fn name(&self) -> String {
        let texts = [&self.neutral, &self.spec].map(|spec| format!("{spec:?}"));
        let [a, b] = texts.each_ref().map(|text| pieces(text));
        let first = a.iter().zip(&b).take_while(|(a, b)| a == b).count();
        let common = |(a, b): &(&&str, &&str)| a == b;
        let most = a.len().min(b.len()) - first;
        let last = a.iter().rev().zip(b.iter().rev()).take(most).take_while(common).count();
        let [a, b] = [a, b].map(|pieces| shortened(&pieces[first..pieces.len() - last].concat()));
        format!("{a} to {b}")
    }
}

/// Words, and what stands between them.
fn pieces(text: &str) -> Vec<&str> {
    let mut pieces = vec![];
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let word = |c: char| c.is_alphanumeric() || c == '_' || c == '.' || c == '-';
        let end = if word(first) { rest.find(|c| !word(c)).unwrap_or(rest.len()) } else { first.len_utf8() };
        let (piece, behind) = rest.split_at(end);
        pieces.push(piece);
        rest = behind;
    }
    pieces
}

fn shortened(text: &str) -> String {
    const LONGEST: usize = 44;
    let text = text.trim_matches([' ', ',']);
    match text.char_indices().nth(LONGEST) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None if text.is_empty() => "nothing".into(),
        None => text.into(),
    }
}

/// Every witness.
pub fn witnesses() -> Vec<Witness> {
    let mut list = List(vec![]);
    list.sizes();
    list.router();
    list.method();
    list.routing();
    list.mlp(Place { path: "experts", set: |spec, mlp| spec.experts = mlp, of: |spec| spec.experts.clone() });
    list.shared();
    list.latent();
    list.lora();
    list.devices();
    list.precision();
    list.0
}

fn effect(field: &str) -> Effect {
    if field.contains(".gate_up_layout.") || field.contains(".orientation.") {
        Effect::Reads
    } else if field == "shared.gate.Sigmoid.format.Fp8Block.block.0" {
        Effect::Nothing("a matrix of one row is one block of rows, whatever its height")
    } else {
        Effect::Moves
    }
}

/// Every parameter away from its neutral value, and a model type whose roundings show.
fn base() -> MoeSpec {
    let mut spec = deepseek_like();
    spec.precision.model = FloatType::Bf16;
    spec
}

/// Where an MLP stands.
#[derive(Clone, Copy)]
struct Place {
    path: &'static str,
    set: fn(&mut MoeSpec, ExpertMlp),
    of: fn(&MoeSpec) -> ExpertMlp,
}

impl Place {
    fn edit(self, spec: &mut MoeSpec, edit: impl FnOnce(&mut ExpertMlp)) {
        let mut mlp = (self.of)(spec);
        edit(&mut mlp);
        (self.set)(spec, mlp);
    }
}

struct List(Vec<Witness>);

impl List {
    /// `before` makes the neutral spec from [`base`], `change` the other one from that.
    fn of(&mut self, field: &str, before: impl FnOnce(&mut MoeSpec), change: impl FnOnce(&mut MoeSpec)) {
        self.with(field, Special::No, before, change);
    }

    fn with(
        &mut self,
        field: &str,
        special: Special,
        before: impl FnOnce(&mut MoeSpec),
        change: impl FnOnce(&mut MoeSpec),
    ) {
        let mut neutral = base();
        before(&mut neutral);
        let mut spec = neutral.clone();
        change(&mut spec);
        self.0.push(Witness { field: field.into(), neutral, spec, special, effect: effect(field) });
    }

    /// A value for each of the two specs.
    fn pair<T>(&mut self, field: &str, set: impl Fn(&mut MoeSpec, T), neutral: T, value: T) {
        self.of(field, |spec| set(spec, neutral), |spec| set(spec, value));
    }

    fn sizes(&mut self) {
        self.pair("hidden_size", |spec, size| spec.hidden_size = size, 32, 40);
        self.pair("num_experts", |spec, count| spec.num_experts = count, 8, 12);
        self.pair("top_k", |spec, top_k| spec.top_k = top_k, 2, 3);
    }

    fn router(&mut self) {
        let format = WeightFormat::Bf16;
        let linear = |input, bias, transform| Router::Linear { input, format, bias, transform };
        let plain = linear(RouterInput::Hidden, false, LogitTransform::None);
        let mlp =
            |state_size, rms_norm_eps, previous_state| Router::Mlp { state_size, rms_norm_eps, previous_state, format };
        let small = mlp(10, 1e-5, true);
        let given = |transform| Router::Given { transform };
        let set = |spec: &mut MoeSpec, router: Router| spec.router = router;
        self.pair("router.Linear", set, small.clone(), plain.clone());
        let input = |input| linear(input, false, LogitTransform::None);
        let normed = |eps| input(RouterInput::RmsNormScaled { eps });
        self.pair("router.Linear.input.Hidden", set, normed(1e-6), plain.clone());
        self.pair("router.Linear.input.RmsNormScaled", set, plain.clone(), normed(1e-6));
        self.pair("router.Linear.input.RmsNormScaled.eps", set, normed(1e-6), normed(3.0));
        self.formats(
            "router.Linear.format",
            |spec, size| spec.hidden_size = size,
            |spec, format| {
                let (input, transform) = (RouterInput::Hidden, LogitTransform::None);
                spec.router = Router::Linear { input, format, bias: false, transform };
            },
        );
        let biased = linear(RouterInput::Hidden, true, LogitTransform::None);
        self.pair("router.Linear.bias", set, plain.clone(), biased);
        self.transforms("router.Linear.transform", |spec, transform| {
            let input = RouterInput::Hidden;
            spec.router = Router::Linear { input, format: WeightFormat::Bf16, bias: false, transform };
        });
        self.pair("router.Mlp", set, plain.clone(), small.clone());
        self.pair("router.Mlp.state_size", set, mlp(6, 1e-5, true), small.clone());
        self.pair("router.Mlp.rms_norm_eps", set, small.clone(), mlp(10, 2.0, true));
        self.pair("router.Mlp.previous_state", set, mlp(10, 1e-5, false), small);
        self.formats(
            "router.Mlp.format",
            |spec, size| spec.hidden_size = size,
            |spec, format| {
                let state_size = spec.hidden_size;
                spec.router = Router::Mlp { state_size, rms_norm_eps: 1e-5, previous_state: true, format };
            },
        );
        self.pair("router.Given", set, plain, given(LogitTransform::None));
        self.transforms("router.Given.transform", |spec, transform| spec.router = Router::Given { transform });
    }

    fn transforms(&mut self, path: &str, set: fn(&mut MoeSpec, LogitTransform)) {
        let (none, cap) = (LogitTransform::None, |cap| LogitTransform::SoftCap { cap });
        let multiply = |factor| LogitTransform::Multiply { factor };
        self.pair(&format!("{path}.None"), set, cap(1.0), none);
        self.pair(&format!("{path}.SoftCap"), set, none, cap(1.0));
        self.pair(&format!("{path}.SoftCap.cap"), set, cap(1.0), cap(2.0));
        self.pair(&format!("{path}.Multiply"), set, none, multiply(0.25));
        self.pair(&format!("{path}.Multiply.factor"), set, multiply(0.25), multiply(0.5));
    }

    fn method(&mut self) {
        let set = |spec: &mut MoeSpec, method: RoutingMethod| spec.routing.method = method;
        let top_k = |score, key, groups| RoutingMethod::TopK { score, key, groups };
        let groups = |n_group, topk_group, score| Some(Groups { n_group, topk_group, score });
        let (biased, sum_of_key) = (SelectionKey::ScorePlusBias, GroupScore::Top2SumOfKey);
        let grouped = |groups| top_k(Score::Sigmoid, biased, groups);
        let chosen = |score| RoutingMethod::TopKThenScore { score };
        let softmax = chosen(ChosenScore::Softmax);
        self.pair("routing.method.TopK", set, softmax.clone(), grouped(None));
        self.scores("routing.method.TopK.score", |spec, score| {
            spec.routing.method = RoutingMethod::TopK { score, key: SelectionKey::ScorePlusBias, groups: None };
        });
        for (variant, key, other) in [
            ("Score", SelectionKey::Score, biased),
            ("ScorePlusBias", biased, SelectionKey::Score),
            ("LogitPlusBias", SelectionKey::LogitPlusBias, biased),
        ] {
            let method = |key| top_k(Score::Sigmoid, key, None);
            self.pair(&format!("routing.method.TopK.key.{variant}"), set, method(other), method(key));
        }
        let path = "routing.method.TopK.groups";
        self.pair(path, set, grouped(None), grouped(groups(4, 2, sum_of_key)));
        self.pair(
            &format!("{path}.n_group"),
            set,
            grouped(groups(4, 2, sum_of_key)),
            grouped(groups(6, 2, sum_of_key)),
        );
        let fewer = grouped(groups(4, 1, sum_of_key));
        self.pair(&format!("{path}.topk_group"), set, fewer, grouped(groups(4, 2, sum_of_key)));
        for (variant, score, other) in [
            ("Top2SumOfKey", sum_of_key, GroupScore::Top2SumOfScore),
            ("MaxOfScore", GroupScore::MaxOfScore, GroupScore::Top2SumOfScore),
            ("Top2SumOfScore", GroupScore::Top2SumOfScore, sum_of_key),
        ] {
            let method = |score| grouped(groups(4, 1, score));
            self.pair(&format!("{path}.score.{variant}"), set, method(other), method(score));
        }
        let path = "routing.method.TopKThenScore";
        // Renormalised, a softmax of all is one of the chosen, and weights of one sum are the same.
        let raw = |spec: &mut MoeSpec, method| {
            spec.routing.renormalize = None;
            spec.routing.method = method;
        };
        self.pair(path, raw, top_k(Score::Softmax, SelectionKey::Score, None), softmax.clone());
        let alone = |spec: &mut MoeSpec, score| {
            spec.routing.renormalize = None;
            spec.routing.method = RoutingMethod::TopKThenScore { score };
        };
        self.pair(&format!("{path}.score.Softmax"), alone, ChosenScore::Sigmoid, ChosenScore::Softmax);
        self.pair(&format!("{path}.score.Sigmoid"), alone, ChosenScore::Softmax, ChosenScore::Sigmoid);
        let hash = |vocab_size| RoutingMethod::Hash { score: Score::Sigmoid, vocab_size };
        self.pair("routing.method.Hash", set, top_k(Score::Sigmoid, SelectionKey::Score, None), hash(50));
        self.scores("routing.method.Hash.score", |spec, score| {
            spec.routing.method = RoutingMethod::Hash { score, vocab_size: 50 };
        });
        self.pair("routing.method.Hash.vocab_size", set, hash(10), hash(50));
        // The shares of joint normalisation have to be taken: the shared gate changes with the method.
        self.of("routing.method.JointNorm", |spec| spec.routing.renormalize = None, |spec| joint(spec, 2, true));
        let path = "routing.method.JointNorm";
        self.pair(&format!("{path}.num_shared"), |spec, count| joint(spec, count, true), 1, 2);
        self.pair(&format!("{path}.global_scale"), |spec, scale| joint(spec, 2, scale), false, true);
        let sparsemixer = |spec: &mut MoeSpec, router_jitter_noise| {
            spec.top_k = 2;
            spec.routing.method = RoutingMethod::Sparsemixer { router_jitter_noise };
        };
        self.of(
            "routing.method.Sparsemixer",
            |spec| {
                spec.top_k = 2;
                spec.routing.method = softmax;
            },
            |spec| sparsemixer(spec, 0.01),
        );
        self.pair("routing.method.Sparsemixer.router_jitter_noise", sparsemixer, 0.01, 0.3);
    }

    fn scores(&mut self, path: &str, set: fn(&mut MoeSpec, Score)) {
        for (variant, score, other) in [
            ("Softmax", Score::Softmax, Score::Sigmoid),
            ("Sigmoid", Score::Sigmoid, Score::Softmax),
            ("SqrtSoftplus", Score::SqrtSoftplus, Score::Sigmoid),
            ("Identity", Score::Identity, Score::SqrtSoftplus),
        ] {
            // Two scores may differ by a factor only.
            let raw = |spec: &mut MoeSpec, score| {
                spec.routing.renormalize = None;
                set(spec, score);
            };
            self.pair(&format!("{path}.{variant}"), raw, other, score);
        }
    }

    fn routing(&mut self) {
        let renormalize = |spec: &mut MoeSpec, rule| spec.routing.renormalize = rule;
        let (sum, plus) = (Some(Denominator::Sum), |eps| Some(Denominator::SumPlus { eps }));
        let (at_least, norm) = (|floor| Some(Denominator::AtLeast { floor }), |p| Some(Denominator::PNorm { p }));
        let path = "routing.renormalize";
        self.pair(path, renormalize, None, sum);
        self.pair(&format!("{path}.Sum"), renormalize, plus(0.5), sum);
        self.pair(&format!("{path}.SumPlus"), renormalize, sum, plus(0.5));
        self.pair(&format!("{path}.SumPlus.eps"), renormalize, plus(1e-20), plus(0.5));
        self.pair(&format!("{path}.AtLeast"), renormalize, sum, at_least(5.0));
        self.pair(&format!("{path}.AtLeast.floor"), renormalize, at_least(0.7), at_least(5.0));
        // A sum of plain logits may be negative, and then is not divided by.
        let signed = |spec: &mut MoeSpec, rule| {
            let (score, key) = (Score::Identity, SelectionKey::LogitPlusBias);
            spec.routing.method = RoutingMethod::TopK { score, key, groups: None };
            spec.top_k = spec.num_experts;
            let (input, format) = (RouterInput::Hidden, WeightFormat::Bf16);
            let transform = LogitTransform::Multiply { factor: -1.0 };
            spec.router = Router::Linear { input, format, bias: false, transform };
            spec.routing.renormalize = rule;
        };
        self.pair(&format!("{path}.SumOrOne"), signed, sum, Some(Denominator::SumOrOne));
        self.pair(&format!("{path}.PNorm"), renormalize, sum, norm(2.0));
        self.pair(&format!("{path}.PNorm.p"), renormalize, norm(1.0), norm(2.0));
        let rho = |spec: &mut MoeSpec, rho| spec.routing.routed_scaling_factor = rho;
        self.pair("routing.routed_scaling_factor", rho, 1.0, 2.5);
        let on_output = |spec: &mut MoeSpec, applies| spec.routing.apply_routed_scale_to_output = applies;
        self.pair("routing.apply_routed_scale_to_output", on_output, false, true);
        self.pair("routing.per_expert_scale", |spec, scale| spec.routing.per_expert_scale = scale, false, true);
        for (variant, position, other) in [
            ("Output", WeightPosition::Output, WeightPosition::Input),
            ("Input", WeightPosition::Input, WeightPosition::Output),
            ("BeforeDown", WeightPosition::BeforeDown, WeightPosition::Output),
        ] {
            let set = |spec: &mut MoeSpec, position| {
                // Without a bias behind it, a factor before the down projection is one on its output.
                spec.experts.down_bias = true;
                spec.routing.weight_position = position;
            };
            self.pair(&format!("routing.weight_position.{variant}"), set, other, position);
        }
        let zero = |spec: &mut MoeSpec, zero| spec.routing.zero_experts = zero;
        let (identity, skip) = (ZeroExpertKind::Identity, ZeroExpertKind::Skip);
        let some = |count, kind| Some(ZeroExperts { count, kind });
        let path = "routing.zero_experts";
        self.pair(path, zero, None, some(4, identity));
        self.pair(&format!("{path}.count"), zero, some(4, identity), some(20, identity));
        // What is skipped has no weight, but from a caller it may have one.
        for (variant, kind, other) in [("Identity", identity, skip), ("Skip", skip, identity)] {
            let field = format!("{path}.kind.{variant}");
            self.with(&field, Special::Seam, |spec| zero(spec, some(4, other)), |spec| zero(spec, some(4, kind)));
        }
        for (variant, policy, other) in
            [("Zero", NanPolicy::Zero, NanPolicy::Propagate), ("Propagate", NanPolicy::Propagate, NanPolicy::Zero)]
        {
            let set = |spec: &mut MoeSpec, policy| {
                spec.router = Router::Given { transform: LogitTransform::None };
                let (score, key) = (Score::Sigmoid, SelectionKey::Score);
                spec.routing.method = RoutingMethod::TopK { score, key, groups: None };
                spec.routing.nan_policy = policy;
            };
            let field = format!("routing.nan_policy.{variant}");
            self.with(&field, Special::SpoiledLogits, |spec| set(spec, other), |spec| set(spec, policy));
        }
    }

    fn mlp(&mut self, place: Place) {
        let Place { path, set: _, of: _ } = place;
        let at = |field: &str| format!("{path}.{field}");
        let size = |spec: &mut MoeSpec, size| place.edit(spec, |mlp| mlp.intermediate_size = size);
        self.pair(&at("intermediate_size"), size, 16, 24);
        let activation = |spec: &mut MoeSpec, activation| place.edit(spec, |mlp| mlp.activation = activation);
        let swiglu = |limit| Activation::Swiglu { limit };
        let after = |limit| Activation::SwigluClampAfter { limit };
        let oai = |alpha, limit, beta| Activation::SwigluOai { alpha, limit, beta };
        let situ = |beta, linear_beta| Activation::Situ { beta, linear_beta };
        let (tanh, erf) = (Activation::GeluTanh, Activation::GeluErf);
        for (field, neutral, value) in [
            ("Swiglu", erf, swiglu(None)),
            ("Swiglu.limit", swiglu(None), swiglu(Some(0.5))),
            ("SwigluClampAfter", swiglu(Some(0.75)), after(0.75)),
            ("SwigluClampAfter.limit", after(0.3), after(0.75)),
            ("SwigluOai", swiglu(Some(0.75)), oai(1.702, Some(0.75), 1.0)),
            ("SwigluOai.alpha", oai(1.0, Some(0.75), 1.0), oai(1.702, Some(0.75), 1.0)),
            ("SwigluOai.limit", oai(1.702, None, 1.0), oai(1.702, Some(0.75), 1.0)),
            ("SwigluOai.beta", oai(1.702, Some(0.75), 0.0), oai(1.702, Some(0.75), 1.0)),
            ("Situ", tanh, situ(4.0, 25.0)),
            ("Situ.beta", situ(4.0, 25.0), situ(1.0, 25.0)),
            ("Situ.linear_beta", situ(4.0, 25.0), situ(4.0, 1.0)),
            ("GeluTanh", erf, tanh),
            ("GeluErf", tanh, erf),
            ("Relu2", swiglu(None), Activation::Relu2),
        ] {
            self.pair(&at(&format!("activation.{field}")), activation, neutral, value);
        }
        let layout = |spec: &mut MoeSpec, layout| place.edit(spec, |mlp| mlp.gate_up_layout = layout);
        let (separate, halves) = (GateUpLayout::Separate, GateUpLayout::Halves);
        self.pair(&at("gate_up_layout.Separate"), layout, halves, separate);
        self.pair(&at("gate_up_layout.Halves"), layout, GateUpLayout::Interleaved, halves);
        self.pair(&at("gate_up_layout.Interleaved"), layout, halves, GateUpLayout::Interleaved);
        // Square matrices, whose shapes say nothing.
        let orientation = |spec: &mut MoeSpec, orientation| {
            let size = spec.hidden_size;
            place.edit(spec, |mlp| {
                mlp.intermediate_size = size;
                mlp.orientation = orientation;
            });
        };
        self.pair(&at("orientation.OutIn"), orientation, Orientation::InOut, Orientation::OutIn);
        self.pair(&at("orientation.InOut"), orientation, Orientation::OutIn, Orientation::InOut);
        let gate_up_bias = |spec: &mut MoeSpec, bias| place.edit(spec, |mlp| mlp.gate_up_bias = bias);
        self.pair(&at("gate_up_bias"), gate_up_bias, false, true);
        let down_bias = |spec: &mut MoeSpec, bias| place.edit(spec, |mlp| mlp.down_bias = bias);
        self.pair(&at("down_bias"), down_bias, false, true);
        self.formats(
            &at("format"),
            |spec, size| {
                spec.hidden_size = size;
                place.edit(spec, |mlp| mlp.intermediate_size = size);
            },
            |spec, format| place.edit(spec, |mlp| mlp.format = format),
        );
        self.quantised_rows(place);
    }

    fn quantised_rows(&mut self, place: Place) {
        let at = |field: &str| format!("{}.activation_quant.{field}", place.path);
        let set = |spec: &mut MoeSpec, quant| {
            spec.hidden_size = 64;
            place.edit(spec, |mlp| {
                mlp.intermediate_size = 64;
                // Bounded, all groups would have the same largest value.
                mlp.activation = Activation::Swiglu { limit: None };
                mlp.activation_quant = quant;
            });
        };
        let (e4m3, int8) = (ActivationCode::E4m3, ActivationCode::Int8);
        let (group, f32_scale) = (ScaleSpan::Group, ActivationScale::F32);
        let dynamic = |code, span, rule, scale| ActivationQuant::Dynamic { code, span, rule, scale };
        let by_group = |columns| dynamic(e4m3, group(columns), ScaleRule::FlooredAmax, f32_scale);
        let fixed = |code| ActivationQuant::Static { code };
        let none = ActivationQuant::None;
        self.pair(&at("None"), set, by_group(32), none);
        self.pair(&at("Dynamic"), set, none, by_group(32));
        let code = |code| dynamic(code, group(32), ScaleRule::FlooredAmax, f32_scale);
        self.pair(&at("Dynamic.code.E4m3"), set, code(int8), code(e4m3));
        self.pair(&at("Dynamic.code.Int8"), set, code(e4m3), code(int8));
        let span = |span| dynamic(e4m3, span, ScaleRule::FlooredAmax, f32_scale);
        self.pair(&at("Dynamic.span.Group"), set, span(ScaleSpan::Token), span(group(32)));
        self.pair(&at("Dynamic.span.Group.0"), set, span(group(64)), span(group(32)));
        self.pair(&at("Dynamic.span.Token"), set, span(group(32)), span(ScaleSpan::Token));
        self.pair(&at("Dynamic.span.Tensor"), set, span(ScaleSpan::Token), span(ScaleSpan::Tensor));
        // With this activation what enters the second GEMM is as small as what enters the first, not as its square.
        let linear = |spec: &mut MoeSpec, beta| {
            let activation = Activation::SwigluOai { alpha: 1.0, limit: None, beta };
            place.edit(spec, |mlp| mlp.activation = activation);
        };
        // Floors differ most between the rules.
        let small = |spec: &mut MoeSpec, rule| {
            set(spec, dynamic(e4m3, group(32), rule, f32_scale));
            linear(spec, 1.0);
        };
        let bounded = |upper| ScaleRule::FlooredScale { upper };
        for (variant, neutral, rule) in [
            ("FlooredAmax", bounded(None), ScaleRule::FlooredAmax),
            ("FlooredAmaxTimesReciprocal", ScaleRule::ReciprocalScale, ScaleRule::FlooredAmaxTimesReciprocal),
            ("FlooredScale", ScaleRule::FlooredAmax, bounded(None)),
            ("ReciprocalScale", ScaleRule::FlooredAmax, ScaleRule::ReciprocalScale),
            ("ReciprocalAmax", ScaleRule::FlooredAmax, ScaleRule::ReciprocalAmax),
        ] {
            let field = at(&format!("Dynamic.rule.{variant}"));
            self.with(&field, Special::SmallRows, |spec| small(spec, neutral), |spec| small(spec, rule));
        }
        let upper = |spec: &mut MoeSpec, upper| {
            set(spec, dynamic(e4m3, group(32), bounded(upper), f32_scale));
            linear(spec, 4.0);
        };
        self.pair(&at("Dynamic.rule.FlooredScale.upper"), upper, None, Some(1e-4));
        let scale = |scale| dynamic(e4m3, group(32), ScaleRule::FlooredAmax, scale);
        self.pair(&at("Dynamic.scale.F32"), set, scale(ActivationScale::F32CeilPow2), scale(f32_scale));
        self.pair(&at("Dynamic.scale.F32CeilPow2"), set, scale(f32_scale), scale(ActivationScale::F32CeilPow2));
        self.pair(&at("Dynamic.scale.Ue8m0Packed"), set, scale(f32_scale), scale(ActivationScale::Ue8m0Packed));
        self.pair(&at("Static"), set, none, fixed(e4m3));
        self.pair(&at("Static.code.E4m3"), set, fixed(int8), fixed(e4m3));
        self.pair(&at("Static.code.Int8"), set, fixed(e4m3), fixed(int8));
    }

    /// `size` makes the matrices so wide that blocks fill their rows, `set` gives them a format.
    fn formats(&mut self, path: &str, size: impl Fn(&mut MoeSpec, usize), set: impl Fn(&mut MoeSpec, WeightFormat)) {
        let block = |block, scale| WeightFormat::Fp8Block { block, scale };
        let blocks = |scale| block([4, 32], scale);
        let int4 = |group, scale, zero_points, act_order| WeightFormat::Int4 { group, scale, zero_points, act_order };
        let groups = |scale| int4(Some(32), scale, false, false);
        let (f32_scale, f16_scale, bf16_scale) = (ScaleFormat::F32, ScaleFormat::F16, ScaleFormat::Bf16);
        let (bf16, e4m3, int8) = (WeightFormat::Bf16, WeightFormat::Fp8Channel, WeightFormat::Int8Channel);
        for (field, neutral, format) in [
            ("F32", bf16, WeightFormat::F32),
            ("F16", bf16, WeightFormat::F16),
            ("Bf16", WeightFormat::F16, bf16),
            ("Fp8Block", e4m3, blocks(f32_scale)),
            ("Fp8Block.block.0", block([8, 32], f32_scale), blocks(f32_scale)),
            ("Fp8Block.block.1", block([4, 64], f32_scale), blocks(f32_scale)),
            ("Fp8Block.scale.F32", blocks(bf16_scale), blocks(f32_scale)),
            ("Fp8Block.scale.F16", blocks(bf16_scale), blocks(f16_scale)),
            ("Fp8Block.scale.Bf16", blocks(f16_scale), blocks(bf16_scale)),
            ("Fp8Block.scale.E8m0", blocks(bf16_scale), blocks(ScaleFormat::E8m0)),
            // A scale of the matrix is one of each row; what differs is the code.
            ("Fp8Tensor", int8, WeightFormat::Fp8Tensor),
            ("Fp8Channel", int8, e4m3),
            ("Int8Channel", e4m3, int8),
            ("Mxfp4", WeightFormat::Nvfp4, WeightFormat::Mxfp4),
            ("Nvfp4", WeightFormat::Mxfp4, WeightFormat::Nvfp4),
            ("Int4", WeightFormat::Mxfp4, groups(f16_scale)),
            ("Int4.group", int4(Some(64), f16_scale, false, false), groups(f16_scale)),
            ("Int4.scale.F32", groups(f16_scale), groups(f32_scale)),
            ("Int4.scale.F16", groups(bf16_scale), groups(f16_scale)),
            ("Int4.scale.Bf16", groups(f16_scale), groups(bf16_scale)),
            ("Int4.scale.E8m0", groups(f16_scale), groups(ScaleFormat::E8m0)),
            ("Int4.zero_points", groups(f16_scale), int4(Some(32), f16_scale, true, false)),
            ("Int4.act_order", groups(f16_scale), int4(Some(32), f16_scale, false, true)),
            ("Q8_0", int8, WeightFormat::Q8_0),
            ("Q4K", WeightFormat::Q8_0, WeightFormat::Q4K),
            ("Q6K", WeightFormat::Q8_0, WeightFormat::Q6K),
        ] {
            let sized = |spec: &mut MoeSpec, format| {
                let wide = match format {
                    // Blocks of 256 columns: fewer rows make up for them.
                    WeightFormat::Q4K | WeightFormat::Q6K => true,
                    WeightFormat::F32
                    | WeightFormat::F16
                    | WeightFormat::Bf16
                    | WeightFormat::Fp8Block { block: _, scale: _ }
                    | WeightFormat::Fp8Tensor
                    | WeightFormat::Fp8Channel
                    | WeightFormat::Int8Channel
                    | WeightFormat::Mxfp4
                    | WeightFormat::Nvfp4
                    | WeightFormat::Int4 { group: _, scale: _, zero_points: _, act_order: _ }
                    | WeightFormat::Q8_0 => false,
                };
                size(spec, if wide { 256 } else { 64 });
                if wide {
                    (spec.num_experts, spec.top_k) = (4, 2);
                    let (score, key) = (Score::Sigmoid, SelectionKey::ScorePlusBias);
                    spec.routing.method = RoutingMethod::TopK { score, key, groups: None };
                }
            };
            self.of(
                &format!("{path}.{field}"),
                |spec| {
                    sized(spec, format);
                    set(spec, neutral);
                },
                |spec| set(spec, format),
            );
        }
    }

    fn shared(&mut self) {
        let set = |spec: &mut MoeSpec, shared| spec.shared = shared;
        let whole = base().shared;
        self.pair("shared", set, None, whole.clone());
        self.mlp(Place {
            path: "shared.mlp",
            set: |spec, mlp| {
                if let Some(SharedExperts { mlp: shared, gate: _, combination: _ }) = &mut spec.shared {
                    *shared = mlp;
                }
            },
            of: |spec| spec.shared.as_ref().map_or_else(|| spec.experts.clone(), |shared| shared.mlp.clone()),
        });
        let gate = |spec: &mut MoeSpec, gate: SharedGate| {
            if let Some(shared) = &mut spec.shared {
                shared.gate = gate;
            }
        };
        let sigmoid = |format| SharedGate::Sigmoid { format };
        self.pair("shared.gate.None", gate, sigmoid(WeightFormat::Bf16), SharedGate::None);
        self.pair("shared.gate.Sigmoid", gate, SharedGate::None, sigmoid(WeightFormat::Bf16));
        self.formats(
            "shared.gate.Sigmoid.format",
            |spec, size| spec.hidden_size = size,
            |spec, format| gate(spec, sigmoid(format)),
        );
        // The gate of shares goes with the method that makes them.
        self.of("shared.gate.Joint", |spec| spec.routing.renormalize = None, |spec| joint(spec, 1, false));
        let combination = |spec: &mut MoeSpec, combination: SharedCombination| {
            if let Some(shared) = &mut spec.shared {
                shared.combination = combination;
            }
        };
        let (sum, average) = (SharedCombination::Sum, SharedCombination::Average);
        self.pair("shared.combination.Sum", combination, average, sum);
        self.pair("shared.combination.Average", combination, sum, average);
    }

    fn latent(&mut self) {
        let format = WeightFormat::Bf16;
        let set = |spec: &mut MoeSpec, latent| spec.latent = latent;
        let latent = |size, norm| Some(Latent { size, format, norm });
        let plain = latent(12, LatentNorm::None);
        self.pair("latent", set, None, plain.clone());
        self.pair("latent.size", set, latent(8, LatentNorm::None), plain.clone());
        self.formats(
            "latent.format",
            |spec, size| spec.hidden_size = size,
            |spec, format| {
                let size = spec.hidden_size;
                spec.latent = Some(Latent { size, format, norm: LatentNorm::None });
            },
        );
        let reduced = |eps| latent(12, LatentNorm::Reduced { eps });
        let both = |pre_eps, post_eps| latent(12, LatentNorm::PreAndPost { pre_eps, post_eps });
        self.pair("latent.norm.None", set, reduced(1e-5), plain.clone());
        self.pair("latent.norm.Reduced", set, plain.clone(), reduced(1e-5));
        self.pair("latent.norm.Reduced.eps", set, reduced(1e-5), reduced(0.5));
        self.pair("latent.norm.PreAndPost", set, plain, both(1e-5, 1e-5));
        self.pair("latent.norm.PreAndPost.pre_eps", set, both(1e-5, 1e-5), both(0.5, 1e-5));
        self.pair("latent.norm.PreAndPost.post_eps", set, both(1e-5, 1e-5), both(1e-5, 0.5));
    }

    fn lora(&mut self) {
        let bf16 = WeightFormat::Bf16;
        let set = |spec: &mut MoeSpec, lora| spec.lora = lora;
        let lora = |num_adapters, rank, format, delta| Some(Lora { num_adapters, rank, format, delta });
        let plain = lora(2, 4, bf16, LoraDelta::F32);
        self.pair("lora", set, None, plain.clone());
        let of = |count| lora(count, 4, bf16, LoraDelta::F32);
        self.pair("lora.num_adapters", set, of(1), of(4));
        self.pair("lora.rank", set, lora(2, 2, bf16, LoraDelta::F32), plain);
        self.formats("lora.format", |_, _| {}, |spec, format| spec.lora = lora(2, 4, format, LoraDelta::F32));
        let delta = |spec: &mut MoeSpec, delta| {
            unbounded(spec);
            spec.lora = lora(2, 4, bf16, delta);
        };
        self.pair("lora.delta.F32", delta, LoraDelta::Model, LoraDelta::F32);
        self.pair("lora.delta.Model", delta, LoraDelta::F32, LoraDelta::Model);
    }

    /// What enters, what leaves, and where experts are.
    fn devices(&mut self) {
        let input = |spec: &mut MoeSpec, input| spec.expert_input = input;
        self.pair("expert_input.Hidden", input, ExpertInput::Separate, ExpertInput::Hidden);
        self.pair("expert_input.Separate", input, ExpertInput::Hidden, ExpertInput::Separate);
        self.pair("output_bias", |spec, bias| spec.output_bias = bias, false, true);
        let norm = |spec: &mut MoeSpec, eps: Option<f32>| spec.output_norm = eps.map(|eps| OutputNorm { eps });
        self.pair("output_norm", norm, None, Some(1e-6));
        self.pair("output_norm.eps", norm, Some(1e-6), Some(1.0));
        self.placement();
        let shard = |spec: &mut MoeSpec, shard| {
            spec.experts.down_bias = true;
            spec.shard = shard;
        };
        let part = |first, size, owns_down_bias| TensorShard::Part { first, size, owns_down_bias };
        self.pair("shard.Whole", shard, part(0, 16, true), TensorShard::Whole);
        self.pair("shard.Part", shard, TensorShard::Whole, part(0, 16, true));
        self.pair("shard.Part.first", shard, part(0, 16, true), part(8, 16, true));
        self.pair("shard.Part.size", shard, part(0, 8, true), part(0, 16, true));
        self.pair("shard.Part.owns_down_bias", shard, part(0, 16, false), part(0, 16, true));
        let common = |spec: &mut MoeSpec, common_terms| {
            spec.placement = Placement::Range { first: 0, count: 6 };
            spec.output_bias = true;
            spec.routing.zero_experts = Some(ZeroExperts { count: 8, kind: ZeroExpertKind::Identity });
            spec.common_terms = common_terms;
        };
        self.pair("common_terms.Here", common, CommonTerms::Elsewhere, CommonTerms::Here);
        self.pair("common_terms.Elsewhere", common, CommonTerms::Here, CommonTerms::Elsewhere);
        let entry = |spec: &mut MoeSpec, entry| {
            spec.router = Router::Given { transform: LogitTransform::None };
            spec.shared = None;
            spec.entry = entry;
        };
        let batched = |capacity| Entry::Batched { capacity };
        self.pair("entry.TokenMajor", entry, batched(4), Entry::TokenMajor);
        self.pair("entry.Batched", entry, Entry::TokenMajor, batched(4));
        self.pair("entry.Batched.capacity", entry, batched(2), batched(4));
    }

    fn placement(&mut self) {
        let set = |spec: &mut MoeSpec, placement| spec.placement = placement;
        let range = |first, count| Placement::Range { first, count };
        self.pair("placement.All", set, range(0, 6), Placement::All);
        self.pair("placement.Range", set, Placement::All, range(3, 6));
        self.pair("placement.Range.first", set, range(0, 6), range(3, 6));
        self.pair("placement.Range.count", set, range(0, 2), range(0, 8));
        // The table has to be as long as experts and replicas ask, and to fill each slot: it changes with them.
        let map = |num_slots, replicas, slots| Placement::Map { num_slots, replicas, slots };
        let plain = map(7, 1, vec![0, 1, -1, 2, 3, -1, 4, 5, -1, 6, -2, -1]);
        self.pair("placement.Map", set, Placement::All, plain.clone());
        let fewer = map(6, 1, vec![0, 1, -1, 2, 3, -1, 4, 5, -1, -1, -2, -1]);
        self.pair("placement.Map.num_slots", set, fewer, plain.clone());
        let single = map(12, 1, (0..12).collect());
        let twice = map(24, 2, (0..12).flat_map(|expert| [expert, 12 + expert]).collect());
        let field = "placement.Map.replicas";
        self.with(field, Special::UnequalReplicas, |spec| set(spec, single), |spec| set(spec, twice));
        let exchanged = map(7, 1, vec![1, 0, -1, 2, 3, -1, 5, 4, -1, -2, 6, -1]);
        self.pair("placement.Map.slots", set, exchanged, plain);
    }

    fn precision(&mut self) {
        let (f32_type, f16, bf16) = (FloatType::F32, FloatType::F16, FloatType::Bf16);
        let types = [("F32", f32_type, bf16), ("F16", f16, bf16), ("Bf16", bf16, f16)];
        for (variant, float_type, other) in types {
            let input = |spec: &mut MoeSpec, input| spec.precision.input = input;
            self.pair(&format!("precision.input.{variant}"), input, other, float_type);
            let output = |spec: &mut MoeSpec, output| spec.precision.output = output;
            self.pair(&format!("precision.output.{variant}"), output, other, float_type);
            // Every step rounds, so that each that has the type acts by it.
            let model = |spec: &mut MoeSpec, model| {
                spec.routing.weight_position = WeightPosition::Input;
                spec.precision.model = model;
                spec.precision.router_gemm = Rounding::Model;
                spec.precision.routing_weights = Rounding::Model;
                spec.precision.weighted_input = Rounding::Model;
                spec.precision.gate_up = Rounding::Model;
                spec.precision.activation = ActivationRounding::Torch;
                spec.precision.combine = CombineRounding::EveryStep;
            };
            self.pair(&format!("precision.model.{variant}"), model, other, float_type);
        }
        for (variant, rounding, other) in
            [("F32", Rounding::F32, Rounding::Model), ("Model", Rounding::Model, Rounding::F32)]
        {
            let at = |field: &str| format!("precision.{field}.{variant}");
            // A sigmoid that is renormalised hides most of what a logit loses.
            let set = |spec: &mut MoeSpec, rounding| {
                let transform = LogitTransform::Multiply { factor: 4.0 };
                let (input, format) = (RouterInput::Hidden, WeightFormat::Bf16);
                spec.router = Router::Linear { input, format, bias: false, transform };
                let (score, key) = (Score::Softmax, SelectionKey::Score);
                spec.routing.method = RoutingMethod::TopK { score, key, groups: None };
                spec.routing.renormalize = None;
                spec.precision.router_gemm = rounding;
            };
            self.pair(&at("router_gemm"), set, other, rounding);
            let set = |spec: &mut MoeSpec, rounding| spec.precision.routing_weights = rounding;
            self.pair(&at("routing_weights"), set, other, rounding);
            let set = |spec: &mut MoeSpec, rounding| {
                spec.routing.weight_position = WeightPosition::Input;
                spec.precision.weighted_input = rounding;
            };
            self.pair(&at("weighted_input"), set, other, rounding);
            let set = |spec: &mut MoeSpec, rounding| {
                unbounded(spec);
                spec.precision.gate_up = rounding;
            };
            self.pair(&at("gate_up"), set, other, rounding);
        }
        let activation = |spec: &mut MoeSpec, rounding| {
            unbounded(spec);
            spec.precision.activation = rounding;
        };
        let (f32_steps, fused, torch) = (ActivationRounding::F32, ActivationRounding::Fused, ActivationRounding::Torch);
        self.pair("precision.activation.F32", activation, fused, f32_steps);
        self.pair("precision.activation.Fused", activation, f32_steps, fused);
        self.pair("precision.activation.Torch", activation, fused, torch);
        let combine = |spec: &mut MoeSpec, rounding| spec.precision.combine = rounding;
        let (f32_sum, rows, steps) = (CombineRounding::F32, CombineRounding::WeightedRows, CombineRounding::EveryStep);
        self.pair("precision.combine.F32", combine, rows, f32_sum);
        self.pair("precision.combine.WeightedRows", combine, f32_sum, rows);
        self.pair("precision.combine.EveryStep", combine, rows, steps);
        // In f32 the order is below every tolerance: it shows where each partial sum is rounded.
        let order = |spec: &mut MoeSpec, order| {
            spec.precision.combine = CombineRounding::EveryStep;
            spec.precision.combine_order = order;
        };
        self.pair("precision.combine_order.Slot", order, CombineOrder::Expert, CombineOrder::Slot);
        self.pair("precision.combine_order.Expert", order, CombineOrder::Slot, CombineOrder::Expert);
        let scales = |spec: &mut MoeSpec, scales| spec.precision.block_scale = scales;
        self.pair("precision.block_scale.Exact", scales, BlockScale::Folded, BlockScale::Exact);
        self.pair("precision.block_scale.Promoted", scales, BlockScale::Folded, BlockScale::Promoted);
        self.pair("precision.block_scale.Folded", scales, BlockScale::Exact, BlockScale::Folded);
    }
}

/// Roundings of routed and of shared experts show: a limit is a number of any type, and rho would drown the shared.
fn unbounded(spec: &mut MoeSpec) {
    let activation = Activation::Swiglu { limit: None };
    spec.experts.activation = activation;
    spec.routing.routed_scaling_factor = 1.0;
    if let Some(shared) = &mut spec.shared {
        shared.mlp.activation = activation;
    }
}

fn joint(spec: &mut MoeSpec, num_shared: usize, global_scale: bool) {
    spec.routing.method = RoutingMethod::JointNorm { num_shared, global_scale };
    spec.routing.renormalize = None;
    if let Some(shared) = &mut spec.shared {
        shared.gate = SharedGate::Joint;
    }
}
