fn weighted_row(weight: f32, value: f32) -> f32 {
    return round_model(weight * round_model(value));
}

fn round_step(value: f32) -> f32 {
    return round_model(value);
}
