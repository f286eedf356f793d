//! `moewe verify`.

use std::path::{Path, PathBuf};

use safetensors::SafeTensors;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::{Said, arguments, backends, configure, copy_case, moewe, text};
use crate::samples::{golden, says};

const KEYS: [&str; 11] = [
    "name",
    "kind",
    "backend",
    "adapter",
    "status",
    "reason",
    "worst_error",
    "tolerance",
    "worst_check",
    "checks",
    "unknown_keys",
];

fn verify(paths: &[&Path], backend: &str, rest: &[&str]) -> Said {
    let paths: Vec<&str> = paths.iter().map(|path| text(path)).collect();
    moewe(arguments(&[&["verify"], &paths[..]].concat(), backend, rest))
}

/// One case on the CPU.
fn judged(path: &Path) -> (Value, i32) {
    let said = verify(&[path], "cpu", &["--json"]);
    (said.json(), said.code)
}

fn manifest() -> Value {
    serde_json::from_slice(&std::fs::read(golden("MANIFEST.json")).unwrap()).unwrap()
}

/// A folder with copies of these cases and their part of the manifest.
struct Cases(TempDir);

impl Cases {
    fn of(names: &[&str]) -> Self {
        let cases = Self(tempfile::tempdir().unwrap());
        let mut manifest = manifest();
        let entries = manifest["cases"].as_array_mut().unwrap();
        entries.retain(|entry| names.contains(&entry["name"].as_str().unwrap()));
        cases.write_manifest(&manifest);
        names.iter().for_each(|name| copy_case(name, &cases.path(name)));
        cases
    }

    fn root(&self) -> &Path {
        self.0.path()
    }

    fn path(&self, name: &str) -> PathBuf {
        self.root().join(name)
    }

    fn write_manifest(&self, manifest: &Value) {
        std::fs::write(self.path("MANIFEST.json"), manifest.to_string()).unwrap();
    }

    /// Changes the entry of a case.
    fn enter(&self, name: &str, key: &str, value: Value) {
        let mut manifest: Value = serde_json::from_slice(&std::fs::read(self.path("MANIFEST.json")).unwrap()).unwrap();
        let entries = manifest["cases"].as_array_mut().unwrap();
        entries.iter_mut().find(|entry| entry["name"] == name).unwrap()[key] = value;
        self.write_manifest(&manifest);
    }

    /// Changes the bytes of a tensor of a case's io.safetensors.
    fn tamper(&self, case: &str, tensor: &str, change: impl Fn(&mut [u8])) {
        let path = self.path(case).join("io.safetensors");
        let mut bytes = std::fs::read(&path).unwrap();
        let (header, metadata) = SafeTensors::read_metadata(&bytes).unwrap();
        let (start, end) = metadata.info(tensor).unwrap().data_offsets;
        change(&mut bytes[8 + header + start..8 + header + end]);
        std::fs::write(path, bytes).unwrap();
    }
}

#[track_caller]
fn expect(line: &Value, status: &str, reason: &str) {
    assert_eq!(line["status"], status, "{line}");
    says(line["reason"].as_str().unwrap_or("null"), &[reason]);
}

fn check<'a>(line: &'a Value, name: &str) -> &'a Value {
    line["checks"].as_array().unwrap().iter().find(|check| check["name"] == name).unwrap()
}

/// The whole golden set on one backend.
#[track_caller]
fn golden_set(backend: &str, rest: &[&str]) -> Vec<Value> {
    let said = verify(&[&golden("")], backend, &[&["--json"], rest].concat());
    let lines = said.lines();
    assert_eq!(said.code, 0, "{}", said.stderr);
    let manifest = manifest();
    let cases = manifest["cases"].as_array().unwrap().iter().filter(|case| case["kind"] != "primitive");
    let expected: Vec<[&Value; 2]> = cases.map(|case| [&case["name"], &case["kind"]]).collect();
    let found: Vec<[&Value; 2]> = lines.iter().map(|line| [&line["name"], &line["kind"]]).collect();
    assert_eq!(found, expected);
    for line in &lines {
        let keys: Vec<&str> = line.as_object().unwrap().keys().map(String::as_str).collect();
        assert_eq!(keys, KEYS);
        assert_eq!(line["backend"], backend);
        assert_eq!(line["adapter"].is_string(), backend == "wgpu", "{line}");
        assert_eq!(line["unknown_keys"], json!([]));
        let name = line["name"].as_str().unwrap();
        assert_eq!((&line["status"], &line["reason"]), (&json!("pass"), &Value::Null), "{line}");
        let checks = line["checks"].as_array().unwrap();
        // Ids and weights of a router; besides the output, at three numbers of tokens, of a layer; of one in FP8
        // twice the output, and the codes and scales where they are stored, with quantised activations.
        let least = match line["kind"].as_str().unwrap() {
            "routing" => 2,
            "fp8_block" => 9 + 2 * (3 + 2 * 2),
            _ => 9,
        };
        assert!(checks.len() >= least, "{line}");
        for check in checks {
            assert!(check["error"].as_f64().unwrap() <= check["tolerance"].as_f64().unwrap(), "{name}: {check}");
        }
    }
    let fp8 = lines.iter().filter(|line| line["kind"] == "fp8_block");
    assert_eq!(fp8.clone().count(), 2);
    for line in fp8 {
        for expected in ["t64.output_dequant", "t64.output_w8a8", "t64.output_w8a8_ue8m0", "t7.input_codes_w8a8"] {
            check(line, expected);
        }
    }
    lines
}

#[test]
fn the_golden_set_passes_on_the_reference() {
    golden_set("reference", &[]);
}

#[test]
fn the_golden_set_passes_on_the_cpu_with_the_figures_as_they_are() {
    let lines = golden_set("cpu", &[]);
    let manifest = manifest();
    let case = &manifest["cases"][0];
    let line = &lines[0];
    assert_eq!(check(line, "t64.output")["tolerance"], case["atol"]);
    let weights = 8.0 * case["max_weight_err_f32_vs_f64"].as_f64().unwrap();
    assert_eq!(check(line, "t1.topk_weights")["tolerance"].as_f64(), Some(weights));
    assert_eq!(check(line, "t7.topk_ids"), &json!({"name": "t7.topk_ids", "error": 0, "tolerance": 0}));
    let fp8 = manifest["cases"].as_array().unwrap().iter().find(|case| case["name"] == "fp8_deepseek_v3").unwrap();
    let line = lines.iter().find(|line| line["name"] == "fp8_deepseek_v3").unwrap();
    assert_eq!(check(line, "t7.output_dequant")["tolerance"], fp8["atol"]["dequant"]);
    let routing = lines.iter().find(|line| line["name"] == "routing_mixtral_8").unwrap();
    assert_eq!(check(routing, "topk_weights")["tolerance"], 8.79e-7);
}

#[cfg(feature = "wgpu")]
#[test]
fn the_golden_set_passes_on_wgpu_with_one_factor_of_at_most_8() {
    let lines = golden_set("wgpu", &[]);
    let atol = &manifest()["cases"][0]["atol"];
    let factor = check(&lines[0], "t64.output")["tolerance"].as_f64().unwrap() / atol.as_f64().unwrap();
    assert!((1.0..=8.0).contains(&factor), "{factor}");
    assert_eq!(check(&lines[0], "t64.topk_ids")["tolerance"], 0);
}

#[cfg(feature = "wgpu")]
#[test]
fn the_golden_set_passes_under_default_limits_and_in_segments_of_64_kib() {
    golden_set("wgpu", &["--portable", "--segment-bytes", "65536"]);
    golden_set("cpu", &["--segment-bytes", "65536"]);
}

#[cfg(not(feature = "wgpu"))]
#[test]
fn wgpu_is_unsupported_in_a_build_without_it() {
    let said = verify(&[&golden("mixtral")], "wgpu", &[]);
    expect(&said.json(), "unsupported", "built without feature wgpu");
    assert_eq!(said.code, 3);
}

#[test]
fn an_absent_backend_or_adapter_is_unsupported() {
    let said = verify(&[&golden("mixtral")], "cuda", &["--adapter", "no such device"]);
    expect(&said.json(), "unsupported", "cuda does not support");
    assert_eq!((said.code, &said.json()["backend"]), (3, &json!("cuda")));
    if cfg!(feature = "wgpu") {
        let mixtral = golden("mixtral");
        let said = moewe(["verify", text(&mixtral), "--backend", "wgpu", "--adapter", "no such thing"]);
        expect(&said.json(), "unsupported", "no such thing");
        assert_eq!(said.code, 3);
    }
}

#[test]
fn all_passed_is_exit_0() {
    let cases = Cases::of(&["mixtral", "routing_mixtral_8", "prim_format_tables"]);
    let said = verify(&[cases.root()], "cpu", &[]);
    assert_eq!((said.code, said.lines().len()), (0, 2), "{}", said.stdout);
}

#[test]
fn a_wrong_expectation_fails_on_every_backend_and_stops_no_other_case() {
    let cases = Cases::of(&["mixtral", "routing_mixtral_8"]);
    // The sign of the second value.
    cases.tamper("mixtral", "t7.output", |bytes| bytes[7] ^= 0x80);
    for backend in backends() {
        let said = verify(&[cases.root()], backend, &["--json"]);
        let lines = said.lines();
        expect(&lines[0], "fail", "t7.output");
        assert_eq!(lines[0]["worst_check"], "t7.output");
        assert_eq!(lines[0]["worst_error"], check(&lines[0], "t7.output")["error"]);
        assert_eq!(lines[0]["tolerance"], check(&lines[0], "t7.output")["tolerance"]);
        assert_eq!(lines[0]["checks"].as_array().unwrap().len(), 9);
        assert_eq!((&lines[1]["status"], said.code), (&json!("pass"), 1));
    }
}

#[test]
fn nan_where_none_is_expected_fails() {
    let cases = Cases::of(&["mixtral"]);
    cases.tamper("mixtral", "t1.output", |bytes| bytes[..4].copy_from_slice(&f32::NAN.to_le_bytes()));
    let (line, code) = judged(&cases.path("mixtral"));
    expect(&line, "fail", "t1.output: error NaN");
    assert_eq!([&line["worst_error"], &line["worst_check"]], [&json!("NaN"), &json!("t1.output")]);
    assert_eq!(code, 1);
    cases.tamper("mixtral", "t1.output", |bytes| bytes[..4].copy_from_slice(&f32::INFINITY.to_le_bytes()));
    assert_eq!(judged(&cases.path("mixtral")).0["worst_error"], "inf");
}

#[test]
fn ids_and_weights_are_compared_in_any_order_but_together() {
    let cases = Cases::of(&["routing_mixtral_8"]);
    let swap = |bytes: &mut [u8]| bytes[..8].rotate_left(4);
    cases.tamper("routing_mixtral_8", "topk_ids", swap);
    expect(&judged(cases.root()).0, "fail", "topk_weights");
    cases.tamper("routing_mixtral_8", "topk_weights", swap);
    assert_eq!(judged(cases.root()).0["status"], "pass");
    cases.tamper("routing_mixtral_8", "topk_ids", |bytes| bytes[4 * 17] ^= 1);
    let (line, _) = judged(cases.root());
    expect(&line, "fail", "topk_ids");
    // Any error beyond a tolerance of 0 is infinitely bad.
    assert_eq!([&line["worst_check"], &line["tolerance"]], [&json!("topk_ids"), &json!(0)]);
}

#[test]
fn what_is_missing_or_unreadable_fails() {
    let cases = Cases::of(&["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "routing_mixtral_8"]);
    std::fs::remove_file(cases.path("mixtral/io.safetensors")).unwrap();
    std::fs::remove_file(cases.path("qwen3_moe/weights.safetensors")).unwrap();
    std::fs::remove_dir_all(cases.path("gpt_oss")).unwrap();
    std::fs::write(cases.path("deepseek_v3/config.json"), "{").unwrap();
    std::fs::write(cases.path("routing_mixtral_8/io.safetensors"), [7; 100]).unwrap();
    let said = verify(&[cases.root()], "cpu", &[]);
    let lines = said.lines();
    let found = |name: &str| lines.iter().find(|line| line["name"] == name).unwrap();
    expect(found("mixtral"), "fail", "io.safetensors: cannot be read");
    expect(found("qwen3_moe"), "fail", "expected at least one *.safetensors");
    expect(found("gpt_oss"), "fail", "cannot be read");
    expect(found("deepseek_v3"), "fail", "malformed JSON");
    expect(found("routing_mixtral_8"), "fail", "damaged safetensors");
    assert_eq!((said.code, lines.len()), (1, 5));
    // Known to the manifest beside it, so it is a case that lacks a file and not a stray folder.
    assert_eq!(judged(&cases.path("mixtral")).1, 1);
}

#[test]
fn an_expected_tensor_that_is_missing_or_misshapen_fails() {
    let cases = Cases::of(&["mixtral"]);
    let path = cases.path("mixtral/io.safetensors");
    let whole = std::fs::read(&path).unwrap();
    let write = |keep: &dyn Fn(&str) -> bool, shape: &dyn Fn(&str, Vec<usize>) -> Vec<usize>| {
        let tensors = SafeTensors::deserialize(&whole).unwrap();
        let views = tensors.iter().filter(|(name, _)| keep(name)).map(|(name, view)| {
            let shape = shape(name, view.shape().to_vec());
            (name.to_owned(), safetensors::tensor::TensorView::new(view.dtype(), shape, view.data()).unwrap())
        });
        std::fs::write(&path, safetensors::serialize(views, None).unwrap()).unwrap();
        judged(&cases.path("mixtral"))
    };
    let same = |_: &str, shape| shape;
    for name in ["t7.output", "t7.topk_ids", "t7.topk_weights", "t7.hidden_states"] {
        let (line, code) = write(&|found| found != name, &same);
        expect(&line, "fail", name);
        assert_eq!(code, 1);
    }
    let flat = |name: &str, shape: Vec<usize>| if name == "t7.output" { vec![shape.iter().product()] } else { shape };
    expect(&write(&|_| true, &flat).0, "fail", "t7.output: found shape");
    expect(&write(&|name| !name.starts_with('t'), &same).0, "fail", "t{T}.hidden_states");
}

#[test]
fn a_tensor_without_a_use_is_named() {
    let cases = Cases::of(&["mixtral"]);
    let path = cases.path("mixtral/io.safetensors");
    let whole = std::fs::read(&path).unwrap();
    let tensors = SafeTensors::deserialize(&whole).unwrap();
    let extra = tensors.tensor("t7.output").unwrap();
    let views = tensors.iter().map(|(name, view)| (name.to_owned(), view));
    let views = views.chain([("t7.expert_hidden_states".to_owned(), extra.clone()), ("t7.other".to_owned(), extra)]);
    std::fs::write(&path, safetensors::serialize(views, None).unwrap()).unwrap();
    let (line, code) = judged(&cases.path("mixtral"));
    expect(&line, "unsupported", "other cannot be computed or used yet");
    // Known, but this layer has no second input.
    expect(&line, "unsupported", "t7.expert_hidden_states cannot be used");
    assert_eq!((line["checks"].as_array().unwrap().len(), code), (9, 3));
}

#[test]
fn a_case_alone_is_judged_as_in_its_set() {
    let cases = Cases::of(&["mixtral", "qwen3_moe"]);
    let [from_set, alone] = [cases.root().to_owned(), cases.path("qwen3_moe")].map(|path| {
        let lines = verify(&[&path], "cpu", &[]).lines();
        lines.into_iter().find(|line| line["name"] == "qwen3_moe").unwrap()
    });
    assert_eq!(from_set, alone);
    // Several paths, and a name that the shell has made longer.
    let said = verify(&[&cases.path("mixtral").join("../qwen3_moe/."), &cases.path("mixtral")], "cpu", &[]);
    let names: Vec<Value> = said.lines().iter().map(|line| line["name"].clone()).collect();
    assert_eq!((names, said.code), (vec![json!("qwen3_moe"), json!("mixtral")], 0));
}

#[test]
fn a_case_without_manifest_has_calc_diff_and_relative_tolerances() {
    let cases = Cases::of(&["mixtral", "routing_mixtral_8", "fp8_deepseek_v3"]);
    std::fs::remove_file(cases.path("MANIFEST.json")).unwrap();
    for (name, kind, status) in [
        ("mixtral", "float", "pass"),
        ("routing_mixtral_8", "routing", "pass"),
        ("fp8_deepseek_v3", "fp8_block", "pass"),
    ] {
        let (line, _) = judged(&cases.path(name));
        assert_eq!([&line["status"], &line["kind"]], [&json!(status), &json!(kind)], "{line}");
        for check in line["checks"].as_array().unwrap() {
            let name = check["name"].as_str().unwrap();
            let exact = ["topk_ids", "_codes_", "_scales_"].iter().any(|part| name.contains(part));
            let expected = if exact { json!(0) } else { json!(1e-5) };
            assert_eq!(check["tolerance"], expected);
        }
    }
    // One value of 64 rows is off by a factor: calc_diff sees it.
    cases.tamper("mixtral", "t64.output", |bytes| bytes[7] ^= 0x80);
    expect(&judged(&cases.path("mixtral")).0, "fail", "t64.output");
}

#[test]
fn atol_overrides_the_tolerance_of_outputs() {
    let mixtral = golden("mixtral");
    let said = verify(&[&mixtral], "cpu", &["--atol", "1e-12"]);
    let line = said.json();
    expect(&line, "fail", "t64.output");
    assert_eq!((&check(&line, "t1.output")["tolerance"], said.code), (&json!(1e-12), 1));
    assert_ne!(check(&line, "t1.topk_weights")["tolerance"], 1e-12);
    let cases = Cases::of(&["mixtral"]);
    cases.tamper("mixtral", "t7.output", |bytes| bytes[7] ^= 0x80);
    assert_eq!(verify(&[cases.root()], "cpu", &["--atol", "1000"]).code, 0);
}

#[test]
fn an_unknown_kind_or_model_type_is_unsupported_by_name() {
    let cases = Cases::of(&["mixtral", "qwen3_moe"]);
    cases.enter("mixtral", "kind", json!("fp3_mystery"));
    configure(&cases.path("qwen3_moe"), "model_type", "mystery_moe");
    let said = verify(&[cases.root()], "cpu", &[]);
    let lines = said.lines();
    expect(lines.iter().find(|line| line["name"] == "mixtral").unwrap(), "unsupported", "fp3_mystery");
    expect(lines.iter().find(|line| line["name"] == "qwen3_moe").unwrap(), "unsupported", "mystery_moe");
    assert_eq!(said.code, 3);
}

#[test]
fn a_manifest_that_makes_no_sense_is_a_failed_case_or_no_case() {
    let cases = Cases::of(&["mixtral"]);
    for (key, value) in [("atol", json!("small")), ("atol", json!(-1)), ("layer", json!(-3)), ("layer", json!("2"))] {
        cases.enter("mixtral", key, value);
        let (line, code) = judged(cases.root());
        expect(&line, "fail", key);
        assert_eq!(code, 1);
        cases.write_manifest(&manifest_of("mixtral"));
    }
    cases.write_manifest(&json!({"cases": [7, {"name": "absent", "kind": "float"}]}));
    let said = verify(&[cases.root()], "cpu", &[]);
    assert_eq!((said.code, said.lines().len()), (1, 2));
    for broken in [json!({}), json!([]), json!({"cases": {}})] {
        cases.write_manifest(&broken);
        let said = verify(&[cases.root()], "cpu", &[]);
        assert_eq!((said.code, said.stdout.as_str()), (2, ""), "{}", said.stderr);
        says(&said.stderr, &["MANIFEST.json"]);
    }
}

fn manifest_of(name: &str) -> Value {
    let mut manifest = manifest();
    manifest["cases"].as_array_mut().unwrap().retain(|entry| entry["name"] == name);
    manifest
}

#[test]
fn an_unknown_key_is_a_warning_unless_strict() {
    let cases = Cases::of(&["mixtral"]);
    configure(&cases.path("mixtral"), "expert_mystery", 1);
    let said = verify(&[cases.root()], "cpu", &[]);
    assert_eq!((said.code, &said.json()["unknown_keys"]), (0, &json!(["expert_mystery"])));
    says(&said.stderr, &["warning", "expert_mystery"]);
    let said = verify(&[cases.root()], "cpu", &["--strict"]);
    assert_eq!((said.code, &said.json()["status"]), (1, &json!("pass")));
}

#[test]
fn usage_and_no_case_are_exit_2_with_nothing_on_standard_output() {
    let empty = tempfile::tempdir().unwrap();
    let primitive = golden("prim_format_tables");
    for args in [
        vec!["verify"],
        vec!["verify", "--backend", "cpu"],
        vec!["verify", text(empty.path()), "--backend", "cpu"],
        vec!["verify", "/no/such/folder", "--backend", "cpu"],
        vec!["verify", text(&primitive), "--backend", "cpu"],
        vec!["verify", text(&primitive), "--backend", "metal"],
        vec!["verify", text(&primitive), "--atol", "small"],
        vec!["verify", text(&primitive), "--atol", "-1"],
        vec!["verify", text(&primitive), "--atol", "NaN"],
        vec!["verify", text(&primitive), "--no-such-option"],
    ] {
        let said = moewe(&args);
        assert_eq!((said.code, said.stdout.as_str()), (2, ""), "{args:?}");
        says(&said.stderr, &["error"]);
    }
}
