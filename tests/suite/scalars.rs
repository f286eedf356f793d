//! Scalars: the golden tables and activations for `numerics`, and every code of every decoder and
//! encoder on the device against `numerics`, bit for bit.

use moewe::Backend;
use moewe::host::Host;
use moewe::numerics;
use moewe::spec::Activation;
use safetensors::SafeTensors;

use crate::rig::gpu;

fn golden(case: &str, tensor: &str) -> Vec<u8> {
    let path = format!("{}/tests/golden/{case}/io.safetensors", env!("CARGO_MANIFEST_DIR"));
    let bytes = std::fs::read(path).unwrap();
    SafeTensors::deserialize(&bytes).unwrap().tensor(tensor).unwrap().data().to_vec()
}

fn floats(case: &str, tensor: &str) -> Vec<f32> {
    golden(case, tensor).chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
}

fn same(a: f32, b: f32) -> bool {
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
fn map(fragments: &[&str], constants: &str, body: &str, words: &[u32]) -> Vec<u32> {
    use moewe::wgpu;
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
    let inputs = gpu().upload("words", words).unwrap();
    let results = words.len() / if body.contains("PAIR_OF_WORDS") { 2 } else { 1 };
    let outputs = gpu().create_buffer("results", 4 * results as u64, false).unwrap();
    let group = device.create_bind_group(&wgpu::BindGroupDescriptor {
        label: None,
        layout: &pipeline.get_bind_group_layout(0),
        entries: &[
            wgpu::BindGroupEntry { binding: 0, resource: inputs.as_entire_binding() },
            wgpu::BindGroupEntry { binding: 1, resource: outputs.as_entire_binding() },
        ],
    });
    let mut encoder = gpu().encoder();
    {
        let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default());
        pass.set_pipeline(&pipeline);
        pass.set_bind_group(0, &group, &[]);
        pass.dispatch_workgroups((results as u32).div_ceil(64), 1, 1);
    }
    gpu().submit(encoder).unwrap();
    gpu().read(&outputs).unwrap()
}

fn exact(what: &str, words: &[u32], got: &[u32], want: impl Fn(u32) -> f32) {
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
    let body = "let result = bitcast<u32>(weight_quad(vec4<u32>(words[id.x] << 8u), 3u).y);";
    let e4m3 = map(&["fragments/weight_fp8_block.wgsl"], "", body, &codes);
    exact("e4m3", &codes, &e4m3, |word| numerics::decode_e4m3(word as u8));
}

#[test]
fn every_half_and_its_neighbours_encode_on_the_device_as_in_numerics() {
    // Around each of the 65,536 values: itself, the f32 beside it, the tie to the next, and that one's neighbours.
    for (fragment, decode) in [
        ("fragments/store_f16.wgsl", numerics::decode_f16 as fn(u16) -> f32),
        ("fragments/store_bf16.wgsl", numerics::decode_bf16),
    ] {
        let mut words = vec![];
        for half in 0..=0xffffu16 {
            let value = decode(half).to_bits();
            let tie = decode(half).midpoint(decode(half.wrapping_add(1))).to_bits();
            words.extend([value, value ^ 1, tie, tie.wrapping_add(1), tie.wrapping_sub(1)]);
        }
        let got = map(&[fragment], "", "let result = encode(words[id.x]);", &words);
        for (word, got) in words.iter().zip(got) {
            let value = f32::from_bits(*word);
            let want = if fragment.contains("bf16") {
                half::bf16::from_f32(value).to_bits()
            } else {
                half::f16::from_f32(value).to_bits()
            };
            let (got, want) = (decode(got as u16), decode(want));
            assert!(same(got, want), "{fragment}: {value} ({word:#x}) becomes {got}, expected {want}");
        }
    }
}

#[test]
fn activations_on_the_device_equal_the_golden_ones() {
    let case = "prim_gated_activations";
    let (gate, up) = (floats(case, "gate"), floats(case, "up"));
    let words: Vec<u32> = gate.iter().zip(&up).flat_map(|(gate, up)| [gate.to_bits(), up.to_bits()]).collect();
    let body = "// PAIR_OF_WORDS
        let gate = bitcast<f32>(words[2u * id.x]);
        let up = bitcast<f32>(words[2u * id.x + 1u]);
        let result = bitcast<u32>(activate(gate, up));";
    for (name, activation) in ACTIVATIONS {
        let (fragment, constants) = match activation {
            Activation::Swiglu { limit: None } => ("activate_swiglu", String::new()),
            Activation::Swiglu { limit: Some(limit) } => {
                ("activate_swiglu_clamped", format!("const SWIGLU_LIMIT: f32 = {limit:?}f;"))
            }
            Activation::SwigluClampAfter { limit } => {
                ("activate_swiglu_clamped_after", format!("const SWIGLU_LIMIT: f32 = {limit:?}f;"))
            }
            Activation::SwigluOai { alpha, limit: Some(limit), beta } => (
                "activate_swiglu_oai_clamped",
                format!(
                    "const SWIGLU_LIMIT = {limit:?}f; const SWIGLU_ALPHA = {alpha:?}f; const SWIGLU_BETA = {beta:?}f;"
                ),
            ),
            other => panic!("{other:?} has no fragment"),
        };
        let path = format!("fragments/{fragment}.wgsl");
        let got = map(&["fragments/silu.wgsl", &path], &constants, body, &words);
        for (((gate, up), want), got) in gate.iter().zip(&up).zip(floats(case, name)).zip(got) {
            let got = f32::from_bits(got);
            // A device may flush a subnormal gate, silu(gate) or up, up to 2^-126, before the product. Where
            // the other factor is infinite, inf and NaN are both right.
            let silu = numerics::activate(Activation::Swiglu { limit: None }, *gate, 1.0).abs();
            let (tiny_gate, tiny_up) = (silu < f32::MIN_POSITIVE, up.abs() < f32::MIN_POSITIVE);
            if (tiny_gate || tiny_up) && !want.is_finite() {
                assert!(!got.is_finite(), "{name}({gate}, {up}) = {got}, expected {want}");
                continue;
            }
            let by_gate = if tiny_gate && up.is_finite() { f32::MIN_POSITIVE * up.abs() } else { 0.0 };
            let by_up = if tiny_up && silu.is_finite() { f32::MIN_POSITIVE * silu } else { 0.0 };
            let flushed = by_gate + by_up;
            // WGSL's exp errs by 3 + 2|x| ulp, its division by 2.5; results below 1e-30 may be flushed, and
            // beyond exp(88) the sigmoid is taken as 0.
            let rtol = 4e-6 + 3e-7 * gate.abs().min(90.0);
            assert!(agrees(got, want, rtol, 1e-30 + flushed), "{name}({gate}, {up}) = {got}, expected {want}");
        }
    }
}
