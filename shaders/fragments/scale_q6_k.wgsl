const HAS_ZERO: bool = false;
const HAS_MIN: bool = false;

// Five words for sixteen blocks: d, then sc of each. Twin: numerics::q6_k_scale.
fn scale_at(scales: u32, block: u32) -> f32 {
    let super_block = scales + block / 16u * 5u;
    let d = decode_f16(segment_word(super_block) & 0xffffu);
    let word = segment_word(super_block + 1u + block % 16u / 4u);
    return d * f32(bitcast<i32>(word << (24u - 8u * (block % 4u))) >> 24u);
}

fn zero_at(scales: u32, block: u32) -> f32 {
    return 0.0;
}

fn min_at(scales: u32, block: u32) -> f32 {
    return 0.0;
}
