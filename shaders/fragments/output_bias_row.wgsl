fn add_bias(sum: f32, col: u32) -> f32 {
    return round_step(sum + output_bias[col]);
}
