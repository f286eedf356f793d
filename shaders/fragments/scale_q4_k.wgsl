const HAS_ZERO: bool = false;
const HAS_MIN: bool = true;

// Five words for eight blocks: d and dmin, then sc and m of each. Twin: numerics::q4_k_scale.
fn scale_and_min(scales: u32, block: u32) -> u32 {
    return segment_word(scales + block / 8u * 5u + 1u + block % 8u / 2u) >> (16u * (block % 2u));
}

fn scale_at(scales: u32, block: u32) -> f32 {
    let d = decode_f16(segment_word(scales + block / 8u * 5u) & 0xffffu);
    return d * f32(scale_and_min(scales, block) & 0xffu);
}

fn zero_at(scales: u32, block: u32) -> f32 {
    return 0.0;
}

fn min_at(scales: u32, block: u32) -> f32 {
    let dmin = decode_f16(segment_word(scales + block / 8u * 5u) >> 16u);
    return dmin * f32((scale_and_min(scales, block) >> 8u) & 0xffu);
}
