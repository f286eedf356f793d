//! `moewe run`.

use serde_json::{Value, json};

use super::{Said, arguments, backends, configure, copy_case, moewe, text, tool};
use crate::samples::{golden, says};

const KEYS: [&str; 24] = [
    "status",
    "reason",
    "backend",
    "adapter",
    "passed_over",
    "checkpoint",
    "family",
    "model_type",
    "layer",
    "tokens",
    "checked_tokens",
    "seed",
    "unknown_keys",
    "notes",
    "spec",
    "damage",
    "memory",
    "decisions",
    "stages",
    "timing_method",
    "tokens_per_s",
    "errors",
    "tokens_per_expert",
    "ablations",
];

fn run(checkpoint: Option<&str>, backend: &str, rest: &[&str]) -> Said {
    let first: Vec<&str> = ["run"].into_iter().chain(checkpoint).collect();
    moewe(arguments(&first, backend, rest))
}

#[track_caller]
fn report(checkpoint: Option<&str>, backend: &str, rest: &[&str]) -> (Value, i32) {
    let said = run(checkpoint, backend, &[rest, &["--json"]].concat());
    let report = said.json();
    let keys: Vec<&str> = report.as_object().unwrap().keys().map(String::as_str).collect();
    assert_eq!(keys, KEYS);
    (report, said.code)
}

#[track_caller]
fn agrees(report: &Value) {
    assert_eq!(report["status"], "pass", "{report}");
    let errors = &report["errors"];
    assert_eq!(errors["topk_ids"]["wrong_tokens"], 0);
    for name in ["topk_weights", "output_calc_diff", "output_row_relative"] {
        assert!(errors[name]["error"].as_f64().unwrap() <= errors[name]["tolerance"].as_f64().unwrap(), "{errors}");
    }
    let shares: f64 = report["stages"].as_array().unwrap().iter().map(|stage| stage["share"].as_f64().unwrap()).sum();
    assert!((shares - 1.0).abs() < 1e-9, "{report}");
    assert!(report["tokens_per_s"].as_f64().unwrap() > 0.0);
    assert!(report["timing_method"].as_str().unwrap().ends_with("median of 5"));
    for part in ["weights_bytes", "scratch_bytes", "io_bytes"] {
        assert!(report["memory"][part].as_u64().unwrap() > 0);
    }
}

#[test]
fn the_sample_agrees_with_the_reference_on_every_backend() {
    let mut counts = vec![];
    for backend in backends() {
        let (report, code) = report(None, backend, &["--tokens", "9", "--seed", "5"]);
        assert_eq!((code, &report["backend"]), (0, &json!(backend)), "{report}");
        assert_eq!([&report["tokens"], &report["seed"], &report["layer"]], [&json!(9), &json!(5), &json!(3)]);
        assert_eq!([&report["family"], &report["model_type"]], ["deepseek_v3", "deepseek_v3"]);
        assert_eq!(report["spec"]["routing.routed_scaling_factor"], "2.5");
        if backend == "reference" {
            assert_eq!(
                [&report["errors"], &report["stages"], &report["memory"]],
                [&Value::Null, &json!([]), &Value::Null]
            );
        } else {
            agrees(&report);
            assert_eq!(report["checked_tokens"], 9);
        }
        counts.push(report["tokens_per_expert"].clone());
    }
    let total: u64 = counts[0].as_array().unwrap().iter().map(|count| count.as_u64().unwrap()).sum();
    assert_eq!((counts[0].as_array().unwrap().len(), total), (12, 9 * 4));
    assert!(counts.iter().all(|found| *found == counts[0]), "{counts:?}");
    assert_ne!(report(None, "cpu", &["--tokens", "9", "--seed", "6"]).0["tokens_per_expert"], counts[0]);
}

#[test]
fn a_checkpoint_agrees_with_the_reference_on_every_backend() {
    for backend in backends().into_iter().filter(|backend| *backend != "reference") {
        for case in ["gpt_oss", "deepseek_v4_hash", "fp8_qwen3_moe_ue8m0"] {
            let (report, code) = report(Some(text(&golden(case))), backend, &["--tokens", "20"]);
            agrees(&report);
            assert_eq!(code, 0);
        }
    }
}

#[test]
fn the_text_has_every_section() {
    for args in [&["run"][..], &[]] {
        let said = moewe(arguments(args, "cpu", &[]));
        assert_eq!(said.code, 0, "{}", said.stderr);
        let parts = [
            "backend      cpu",
            "adapter      none",
            "family       deepseek_v3 (model_type deepseek_v3), layer 3",
            "spec\n",
            "routing.routed_scaling_factor          2.5",
            "memory needed",
            "MiB",
            "time per stage (wall clock, median of 5)",
            "experts.gate_up ",
            "tokens/s",
            "compared with the reference (routing of 16 tokens, output of 16)",
            "output_calc_diff",
            "tokens per expert (12 experts",
            "█",
        ];
        says(&said.stdout, &parts);
    }
}

#[test]
fn auto_takes_no_software_adapter_and_says_why() {
    let (report, code) = report(None, "auto", &[]);
    assert_eq!(code, 0, "{report}");
    let passed_over = report["passed_over"].as_array().unwrap();
    match report["backend"].as_str().unwrap() {
        "cpu" => {
            assert!(passed_over.iter().all(|passed| passed["reason"].as_str().unwrap().contains("--backend wgpu")))
        }
        backend => assert_eq!((backend, report["adapter"].is_string()), ("wgpu", true)),
    }
    // Who names an adapter wants that one.
    if cfg!(feature = "wgpu") {
        let (named, code) = self::report(None, "auto", &["--adapter", "no such thing"]);
        assert_eq!((code, &named["status"], &named["backend"]), (3, &json!("unsupported"), &json!("wgpu")));
        says(named["reason"].as_str().unwrap(), &["no such thing"]);
        let reason = |passed: &Value| passed["reason"] == "does not match --adapter no such thing";
        assert!(named["passed_over"].as_array().unwrap().iter().all(reason));
    }
    let said = run(None, "cpu", &["--adapter", "anything"]);
    says(&said.stderr, &["warning: --adapter anything has no effect"]);
}

/// Whether the device has them is asked of the device, not of the arguments.
#[cfg(feature = "wgpu")]
#[test]
fn run_time_checks_change_no_word_of_a_report() {
    let numbers = |value: &Value| [&value["errors"], &value["tokens_per_expert"], &value["spec"]].map(Clone::clone);
    let (plain, code) = report(None, "wgpu", &[]);
    assert_eq!(code, 0, "{plain}");
    let said = run(None, "wgpu", &["--checked", "--json"]);
    assert_eq!(said.code, 0, "{}", said.stderr);
    assert_eq!(numbers(&said.json()), numbers(&plain));
    says(&said.stderr, &["warning: every kernel has wgpu's run-time checks"]);
    assert!(!run(None, "wgpu", &[]).stderr.contains("run-time checks"));
    says(&run(None, "cpu", &["--checked"]).stderr, &["warning: --checked has no effect: backend cpu"]);
}

/// The file of compiled pipelines: written, read, and whatever it holds or wherever it is, a warning at most.
#[cfg(feature = "wgpu")]
#[test]
fn pipelines_are_kept_for_the_next_run_and_a_file_of_them_is_never_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let said = |cache: &std::path::Path, rest: &[&str]| {
        let output = tool(text(cache)).args(arguments(&["run"], "wgpu", rest)).output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stderr).unwrap()
    };
    let cache = folder.path().join("cache");
    // Without features there is no such cache.
    assert!(!said(&cache, &["--portable"]).contains("pipelines") && !cache.join("moewe").exists());
    assert_eq!(said(&cache, &[]).matches("warning").count(), 0);
    let Ok(files) = std::fs::read_dir(cache.join("moewe")) else {
        println!("not tested: the adapter has no pipeline cache");
        return;
    };
    let files: Vec<_> = files.map(|file| file.unwrap().path()).collect();
    assert_eq!(files.len(), 1, "{files:?}");
    let whole = std::fs::read(&files[0]).unwrap();
    assert_eq!(said(&cache, &[]).matches("warning").count(), 0);
    std::fs::write(&files[0], &whole[..whole.len() / 2]).unwrap();
    let warned = said(&cache, &[]);
    assert_eq!(warned.matches("warning").count(), 1, "{warned}");
    says(&warned, &["warning: ", "is not used: it is damaged; it is begun anew", text(&files[0])]);
    assert_eq!(said(&cache, &[]).matches("warning").count(), 0);
    // A file stands where the folder should be.
    let warned = said(&files[0], &[]);
    assert_eq!(warned.matches("warning").count(), 1, "{warned}");
    says(&warned, &["warning: compiled pipelines are not kept: "]);
}

#[test]
fn an_absent_cuda_device_is_unsupported() {
    // With a driver or without, in a build with the feature or without.
    let said = run(None, "cuda", &["--adapter", "no such device"]);
    assert_eq!(said.code, 3);
    says(&said.stderr, &["error: cuda does not support"]);
    says(&said.stdout, &["routing.method"]);
}

#[test]
fn an_unknown_key_is_a_warning_unless_strict() {
    let dir = tempfile::tempdir().unwrap();
    copy_case("mixtral", dir.path());
    configure(dir.path(), "expert_mystery", 1);
    let path = Some(text(dir.path()));
    let said = run(path, "cpu", &["--json"]);
    assert_eq!((said.code, &said.json()["unknown_keys"]), (0, &json!(["expert_mystery"])));
    assert_eq!(said.json()["status"], "pass");
    says(&said.stderr, &["warning", "expert_mystery"]);
    let said = run(path, "cpu", &["--json", "--strict"]);
    assert_eq!((said.code, &said.json()["status"]), (1, &json!("pass")));
    assert_eq!(run(None, "cpu", &["--strict"]).code, 0);
}

#[test]
fn what_is_unknown_is_unsupported_by_name() {
    let dir = tempfile::tempdir().unwrap();
    for (key, value) in [("model_type", "mystery_moe"), ("dtype", "float3"), ("hidden_act", "mystery")] {
        copy_case("mixtral", dir.path());
        configure(dir.path(), key, value);
        let (report, code) = report(Some(text(dir.path())), "cpu", &[]);
        assert_eq!((code, &report["status"]), (3, &json!("unsupported")), "{report}");
        says(report["reason"].as_str().unwrap(), &[key, value]);
    }
    let (report, code) = report(None, "cpu", &["--activations", "mystery"]);
    assert_eq!((code, &report["status"]), (3, &json!("unsupported")));
    says(report["reason"].as_str().unwrap(), &["--activations = mystery"]);
}

#[test]
fn activations_are_quantised_only_on_demand() {
    let fp8 = golden("fp8_deepseek_v3");
    let (none, code) = report(Some(text(&fp8)), "cpu", &["--tokens", "2"]);
    says(&none["notes"].to_string(), &["activation_scheme", "not applied"]);
    assert_eq!((code, &none["spec"]["experts.activation_quant"]), (0, &json!("None")));
    for (scheme, parts) in [
        ("dynamic", ["Group(128)", "F32"]),
        ("dynamic-ue8m0", ["Group(128)", "F32CeilPow2"]),
        ("dynamic-64", ["Group(64)", "F32"]),
        ("token", ["Token", "F32"]),
        ("tensor", ["Tensor", "F32"]),
    ] {
        let (dynamic, code) = report(Some(text(&fp8)), "cpu", &["--activations", scheme]);
        agrees(&dynamic);
        assert_eq!(code, 0, "{scheme}");
        let said = dynamic["spec"]["experts.activation_quant"].as_str().unwrap();
        says(said, &["Dynamic", "E4m3"]);
        says(said, &parts);
    }
    for (scheme, parts) in [("int8", ["INT8 codes", "Fp8Block"]), ("static", ["input_scale", "Fp8Block"])] {
        let (refused, code) = report(Some(text(&fp8)), "cpu", &["--activations", scheme]);
        assert_eq!(code, 3);
        says(refused["reason"].as_str().unwrap(), &parts);
    }
}

#[test]
fn the_checkpoints_dtype_is_the_input_type() {
    let dir = tempfile::tempdir().unwrap();
    for (dtype, input) in
        [(json!("float16"), "F16"), (json!("float32"), "F32"), (json!("bfloat16"), "Bf16"), (json!(null), "Bf16")]
    {
        copy_case("mixtral", dir.path());
        configure(dir.path(), "dtype", dtype);
        let (report, code) = report(Some(text(dir.path())), "cpu", &[]);
        agrees(&report);
        assert_eq!((code, &report["spec"]["precision.input"]), (0, &json!(input)));
    }
}

#[test]
fn an_error_is_exit_1_on_both_streams() {
    let said = run(Some("/no/such/folder"), "cpu", &["--json"]);
    assert_eq!((said.code, &said.json()["status"]), (1, &json!("fail")));
    says(said.json()["reason"].as_str().unwrap(), &["/no/such/folder"]);
    says(&said.stderr, &["error: /no/such/folder"]);
    let said = run(None, "cpu", &["--layer", "0"]);
    assert_eq!(said.code, 1);
    says(&said.stderr, &["error: layer: found 0"]);
}

#[test]
fn usage_is_exit_2() {
    for args in [
        &["run", "--tokens", "0"][..],
        &["run", "--tokens", "-1"],
        &["run", "--backend", "metal"],
        &["run", "--seed", "x"],
        &["run", "a", "b"],
        &["nonsense"],
        &["--no-such-option"],
    ] {
        let said = moewe(args);
        assert_eq!((said.code, said.stdout.as_str()), (2, ""), "{args:?}");
    }
    assert_eq!(moewe(["--help"]).code, 0);
}

#[test]
fn a_scan_names_the_tensors_that_hold_what_is_no_number() {
    let (clean, code) = report(None, "reference", &["--scan"]);
    assert_eq!((&clean["damage"], code), (&json!([]), 0));
    assert_eq!(report(None, "reference", &[]).0["damage"], Value::Null);

    let scratch = tempfile::tempdir().unwrap();
    let folder = scratch.path().join("mixtral");
    copy_case("mixtral", &folder);
    let path = folder.join("weights.safetensors");
    let mut file = std::fs::read(&path).unwrap();
    let at = {
        let tensors = safetensors::SafeTensors::deserialize(&file).unwrap();
        let data = tensors.tensor("model.layers.2.block_sparse_moe.experts.5.w3.weight").unwrap().data().as_ptr();
        data as usize - file.as_ptr() as usize
    };
    // bf16 NaN at row 1, column 3, and infinity behind it.
    let cell = at + 2 * (160 + 3);
    file[cell..cell + 4].copy_from_slice(&[0xc0, 0x7f, 0x80, 0x7f]);
    std::fs::write(&path, file).unwrap();
    let folder = text(&folder);
    for backend in backends() {
        let (found, code) = report(Some(folder), backend, &["--scan"]);
        assert_eq!((&found["status"], code), (&json!("fail"), 1));
        let expected = json!([{
            "tensor": "model.layers.2.block_sparse_moe.experts.5.w3.weight",
            "matrix": "experts[5].up",
            "not_finite": 2,
            "first": [1, 3],
        }]);
        assert_eq!(found["damage"], expected);
        says(found["reason"].as_str().unwrap(), &["experts.5.w3.weight", "2 weights", "row 1, column 3"]);
    }
    // Without a scan they propagate, on the backend as in the reference.
    let (found, code) = report(Some(folder), "cpu", &["--tokens", "64"]);
    assert_eq!((&found["status"], code), (&json!("pass"), 0));
}

#[test]
fn dropping_a_field_is_shown_with_what_it_would_have_done() {
    let said = run(None, "cpu", &["--ablate", "routed_scaling_factor,TopK.groups"]);
    assert_eq!(said.code, 0, "{}", said.stderr);
    says(
        &said.stdout,
        &[
            "what dropping a field would have done (routing of 16 tokens, output of 16)",
            "An engine that drops routed_scaling_factor = 2.5 computes as if it were 1: the output is off by ",
            ", and every token keeps its experts. Nothing fails.",
            "16 tokens go to other experts",
            "by token: ",
        ],
    );
    let (found, code) = report(None, "cpu", &["--ablate", "all", "--tokens", "24"]);
    assert_eq!(code, 0);
    let listed = run(None, "cpu", &["--ablate", "list", "--json"]);
    let fields = |lines: &[Value]| lines.iter().map(|line| line["field"].clone()).collect::<Vec<_>>();
    let all = found["ablations"].as_array().unwrap();
    assert_eq!((listed.code, fields(&listed.lines())), (0, fields(all)));
    for effect in all {
        let errors: Vec<f64> = effect["token_errors"].as_array().unwrap().iter().map(|e| e.as_f64().unwrap()).collect();
        let (overall, worst) = (effect["relative_error"].as_f64().unwrap(), errors.iter().copied().fold(0.0, f64::max));
        assert_eq!((errors.len(), &effect["tokens"]), (24, &json!(24)));
        assert!(overall <= worst, "{effect}");
        says(effect["sentence"].as_str().unwrap(), &[effect["key"].as_str().unwrap()]);
        // Random weights meet the type of a bias rarely.
        assert!(overall > 0.1 || effect["key"] == "e_score_correction_bias_dtype", "{effect}");
    }
    let of = |key: &str| all.iter().find(|effect| effect["key"] == key).unwrap();
    assert_eq!(of("routed_scaling_factor")["tokens_with_other_experts"], 0);
    assert!(of("e_score_correction_bias")["tokens_with_other_experts"].as_u64().unwrap() > 0);

    // What the layer has not, and what nobody has, is refused before anything runs.
    for word in ["swiglu_limit", "mystery"] {
        let said = run(None, "cpu", &["--ablate", word]);
        assert_eq!((said.code, said.stdout.as_str()), (2, ""));
        says(&said.stderr, &[word, "routed_scaling_factor", "--ablate list"]);
    }
    let limited = run(Some(text(&golden("gpt_oss"))), "reference", &["--ablate", "swiglu_limit", "--tokens", "4"]);
    assert_eq!(limited.code, 0, "{}", limited.stderr);
    says(&limited.stdout, &["An engine that drops swiglu_limit = 7.0 computes as if there were no limit"]);
}

#[test]
fn a_chart_shows_each_choice_and_each_stage() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("routing.svg");
    for backend in backends() {
        let (found, code) = report(None, backend, &["--tokens", "5", "--plot", text(&path)]);
        assert_eq!(code, 0, "{found}");
        let chart = std::fs::read_to_string(&path).unwrap();
        // White ground and that of the map, nine shades of the scale; four choices a token.
        let loads = found["tokens_per_expert"].as_array().unwrap().iter().filter(|load| **load != 0).count();
        let stages = found["stages"].as_array().unwrap();
        assert_eq!(chart.matches("<rect").count(), 2 + 9 + 5 * 4 + loads + stages.len(), "{backend}");
        assert!(stages.iter().all(|stage| chart.contains(stage["name"].as_str().unwrap())), "{backend}");
        says(&chart, &["deepseek_v3, layer 3: 5 tokens", backend, "</svg>"]);
    }
    let said = run(None, "cpu", &["--plot", text(folder.path())]);
    assert_eq!(said.code, 1);
    says(&said.stderr, &["the chart cannot be written", "give another path"]);
}
