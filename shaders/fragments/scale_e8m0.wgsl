const HAS_ZERO: bool = false;
const HAS_MIN: bool = false;

// 2^(byte - 127). Twin: numerics::decode_e8m0; packed scales are never NaN.
fn scale_at(scales: u32, block: u32) -> f32 {
    let exponent = (segment_word(scales + block / 4u) >> (8u * (block % 4u))) & 0xffu;
    return bitcast<f32>(select(exponent << 23u, 0x400000u, exponent == 0u));
}

fn zero_at(scales: u32, block: u32) -> f32 {
    return 0.0;
}

fn min_at(scales: u32, block: u32) -> f32 {
    return 0.0;
}
