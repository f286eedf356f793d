//! E2M1 codes (OCP MX, NVFP4) and the powers of two that MXFP4 blocks are scaled with.

/// Value of a 4-bit E2M1 code: 0, 0.5, 1, 1.5, 2, 3, 4, 6, above them a sign. Exact; has no NaN.
pub fn decode_e2m1(code: u8) -> f32 {
    const VALUES: [f32; 8] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];
    let value = VALUES[usize::from(code & 7)];
    if code & 8 == 0 { value } else { -value }
}

/// The E2M1 code nearest to `value`, ties to even; beyond 6 saturated. E2M1 has no NaN: `None`.
pub fn encode_e2m1(value: f32) -> Option<u8> {
    if value.is_nan() {
        return None;
    }
    // Where the next code begins, and whether the boundary itself belongs to it (an even code takes its ties).
    const CUTS: [(f32, bool); 7] =
        [(0.25, false), (0.75, true), (1.25, false), (1.75, true), (2.5, false), (3.5, true), (5.0, false)];
    let magnitude = value.abs();
    let above = |&&(cut, included): &&(f32, bool)| magnitude > cut || (included && magnitude == cut);
    let code = CUTS.iter().filter(above).count() as u8;
    Some(if value.is_sign_negative() { code | 8 } else { code })
}

/// How the scale of an MXFP4 block follows from its largest magnitude. Decoding is the same for all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mxfp4Scale {
    /// `2^ceil(log2(amax / 6))`: no code saturates (DeepSeek, aiter).
    Ceil,
    /// The exponent of amax rounded at a quarter of its mantissa, less 2 (Quark, vLLM, OCP).
    Even,
    /// `2^(floor(log2 amax) - 2)` (ggml).
    Floor,
}

/// The E8M0 byte of a block with this largest magnitude; 255 if that is NaN, and an infinity counts as 2^128.
pub fn mxfp4_scale(rule: Mxfp4Scale, amax: f32) -> u8 {
    let bits = amax.to_bits() & 0x7fff_ffff;
    if bits > 0x7f80_0000 {
        return 255;
    }
    let exponent = |bits: u32| (bits >> 23).saturating_sub(2).min(254) as u8;
    match rule {
        Mxfp4Scale::Ceil => {
            // amax <= 6 * 2^n as integers: 6 is 1.5 * 2^2.
            let (power, mantissa) = (bits >> 23, bits & 0x007f_ffff);
            match power {
                0 => 0,
                _ => (power + u32::from(mantissa > 0x0040_0000)).saturating_sub(2).min(254) as u8,
            }
        }
        Mxfp4Scale::Even => exponent(bits.saturating_add(0x20_0000)),
        Mxfp4Scale::Floor => exponent(bits),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn e2m1_encodes_to_the_nearest_code_with_ties_to_even() {
        for code in 0..16u8 {
            assert_eq!(encode_e2m1(decode_e2m1(code)), Some(code));
        }
        let steps = (0..=2400).map(|step| step as f32 / 300.0);
        for value in steps.flat_map(|value| [value, -value]) {
            let code = encode_e2m1(value).unwrap();
            let error = |code: u8| (decode_e2m1(code) - value).abs();
            assert!((0..16).all(|other| error(code) <= error(other)), "{value}");
            let ties = (0..16u8).filter(|&other| error(other) == error(code) && other & 8 == code & 8).count();
            assert!(ties == 1 || code.is_multiple_of(2), "{value}");
        }
        assert_eq!(encode_e2m1(1e30), Some(7));
        assert_eq!(encode_e2m1(f32::NEG_INFINITY), Some(15));
        assert_eq!(encode_e2m1(f32::NAN), None);
    }

    /// vLLM #43557, aiter #3992: the exponent of amax / 6 where amax is 6 times a power of two, and beside it.
    #[test]
    fn bug_25_mxfp4_scales_at_six_times_a_power_of_two() {
        for power in -100..100i32 {
            let six = 6.0 * 2f32.powi(power);
            let byte = |offset: i32| (127 + power + offset) as u8;
            let [below, above] = [-1, 1].map(|step| f32::from_bits(six.to_bits().wrapping_add_signed(step)));
            assert_eq!(mxfp4_scale(Mxfp4Scale::Ceil, six), byte(0));
            assert_eq!(mxfp4_scale(Mxfp4Scale::Ceil, below), byte(0));
            assert_eq!(mxfp4_scale(Mxfp4Scale::Ceil, above), byte(1));
            assert_eq!(mxfp4_scale(Mxfp4Scale::Floor, six), byte(0));
            assert_eq!(mxfp4_scale(Mxfp4Scale::Even, six), byte(0));
            // Up from 7 * 2^n on, a tie up as well.
            let seven = 7.0 * 2f32.powi(power);
            let [below, _] = [-1, 1].map(|step| f32::from_bits(seven.to_bits().wrapping_add_signed(step)));
            assert_eq!(mxfp4_scale(Mxfp4Scale::Even, seven), byte(1));
            assert_eq!(mxfp4_scale(Mxfp4Scale::Even, below), byte(0));
        }
        for rule in [Mxfp4Scale::Ceil, Mxfp4Scale::Even, Mxfp4Scale::Floor] {
            assert_eq!(mxfp4_scale(rule, f32::NAN), 255);
            assert_eq!(mxfp4_scale(rule, 0.0), 0);
        }
    }
}
