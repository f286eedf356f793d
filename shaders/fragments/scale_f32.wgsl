const HAS_ZERO: bool = false;
const HAS_MIN: bool = false;

fn scale_at(scales: u32, block: u32) -> f32 {
    return bitcast<f32>(segment_word(scales + block));
}

fn zero_at(scales: u32, block: u32) -> f32 {
    return 0.0;
}

fn min_at(scales: u32, block: u32) -> f32 {
    return 0.0;
}
