fn add_bias(sum: f32, col: u32) -> f32 {
    return sum;
}
