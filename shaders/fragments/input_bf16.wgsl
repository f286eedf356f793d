fn input_value(index: u32) -> f32 {
    return bitcast<f32>((rows[index >> 1u] >> (16u * (index & 1u))) << 16u);
}
