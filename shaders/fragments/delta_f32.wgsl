// What the token's adapter adds; 0 without one.
fn add_delta(row: u32, matrix_row: u32, sum: f32) -> f32 {
    return sum + delta[row * MATRIX_ROWS + matrix_row];
}
