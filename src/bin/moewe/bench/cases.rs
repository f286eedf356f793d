//! The layers that are timed: those that other engines are measured with.

use moewe::MoeSpec;
use moewe::spec::{
    Activation, ActivationQuant, ActivationRounding, ActivationScale, BlockScale, ChosenScore, CombineRounding,
    CommonTerms, Denominator, Entry, ExpertInput, ExpertMlp, FloatType, GateUpLayout, GroupScore, Groups,
    LogitTransform, NanPolicy, Orientation, Placement, Precision, Router, Routing, RoutingMethod, ScaleFormat, Score,
    SelectionKey, TensorShard, WeightFormat, WeightPosition,
};
use moewe::weights::{Blocks, PackedScale, Parts};

/// Names of the cases.
pub const NAMES: [&str; 8] = [
    "dsv3_fp8",
    "minimax_m2_fp8",
    "qwen3_30b_fp8",
    "qwen3_30b_bf16",
    "kimi_linear_bf16",
    "gptoss20b_mxfp4",
    "gptoss120b_mxfp4",
    "dsv4_flash_fp4",
];

/// E, k, H and I.
type Sizes = [usize; 4];

const FP8: WeightFormat = WeightFormat::Fp8Block { block: [128, 128], scale: ScaleFormat::F32 };
const SWIGLU: Activation = Activation::Swiglu { limit: None };
const W8A8: ActivationQuant = ActivationQuant::dynamic_fp8(128, ActivationScale::F32);
/// `w /= sum w + 1e-20`, of the layers with a selection bias.
const SUM: Option<Denominator> = Some(Denominator::SumPlus { eps: 1e-20 });

/// The layer of that name with `scale` of its experts: caller's logits, bf16 in and out, no shared expert.
pub fn layer(name: &str, scale: f64) -> Option<MoeSpec> {
    let biased = |score, groups| RoutingMethod::TopK { score, key: SelectionKey::ScorePlusBias, groups };
    let qwen3 = RoutingMethod::TopK { score: Score::Softmax, key: SelectionKey::Score, groups: None };
    let qwen3 = Spec::new([128, 8, 2048, 768], qwen3, Some(Denominator::Sum));
    let kimi = Spec::new([256, 8, 2304, 1024], biased(Score::Sigmoid, None), SUM);
    let layer = match name {
        "dsv3_fp8" => {
            let groups = Groups { n_group: 8, topk_group: 4, score: GroupScore::Top2SumOfKey };
            let layer = Spec::new([256, 8, 7168, 2048], biased(Score::Sigmoid, Some(groups)), SUM);
            Spec { format: FP8, quant: W8A8, routed_scaling_factor: 2.5, n_group: 8, ..layer }
        }
        "minimax_m2_fp8" => {
            let layer = Spec::new([256, 8, 3072, 1536], biased(Score::Sigmoid, None), SUM);
            Spec { format: FP8, quant: W8A8, ..layer }
        }
        "qwen3_30b_fp8" => Spec { format: FP8, quant: W8A8, ..qwen3 },
        "qwen3_30b_bf16" => qwen3,
        "kimi_linear_bf16" => Spec { routed_scaling_factor: 2.446, ..kimi },
        "gptoss20b_mxfp4" => gpt_oss(32),
        "gptoss120b_mxfp4" => gpt_oss(128),
        "dsv4_flash_fp4" => Spec {
            format: WeightFormat::Mxfp4,
            quant: ActivationQuant::dynamic_fp8(128, ActivationScale::Ue8m0Packed),
            activation: Activation::Swiglu { limit: Some(10.0) },
            routed_scaling_factor: 1.5,
            ..Spec::new([256, 6, 4096, 2048], biased(Score::SqrtSoftplus, None), SUM)
        },
        _ => return None,
    };
    Some(layer.scaled(scale))
}

fn gpt_oss(num_experts: usize) -> Spec {
    let method = RoutingMethod::TopKThenScore { score: ChosenScore::Softmax };
    Spec {
        format: WeightFormat::Mxfp4,
        activation: Activation::SwigluOai { alpha: 1.702, limit: Some(7.0), beta: 1.0 },
        biases: true,
        ..Spec::new([num_experts, 4, 2880, 2880], method, None)
    }
}

/// What the cases differ in.
struct Spec {
    sizes: Sizes,
    method: RoutingMethod,
    renormalize: Option<Denominator>,
    routed_scaling_factor: f32,
    n_group: usize,
    activation: Activation,
    biases: bool,
    format: WeightFormat,
    quant: ActivationQuant,
}

impl Spec {
    fn new(sizes: Sizes, method: RoutingMethod, renormalize: Option<Denominator>) -> Self {
        Self {
            sizes,
            method,
            renormalize,
            routed_scaling_factor: 1.0,
            n_group: 1,
            activation: SWIGLU,
            biases: false,
            format: WeightFormat::Bf16,
            quant: ActivationQuant::None,
        }
    }

    /// E becomes `max(2 k, scale * E)`, rounded up to groups of an even number; the rest stays.
    fn scaled(self, scale: f64) -> MoeSpec {
        let [num_experts, top_k, hidden_size, intermediate_size] = self.sizes;
        let wanted = (scale * num_experts as f64).round() as usize;
        // What the second GEMM reads is rounded once, as in the engines that are compared.
        let mut precision = Precision::float32(FloatType::Bf16, FloatType::Bf16);
        (precision.model, precision.activation) = (FloatType::Bf16, ActivationRounding::Fused);
        // The peers' second GEMM weights its rows and rounds them.
        precision.combine = CombineRounding::WeightedRows;
        // What the peers' FP8 kernels keep.
        precision.block_scale = BlockScale::Promoted;
        MoeSpec {
            hidden_size,
            num_experts: wanted.max(2 * top_k).next_multiple_of(2 * self.n_group),
            top_k,
            router: Router::Given { transform: LogitTransform::None },
            routing: Routing {
                method: self.method,
                renormalize: self.renormalize,
                routed_scaling_factor: self.routed_scaling_factor,
                apply_routed_scale_to_output: false,
                per_expert_scale: false,
                weight_position: WeightPosition::Output,
                zero_experts: None,
                nan_policy: NanPolicy::Zero,
            },
            experts: ExpertMlp {
                intermediate_size,
                activation: self.activation,
                gate_up_layout: GateUpLayout::Separate,
                orientation: Orientation::OutIn,
                gate_up_bias: self.biases,
                down_bias: self.biases,
                format: self.format,
                activation_quant: self.quant,
            },
            shared: None,
            latent: None,
            lora: None,
            expert_input: ExpertInput::Hidden,
            output_bias: false,
            output_norm: None,
            placement: Placement::All,
            shard: TensorShard::Whole,
            common_terms: CommonTerms::Here,
            entry: Entry::TokenMajor,
            precision,
        }
    }
}

/// Bytes of one expert's codes and scales, gate, up and down.
pub fn expert_bytes(spec: &MoeSpec) -> u64 {
    let [h, i] = [spec.hidden_size, spec.experts.intermediate_size];
    let Parts { code, blocks, row_scale } = spec.experts.format.parts();
    let matrix = |rows: usize, cols: usize| {
        let scales = blocks.map_or(0, |Blocks { rows: block_rows, cols: block_cols, scale, act_order: _ }| {
            let per_row = cols.div_ceil(block_cols.unwrap_or(cols));
            let row = match scale {
                PackedScale::E8m0 | PackedScale::E4m3 => per_row,
                PackedScale::F16 | PackedScale::Bf16 => 2 * per_row,
                PackedScale::F32
                | PackedScale::F16Zero
                | PackedScale::Bf16Zero
                | PackedScale::Q4K
                | PackedScale::Q6K => 4 * scale.words(per_row),
            };
            rows.div_ceil(block_rows) * row
        });
        (rows * cols * code.bits() / 8 + scales + if row_scale { 4 * rows } else { 0 }) as u64
    };
    2 * matrix(i, h) + matrix(h, i)
}

/// Bytes of the experts that one token reads.
pub fn experts_of_a_token(spec: &MoeSpec) -> u64 {
    spec.top_k as u64 * expert_bytes(spec)
}

/// Operations on the weights: a multiplication and an addition for each weight of each chosen expert.
pub fn flops(spec: &MoeSpec, tokens: usize) -> u64 {
    2 * (tokens * spec.top_k * 3 * spec.hidden_size * spec.experts.intermediate_size) as u64
}

/// Operations a second that a device's matrix units reach at best, as measured elsewhere with dense products of 8192 x
/// 8192; `None` where nobody stated it: then the floor is that of the bytes alone.
pub fn stated_flops(adapter: Option<&str>, quant: &ActivationQuant) -> Option<f64> {
    let hopper = ["H100", "H200"].iter().any(|name| adapter.is_some_and(|adapter| adapter.contains(name)));
    hopper.then_some(if quant.is_on() { 1539e12 } else { 799e12 })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_case_is_a_layer_and_nothing_else_is() {
        for name in NAMES {
            for scale in [1.0, 0.1, 1e-9] {
                let spec = layer(name, scale).expect(name);
                assert!(spec.validate().is_ok() && spec.num_experts >= 2 * spec.top_k, "{name}");
            }
        }
        assert_eq!(layer("mixtral", 1.0), None);
    }

    #[test]
    fn a_scale_keeps_groups_of_an_even_number_of_experts() {
        let experts = |name, scale| layer(name, scale).map(|spec| spec.num_experts);
        assert_eq!(experts("dsv3_fp8", 1.0), Some(256));
        assert_eq!(experts("dsv3_fp8", 0.1), Some(32));
        assert_eq!(experts("dsv3_fp8", 0.01), Some(16));
        assert_eq!(experts("qwen3_30b_bf16", 0.1), Some(16));
        assert_eq!(experts("qwen3_30b_bf16", 0.2), Some(26));
        assert_eq!(experts("gptoss20b_mxfp4", 0.5), Some(16));
    }

    /// The floors that were measured with 3.166 TB/s: 8 or 4 experts' bytes.
    #[test]
    fn an_experts_bytes_are_its_codes_and_scales() {
        for (name, experts, microseconds) in [
            ("dsv3_fp8", 8, 111.3),
            ("minimax_m2_fp8", 8, 35.8),
            ("qwen3_30b_fp8", 8, 11.9),
            ("qwen3_30b_bf16", 8, 23.8),
            ("kimi_linear_bf16", 8, 35.8),
            ("gptoss120b_mxfp4", 4, 16.7),
        ] {
            let bytes = layer(name, 1.0).map_or(0, |spec| experts * expert_bytes(&spec));
            assert!((bytes as f64 / 3.166e6 - microseconds).abs() < 0.06, "{name}: {bytes} bytes");
        }
        let flops = layer("gptoss20b_mxfp4", 1.0).map_or(0, |spec| flops(&spec, 8192));
        assert!((flops as f64 / 799e6 - 2041.3).abs() < 0.5);
    }
}
