//! FP8 codes (OCP 8-bit floating point, E4M3 "FN" variant) and power-of-two scales (OCP MX, E8M0).

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

/// [`decode_e4m3`] of all 256 codes.
pub fn e4m3_values() -> &'static [f32; 256] {
    static VALUES: LazyLock<[f32; 256]> = LazyLock::new(|| std::array::from_fn(|code| decode_e4m3(code as u8)));
    &VALUES
}

/// Value of an E8M0 scale byte: 2^(byte - 127), 255 is NaN. Exact, 2^-127 included.
pub fn decode_e8m0(byte: u8) -> f32 {
    match byte {
        0 => f32::from_bits(0x0040_0000),
        255 => f32::NAN,
        exponent => f32::from_bits(u32::from(exponent) << 23),
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
}
