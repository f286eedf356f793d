//! FP8 codes (OCP 8-bit floating point: E4M3 "FN" and E5M2) and power-of-two scales (OCP MX, E8M0).

use std::sync::LazyLock;

/// Value of an E4M3FN code: bias 7, largest 448, no infinities, NaN at 0x7F and 0xFF. Exact.
pub fn decode_e4m3(code: u8) -> f32 {
    let magnitude = u32::from(code & 0x7f);
    let sign = u32::from(code & 0x80) << 24;
    let value = if magnitude == 0x7f {
        f32::NAN
    } else if magnitude < 8 {
        // Subnormal: m * 2^-9.
        magnitude as f32 * 0.001_953_125
    } else {
        f32::from_bits((magnitude << 20) + (120 << 23))
    };
    f32::from_bits(value.to_bits() | sign)
}

/// The E4M3FN code nearest to `value`, ties to even; beyond 448 saturated, NaN is 0x7F with its sign.
pub fn encode_e4m3(value: f32) -> u8 {
    let bits = value.to_bits();
    let (sign, magnitude) = ((bits >> 24 & 0x80) as u8, bits & 0x7fff_ffff);
    let code = if magnitude > 0x7f80_0000 {
        0x7f
    } else if magnitude >= 0x3c80_0000 {
        // At least 2^-6: the upper three bits of the mantissa, rounded. An overflow of it is the next exponent.
        let rounded = u64::from(magnitude) + 0x7_ffff + u64::from(magnitude >> 20 & 1);
        ((rounded >> 20) - (120 << 3)).min(0x7e) as u8
    } else {
        // Subnormal: an integer times 2^-9. Adding 2^14 rounds to it, ties to even.
        ((f32::from_bits(magnitude) + 16_384.0).to_bits() - 16_384f32.to_bits()) as u8
    };
    code | sign
}

/// [`decode_e4m3`] of all 256 codes.
pub fn e4m3_values() -> &'static [f32; 256] {
    static VALUES: LazyLock<[f32; 256]> = LazyLock::new(|| std::array::from_fn(|code| decode_e4m3(code as u8)));
    &VALUES
}

/// Value of an E5M2 code: the upper byte of an f16. No weights have it; it is here so that they can be refused.
pub fn decode_e5m2(code: u8) -> f32 {
    super::decode_f16(u16::from(code) << 8)
}

/// Value of an E8M0 scale byte: 2^(byte - 127), 255 is NaN. Exact, 2^-127 included.
pub fn decode_e8m0(byte: u8) -> f32 {
    match byte {
        0 => f32::from_bits(0x0040_0000),
        255 => f32::NAN,
        exponent => f32::from_bits(u32::from(exponent) << 23),
    }
}

/// The byte of the smallest power of two that is not below `scale` (which is not negative): at most 254, 0 up
/// to 2^-127, 255 for NaN. On bits, for `log2` misrounds near powers of two.
pub fn ceil_e8m0(scale: f32) -> u8 {
    let bits = scale.to_bits() & 0x7fff_ffff;
    if bits > 0x7f80_0000 {
        255
    } else if bits <= 0x0040_0000 {
        0
    } else {
        ((bits >> 23) + u32::from(bits & 0x007f_ffff != 0)).min(254) as u8
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn e4m3_codes_have_the_values_of_the_definition() {
        for code in 0..=255u8 {
            let (exponent, mantissa) = (i32::from(code >> 3 & 15), f64::from(code & 7));
            let magnitude =
                if exponent == 0 { mantissa * 2f64.powi(-9) } else { (1.0 + mantissa / 8.0) * 2f64.powi(exponent - 7) };
            let value = decode_e4m3(code);
            if code & 0x7f == 0x7f {
                assert!(value.is_nan());
            } else {
                assert_eq!(f64::from(value.abs()), magnitude, "{code:#x}");
                assert_eq!(value.is_sign_negative(), code >= 128, "{code:#x}");
            }
        }
    }

    /// By its definition: the nearest of the 127 values, of two equally near ones the even code.
    fn nearest(value: f32) -> u8 {
        let sign = if value.is_sign_negative() { 0x80 } else { 0 };
        if value.is_nan() {
            return 0x7f | sign;
        }
        let distance = |code: u8| (f64::from(decode_e4m3(code)) - f64::from(value.abs().min(448.0))).abs();
        let best = (0..0x7fu8).min_by(|&a, &b| {
            let even_first = (a % 2).cmp(&(b % 2));
            distance(a).total_cmp(&distance(b)).then(even_first)
        });
        best.unwrap() | sign
    }

    #[test]
    fn e4m3_encodes_to_the_nearest_code_around_every_code_and_every_middle() {
        for code in 0..=0x7eu8 {
            let (value, above) = (decode_e4m3(code), decode_e4m3((code + 1).min(0x7e)));
            for anchor in [value, value.midpoint(above)] {
                for step in -3i32..=3 {
                    let near = f32::from_bits(anchor.to_bits().saturating_add_signed(step));
                    for near in [near, -near] {
                        assert_eq!(encode_e4m3(near), nearest(near), "{near:e}");
                    }
                }
            }
        }
        for value in [449.0, 464.0, 465.0, 1e30, f32::INFINITY, f32::NAN, 1e-10, 1e-40, 0.0] {
            for value in [value, -value] {
                assert_eq!(encode_e4m3(value), nearest(value), "{value}");
            }
        }
    }

    #[test]
    fn e8m0_rounds_up_on_bits() {
        for byte in 1..254u8 {
            let power = decode_e8m0(byte);
            assert_eq!(ceil_e8m0(power), byte);
            assert_eq!(ceil_e8m0(f32::from_bits(power.to_bits() + 1)), byte + 1);
            assert_eq!(ceil_e8m0(f32::from_bits(power.to_bits() - 1)), byte);
        }
        let ends = [(0.0, 0), (1e-45, 0), (f32::MAX, 254), (f32::INFINITY, 254), (f32::NAN, 255), (-f32::NAN, 255)];
        for (scale, byte) in ends {
            assert_eq!(ceil_e8m0(scale), byte, "{scale}");
        }
    }
}
