//! `moewe doctor`. That its layers run every kernel is here too.

use std::collections::BTreeSet;
use std::process::{Command, Stdio};

use fastrand::Rng;
use moewe::conformance::answers::{self, Catalogue, Piece, pieces};
use moewe::kernels::{Epilogue, GroupedGemm, Operation, Stage};
use moewe::schedule::{DeviceFacts, Units, lower};
use moewe::spec::Activation;
use moewe::{Backend, Options, Scope};
use serde_json::Value;

use super::{Said, moewe};
use crate::random::{random_spec, specs};
use crate::rig::gpu;
use crate::samples::says;
use crate::witnesses::Deaf;

const KEYS: [&str; 19] = [
    "backend",
    "adapter",
    "name",
    "api",
    "driver",
    "type",
    "software",
    "status",
    "reason",
    "features",
    "limits",
    "kernels",
    "layers",
    "read_gb_s",
    "gflop_s",
    "dispatch_us",
    "timing",
    "seconds",
    "verdict",
];

/// Kernels that `lower` chooses for many layers and calls on a device, with their fragments.
fn reachable(facts: &DeviceFacts) -> BTreeSet<Piece> {
    let other = Options { diagnostics: true, fuse_quantization: false, ..Options::AUTO };
    let random = (0..400).map(|seed| random_spec(&mut Rng::with_seed(seed)));
    let mut found = BTreeSet::new();
    for spec in specs(200).into_iter().chain(random) {
        for (options, max_tokens) in [(Options::AUTO, 8), (Options::AUTO, 4096), (other, 4096)] {
            let schedule = lower(&spec, Scope::Layer, max_tokens, facts, &options).unwrap();
            let steps = schedule.buckets.iter().flat_map(|bucket| &bucket.steps);
            found.extend(steps.flat_map(|step| pieces(&step.operation.source())));
        }
    }
    found
}

fn floor() -> DeviceFacts {
    DeviceFacts {
        backend: "text",
        max_binding_bytes: 128 << 20,
        max_workgroups: 65_535,
        exact_halves: false,
        matrix_units: Units::None,
    }
}

/// What a CUDA device has beside it.
fn units() -> DeviceFacts {
    DeviceFacts { exact_halves: true, matrix_units: Units::Warps, ..floor() }
}

/// And one of compute capability 9.0.
fn warpgroups() -> DeviceFacts {
    DeviceFacts { matrix_units: Units::Warpgroups { multiprocessors: 132 }, ..units() }
}

#[test]
fn every_kernel_and_fragment_that_a_layer_could_get_is_run() {
    for facts in [gpu().facts(), floor(), DeviceFacts { exact_halves: true, ..floor() }, units(), warpgroups()] {
        let (run, reachable) = (Catalogue::new(&facts).pieces(), reachable(&facts));
        let missing: Vec<_> = reachable.difference(&run).collect();
        assert!(missing.is_empty(), "{missing:?}");
    }
}

/// The folder of shaders is the catalogue: what no layer on this device could get has to be named here.
#[test]
fn what_is_not_run_is_known() {
    // Of no layer, or what a device proves before one is planned.
    let beside = [Stage::Synthesize.name(), Stage::Stream.name(), "proof"];
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("shaders");
    let mut on_disk = BTreeSet::new();
    for stage in std::fs::read_dir(&root).unwrap() {
        let stage = stage.unwrap().file_name().into_string().unwrap();
        if stage == "fragments" || beside.contains(&stage.as_str()) {
            continue;
        }
        for file in std::fs::read_dir(root.join(&stage)).unwrap() {
            let file = file.unwrap().file_name().into_string().unwrap();
            on_disk.insert(format!("{stage}/{}", file.trim_end_matches(".wgsl").trim_end_matches(".cu")));
        }
    }
    let run: BTreeSet<String> = [floor(), units(), warpgroups()]
        .iter()
        .flat_map(|facts| Catalogue::new(facts).pieces())
        .map(|(kernel, _)| kernel.to_owned())
        .collect();
    assert_eq!(run, on_disk);
}

#[test]
fn what_a_kernel_needs_is_found_in_its_code_and_not_in_its_comments() {
    let known = Catalogue::new(&floor());
    says(&known.kernels_with("workgroupBarrier").into_iter().collect::<Vec<_>>().join(" "), &["grouped_gemm/tiled"]);
    assert!(known.kernels_with("workgroupBarrier").len() < known.kernels_with("workgroup_size").len());
    // The floor has no feature.
    for word in ["f16", "subgroup", "coop_mat", "Twin"] {
        assert!(known.kernels_with(word).is_empty(), "{word}");
    }
}

#[test]
fn a_kernel_that_is_wrong_is_named_and_no_other() {
    let mut known = Catalogue::new(&floor());
    // Some have a limit that acts, and all have norms, routers and sums beside it.
    known.layers.truncate(12);
    let asked = |calls, drop| answers::ask(&Deaf::like(floor(), calls, drop), &known, &|_, _| {});
    let right = asked(usize::MAX, |_| {});
    assert!(right.right(), "{right:?}");
    let wrong = asked(usize::MAX, |operation| {
        if let Operation::GroupedGemm(GroupedGemm { epilogue: Epilogue::Activation(activated), .. }) = operation
            && let Activation::Swiglu { limit } = &mut activated.activation
        {
            *limit = None;
        }
    });
    let named: Vec<_> = wrong.kernels.iter().filter(|kernel| kernel.complaint.is_some()).collect();
    assert!(!wrong.right() && !named.is_empty() && !wrong.complaints.is_empty(), "{wrong:?}");
    for kernel in named {
        says(kernel.kernel, &["grouped_gemm/"]);
        says(kernel.complaint.as_deref().unwrap(), &["gate_up of ", "its twin says"]);
    }
    // A device that is lost in between is not right, and says so.
    let lost = asked(100, |_| {});
    assert!(!lost.right() && lost.complaints.iter().any(|complaint| complaint.contains("lost")), "{lost:?}");
}

fn doctor(rest: &[&str]) -> Said {
    moewe(["doctor"].iter().chain(rest))
}

#[track_caller]
fn expect_line(line: &Value) {
    let keys: Vec<&str> = line.as_object().unwrap().keys().map(String::as_str).collect();
    assert_eq!(keys, KEYS);
    let kernels = line["kernels"].as_array().unwrap();
    assert_eq!((&line["status"], &line["reason"]), (&"pass".into(), &Value::Null), "{line}");
    let names: BTreeSet<&str> = kernels.iter().map(|kernel| kernel["kernel"].as_str().unwrap()).collect();
    let known = Catalogue::new(&gpu().facts());
    assert_eq!(names, known.kernels.values().map(|source| source.kernel()).collect());
    for kernel in kernels {
        assert_eq!((&kernel["status"], &kernel["reason"]), (&"pass".into(), &Value::Null));
        assert!(kernel["runs"].as_u64().unwrap() > 0 && kernel["texts"].as_u64().unwrap() > 0, "{kernel}");
        assert!(kernel["worst_error"].as_f64().unwrap() <= kernel["tolerance"].as_f64().unwrap(), "{kernel}");
    }
    assert_eq!(line["layers"]["status"], "pass");
    assert!(line["layers"]["count"].as_u64().unwrap() as usize >= known.layers.len());
    assert!(line["read_gb_s"].as_f64().unwrap() > 0.0 && line["dispatch_us"].as_f64().unwrap() >= 0.0, "{line}");
    assert!(line["gflop_s"].as_f64().unwrap() > 0.0, "{line}");
    says(line["verdict"].as_str().unwrap(), &["right: all", "kernels gave the known answers", "Qwen3-30B-A3B"]);
}

#[test]
fn the_cpu_is_examined_alone() {
    let said = doctor(&["--adapter", "CPU", "--json"]);
    assert_eq!(said.code, 0, "{}", said.stderr);
    let line = said.json();
    expect_line(&line);
    assert_eq!((&line["backend"], &line["adapter"]), (&"cpu".into(), &Value::Null));
}

#[cfg(feature = "wgpu")]
#[test]
fn the_adapter_under_test_is_right_and_known() {
    let name = std::env::var("MOEWE_ADAPTER").unwrap_or_default();
    let said = doctor(&["--adapter", &name, "--portable", "--json"]);
    assert_eq!(said.code, 0, "{}", said.stderr);
    let lines = said.lines();
    let line = lines.iter().find(|line| line["backend"] == "wgpu").unwrap_or_else(|| panic!("{}", said.stdout));
    expect_line(line);
    let named = |list: &str, name: &str| {
        let list = line[list].as_array().unwrap();
        list.iter().find(|fact| fact["name"] == name).unwrap_or_else(|| panic!("{name}: {list:?}"))["value"].clone()
    };
    for feature in ["f16", "subgroup barrier", "timestamps", "pipeline cache", "immediates"] {
        assert!(named("features", feature).is_boolean(), "{feature}");
    }
    assert!(named("features", "cooperative matrix").is_array());
    for (limit, least) in [("storage binding", 128 << 20), ("storage buffers", 8), ("workgroup memory", 16 << 10)] {
        assert!(named("limits", limit).as_u64().unwrap() >= least, "{limit}");
    }
}

#[test]
fn usage_is_2_and_says_what_there_is() {
    let said = doctor(&["--adapter", "no such adapter"]);
    assert_eq!((said.code, said.stdout.as_str()), (2, ""), "{}", said.stderr);
    says(&said.stderr, &["--adapter no such adapter", "there are:", "cpu"]);
    for args in [&["--backend", "cpu"][..], &["stray"], &["--adapter"]] {
        let said = doctor(args);
        assert_eq!((said.code, said.stdout.as_str()), (2, ""), "{args:?}");
    }
    let help = doctor(&["--help"]);
    assert_eq!(help.code, 0);
    says(&help.stdout, &["Example:\n  moewe doctor --adapter NVIDIA", "Exit status"]);
}

#[test]
fn a_closed_pipe_is_no_complaint() {
    let mut command = Command::new(env!("CARGO_BIN_EXE_moewe"));
    // Mesa's drivers complain by themselves where it is not set.
    let command = command.args(["doctor", "--adapter", "cpu"]).env("XDG_RUNTIME_DIR", std::env::temp_dir());
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0));
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
}
