fn source_value(row: u32, col: u32) -> f32 {
    return weigh_input(row, input_value(row / INPUT_DIVISOR * COLS + col));
}
