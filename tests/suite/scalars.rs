//! Scalars: the golden tables and activations for `numerics`, and every code of every decoder and
//! encoder on the device against `numerics`, bit for bit.

use moewe::host::Host;
use moewe::numerics;
use moewe::schedule::lower;
use moewe::spec::{Activation, FloatType};
use moewe::{Backend, Scope};
use safetensors::SafeTensors;

use crate::rig::gpu;

pub fn golden(case: &str, tensor: &str) -> Vec<u8> {
    let path = format!("{}/tests/golden/{case}/io.safetensors", env!("CARGO_MANIFEST_DIR"));
    let bytes = std::fs::read(path).unwrap();
    SafeTensors::deserialize(&bytes).unwrap().tensor(tensor).unwrap().data().to_vec()
}

pub fn floats(case: &str, tensor: &str) -> Vec<f32> {
    golden(case, tensor).chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
}

pub fn same(a: f32, b: f32) -> bool {
    a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan())
}

#[test]
fn decode_tables_equal_the_golden_ones() {
    for (code, want) in floats("prim_format_tables", "e4m3fn_decode").into_iter().enumerate() {
        assert!(same(numerics::decode_e4m3(code as u8), want), "e4m3 {code:#x}");
    }
    for (code, want) in floats("prim_format_tables", "e8m0_decode").into_iter().enumerate() {
        assert!(same(numerics::decode_e8m0(code as u8), want), "e8m0 {code:#x}");
    }
}

const ACTIVATIONS: [(&str, Activation); 7] = [
    ("silu_and_mul", Activation::Swiglu { limit: None }),
    ("silu_clamp_before_7p0", Activation::Swiglu { limit: Some(7.0) }),
    ("silu_clamp_before_10p0", Activation::Swiglu { limit: Some(10.0) }),
    ("silu_clamp_after_7p0", Activation::SwigluClampAfter { limit: 7.0 }),
    ("silu_clamp_after_10p0", Activation::SwigluClampAfter { limit: 10.0 }),
    ("swigluoai_7p0", Activation::SwigluOai { alpha: 1.702, limit: Some(7.0), beta: 1.0 }),
    ("swigluoai_10p0", Activation::SwigluOai { alpha: 1.702, limit: Some(10.0), beta: 1.0 }),
];

/// The MANIFEST's rule: rtol 4e-6, results below 1e-37 may be flushed, NaN is NaN, inf is inf.
fn agrees(got: f32, want: f32, rtol: f32, atol: f32) -> bool {
    if !want.is_finite() || !got.is_finite() {
        return same(got, want);
    }
    (got - want).abs() <= rtol * want.abs() + atol
}

#[test]
fn activations_equal_the_golden_ones() {
    let case = "prim_gated_activations";
    let (gate, up) = (floats(case, "gate"), floats(case, "up"));
    for (name, activation) in ACTIVATIONS {
        for ((gate, up), want) in gate.iter().zip(&up).zip(floats(case, name)) {
            let got = numerics::activate(activation, *gate, *up);
            assert!(agrees(got, want, 4e-6, 1e-37), "{name}({gate}, {up}) = {got}, expected {want}");
        }
    }
    for ((gate, up), want) in gate.iter().zip(&up).zip(floats(case, "gelu_tanh_and_mul")) {
        let got = numerics::activate(Activation::GeluTanh, *gate, *up);
        // 1 + tanh cancels: a tanh that is right to f32 may differ by this much.
        let slack = 1.3e-7 * (gate * up).abs() + 1e-37;
        assert!(agrees(got, want, 4e-6, slack), "gelu_tanh({gate}, {up}) = {got}, expected {want}");
    }
    for (gate, want) in gate.iter().zip(floats(case, "relu2_gate")) {
        let got = numerics::activate(Activation::Relu2, *gate, *gate);
        assert!(agrees(got, want, 0.0, 1e-37), "relu2({gate}) = {got}, expected {want}");
    }
}

fn shader(path: &str) -> String {
    std::fs::read_to_string(format!("{}/shaders/{path}", env!("CARGO_MANIFEST_DIR"))).unwrap()
}

/// Runs `body`, which makes `result` of `word`, over all words: fragments are tested on the device alone.
pub fn map(fragments: &[&str], constants: &str, body: &str, words: &[u32]) -> Vec<u32> {
    let fragments: String = fragments.iter().map(|path| shader(path)).collect();
    let text = format!(
        "@group(0) @binding(0) var<storage, read> words: array<u32>;
        @group(0) @binding(1) var<storage, read_write> results: array<u32>;
        {constants}
        {fragments}
        @compute @workgroup_size(64)
        fn main(@builtin(global_invocation_id) id: vec3<u32>) {{
            if id.x < arrayLength(&results) {{
                {body}
                results[id.x] = result;
            }}
        }}"
    );
    let inputs = gpu().upload("words", words).unwrap();
    let results = words.len() / if body.contains("PAIR_OF_WORDS") { 2 } else { 1 };
    let outputs = gpu().create_buffer("results", 4 * results as u64, false).unwrap();
    dispatch(&text, [&inputs, &outputs], (results as u32).div_ceil(64));
    gpu().read(&outputs).unwrap()
}

/// Runs a module of two bindings.
#[cfg(feature = "suite-on-cuda")]
fn dispatch(text: &str, buffers: [&moewe::backend::cuda::CudaBuffer; 2], workgroups: u32) {
    use moewe::plan::{BufferSlice, Launch};
    let kernel = gpu().kernel("a fragment", text).unwrap();
    let slices = buffers.map(|buffer| BufferSlice { buffer, offset: 0, bytes: gpu().buffer_bytes(buffer) });
    let binding = gpu().bind(&kernel, &slices).unwrap();
    let mut encoder = gpu().encoder();
    let launch = Launch { kernel: &kernel, binding: &binding, workgroups: [workgroups, 1, 1], params: 0 };
    gpu().launch(&mut encoder, &mut std::iter::once(launch)).unwrap();
    gpu().submit(encoder).unwrap();
}

/// Runs a module of two bindings.
#[cfg(not(feature = "suite-on-cuda"))]
fn dispatch(text: &str, buffers: [&moewe::wgpu::Buffer; 2], workgroups: u32) {
    use moewe::wgpu;
    let device = gpu().device();
    let module = device.create_shader_module(wgpu::ShaderModuleDescriptor {
        label: None,
        source: wgpu::ShaderSource::Wgsl(text.into()),
    });
    let pipeline = device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
        label: None,
        layout: None,
        module: &module,
        entry_point: Some("main"),
        compilation_options: wgpu::PipelineCompilationOptions::default(),
        cache: None,
    });
    let group = device.create_bind_group(&wgpu::BindGroupDescriptor {
        label: None,
        layout: &pipeline.get_bind_group_layout(0),
        entries: &[
            wgpu::BindGroupEntry { binding: 0, resource: buffers[0].as_entire_binding() },
            wgpu::BindGroupEntry { binding: 1, resource: buffers[1].as_entire_binding() },
        ],
    });
    let mut encoder = gpu().encoder();
    {
        let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default());
        pass.set_pipeline(&pipeline);
        pass.set_bind_group(0, &group, &[]);
        pass.dispatch_workgroups(workgroups, 1, 1);
    }
    gpu().submit(encoder).unwrap();
}

pub fn exact(what: &str, words: &[u32], got: &[u32], want: impl Fn(u32) -> f32) {
    for (word, got) in words.iter().zip(got) {
        let want = want(*word);
        assert!(same(f32::from_bits(*got), want), "{what} {word:#x}: {:#x}, expected {:#x}", got, want.to_bits());
    }
}

#[test]
fn every_code_decodes_on_the_device_as_in_numerics() {
    let halves: Vec<u32> = (0..=0xffff).collect();
    let f16 = map(&["fragments/decode_f16.wgsl"], "", "let result = bitcast<u32>(decode_f16(words[id.x]));", &halves);
    exact("f16", &halves, &f16, |word| numerics::decode_f16(word as u16));
    let codes: Vec<u32> = (0..256).collect();
    let body = "let result = bitcast<u32>(decode_e4m3(words[id.x]));";
    let e4m3 = map(&["fragments/decode_e4m3.wgsl"], "", body, &codes);
    exact("e4m3", &codes, &e4m3, |word| numerics::decode_e4m3(word as u8));
}

#[test]
fn every_half_and_its_neighbours_encode_on_the_device_as_in_numerics() {
    // Around each of the 65,536 values: itself, the f32 beside it, the tie to the next, and that one's neighbours.
    for (fragment, decode) in [("f16", numerics::decode_f16 as fn(u16) -> f32), ("bf16", numerics::decode_bf16)] {
        let mut words = vec![];
        for half in 0..=0xffffu16 {
            let value = decode(half).to_bits();
            let tie = decode(half).midpoint(decode(half.wrapping_add(1))).to_bits();
            words.extend([value, value ^ 1, tie, tie.wrapping_add(1), tie.wrapping_sub(1)]);
        }
        let (encode, store) = (format!("fragments/encode_{fragment}.wgsl"), format!("fragments/store_{fragment}.wgsl"));
        let got = map(&[&encode, &store], "", "let result = encode(words[id.x]);", &words);
        // The model's roundings are those of the output.
        let round = format!("fragments/round_{fragment}.wgsl");
        let body = "let result = bitcast<u32>(round_model(bitcast<f32>(words[id.x])));";
        let needed: Vec<&str> = match fragment {
            "f16" => vec!["fragments/decode_f16.wgsl", &encode, &round],
            _ => vec![&encode, &round],
        };
        let rounded = map(&needed, "", body, &words);
        exact(&round, &words, &rounded, |word| {
            let float_type = if fragment == "f16" { FloatType::F16 } else { FloatType::Bf16 };
            numerics::round_to(float_type, f32::from_bits(word))
        });
        for (word, got) in words.iter().zip(got) {
            let value = f32::from_bits(*word);
            let want = if fragment == "bf16" {
                half::bf16::from_f32(value).to_bits()
            } else {
                half::f16::from_f32(value).to_bits()
            };
            let (got, want) = (decode(got as u16), decode(want));
            assert!(same(got, want), "{fragment}: {value} ({word:#x}) becomes {got}, expected {want}");
        }
    }
}

/// The kernel's own text of an activation: constants and fragments.
fn activation_text(activation: Activation) -> (String, Vec<&'static str>) {
    let mut spec = crate::rig::deepseek_like();
    spec.experts.activation = activation;
    spec.shared = None;
    let facts = gpu().facts();
    let schedule = lower(&spec, Scope::Layer, 1, &facts, &crate::rig::GEMV).unwrap();
    let step = schedule.buckets[0].steps.iter().find(|step| step.name.starts_with("experts.gate_up")).unwrap();
    let source = step.operation.source();
    let constants = source.wgsl();
    let named = ["SWIGLU_", "SITU_"];
    let constants =
        constants.lines().filter(|line| named.iter().any(|name| line.starts_with(&format!("const {name}"))));
    let needed = ["keep_nan", "clamp.", "silu", "sigmoid", "tanh", "gelu_erf", "activate_"];
    let wanted = |path: &&str| needed.iter().any(|name| path.contains(name));
    let fragments = source.fragments.iter().map(|fragment| fragment.path).filter(wanted).collect();
    (constants.collect::<Vec<_>>().join("\n"), fragments)
}

const ACTIVATION_BODY: &str = "// PAIR_OF_WORDS
    let gate = bitcast<f32>(words[2u * id.x]);
    let up = bitcast<f32>(words[2u * id.x + 1u]);
    let result = bitcast<u32>(gate_part(gate) * up_part(up));";

#[test]
fn activations_on_the_device_equal_the_golden_ones() {
    let case = "prim_gated_activations";
    let (gate, up) = (floats(case, "gate"), floats(case, "up"));
    let words: Vec<u32> = gate.iter().zip(&up).flat_map(|(gate, up)| [gate.to_bits(), up.to_bits()]).collect();
    let gelu = [("gelu_tanh_and_mul", Activation::GeluTanh)];
    for (name, activation) in ACTIVATIONS.into_iter().chain(gelu) {
        let (constants, fragments) = activation_text(activation);
        let got = map(&fragments, &constants, ACTIVATION_BODY, &words);
        for (((gate, up), want), got) in gate.iter().zip(&up).zip(floats(case, name)).zip(got) {
            let got = f32::from_bits(got);
            // A device may flush a subnormal gate, silu(gate) or up, up to 2^-126, before the product. Where
            // the other factor is infinite, inf and NaN are both right.
            let factor = numerics::activate_parts(activation, *gate, 1.0)[0].abs();
            let (tiny_gate, tiny_up) = (factor < f32::MIN_POSITIVE, up.abs() < f32::MIN_POSITIVE);
            if (tiny_gate || tiny_up) && !want.is_finite() {
                assert!(!got.is_finite(), "{name}({gate}, {up}) = {got}, expected {want}");
                continue;
            }
            let by_gate = if tiny_gate && up.is_finite() { f32::MIN_POSITIVE * up.abs() } else { 0.0 };
            let by_up = if tiny_up && factor.is_finite() { f32::MIN_POSITIVE * factor } else { 0.0 };
            // 1 + tanh cancels in the definition, not on the device.
            let cancelled = match activation {
                Activation::GeluTanh => 1.3e-7 * gate.abs() * up.abs(),
                _ => 0.0,
            };
            let slack = by_gate + by_up + cancelled;
            // WGSL's exp errs by 3 + 2|x| ulp, its division by 2.5; results below 1e-30 may be flushed, and
            // beyond exp(88) the sigmoid is taken as 0.
            let rtol = 4e-6 + 3e-7 * gate.abs().min(90.0);
            assert!(agrees(got, want, rtol, 1e-30 + slack), "{name}({gate}, {up}) = {got}, expected {want}");
        }
    }
}

/// Those without golden values: against `numerics`, whose erf is f64 and whose tanh is the system's.
#[test]
fn the_other_activations_on_the_device_equal_numerics() {
    let case = "prim_gated_activations";
    let (gate, up) = (floats(case, "gate"), floats(case, "up"));
    let words: Vec<u32> = gate.iter().zip(&up).flat_map(|(gate, up)| [gate.to_bits(), up.to_bits()]).collect();
    for activation in [
        Activation::GeluErf,
        Activation::Situ { beta: 4.0, linear_beta: 25.0 },
        Activation::Situ { beta: 0.5, linear_beta: 0.25 },
        Activation::Relu2,
    ] {
        let (constants, fragments) = activation_text(activation);
        let got = map(&fragments, &constants, ACTIVATION_BODY, &words);
        for ((gate, up), got) in gate.iter().zip(&up).zip(got) {
            let (got, want) = (f32::from_bits(got), numerics::activate(activation, *gate, *up));
            let [factor, other] = numerics::activate_parts(activation, *gate, *up).map(f32::abs);
            if factor < f32::MIN_POSITIVE || other < f32::MIN_POSITIVE || want.abs() < 1e-30 {
                // Flushed or not, it is nothing beside the other values of its row; inf times 0 may be either.
                let nothing = got.abs() <= 1e-30f32.max(factor.max(other) * 1.2e-38) || !want.is_finite();
                assert!(nothing || !got.is_finite(), "{activation:?}({gate}, {up}) = {got}, expected {want}");
                continue;
            }
            // exp errs by 3 + 2|x| ulp: of z^2 for erf, of the gate for the others.
            let rtol = 4e-6 + 3e-7 * (gate * gate).min(90.0).max(gate.abs().min(90.0));
            assert!(agrees(got, want, rtol, 1e-30), "{activation:?}({gate}, {up}) = {got}, expected {want}");
        }
    }
}
