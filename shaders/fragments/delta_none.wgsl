fn add_delta(row: u32, matrix_row: u32, sum: f32) -> f32 {
    return sum;
}
