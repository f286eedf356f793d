// 1 / (1 + exp(-l)); exactly 0 where the exponential leaves f32, and 0 and 1 at the infinities.
fn sigmoid(logit: f32) -> f32 {
    let value = 1.0 / (1.0 + exp(-clamp(logit, -88.72, 88.0)));
    return select(value, 0.0, logit < -88.72);
}
