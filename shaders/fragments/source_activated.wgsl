// Gate and up alternate in a row; without gate there is one value.
fn source_value(row: u32, col: u32) -> f32 {
    let at = (row * COLS + col) * FEATURE_ROWS;
    return finish(row, col, input_value(at), input_value(at + FEATURE_ROWS - 1u));
}
