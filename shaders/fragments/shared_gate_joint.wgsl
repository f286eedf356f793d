fn shared_factor(mlp: u32) -> f32 {
    return shared_weights[mlp];
}
