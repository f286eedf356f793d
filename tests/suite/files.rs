//! Damaged, lying and hostile files: each a typed error that says what was found and expected. None panics.

use std::borrow::Cow;
use std::fs;
use std::path::Path;

use moewe::checkpoint::Checkpoint;
use moewe::error::Error;
use moewe::families::{resolve, resolve_router};
use moewe::weights::Dtype;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::samples::{ANY, Sample, Stored, golden, open, says};

/// A file with this header and `data` zeros behind it.
fn file(header: &Value, data: usize) -> Vec<u8> {
    let header = header.to_string();
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.resize(bytes.len() + data, 0);
    bytes
}

fn entry(dtype: &str, shape: Value, start: u64, end: u64) -> Value {
    json!({"dtype": dtype, "shape": shape, "data_offsets": [start, end]})
}

#[track_caller]
fn damaged(bytes: Vec<u8>, parts: &[&str]) {
    let error = open("{}", bytes).unwrap_err();
    assert!(matches!(error, Error::Safetensors { .. }), "{error}");
    says(&error.to_string(), &["weights.safetensors", "found", "expected"]);
    says(&error.to_string(), parts);
}

#[track_caller]
fn invalid(error: &Error, parts: &[&str]) {
    assert!(matches!(error, Error::Invalid { .. }), "{error:?}");
    says(&error.to_string(), &["found", "expected"]);
    says(&error.to_string(), parts);
}

fn write(dir: &Path, name: &str, bytes: impl AsRef<[u8]>) {
    fs::write(dir.join(name), bytes).unwrap();
}

/// A directory with an empty config and these files.
fn folder(files: &[(&str, &[u8])]) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), "config.json", "{}");
    for (name, bytes) in files {
        write(dir.path(), name, bytes);
    }
    dir
}

fn tensor(name: &str) -> Vec<u8> {
    file(&json!({name: entry("U8", json!([4]), 0, 4)}), 4)
}

#[test]
fn a_golden_folder_opens_without_its_inputs() {
    let checkpoint = Checkpoint::open(&golden("mixtral")).unwrap();
    assert_eq!(checkpoint.names().count(), 8 * 3 + 1);
    assert!(checkpoint.names().is_sorted());
    assert!(checkpoint.tensor("t1.hidden_states").is_none());
    assert_eq!(checkpoint.bytes(), 2 * (8 * 3 * 48 * 160 + 8 * 160));
    says(&checkpoint.searched(), &["1 of 1 shards in ", "mixtral"]);
    assert_eq!(checkpoint.config()["model_type"], "mixtral");
    says(&format!("{checkpoint:?}"), &["25 tensors"]);
}

#[test]
fn a_truncated_file_is_damaged() {
    let whole = Sample::golden("mixtral").file();
    for length in [0, 1, 7, 8, 9, 100, whole.len() / 2, whole.len() - 1] {
        let error = open("{}", whole[..length].to_vec()).unwrap_err();
        assert!(matches!(error, Error::Safetensors { .. } | Error::Invalid { .. }), "{length}: {error}");
        says(&error.to_string(), &["weights.safetensors", "found", "expected", "download"]);
    }
    let mut longer = whole;
    longer.push(0);
    damaged(longer, &[]);
}

#[test]
fn a_header_length_that_lies_is_damaged() {
    let good = tensor("a");
    assert!(open("{}", good.clone()).is_ok());
    for length in [0, 1, 7, u64::MAX, 1 << 63, 1 << 40, good.len() as u64, good.len() as u64 - 7] {
        let mut bytes = good.clone();
        bytes[..8].copy_from_slice(&length.to_le_bytes());
        damaged(bytes, &[]);
    }
}

#[test]
fn headers_that_do_not_describe_the_data_are_damaged() {
    let two = |a: Value, b: Value| json!({"a": a, "b": b});
    let u8s = |start, end| entry("U8", json!([end - start]), start, end);
    for (header, data) in [
        // overlapping, a hole, not from the start, not to the end
        (two(u8s(0, 4), u8s(2, 6)), 6),
        (two(u8s(0, 4), u8s(0, 4)), 4),
        (two(u8s(0, 2), u8s(4, 6)), 6),
        (json!({"a": u8s(2, 4)}), 4),
        (json!({"a": u8s(0, 4)}), 8),
        // reversed
        (json!({"a": entry("U8", json!([4]), 4, 0)}), 4),
        // bytes against shape, overflowing shapes, half a byte
        (json!({"a": entry("F32", json!([4]), 0, 4)}), 4),
        (json!({"a": entry("U8", json!([u64::MAX, 2]), 0, 4)}), 4),
        (json!({"a": entry("F64", json!([1_u64 << 61]), 0, 4)}), 4),
        (json!({"a": entry("U8", json!([1_u64 << 32, 1_u64 << 32]), 0, 0)}), 0),
        (json!({"a": entry("F4", json!([3]), 0, 1)}), 1),
        // not what the format says
        (json!({"a": entry("F33", json!([4]), 0, 4)}), 4),
        (json!({"a": entry("U8", json!([-4]), 0, 4)}), 4),
        (json!({"a": entry("U8", json!([4.5]), 0, 4)}), 4),
        (json!({"a": {"dtype": "U8", "shape": [4]}}), 4),
        (json!({"a": {"dtype": "U8", "shape": [4], "data_offsets": [0]}}), 4),
        (json!({"a": 3}), 4),
        (json!([1, 2]), 4),
        (json!(null), 0),
    ] {
        damaged(file(&header, data), &[]);
    }
    damaged([4_u64.to_le_bytes().as_slice(), b"\xff\xfe{}"].concat(), &["UTF-8"]);
}

#[test]
fn offsets_beyond_the_file_are_refused() {
    for end in [5_u64, 1 << 40, u64::MAX] {
        let header = json!({"a": entry("U8", json!([end]), 0, end)});
        invalid(&open("{}", file(&header, 4)).unwrap_err(), &["a.data_offsets", &end.to_string(), "at most 4"]);
    }
    // Eight tensors whose sizes add up to 2^64: sums of them must not overflow either.
    let mut header = serde_json::Map::new();
    for index in 0..8_u64 {
        let size = if index == 7 { (1 << 61) - 1 } else { 1 << 61 };
        header.insert(format!("t{index}"), entry("U8", json!([size]), index << 61, (index << 61) + size));
    }
    invalid(&open("{}", file(&Value::Object(header), 0)).unwrap_err(), &["data_offsets", "at most 0"]);
}

#[test]
fn a_key_twice_is_refused_wherever_it_is() {
    let text = br#"{"a":{"dtype":"BF16","shape":[2],"data_offsets":[0,4]},"a":{"dtype":"F16","shape":[2],"data_offsets":[0,4]}}"#;
    let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
    bytes.extend(text);
    bytes.extend([0; 4]);
    invalid(&open("{}", bytes).unwrap_err(), &["weights.safetensors: a", "twice"]);
    let config = r#"{"norm_topk_prob": true, "norm_topk_prob": false}"#;
    invalid(&open(config, tensor("a")).unwrap_err(), &["config.json: norm_topk_prob", "each key once"]);
}

#[test]
fn config_json_must_be_one_object() {
    for text in ["", "{", "{\"a\": }", "{} {}", "\u{feff}{}", "nonsense"] {
        let error = open(text, tensor("a")).unwrap_err();
        assert!(matches!(error, Error::Json { .. }), "{text}: {error}");
        says(&error.to_string(), &["config.json", "found malformed JSON", "expected one JSON object"]);
    }
    for (text, found) in
        [("[]", "an array"), ("3", "a number"), ("null", "null"), ("\"a\"", "a string"), ("true", "a boolean")]
    {
        invalid(&open(text, tensor("a")).unwrap_err(), &["config.json", found, "one JSON object"]);
    }
    let deep = format!("{{\"a\": {}", "[".repeat(100_000));
    assert!(matches!(open(&deep, tensor("a")), Err(Error::Json { .. })));

    let dir = tempfile::tempdir().unwrap();
    let error = Checkpoint::open(dir.path()).unwrap_err();
    assert!(matches!(error, Error::Io { .. }), "{error}");
    says(&error.to_string(), &["config.json", "cannot be read", "check the path"]);
    write(dir.path(), "config.json", [0xff, 0xfe]);
    assert!(matches!(Checkpoint::open(dir.path()), Err(Error::Io { .. })));
    assert!(matches!(Checkpoint::open(&dir.path().join("nowhere")), Err(Error::Io { .. })));
}

#[test]
fn a_folder_without_shards_is_refused() {
    let dir = folder(&[("io.safetensors", &tensor("a")), ("weights.bin", b"x")]);
    invalid(&Checkpoint::open(dir.path()).unwrap_err(), &["0 of 0 shards", "at least one *.safetensors"]);
    let index = json!({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}).to_string();
    let dir = folder(&[("model.safetensors.index.json", index.as_bytes()), ("other.safetensors", &tensor("a"))]);
    invalid(&Checkpoint::open(dir.path()).unwrap_err(), &["0 of 2 shards", "download"]);
}

#[test]
fn a_shard_must_be_a_regular_file() {
    let dir = folder(&[]);
    fs::create_dir(dir.path().join("model.safetensors")).unwrap();
    let error = Checkpoint::open(dir.path()).unwrap_err();
    assert!(matches!(error, Error::Io { .. }), "{error}");
    says(&error.to_string(), &["model.safetensors", "not a regular file"]);
    let dir = folder(&[("model.safetensors", b"")]);
    assert!(matches!(Checkpoint::open(dir.path()), Err(Error::Safetensors { .. })));
}

/// Refused as [`Error::Io`] of this file.
#[track_caller]
fn unreadable(dir: &Path, parts: &[&str]) {
    let error = Checkpoint::open(dir).unwrap_err();
    assert!(matches!(error, Error::Io { .. }), "{error}");
    says(&error.to_string(), parts);
}

#[test]
#[cfg(unix)]
fn links_to_nothing_and_pipes_are_refused_and_not_waited_for() {
    use std::os::unix::fs::symlink;
    let pipe = |path: &Path| assert!(std::process::Command::new("mkfifo").arg(path).status().unwrap().success());

    let dir = folder(&[]);
    symlink("nowhere", dir.path().join("model.safetensors")).unwrap();
    unreadable(dir.path(), &["model.safetensors", "a link to a file that is not there"]);
    // What an index names may be absent; a link is not.
    let index = json!({"weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors"}}).to_string();
    let dir = folder(&[("model.safetensors.index.json", index.as_bytes()), ("m-1.safetensors", &tensor("a"))]);
    assert!(Checkpoint::open(dir.path()).is_ok());
    let second = dir.path().join("m-2.safetensors");
    symlink("../blobs/b", &second).unwrap();
    unreadable(dir.path(), &["m-2.safetensors", "a link to a file that is not there"]);
    fs::remove_file(&second).unwrap();
    symlink(&second, &second).unwrap();
    unreadable(dir.path(), &["m-2.safetensors"]);
    fs::remove_file(&second).unwrap();
    // A link to a file is that file.
    write(dir.path(), "blob", tensor("b"));
    symlink("blob", &second).unwrap();
    assert_eq!(Checkpoint::open(dir.path()).unwrap().names().count(), 2);

    for name in ["m-1.safetensors", "model.safetensors.index.json", "config.json"] {
        let path = dir.path().join(name);
        fs::remove_file(&path).unwrap();
        pipe(&path);
        unreadable(dir.path(), &[name, "not a regular file"]);
        fs::remove_file(&path).unwrap();
        fs::create_dir(&path).unwrap();
        unreadable(dir.path(), &[name, "not a regular file"]);
    }
}

#[test]
fn an_index_names_shards_that_may_be_absent() {
    let index = json!({"metadata": {"total_size": 12}, "weight_map": {
        "a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-3.safetensors"}});
    let index = index.to_string();
    let dir = folder(&[
        ("model.safetensors.index.json", index.as_bytes()),
        ("model-1.safetensors", &tensor("a")),
        ("model-3.safetensors", &tensor("c")),
        // Not the index's business.
        ("consolidated.safetensors", &tensor("a")),
        ("other.safetensors.index.json", b"{"),
    ]);
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    assert_eq!(checkpoint.names().collect::<Vec<_>>(), ["a", "c"]);
    says(&checkpoint.searched(), &["2 of 3 shards in "]);
    assert_eq!(checkpoint.tensor("a").unwrap().bytes, [0; 4]);

    // The only index may have another name; two are a riddle.
    fs::remove_file(dir.path().join("other.safetensors.index.json")).unwrap();
    fs::rename(dir.path().join("model.safetensors.index.json"), dir.path().join("x.safetensors.index.json")).unwrap();
    says(&Checkpoint::open(dir.path()).unwrap().searched(), &["2 of 3"]);
    write(dir.path(), "y.safetensors.index.json", &index);
    invalid(&Checkpoint::open(dir.path()).unwrap_err(), &["2 files *.safetensors.index.json", "one index"]);
}

#[test]
fn an_index_that_lies_is_refused() {
    let open = |index: &Value| {
        let index = index.to_string();
        let dir = folder(&[("model.safetensors.index.json", index.as_bytes()), ("m.safetensors", &tensor("a"))]);
        Checkpoint::open(dir.path())
    };
    for name in [
        "../m.safetensors",
        "/m.safetensors",
        "x/m.safetensors",
        "x\\m.safetensors",
        "..",
        "",
        "m.bin",
        "C:m.safetensors",
    ] {
        let error = open(&json!({"weight_map": {"a": name}})).unwrap_err();
        invalid(&error, &["weight_map.a", &Value::from(name).to_string(), "plain name"]);
    }
    for weight_map in [json!({"a": 3}), json!({"a": null}), json!({"a": ["m.safetensors"]})] {
        invalid(&open(&json!({"weight_map": weight_map})).unwrap_err(), &["weight_map.a", "plain name"]);
    }
    for index in [json!({}), json!({"weight_map": []}), json!({"weight_map": null})] {
        invalid(&open(&index).unwrap_err(), &["weight_map", "an object from tensor to file"]);
    }
    invalid(&open(&json!([])).unwrap_err(), &["index.json", "an array"]);
    let error = open(&json!({"weight_map": {"a": "m.safetensors", "b": "m.safetensors"}})).unwrap_err();
    invalid(&error, &["m.safetensors", "no tensor b"]);
}

#[test]
fn a_tensor_in_two_shards_needs_an_index() {
    let shards = [("m-1.safetensors", tensor("a")), ("m-2.safetensors", tensor("a"))];
    let dir = folder(&shards.each_ref().map(|(name, bytes)| (*name, bytes.as_slice())));
    invalid(&Checkpoint::open(dir.path()).unwrap_err(), &["a: found a second tensor", "m-2.safetensors", "index"]);
    let shards = shards.map(|(name, bytes)| (name.to_owned(), Cow::Owned(bytes))).to_vec();
    invalid(&Checkpoint::from_bytes("{}", shards).unwrap_err(), &["a second tensor of this name in m-2"]);
    let index = json!({"weight_map": {"a": "m-2.safetensors", "b": "m-1.safetensors"}}).to_string();
    write(dir.path(), "model.safetensors.index.json", index);
    let both = json!({"a": entry("U8", json!([4]), 0, 4), "b": entry("U8", json!([1]), 4, 5)});
    write(dir.path(), "m-1.safetensors", file(&both, 5));
    let mut second = tensor("a");
    *second.last_mut().unwrap() = 9;
    write(dir.path(), "m-2.safetensors", second);
    assert_eq!(Checkpoint::open(dir.path()).unwrap().tensor("a").unwrap().bytes, [0, 0, 0, 9]);
}

const V3: &str = "model.layers.3.mlp.";

fn replaced(case: &str, name: &str, dtype: Dtype, shape: &[usize]) -> Error {
    let mut sample = Sample::golden(case);
    sample.take(name);
    sample.zeros(name, dtype, shape).resolve().unwrap_err()
}

#[test]
fn a_tensor_of_the_wrong_shape_is_named() {
    for (case, name, dtype, shape, expected) in [
        ("deepseek_v3", "gate.weight", Dtype::BF16, vec![11, 128], "[12, 128]"),
        ("deepseek_v3", "gate.weight", Dtype::BF16, vec![128, 12], "[12, 128]"),
        ("deepseek_v3", "gate.e_score_correction_bias", Dtype::F32, vec![13], "12 elements"),
        ("deepseek_v3", "experts.7.up_proj.weight", Dtype::BF16, vec![49, 128], "[48, 128]"),
        ("deepseek_v3", "experts.0.down_proj.weight", Dtype::BF16, vec![48, 128], "[128, 48]"),
        ("deepseek_v3", "experts.0.gate_proj.weight", Dtype::BF16, vec![48 * 128], "[48, 128]"),
        ("deepseek_v3", "experts.0.gate_proj.weight", Dtype::BF16, vec![], "[48, 128]"),
        ("deepseek_v3", "experts.0.gate_proj.weight", Dtype::BF16, vec![0, 128], "[48, 128]"),
        ("deepseek_v3", "shared_experts.up_proj.weight", Dtype::BF16, vec![96, 128], "[48, 128]"),
        ("fp8_deepseek_v3", "experts.2.up_proj.weight_scale_inv", Dtype::F32, vec![2, 1], "[1, 2]"),
        ("fp8_deepseek_v3", "experts.2.up_proj.weight_scale_inv", Dtype::F32, vec![], "[1, 2]"),
    ] {
        let error = replaced(case, &format!("{V3}{name}"), dtype, &shape);
        invalid(&error, &[name, &format!("{shape:?}"), expected]);
    }
    let gpt_oss = "model.layers.2.mlp.";
    for (name, shape, expected) in [
        ("experts.gate_up_proj", vec![8, 96, 136], "[8, 136, 96]"),
        ("experts.gate_up_proj_bias", vec![96, 8], "[8, 96]"),
        ("experts.down_proj_bias", vec![8, 135], "[8, 136]"),
        ("router.bias", vec![9], "8 elements"),
    ] {
        invalid(&replaced("gpt_oss", &format!("{gpt_oss}{name}"), Dtype::BF16, &shape), &[name, expected]);
    }
}

#[test]
fn a_tensor_of_the_wrong_dtype_is_named() {
    for (name, dtype, expected) in [
        ("experts.3.up_proj.weight", Dtype::F16, "expected BF16"),
        ("experts.0.up_proj.weight", Dtype::F8_E4M3, "expected a quantization_config"),
        ("experts.0.gate_proj.weight", Dtype::I8, "expected a quantization_config"),
        ("gate.e_score_correction_bias", Dtype::I32, "expected F32, BF16 or F16"),
    ] {
        let shape = if name.starts_with("gate") { vec![12] } else { vec![48, 128] };
        let error = replaced("deepseek_v3", &format!("{V3}{name}"), dtype, &shape);
        invalid(&error, &[name, &format!("found {dtype:?}"), expected]);
    }
    for (name, dtype, shape) in [
        ("experts.0.gate_proj.weight", Dtype::I16, [48, 128]),
        ("gate.weight", Dtype::F64, [12, 128]),
        ("shared_experts.gate_proj.weight", Dtype::F8_E5M2, [48, 128]),
    ] {
        let error = replaced("deepseek_v3", &format!("{V3}{name}"), dtype, &shape);
        assert!(matches!(error, Error::Unsupported(_)), "{error}");
        says(&error.to_string(), &["family deepseek_v3", name, &format!("{dtype:?}"), "F8_E4M3"]);
    }
    let scale = format!("{V3}experts.0.gate_proj.weight_scale_inv");
    let error = replaced("fp8_deepseek_v3", &scale, Dtype::I32, &[1, 2]);
    says(&error.to_string(), &[&scale, "I32", "scales are F32", "F8_E8M0"]);
    let scale = format!("{V3}experts.1.gate_proj.weight_scale_inv");
    invalid(&replaced("fp8_deepseek_v3", &scale, Dtype::F8_E8M0, &[1, 2]), &[&scale, "F8_E8M0", "F32"]);
}

#[test]
fn a_missing_tensor_is_named_with_where_it_was_looked_for() {
    let all =
        ["gate.weight", "gate.e_score_correction_bias", "experts.0.gate_proj.weight", "experts.11.down_proj.weight"];
    for name in all.into_iter().chain(["shared_experts.gate_proj.weight", "shared_experts.down_proj.weight"]) {
        let mut sample = Sample::golden("deepseek_v3");
        sample.take(&format!("{V3}{name}"));
        let error = sample.resolve().unwrap_err();
        assert!(matches!(error, Error::MissingTensor { .. }), "{error}");
        says(&error.to_string(), &[V3, name, "found none in 1 of 1 shards in memory", "expected one"]);
    }
    for id in [0, 5] {
        let mut sample = Sample::golden("fp8_deepseek_v3");
        let scale = format!("{V3}experts.{id}.up_proj.weight_scale_inv");
        sample.take(&scale);
        let error = sample.resolve().unwrap_err();
        assert!(matches!(error, Error::MissingTensor { .. }), "{error}");
        says(&error.to_string(), &[&scale]);
    }
    for case in ["deepseek_v3", "deepseek_v4_hash", "gpt_oss", "mixtral", "qwen3_moe"] {
        let mut sample = Sample::golden(case);
        sample.tensors.clear();
        assert!(matches!(sample.resolve(), Err(Error::MissingTensor { .. })), "{case}");
        assert!(matches!(resolve_router(&sample.open(), &ANY), Err(Error::MissingTensor { .. })), "{case}");
    }
}

#[test]
fn config_and_tensors_must_agree() {
    let v3 = || Sample::golden("deepseek_v3");
    invalid(&v3().set("num_experts_per_tok", 13).resolve().unwrap_err(), &["top_k: found 13", "1 to 12"]);
    invalid(&v3().set("num_experts_per_tok", 7).resolve().unwrap_err(), &["top_k: found 7", "at most 6"]);
    invalid(&v3().set("n_group", 5).resolve().unwrap_err(), &["n_group: found 5", "divisor of 12"]);
    invalid(&v3().set("topk_group", 5).resolve().unwrap_err(), &["topk_group: found 5", "1 to n_group = 4"]);
    invalid(&v3().set("n_routed_experts", 5000).resolve().unwrap_err(), &["num_experts: found 5000", "1024"]);
    invalid(&v3().set("n_routed_experts", 16).resolve().unwrap_err(), &["gate.weight", "[12, 128]", "[16, 128]"]);
    invalid(&v3().set("hidden_size", 64).resolve().unwrap_err(), &["gate.weight", "[12, 128]", "[12, 64]"]);
    invalid(&v3().set("n_shared_experts", 2).resolve().unwrap_err(), &["shared_experts", "[48, 128]", "[96, 128]"]);
    invalid(&v3().set("n_shared_experts", 1 << 24).resolve().unwrap_err(), &["shared.mlp", "1 to 1048576"]);
    // Fewer experts than the checkpoint has are experts dropped.
    let mut fewer = v3().set("n_routed_experts", 8);
    for (name, dtype, shape) in
        [("weight", Dtype::BF16, vec![8, 128]), ("e_score_correction_bias", Dtype::F32, vec![8])]
    {
        fewer.take(&format!("{V3}gate.{name}"));
        fewer = fewer.zeros(&format!("{V3}gate.{name}"), dtype, &shape);
    }
    says(&fewer.refusal(), &["experts.10.", "has a use for this tensor"]);
}

#[test]
fn a_token_table_must_fit_the_model() {
    let name = "layers.1.ffn.gate.tid2eid";
    let table = |id: i64, dtype: Dtype, shape: [usize; 2]| {
        let mut sample = Sample::golden("deepseek_v4_hash");
        let mut bytes = vec![0; 96 * 3 * dtype.bitsize() / 8];
        let width = dtype.bitsize() / 8;
        bytes[7 * width..8 * width].copy_from_slice(&id.to_le_bytes()[..width]);
        sample.tensors.insert(name.into(), Stored { dtype, shape: shape.to_vec(), bytes });
        sample.resolve()
    };
    for dtype in [Dtype::I32, Dtype::I64] {
        // Duplicates in a row are legal: each slot counts.
        assert!(table(7, dtype, [96, 3]).is_ok());
        for id in [8, -1] {
            invalid(&table(id, dtype, [96, 3]).unwrap_err(), &["tid2eid", &format!("expert id {id}"), "ids in 0..8"]);
        }
    }
    invalid(&table(1 << 40, Dtype::I64, [96, 3]).unwrap_err(), &[name, "1099511627776", "32 bits"]);
    invalid(&table(0, Dtype::I64, [3, 96]).unwrap_err(), &[name, "[3, 96]", "[96, 3]"]);
    invalid(&table(0, Dtype::F32, [96, 3]).unwrap_err(), &[name, "F32", "I32 or I64"]);
    let other = Sample::golden("deepseek_v4_hash").set("vocab_size", 97).resolve().unwrap_err();
    invalid(&other, &[name, "[96, 3]", "[97, 3]"]);
}

/// A valid DeepSeek-V3 layer of a few hundred bytes.
fn tiny() -> Sample {
    let mut sample = Sample::golden("fp8_deepseek_v3")
        .set("hidden_size", 2)
        .set("moe_intermediate_size", 3)
        .set("n_routed_experts", 2)
        .set("num_experts_per_tok", 1)
        .set("n_group", 1)
        .set("topk_group", 1);
    sample.tensors.clear();
    sample = sample.zeros(&format!("{V3}gate.weight"), Dtype::BF16, &[2, 2]);
    sample = sample.zeros(&format!("{V3}gate.e_score_correction_bias"), Dtype::F32, &[2]);
    for module in ["experts.0", "experts.1", "shared_experts"] {
        for (part, shape) in [("gate_proj", [3, 2]), ("up_proj", [3, 2]), ("down_proj", [2, 3])] {
            let name = format!("{V3}{module}.{part}.weight");
            sample = sample.zeros(&name, Dtype::F8_E4M3, &shape);
            let scale = Stored { dtype: Dtype::F32, shape: vec![1, 1], bytes: 1_f32.to_le_bytes().to_vec() };
            sample.tensors.insert(format!("{name}_scale_inv"), scale);
        }
    }
    sample
}

#[test]
fn no_damage_makes_a_panic() {
    let sample = tiny();
    let (config, good) = (Value::Object(sample.config.clone()).to_string(), sample.file());
    let read = |config: &str, file: Vec<u8>| -> moewe::Result<f32> {
        let checkpoint = open(config, file)?;
        let resolved = resolve(&checkpoint, &ANY)?;
        let weights = resolved.weights(&checkpoint)?;
        let mut sum = 0.0;
        for expert in weights.experts.iter().chain(&weights.shared) {
            for matrix in expert.gate.iter().chain([&expert.up, &expert.down]) {
                let [rows, cols] = matrix.shape();
                // The last element: if it is in bounds, all are.
                sum += matrix.get(rows - 1, cols - 1);
            }
        }
        Ok(sum)
    };
    assert_eq!(read(&config, good.clone()).unwrap(), 0.0);
    let mut random = fastrand::Rng::with_seed(20_261_122);
    let mut refused = 0;
    for round in 0..900 {
        let (mut config, mut file) = (config.clone().into_bytes(), good.clone());
        let target = if round % 3 == 0 { &mut config } else { &mut file };
        match random.u8(..4) {
            0 => target.truncate(random.usize(..target.len())),
            1 => target.insert(random.usize(..target.len()), random.u8(..)),
            2 => drop(target.remove(random.usize(..target.len()))),
            _ => {
                for _ in 0..random.usize(1..4) {
                    let at = random.usize(..target.len());
                    // Digits and punctuation give texts that still parse, and say something else.
                    target[at] =
                        if random.bool() { b"0123456789,:\"[]{}-.eE"[random.usize(..21)] } else { random.u8(..) };
                }
            }
        }
        if let Err(error) = read(&String::from_utf8_lossy(&config), file) {
            assert!(!error.to_string().is_empty());
            refused += 1;
        }
    }
    assert!((300..900).contains(&refused), "{refused} of 900 refused");
}
