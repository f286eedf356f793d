fn before_norm(value: f32, col: u32) -> f32 {
    return value * scale_vector[col];
}

fn after_norm(value: f32, col: u32) -> f32 {
    return value;
}
