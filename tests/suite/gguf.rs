//! GGUF: every family under llama.cpp's names, blocks against a plain decoding, damaged and lying files.

use std::borrow::Cow;
use std::fs;
use std::path::Path;

use fastrand::Rng;
use moewe::checkpoint::Checkpoint;
use moewe::error::Error;
use moewe::families::{Request, Resolved, resolve, resolve_router};
use moewe::spec::*;
use moewe::weights::{Dtype, Matrix, MlpWeights, MoeWeights};

use crate::family_specs::samples;
use crate::gguf_file::{F16, F32, File, MXFP4, Q4_K, Q5_K, Q6_K, Q8_0, Value, block_size, qwen, qwen_config};
use crate::samples::{ANY, golden, says};

fn open(config: &str, file: &File) -> moewe::Result<Checkpoint> {
    read(config, file.build())
}

fn read(config: &str, bytes: Vec<u8>) -> moewe::Result<Checkpoint> {
    Checkpoint::from_bytes(config, vec![("m.gguf".into(), Cow::Owned(bytes))])
}

fn values(matrix: &Matrix<'_>) -> Vec<f32> {
    let [rows, cols] = matrix.shape();
    (0..rows).flat_map(|row| (0..cols).map(move |col| (row, col))).map(|(row, col)| matrix.get(row, col)).collect()
}

/// Adds the same matrix of all experts.
fn add_stack<'m>(file: &mut File, name: &str, matrices: impl Iterator<Item = Option<&'m Matrix<'m>>>) {
    let all: Vec<&Matrix<'_>> = matrices.flatten().collect();
    let Some(first) = all.first() else { return };
    let [rows, cols] = first.shape();
    let numbers: Vec<f32> = all.iter().flat_map(|matrix| values(matrix)).collect();
    file.add_f32(name, &[all.len(), rows, cols], &numbers);
}

/// A layer as llama.cpp would write it in F32.
pub fn converted(resolved: &Resolved, weights: &MoeWeights<'_>) -> File {
    let mut file = File::new();
    let name = |part: &str| format!("blk.{}.{part}", resolved.layer.unwrap());
    let router = &weights.router;
    if let Some(weight) = &router.weight {
        file.add_f32(&name("ffn_gate_inp.weight"), &weight.shape(), &values(weight));
    }
    for (part, vector) in [("ffn_gate_inp.bias", &router.bias), ("exp_probs_b.bias", &router.selection_bias)] {
        if let Some(vector) = vector {
            file.add_f32(&name(part), &[vector.len()], vector);
        }
    }
    let experts = || weights.experts.iter();
    add_stack(&mut file, &name("ffn_gate_exps.weight"), experts().map(|mlp| mlp.gate.as_ref()));
    add_stack(&mut file, &name("ffn_up_exps.weight"), experts().map(|mlp| Some(&mlp.up)));
    add_stack(&mut file, &name("ffn_down_exps.weight"), experts().map(|mlp| Some(&mlp.down)));
    type Bias = fn(&MlpWeights<'_>) -> Option<Vec<f32>>;
    let biases: [(&str, Bias); 3] = [
        ("gate", |mlp| mlp.gate_bias.clone()),
        ("up", |mlp| mlp.up_bias.clone()),
        ("down", |mlp| mlp.down_bias.clone()),
    ];
    for (part, bias) in biases {
        let all: Vec<Vec<f32>> = experts().filter_map(bias).collect();
        if let Some(first) = all.first() {
            file.add_f32(&name(&format!("ffn_{part}_exps.bias")), &[all.len(), first.len()], &all.concat());
        }
    }
    if let [shared] = weights.shared.as_slice() {
        for (part, matrix) in [("gate", shared.gate.as_ref()), ("up", Some(&shared.up)), ("down", Some(&shared.down))] {
            if let Some(matrix) = matrix {
                file.add_f32(&name(&format!("ffn_{part}_shexp.weight")), &matrix.shape(), &values(matrix));
            }
        }
    }
    if let Some(gate) = &weights.shared_gate {
        let row = values(gate);
        file.add_f32(&name("ffn_gate_inp_shexp.weight"), &[row.len()], &row);
    }
    file
}

fn mlp_values(mlp: &MlpWeights<'_>) -> Vec<Vec<f32>> {
    let MlpWeights { gate, up, down, gate_bias, up_bias, down_bias, input_scales } = mlp;
    assert!(input_scales.is_none());
    let mut all = vec![values(up), values(down)];
    all.extend(gate.as_ref().map(values));
    all.extend([gate_bias, up_bias, down_bias].map(|bias| bias.clone().unwrap_or_default()));
    all
}

/// The spec as GGUF in F32 has it.
fn as_f32(mut spec: MoeSpec) -> MoeSpec {
    let mlp = |mlp: &mut ExpertMlp| {
        mlp.format = WeightFormat::F32;
        (mlp.gate_up_layout, mlp.orientation) = (GateUpLayout::Separate, Orientation::OutIn);
    };
    mlp(&mut spec.experts);
    if let Some(shared) = &mut spec.shared {
        mlp(&mut shared.mlp);
        if let SharedGate::Sigmoid { format } = &mut shared.gate {
            *format = WeightFormat::F32;
        }
    }
    if let Router::Linear { format, .. } = &mut spec.router {
        *format = WeightFormat::F32;
    }
    spec
}

#[test]
fn every_family_reads_the_same_layer_from_gguf_or_refuses_it_by_name() {
    let cases = std::fs::read_dir(golden("")).unwrap().filter_map(|case| Checkpoint::open(&case.unwrap().path()).ok());
    let (mut read, mut refused) = (vec![], vec![]);
    for checkpoint in cases.chain(samples().iter().map(crate::samples::Sample::open)) {
        let Ok(before) = resolve(&checkpoint, &ANY) else { continue };
        let weights = before.weights(&checkpoint).unwrap();
        let config = serde_json::Value::Object(checkpoint.config().clone()).to_string();
        let gguf = open(&config, &converted(&before, &weights)).unwrap();
        match resolve(&gguf, &ANY) {
            Ok(after) => {
                assert_eq!((after.family, after.layer), (before.family, before.layer));
                assert_eq!(after.spec, as_f32(before.spec), "{}", before.family);
                let found = after.weights(&gguf).unwrap();
                let all = |weights: &MoeWeights<'_>| -> Vec<Vec<Vec<f32>>> {
                    weights.experts.iter().chain(&weights.shared).map(mlp_values).collect()
                };
                assert!(all(&found) == all(&weights), "{}", before.family);
                let router = |weights: &MoeWeights<'_>| {
                    let router = &weights.router;
                    (router.weight.as_ref().map(values), router.bias.clone(), router.selection_bias.clone())
                };
                assert_eq!(router(&found), router(&weights));
                assert_eq!(found.shared_gate.as_ref().map(values), weights.shared_gate.as_ref().map(values));
                let alone = resolve_router(&gguf, &Request { layer: after.layer, ..ANY }).unwrap();
                assert_eq!(alone.router_weights(&gguf).unwrap().weight.map(|matrix| values(&matrix)), router(&found).0);
                read.push(after.family);
            }
            Err(Error::Unsupported(refusal)) => {
                says(&refusal.to_string(), &[before.family, "not read from GGUF"]);
                refused.push((before.family, refusal.field.to_string()));
            }
            // The router is where the layer is known by.
            Err(Error::MissingTensor { name, .. }) => {
                says(&name, &["blk.N.ffn_gate_inp.*"]);
                refused.push((before.family, "router".into()));
            }
            Err(other) => panic!("{}: {other}", before.family),
        }
    }
    assert!(read.len() > 35, "{read:?}");
    for family in ["deepseek_v2", "deepseek_v3", "gpt_oss", "mixtral", "qwen2_moe", "qwen3_moe", "llama4", "dbrx"] {
        assert!(read.contains(&family), "{family}: {refused:?}");
    }
    for (family, field) in [("nemotron_h", "latent"), ("deepseek_v4", "routing.method"), ("zaya", "router")] {
        assert!(refused.contains(&(family, field.into())), "{family}: {refused:?}");
    }
}

#[test]
fn fused_gate_and_up_are_halves() {
    let mut rng = Rng::with_seed(1);
    let mut file = qwen(32, [F32; 3], &mut rng);
    let separate = open(&qwen_config(32).to_string(), &file).unwrap();
    let separate_weights = resolve(&separate, &ANY).unwrap().weights(&separate).map(|w| all(&w)).unwrap();
    let up = file.tensors.remove(2);
    let gate = &mut file.tensors[1];
    let both: Vec<u8> = gate
        .bytes
        .chunks(32 * 32 * 4)
        .zip(up.bytes.chunks(32 * 32 * 4))
        .flat_map(|pair| [pair.0, pair.1].concat())
        .collect();
    (gate.name, gate.sizes, gate.bytes) = ("blk.2.ffn_gate_up_exps.weight".into(), vec![32, 64, 2], both);
    let fused = open(&qwen_config(32).to_string(), &file).unwrap();
    let resolved = resolve(&fused, &ANY).unwrap();
    assert_eq!(resolved.spec.experts.gate_up_layout, GateUpLayout::Halves);
    assert_eq!(all(&resolved.weights(&fused).unwrap()), separate_weights);
}

fn all(weights: &MoeWeights<'_>) -> Vec<Vec<Vec<f32>>> {
    weights.experts.iter().map(mlp_values).collect()
}

fn half(bytes: &[u8]) -> f32 {
    half::f16::from_le_bytes([bytes[0], bytes[1]]).to_f32()
}

/// The values of one block, from its definition.
fn decoded(kind: u32, block: &[u8]) -> Vec<f32> {
    match kind {
        Q8_0 => block[2..].iter().map(|code| f32::from(*code as i8) * half(block)).collect(),
        MXFP4 => {
            const VALUES: [f32; 8] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];
            let scale = 2_f32.powi(i32::from(block[0]) - 127);
            let value = |code: u8| if code < 8 { VALUES[usize::from(code)] } else { -VALUES[usize::from(code - 8)] };
            let low = block[1..].iter().map(|byte| value(byte % 16) * scale);
            low.chain(block[1..].iter().map(|byte| value(byte / 16) * scale)).collect()
        }
        Q4_K => {
            let (d, dmin, packed, codes) = (half(block), half(&block[2..]), &block[4..16], &block[16..]);
            let mut out = vec![];
            for group in 0..8 {
                // Six bits each: the first four groups whole, of the others the high two bits lie above the first's.
                let (sc, m) = if group < 4 {
                    (packed[group] % 64, packed[group + 4] % 64)
                } else {
                    let low = packed[group + 4];
                    (low % 16 + packed[group - 4] / 64 * 16, low / 16 + packed[group] / 64 * 16)
                };
                let (scale, min) = (d * f32::from(sc), dmin * f32::from(m));
                // 32 bytes hold two groups, one in the low and one in the high halves.
                for byte in &codes[group / 2 * 32..][..32] {
                    let code = if group % 2 == 0 { byte % 16 } else { byte / 16 };
                    out.push(f32::from(code) * scale - min);
                }
            }
            out
        }
        Q6_K => {
            let (low, high, scales, d) = (&block[..128], &block[128..192], &block[192..208], half(&block[208..]));
            let mut out = vec![];
            for at in 0..256 {
                // Each half of 128: quarters of 32; low nibbles of quarters 0 and 1, then high ones of 2 and 3.
                let (part, quarter, lane) = (at / 128, at % 128 / 32, at % 32);
                let byte = low[part * 64 + quarter % 2 * 32 + lane];
                let four = if quarter < 2 { byte % 16 } else { byte / 16 };
                let two = high[part * 32 + lane] >> (2 * quarter) & 3;
                let code = i32::from(two * 16 + four) - 32;
                out.push(code as f32 * (d * f32::from(scales[at / 16] as i8)));
            }
            out
        }
        other => panic!("type {other}"),
    }
}

#[test]
fn blocks_are_read_as_ggml_defines_them() {
    let mut rng = Rng::with_seed(2);
    let formats = [
        (Q8_0, WeightFormat::Q8_0, 64),
        (Q4_K, WeightFormat::Q4K, 256),
        (Q6_K, WeightFormat::Q6K, 256),
        (MXFP4, WeightFormat::Mxfp4, 64),
    ];
    for (kind, format, size) in formats {
        let file = qwen(size, [kind; 3], &mut rng);
        let checkpoint = open(&qwen_config(size).to_string(), &file).unwrap();
        let resolved = resolve(&checkpoint, &ANY).unwrap();
        assert_eq!(resolved.spec.experts.format, format);
        assert_eq!(checkpoint.gguf_format("blk.2.ffn_up_exps.weight").unwrap(), Some(format));
        assert_eq!(checkpoint.gguf_format("blk.2.ffn_gate_inp.weight").unwrap(), None);
        let tensor = checkpoint.tensor("blk.2.ffn_up_exps.weight").unwrap();
        let bytes = file.tensors[2].bytes.len() / (2 * size);
        assert_eq!((tensor.dtype, tensor.shape.as_slice()), (Dtype::U8, [2, size, bytes].as_slice()));
        let weights = resolved.weights(&checkpoint).unwrap();
        for (at, part) in [(1, "gate"), (2, "up"), (3, "down")] {
            let blocks = file.tensors[at].bytes.chunks(bytes * block_size(kind) / size);
            let expected: Vec<f32> = blocks.flat_map(|block| decoded(kind, block)).collect();
            let matrix = |mlp: &MlpWeights<'_>| match part {
                "gate" => values(mlp.gate.as_ref().unwrap()),
                "up" => values(&mlp.up),
                _ => values(&mlp.down),
            };
            let found: Vec<f32> = weights.experts.iter().flat_map(matrix).collect();
            let same = found.iter().zip(&expected).all(|(found, expected)| found == expected);
            assert!(same && found.len() == expected.len(), "{format:?} {part}");
        }
    }
}

#[test]
fn formats_that_nothing_reads_are_refused_by_name() {
    let mut rng = Rng::with_seed(3);
    let config = qwen_config(256).to_string();
    let refusal = |file: &File| {
        let error = resolve(&open(&config, file).unwrap(), &ANY).unwrap_err();
        assert!(matches!(error, Error::Unsupported(_)), "{error}");
        error.to_string()
    };
    // llama.cpp's mixtures.
    let mixed = qwen(256, [Q4_K, Q4_K, Q6_K], &mut rng);
    says(&refusal(&mixed), &["blk.2.ffn_down_exps.weight.type", "Q6K", "Q4K", "several formats"]);
    let mixed = qwen(256, [Q8_0, Q8_0, F32], &mut rng);
    says(&refusal(&mixed), &["blk.2.ffn_down_exps.weight.type", "plain numbers", "Q8_0"]);
    let mixed = qwen(256, [Q8_0, F32, F32], &mut rng);
    says(&refusal(&mixed), &["blk.2.ffn_gate_exps.weight.type", "Q8_0", "F32"]);
    // Types without an implementation, known and unknown, in the layer and elsewhere.
    let plain = qwen(256, [Q8_0; 3], &mut rng);
    for (kind, name) in
        [(Q5_K, "Q5_K (ggml's type 13)"), (40, "NVFP4"), (31, "ggml's type 31"), (u32::MAX, "4294967295")]
    {
        let mut file = plain.clone();
        file.tensors[2].kind = kind;
        says(&refusal(&file), &["blk.2.ffn_up_exps.weight.type", name, "Q6_K"]);
        file.tensors[2].name = "output.weight".into();
        file.tensors.push(plain.tensors[2].clone());
        let checkpoint = open(&config, &file).unwrap();
        assert!(resolve(&checkpoint, &ANY).is_ok());
        let tensor = checkpoint.tensor("output.weight").unwrap();
        assert_eq!((tensor.dtype, tensor.shape.len()), (Dtype::U8, 1));
        assert!(tensor.bytes.starts_with(&file.tensors[2].bytes));
        assert!(checkpoint.gguf_format("output.weight").is_err());
    }
    // A vector in blocks.
    let mut file = plain.clone();
    file.tensors[0].name = "blk.2.ffn_gate_inp.scale".into();
    assert!(resolve(&open(&config, &file).unwrap(), &ANY).is_err());
    // A tensor of the layer without a use.
    for part in ["exp_probs_b.bias", "ffn_up_exps.scale", "ffn_gate_shexp.weight", "ffn_latent_up.weight"] {
        let mut file = plain.clone();
        file.add_f32(&format!("blk.2.{part}"), &[2], &[0.0; 2]);
        says(&refusal(&file), &[part, "has a use for this tensor"]);
    }
}

#[test]
fn quantization_config_is_not_that_of_the_file() {
    let mut rng = Rng::with_seed(4);
    let mut config = qwen_config(32);
    config["quantization_config"] = serde_json::json!({"quant_method": "fp8"});
    let resolved = resolve(&open(&config.to_string(), &qwen(32, [MXFP4; 3], &mut rng)).unwrap(), &ANY).unwrap();
    says(&resolved.notes[0], &["quantization_config", "GGUF"]);
}

fn write(dir: &Path, name: &str, bytes: impl AsRef<[u8]>) {
    fs::write(dir.join(name), bytes).unwrap();
}

#[track_caller]
fn invalid(error: &Error, parts: &[&str]) {
    assert!(matches!(error, Error::Invalid { .. }), "{error:?}");
    says(&error.to_string(), &["found", "expected"]);
    says(&error.to_string(), parts);
}

#[test]
fn a_folder_of_gguf_files() {
    let mut rng = Rng::with_seed(5);
    let dir = tempfile::tempdir().unwrap();
    let file = qwen(32, [Q8_0; 3], &mut rng);
    write(dir.path(), "model.gguf", file.build());
    invalid(
        &Checkpoint::open(dir.path()).unwrap_err(),
        &["config.json", "beside", "model.gguf", "download config.json"],
    );
    write(dir.path(), "config.json", qwen_config(32).to_string());
    write(dir.path(), "io.safetensors", b"not weights");
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    assert!(checkpoint.is_gguf());
    says(&checkpoint.searched(), &["1 of 1 shards in "]);
    assert_eq!(resolve(&checkpoint, &ANY).unwrap().layer, Some(2));
    // Two kinds, also where an index alone is there.
    write(dir.path(), "model.safetensors", b"");
    invalid(
        &Checkpoint::open(dir.path()).unwrap_err(),
        &["model.gguf", "model.safetensors", "either safetensors or GGUF"],
    );
    fs::rename(dir.path().join("model.safetensors"), dir.path().join("model.safetensors.index.json")).unwrap();
    invalid(&Checkpoint::open(dir.path()).unwrap_err(), &["model.gguf", "index.json", "either"]);
    let both = ["a.gguf", "a.safetensors"].map(|name| (name.to_owned(), Cow::Borrowed(&b""[..])));
    invalid(&Checkpoint::from_bytes("{}", both.to_vec()).unwrap_err(), &["a.gguf", "a.safetensors", "either"]);
    // Two quantisations of one model.
    fs::remove_file(dir.path().join("model.safetensors.index.json")).unwrap();
    write(dir.path(), "other.gguf", file.build());
    invalid(&Checkpoint::open(dir.path()).unwrap_err(), &["a second tensor of this name", "other.gguf"]);
}

#[test]
fn split_files_are_shards_that_may_be_absent() {
    let mut rng = Rng::with_seed(6);
    let whole = qwen(32, [Q8_0; 3], &mut rng);
    let part = |from: usize, to: usize, count: u16| {
        let file = File { tensors: whole.tensors[from..to].to_vec(), ..whole.clone() };
        file.key("split.no", Value::u16(0)).key("split.count", Value::u16(count))
    };
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), "config.json", qwen_config(32).to_string());
    // The first file often has metadata only, and ends without padding.
    write(dir.path(), "m-00001-of-00003.gguf", part(0, 0, 3).build());
    write(dir.path(), "m-00002-of-00003.gguf", part(0, 2, 3).build());
    let error = resolve(&Checkpoint::open(dir.path()).unwrap(), &ANY).unwrap_err();
    says(&error.to_string(), &["blk.2.ffn_up_exps.weight", "2 of 3 shards"]);
    assert!(resolve_router(&Checkpoint::open(dir.path()).unwrap(), &ANY).is_ok());
    write(dir.path(), "m-00003-of-00003.gguf", part(2, 4, 3).build());
    // A projector beside it is a whole file.
    let mut projector = File::new().key("split.count", Value::u16(0));
    projector.add_f32("v.blk.0.ffn_up.weight", &[1], &[0.0]);
    write(dir.path(), "mmproj.gguf", projector.build());
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    says(&checkpoint.searched(), &["4 of 4 shards"]);
    assert!(resolve(&checkpoint, &ANY).is_ok());
    // Old files say it in their name only.
    write(dir.path(), "m-00003-of-00003.gguf", File { tensors: whole.tensors[2..].to_vec(), ..whole.clone() }.build());
    says(&Checkpoint::open(dir.path()).unwrap().searched(), &["4 of 4 shards"]);
    write(dir.path(), "m-00003-of-00003.gguf", part(2, 4, 2).build());
    invalid(
        &Checkpoint::open(dir.path()).unwrap_err(),
        &["m-00003-of-00003.gguf: split.count", "found 2", "3, as the file's name"],
    );
    fs::remove_file(dir.path().join("m-00003-of-00003.gguf")).unwrap();
    write(dir.path(), "n.gguf", part(2, 4, 2).build());
    invalid(&Checkpoint::open(dir.path()).unwrap_err(), &["n.gguf: split.count", "found 2", "3, as the files before"]);
}

#[test]
fn metadata_is_skipped_whatever_its_type() {
    let nested = |depth: usize| (0..depth).fold(Value::array(4, &[]), |inner, _| Value::array(9, &[inner]));
    for kind in 0..=12 {
        let one = match kind {
            8 => Value::text("text"),
            9 => nested(2),
            0 | 1 | 7 => Value(kind, vec![1]),
            2 | 3 => Value(kind, vec![1; 2]),
            4..=6 => Value(kind, vec![1; 4]),
            _ => Value(kind, vec![1; 8]),
        };
        let mut file = File::new().key("one", one.clone()).key("many", Value::array(kind, &vec![one; 3]));
        file.add_f32("a", &[1], &[2.0]);
        assert_eq!(open("{}", &file).unwrap().tensor("a").unwrap().to_f32(1).unwrap(), [2.0], "{kind}");
    }
    invalid(&open("{}", &File::new().key("deep", nested(5))).unwrap_err(), &["m.gguf: deep", "arrays in arrays"]);
    invalid(&open("{}", &File::new().key("odd", Value(13, vec![]))).unwrap_err(), &["odd", "type 13"]);
    for alignment in [1_u32, 2, 8, 64, 4096] {
        let mut file = File::new().key("general.alignment", Value::u32(alignment));
        file.alignment = alignment as usize;
        file.add_f32("a", &[1], &[2.0]);
        file.add_f32("b", &[1], &[3.0]);
        assert_eq!(open("{}", &file).unwrap().tensor("b").unwrap().to_f32(1).unwrap(), [3.0], "{alignment}");
    }
    for alignment in [0_u32, 3, 33, 1 << 31] {
        let file = File::new().key("general.alignment", Value::u32(alignment));
        invalid(&open("{}", &file).unwrap_err(), &["general.alignment", &alignment.to_string(), "power of two"]);
    }
    let file = File::new().key("general.alignment", Value::text("32"));
    invalid(&open("{}", &file).unwrap_err(), &["general.alignment", "type 8", "unsigned"]);
    let file = File::new().key("split.count", Value::u32(1 << 16));
    invalid(&open("{}", &file).unwrap_err(), &["split.count", "65535"]);
}

#[test]
fn damaged_files_are_refused() {
    let mut rng = Rng::with_seed(7);
    let good = qwen(32, [Q8_0; 3], &mut rng);
    let bytes = good.build();
    assert!(read("{}", bytes.clone()).is_ok());
    for length in (0..bytes.len()).step_by(7) {
        let error = read("{}", bytes[..length].to_vec()).unwrap_err();
        invalid(&error, &["m.gguf", "download or convert"]);
    }
    let at = |at: usize, with: &[u8]| {
        let mut bytes = bytes.clone();
        bytes[at..at + with.len()].copy_from_slice(with);
        read("{}", bytes).unwrap_err()
    };
    invalid(&at(0, b"GGML"), &["magic"]);
    invalid(&at(4, &1_u32.to_le_bytes()), &["version", "found 1", "2 or 3"]);
    invalid(&at(4, &3_u32.to_be_bytes()), &["version", "big-endian"]);
    for count in [5, 6, 1 << 40, u64::MAX] {
        invalid(&at(8, &u64::to_le_bytes(count)), &["m.gguf"]);
        invalid(&at(16, &u64::to_le_bytes(count + u64::from(count == 5))), &["m.gguf"]);
    }
    let mut second = bytes.clone();
    second[4] = 2;
    assert!(read("{}", second).is_ok());

    let change = |change: fn(&mut File), parts: &[&str]| {
        let mut file = good.clone();
        change(&mut file);
        invalid(&open("{}", &file).unwrap_err(), parts);
    };
    change(|file| file.tensors[1].name = "blk.2.ffn_gate_inp.weight".into(), &["ffn_gate_inp", "twice"]);
    change(|file| file.keys.push(("test.flag".into(), Value(7, vec![0]))), &["test.flag", "twice"]);
    change(|file| file.tensors[0].sizes = vec![1; 5], &["ffn_gate_inp", "5 dimensions"]);
    change(|file| file.tensors[0].sizes = vec![0, 3], &["ffn_gate_inp", "sizes of at least 1"]);
    change(|file| file.tensors[0].sizes = vec![u64::MAX, 2], &["ffn_gate_inp", "64 bits"]);
    change(|file| file.tensors[3].sizes = vec![1 << 60], &["ffn_down_exps", "at most"]);
    change(|file| file.tensors[3].sizes = vec![48, 2], &["ffn_down_exps", "whole blocks"]);
    change(|file| file.tensors[3].sizes = vec![], &["ffn_down_exps", "whole blocks"]);
    change(|file| file.tensors[0].sizes = vec![32], &["ffn_gate_exps.weight.offset", "the tensor before it ends"]);
    change(|file| file.tensors[3].sizes[2] = 1, &["size", "as the header says"]);
    change(|file| file.tensors[2].bytes.truncate(32), &["m.gguf"]);
    change(|file| file.alignment = 64, &["m.gguf"]);
    // Padding behind the last tensor is legal, more is not.
    let mut longer = bytes.clone();
    longer.resize(bytes.len().next_multiple_of(32), 0);
    assert!(read("{}", longer.clone()).is_ok());
    longer.push(0);
    invalid(&read("{}", longer).unwrap_err(), &["size", "as the header says"]);
    // One number.
    let mut scalar = File::new();
    scalar.add("s", &[], F16, vec![0, 0x3c]);
    assert_eq!(open("{}", &scalar).unwrap().tensor("s").unwrap().to_f32(1).unwrap(), [1.0]);
}
