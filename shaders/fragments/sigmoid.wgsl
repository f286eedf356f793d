// 1 / (1 + exp(-l)); exactly 0 and 1 where the exponential leaves f32, infinities included.
fn sigmoid(logit: f32) -> f32 {
    let value = 1.0 / (1.0 + exp(-clamp(logit, -88.0, 88.0)));
    return select(value, 0.0, logit < -88.0);
}
