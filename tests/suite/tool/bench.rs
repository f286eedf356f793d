//! `moewe bench`.

use serde_json::Value;

use super::{Said, arguments, backends, moewe};
use crate::samples::says;

const KEYS: [&str; 21] = [
    "case",
    "backend",
    "adapter",
    "tokens",
    "scale",
    "fused",
    "status",
    "reason",
    "us_median",
    "us_min",
    "us_max",
    "runs",
    "bytes",
    "flops",
    "read_gb_s",
    "floor_us",
    "gap",
    "dispatches",
    "checked_rows",
    "worst_error",
    "tolerance",
];
/// Null unless the case passed.
const TIMING: [&str; 7] = ["us_median", "us_min", "us_max", "runs", "read_gb_s", "floor_us", "gap"];
const CASES: [&str; 8] = [
    "dsv3_fp8",
    "minimax_m2_fp8",
    "qwen3_30b_fp8",
    "qwen3_30b_bf16",
    "kimi_linear_bf16",
    "gptoss20b_mxfp4",
    "gptoss120b_mxfp4",
    "dsv4_flash_fp4",
];

fn bench(backend: &str, rest: &[&str]) -> Said {
    moewe(arguments(&["bench"], backend, rest))
}

/// Full widths, the fewest experts: some seconds in an unoptimised build.
const SMALL: [&str; 5] = ["--case", "qwen3_30b_fp8", "--scale", "0.001", "--json"];

#[test]
fn a_case_is_checked_and_timed_fused_and_unfused() {
    for backend in backends().into_iter().filter(|backend| *backend != "reference") {
        let said = bench(backend, &[&SMALL[..], &["--tokens", "1,3"]].concat());
        assert_eq!(said.code, 0, "{}", said.stderr);
        let lines = said.lines();
        let cases: Vec<_> = lines.iter().map(|line| (line["tokens"].as_u64(), line["fused"].as_bool())).collect();
        let expected = [(1, true), (3, true), (1, false), (3, false)];
        assert_eq!(cases, expected.map(|(tokens, fused)| (Some(tokens), Some(fused))));
        for line in &lines {
            let keys: Vec<&str> = line.as_object().unwrap().keys().map(String::as_str).collect();
            assert_eq!(keys, KEYS);
            assert_eq!((&line["status"], &line["reason"]), (&"pass".into(), &Value::Null), "{line}");
            assert_eq!((&line["backend"], &line["case"]), (&backend.into(), &"qwen3_30b_fp8".into()));
            assert_eq!(line["adapter"].is_string(), backend == "wgpu");
            assert_eq!((&line["scale"], &line["checked_rows"]), (&0.001.into(), &2.into()));
            let figure = |key: &str| line[key].as_f64().unwrap_or_else(|| panic!("{key}: {line}"));
            assert!(figure("worst_error") <= figure("tolerance"), "{line}");
            assert!(0.0 < figure("us_min") && figure("us_min") <= figure("us_median"), "{line}");
            assert!(figure("us_median") <= figure("us_max") && figure("runs") >= 3.0 && figure("dispatches") >= 4.0);
            assert!((figure("gap") * figure("floor_us") / figure("us_median") - 1.0).abs() < 1e-9, "{line}");
            // 8 of 16 experts, or all: 3 x 2048 x 768 codes and their scales each.
            let (expert, bytes) = (3.0 * 2048.0 * 768.0 * (1.0 + 4.0 / 16384.0), figure("bytes"));
            assert!(7.9 * expert < bytes && bytes < 16.1 * expert, "{line}");
            assert!((bytes / figure("read_gb_s") / figure("floor_us") / 1e3 - 1.0).abs() < 1e-9, "{line}");
            assert_eq!(figure("flops"), figure("tokens") * 8.0 * 6.0 * 2048.0 * 768.0);
        }
    }
}

#[test]
fn what_cannot_be_timed_is_unsupported_and_has_no_times() {
    for (backend, reason) in [("reference", "time cpu or wgpu"), ("cuda", "cuda")] {
        let said = bench(backend, &["--tokens", "1,16", "--json"]);
        assert_eq!(said.code, 3, "{}", said.stderr);
        says(&said.stderr, &[reason, "dsv3_fp8, 16 tokens"]);
        let lines = said.lines();
        for case in CASES {
            let quantised = ["_fp8", "_fp4"].iter().any(|end| case.ends_with(end));
            let of_case = lines.iter().filter(|line| line["case"] == case).count();
            assert_eq!(of_case, if quantised { 4 } else { 2 }, "{case}");
        }
        for line in lines {
            assert_eq!(line["status"], "unsupported");
            says(line["reason"].as_str().unwrap(), &[reason]);
            assert!(TIMING.iter().all(|key| line[key].is_null()), "{line}");
        }
    }
}

#[test]
fn the_table_has_a_line_for_each_json_line() {
    let said = bench("reference", &["--case", "dsv4_flash_fp4,kimi_linear_bf16", "--tokens", "1,2"]);
    assert_eq!((said.code, said.stdout.lines().count()), (3, 5 + 6));
    says(&said.stdout, &["backend      reference", "median us", "dsv4_flash_fp4         2 false    unsupported"]);
    // Progress is for terminals.
    assert!(said.stderr.lines().all(|line| line.starts_with("error: ")), "{}", said.stderr);
}

#[test]
fn a_chart_has_the_peers_beside_what_was_measured() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("gaps.svg");
    let said = bench("reference", &["--case", "dsv3_fp8", "--plot", path.to_str().unwrap()]);
    assert_eq!(said.code, 3, "{}", said.stderr);
    let chart = std::fs::read_to_string(&path).unwrap();
    // Nothing was measured: the peers' line alone.
    assert_eq!((chart.matches("<polyline").count(), chart.matches("dsv3_fp8").count()), (1, 1));
    let said = bench("reference", &["--case", "dsv3_fp8", "--plot", folder.path().to_str().unwrap()]);
    assert_eq!(said.code, 1);
    says(&said.stderr, &["the chart cannot be written"]);
}

#[test]
fn usage_is_2_and_says_what_there_is() {
    for (rest, what) in [
        (["--case", "mixtral"], "gptoss120b_mxfp4"),
        (["--case", "dsv3_fp8,"], "possible values"),
        (["--tokens", "1,0"], "at least 1 token"),
        (["--tokens", "many"], "--tokens"),
        (["--scale", "0"], "above 0"),
        (["--scale", "1.5"], "at most 1"),
        (["--scale", "NaN"], "at most 1"),
        (["--backend", "metal"], "wgpu"),
    ] {
        let said = moewe(["bench"].into_iter().chain(rest));
        assert_eq!((said.code, said.stdout.as_str()), (2, ""), "{rest:?}");
        says(&said.stderr, &[what]);
    }
    let help = moewe(["bench", "--help"]);
    assert_eq!(help.code, 0);
    says(&help.stdout, &["moewe bench --case qwen3_30b_bf16 --tokens 1,16 --backend wgpu --scale 0.1", "Exit status"]);
}
