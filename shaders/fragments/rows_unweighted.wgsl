// Beside epilogues that leave the weights to the sum of the rows.
fn topk_weight(row: u32) -> f32 {
    return 1.0;
}

fn weigh_row(weight: f32, sum: f32) -> f32 {
    return sum;
}
