fn weigh_hidden(row: u32, hidden: f32) -> f32 {
    return hidden * topk_weights[row];
}
