//! What a device is given to compile, and what becomes of it.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use moewe::host::{self, Limits, PipelineFile, Session};
use moewe::kernels::{GemmVariant, GroupedGemm, Operation};
use moewe::reference::Inputs;
use moewe::schedule::{Step, lower};
use moewe::wgpu;
use moewe::{Backend, Plan, Scope, Wgpu};

use crate::rig::{AUTO, RandomLayer, adapter, deepseek_like, wgpu};

const TOKENS: usize = 20;

/// A device of its own, which writes down each call that wgpu gets.
fn traced(to: &Path) -> Wgpu {
    let descriptor =
        wgpu::DeviceDescriptor { trace: wgpu::Trace::Directory(to.into()), ..wgpu::DeviceDescriptor::default() };
    let (device, queue) = pollster::block_on(adapter().handle().request_device(&descriptor)).unwrap();
    Wgpu::new(device, queue)
}

/// The kernels that wgpu was given, each with whether it was told to check indices and to bound loops.
fn modules(trace: &Path) -> Vec<(String, [bool; 2])> {
    let text = std::fs::read_to_string(trace.join("trace.ron")).unwrap();
    let modules = text.split("CreateShaderModule(").skip(1).map(|call| {
        let behind = |word: &str| call.split(word).nth(1).unwrap_or_else(|| panic!("no {word} in {call}"));
        let is = |word: &str| behind(&format!("{word}:")).trim_start().starts_with("true");
        (behind("Some(\"").split('"').next().unwrap().to_owned(), [is("bounds_checks"), is("force_loop_bounding")])
    });
    // In any order: kernels are compiled side by side.
    let mut modules: Vec<_> = modules.filter(|(label, _)| !label.starts_with("proof/")).collect();
    modules.sort();
    modules
}

#[test]
fn run_time_checks_are_in_every_module_that_asks_for_them_and_change_no_bit() {
    let layer = RandomLayer::new(deepseek_like(), 61);
    let (hidden_states, _) = layer.inputs(TOKENS, 62);
    let run = |checked: bool| {
        let folder = tempfile::tempdir().unwrap();
        let wgpu = traced(folder.path());
        let wgpu = if checked { wgpu.with_runtime_checks() } else { wgpu };
        let plan = Plan::new(wgpu, &layer.spec, &layer.weights(), TOKENS, &AUTO).unwrap();
        let outcome = Session::new(plan, &layer.spec).unwrap().run(&Inputs::of(&hidden_states)).unwrap();
        (modules(folder.path()), outcome)
    };
    let (trusted, checked) = (run(false), run(true));
    let names = |modules: &[(String, [bool; 2])]| modules.iter().map(|(name, _)| name.clone()).collect::<Vec<_>>();
    assert_eq!(names(&trusted.0), names(&checked.0));
    // Both kinds of module are there: a layer without the first would show nothing.
    for (name, checks) in &trusted.0 {
        let proved = ["grouped_gemm", "permute", "quantize", "combine", "topk_routing"];
        let is_proved = proved.iter().any(|stage| name.starts_with(stage));
        assert_eq!(*checks, [!is_proved; 2], "{name}");
    }
    assert!(trusted.0.iter().any(|(name, _)| name.starts_with("grouped_gemm")), "{:?}", trusted.0);
    assert!(checked.0.iter().all(|(_, checks)| *checks == [true; 2]), "{:?}", checked.0);
    let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
    assert_eq!(bits(&trusted.1.output), bits(&checked.1.output));
    assert_eq!(bits(&trusted.1.topk_weights), bits(&checked.1.topk_weights));
    assert_eq!(trusted.1.topk_ids, checked.1.topk_ids);
}

/// Clones share kernels; with checks they are others.
#[test]
fn modules_with_and_without_checks_are_never_taken_for_each_other() {
    let folder = tempfile::tempdir().unwrap();
    {
        let wgpu = traced(folder.path());
        let layer = RandomLayer::new(deepseek_like(), 63);
        for device in [wgpu.clone(), wgpu.with_runtime_checks(), wgpu.clone(), wgpu] {
            Plan::new(device, &layer.spec, &layer.weights(), TOKENS, &AUTO).unwrap();
        }
    }
    let found = modules(folder.path());
    let gemms =
        |checks: bool| found.iter().filter(move |(name, has)| name.starts_with("grouped_gemm") && has[0] == checks);
    assert!(gemms(true).count() > 0);
    assert_eq!(gemms(true).count(), gemms(false).count(), "{found:?}");
}

/// A workgroup that no device under the default limits takes.
fn too_large(operation: &Operation) -> Operation {
    match operation {
        Operation::GroupedGemm(kernel) => {
            let variant = GemmVariant::Gemv { workgroup_size: 512, lanes: 1, tile_rows: 512 };
            Operation::GroupedGemm(GroupedGemm { variant, ..kernel.clone() })
        }
        other => panic!("{other:?} is no GEMM"),
    }
}

#[test]
fn of_kernels_that_are_refused_side_by_side_the_first_is_named_and_no_handler_hears_of_any() {
    let layer = RandomLayer::new(deepseek_like(), 64);
    let schedule = lower(&layer.spec, Scope::Layer, TOKENS, &wgpu().facts(), &AUTO).unwrap();
    let steps: Vec<&Step> = schedule.buckets.iter().flat_map(|bucket| &bucket.steps).collect();
    let gemms = steps.iter().filter(|step| matches!(step.operation, Operation::GroupedGemm(_)));
    let refused: Vec<Operation> = gemms.take(3).map(|step| too_large(&step.operation)).collect();
    let good: Vec<(&str, &Operation)> = steps.iter().map(|step| (step.name.as_str(), &step.operation)).collect();
    for (names, before) in [(["first", "second", "third"], 0), (["third", "first", "second"], 5)] {
        let heard = Arc::new(AtomicUsize::new(0));
        let wgpu = host::open(adapter(), Limits::Default).unwrap();
        let hears = Arc::clone(&heard);
        wgpu.device().on_uncaptured_error(Arc::new(move |_| {
            hears.fetch_add(1, Ordering::Relaxed);
        }));
        let bad = names.iter().copied().zip(&refused);
        let operations: Vec<_> = good[..before].iter().copied().chain(bad).chain(good.iter().copied()).collect();
        let alone = wgpu.compile(names[0], &refused[0]).err().unwrap().to_string();
        let together = wgpu.compile_all(&operations).err().unwrap().to_string();
        assert!(alone.contains(&format!("for {}", names[0])), "{alone}");
        assert_eq!(alone, together);
        assert_eq!(heard.load(Ordering::Relaxed), 0);
        // The others are as usable as before.
        assert_eq!(wgpu.compile_all(&good).unwrap().len(), good.len());
    }
}

/// A device of its own with a pipeline cache, or why there is none.
fn caching(trace: wgpu::Trace) -> Option<Wgpu> {
    let feature = wgpu::Features::PIPELINE_CACHE;
    if !adapter().handle().features().contains(feature) {
        println!("not tested: {} has no pipeline cache", adapter().name);
        return None;
    }
    let descriptor = wgpu::DeviceDescriptor { required_features: feature, trace, ..wgpu::DeviceDescriptor::default() };
    let (device, queue) = pollster::block_on(adapter().handle().request_device(&descriptor)).unwrap();
    Some(Wgpu::new(device, queue))
}

/// The file's own header and sum around what wgpu gave.
fn framed(data: &[u8]) -> Vec<u8> {
    let sum =
        data.iter().fold(0xcbf2_9ce4_8422_2325u64, |sum, byte| (sum ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3));
    [b"moewepc1".as_slice(), &sum.to_le_bytes(), data].concat()
}

#[test]
fn every_pipeline_is_compiled_with_the_cache_that_the_host_gave() {
    let folder = tempfile::tempdir().unwrap();
    let Some(wgpu) = caching(wgpu::Trace::Directory(folder.path().into())) else { return };
    let kept = PipelineFile::open(&wgpu, folder.path()).unwrap().unwrap();
    let layer = RandomLayer::new(deepseek_like(), 65);
    let wgpu = wgpu.with_pipeline_cache(kept.cache().clone());
    Plan::new(wgpu.clone(), &layer.spec, &layer.weights(), TOKENS, &AUTO).unwrap();
    // Checks are another module, not another cache.
    Plan::new(wgpu.with_runtime_checks(), &layer.spec, &layer.weights(), TOKENS, &AUTO).unwrap();
    let text = std::fs::read_to_string(folder.path().join("trace.ron")).unwrap();
    let pipelines: Vec<&str> = text.split("CreateComputePipeline(").skip(1).collect();
    let kernels = pipelines.iter().filter(|call| !call.contains("label: Some(\"proof/"));
    assert_eq!(kernels.clone().count(), modules(folder.path()).len());
    for call in kernels {
        let cache = call.split("cache:").nth(1).unwrap();
        assert!(cache.trim_start().starts_with("Some("), "{call}");
    }
}

/// A file that another run wrote, whole or not: whatever it holds, layers run as without.
#[test]
fn a_file_of_pipelines_that_is_damaged_or_of_another_adapter_is_left_out_and_begun_anew() {
    let layer = RandomLayer::new(deepseek_like(), 66);
    let (hidden_states, _) = layer.inputs(TOKENS, 67);
    let run = |wgpu: Wgpu| {
        let plan = Plan::new(wgpu, &layer.spec, &layer.weights(), TOKENS, &AUTO).unwrap();
        let outcome = Session::new(plan, &layer.spec).unwrap().run(&Inputs::of(&hidden_states)).unwrap();
        outcome.output.iter().map(|value| value.to_bits()).collect::<Vec<_>>()
    };
    let folder = tempfile::tempdir().unwrap();
    let Some(wgpu) = caching(wgpu::Trace::Off) else { return };
    let heard = Arc::new(AtomicUsize::new(0));
    let hears = Arc::clone(&heard);
    wgpu.device().on_uncaptured_error(Arc::new(move |_| {
        hears.fetch_add(1, Ordering::Relaxed);
    }));
    let open = || {
        let kept = PipelineFile::open(&wgpu, folder.path()).unwrap().unwrap();
        // With checks, so that nothing is compiled already.
        (wgpu.with_runtime_checks().with_pipeline_cache(kept.cache().clone()), kept)
    };
    let plain = run(wgpu.with_runtime_checks());

    // No file is nothing to speak of.
    let (device, kept) = open();
    assert_eq!((kept.unused(), run(device)), (None, plain.clone()));
    kept.save().unwrap();
    let whole = std::fs::read(kept.path()).unwrap();
    let data = whole[16..].to_vec();
    assert_eq!(whole, framed(&data));
    let (device, kept) = open();
    assert_eq!((kept.unused(), run(device)), (None, plain.clone()));
    // What is in the file already is not written again. (A driver may give the same in another order.)
    let path = kept.path().to_owned();
    if kept.cache().get_data() == Some(data.clone()) {
        std::fs::remove_file(&path).unwrap();
        kept.save().unwrap();
        assert!(!path.exists());
    }

    let changed = |at: usize, bytes: &[u8]| {
        let mut bytes = bytes.to_vec();
        bytes[at] ^= 1;
        bytes
    };
    // wgpu's header: a magic word of 8 bytes, versions, the API, the adapter and the driver.
    let cases = [
        ("cut in the header", whole[..11].to_vec(), true),
        ("cut in the data", whole[..whole.len() - 1].to_vec(), true),
        ("empty", vec![], true),
        ("longer", [whole.as_slice(), &[0]].concat(), true),
        ("one bit of the data", changed(whole.len() - 1, &whole), true),
        ("one bit of the sum", changed(9, &whole), true),
        ("another program's", vec![7; 4096], true),
        ("whole, of another adapter", framed(&changed(20, &data)), true),
        // Of these wgpu makes an empty cache and says nothing.
        ("whole, cut before it was written", framed(&data[..data.len() / 2]), false),
        ("whole, of another version", framed(&changed(0, &data)), false),
    ];
    for (what, bytes, told) in cases {
        std::fs::write(&path, &bytes).unwrap();
        let (device, kept) = open();
        assert_eq!(kept.unused().is_some(), told, "{what}: {:?}", kept.unused());
        assert_eq!(run(device), plain, "{what}");
        kept.save().unwrap();
        let (device, again) = open();
        assert_eq!((again.unused(), run(device)), (None, plain.clone()), "{what}");
    }
    assert_eq!(heard.load(Ordering::Relaxed), 0);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "no draft is left");

    // A place that cannot be written costs the next run its time.
    std::fs::remove_file(&path).unwrap();
    std::fs::create_dir(&path).unwrap();
    let (device, kept) = open();
    assert_eq!((kept.unused(), run(device)), (Some("it is no file"), plain));
    assert!(kept.save().is_err());
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
}

#[test]
fn a_device_without_the_feature_keeps_no_pipelines() {
    let folder = tempfile::tempdir().unwrap();
    let wgpu = host::open(adapter(), Limits::Default).unwrap();
    assert!(PipelineFile::open(&wgpu, folder.path()).unwrap().is_none());
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
}
