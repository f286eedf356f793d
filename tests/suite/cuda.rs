//! What of the backend `cuda` needs no device: its kernels translate, and NVRTC compiles them.

use std::collections::BTreeMap;

use fastrand::Rng;
use moewe::Scope;
use moewe::backend::cuda::translate::{translate, translate_around};
use moewe::backend::cuda::{CUDA_THREADS, Compiler};
use moewe::kernels::Source;
use moewe::schedule::{DeviceFacts, lower};

use crate::contracts::kernels;
use crate::random::{random_spec, specs};
use crate::rig::CUTS;

/// A compiler without a cache; `None` where there is no NVRTC, which MOEWE_NVRTC=required forbids.
fn compiler(arch: &str) -> Option<Compiler> {
    match Compiler::new(arch) {
        Ok(compiler) => Some(compiler.with_cache(None)),
        Err(error) => {
            assert!(std::env::var("MOEWE_NVRTC").as_deref() != Ok("required"), "{error}");
            println!("NOT RUN: {error}");
            None
        }
    }
}

/// Kernels in CUDA C++ of many random schedules: one of each set of fragments and operands.
fn kernels_in_cuda() -> Vec<Source> {
    let facts = DeviceFacts {
        backend: "text",
        max_binding_bytes: (1 << 34) - 16,
        max_workgroups: 65_535,
        exact_halves: true,
        matrix_units: true,
    };
    let mut found = BTreeMap::new();
    let random = (0..400).map(|seed| random_spec(&mut Rng::with_seed(seed)));
    for spec in specs(200).into_iter().chain(random) {
        for options in CUTS {
            let schedule = lower(&spec, Scope::Layer, 64, &facts, &options).unwrap();
            for step in schedule.buckets.iter().flat_map(|bucket| &bucket.steps) {
                let source = step.operation.source();
                if source.cuda().is_some() {
                    let paths: Vec<_> = source.fragments.iter().map(|fragment| fragment.path).collect();
                    let operands = ["ROWS", "WEIGHT_KIND", "INPUT_CODES", "INPUT_F32", "SUM_COLS", "PAIR"];
                    let of = |name: &&str| {
                        source.constants.iter().find(|(known, _)| known == name).map(|(_, v)| format!("{v:?}"))
                    };
                    let operands: Vec<_> = operands.iter().map(of).collect();
                    found.insert((paths, operands), source);
                }
            }
        }
    }
    assert!(found.len() > 20, "{} kernels", found.len());
    found.into_values().collect()
}

#[test]
fn every_kernel_translates_to_cuda() {
    for (wgsl, source) in kernels() {
        translate(&wgsl).unwrap_or_else(|reason| panic!("{}: {reason}\n{wgsl}", source.kernel()));
    }
}

/// How many kernels are compiled: NVRTC takes half a second for one.
fn sample<T>(kernels: Vec<T>) -> Vec<T> {
    let wanted = std::env::var("MOEWE_CUDA_KERNELS").ok().map_or(40, |count| count.parse().unwrap());
    let step = kernels.len().div_ceil(wanted).max(1);
    kernels.into_iter().step_by(step).collect()
}

#[test]
fn nvrtc_compiles_translated_kernels() {
    for arch in ["sm_80", "sm_90a"] {
        let Some(compiler) = compiler(arch) else { return };
        let mut kernels: Vec<_> = kernels().into_iter().collect();
        kernels.sort_by_key(|(_, source)| source.kernel());
        for (wgsl, source) in sample(kernels) {
            let text = translate(&wgsl).unwrap().text;
            compiler.compile(source.kernel(), &text, Ok).unwrap_or_else(|error| panic!("{error}\n{text}"));
        }
    }
}

#[test]
fn nvrtc_compiles_kernels_in_cuda() {
    for arch in ["sm_80", "sm_90a", "sm_120a"] {
        let Some(compiler) = compiler(arch) else { return };
        for source in sample(kernels_in_cuda()) {
            let text = translate_around(&source.wgsl(), source.cuda().unwrap(), CUDA_THREADS).unwrap().text;
            if let Ok(folder) = std::env::var("MOEWE_DUMP") {
                use std::hash::{DefaultHasher, Hash, Hasher};
                let mut hash = DefaultHasher::new();
                text.hash(&mut hash);
                std::fs::write(format!("{folder}/{:x}.cu", hash.finish()), &text).unwrap();
            }
            compiler.compile(source.kernel(), &text, Ok).unwrap_or_else(|error| panic!("{error}\n{text}"));
        }
    }
}
