fn block_input_scale(entering: u32, col: u32) -> f32 {
    return bitcast<f32>(input_scales[min(col / INPUT_GROUP, INPUT_GROUPS - 1u) * INPUT_SCALE_STRIDE + entering]);
}

fn row_input_scale(entering: u32) -> f32 {
    return 1.0;
}
