fn finish(row: u32, feature: u32, gate: f32, up: f32) -> f32 {
    return round_model(topk_weights[row] * gate);
}
