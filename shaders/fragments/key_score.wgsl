fn selection_key(base: u32, e: u32) -> f32 {
    return scores[e];
}
