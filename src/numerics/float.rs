//! 16-bit floats: exact widening, one rounding to nearest even.

use crate::spec::FloatType;

/// The value of binary16 bits. Exact.
pub fn decode_f16(bits: u16) -> f32 {
    half::f16::from_bits(bits).to_f32()
}

/// The value of bfloat16 bits. Exact.
pub fn decode_bf16(bits: u16) -> f32 {
    half::bf16::from_bits(bits).to_f32()
}

/// `value` rounded to nearest even in `float_type`, widened again. Overflow gives an infinity.
pub fn round_to(float_type: FloatType, value: f32) -> f32 {
    match float_type {
        FloatType::F32 => value,
        FloatType::F16 => half::f16::from_f32(value).to_f32(),
        FloatType::Bf16 => half::bf16::from_f32(value).to_f32(),
    }
}
