// What the token's adapter adds, in the model's type.
fn add_delta(row: u32, matrix_row: u32, sum: f32) -> f32 {
    return round_model(round_model(sum) + round_model(delta[row * MATRIX_ROWS + matrix_row]));
}
