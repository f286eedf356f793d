fn output_weight(slot: u32) -> f32 {
    return topk_weights[slot];
}
