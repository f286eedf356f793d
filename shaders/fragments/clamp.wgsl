fn at_most(value: f32, limit: f32) -> f32 {
    return keep_nan(value, select(value, limit, value > limit));
}

fn within(value: f32, limit: f32) -> f32 {
    return keep_nan(value, select(select(value, limit, value > limit), -limit, value < -limit));
}
