fn topk_weight(row: u32) -> f32 {
    return topk_weights[row];
}
