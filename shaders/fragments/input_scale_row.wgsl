fn block_input_scale(entering: u32, col: u32) -> f32 {
    return 1.0;
}

fn row_input_scale(entering: u32) -> f32 {
    return bitcast<f32>(input_scales[entering]);
}
