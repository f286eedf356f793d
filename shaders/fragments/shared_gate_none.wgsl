fn shared_factor(mlp: u32) -> f32 {
    return 1.0;
}
