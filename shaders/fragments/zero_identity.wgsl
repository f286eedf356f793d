fn add_zero_expert(sum: f32, slot: u32, index: u32) -> f32 {
    return round_step(sum + weighted_row(topk_weights[slot], input_value(index)));
}
