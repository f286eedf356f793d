fn fixed_scale(row: u32) -> u32 {
    return fixed_scales[row % ROWS_PER_TOKEN];
}
