const HAS_ZERO: bool = true;
const HAS_MIN: bool = false;

fn scale_at(scales: u32, block: u32) -> f32 {
    return bitcast<f32>(segment_word(scales + block) << 16u);
}

fn zero_at(scales: u32, block: u32) -> f32 {
    return f32(segment_word(scales + block) >> 16u);
}

fn min_at(scales: u32, block: u32) -> f32 {
    return 0.0;
}
