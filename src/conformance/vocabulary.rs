//! The fields of the spec, one by one, with the paths that reports name them by.
//!
//! Exhaustive by construction: every type of the spec is listed below, and the patterns that the lists become do
//! not compile while a field or a variant is missing, or has another type. What they cannot see, a type that is
//! listed nowhere, the test suite does, which compares these lists with the text of `src/spec/`.

use std::collections::BTreeSet;

use crate::spec::{
    Activation, ActivationCode, ActivationQuant, ActivationRounding, ActivationScale, BlockScale, ChosenScore,
    CombineOrder, CombineRounding, CommonTerms, Denominator, Entry, ExpertInput, ExpertMlp, FloatType, GateUpLayout,
    GroupScore, Groups, Latent, LatentNorm, LogitTransform, Lora, LoraDelta, MoeSpec, NanPolicy, Orientation,
    OutputNorm, Placement, Precision, Rounding, Router, RouterInput, Routing, RoutingMethod, ScaleFormat, ScaleRule,
    ScaleSpan, Score, SelectionKey, SharedCombination, SharedExperts, SharedGate, TensorShard, WeightFormat,
    WeightPosition, ZeroExpertKind, ZeroExperts,
};

/// A declaration in the spec's text: type, variant (empty for a struct), field (empty for a variant itself; a
/// number in a tuple).
pub type Declaration = (&'static str, &'static str, &'static str);

/// What there is to drop.
#[derive(Debug, Clone, Default)]
pub struct Vocabulary {
    /// Every place of a [`MoeSpec`] that holds a number, a flag, a choice or something optional: `top_k`,
    /// `experts.activation.Swiglu.limit`, `shared`, `placement.Range`. A struct is its fields, a choice its variants.
    pub fields: Vec<String>,
    /// The declarations that these are places of.
    pub declarations: BTreeSet<Declaration>,
}

/// The vocabulary of [`MoeSpec`].
pub fn vocabulary() -> Vocabulary {
    let mut all = Vocabulary::default();
    MoeSpec::places("", &mut all);
    all
}

/// A type of the spec, or of its fields.
trait Named {
    /// The places inside a value at `path`, and itself if it is one.
    fn places(path: &str, all: &mut Vocabulary);
    /// The places inside a value at `path` that is listed already.
    fn inside(path: &str, all: &mut Vocabulary) {
        Self::places(path, all);
    }
}

impl Vocabulary {
    fn declare(&mut self, declaration: Declaration) {
        self.declarations.insert(declaration);
    }
}

fn join(path: &str, name: &str) -> String {
    if path.is_empty() { name.into() } else { format!("{path}.{name}") }
}

macro_rules! numbers {
    ($($number:ty),*) => {$(
        impl Named for $number {
            fn places(path: &str, all: &mut Vocabulary) {
                all.fields.push(path.into());
            }

            fn inside(_path: &str, _all: &mut Vocabulary) {}
        }
    )*};
}

numbers!(bool, usize, f32, Vec<i32>);

impl<T: Named> Named for [T; 2] {
    fn places(path: &str, all: &mut Vocabulary) {
        T::places(&join(path, "0"), all);
        T::places(&join(path, "1"), all);
    }
}

impl<T: Named> Named for Option<T> {
    fn places(path: &str, all: &mut Vocabulary) {
        all.fields.push(path.into());
        T::inside(path, all);
    }
}

macro_rules! structs {
    ($($name:ident { $($field:ident: $kind:ty,)* })*) => {$(
        impl Named for $name {
            fn places(path: &str, all: &mut Vocabulary) {
                let _ = |value: &Self| {
                    let Self { $($field),* } = value;
                    $(let _: &$kind = $field;)*
                };
                $(
                    all.declare((stringify!($name), "", stringify!($field)));
                    <$kind>::places(&join(path, stringify!($field)), all);
                )*
            }
        }
    )*};
}

macro_rules! enums {
    ($($name:ident { $($variant:ident $({ $($field:ident: $kind:ty,)* })? $(($only:ty))?,)* })*) => {$(
        impl Named for $name {
            fn places(path: &str, all: &mut Vocabulary) {
                let _ = |value: &Self| match value {
                    $(Self::$variant $({ $($field),* })? $((enums!(@pattern $only)))? => {
                        $($(let _: &$kind = $field;)*)?
                    })*
                };
                $(
                    let variant = join(path, stringify!($variant));
                    all.declare((stringify!($name), stringify!($variant), ""));
                    all.fields.push(variant.clone());
                    $($(
                        all.declare((stringify!($name), stringify!($variant), stringify!($field)));
                        <$kind>::places(&join(&variant, stringify!($field)), all);
                    )*)?
                    $(
                        all.declare((stringify!($name), stringify!($variant), "0"));
                        <$only>::places(&join(&variant, "0"), all);
                    )?
                )*
            }
        }
    )*};
    (@pattern $only:ty) => { _ };
}

structs! {
    MoeSpec {
        hidden_size: usize,
        num_experts: usize,
        top_k: usize,
        router: Router,
        routing: Routing,
        experts: ExpertMlp,
        shared: Option<SharedExperts>,
        latent: Option<Latent>,
        lora: Option<Lora>,
        expert_input: ExpertInput,
        output_bias: bool,
        output_norm: Option<OutputNorm>,
        placement: Placement,
        shard: TensorShard,
        common_terms: CommonTerms,
        entry: Entry,
        precision: Precision,
    }
    Routing {
        method: RoutingMethod,
        renormalize: Option<Denominator>,
        routed_scaling_factor: f32,
        apply_routed_scale_to_output: bool,
        per_expert_scale: bool,
        weight_position: WeightPosition,
        zero_experts: Option<ZeroExperts>,
        nan_policy: NanPolicy,
    }
    Groups { n_group: usize, topk_group: usize, score: GroupScore, }
    ZeroExperts { count: usize, kind: ZeroExpertKind, }
    ExpertMlp {
        intermediate_size: usize,
        activation: Activation,
        gate_up_layout: GateUpLayout,
        orientation: Orientation,
        gate_up_bias: bool,
        down_bias: bool,
        format: WeightFormat,
        activation_quant: ActivationQuant,
    }
    SharedExperts { mlp: ExpertMlp, gate: SharedGate, combination: SharedCombination, }
    Latent { size: usize, format: WeightFormat, norm: LatentNorm, }
    OutputNorm { eps: f32, }
    Lora { num_adapters: usize, rank: usize, format: WeightFormat, delta: LoraDelta, }
    Precision {
        input: FloatType,
        output: FloatType,
        model: FloatType,
        router_gemm: Rounding,
        routing_weights: Rounding,
        weighted_input: Rounding,
        gate_up: Rounding,
        activation: ActivationRounding,
        combine: CombineRounding,
        combine_order: CombineOrder,
        block_scale: BlockScale,
    }
}

enums! {
    Router {
        Linear { input: RouterInput, format: WeightFormat, bias: bool, transform: LogitTransform, },
        Mlp { state_size: usize, rms_norm_eps: f32, previous_state: bool, format: WeightFormat, },
        Given { transform: LogitTransform, },
    }
    RouterInput { Hidden, RmsNormScaled { eps: f32, }, }
    LogitTransform { None, SoftCap { cap: f32, }, Multiply { factor: f32, }, }
    RoutingMethod {
        TopK { score: Score, key: SelectionKey, groups: Option<Groups>, },
        TopKThenScore { score: ChosenScore, },
        Hash { score: Score, vocab_size: usize, },
        JointNorm { num_shared: usize, global_scale: bool, },
        Sparsemixer { router_jitter_noise: f32, },
    }
    Score { Softmax, Sigmoid, SqrtSoftplus, Identity, }
    ChosenScore { Softmax, Sigmoid, }
    SelectionKey { Score, ScorePlusBias, LogitPlusBias, }
    GroupScore { Top2SumOfKey, MaxOfScore, Top2SumOfScore, }
    Denominator { Sum, SumPlus { eps: f32, }, AtLeast { floor: f32, }, SumOrOne, PNorm { p: f32, }, }
    WeightPosition { Output, Input, BeforeDown, }
    ZeroExpertKind { Identity, Skip, }
    NanPolicy { Zero, Propagate, }
    Activation {
        Swiglu { limit: Option<f32>, },
        SwigluClampAfter { limit: f32, },
        SwigluOai { alpha: f32, limit: Option<f32>, beta: f32, },
        Situ { beta: f32, linear_beta: f32, },
        GeluTanh,
        GeluErf,
        Relu2,
    }
    GateUpLayout { Separate, Halves, Interleaved, }
    Orientation { OutIn, InOut, }
    SharedGate { None, Sigmoid { format: WeightFormat, }, Joint, }
    SharedCombination { Sum, Average, }
    LatentNorm { None, Reduced { eps: f32, }, PreAndPost { pre_eps: f32, post_eps: f32, }, }
    LoraDelta { F32, Model, }
    ExpertInput { Hidden, Separate, }
    Placement { All, Range { first: usize, count: usize, }, Map { num_slots: usize, replicas: usize, slots: Vec<i32>, }, }
    TensorShard { Whole, Part { first: usize, size: usize, owns_down_bias: bool, }, }
    CommonTerms { Here, Elsewhere, }
    Entry { TokenMajor, Batched { capacity: usize, }, }
    FloatType { F32, F16, Bf16, }
    Rounding { F32, Model, }
    ActivationRounding { F32, Fused, Torch, }
    CombineRounding { F32, WeightedRows, EveryStep, }
    CombineOrder { Slot, Expert, }
    BlockScale { Exact, Promoted, Folded, }
    WeightFormat {
        F32,
        F16,
        Bf16,
        Fp8Block { block: [usize; 2], scale: ScaleFormat, },
        Fp8Tensor,
        Fp8Channel,
        Int8Channel,
        Mxfp4,
        Nvfp4,
        Int4 { group: Option<usize>, scale: ScaleFormat, zero_points: bool, act_order: bool, },
        Q8_0,
        Q4K,
        Q6K,
    }
    ScaleFormat { F32, F16, Bf16, E8m0, }
    ActivationQuant {
        None,
        Dynamic { code: ActivationCode, span: ScaleSpan, rule: ScaleRule, scale: ActivationScale, },
        Static { code: ActivationCode, },
    }
    ActivationCode { E4m3, Int8, }
    ScaleSpan { Group(usize), Token, Tensor, }
    ScaleRule {
        FlooredAmax,
        FlooredAmaxTimesReciprocal,
        FlooredScale { upper: Option<f32>, },
        ReciprocalScale,
        ReciprocalAmax,
    }
    ActivationScale { F32, F32CeilPow2, Ue8m0Packed, }
}
