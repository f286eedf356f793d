fn block_input_scale(entering: u32, col: u32) -> f32 {
    let group = min(col / INPUT_GROUP, INPUT_GROUPS - 1u);
    let exponent = (input_scales[entering * ((INPUT_GROUPS + 3u) / 4u) + group / 4u] >> (8u * (group % 4u))) & 0xffu;
    let bits = select(exponent << 23u, 0x400000u, exponent == 0u);
    return bitcast<f32>(select(bits, 0x7fc00000u, exponent == 255u));
}

fn row_input_scale(entering: u32) -> f32 {
    return 1.0;
}
