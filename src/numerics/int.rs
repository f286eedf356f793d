//! Integer codes and the scales of GGUF's blocks of 256.

use super::{decode_bf16, decode_e2m1, decode_e4m3, decode_f16};
use crate::weights::Code;

/// The value of a code, in the low bits, without its scale. Exact.
pub fn decode(code: Code, bits: u32) -> f32 {
    match code {
        Code::F32 => f32::from_bits(bits),
        Code::F16 => decode_f16(bits as u16),
        Code::Bf16 => decode_bf16(bits as u16),
        Code::E4m3 => decode_e4m3(bits as u8),
        Code::E2m1 => decode_e2m1(bits as u8),
        Code::Int8 => f32::from(bits as u8 as i8),
        Code::Int4 => (bits & 15) as f32 - 8.0,
        Code::Uint4 => (bits & 15) as f32,
    }
}

/// Scale and minimum of one of eight blocks: `d * sc` and `dmin * m`, both exact in f32.
pub fn q4_k_scale(words: &[u32; 5], at: usize) -> [f32; 2] {
    let pair = words[1 + at / 2] >> (16 * (at % 2));
    let [d, dmin] = [words[0] as u16, (words[0] >> 16) as u16].map(decode_f16);
    [d * (pair & 0xff) as f32, dmin * (pair >> 8 & 0xff) as f32]
}

/// Scale of one of sixteen blocks: `d * sc`, exact in f32.
pub fn q6_k_scale(words: &[u32; 5], at: usize) -> f32 {
    decode_f16(words[0] as u16) * f32::from((words[1 + at / 4] >> (8 * (at % 4))) as u8 as i8)
}
