//! Clamp limit, selection bias and routed scale in every combination of format, quantisation of activations, place,
//! path and backend: the parameters whose loss is the reason for this crate.

use moewe::host::{Host, Session};
use moewe::schedule::lower;
use moewe::spec::*;
use moewe::weights::Dtype;
use moewe::{Backend, Cpu, Options, Plan, Scope, Tensor};

use crate::rig::{GEMV, LayerInputs, RandomLayer, TILED, deepseek_like, gpu, segmented};

/// Formats of weights, and how rows are quantised that meet them: a scale of each span and type somewhere.
const FORMATS: [(WeightFormat, ActivationQuant); 8] = {
    use ActivationCode::{E4m3, Int8};
    use ActivationScale::{F32, F32CeilPow2, Ue8m0Packed};
    let rule = ScaleRule::FlooredAmax;
    let int4 = WeightFormat::Int4 { group: Some(32), scale: ScaleFormat::Bf16, zero_points: false, act_order: false };
    [
        (WeightFormat::F32, ActivationQuant::Dynamic { code: E4m3, span: ScaleSpan::Token, rule, scale: F32 }),
        (WeightFormat::F16, ActivationQuant::dynamic_fp8(128, F32CeilPow2)),
        (WeightFormat::Bf16, ActivationQuant::Dynamic { code: E4m3, span: ScaleSpan::Tensor, rule, scale: F32 }),
        (WeightFormat::Fp8Tensor, ActivationQuant::Static { code: E4m3 }),
        (WeightFormat::Fp8Block { block: [16, 16], scale: ScaleFormat::F32 }, ActivationQuant::dynamic_fp8(32, F32)),
        (WeightFormat::Nvfp4, ActivationQuant::dynamic_fp8(64, F32)),
        (WeightFormat::Mxfp4, ActivationQuant::dynamic_fp8(32, Ue8m0Packed)),
        (int4, ActivationQuant::Dynamic { code: Int8, span: ScaleSpan::Token, rule, scale: F32 }),
    ]
};

/// Weights and rows of one layer, and whether activation and quantisation may be one step.
#[derive(Debug, Clone, Copy)]
struct Case {
    format: WeightFormat,
    quant: ActivationQuant,
    fuse_quantization: bool,
    /// Whether tokens have adapters, which part the activation from the GEMM before it.
    lora: bool,
}

fn cases() -> impl Iterator<Item = Case> {
    FORMATS.into_iter().enumerate().flat_map(|(at, (format, quant))| {
        let adapted = if at % 2 == 0 { quant } else { ActivationQuant::None };
        let ways =
            [(ActivationQuant::None, true, false), (quant, true, false), (quant, false, false), (adapted, true, true)];
        ways.map(|(quant, fuse_quantization, lora)| Case { format, quant, fuse_quantization, lora })
    })
}

impl Case {
    /// The layer of all tests here, routed and shared experts in this format.
    fn spec(self) -> MoeSpec {
        let mut spec = deepseek_like();
        for mlp in [&mut spec.experts, &mut spec.shared.as_mut().unwrap().mlp] {
            (mlp.format, mlp.activation_quant) = (self.format, self.quant);
        }
        let (format, delta) = (WeightFormat::Bf16, LoraDelta::F32);
        spec.lora = self.lora.then_some(Lora { num_adapters: 2, rank: 3, format, delta });
        spec
    }

    /// Those of `PATHS`. Rows are quantised one by one: twenty show as much as seventy.
    fn paths(self) -> [(&'static str, usize, Options); 2] {
        PATHS.map(|(name, tokens, options)| {
            let tokens = if self.quant.is_on() { tokens.min(20) } else { tokens };
            (name, tokens, Options { fuse_quantization: self.fuse_quantization, ..options })
        })
    }

    fn input(self, layer: &RandomLayer, tokens: usize, scale: f32) -> LayerInputs {
        let mut inputs = layer.all_inputs(tokens, 5);
        inputs.hidden_states.iter_mut().for_each(|value| *value *= scale);
        inputs
    }

    /// Largest distance from the reference, and rel_fro of all values. A value beside the middle of two E4M3 codes
    /// moves by an eighth when it goes the other way; it is one of 24.
    fn matches(self) -> (f32, f32) {
        if self.quant.is_on() { (0.05, 0.005) } else { (1e-5, 1e-5) }
    }
}

/// Both paths: few tokens through matrix-vector products, many through tiles.
const PATHS: [(&str, usize, Options); 2] = [("decode", 3, GEMV), ("prefill", 70, TILED)];
/// Relative to the largest value of the output.
const MOVES: f32 = 1e-2;
/// Likewise where rows are quantised.
const CODES_MOVE: f32 = 0.2;

/// Largest difference relative to the largest value of `a`.
fn distance(a: &[f32], b: &[f32]) -> f32 {
    let largest = a.iter().fold(1e-30f32, |largest, value| largest.max(value.abs()));
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max) / largest
}

fn rel_fro(want: &[f32], got: &[f32]) -> f32 {
    let square = |values: &mut dyn Iterator<Item = f32>| values.map(|v| v * v).sum::<f32>();
    let off = square(&mut want.iter().zip(got).map(|(a, b)| a - b));
    (off / square(&mut want.iter().copied())).sqrt()
}

fn run<B: Host>(backend: B, layer: &RandomLayer, tokens: usize, options: &Options, inputs: &LayerInputs) -> Vec<f32> {
    let plan = Plan::new(backend, &layer.spec, &layer.weights(), tokens, &segmented(options)).unwrap();
    Session::new(plan, &layer.spec).unwrap().run(&inputs.view()).unwrap().output
}

/// Both backends on both paths give what the reference gives: that.
fn every_path(layer: &RandomLayer, case: Case, scale: f32, what: &str) -> Vec<Vec<f32>> {
    let path = |(name, tokens, options): (&str, usize, Options)| {
        let inputs = case.input(layer, tokens, scale);
        let want = layer.judge(inputs.view()).output;
        for (backend, got) in [
            ("cpu", run(Cpu::new(), layer, tokens, &options, &inputs)),
            ("wgpu", run(gpu().clone(), layer, tokens, &options, &inputs)),
        ] {
            let (off, all) = (distance(&want, &got), rel_fro(&want, &got));
            let (farthest, all_apart) = case.matches();
            assert!(off < farthest && all < all_apart, "{case:?}, {what}, {name}, {backend}: off by {off}, {all}");
        }
        want
    };
    case.paths().map(path).into()
}

/// All kernels' text of a spec.
fn text(spec: &MoeSpec, options: &Options) -> String {
    let schedule = lower(spec, Scope::Layer, 70, &gpu().facts(), options).unwrap();
    schedule.buckets.iter().flat_map(|bucket| &bucket.steps).map(|step| step.operation.source().wgsl()).collect()
}

/// A layer whose routed or shared experts have this limit, the others none.
fn limited(case: Case, place: &str, limit: Option<f32>, gate: f32, up: f32) -> RandomLayer {
    let mut spec = case.spec();
    spec.precision = Precision::float32(FloatType::F32, FloatType::F32);
    let mut shared = spec.shared.take().unwrap();
    for mlp in [&mut spec.experts, &mut shared.mlp] {
        (mlp.gate_up_bias, mlp.activation) = (true, Activation::Swiglu { limit: None });
    }
    match place {
        "routed" => spec.experts.activation = Activation::Swiglu { limit },
        _ => shared.mlp.activation = Activation::Swiglu { limit },
    }
    spec.shared = Some(shared);
    for (_, _, options) in case.paths() {
        let text = text(&spec, &options);
        for code in ["SWIGLU_LIMIT", "fn at_most"] {
            assert_eq!(text.contains(code), limit.is_some(), "{code} in {case:?}, limit {limit:?}");
        }
    }
    let mut layer = RandomLayer::new(spec, 31);
    layer.set_gate_up_bias(true, gate, up);
    layer.set_gate_up_bias(false, gate, up);
    layer
}

#[test]
fn the_clamp_acts_in_every_format_place_path_and_backend() {
    for case in cases() {
        let moves = if case.quant.is_on() { CODES_MOVE } else { MOVES };
        // Half of all values are small (0.1 * 2 N(0, 1)): the biases decide what a limit of 1 meets.
        for (part, gate, up) in [("gate", 4.0, 0.5), ("up", -1.0, 4.0), ("up below", -1.0, -4.0)] {
            let none = every_path(&limited(case, "routed", None, gate, up), case, 0.05, &format!("{part}, no limit"));
            for place in ["routed", "shared"] {
                let [small, large] = [1.0, 1e4].map(|limit| limited(case, place, Some(limit), gate, up));
                let small = every_path(&small, case, 0.05, &format!("{part}, {place}, a limit of 1"));
                for ((none, small), (_, tokens, _)) in none.iter().zip(&small).zip(case.paths()) {
                    let large = large.judge(case.input(&large, tokens, 0.05).view()).output;
                    assert_eq!(*none, large, "a limit that nothing reaches changed the output");
                    let moved = distance(none, small);
                    assert!(moved > moves, "{case:?}, {part}, {place}: a limit of 1 moves by {moved} only");
                }
                if !case.quant.is_on() {
                    every_path(&large, case, 0.05, &format!("{part}, {place}, a limit that nothing reaches"));
                }
            }
        }
    }
}

/// Rows that enter by slot: without router and shared experts.
#[test]
fn the_clamp_acts_on_batched_rows_in_every_format() {
    for case in cases() {
        let moves = if case.quant.is_on() { CODES_MOVE } else { MOVES };
        let judged = [None, Some(1e4), Some(1.0)].map(|limit| {
            let mut spec = limited(case, "routed", limit, 4.0, 0.5).spec.clone();
            (spec.shared, spec.router) = (None, Router::Given { transform: LogitTransform::None });
            spec.entry = Entry::Batched { capacity: 2 };
            let mut layer = RandomLayer::new(spec, 31);
            layer.set_gate_up_bias(true, 4.0, 0.5);
            let inputs = case.input(&layer, 0, 0.05);
            let want = layer.judge(inputs.view()).output;
            for (name, _, options) in case.paths() {
                for (backend, got) in [
                    ("cpu", run(Cpu::new(), &layer, layer.tokens(0), &options, &inputs)),
                    ("wgpu", run(gpu().clone(), &layer, layer.tokens(0), &options, &inputs)),
                ] {
                    let off = distance(&want, &got);
                    assert!(off < case.matches().0, "{case:?}, limit {limit:?}, {name}, {backend}: off by {off}");
                }
            }
            want
        });
        assert_eq!(judged[0], judged[1], "a limit that nothing reaches changed the output");
        let moved = distance(&judged[0], &judged[2]);
        assert!(moved > moves, "{case:?}: a limit of 1 moves by {moved} only");
    }
}

#[test]
fn the_routed_scale_acts_once_in_every_format_place_path_and_backend() {
    for case in cases() {
        for on_output in [false, true] {
            for with_shared in [false, true] {
                let outputs = [2.5, 0.3].map(|rho| {
                    let mut spec = case.spec();
                    spec.precision = Precision::float32(FloatType::Bf16, FloatType::F32);
                    spec.routing.routed_scaling_factor = rho;
                    spec.routing.apply_routed_scale_to_output = on_output;
                    if !with_shared {
                        spec.shared = None;
                    }
                    let layer = RandomLayer::new(spec, 32);
                    every_path(&layer, case, 1.0, &format!("on output {on_output}, shared {with_shared}, {rho}"))
                });
                // rho multiplies the routed part and nothing else: without shared expert the ratio is that of rho.
                for (with_large, with_small) in outputs[0].iter().zip(&outputs[1]) {
                    let scaled: Vec<f32> = with_large.iter().map(|value| value * 0.3 / 2.5).collect();
                    let off = distance(with_small, &scaled);
                    let (least, most) = if with_shared { (MOVES, f32::MAX) } else { (0.0, 1e-6) };
                    assert!((least..=most).contains(&off), "{case:?}, shared {with_shared}: {off}");
                }
            }
        }
    }
}

#[test]
fn the_selection_bias_is_f32_whatever_the_types_around_it() {
    // Near 7, as in GLM-5.2: bf16 has steps of 2^-5 there, and would choose other experts. Scores differ by less than
    // biases do, so no two keys are so near that the order of a sum decides.
    let fine = |e: usize| 7.0 + 0.001 * ((e * 7) % 12) as f32;
    for case in cases() {
        let inputs = [FloatType::Bf16, FloatType::F16, FloatType::F32];
        for input in inputs.into_iter().take(if case.quant.is_on() { 1 } else { 3 }) {
            let chosen = [0, 1].map(|which| {
                let mut spec = case.spec();
                spec.precision = Precision::float32(input, FloatType::F32);
                let method =
                    RoutingMethod::TopK { score: Score::Sigmoid, key: SelectionKey::ScorePlusBias, groups: None };
                spec.routing.method = method;
                let router = Router::Linear {
                    input: RouterInput::Hidden,
                    format: case.format,
                    bias: false,
                    transform: LogitTransform::Multiply { factor: 1e-5 },
                };
                spec.router = router;
                let mut layer = RandomLayer::new(spec, 33);
                let narrow = |bias| if which == 0 { bias } else { half::bf16::from_f32(bias).to_f32() };
                layer.selection_bias = Some((0..12).map(fine).map(narrow).collect());
                let inputs = layer.all_inputs(70, 34);
                let want = layer.judge(inputs.view()).routed.topk_ids;
                for (_, _, options) in case.paths().into_iter().filter(|_| which == 0) {
                    let cpu = layer.on_cpu(70, &options, None).run(&inputs.view()).unwrap().topk_ids;
                    let wgpu = layer.on_gpu(70, &options).run(&inputs.view()).unwrap().topk_ids;
                    assert!(want == cpu && want == wgpu, "{case:?}, {input:?}");
                }
                want
            });
            assert_ne!(chosen[0], chosen[1], "a bias in bf16 would not show");
        }
    }
}

#[test]
fn a_bias_of_any_dtype_is_widened_once_and_exactly() {
    let values = [7.031_25f32, -0.5, 0.0, 12.0];
    let f32_bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    let bf16_bytes: Vec<u8> = values.iter().flat_map(|value| half::bf16::from_f32(*value).to_le_bytes()).collect();
    let f16_bytes: Vec<u8> = values.iter().flat_map(|value| half::f16::from_f32(*value).to_le_bytes()).collect();
    for (dtype, bytes) in [(Dtype::F32, &f32_bytes), (Dtype::BF16, &bf16_bytes), (Dtype::F16, &f16_bytes)] {
        let tensor = Tensor { name: "gate.e_score_correction_bias".into(), dtype, shape: vec![1, 4], bytes };
        assert_eq!(tensor.to_finite_f32(4).unwrap(), values, "{dtype:?}");
    }
}

#[test]
fn what_is_not_finite_is_refused_by_the_name_of_its_tensor() {
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let bytes: Vec<u8> = [1.0, bad].iter().flat_map(|value| value.to_le_bytes()).collect();
        let name = "model.layers.3.mlp.gate.e_score_correction_bias";
        let tensor = Tensor { name: name.into(), dtype: Dtype::F32, shape: vec![2], bytes: &bytes };
        let said = tensor.to_finite_f32(2).unwrap_err().to_string();
        assert!(said.contains(name) && said.contains(&bad.to_string()) && said.contains("at 1"), "{said}");
        // A caller who makes the weights himself is told the field.
        let mut layer = RandomLayer::new(deepseek_like(), 35);
        layer.selection_bias.as_mut().unwrap()[4] = bad;
        for said in [
            Plan::new(Cpu::new(), &layer.spec, &layer.weights(), 1, &GEMV).map(|_| ()).unwrap_err().to_string(),
            layer.weights().check(&layer.spec).unwrap_err().to_string(),
        ] {
            assert!(said.contains("router.selection_bias") && said.contains("at 4"), "{said}");
        }
        // A limit: the spec refuses it.
        let mut spec = deepseek_like();
        spec.experts.activation = Activation::Swiglu { limit: Some(bad) };
        let said = spec.validate().unwrap_err().to_string();
        assert!(said.contains("activation.limit") && said.contains(&bad.to_string()), "{said}");
    }
    for bad in [0.0, -7.0] {
        let mut spec = deepseek_like();
        spec.experts.activation = Activation::SwigluClampAfter { limit: bad };
        let said = spec.validate().unwrap_err().to_string();
        assert!(said.contains("activation.limit") && said.contains("None"), "{said}");
    }
}

#[test]
fn weights_that_are_nan_spoil_the_rows_that_meet_them_and_no_others() {
    let mut spec = deepseek_like();
    spec.precision = Precision::float32(FloatType::F32, FloatType::F32);
    spec.experts.format = WeightFormat::F32;
    let mut layer = RandomLayer::new(spec, 36);
    layer.soften_bias();
    layer.spoil(4);
    let damage = layer.weights().scan();
    assert_eq!((damage.len(), damage[0].matrix.as_str(), damage[0].count), (1, "experts[4].up", 1));
    let inputs = layer.all_inputs(70, 37);
    let want = layer.judge(inputs.view());
    let meets: Vec<bool> = want.routed.topk_ids.chunks(3).map(|ids| ids.contains(&4)).collect();
    assert!(meets.contains(&true) && meets.contains(&false));
    for (_, _, options) in PATHS {
        for got in [
            layer.on_cpu(70, &options, None).run(&inputs.view()).unwrap(),
            layer.on_gpu(70, &options).run(&inputs.view()).unwrap(),
        ] {
            for (row, meets) in got.output.chunks(40).zip(&meets) {
                assert!(row.iter().all(|value| value.is_nan() == *meets));
            }
        }
    }
}

/// Every profile of roundings beside every part of a layer that they pass: a rounding that one side lacks moves
/// each value by about half an ulp, one that falls the other way beside a middle moves few.
#[test]
fn each_rounding_stands_where_the_reference_has_it() {
    let latents = [None, Some(LatentNorm::None), Some(LatentNorm::Reduced { eps: 1e-5 })];
    let combines = [CombineRounding::F32, CombineRounding::WeightedRows, CombineRounding::EveryStep];
    let activations = [ActivationRounding::F32, ActivationRounding::Fused, ActivationRounding::Torch];
    for (model, half_ulp) in [(FloatType::Bf16, 1.0 / 256.0), (FloatType::F16, 1.0 / 2048.0)] {
        for combine in combines {
            for norm in latents {
                for (case, activation) in activations.into_iter().enumerate() {
                    let mut spec = deepseek_like();
                    spec.precision = Precision {
                        model,
                        combine,
                        activation,
                        gate_up: [Rounding::F32, Rounding::Model][case % 2],
                        ..Precision::float32(FloatType::Bf16, FloatType::F32)
                    };
                    spec.latent = norm.map(|norm| Latent { size: 20, format: WeightFormat::Bf16, norm });
                    spec.output_bias = case == 0;
                    spec.routing.apply_routed_scale_to_output = case == 1;
                    match (case, &mut spec.shared) {
                        (0, shared) => *shared = None,
                        (1, Some(shared)) => shared.gate = SharedGate::Sigmoid { format: WeightFormat::Bf16 },
                        (_, Some(shared)) => shared.combination = SharedCombination::Average,
                        (_, None) => {}
                    }
                    let what = format!("{:?}, {norm:?}", spec.precision);
                    let layer = RandomLayer::new(spec, 38);
                    for (_, tokens, options) in PATHS {
                        let inputs = layer.all_inputs(tokens.max(20), 39);
                        let want = layer.judge(inputs.view()).output;
                        for got in [
                            run(Cpu::new(), &layer, tokens.max(20), &options, &inputs),
                            run(gpu().clone(), &layer, tokens.max(20), &options, &inputs),
                        ] {
                            let off = rel_fro(&want, &got);
                            assert!(off < 0.2 * half_ulp, "{what}: {} half ulp", off / half_ulp);
                        }
                    }
                }
            }
        }
    }
}
