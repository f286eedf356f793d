//! What a device is given to compile, and what becomes of it.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use moewe::host::{self, Limits, Session};
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
