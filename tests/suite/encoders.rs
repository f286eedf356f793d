//! Encoders and rules of scales in `numerics`, against definitions written here: every value of a code is compared,
//! exactly, in f64. (`quantising` compares devices with `numerics`.)

use moewe::numerics::{self, Mxfp4Scale, SpanScale};
use moewe::spec::{ActivationCode, ActivationScale, FloatType, ScaleRule};

type Decode = fn(u16) -> f32;
const HALVES: [(FloatType, Decode); 2] =
    [(FloatType::F16, numerics::decode_f16), (FloatType::Bf16, numerics::decode_bf16)];

/// 2^power, the subnormal ones of f32 included.
fn power_of_two(power: i32) -> f64 {
    2f64.powi(power)
}

/// The code of the nearest value; of two equally near ones the even code. `values` rise. Beyond them: the last one.
/// And whether it was a tie.
fn nearest(values: &[(u8, f64)], x: f64) -> (u8, bool) {
    let (mut best, mut tie) = (values[0], false);
    for &value in &values[1..] {
        // Which side of the middle x lies on. Sums of two values and doubles of x are exact, differences are not.
        let (middle, x) = (best.1 + value.1, 2.0 * x);
        if x > middle || (x == middle && value.0.is_multiple_of(2)) {
            (best, tie) = (value, x == middle);
        } else if x == middle {
            tie = true;
        } else {
            break;
        }
    }
    (best.0, tie)
}

/// Codes and values without sign: E4M3FN but NaN.
fn e4m3() -> Vec<(u8, f64)> {
    let value = |code: u8| match (i32::from(code >> 3), f64::from(code & 7)) {
        (0, mantissa) => mantissa / 8.0 * power_of_two(-6),
        (exponent, mantissa) => (1.0 + mantissa / 8.0) * power_of_two(exponent - 7),
    };
    (0..0x7f).map(|code| (code, value(code))).collect()
}

fn e2m1() -> Vec<(u8, f64)> {
    (0..8).zip([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]).collect()
}

/// With sign, as two's complement.
fn int8() -> Vec<(u8, f64)> {
    (-128i8..=127).map(|code| (code as u8, f64::from(code))).collect()
}

/// What is encoded: every half, and the floats on either side of every middle of two values.
fn inputs(decode: Decode, values: &[(u8, f64)]) -> Vec<f32> {
    let beside = values.windows(2).flat_map(|pair| {
        let middle = ((pair[0].1 + pair[1].1) / 2.0) as f32;
        [-1, 1].map(|step| f32::from_bits(middle.to_bits().saturating_add_signed(step)))
    });
    (0..=0xffff).map(decode).chain(beside.flat_map(|value| [value, -value])).collect()
}

/// A sign beside a magnitude; how many ties there were.
fn signs_and_magnitudes(values: &[(u8, f64)], sign: u8, inputs: &[f32], encode: impl Fn(f32) -> Option<u8>) -> usize {
    let mut ties = 0;
    for &x in inputs.iter().filter(|x| !x.is_nan()) {
        let (code, tie) = nearest(values, f64::from(x.abs()));
        let want = if x.is_sign_negative() { code | sign } else { code };
        assert_eq!(encode(x), Some(want), "{x:e} ({:#x})", x.to_bits());
        ties += usize::from(tie);
    }
    ties
}

#[test]
fn every_half_becomes_the_nearest_e4m3_code() {
    for (float_type, decode) in HALVES {
        let inputs = inputs(decode, &e4m3());
        let ties = signs_and_magnitudes(&e4m3(), 0x80, &inputs, |x| Some(numerics::encode_e4m3(x)));
        // Halves hold the middles of all neighbours.
        assert_eq!(ties, 2 * 126, "{float_type:?}");
        for &x in &inputs {
            let code = numerics::encode_activation(ActivationCode::E4m3, x);
            assert_eq!(code, numerics::encode_e4m3(x));
            if x.is_nan() {
                assert_eq!(code, if x.is_sign_negative() { 0xff } else { 0x7f }, "{:#x}", x.to_bits());
            }
        }
    }
    let code = numerics::encode_e4m3;
    assert_eq!([0.0, -0.0, f32::from_bits(1), -f32::from_bits(1)].map(code), [0, 0x80, 0, 0x80]);
    // The largest value, the middle to where the next one would be, and what lies beyond.
    for (x, want) in [(448.0, 0x7e), (464.0, 0x7e), (465.0, 0x7e), (f32::MAX, 0x7e), (f32::INFINITY, 0x7e)] {
        assert_eq!([x, -x].map(code), [want, want | 0x80], "{x}");
    }
}

#[test]
fn every_half_becomes_the_nearest_int8_code() {
    for (float_type, decode) in HALVES {
        let mut ties = 0;
        for x in inputs(decode, &int8()) {
            let code = numerics::encode_activation(ActivationCode::Int8, x);
            let (want, tie) = if x.is_nan() { (0, false) } else { nearest(&int8(), f64::from(x)) };
            assert_eq!(code, want, "{x:e} ({:#x})", x.to_bits());
            ties += usize::from(tie);
        }
        // -127.5 and 127.5 are halves as well; 127.5 has one neighbour only.
        assert_eq!(ties, 255, "{float_type:?}");
    }
    let ends = [(127.5, 127), (128.0, 127), (f32::INFINITY, 127), (-128.5, -128), (f32::NEG_INFINITY, -128), (-0.0, 0)];
    for (x, want) in ends {
        assert_eq!(numerics::encode_activation(ActivationCode::Int8, x) as i8, want, "{x}");
    }
}

#[test]
fn every_half_becomes_the_nearest_e2m1_code() {
    for (float_type, decode) in HALVES {
        let inputs = inputs(decode, &e2m1());
        let ties = signs_and_magnitudes(&e2m1(), 8, &inputs, numerics::encode_e2m1);
        assert_eq!(ties, 2 * 7, "{float_type:?}");
        // There is no code to say it.
        assert!(inputs.iter().filter(|x| x.is_nan()).all(|x| numerics::encode_e2m1(*x).is_none()));
    }
    assert_eq!([0.0, -0.0].map(numerics::encode_e2m1), [Some(0), Some(8)]);
    assert_eq!(numerics::decode_e2m1(8).to_bits(), (-0f32).to_bits());
}

/// A power of two as scale loses nothing, so the code is that of the exact quotient.
#[test]
fn every_half_by_a_power_of_two_becomes_the_code_of_the_quotient() {
    for (_, decode) in HALVES {
        for power in [-20, -3, 0, 1, 9, 40] {
            let span = SpanScale::fixed(power_of_two(power) as f32);
            for x in (0..=0xffff).map(decode).filter(|x| !x.is_nan()) {
                let quotient = f64::from(x) * power_of_two(-power);
                let (code, _) = nearest(&e4m3(), quotient.abs());
                let want = if x.is_sign_negative() { code | 0x80 } else { code };
                assert_eq!(span.encode(ActivationCode::E4m3, x), want, "{x:e} / 2^{power}");
                assert_eq!(span.encode(ActivationCode::Int8, x), nearest(&int8(), quotient).0, "{x:e} / 2^{power}");
            }
        }
    }
}

/// Magnitudes for rules of scales: every half, and around each power of two, 6 and 7 times it and the quotients by
/// the largest codes. An infinity is what its bits say, 2^128, and NaN is not among them.
fn magnitudes() -> Vec<(f32, f64)> {
    let halves = HALVES.into_iter().flat_map(|(_, decode)| (0..=0xffff).map(decode)).filter(|x| x.is_sign_positive());
    let edges = (-149..=127).flat_map(|power| {
        [1.0, 1.5, 1.75, 448.0 / 256.0, 127.0 / 64.0].into_iter().flat_map(move |factor| {
            let edge = (factor * power_of_two(power)) as f32;
            [-1, 0, 1].map(|step| f32::from_bits(edge.to_bits().saturating_add_signed(step)))
        })
    });
    let value = |x: f32| if x.is_infinite() { power_of_two(128) } else { f64::from(x) };
    halves.chain(edges).filter(|x| !x.is_nan()).map(|x| (x, value(x))).collect()
}

/// The first byte whose power of two `reaches`, else 254.
fn first_byte(reaches: impl Fn(f64) -> bool) -> u8 {
    (0..254).find(|byte| reaches(power_of_two(i32::from(*byte) - 127))).unwrap_or(254)
}

#[test]
fn e8m0_is_the_smallest_power_of_two_that_is_not_below() {
    for (x, value) in magnitudes() {
        assert_eq!(numerics::ceil_e8m0(x), first_byte(|power| power >= value), "{x:e}");
    }
    assert_eq!([0.0, -0.0].map(numerics::ceil_e8m0), [0, 0]);
    for nan in (0..=0xffff).map(numerics::decode_bf16).filter(|x| x.is_nan()) {
        assert_eq!(numerics::ceil_e8m0(nan), 255, "{:#x}", nan.to_bits());
    }
    for byte in 0..255 {
        assert_eq!(f64::from(numerics::decode_e8m0(byte)), power_of_two(i32::from(byte) - 127));
    }
}

#[test]
fn mxfp4_scales_are_those_of_their_rules() {
    for (x, amax) in magnitudes() {
        // 6 scales are enough.
        let ceil = first_byte(|power| 6.0 * power >= amax);
        assert_eq!(numerics::mxfp4_scale(Mxfp4Scale::Ceil, x), ceil, "{x:e}");
        // 2^(n - 2), with n the largest power that amax reaches.
        let floor = first_byte(|power| 8.0 * power > amax);
        assert_eq!(numerics::mxfp4_scale(Mxfp4Scale::Floor, x), floor, "{x:e}");
        // From 7 scales on (1.75 of a power) the next power.
        let even = first_byte(|power| 7.0 * power > amax);
        assert_eq!(numerics::mxfp4_scale(Mxfp4Scale::Even, x), even, "{x:e}");
        // The first never saturates.
        assert!(x.is_infinite() || f64::from(x) <= 6.0 * f64::from(numerics::decode_e8m0(ceil)), "{x:e}");
    }
    for nan in (0..=0xffff).map(numerics::decode_f16).filter(|x| x.is_nan()) {
        for rule in [Mxfp4Scale::Ceil, Mxfp4Scale::Even, Mxfp4Scale::Floor] {
            assert_eq!(numerics::mxfp4_scale(rule, nan), 255, "{rule:?} {:#x}", nan.to_bits());
        }
    }
}

/// Scales of powers of two, for every half as the largest magnitude: the smallest one with which nothing saturates.
#[test]
fn powers_of_two_as_scales_are_the_smallest_that_reach() {
    for (code, max) in [(ActivationCode::E4m3, 448.0), (ActivationCode::Int8, 127.0)] {
        for (amax, value) in magnitudes() {
            for (rule, floor) in [
                (ScaleRule::FlooredAmax, f64::from(1e-10f32)),
                (ScaleRule::FlooredScale { upper: None }, max * f64::from(numerics::scale_floor(code))),
            ] {
                let scale = |scale| SpanScale::dynamic(code, rule, scale, amax).scale;
                let want = first_byte(|power| max * power >= value.max(floor));
                if amax.is_infinite() {
                    assert_eq!(scale(ActivationScale::F32), f32::INFINITY);
                    continue;
                }
                for kind in [ActivationScale::F32CeilPow2, ActivationScale::Ue8m0Packed] {
                    assert_eq!(f64::from(scale(kind)), power_of_two(i32::from(want) - 127), "{rule:?} {amax:e}");
                }
            }
        }
    }
}

#[test]
fn floats_become_the_nearest_halves() {
    for ((float_type, decode), (largest, infinite)) in HALVES.into_iter().zip([(0x7bff, 0x7c00), (0x7f7f, 0x7f80)]) {
        let round = |x: f64| {
            let [positive, negative] = [x as f32, -x as f32].map(|x| numerics::round_to(float_type, x));
            assert_eq!(negative.to_bits(), positive.to_bits() | 1 << 31);
            positive
        };
        for half in 0..infinite {
            let value = f64::from(decode(half));
            // Behind the largest one the next would be an even one: from the middle on it is an infinity.
            let next =
                if half == largest { 2.0 * value - f64::from(decode(half - 1)) } else { decode(half + 1).into() };
            let middle = value.midpoint(next);
            let float = middle as f32;
            assert_eq!(f64::from(float), middle);
            let [below, above] =
                [-1, 1].map(|step| f64::from(f32::from_bits(float.to_bits().wrapping_add_signed(step))));
            let even = if half % 2 == 0 { half } else { half + 1 };
            let got = [value, below, middle, above].map(|x| round(x).to_bits());
            assert_eq!(got, [half, half, even, half + 1].map(|half| decode(half).to_bits()), "{half:#x}");
        }
        assert!(numerics::round_to(float_type, f32::NAN).is_nan());
        assert_eq!(round(f64::INFINITY), f32::INFINITY);
    }
}
