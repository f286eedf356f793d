fn expert_scale(id: u32) -> f32 {
    return 1.0;
}
