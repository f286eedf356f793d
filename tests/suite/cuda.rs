//! What of the backend `cuda` needs no device: its kernels translate, and NVRTC compiles them.

use std::collections::BTreeMap;

use fastrand::Rng;
use moewe::MoeSpec;
use moewe::backend::cuda::Compiler;
use moewe::backend::cuda::translate::{translate, translate_around};
use moewe::kernels::{Source, Value};
use moewe::schedule::Units;

use crate::contracts::{kernels, sources_for};
use crate::random::{random_spec, specs};
use crate::rig::for_matrix_units;

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

/// Kernels in CUDA C++ of the layers' schedules for a device with these units: one of each set of fragments and operands.
fn kernels_in_cuda(matrix_units: Units, specs: impl IntoIterator<Item = MoeSpec>) -> Vec<Source> {
    let mut found = BTreeMap::new();
    for source in sources_for(matrix_units, specs).into_iter().filter(|source| source.cuda().is_some()) {
        let paths: Vec<_> = source.fragments.iter().map(|fragment| fragment.path).collect();
        let operands = ["ROWS", "WEIGHT_KIND", "INPUT_CODES", "INPUT_F32", "SUM_COLS", "PAIR", "STORE_BF16"];
        let of = |name: &&str| source.constants.iter().find(|(known, _)| known == name).map(|(_, v)| format!("{v:?}"));
        let operands: Vec<_> = operands.iter().map(of).collect();
        found.insert((paths, operands), source);
    }
    assert!(found.len() > 20, "{} kernels", found.len());
    found.into_values().collect()
}

/// A kernel around one statement on `x[0]`.
fn around(statement: &str) -> String {
    format!(
        "@group(0) @binding(0) var<storage, read_write> x: array<f32>;
        @compute @workgroup_size(32)
        fn main() {{ {statement} }}"
    )
}

#[test]
fn what_the_translator_lacks_is_refused_by_name() {
    for (statement, named) in [
        ("x[0] = sin(x[0]);", "Sin"),
        ("x[0] = determinant(mat2x2<f32>(x[0], 1.0, 2.0, 3.0));", "Matrix"),
        ("x[0] = f32(reverseBits(u32(x[0])));", "ReverseBits"),
    ] {
        let said = translate(&around(statement)).unwrap_err();
        assert!(said.contains(named), "{statement}: {said}");
    }
    assert!(translate("fn f() {}").unwrap_err().contains("0 entry points"));
    assert!(translate_around(&around("x[0] = 1.0;"), "").unwrap_err().contains("an entry point beside"));
    assert!(translate("no wgsl").is_err());
}

/// C++ leaves open, or defines otherwise, what WGSL says of these.
#[test]
fn where_the_languages_differ_wgsl_is_right() {
    for (statement, wanted) in [
        // Signed numbers wrap, and counts of shifts are taken modulo 32.
        ("x[0] = f32(i32(x[0]) + i32(x[1]));", "int(unsigned("),
        ("x[0] = f32(u32(x[0]) << u32(x[1]));", "& 31u)"),
        // Conversions saturate.
        ("x[0] = f32(u32(x[0]));", "__float2uint_rz("),
        // What follows the body is run by `continue` too.
        ("for (var i = 0u; i < 4u; i++) { if x[i] > 1.0 { continue; } x[i] = 2.0; }", "goto continuing_0;"),
        ("x[0] = 0.1;", "__uint_as_float(0x3dcccccd"),
    ] {
        let text = translate(&around(statement)).unwrap().text;
        assert!(text.contains(wanted), "{statement}: {text}");
    }
    let text = translate(&around("x[0] = f32(arrayLength(&x));")).unwrap();
    assert_eq!((text.sized, text.uniform, text.written, text.threads), (vec![0], None, vec![true], [32, 1, 1]));
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

/// All of them for the card that they were tuned on, where none that claims to be fast may spill; a sample for the oldest
/// and the newest.
#[test]
fn nvrtc_compiles_kernels_in_cuda() {
    let text = |source: &Source| translate_around(&source.wgsl(), &source.cuda().unwrap()).unwrap().text;
    let random = (0..400).map(|seed| random_spec(&mut Rng::with_seed(seed)));
    let kernels = kernels_in_cuda(Units::Warps, specs(200).into_iter().chain(random));
    if let Some(compiler) = compiler("sm_90a") {
        // Tiles of 64 rows hold more sums than leave room for all that is read ahead, and do not claim to be fast.
        let claims = |source: &&Source| !source.constants.contains(&("ROWS", Value::U32(64)));
        let spills = |source: &&Source| {
            let said = compiler.resources(source.kernel(), &text(source)).unwrap();
            assert!(said.contains("registers"), "{said}");
            !said.contains("0 bytes spill stores, 0 bytes spill loads")
        };
        let spilling: Vec<_> = kernels.iter().filter(spills).filter(claims).map(|source| &source.constants).collect();
        assert!(spilling.is_empty(), "{spilling:?}");
    }
    for arch in ["sm_80", "sm_120a"] {
        let Some(compiler) = compiler(arch) else { return };
        for source in sample(kernels.iter().collect()) {
            compiler.compile(source.kernel(), &text(source), Ok).unwrap();
        }
    }
}

/// Likewise those of warpgroups, in which the assembler may not wait between products either.
#[test]
fn nvrtc_compiles_kernels_of_warpgroups() {
    let Some(compiler) = compiler("sm_90a") else { return };
    let mut wrong = vec![];
    let mut compiled = 0;
    for source in kernels_in_cuda(Units::Warpgroups { multiprocessors: 132 }, for_matrix_units()) {
        compiled += usize::from(source.kernel().starts_with("grouped_gemm/wgmma"));
        let text = translate_around(&source.wgsl(), &source.cuda().unwrap()).unwrap().text;
        let said = compiler.resources(source.kernel(), &text).unwrap();
        // Codes of 4 bits leave too few registers for tiles of many rows: some words are spilled.
        let of = |name, value| source.constants.contains(&(name, Value::U32(value)));
        let claims = !of("WEIGHT_KIND", 2) || of("ROWS", 16);
        if claims && !said.contains("0 bytes spill stores, 0 bytes spill loads") || said.contains("C75") {
            wrong.push((said, source.constants));
        }
    }
    assert!(wrong.is_empty(), "{wrong:?}");
    assert!(compiled > 20, "{compiled} kernels");
}

#[test]
fn compiled_code_is_kept_and_a_damaged_file_is_compiled_anew() {
    let Some(compiler) = compiler("sm_80") else { return };
    let folder = tempfile::tempdir().unwrap();
    let compiler = compiler.with_cache(Some(folder.path().into()));
    let text = "extern \"C\" __global__ void kernel(float* at) { *at = 1.0f; }";
    let elf = |code: Vec<u8>| match code.starts_with(b"\x7fELF") && code.len() > 500 {
        true => Ok(code),
        false => Err(moewe::Error::invalid("code", "no machine code", "an ELF file", "compile it")),
    };
    let first = compiler.compile("one", text, elf).unwrap();
    let files = || -> Vec<_> { std::fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().path()).collect() };
    let [file] = &files()[..] else { panic!("{:?}", files()) };
    assert_eq!(std::fs::read(file).unwrap(), first);
    // What is in the file is what comes back, if it is accepted.
    let mut other = first.clone();
    other.push(0);
    std::fs::write(file, &other).unwrap();
    assert_eq!(compiler.compile("one", text, elf).unwrap(), other);
    for damage in [&first[..100], &[]] {
        std::fs::write(file, damage).unwrap();
        assert_eq!(compiler.compile("one", text, elf).unwrap(), first);
        assert_eq!(std::fs::read(file).unwrap(), first);
    }
    assert_eq!(files().len(), 1);
    // A folder that cannot be is no fault.
    let nowhere = compiler.clone().with_cache(Some("/dev/null/nowhere".into()));
    assert_eq!(nowhere.compile("one", text, elf).unwrap(), first);
    let said = compiler.compile("two", "no kernel", elf).unwrap_err().to_string();
    assert!(said.starts_with("cuda: compiling two for sm_80 failed") && said.contains("error"), "{said}");
}

#[test]
fn a_machine_without_a_device_is_told_so() {
    use moewe::Cuda;
    match Cuda::count() {
        Err(error) => assert!(error.to_string().contains("libcuda.so"), "{error}"),
        Ok(count) => {
            let said = Cuda::open(count).unwrap_err().to_string();
            assert!(said.contains("below the number of devices"), "{said}");
        }
    }
}

/// Layers of each kind of kernel in CUDA C++, in calls of one, some and many rows.
#[cfg(feature = "suite-on-cuda")]
#[test]
fn repeats_and_graphs_give_the_same_bits() {
    use moewe::host::Host;
    use moewe::spec::*;
    use moewe::{Options, Tokens};

    use crate::rig::{RandomLayer, deepseek_like, gpu};

    for (format, quant) in [
        (WeightFormat::Bf16, ActivationQuant::None),
        (WeightFormat::Mxfp4, ActivationQuant::None),
        (
            WeightFormat::Fp8Block { block: [128, 128], scale: ScaleFormat::F32 },
            ActivationQuant::dynamic_fp8(128, ActivationScale::F32),
        ),
    ] {
        let mut spec = deepseek_like();
        (spec.hidden_size, spec.experts.intermediate_size) = (256, 256);
        (spec.experts.format, spec.experts.activation_quant) = (format, quant);
        let layer = RandomLayer::new(spec, 3);
        for tokens in [1, 7, 200] {
            let session = layer.on_gpu(tokens, &Options::AUTO);
            let inputs = layer.all_inputs(tokens, 4);
            let first = session.run(&inputs.view()).unwrap();
            for _ in 0..330 {
                assert_eq!(session.run(&inputs.view()).unwrap().output, first.output, "{format:?}, {tokens} tokens");
            }
            gpu().time_rounds(3, 4, &mut |encoder, _| session.bound().record(encoder, &Tokens::Host(tokens))).unwrap();
            assert_eq!(session.outcome(tokens).unwrap().output, first.output, "{format:?}, {tokens} tokens, captured");
        }
    }
}
