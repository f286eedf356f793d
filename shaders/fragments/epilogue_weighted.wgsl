fn topk_weight(row: u32) -> f32 {
    return topk_weights[row];
}

fn weigh_row(weight: f32, sum: f32) -> f32 {
    return round_model(weight * sum);
}

fn finish(row: u32, feature: u32, gate: f32, up: f32) -> f32 {
    return weigh_row(topk_weight(row), gate);
}
