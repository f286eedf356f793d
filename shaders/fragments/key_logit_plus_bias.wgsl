fn selection_key(base: u32, e: u32) -> f32 {
    return logits[base + e] + selection_bias[e];
}
