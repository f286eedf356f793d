//! `moewe inspect`.

use serde_json::Value;

use super::{Said, configure, copy_case, moewe, text};
use crate::gguf_file::{Q4_K, Q5_K, qwen, qwen_config};
use crate::samples::{Sample, golden};

fn inspect(folder: &std::path::Path, rest: &[&str]) -> Said {
    let mut args = vec!["inspect".to_owned(), text(folder).to_owned()];
    if let Ok(adapter) = std::env::var("MOEWE_ADAPTER") {
        args.extend(["--adapter".to_owned(), adapter]);
    }
    args.extend(rest.iter().map(|arg| (*arg).to_owned()));
    moewe(args)
}

fn statuses(said: &Said) -> Vec<String> {
    said.lines().iter().map(|layer| layer["status"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn every_golden_layer_can_be_computed_by_every_backend_that_is_built() {
    for case in std::fs::read_dir(golden("")).unwrap() {
        let case = case.unwrap().path();
        let name = case.file_name().unwrap().to_str().unwrap().to_owned();
        // Routers alone are no layers, primitives no checkpoints.
        if !case.join("config.json").exists() || name.starts_with("routing_") {
            continue;
        }
        let said = inspect(&case, &["--json", "--explain"]);
        assert_eq!(said.code, 0, "{name}: {}", said.stderr);
        let layers = said.lines();
        let numbers: Vec<u64> = layers.iter().map(|layer| layer["layer"].as_u64().unwrap()).collect();
        assert_eq!(numbers, (0..layers.len() as u64).collect::<Vec<_>>(), "{name}");
        let here: Vec<&Value> = layers.iter().filter(|layer| layer["status"] == "pass").collect();
        assert!(!here.is_empty(), "{name}");
        for layer in here {
            let tensors = layer["tensors"].as_array().unwrap();
            let bytes: u64 = tensors.iter().map(|tensor| tensor["bytes"].as_u64().unwrap()).sum();
            assert_eq!(layer["bytes"], bytes, "{name}");
            assert!(layer["spec"]["hidden_size"].as_str().unwrap().parse::<usize>().unwrap() > 0);
            for backend in layer["backends"].as_array().unwrap() {
                let absent = backend["backend"] == "cuda" || (backend["backend"] == "wgpu" && !cfg!(feature = "wgpu"));
                assert_eq!(backend["status"] == "pass", !absent, "{name}: {backend}");
                assert_eq!(backend["reason"].is_null(), !absent, "{name}: {backend}");
                let has_steps = !absent && backend["backend"] != "reference";
                assert_eq!(backend["memory"].is_object(), has_steps, "{name}: {backend}");
                assert_eq!(!backend["kernels"].as_array().unwrap().is_empty(), has_steps, "{name}: {backend}");
                assert_eq!(!backend["decisions"].as_array().unwrap().is_empty(), has_steps, "{name}: {backend}");
            }
        }
        for layer in layers.iter().filter(|layer| layer["status"] != "pass") {
            assert!(layer["status"] == "dense" || layer["status"] == "not here", "{name}: {layer}");
            assert!(layer["tensors"].as_array().unwrap().is_empty() && layer["reason"].is_null());
        }
    }
}

#[test]
fn a_layer_that_is_here_in_part_fails_and_one_that_is_not_here_does_not() {
    let folder = tempfile::tempdir().unwrap();
    let whole = Sample::golden("mixtral");
    let write = |sample: &Sample| {
        std::fs::write(folder.path().join("config.json"), Value::Object(sample.config.clone()).to_string()).unwrap();
        std::fs::write(folder.path().join("model.safetensors"), sample.file()).unwrap();
    };
    write(&whole);
    let said = inspect(folder.path(), &["--json"]);
    assert_eq!((said.code, statuses(&said).contains(&"pass".into())), (0, true), "{}", said.stderr);

    // One tensor of the layer is missing.
    let mut part = whole.clone();
    let name = part.tensors.keys().find(|name| name.contains("experts.3")).unwrap().clone();
    part.take(&name);
    write(&part);
    let said = inspect(folder.path(), &["--json"]);
    assert_eq!((said.code, statuses(&said).contains(&"fail".into())), (1, true));
    let reason = said.lines().iter().find_map(|layer| layer["reason"].as_str().map(str::to_owned)).unwrap();
    assert!(reason.contains("experts.3"), "{reason}");

    // One is misshapen.
    let mut misshapen = whole.clone();
    misshapen.tensors.get_mut(&name).unwrap().shape.reverse();
    write(&misshapen);
    assert_eq!(inspect(folder.path(), &[]).code, 1);

    // None is here.
    let elsewhere = whole.rename(|name| name.replace("layers.", "elsewhere."));
    write(&elsewhere);
    let said = inspect(folder.path(), &["--json"]);
    assert_eq!(said.code, 0, "{}", said.stderr);
    assert!(statuses(&said).iter().all(|status| status == "not here" || status == "dense"));

    // A shard that is a folder, and one that is shorter than its header says.
    let shard = folder.path().join("model.safetensors");
    std::fs::write(&shard, &Sample::golden("mixtral").file()[..5000]).unwrap();
    assert_eq!(inspect(folder.path(), &[]).code, 1);
    std::fs::remove_file(&shard).unwrap();
    std::fs::create_dir(&shard).unwrap();
    let said = inspect(folder.path(), &["--json"]);
    assert_eq!((said.code, said.lines()[0]["status"].as_str()), (1, Some("fail")));
}

#[test]
fn unknown_keys_are_named_and_change_no_code_and_what_nobody_computes_is_3() {
    let folder = tempfile::tempdir().unwrap();
    copy_case("mixtral", folder.path());
    configure(folder.path(), "expert_mystery", 1);
    let said = inspect(folder.path(), &["--json"]);
    assert_eq!(said.code, 0);
    assert!(said.stderr.contains("expert_mystery"), "{}", said.stderr);
    let here = said.lines().into_iter().find(|layer| layer["status"] == "pass").unwrap();
    assert_eq!(here["unknown_keys"][0], "expert_mystery");
    let text = inspect(folder.path(), &[]);
    assert!(text.code == 0 && text.stdout.contains("unknown keys expert_mystery"), "{}", text.stdout);

    configure(folder.path(), "hidden_act", "mystery");
    let said = inspect(folder.path(), &["--json"]);
    assert_eq!(said.code, 3, "{}", said.stdout);
    configure(folder.path(), "model_type", "mystery_moe");
    assert_eq!(inspect(folder.path(), &[]).code, 3);
    assert_eq!(inspect(&folder.path().join("nowhere"), &[]).code, 1);
    assert_eq!(moewe(["inspect"]).code, 2);
    let help = moewe(["inspect", "--help"]);
    assert!(help.code == 0 && help.stdout.contains("Example"), "{}", help.stdout);
}

#[test]
fn tensors_of_gguf_are_shown_with_what_their_blocks_hold() {
    let folder = tempfile::tempdir().unwrap();
    let rng = &mut fastrand::Rng::with_seed(5);
    std::fs::write(folder.path().join("config.json"), qwen_config(256).to_string()).unwrap();
    std::fs::write(folder.path().join("m.gguf"), qwen(256, [Q4_K; 3], rng).build()).unwrap();
    let said = inspect(folder.path(), &[]);
    assert_eq!(said.code, 0, "{}", said.stderr);
    assert!(said.stdout.contains("blk.*.ffn_up_exps.weight               Q4K ["), "{}", said.stdout);
    let said = inspect(folder.path(), &["--json"]);
    let layer = said.lines().into_iter().find(|layer| layer["status"] == "pass").unwrap();
    let tensors = layer["tensors"].as_array().unwrap();
    let of = |name: &str| tensors.iter().find(|tensor| tensor["name"].as_str().unwrap().contains(name)).unwrap();
    assert_eq!([&of("up_exps")["blocks"], &of("up_exps")["dtype"]], ["Q4K", "U8"]);
    assert_eq!([&of("gate_inp")["blocks"], &of("gate_inp")["dtype"]], [&Value::Null, &"F32".into()]);
    // A type that nothing here reads is shown by its name, and the layer is beyond every backend.
    let mut unread = qwen(256, [Q4_K; 3], rng);
    unread.tensors[2].kind = Q5_K;
    std::fs::write(folder.path().join("m.gguf"), unread.build()).unwrap();
    let said = inspect(folder.path(), &[]);
    assert_eq!(said.code, 3);
    assert!(said.stdout.contains("Q5_K (ggml's type 13) ["), "{}", said.stdout);
}
