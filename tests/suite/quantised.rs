//! Every published arrangement of quantised weights: from small checkpoints to the values that a plain loop gives,
//! and the refusals by name.
//!
//! A long file: a writer of each arrangement, beside the tests that read it back.

use moewe::error::{Error, Unsupported};
use moewe::families::{Request, resolve};
use moewe::spec::*;
use moewe::weights::{Dtype, InputScales, Matrix};
use serde_json::{Value, json};

use crate::samples::{ANY, Sample, Stored, says};

/// The layer of the golden case qwen3_moe: experts of 48 x 192.
const LAYER: &str = "model.layers.2.mlp.experts";
const E2M1: [f32; 8] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];
const AWQ: [usize; 8] = [0, 2, 4, 6, 1, 3, 5, 7];

/// The tensors of one matrix by the last components of their names, and its values row by row.
type Built = (Vec<(&'static str, Stored)>, Vec<f32>);

struct Rng(u64);

impl Rng {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % bound
    }

    fn bytes(&mut self, count: usize, bound: usize) -> Vec<u8> {
        (0..count).map(|_| self.below(bound) as u8).collect()
    }

    /// Scales that each float type holds.
    fn scales(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| (1 + self.below(31)) as f32 / 64.0).collect()
    }
}

fn raw(dtype: Dtype, shape: &[usize], bytes: Vec<u8>) -> Stored {
    assert_eq!(shape.iter().product::<usize>() * dtype.bitsize() / 8, bytes.len());
    Stored { dtype, shape: shape.to_vec(), bytes }
}

fn floats(dtype: Dtype, shape: &[usize], values: &[f32]) -> Stored {
    let bytes = values.iter().flat_map(|value| match dtype {
        Dtype::F32 => value.to_le_bytes().to_vec(),
        Dtype::BF16 => ((value.to_bits() >> 16) as u16).to_le_bytes().to_vec(),
        Dtype::F16 => ((((value.to_bits() >> 13) & 0x3ff) | (((value.to_bits() >> 23) + 15 - 127) << 10)) as u16)
            .to_le_bytes()
            .to_vec(),
        other => panic!("{other:?}"),
    });
    raw(dtype, shape, bytes.collect())
}

/// Words of eight nibbles.
fn words(shape: &[usize], nibble: impl Fn(usize, usize) -> u8) -> Stored {
    let count = shape.iter().product();
    let word = |word| (0..8).fold(0_u32, |bits, at| bits | u32::from(nibble(word, at)) << (4 * at));
    raw(Dtype::I32, shape, (0..count).flat_map(|at| word(at).to_le_bytes()).collect())
}

fn ints(shape: &[usize], values: impl Iterator<Item = i32>) -> Stored {
    raw(Dtype::I32, shape, values.flat_map(i32::to_le_bytes).collect())
}

fn e4m3(code: u8) -> f32 {
    let (sign, exponent, mantissa) = (code >> 7, i32::from(code >> 3 & 15), f32::from(code & 7));
    let size = if exponent == 0 { mantissa / 512.0 } else { (1.0 + mantissa / 8.0) * 2_f32.powi(exponent - 7) };
    if sign == 1 { -size } else { size }
}

fn e2m1(code: u8) -> f32 {
    let size = E2M1[usize::from(code & 7)];
    if code & 8 == 0 { size } else { -size }
}

fn values([rows, cols]: [usize; 2], value: impl Fn(usize, usize) -> f32) -> Vec<f32> {
    (0..rows).flat_map(|row| (0..cols).map(move |col| (row, col))).map(|(row, col)| value(row, col)).collect()
}

/// All E4M3 codes but NaN.
fn e4m3_codes(rng: &mut Rng, count: usize) -> Vec<u8> {
    (0..count).map(|_| (rng.below(127) | rng.below(2) << 7) as u8).collect()
}

fn fp8_block(rng: &mut Rng, [rows, cols]: [usize; 2], block: [usize; 2], dtype: Dtype, name: &'static str) -> Built {
    let codes = e4m3_codes(rng, rows * cols);
    let plane = [rows.div_ceil(block[0]), cols.div_ceil(block[1])];
    let (scales, stored) = match dtype {
        Dtype::F8_E8M0 | Dtype::U8 => {
            let bytes: Vec<u8> = rng.bytes(plane[0] * plane[1], 9).iter().map(|byte| byte + 120).collect();
            let scales: Vec<f32> = bytes.iter().map(|byte| 2_f32.powi(i32::from(*byte) - 127)).collect();
            (scales, raw(dtype, &plane, bytes))
        }
        dtype => {
            let scales = rng.scales(plane[0] * plane[1]);
            (scales.clone(), floats(dtype, &plane, &scales))
        }
    };
    let found = values([rows, cols], |row, col| {
        e4m3(codes[row * cols + col]) * scales[row / block[0] * plane[1] + col / block[1]]
    });
    (vec![("weight", raw(Dtype::F8_E4M3, &[rows, cols], codes)), (name, stored)], found)
}

/// One scale a matrix (`shape` []) or a row.
fn whole(rng: &mut Rng, [rows, cols]: [usize; 2], int8: bool, scale: (&'static str, Dtype, &[usize])) -> Built {
    let (name, dtype, shape) = scale;
    let codes = if int8 { rng.bytes(rows * cols, 256) } else { e4m3_codes(rng, rows * cols) };
    let scales = rng.scales(shape.iter().product());
    let code = |code: u8| if int8 { f32::from(code as i8) } else { e4m3(code) };
    let each = scales.len() > 1;
    let found = values([rows, cols], |row, col| code(codes[row * cols + col]) * scales[if each { row } else { 0 }]);
    let codes = raw(if int8 { Dtype::I8 } else { Dtype::F8_E4M3 }, &[rows, cols], codes);
    (vec![("weight", codes), (name, floats(dtype, shape, &scales))], found)
}

fn two_to_a_byte(codes: &[u8]) -> Vec<u8> {
    codes.chunks(2).map(|pair| pair[0] | pair[1] << 4).collect()
}

fn mxfp4(rng: &mut Rng, [rows, cols]: [usize; 2], names: [&'static str; 2], dtypes: [Dtype; 2]) -> Built {
    let codes = rng.bytes(rows * cols, 16);
    let groups = cols.div_ceil(32);
    let scales: Vec<u8> = rng.bytes(rows * groups, 9).iter().map(|byte| byte + 120).collect();
    let found = values([rows, cols], |row, col| {
        e2m1(codes[row * cols + col]) * 2_f32.powi(i32::from(scales[row * groups + col / 32]) - 127)
    });
    let codes = raw(dtypes[0], &[rows, cols / 2], two_to_a_byte(&codes));
    (vec![(names[0], codes), (names[1], raw(dtypes[1], &[rows, groups], scales))], found)
}

/// ModelOpt's, or compressed-tensors', which divides by its global scale.
fn nvfp4(rng: &mut Rng, [rows, cols]: [usize; 2], divides: bool) -> Built {
    let codes = rng.bytes(rows * cols, 16);
    let groups = cols / 16;
    let scales: Vec<u8> = rng.bytes(rows * groups, 0x7e);
    let global = (1 + rng.below(200)) as f32;
    let global = if divides { global } else { 1.0 / global };
    let factor = if divides { 1.0 / global } else { global };
    let found =
        values([rows, cols], |row, col| e2m1(codes[row * cols + col]) * e4m3(scales[row * groups + col / 16]) * factor);
    let codes = raw(Dtype::U8, &[rows, cols / 2], two_to_a_byte(&codes));
    let scales = raw(Dtype::F8_E4M3, &[rows, groups], scales);
    let tensors = match divides {
        true => vec![
            ("weight_packed", codes),
            ("weight_scale", scales),
            ("weight_global_scale", floats(Dtype::F32, &[1], &[global])),
            ("input_global_scale", floats(Dtype::F32, &[1], &[3.0])),
        ],
        false => vec![
            ("weight", codes),
            ("weight_scale", scales),
            ("weight_scale_2", floats(Dtype::F32, &[], &[global])),
            ("input_scale", floats(Dtype::F32, &[], &[0.25])),
        ],
    };
    (tensors, found)
}

#[derive(Clone, Copy)]
enum Packed {
    Ct,
    Gptq { v2: bool },
    Awq,
}

/// How columns are given to groups.
#[derive(Clone, Copy, PartialEq)]
enum Order {
    None,
    Runs,
    Mixed,
}

fn int4(
    rng: &mut Rng,
    [rows, cols]: [usize; 2],
    packed: Packed,
    group: Option<usize>,
    symmetric: bool,
    order: Order,
    dtype: Dtype,
) -> Built {
    let codes = rng.bytes(rows * cols, 16);
    let groups = group.map_or(1, |group| cols.div_ceil(group));
    let scales = rng.scales(rows * groups);
    // At least 1, since the legacy form stores them less 1.
    let zeros: Vec<u8> = match symmetric {
        true => vec![8; rows * groups],
        false => rng.bytes(rows * groups, 15).iter().map(|zero| zero + 1).collect(),
    };
    let mut of: Vec<usize> = (0..cols).map(|col| group.map_or(0, |group| col / group)).collect();
    if order == Order::Mixed {
        (1..cols).for_each(|col| of.swap(col, rng.below(col)));
    }
    let found = values([rows, cols], |row, col| {
        let at = row * groups + of[col];
        (f32::from(codes[row * cols + col]) - f32::from(zeros[at])) * scales[at]
    });
    let by_group: Vec<f32> = (0..groups * rows).map(|at| scales[at % rows * groups + at / rows]).collect();
    let mut tensors = match packed {
        Packed::Ct => {
            let mut tensors = vec![
                ("weight_packed", words(&[rows, cols / 8], |word, at| codes[8 * word + at])),
                ("weight_scale", floats(dtype, &[rows, groups], &scales)),
                ("weight_shape", ints(&[2], [rows as i32, cols as i32].into_iter())),
            ];
            if !symmetric {
                let zero = |word: usize, at: usize| zeros[(word / groups * 8 + at) * groups + word % groups];
                tensors.push(("weight_zero_point", words(&[rows / 8, groups], zero)));
            }
            tensors
        }
        Packed::Gptq { v2 } => {
            let code = |word: usize, at: usize| codes[word % rows * cols + word / rows * 8 + at];
            let zero = |word: usize, at: usize| {
                zeros[(word % (rows / 8) * 8 + at) * groups + word / (rows / 8)] - u8::from(!v2)
            };
            vec![
                ("qweight", words(&[cols / 8, rows], code)),
                ("qzeros", words(&[groups, rows / 8], zero)),
                ("scales", floats(dtype, &[groups, rows], &by_group)),
            ]
        }
        Packed::Awq => {
            let across = rows / 8;
            let code = |word: usize, at: usize| codes[(word % across * 8 + AWQ[at]) * cols + word / across];
            let zero = |word: usize, at: usize| zeros[(word % across * 8 + AWQ[at]) * groups + word / across];
            vec![
                ("qweight", words(&[cols, across], code)),
                ("qzeros", words(&[groups, across], zero)),
                ("scales", floats(dtype, &[groups, rows], &by_group)),
            ]
        }
    };
    if order != Order::None {
        let name = if matches!(packed, Packed::Ct) { "weight_g_idx" } else { "g_idx" };
        tensors.push((name, ints(&[cols], of.iter().map(|group| *group as i32))));
    }
    (tensors, found)
}

/// A checkpoint whose experts are built by `build`, and their values: gate, up and down of each.
fn checkpoint(quantization: Value, build: impl Fn(&mut Rng, [usize; 2]) -> Built) -> (Sample, Vec<[Vec<f32>; 3]>) {
    let mut sample = Sample::golden("qwen3_moe").set("quantization_config", quantization);
    let mut rng = Rng(7);
    let experts = (0..8).map(|id| {
        ["gate_proj", "up_proj", "down_proj"].map(|part| {
            let stem = format!("{LAYER}.{id}.{part}");
            let shape = sample.take(&format!("{stem}.weight")).shape;
            let (tensors, values) = build(&mut rng, [shape[0], shape[1]]);
            sample.tensors.extend(tensors.into_iter().map(|(name, tensor)| (format!("{stem}.{name}"), tensor)));
            values
        })
    });
    let experts = experts.collect();
    (sample, experts)
}

fn read(matrix: &Matrix<'_>) -> Vec<f32> {
    values(matrix.shape(), |row, col| matrix.get(row, col))
}

#[track_caller]
fn agrees(sample: &Sample, experts: &[[Vec<f32>; 3]], format: WeightFormat) {
    let checkpoint = sample.open();
    let resolved = resolve(&checkpoint, &ANY).unwrap();
    assert_eq!(resolved.spec.experts.format, format);
    assert_eq!(resolved.unknown_keys, [""; 0]);
    let weights = resolved.weights(&checkpoint).unwrap();
    for (expert, [gate, up, down]) in weights.experts.iter().zip(experts) {
        for (matrix, expected) in [(expert.gate.as_ref().unwrap(), gate), (&expert.up, up), (&expert.down, down)] {
            assert!(read(matrix) == *expected, "{} as {format:?}", matrix.name());
        }
    }
}

fn fp8_config(block: Value) -> Value {
    json!({"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": block})
}

fn ct(format: &str, weights: Value) -> Value {
    json!({"quant_method": "compressed-tensors", "format": format, "quantization_status": "compressed",
           "kv_cache_scheme": null, "global_compression_ratio": null, "ignore": ["lm_head"],
           "sparsity_config": {}, "transform_config": {}, "version": "0.12.0",
           "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": null,
                                         "output_activations": null}}})
}

fn ct_int4(group: Option<usize>, symmetric: bool, actorder: Value) -> Value {
    let strategy = if group.is_some() { "group" } else { "channel" };
    let weights = json!({"num_bits": 4, "type": "int", "symmetric": symmetric, "strategy": strategy, "dynamic": false,
                         "group_size": group, "actorder": actorder, "block_structure": null, "observer": "minmax",
                         "observer_kwargs": {}});
    ct("pack-quantized", weights)
}

fn ct_weights(format: &str, kind: &str, bits: usize, strategy: &str, group: Option<usize>, block: Value) -> Value {
    let weights = json!({"num_bits": bits, "type": kind, "symmetric": true, "strategy": strategy, "dynamic": false,
                         "group_size": group, "block_structure": block});
    ct(format, weights)
}

fn gptq(group: i64, sym: bool, desc_act: bool, form: Option<&str>) -> Value {
    let mut config = json!({"quant_method": "gptq", "bits": 4, "group_size": group, "sym": sym, "desc_act": desc_act,
                            "damp_percent": 0.1, "true_sequential": true, "static_groups": false, "lm_head": false});
    if let Some(form) = form {
        config["checkpoint_format"] = json!(form);
    }
    config
}

fn modelopt(algorithm: &str) -> Value {
    json!({"quant_method": "modelopt", "quant_algo": algorithm, "ignore": ["lm_head"], "producer": {"name": "modelopt"},
           "kv_cache_scheme": null, "config_groups": {}})
}

fn int4_format(group: Option<usize>, scale: ScaleFormat, zero_points: bool, act_order: bool) -> WeightFormat {
    WeightFormat::Int4 { group, scale, zero_points, act_order }
}

#[test]
fn fp8_of_blocks_of_any_shape() {
    for (block, config) in
        [([128, 128], json!([128, 128])), ([32, 32], json!(32)), ([24, 80], json!([24, 80])), ([1, 7], json!([1, 7]))]
    {
        for (dtype, scale) in [
            (Dtype::F32, ScaleFormat::F32),
            (Dtype::BF16, ScaleFormat::Bf16),
            (Dtype::F8_E8M0, ScaleFormat::E8m0),
            (Dtype::U8, ScaleFormat::E8m0),
        ] {
            let build = |rng: &mut Rng, shape| fp8_block(rng, shape, block, dtype, "weight_scale_inv");
            let (sample, experts) = checkpoint(fp8_config(config.clone()), build);
            agrees(&sample, &experts, WeightFormat::Fp8Block { block, scale });
        }
    }
    let weights = ct_weights("float-quantized", "float", 8, "block", None, json!([128, 128]));
    let (sample, experts) =
        checkpoint(weights, |rng, shape| fp8_block(rng, shape, [128, 128], Dtype::BF16, "weight_scale"));
    agrees(&sample, &experts, WeightFormat::Fp8Block { block: [128, 128], scale: ScaleFormat::Bf16 });
}

#[test]
fn mxfp8_has_exponents_of_32_columns() {
    let format = WeightFormat::Fp8Block { block: [1, 32], scale: ScaleFormat::E8m0 };
    for (config, dtype, name) in [
        (
            json!({"quant_method": "mxfp8", "activation_scheme": "dynamic", "fmt": "e4m3"}),
            Dtype::U8,
            "weight_scale_inv",
        ),
        (json!({"quant_method": "mxfp8", "weight_block_size": [1, 32]}), Dtype::F8_E8M0, "weight_scale"),
        (modelopt("MXFP8"), Dtype::U8, "weight_scale"),
        (ct_weights("mxfp8-quantized", "float", 8, "group", Some(32), json!(null)), Dtype::U8, "weight_scale"),
    ] {
        let (sample, experts) = checkpoint(config, |rng, shape| fp8_block(rng, shape, [1, 32], dtype, name));
        agrees(&sample, &experts, format);
    }
    let (sample, _) =
        checkpoint(modelopt("MXFP8"), |rng, shape| fp8_block(rng, shape, [1, 32], Dtype::F32, "weight_scale"));
    says(&sample.refusal(), &["experts.0.gate_proj.weight_scale.dtype", "F32", "MXFP8"]);
}

#[test]
fn scales_of_a_matrix_and_of_rows() {
    let tensor = ct_weights("float-quantized", "float", 8, "tensor", None, json!(null));
    let channel = ct_weights("float-quantized", "float", 8, "channel", None, json!(null));
    let naive = ct_weights("naive-quantized", "float", 8, "channel", None, json!(null));
    let int8 = ct_weights("int-quantized", "int", 8, "channel", None, json!(null));
    let naive_int8 = ct_weights("naive-quantized", "int", 8, "channel", None, json!(null));
    let cases = [
        (fp8_config(json!(null)), "weight_scale_inv", Dtype::F32, 0, WeightFormat::Fp8Tensor),
        (fp8_config(json!(null)), "weight_scale", Dtype::F32, 1, WeightFormat::Fp8Tensor),
        (fp8_config(json!(null)), "weight_scale", Dtype::BF16, 3, WeightFormat::Fp8Channel),
        (fp8_config(json!(null)), "weight_scale", Dtype::F32, 2, WeightFormat::Fp8Channel),
        (modelopt("FP8"), "weight_scale", Dtype::F32, 0, WeightFormat::Fp8Tensor),
        (modelopt("FP8_PER_CHANNEL_PER_TOKEN"), "weight_scale", Dtype::F32, 2, WeightFormat::Fp8Channel),
        (tensor, "weight_scale", Dtype::BF16, 1, WeightFormat::Fp8Tensor),
        (channel, "weight_scale", Dtype::BF16, 3, WeightFormat::Fp8Channel),
        (naive, "weight_scale", Dtype::F32, 3, WeightFormat::Fp8Channel),
        (int8, "weight_scale", Dtype::BF16, 3, WeightFormat::Int8Channel),
        (naive_int8, "weight_scale", Dtype::F32, 2, WeightFormat::Int8Channel),
    ];
    for (config, name, dtype, shape, format) in cases {
        let (sample, experts) = checkpoint(config, |rng, [rows, cols]| {
            let shapes: [&[usize]; 4] = [&[], &[1], &[rows], &[rows, 1]];
            whole(rng, [rows, cols], format == WeightFormat::Int8Channel, (name, dtype, shapes[shape]))
        });
        agrees(&sample, &experts, format);
    }
    // Blocks that the config does not mention.
    let (sample, _) = checkpoint(fp8_config(json!(null)), |rng, shape| {
        fp8_block(rng, shape, [16, 16], Dtype::F32, "weight_scale_inv")
    });
    says(&sample.refusal(), &["experts.0.gate_proj.weight_scale_inv", "[3, 12]", "Fp8Tensor, Fp8Channel"]);
}

#[test]
fn four_bit_floats() {
    let u8s = [Dtype::U8, Dtype::U8];
    let ct_mx = ct_weights("mxfp4-pack-quantized", "float", 4, "group", Some(32), json!(null));
    for (config, names, dtypes) in [
        (ct_mx, ["weight_packed", "weight_scale"], u8s),
        (modelopt("W4A8_MXFP4_FP8"), ["weight", "weight_scale"], u8s),
        (json!({"quant_method": "mxfp4"}), ["weight", "weight_scale"], [Dtype::U8, Dtype::F8_E8M0]),
        (
            json!({"quant_method": "fp8", "weight_block_size": [128, 128], "expert_dtype": "fp4"}),
            ["weight", "scale"],
            [Dtype::I8, Dtype::F8_E8M0],
        ),
    ] {
        let (sample, experts) = checkpoint(config, |rng, shape| mxfp4(rng, shape, names, dtypes));
        agrees(&sample, &experts, WeightFormat::Mxfp4);
    }
    let (sample, experts) = checkpoint(modelopt("NVFP4"), |rng, shape| nvfp4(rng, shape, false));
    agrees(&sample, &experts, WeightFormat::Nvfp4);
    let note = "quant_algo = NVFP4 of the checkpoint is not applied";
    says(&sample.resolve().unwrap().notes[0], &[note, "activations stay unquantised"]);
    let nested = json!({"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4", "group_size": 16,
                        "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]}});
    agrees(&sample.set("quantization_config", nested), &experts, WeightFormat::Nvfp4);
    let config = ct_weights("nvfp4-pack-quantized", "float", 4, "tensor_group", Some(16), json!(null));
    let (sample, experts) = checkpoint(config, |rng, shape| nvfp4(rng, shape, true));
    agrees(&sample, &experts, WeightFormat::Nvfp4);
}

/// vLLM #54974: one global scale for gate and up.
#[test]
fn bug_27_gate_and_up_keep_their_global_scales() {
    for divides in [false, true] {
        let config = match divides {
            false => modelopt("NVFP4"),
            true => ct_weights("nvfp4-pack-quantized", "float", 4, "tensor_group", Some(16), json!(null)),
        };
        let (sample, experts) = checkpoint(config, |rng, shape| nvfp4(rng, shape, divides));
        let global = if divides { "weight_global_scale" } else { "weight_scale_2" };
        let scale = |part: &str| sample.tensors[&format!("{LAYER}.0.{part}.{global}")].bytes.clone();
        assert_ne!(scale("gate_proj"), scale("up_proj"));
        agrees(&sample, &experts, WeightFormat::Nvfp4);
    }
}

#[test]
fn four_bit_integers() {
    let (bf16, f16) = (ScaleFormat::Bf16, ScaleFormat::F16);
    for group in [Some(32), Some(64), Some(128), Some(48), None] {
        for (symmetric, order) in [
            (true, Order::None),
            (false, Order::None),
            (true, Order::Runs),
            (false, Order::Mixed),
            (true, Order::Mixed),
        ] {
            if group.is_none() && order != Order::None {
                continue;
            }
            let actorder = if order == Order::None { json!("weight") } else { json!("group") };
            let (sample, experts) = checkpoint(ct_int4(group, symmetric, actorder), |rng, shape| {
                int4(rng, shape, Packed::Ct, group, symmetric, order, Dtype::BF16)
            });
            agrees(&sample, &experts, int4_format(group, bf16, !symmetric, order == Order::Mixed));
        }
        for (symmetric, form) in
            [(true, None), (true, Some("gptq")), (true, Some("gptq_v2")), (false, None), (false, Some("gptq_v2"))]
        {
            for order in [Order::Runs, Order::Mixed] {
                if group.is_none() && order == Order::Mixed {
                    continue;
                }
                let v2 = form == Some("gptq_v2");
                let size = group.map_or(-1, |group| group as i64);
                let config = gptq(size, symmetric, order == Order::Mixed, form);
                let (sample, experts) = checkpoint(config, |rng, shape| {
                    int4(rng, shape, Packed::Gptq { v2 }, group, symmetric, order, Dtype::F16)
                });
                agrees(&sample, &experts, int4_format(group, f16, !symmetric, order == Order::Mixed));
            }
        }
        for zero_point in [true, false] {
            let size = group.map_or(-1, |group| group as i64);
            let config = json!({"quant_method": "awq", "bits": 4, "group_size": size, "zero_point": zero_point,
                                "version": "gemm", "modules_to_not_convert": null});
            let old = json!({"quant_method": "awq", "w_bit": 4, "q_group_size": size, "zero_point": zero_point,
                             "version": "GEMM"});
            let (sample, experts) = checkpoint(config, |rng, shape| {
                int4(rng, shape, Packed::Awq, group, !zero_point, Order::None, Dtype::F16)
            });
            agrees(&sample, &experts, int4_format(group, f16, zero_point, false));
            agrees(&sample.set("quantization_config", old), &experts, int4_format(group, f16, zero_point, false));
        }
    }
}

#[test]
fn an_order_of_columns_may_be_trivial_in_some_matrices_or_all() {
    let build = |order| {
        move |rng: &mut Rng, shape| int4(rng, shape, Packed::Gptq { v2: false }, Some(32), true, order, Dtype::F16)
    };
    // Said to be ordered, stored in runs.
    let (runs, experts) = checkpoint(gptq(32, true, true, None), build(Order::Runs));
    agrees(&runs, &experts, int4_format(Some(32), ScaleFormat::F16, false, false));
    // Only down has an order, so that gate and up keep their trivial one.
    let (mixed, experts) = checkpoint(gptq(32, true, true, None), |rng, shape| {
        build(if shape[0] == 192 { Order::Mixed } else { Order::Runs })(rng, shape)
    });
    agrees(&mixed, &experts, int4_format(Some(32), ScaleFormat::F16, false, true));
    // Said to be in runs, stored in an order.
    let (sample, _) = checkpoint(gptq(32, true, false, None), build(Order::Mixed));
    says(&sample.refusal(), &["experts.0.gate_proj.g_idx", "runs of columns", "desc_act"]);
    let (sample, _) = checkpoint(gptq(32, true, true, None), build(Order::None));
    says(&sample.refusal(), &["experts.0.gate_proj.g_idx"]);
}

#[test]
fn modules_may_differ_in_their_scheme() {
    let mut config = modelopt("MIXED_PRECISION");
    config["quantized_layers"] = json!({"a": {"quant_algo": "FP8"}, "b": {"quant_algo": "NVFP4", "group_size": 16}});
    let (sample, experts) = checkpoint(config, |rng, shape| nvfp4(rng, shape, false));
    agrees(&sample, &experts, WeightFormat::Nvfp4);
    // Two groups of compressed-tensors: the number of scales says which.
    let mut config = ct_int4(Some(32), true, json!(null));
    let other = ct_int4(Some(64), true, json!(null))["config_groups"]["group_0"].clone();
    config["config_groups"]["group_1"] = other;
    config["config_groups"]["group_2"] =
        ct_weights("float-quantized", "float", 8, "channel", None, json!(null))["config_groups"]["group_0"].clone();
    config["config_groups"]["group_2"]["format"] = json!("float-quantized");
    for group in [32, 64] {
        let (sample, experts) = checkpoint(config.clone(), |rng, [rows, cols]| {
            int4(rng, [rows, cols], Packed::Ct, Some(group), true, Order::None, Dtype::BF16)
        });
        // 48 columns are one group of 64, and two of 32.
        agrees(&sample, &experts, int4_format(Some(group), ScaleFormat::Bf16, false, false));
    }
    // Neither.
    let (sample, _) =
        checkpoint(config, |rng, shape| int4(rng, shape, Packed::Ct, Some(16), true, Order::None, Dtype::BF16));
    says(&sample.refusal(), &["experts.0.gate_proj.weight_scale", "[48, 12]"]);
    // An expert of its own kind.
    let (mut sample, _) = checkpoint(fp8_config(json!(null)), |rng, [rows, cols]| {
        whole(rng, [rows, cols], false, ("weight_scale", Dtype::F32, &[]))
    });
    let name = format!("{LAYER}.3.up_proj.weight_scale");
    sample.tensors.insert(name, floats(Dtype::F32, &[48], &[1.0; 48]));
    says(&sample.refusal(), &["experts.3.up_proj.weight", "Fp8Channel", "Fp8Tensor"]);
}

#[test]
fn what_is_stored_has_to_be_what_the_config_says() {
    let (sample, _) = checkpoint(gptq(32, true, false, None), |rng, shape| nvfp4(rng, shape, false));
    says(&sample.refusal(), &["experts.0.gate_proj.weight", "U8 weights", "quant_method = gptq"]);
    let (sample, _) = checkpoint(fp8_config(json!([128, 128])), |rng, shape| {
        mxfp4(rng, shape, ["weight", "scale"], [Dtype::I8, Dtype::F8_E8M0])
    });
    says(&sample.refusal(), &["experts.0.gate_proj.weight", "I8 weights", "quant_method = fp8"]);
    let (sample, _) =
        checkpoint(fp8_config(json!(null)), |rng, shape| fp8_block(rng, shape, [1, 32], Dtype::F32, "weight_scale"));
    let sample = sample.unset("quantization_config");
    says(&sample.refusal(), &["F8_E4M3 weights and no quantization_config"]);
    let (sample, _) = checkpoint(
        json!({"quant_method": "fp8", "weight_block_size": [128, 128], "expert_dtype": "fp4"}),
        |rng, shape| fp8_block(rng, shape, [128, 128], Dtype::F32, "weight_scale_inv"),
    );
    says(&sample.refusal(), &["expert_dtype", "found fp4", "Fp8Block"]);
    // ROCm's codes, and those with a wider range.
    for dtype in [Dtype::F8_E4M3FNUZ, Dtype::F8_E5M2] {
        let (mut sample, _) = checkpoint(fp8_config(json!(null)), |rng, shape| {
            whole(rng, shape, false, ("weight_scale", Dtype::F32, &[]))
        });
        for (_, tensor) in sample.tensors.iter_mut().filter(|(_, tensor)| tensor.dtype == Dtype::F8_E4M3) {
            tensor.dtype = dtype;
        }
        let error = sample.resolve().unwrap_err();
        let Error::Unsupported(Unsupported { field, value, .. }) = &error else { panic!("{error}") };
        says(field, &["experts.0.gate_proj.weight.dtype"]);
        assert_eq!(*value, format!("{dtype:?}"));
    }
}

#[test]
fn settings_without_an_implementation_are_refused_by_name() {
    let with = |mut config: Value, key: &str, value: Value| {
        config[key] = value;
        config
    };
    let weights = |mut config: Value, key: &str, value: Value| {
        config["config_groups"]["group_0"]["weights"][key] = value;
        config
    };
    let int4 = || ct_int4(Some(32), true, json!(null));
    let awq = json!({"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": true, "version": "gemm"});
    for (config, key) in [
        (json!({"quant_method": "bitsandbytes"}), "quant_method"),
        (json!({"quant_method": "quark"}), "quant_method"),
        (json!({"quant_method": "mxint4"}), "quant_method"),
        (json!({"fmt": "e4m3"}), "quant_method"),
        (with(fp8_config(json!(null)), "fmt", json!("e4m3fnuz")), "fmt"),
        (with(fp8_config(json!(null)), "fmt", json!("e5m2")), "fmt"),
        (with(fp8_config(json!(null)), "scale_fmt", json!("e4m3")), "scale_fmt"),
        (with(fp8_config(json!(null)), "activation_scheme", json!("sometimes")), "activation_scheme"),
        (with(fp8_config(json!(null)), "expert_dtype", json!("fp6")), "expert_dtype"),
        (fp8_config(json!([128])), "weight_block_size"),
        (fp8_config(json!([128, 128, 1])), "weight_block_size"),
        (fp8_config(json!([0, 128])), "weight_block_size"),
        (fp8_config(json!([128, -1])), "weight_block_size"),
        (fp8_config(json!(1.5)), "weight_block_size"),
        (fp8_config(json!("128")), "weight_block_size"),
        (json!({"quant_method": "mxfp8", "weight_block_size": [128, 128]}), "weight_block_size"),
        (modelopt("W4A8_AWQ"), "quant_algo"),
        (with(modelopt("NVFP4"), "group_size", json!(32)), "group_size"),
        (modelopt("MIXED_PRECISION"), "quantized_layers"),
        (with(modelopt("MIXED_PRECISION"), "quantized_layers", json!({"a": {}})), "quantized_layers.a.quant_algo"),
        (with(int4(), "format", json!("marlin-24")), "format"),
        (with(int4(), "format", json!("int-quantized")), "weights.format"),
        (with(int4(), "sparsity_config", json!({"format": "sparse-24-bitmask"})), "sparsity_config"),
        (with(int4(), "transform_config", json!({"config_groups": {"u": {}}})), "transform_config"),
        (with(int4(), "config_groups", json!([])), "config_groups"),
        (weights(int4(), "num_bits", json!(3)), "config_groups.group_0.weights.num_bits"),
        (weights(int4(), "type", json!("fixed")), "weights.type"),
        (weights(int4(), "strategy", json!("token")), "weights.strategy"),
        (weights(int4(), "strategy", json!("tensor")), "weights.strategy"),
        (weights(int4(), "group_size", json!(0)), "weights.group_size"),
        (weights(int4(), "symmetric", json!(null)), "weights.symmetric"),
        (weights(int4(), "dynamic", json!(true)), "weights.dynamic"),
        (weights(int4(), "actorder", json!("random")), "weights.actorder"),
        (
            weights(ct_weights("int-quantized", "int", 8, "channel", None, json!(null)), "symmetric", json!(false)),
            "weights.symmetric",
        ),
        (with(gptq(128, true, false, None), "bits", json!(8)), "bits"),
        (with(gptq(128, true, false, None), "checkpoint_format", json!("marlin")), "checkpoint_format"),
        (with(gptq(128, true, false, Some("gptq")), "format", json!("gptq_v2")), "format"),
        (with(gptq(128, true, false, None), "dynamic", json!({"+:.*down.*": {"bits": 8}})), "dynamic"),
        (with(gptq(128, true, false, None), "sym", json!(null)), "sym"),
        (with(gptq(128, true, false, None), "group_size", json!(-2)), "group_size"),
        (with(awq.clone(), "version", json!("gemv")), "version"),
        (with(awq.clone(), "bits", json!(8)), "bits"),
        (with(awq.clone(), "w_bit", json!(3)), "w_bit"),
    ] {
        let error = Sample::golden("qwen3_moe").set("quantization_config", config.clone()).resolve().unwrap_err();
        let field = match &error {
            Error::Unsupported(Unsupported { field, .. }) | Error::Invalid { field, .. } => field,
            other => panic!("{other}"),
        };
        assert!(field.starts_with("quantization_config.") && field.ends_with(key), "{config}: {error}");
    }
    let twice = Sample::golden("qwen3_moe")
        .set("quantization_config", json!({"quant_method": "fp8", "expert_dtype": "fp8"}))
        .set("expert_dtype", "fp4");
    says(&twice.refusal(), &["quantization_config.expert_dtype: found fp8", "expert_dtype = fp4"]);
}

/// Changes one tensor of expert 0.
#[track_caller]
fn fault(sample: &Sample, part: &str, change: impl Fn(&mut Stored), expected: &[&str]) {
    let name = format!("{LAYER}.0.{part}");
    let mut sample = sample.clone();
    change(sample.tensors.get_mut(&name).unwrap());
    let text = sample.refusal();
    says(&text, &[&name]);
    says(&text, expected);
}

#[test]
fn tensors_that_are_missing_misshapen_or_damaged_are_named() {
    let samples = [
        checkpoint(fp8_config(json!([32, 32])), |rng, shape| {
            fp8_block(rng, shape, [32, 32], Dtype::F32, "weight_scale_inv")
        }),
        checkpoint(fp8_config(json!([32, 32])), |rng, shape| fp8_block(rng, shape, [32, 32], Dtype::F8_E8M0, "scale")),
        checkpoint(fp8_config(json!(null)), |rng, shape| whole(rng, shape, false, ("weight_scale", Dtype::F32, &[]))),
        checkpoint(ct_weights("int-quantized", "int", 8, "channel", None, json!(null)), |rng, shape| {
            whole(rng, shape, true, ("weight_scale", Dtype::BF16, &[shape[0], 1]))
        }),
        checkpoint(json!({"quant_method": "mxfp4"}), |rng, shape| {
            mxfp4(rng, shape, ["weight", "weight_scale"], [Dtype::U8, Dtype::U8])
        }),
        checkpoint(modelopt("NVFP4"), |rng, shape| nvfp4(rng, shape, false)),
        checkpoint(ct_int4(Some(32), false, json!(null)), |rng, shape| {
            int4(rng, shape, Packed::Ct, Some(32), false, Order::None, Dtype::BF16)
        }),
        checkpoint(gptq(32, false, false, None), |rng, shape| {
            int4(rng, shape, Packed::Gptq { v2: false }, Some(32), false, Order::Runs, Dtype::F16)
        }),
        checkpoint(
            json!({"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": true, "version": "gemm"}),
            |rng, shape| int4(rng, shape, Packed::Awq, Some(32), false, Order::None, Dtype::F16),
        ),
    ];
    for (sample, _) in &samples {
        let stem = format!("{LAYER}.0.gate_proj.");
        let parts: Vec<String> =
            sample.tensors.keys().filter_map(|name| name.strip_prefix(&stem)).map(str::to_owned).collect();
        for part in parts {
            let (one, name) = (format!("gate_proj.{part}"), format!("{stem}{part}"));
            let free = ["input_scale", "weight_shape", "g_idx"].contains(&part.as_str());
            if !free {
                let mut less = sample.clone();
                let tensor = less.take(&name);
                let error = less.resolve().unwrap_err();
                assert!(matches!(error, Error::MissingTensor { .. }), "{name}: {error}");
                says(&error.to_string(), &[&name]);
                // A name that nobody has a use for.
                let wrong = Stored { dtype: tensor.dtype, shape: vec![1, 1, 1, 1, 1], bytes: vec![0; 8] };
                let wrong = Stored { bytes: wrong.bytes[..tensor.dtype.bitsize() / 8].to_vec(), ..wrong };
                fault(sample, &one, |tensor| *tensor = wrong.clone(), &["1, 1, 1, 1"]);
            }
            let surplus = format!("{stem}mystery");
            says(&sample.clone().zeros(&surplus, Dtype::F32, &[1]).refusal(), &[&surplus, "has a use"]);
            let scale = part.contains("scale") && part != "input_scale";
            let dtype = sample.tensors[&name].dtype;
            let values: &[f32] = match (scale, dtype) {
                (false, _) => &[],
                // NVFP4's blocks may be zeros.
                (true, Dtype::F8_E4M3) => &[f32::NAN, -1.0],
                (true, Dtype::F8_E8M0 | Dtype::U8) => &[f32::NAN],
                (true, _) => &[0.0, -1.0, f32::NAN, f32::INFINITY],
            };
            for value in values {
                let bits = value.to_bits();
                let bytes = match dtype {
                    Dtype::F32 => bits.to_le_bytes().to_vec(),
                    Dtype::BF16 => ((bits >> 16) as u16).to_le_bytes().to_vec(),
                    Dtype::F16 if value.is_nan() => vec![0, 0x7e],
                    Dtype::F16 if value.is_infinite() => vec![0, 0x7c],
                    Dtype::F16 if *value < 0.0 => vec![0, 0xbc],
                    Dtype::F16 => vec![0, 0],
                    Dtype::F8_E4M3 if value.is_nan() => vec![0x7f],
                    Dtype::F8_E4M3 => vec![0xb8],
                    _ => vec![255],
                };
                fault(sample, &one, |tensor| tensor.bytes[..bytes.len()].copy_from_slice(&bytes), &["a scale of"]);
            }
        }
    }

    let (sample, _) = checkpoint(ct_int4(Some(32), true, json!(null)), |rng, shape| {
        int4(rng, shape, Packed::Ct, Some(32), true, Order::None, Dtype::BF16)
    });
    let wrong = ints(&[2], [192, 48].into_iter());
    fault(&sample, "gate_proj.weight_shape", |tensor| *tensor = wrong.clone(), &["[192, 48]", "[48, 192]"]);
    let (sample, _) = checkpoint(gptq(32, true, true, None), |rng, shape| {
        int4(rng, shape, Packed::Gptq { v2: false }, Some(32), true, Order::Mixed, Dtype::F16)
    });
    for group in [6_i32, -1] {
        let change = |tensor: &mut Stored| tensor.bytes[..4].copy_from_slice(&group.to_le_bytes());
        fault(&sample, "gate_proj.g_idx", change, &[&format!("group {group}"), "groups in 0..6"]);
    }
    // Zeros other than the middle beside "sym".
    let change = |tensor: &mut Stored| tensor.bytes[0] = 0x78;
    fault(&sample, "gate_proj.qzeros", change, &["zero point", "8 in symmetric weights"]);
}

#[test]
fn gpt_oss_experts_of_four_bits_are_interleaved() {
    let sample = Sample::golden("mxfp4_gpt_oss");
    let checkpoint = sample.open();
    let resolved = resolve(&checkpoint, &ANY).unwrap();
    let ExpertMlp { format, gate_up_layout, orientation, .. } = resolved.spec.experts;
    assert_eq!(
        (format, gate_up_layout, orientation),
        (WeightFormat::Mxfp4, GateUpLayout::Interleaved, Orientation::OutIn)
    );
    assert_eq!((resolved.notes, resolved.unknown_keys), (vec![], vec![]));
    let resolved = resolve(&checkpoint, &ANY).unwrap();
    let weights = resolved.weights(&checkpoint).unwrap();
    let (hidden, inner) = (192, 96);
    let bytes = |name: &str| sample.tensors[&format!("model.layers.3.mlp.experts.{name}")].bytes.clone();
    let value = |codes: &[u8], scales: &[u8], index: usize| {
        let scale = 2_f32.powi(i32::from(scales[index / 32]) - 127);
        e2m1(codes[index / 2] >> (4 * (index % 2)) & 15) * scale
    };
    let [both, both_scales] = ["gate_up_proj_blocks", "gate_up_proj_scales"].map(bytes);
    let [last, last_scales] = ["down_proj_blocks", "down_proj_scales"].map(bytes);
    for (id, expert) in weights.experts.iter().enumerate() {
        let gate = expert.gate.as_ref().unwrap();
        for row in 0..inner {
            for col in 0..hidden {
                let at = |part| ((id * inner + row) * 2 + part) * hidden + col;
                let expected = [0, 1].map(|part| value(&both, &both_scales, at(part)));
                assert_eq!([gate.get(row, col), expert.up.get(row, col)], expected);
                assert_eq!(expert.down.get(col, row), value(&last, &last_scales, (id * hidden + col) * inner + row));
            }
        }
        assert_eq!(expert.gate_bias.as_ref().unwrap().len(), inner);
    }
    let mut less = sample.clone();
    less.take("model.layers.3.mlp.experts.down_proj_scales");
    says(&less.refusal(), &["model.layers.3.mlp.experts.down_proj_scales"]);
    says(&sample.unset("quantization_config").refusal(), &["gate_up_proj_blocks", "no quantization_config"]);
}

#[test]
fn golden_cases_of_other_formats_resolve() {
    for (case, format, shared) in [
        ("mxfp4_gpt_oss", WeightFormat::Mxfp4, None),
        ("nvfp4_qwen3_moe", WeightFormat::Nvfp4, None),
        ("int4_ct_kimi_k2", int4_format(Some(32), ScaleFormat::Bf16, false, false), Some(WeightFormat::Bf16)),
        (
            "fp4_deepseek_v4",
            WeightFormat::Mxfp4,
            Some(WeightFormat::Fp8Block { block: [128, 128], scale: ScaleFormat::E8m0 }),
        ),
    ] {
        let checkpoint = Sample::golden(case).open();
        let resolved = resolve(&checkpoint, &ANY).unwrap();
        assert_eq!(resolved.spec.experts.format, format, "{case}");
        assert_eq!(resolved.spec.shared.as_ref().map(|shared| shared.mlp.format), shared, "{case}");
        assert_eq!(resolved.unknown_keys, [""; 0], "{case}");
        resolved.weights(&checkpoint).unwrap();
    }
    // DeepSeek-V4.1 says it inside, and has smaller blocks; the shared expert's scales are then too few.
    let mut v4 = Sample::golden("fp4_deepseek_v4").unset("expert_dtype");
    v4.config["quantization_config"]["expert_dtype"] = json!("fp4");
    assert_eq!(v4.resolve().unwrap().spec.experts.format, WeightFormat::Mxfp4);
    v4.config["quantization_config"]["weight_block_size"] = json!([32, 32]);
    says(&v4.refusal(), &["shared_experts.w1.scale", "[4, 4]"]);
}

#[test]
fn activations_become_codes_where_the_weights_allow_it() {
    let dynamic =
        |code, span| ActivationQuant::Dynamic { code, span, rule: ScaleRule::FlooredAmax, scale: ActivationScale::F32 };
    let fp8 = dynamic(ActivationCode::E4m3, ScaleSpan::Token);
    let int8 = dynamic(ActivationCode::Int8, ScaleSpan::Token);
    let order = |order, desc_act| {
        checkpoint(gptq(32, true, desc_act, None), |rng, shape| {
            int4(rng, shape, Packed::Gptq { v2: false }, Some(32), true, order, Dtype::F16)
        })
        .0
    };
    let ct8 = checkpoint(ct_weights("int-quantized", "int", 8, "channel", None, json!(null)), |rng, shape| {
        whole(rng, shape, true, ("weight_scale", Dtype::F32, &[shape[0], 1]))
    });
    let tensor =
        checkpoint(fp8_config(json!(null)), |rng, shape| whole(rng, shape, false, ("weight_scale", Dtype::F32, &[])));
    for (sample, takes_fp8, takes_int8) in [
        (tensor.0, true, false),
        (ct8.0, false, true),
        (order(Order::Runs, false), true, true),
        (order(Order::Mixed, true), false, false),
        (Sample::golden("nvfp4_qwen3_moe"), true, false),
        (Sample::golden("mxfp4_gpt_oss"), true, false),
        (Sample::golden("fp4_deepseek_v4"), true, false),
        (Sample::golden("qwen3_moe"), false, false),
    ] {
        for (activations, takes) in [(fp8, takes_fp8), (int8, takes_int8)] {
            let result = resolve(&sample.open(), &Request { activations, ..ANY });
            match takes {
                true => assert_eq!(result.unwrap().spec.experts.activation_quant, activations),
                false => {
                    let error = result.unwrap_err();
                    let Error::Unsupported(Unsupported { field, .. }) = &error else { panic!("{error}") };
                    assert_eq!(field, "activations");
                }
            }
        }
    }
}

#[test]
fn static_scales_are_read_where_every_expert_has_them() {
    let request = Request { activations: ActivationQuant::Static { code: ActivationCode::E4m3 }, ..ANY };
    let mut config = fp8_config(json!(null));
    config["activation_scheme"] = json!("static");
    let (mut sample, _) = checkpoint(config, |rng, shape| whole(rng, shape, false, ("weight_scale", Dtype::F32, &[])));
    let error = resolve(&sample.open(), &request).unwrap_err().to_string();
    says(&error, &["activations", "Static", "input_scale"]);
    for id in 0..8 {
        for (part, scale) in [("gate_proj", 0.5), ("up_proj", 0.5), ("down_proj", 0.25 + id as f32)] {
            let shape: &[usize] = if id % 2 == 0 { &[] } else { &[1] };
            sample.tensors.insert(format!("{LAYER}.{id}.{part}.input_scale"), floats(Dtype::F32, shape, &[scale]));
        }
    }
    let note = "activation_scheme = static of the checkpoint is not applied";
    says(&sample.resolve().unwrap().notes[0], &[note]);
    let checkpoint = sample.open();
    let resolved = resolve(&checkpoint, &request).unwrap();
    assert_eq!(resolved.spec.experts.activation_quant, request.activations);
    let weights = resolved.weights(&checkpoint).unwrap();
    for (id, expert) in weights.experts.iter().enumerate() {
        assert_eq!(expert.input_scales, Some(InputScales { gate_up: 0.5, down: 0.25 + id as f32 }));
    }
    for (part, tensor, expected) in [
        ("2.gate_proj", Some(floats(Dtype::F32, &[], &[0.75])), "0.5"),
        ("2.down_proj", Some(floats(Dtype::F32, &[], &[0.0])), "positive"),
        ("2.down_proj", Some(floats(Dtype::F32, &[], &[f32::NAN])), "finite"),
        ("2.down_proj", Some(floats(Dtype::F32, &[2], &[1.0, 1.0])), "[2]"),
        ("2.down_proj", None, "input_scale"),
    ] {
        let mut broken = sample.clone();
        let name = format!("{LAYER}.{part}.input_scale");
        broken.take(&name);
        broken.tensors.extend(tensor.map(|tensor| (name, tensor)));
        let error = resolve(&broken.open(), &request).unwrap_err().to_string();
        says(&error, &[&format!("experts.{part}"), "input_scale", expected]);
    }
    // NVFP4's are global scales of FP4 codes.
    let nvfp4 = resolve(&Sample::golden("nvfp4_qwen3_moe").open(), &request).unwrap_err().to_string();
    says(&nvfp4, &["activations", "Nvfp4"]);
}
