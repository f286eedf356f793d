//! Guard 3: what a kernel declares is what its text uses, and every composed text is legal everywhere.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Command;

use fastrand::Rng;
use moewe::Scope;
use moewe::conformance::synthetic;
use moewe::kernels::{Access, Operation, Source, Stream};
use moewe::schedule::{DeviceFacts, Units, lower};
use moewe::spec::*;
use naga::valid::{Capabilities, GlobalUse, ModuleInfo, ValidationFlags, Validator};

use crate::random::{random_spec, specs};
use crate::rig::{CUTS, TILED, UNIT_CUTS, for_matrix_units, with_units};

/// Every distinct kernel of many random schedules, by its text.
pub fn kernels() -> BTreeMap<String, Source> {
    let mut kernels = BTreeMap::new();
    let mut shapes = BTreeSet::new();
    let random = (0..400).map(|seed| random_spec(&mut Rng::with_seed(seed)));
    for spec in specs(200).into_iter().chain(random) {
        for (at, base) in CUTS.into_iter().chain(CUTS).enumerate() {
            let (diagnostics, exact_halves) = (at % 2 == 1, at >= CUTS.len());
            let facts = DeviceFacts {
                backend: "text",
                max_binding_bytes: 128 << 20,
                max_workgroups: 65_535,
                exact_halves,
                matrix_units: Units::None,
            };
            let options = moewe::Options { diagnostics, ..base };
            let schedule = lower(&spec, Scope::Layer, 64, &facts, &options).unwrap();
            let steps = schedule.buckets.iter().flat_map(|bucket| &bucket.steps).map(|step| step.operation.clone());
            let filled = schedule.matrices.iter().filter_map(|matrix| synthetic::kernel(matrix).ok());
            let beside = filled.map(Operation::Synthesize).chain([Operation::Stream(Stream)]);
            for operation in steps.chain(beside) {
                let source = operation.source();
                // One of each set of fragments; constants differ in their values only.
                let paths: Vec<_> = source.fragments.iter().map(|fragment| fragment.path).collect();
                if shapes.insert(paths) {
                    kernels.insert(source.wgsl(), source);
                }
            }
        }
    }
    assert!(kernels.len() > 100, "{} kernels", kernels.len());
    kernels
}

/// What the steps of these layers are made of, however their GEMMs are cut, on a device with these units.
pub fn sources_for(matrix_units: Units, specs: impl IntoIterator<Item = MoeSpec>) -> Vec<Source> {
    let facts = with_units(matrix_units);
    let mut sources = vec![];
    for spec in specs {
        for options in UNIT_CUTS {
            let schedule = lower(&spec, Scope::Layer, 64, &facts, &options).unwrap();
            let steps = schedule.buckets.iter().flat_map(|bucket| &bucket.steps);
            sources.extend(steps.map(|step| step.operation.source()));
        }
    }
    sources
}

fn parse(text: &str) -> (naga::Module, ModuleInfo) {
    let module =
        naga::front::wgsl::parse_str(text).unwrap_or_else(|error| panic!("{}\n{text}", error.emit_to_string(text)));
    // No capability but that of a device which has proved it: the portability floor.
    let capabilities = match text.contains("unpack2x16float") {
        true => Capabilities::SHADER_FLOAT16_IN_FLOAT32,
        false => Capabilities::empty(),
    };
    let info = Validator::new(ValidationFlags::all(), capabilities).validate(&module);
    let info = info.unwrap_or_else(|error| panic!("{}\n{text}", error.emit_to_string(text)));
    (module, info)
}

/// Bytes of workgroup memory.
fn workgroup_memory(module: &naga::Module) -> u32 {
    let mut layouter = naga::proc::Layouter::default();
    layouter.update(module.to_ctx()).unwrap();
    let workgroup = module.global_variables.iter().filter(|(_, v)| v.space == naga::AddressSpace::WorkGroup);
    workgroup.map(|(_, variable)| layouter[variable.ty].size.next_multiple_of(16)).sum()
}

/// Words of the text without comments.
fn words(text: &str) -> BTreeSet<String> {
    let code = text.lines().map(|line| line.split("//").next().unwrap_or(""));
    code.flat_map(|line| line.split(|c: char| !c.is_ascii_alphanumeric() && c != '_'))
        .filter(|word| word.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_'))
        .map(str::to_string)
        .collect()
}

/// Constants that are declared in the prelude and not read, or read and not declared.
fn constant_faults(source: &Source) -> Vec<String> {
    let body: String = source.fragments.iter().map(|fragment| fragment.text).collect();
    let used = words(&body);
    let declared: BTreeSet<String> = source.constants.iter().map(|(name, _)| (*name).to_string()).collect();
    assert_eq!(declared.len(), source.constants.len(), "a constant is declared twice");
    let own = body.lines().filter_map(|line| line.strip_prefix("const ")?.split(':').next());
    let known: BTreeSet<String> = declared.iter().cloned().chain(own.map(str::to_string)).collect();
    let capitals = |word: &&String| {
        word.len() > 1 && word.chars().all(|c| c.is_ascii_uppercase() || c.is_ascii_digit() || c == '_')
    };
    let unread = declared.difference(&used).map(|name| format!("{name} is declared and not read"));
    let undeclared = used.iter().filter(capitals).filter(|word| !known.contains(*word));
    unread.chain(undeclared.map(|name| format!("{name} is read and not declared"))).collect()
}

#[test]
fn every_constant_of_a_prelude_is_read_and_every_one_read_is_declared() {
    for source in kernels().values() {
        assert_eq!(constant_faults(source), Vec::<String>::new(), "{}", source.kernel());
    }
}

#[test]
fn the_constant_check_finds_a_dropped_and_an_unread_constant() {
    let mut source = kernels().into_values().find(|source| source.wgsl().contains("SWIGLU_LIMIT")).unwrap();
    let limit = source.constants.iter().position(|(name, _)| *name == "SWIGLU_LIMIT").unwrap();
    let constant = source.constants.remove(limit);
    assert_eq!(constant_faults(&source), ["SWIGLU_LIMIT is read and not declared"]);
    source.constants.push(constant);
    source.fragments.retain(|fragment| !fragment.path.contains("activate"));
    assert!(constant_faults(&source).contains(&"SWIGLU_LIMIT is declared and not read".to_string()));
}

#[test]
fn every_binding_is_used_as_its_contract_says() {
    for (text, source) in kernels() {
        let (module, info) = parse(&text);
        let entry = info.get_entry_point(0);
        let mut storage = 0;
        for (handle, variable) in module.global_variables.iter() {
            let Some(binding) = variable.binding else { continue };
            let contract = source.bindings[binding.binding as usize];
            assert_eq!(variable.name.as_deref(), Some(contract.name));
            let expected = match contract.access {
                Access::Uniform | Access::Read => GlobalUse::READ,
                Access::Write => GlobalUse::WRITE,
                Access::ReadWrite => GlobalUse::READ | GlobalUse::WRITE,
            };
            let used = entry[handle] & (GlobalUse::READ | GlobalUse::WRITE);
            assert_eq!(used, expected, "{}: {}", source.kernel(), contract.name);
            storage += usize::from(contract.access != Access::Uniform);
        }
        assert!(storage <= 8, "{}: {storage} storage buffers", source.kernel());
    }
}

#[test]
fn every_kernel_keeps_to_the_portability_floor() {
    for (text, source) in kernels() {
        let (module, _) = parse(&text);
        let size = module.entry_points[0].workgroup_size;
        assert!(size.iter().product::<u32>() <= 256, "{}: {size:?}", source.kernel());
        let bytes = workgroup_memory(&module);
        assert!(bytes <= 16 << 10, "{}: {bytes} bytes of workgroup memory", source.kernel());
    }
}

#[test]
fn the_largest_router_keeps_to_the_floor_and_a_larger_one_is_refused_by_name() {
    let facts = DeviceFacts {
        backend: "text",
        max_binding_bytes: 128 << 20,
        max_workgroups: 65_535,
        exact_halves: false,
        matrix_units: Units::None,
    };
    let mut spec = crate::rig::deepseek_like();
    (spec.num_experts, spec.top_k) = (1024, 512);
    let mut lowered = |n_group| {
        let groups = Some(Groups { n_group, topk_group: n_group, score: GroupScore::MaxOfScore });
        spec.routing.method = RoutingMethod::TopK { score: Score::Softmax, key: SelectionKey::Score, groups };
        lower(&spec, Scope::Routing, 64, &facts, &TILED)
    };
    let schedule = lowered(512).unwrap();
    for step in &schedule.buckets[0].steps {
        let (bytes, text) = (step.operation.workgroup_bytes(), step.operation.source().wgsl());
        assert!(workgroup_memory(&parse(&text).0) <= bytes.max(10 << 10) as u32, "{}", step.name);
    }
    let refusal = lowered(1024).unwrap_err().to_string();
    assert!(refusal.contains("n_group") && refusal.contains("workgroup memory"), "{refusal}");
}

#[test]
fn every_kernel_translates_to_spirv_msl_and_hlsl() {
    use naga::back::{hlsl, msl, spv};
    for (text, source) in kernels() {
        let (module, info) = parse(&text);
        let what = source.kernel();
        spv::write_vec(&module, &info, &spv::Options::default(), None).unwrap_or_else(|e| panic!("{what}: {e}"));
        let options = msl::Options { fake_missing_bindings: true, ..msl::Options::default() };
        let pipeline = msl::PipelineOptions::default();
        msl::write_string(&module, &info, &options, &pipeline).unwrap_or_else(|e| panic!("{what}: {e}"));
        let options = hlsl::Options { fake_missing_bindings: true, ..hlsl::Options::default() };
        let mut hlsl_text = String::new();
        hlsl::Writer::new(&mut hlsl_text, &options, &hlsl::PipelineOptions::default())
            .write(&module, &info, None)
            .unwrap_or_else(|e| panic!("{what}: {e}"));
    }
}

/// Tint is the browsers' compiler and stricter than naga. Where it is not installed this says so.
#[test]
fn every_kernel_is_accepted_by_tint() {
    if Command::new("tint").arg("--help").output().is_err() {
        println!("NOT RUN: tint is not installed here");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    for (number, (text, source)) in kernels().into_iter().enumerate() {
        let path = folder.path().join(format!("{number}.wgsl"));
        std::fs::write(&path, &text).unwrap();
        let output = Command::new("tint").arg("--format").arg("wgsl").arg(&path).output().unwrap();
        let message = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{}: {message}\n{text}", source.kernel());
    }
}

#[test]
fn every_shader_file_is_part_of_some_kernel() {
    fn files(folder: &Path, found: &mut BTreeSet<String>, root: &Path) {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                files(&path, found, root);
            } else {
                found.insert(path.strip_prefix(root).unwrap().to_string_lossy().replace('\\', "/"));
            }
        }
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("shaders");
    let mut on_disk = BTreeSet::new();
    files(&root, &mut on_disk, &root);
    let used: BTreeSet<String> = kernels()
        .values()
        .flat_map(|source| source.fragments.iter().map(|fragment| fragment.path.to_string()))
        .collect();
    // Matrix units are no matter of WGSL.
    let of_units = [Units::Warps, Units::Warpgroups { multiprocessors: 132 }]
        .into_iter()
        .flat_map(|units| sources_for(units, for_matrix_units()))
        .flat_map(|source| source.fragments.into_iter().map(|fragment| fragment.path.to_string()))
        .collect();
    // What a device proves before layers are planned is of no layer.
    let others = BTreeSet::from(["proof/halves.wgsl".to_string()]);
    assert_eq!(on_disk, &(&used | &of_units) | &others);
}
