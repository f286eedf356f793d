//! Codes and scales, of weights and of activations: `numerics` against the golden ones and against definitions,
//! the device against `numerics`, bit for bit.

use fastrand::Rng;
use moewe::Backend;
use moewe::host::{Host, Session};
use moewe::kernels::{Operation, RowScale, ScaleLayout};
use moewe::numerics::{self, SpanScale};
use moewe::reference::Inputs;
use moewe::spec::*;
use moewe::weights::Code;
use rayon::prelude::*;

use crate::rig::{GEMV, RandomLayer, TILED, deepseek_like, gpu};
use crate::scalars::{exact, floats, golden, map, same};

const CODES: [ActivationCode; 2] = [ActivationCode::E4m3, ActivationCode::Int8];

#[test]
fn tables_of_formats_equal_the_golden_ones() {
    let case = "prim_format_tables";
    for (code, want) in floats(case, "e5m2_decode").into_iter().enumerate() {
        assert!(same(numerics::decode_e5m2(code as u8), want), "e5m2 {code:#x}");
    }
    for (code, want) in floats(case, "e2m1_decode").into_iter().enumerate() {
        assert_eq!(numerics::decode_e2m1(code as u8).to_bits(), want.to_bits(), "e2m1 {code:#x}");
    }
    for (byte, pair) in floats(case, "e2m1_packed_byte_decode").chunks_exact(2).enumerate() {
        let halves = [byte & 15, byte >> 4].map(|code| numerics::decode_e2m1(code as u8));
        assert_eq!(halves, [pair[0], pair[1]], "byte {byte:#x}");
    }
    for (x, want) in floats(case, "e2m1_encode_x").into_iter().zip(golden(case, "e2m1_encode_code")) {
        assert_eq!(numerics::encode_e2m1(x), Some(want), "{x}");
    }
    for (x, want) in floats(case, "e8m0_ceil_x").into_iter().zip(golden(case, "e8m0_ceil_code")) {
        assert_eq!(numerics::ceil_e8m0(x), want, "{x}");
    }
    let case = "prim_fp8_e4m3fn_encode";
    for (x, want) in floats(case, "x").into_iter().zip(golden(case, "code_saturating")) {
        let code = numerics::encode_e4m3(x);
        // The sign of a NaN is not specified.
        let both_nan = code & 0x7f == 0x7f && want & 0x7f == 0x7f;
        assert!(code == want || both_nan, "{x}: {code:#x}, expected {want:#x}");
    }
}

/// The golden groups: by rule and type of scale, their codes and scales.
fn golden_groups(case: &str, mut judge: impl FnMut(ScaleRule, ActivationScale, &[f32], &[u8], &[f32])) {
    let x = floats(case, "x");
    for (rule, floor) in [(ScaleRule::FlooredAmax, "eps1e-10"), (ScaleRule::FlooredScale { upper: None }, "minscale")] {
        for (scale, kind) in [(ActivationScale::F32, "f32"), (ActivationScale::F32CeilPow2, "ue8m0")] {
            if case.ends_with("192") && floor == "eps1e-10" {
                continue;
            }
            let codes = golden(case, &format!("codes_{kind}_{floor}"));
            judge(rule, scale, &x, &codes, &floats(case, &format!("scales_{kind}_{floor}")));
        }
    }
}

#[test]
fn groups_equal_the_golden_ones_in_numerics_and_on_every_backend() {
    for (case, width) in [("prim_group_quant_384", 384), ("prim_group_quant_tail_192", 192)] {
        golden_groups(case, |rule, scale, x, codes, scales| {
            let rows = x.chunks_exact(width).zip(codes.chunks_exact(width));
            for ((x, codes), scales) in rows.zip(scales.chunks_exact(width.div_ceil(128))) {
                for ((x, codes), scale_bits) in x.chunks(128).zip(codes.chunks(128)).zip(scales) {
                    let amax = numerics::largest_magnitude(x);
                    let span = SpanScale::dynamic(ActivationCode::E4m3, rule, scale, amax);
                    assert_eq!(span.scale.to_bits(), scale_bits.to_bits());
                    let found: Vec<u8> = x.iter().map(|x| span.encode(ActivationCode::E4m3, *x)).collect();
                    assert_eq!(found, codes);
                }
            }
            for layout in [GEMV, TILED] {
                let mut spec = deepseek_like();
                spec.hidden_size = width;
                spec.precision.input = FloatType::F32;
                let span = ScaleSpan::Group(128);
                spec.experts.activation_quant =
                    ActivationQuant::Dynamic { code: ActivationCode::E4m3, span, rule, scale };
                let layer = RandomLayer::new(spec, 3);
                let tokens = x.len() / width;
                let want = (codes.to_vec(), scales.to_vec());
                assert_eq!(first_codes(&layer.on_gpu(tokens, &layout), x), want, "{rule:?} {scale:?}");
                assert_eq!(first_codes(&layer.on_cpu(tokens, &layout, None), x), want, "{rule:?} {scale:?}");
                let judged = moewe::reference::input_codes(&layer.spec, &layer.weights(), Inputs::of(x));
                assert_eq!(judged.unwrap(), want);
            }
        });
    }
}

/// Codes and scales of what the routed experts read.
fn first_codes<B: Host>(session: &Session<B>, x: &[f32]) -> (Vec<u8>, Vec<f32>) {
    session.run(&Inputs::of(x)).unwrap();
    let tokens = session.plan().schedule().max_tokens;
    let step = session.bound().steps(tokens).iter().find(|step| step.name == "experts.input.quantize").unwrap();
    let Operation::Quantize(quantize) = &step.operation else { panic!("{step:?}") };
    let RowScale::Span { layout, .. } = quantize.scale else { panic!("{step:?}") };
    let read = |name: &str| session.plan().backend().read(session.scratch().buffer(name).unwrap()).unwrap();
    let codes: Vec<u8> = read("experts.input.codes").iter().flat_map(|word| word.to_le_bytes()).collect();
    let (words, groups) = (read("experts.input.scales"), quantize.spans()[0]);
    let scales = (0..tokens).flat_map(|row| (0..groups).map(move |group| (row, group)));
    let scales = scales.map(|(row, group)| layout.read(&words, row, group, groups)).collect();
    (codes[..tokens * quantize.cols].to_vec(), scales)
}

/// Every bf16 and every f16, as f32.
fn halves() -> Vec<u32> {
    let all = 0..=0xffffu16;
    all.clone()
        .map(|bits| numerics::decode_bf16(bits).to_bits())
        .chain(all.map(|bits| numerics::decode_f16(bits).to_bits()))
        .collect()
}

const ENCODE_BODY: &str = "let result = encode_code(words[id.x] >> 31u, words[id.x] & 0x7fffffffu);";

fn encoder(code: ActivationCode) -> &'static str {
    match code {
        ActivationCode::E4m3 => "fragments/encode_e4m3.wgsl",
        ActivationCode::Int8 => "fragments/encode_int8.wgsl",
    }
}

#[test]
fn every_half_becomes_the_same_code_on_the_device() {
    let mut words = halves();
    // And what surrounds the middles of neighbouring codes.
    for code in 0..0x7eu8 {
        let middle = numerics::decode_e4m3(code).midpoint(numerics::decode_e4m3(code + 1)).to_bits();
        words.extend([middle - 1, middle, middle + 1].map(|bits| bits | u32::from(code & 1) << 31));
    }
    for code in CODES {
        let got = map(&[encoder(code)], "", ENCODE_BODY, &words);
        for (word, got) in words.iter().zip(got) {
            let value = f32::from_bits(*word);
            let want = numerics::encode_activation(code, value);
            assert_eq!(got, u32::from(want), "{code:?} of {value}");
        }
    }
}

/// All 2^32 floats through the E4M3 encoder of the device, MOEWE_EXHAUSTIVE=1;
/// without it every 4,099th.
#[test]
fn floats_become_the_same_e4m3_codes_on_the_device() {
    const CHUNK: u32 = 1 << 23;
    let step = stride();
    let body = "var result = 0u;
        for (var byte = 0u; byte < 4u; byte++) {
            let bits = words[0] + (4u * id.x + byte) * words[1];
            result |= encode_code(bits >> 31u, bits & 0x7fffffffu) << (8u * byte);
        }";
    let mut begin = 0u64;
    while begin < 1 << 32 {
        let values = u64::from(CHUNK).min(((1u64 << 32) - begin).div_ceil(u64::from(step)));
        let words = values.div_ceil(4) as usize;
        let mut input = vec![0; words];
        input[..2].copy_from_slice(&[begin as u32, step]);
        let got = map(&[encoder(ActivationCode::E4m3)], "", body, &input);
        (0..values).into_par_iter().for_each(|at| {
            let bits = (begin + at * u64::from(step)) as u32;
            let code = (got[at as usize / 4] >> (8 * (at % 4))) as u8;
            assert_eq!(code, numerics::encode_e4m3(f32::from_bits(bits)), "{bits:#x}");
        });
        begin += values * u64::from(step);
    }
}

fn stride() -> u32 {
    if std::env::var("MOEWE_EXHAUSTIVE").is_ok_and(|value| value == "1") { 1 } else { 4_099 }
}

/// All 2^32 floats through `numerics::encode_e4m3` against the middles of neighbouring values, MOEWE_EXHAUSTIVE=1
/// (a minute or two); without it every 4,099th.
#[test]
fn floats_become_the_nearest_e4m3_codes() {
    // Upper end of each code's values, the middle itself included where the code is even.
    let ends: Vec<(f32, bool)> = (0..0x7eu8)
        .map(|code| (numerics::decode_e4m3(code).midpoint(numerics::decode_e4m3(code + 1)), code % 2 == 0))
        .collect();
    let step = u64::from(stride());
    let count = (1u64 << 32).div_ceil(step);
    (0..1u64 << 10).into_par_iter().for_each(|block| {
        for at in (count * block) >> 10..(count * (block + 1)) >> 10 {
            let bits = (at * step) as u32;
            let value = f32::from_bits(bits);
            let magnitude = value.abs();
            let want = if value.is_nan() {
                0x7f
            } else {
                ends.partition_point(|&(end, even)| magnitude > end || (magnitude == end && !even)) as u8
            };
            let sign = if value.is_sign_negative() { 0x80 } else { 0 };
            assert_eq!(numerics::encode_e4m3(value), want | sign, "{bits:#x}");
        }
    });
}

#[test]
fn divisions_and_products_on_the_device_are_those_of_ieee() {
    let rng = &mut Rng::with_seed(77);
    let edges =
        [0.0, f32::MIN_POSITIVE, 1e-40, 1e-10, 1e-4, 1.0, 127.0, 448.0, 3.0e38, f32::MAX, f32::INFINITY, f32::NAN];
    let mut words: Vec<u32> =
        edges.iter().flat_map(|a| edges.iter().flat_map(|b| [a.to_bits(), b.to_bits()])).collect();
    let random = |rng: &mut Rng| match rng.u8(0..3) {
        0 => rng.u32(0..0x7f80_0000),
        // Quotients near 1 and near middles: mantissas of few bits and neighbours of powers of two.
        1 => (127 << 23) + (rng.u32(0..1 << 12) << 11),
        _ => (rng.u32(100..150) << 23).wrapping_add_signed(rng.i32(-3..4)),
    };
    words.extend((0..1 << 20).map(|_| random(rng)));
    for (name, operation) in [("divide", (|a, b| a / b) as fn(f32, f32) -> f32), ("multiply", |a, b| a * b)] {
        let body = format!("// PAIR_OF_WORDS\nlet result = {name}(words[2u * id.x], words[2u * id.x + 1u]);");
        let got = map(&["fragments/exact_float.wgsl"], "", &body, &words);
        for (pair, got) in words.chunks_exact(2).zip(got) {
            let [a, b] = [f32::from_bits(pair[0]), f32::from_bits(pair[1])];
            let want = operation(a, b);
            // What is no normal number becomes 0.
            let want = if want < f32::MIN_POSITIVE { 0.0 } else { want };
            assert!(
                same(f32::from_bits(got), want),
                "{name}({a:e}, {b:e}): {:e}, expected {want:e}",
                f32::from_bits(got)
            );
        }
    }
}

#[test]
fn every_code_of_every_weight_format_decodes_on_the_device() {
    let bytes: Vec<u32> = (0..256).collect();
    for (code, fragments, constants) in [
        (
            Code::E4m3,
            &["fragments/decode_e4m3.wgsl", "fragments/four_e4m3_bits.wgsl", "fragments/weight_e4m3.wgsl"][..],
            "",
        ),
        (
            Code::E4m3,
            &["fragments/decode_e4m3.wgsl", "fragments/four_e4m3_halves.wgsl", "fragments/weight_e4m3.wgsl"],
            "",
        ),
        (Code::E2m1, &["fragments/weight_e2m1_halves.wgsl"], ""),
        (Code::E2m1, &["fragments/weight_e2m1.wgsl"], ""),
        (Code::Int8, &["fragments/weight_int8.wgsl"], ""),
        (Code::Int4, &["fragments/weight_int4.wgsl"], "const CODE_ZERO: f32 = 8.0;"),
        (Code::Uint4, &["fragments/weight_int4.wgsl"], "const CODE_ZERO: f32 = 0.0;"),
    ] {
        // Codes as binary16 are for devices that unpack those exactly.
        if fragments.iter().any(|path| path.contains("halves")) && !gpu().facts().exact_halves {
            println!("NOT RUN: {fragments:?}, this device does not unpack binary16 exactly");
            continue;
        }
        // The byte in every place of a vector and a word, both ways to read it; a place is a pair of codes of 4 bits.
        for place in 0..16u32 {
            let (word, shift) = (place / 4, 8 * (place % 4));
            let codes = 8 / code.bits() as u32;
            for which in 0..codes {
                let at = place * codes + which;
                let body = format!(
                    "let words_of = vec4<u32>(select(0u, words[id.x] << {shift}u, {word}u == 0u),
                         select(0u, words[id.x] << {shift}u, {word}u == 1u),
                         select(0u, words[id.x] << {shift}u, {word}u == 2u),
                         select(0u, words[id.x] << {shift}u, {word}u == 3u));
                     let one = weight_one(words_of[{word}u], {}u);
                     let quad = WEIGHT_FACTOR * weight_quad(words_of, {}u)[{}u];
                     // One code is not 0: what is NaN in the vector is this.
                     let four = select(quad, one, weight_nans(words_of) != 0u);
                     let result = select(0x12345678u, bitcast<u32>(one), bitcast<u32>(one) == bitcast<u32>(four));",
                    at % (4 * codes),
                    at / 4,
                    at % 4,
                );
                let got = map(fragments, constants, &body, &bytes);
                exact(&format!("{code:?} at {at}"), &bytes, &got, |byte| {
                    numerics::decode(code, byte >> (code.bits() as u32 * which) & (u32::MAX >> (32 - code.bits())))
                });
            }
        }
    }
}

#[test]
fn every_scale_decodes_on_the_device() {
    let bytes: Vec<u32> = (0..255).collect();
    let preamble = "fn segment_word(word: u32) -> u32 { return words[word]; }";
    for place in 0..4u32 {
        let words: Vec<u32> = bytes.iter().map(|byte| byte << (8 * place)).collect();
        let body = format!("let result = bitcast<u32>(scale_at(id.x, {place}u));");
        let got = map(&["fragments/scale_e8m0.wgsl"], preamble, &body, &words);
        // 2^-127 is no normal number: a device may take it for 0.
        exact("e8m0", &bytes[1..], &got[1..], |byte| numerics::decode_e8m0(byte as u8));
        let fragments = ["fragments/decode_e4m3.wgsl", "fragments/scale_e4m3.wgsl"];
        let got = map(&fragments, preamble, &body, &words);
        exact("e4m3 scale", &bytes, &got, |byte| numerics::decode_e4m3(byte as u8));
    }
    // Five words of random bits each, but d and dmin numbers.
    let rng = &mut Rng::with_seed(8);
    let supers: Vec<[u32; 5]> = (0..500)
        .map(|_| {
            let half = |rng: &mut Rng| u32::from(half::f16::from_f32(rng.f32() - 0.5).to_bits());
            let d = half(rng) | half(rng) << 16;
            [d, rng.u32(..), rng.u32(..), rng.u32(..), rng.u32(..)]
        })
        .collect();
    let words: Vec<u32> = supers.iter().flatten().copied().collect();
    for block in 0..16u32 {
        let fragments = ["fragments/decode_f16.wgsl", "fragments/scale_q6_k.wgsl"];
        let body = format!("let result = bitcast<u32>(scale_at(id.x / 5u * 5u, {block}u));");
        let got = map(&fragments, preamble, &body, &words);
        for (at, words) in supers.iter().enumerate() {
            assert!(same(f32::from_bits(got[5 * at]), numerics::q6_k_scale(words, block as usize)));
        }
        if block < 8 {
            let fragments = ["fragments/decode_f16.wgsl", "fragments/scale_q4_k.wgsl"];
            for (which, function) in ["scale_at", "min_at"].into_iter().enumerate() {
                let body = format!("let result = bitcast<u32>({function}(id.x / 5u * 5u, {block}u));");
                let got = map(&fragments, preamble, &body, &words);
                for (at, words) in supers.iter().enumerate() {
                    let want = numerics::q4_k_scale(words, block as usize)[which];
                    assert!(same(f32::from_bits(got[5 * at]), want), "{function}");
                }
            }
        }
    }
}

/// vLLM #51477: a fused kernel that loses the flag. Fused and not, with each type of scale: the same codes and
/// scales of what the second GEMM reads, a powers-of-two scale wherever one is asked for.
#[test]
fn bug_26_fused_quantisation_keeps_the_scale_type() {
    for scale in [ActivationScale::F32, ActivationScale::F32CeilPow2, ActivationScale::Ue8m0Packed] {
        for group in [64, 128] {
            let mut spec = deepseek_like();
            spec.shared = None;
            spec.experts.intermediate_size = 200;
            spec.experts.activation_quant = ActivationQuant::dynamic_fp8(group, scale);
            let layer = RandomLayer::new(spec, 6);
            let inputs = layer.all_inputs(7, 9);
            for base in [GEMV, TILED] {
                let hidden = [true, false].map(|fuse_quantization| {
                    let session = layer.on_gpu(7, &moewe::Options { fuse_quantization, ..base });
                    session.run(&inputs.view()).unwrap();
                    let fused = session.bound().steps(7).iter().any(|step| step.name == "experts.hidden.quantize");
                    assert!(fused);
                    let read = |name: &str| gpu().read(session.scratch().buffer(name).unwrap()).unwrap();
                    let step = session.bound().steps(7).iter().find(|step| step.name == "experts.hidden.quantize");
                    let Operation::Quantize(quantize) = &step.unwrap().operation else { panic!() };
                    let RowScale::Span { layout, .. } = quantize.scale else { panic!() };
                    (read("experts.hidden.codes"), read("experts.hidden.scales"), layout)
                });
                let [(codes, scales, layout), (other_codes, other_scales, other_layout)] = hidden;
                assert_eq!(layout, other_layout);
                let groups = 200usize.div_ceil(group);
                for (row, span) in (0..21).flat_map(|row| (0..groups).map(move |span| (row, span))) {
                    let [one, other] = [&scales, &other_scales].map(|words| layout.read(words, row, span, groups));
                    // The activation's exp may be contracted otherwise in another kernel.
                    assert!((one - other).abs() <= 2e-6 * other, "{one} {other}");
                    let power = one.to_bits() & 0x7f_ffff == 0;
                    assert!(scale == ActivationScale::F32 || power, "{one} is no power of two");
                }
                let differing = codes.iter().zip(&other_codes).filter(|(a, b)| a != b).count();
                assert!(differing * 50 <= codes.len(), "{differing} of {} words", codes.len());
                if scale == ActivationScale::Ue8m0Packed {
                    assert_eq!(layout, ScaleLayout::Packed);
                }
            }
        }
    }
}
