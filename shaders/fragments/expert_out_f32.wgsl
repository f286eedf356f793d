fn expert_value(at: u32) -> f32 {
    return expert_out[at];
}
