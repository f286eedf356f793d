//! What of the backend `cuda` needs no device: its kernels translate, and NVRTC compiles them.

use moewe::backend::cuda::Compiler;
use moewe::backend::cuda::translate::translate;

use crate::contracts::kernels;

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
