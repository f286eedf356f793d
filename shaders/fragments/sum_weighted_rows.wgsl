fn weighted_row(weight: f32, value: f32) -> f32 {
    return round_model(weight * value);
}

fn round_step(value: f32) -> f32 {
    return value;
}
